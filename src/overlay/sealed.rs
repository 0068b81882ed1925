//! The sealed layers of a disk, looked up as one.
//!
//! A read that falls through the top would have to ask one layer after the other, 64 of them in a
//! deep stack. Sealed layers never change, so the directory in `owners` remembers which of them owns
//! which block.
//!
//! Sizes limit what is visible: nothing of a layer shows past its own size, nor past the smallest
//! size (`lower_limit`) of any layer above it. `visible_ends` holds that bound for each layer.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::blocks::CHUNK_BLOCKS;
use super::owners::{OwnedRun, OwnerDirectory};
use super::state::{BlockIndex, BlockState};
use super::tree::MAX_LAYERS;
use super::{Overlay, Usage};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};

/// Sealed layers, one above the other.
pub struct Sealed {
    /// The layers, and the owners of their blocks.
    owners: OwnerDirectory,
    /// For each layer, the offset in bytes from which on it is hidden; the last entry is for the
    /// layers below all of them.
    visible_ends: Vec<u64>,
}

impl Sealed {
    /// Combines `layers`, top to bottom. Returns `None` when there are none or more than
    /// [`MAX_LAYERS`].
    #[must_use]
    pub fn new(layers: Vec<Arc<Overlay>>) -> Option<Self> {
        if layers.is_empty() || layers.len() > MAX_LAYERS {
            return None;
        }
        let mut visible_ends = Vec::with_capacity(layers.len() + 1);
        let mut end = u64::MAX;
        for layer in &layers {
            let map = layer.map.read();
            end = end.min(map.size);
            visible_ends.push(end);
            end = end.min(map.lower_limit);
        }
        visible_ends.push(end);
        Some(Self { owners: OwnerDirectory::new(layers), visible_ends })
    }

    /// Returns the layers, top to bottom.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Overlay>] {
        self.owners.layers()
    }

    /// Returns the offset in bytes from which on everything below these layers is hidden.
    #[must_use]
    pub fn lower_limit(&self) -> u64 {
        self.visible_ends.last().copied().unwrap_or(0)
    }

    /// Returns, for each layer, the bytes of the disk that it determines: those that the layer
    /// holds and no layer above hides. The sum over some layers from the top is the amount changed
    /// since the layer below them.
    #[must_use]
    pub fn visible_usage(&self) -> Vec<Usage> {
        let mut shown = vec![Usage { data: 0, zero: 0 }; self.layers().len()];
        let block_size = self.owners.block_size();
        let (mut at, size) = (0, self.visible_ends[0]);
        while at < size {
            let (first, chunk) = (at / block_size, at / block_size / CHUNK_BLOCKS);
            let end = (chunk + 1).saturating_mul(CHUNK_BLOCKS).saturating_mul(block_size);
            if let Some((layer, usage)) = self.sole_layer_usage(first, chunk, end) {
                shown[layer].data += usage.data;
                shown[layer].zero += usage.zero;
                at = end;
                continue;
            }
            let OwnedRun { owner, end } = self.owners.owner_at(&(at..size));
            let layer = usize::from(owner.layer);
            let len = end.min(self.visible_ends[layer]).saturating_sub(at);
            match owner.state {
                BlockState::Data => shown[layer].data += len,
                BlockState::Zero => shown[layer].zero += len,
                BlockState::Lower => {}
            }
            at = end;
        }
        shown
    }

    /// Counts the blocks in `chunk`, which begins at block `first` and ends at byte `end`, when a
    /// single layer owns all of them; takes no step for each of the layer's runs.
    fn sole_layer_usage(&self, first: u64, chunk: u64, end: u64) -> Option<(usize, Usage)> {
        let block_size = self.owners.block_size();
        if first != chunk * CHUNK_BLOCKS {
            return None;
        }
        self.owners.owner_at(&(first * block_size..end));
        let layer = self.owners.sole_owner(chunk)?;
        if end > self.visible_ends[layer] {
            return None;
        }
        let map = self.layers()[layer].map.read();
        let blocks = BlockIndex(first)..BlockIndex(first + CHUNK_BLOCKS);
        let bytes = |state| map.blocks.count(blocks.clone(), state) * block_size;
        Some((layer, Usage { data: bytes(BlockState::Data), zero: bytes(BlockState::Zero) }))
    }

    /// Returns the extent at the start of `range` (bytes, not empty) and the layer that owns it:
    /// the number of layers for [`ExtentKind::Lower`].
    #[must_use]
    pub fn extent_and_layer(&self, range: &Range<u64>) -> (Extent, usize) {
        let OwnedRun { owner, end } = self.owners.owner_at(range);
        let layer = usize::from(owner.layer);
        let visible_end = self.visible_ends[layer];
        let end = end.min(range.end);
        if range.start >= visible_end {
            // Cut off by a smaller size, whichever layer owns the block.
            return (
                Extent::new(range.start..end, ExtentKind::Hole),
                layer.min(self.layers().len() - 1),
            );
        }
        let extent = Extent::new(
            range.start..end.min(visible_end),
            match owner.state {
                BlockState::Data => ExtentKind::Data,
                BlockState::Zero => ExtentKind::Hole,
                BlockState::Lower => ExtentKind::Lower,
            },
        );
        (extent, layer)
    }
}

impl Layer for Sealed {
    fn size(&self) -> u64 {
        self.layers()[0].size()
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        Ok(self.extent_and_layer(&range).0)
    }

    fn extent_with_depth(&self, range: Range<u64>, _: Wait) -> io::Result<(Extent, u32)> {
        let (extent, layer) = self.extent_and_layer(&range);
        Ok((extent, u32::try_from(layer).unwrap_or(u32::MAX)))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let (extent, layer) = self.extent_and_layer(&(offset..offset + buf.len() as u64));
        if extent.kind == ExtentKind::Data {
            let len = usize::try_from(extent.len()).map_err(|_| os_error(libc::EFBIG))?;
            // A sealed layer never frees space that its map calls Data, so readers need not be
            // counted.
            self.layers()[layer].data.read_at(&mut buf[..len], offset, wait)?;
        }
        Ok(extent)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        _: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let (extent, layer) = self.extent_and_layer(&range);
        let file = match extent.kind {
            ExtentKind::Data => self.layers()[layer].data.host_fd(extent.range.clone()),
            _ => None,
        };
        let copied = file.map(|file| copy(file, extent.range.clone())).transpose()?;
        Ok((extent, copied))
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "pieces of files of some MiB")]
pub(super) mod tests {
    use std::path::Path;

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::super::keep::temporary;
    use super::super::merge::NothingBelow;
    use super::super::owners::{BlockOwner, ChunkOwners};
    use super::*;
    use crate::layer::WritableLayer;

    /// Runs longer than this many bytes are compared only at their two ends.
    const MAX_COMPARED_WHOLE: u64 = 128 << 10;

    /// A change to a layer of the plan.
    #[derive(Clone, Debug)]
    pub(in crate::overlay) enum LayerChange {
        Write(u64, u64, u8),
        Zero(u64, u64),
        Resize(u64),
        /// All blocks of a chunk (0), or every second block from its second (1) or third (2) on.
        Chunk(u64, u64, BlockState),
    }

    #[derive(Clone, Debug)]
    pub(in crate::overlay) struct StackPlan {
        pub(in crate::overlay) block: u32,
        /// The size of the lowest layer, and the bytes of the base that it shows.
        base: (u64, u64),
        /// The changes of each layer, bottom to top.
        layers: Vec<Vec<LayerChange>>,
    }

    fn change(block: u64, most: u64) -> impl Strategy<Value = LayerChange> {
        let chunk = block * CHUNK_BLOCKS;
        let place = prop_oneof![
            3 => 0..=most,
            3 => (0..=most / block).prop_map(move |at| at * block),
            2 => (0..=most / chunk, 0u64..3000).prop_map(move |(at, by)| {
                (at * chunk + by).saturating_sub(1500)
            }),
        ];
        let len = prop_oneof![1..3 * block, (1u64..4).prop_map(move |count| count * block)];
        let span = prop_oneof![2 => 1..5 * block, 1 => Just(most), 1 => 1..=most];
        let place = place.boxed();
        prop_oneof![
            4 => (place.clone(), len, 1u8..).prop_map(|(at, len, fill)| LayerChange::Write(at, len, fill)),
            3 => (place.clone(), span).prop_map(|(at, len)| LayerChange::Zero(at, len)),
            2 => place.prop_map(LayerChange::Resize),
        ]
    }

    /// Generates stacks of small layers.
    pub(in crate::overlay) fn small() -> impl Strategy<Value = StackPlan> {
        prop_oneof![Just(512u32), Just(4096)].prop_flat_map(|block| {
            let most = u64::from(block) * 40;
            let layers = vec(vec(change(block.into(), most), 0..6), 1..=6);
            (1..=most, 0..=most, layers).prop_map(move |(size, shown, layers)| StackPlan {
                block,
                base: (size, shown),
                layers,
            })
        })
    }

    /// Generates stacks of layers of more than three chunks.
    pub(in crate::overlay) fn large() -> impl Strategy<Value = StackPlan> {
        let most = 512 * CHUNK_BLOCKS * 7 / 2;
        let state = prop_oneof![Just(BlockState::Data), Just(BlockState::Zero)];
        let chunk = (0u64..4, 0u64..3, state)
            .prop_map(|(chunk, step, state)| LayerChange::Chunk(chunk, step, state));
        let layers = vec(vec(prop_oneof![4 => change(512, most), 1 => chunk], 0..6), 1..=6);
        (1..=most, 0..=most, layers).prop_map(|(size, shown, layers)| StackPlan {
            block: 512,
            base: (size, shown),
            layers,
        })
    }

    fn apply(layer: &Overlay, change: &LayerChange) {
        let (size, block) = (layer.size(), layer.block_size());
        match *change {
            LayerChange::Resize(size) => layer.set_size(size).unwrap(),
            LayerChange::Write(at, len, fill) => {
                let end = at + len;
                if end > size {
                    layer.set_size(end).unwrap();
                }
                let bytes: Vec<u8> = (at..end).map(|at| fill ^ (at % 253) as u8 | 1).collect();
                layer.write_at(&bytes, at, &NothingBelow, Wait::Yes).unwrap();
            }
            LayerChange::Zero(at, len) => {
                let range = at.min(size)..(at + len).min(size);
                if !range.is_empty() {
                    layer.zero(range, &NothingBelow, Wait::Yes).unwrap();
                }
            }
            LayerChange::Chunk(chunk, step, state) => {
                let end = size.div_ceil(block).min((chunk + 1) * CHUNK_BLOCKS);
                let range = (chunk * CHUNK_BLOCKS).min(end)..end;
                let mut map = layer.map.write();
                if step == 0 {
                    map.blocks.set(BlockIndex(range.start)..BlockIndex(range.end), state);
                } else {
                    for at in range.skip(step as usize).step_by(2) {
                        map.blocks.set(BlockIndex(at)..BlockIndex(at + 1), state);
                    }
                }
            }
        }
    }

    impl StackPlan {
        /// Builds the layers, top to bottom. Each starts with the size of the layer below it.
        pub(in crate::overlay) fn build(&self, dir: &Path) -> Vec<Arc<Overlay>> {
            let (mut size, mut shown) = self.base;
            shown = shown.min(size);
            let mut layers = Vec::new();
            for changes in &self.layers {
                let layer = temporary(dir, self.block, size, shown, None).unwrap();
                for change in changes {
                    apply(&layer, change);
                }
                size = layer.size();
                shown = size;
                // Blocks that were set only in the map must exist in the file to be readable.
                let file = layer.data_file().unwrap();
                if file.metadata().unwrap().len() < size {
                    file.set_len(size.next_multiple_of(self.block.into())).unwrap();
                }
                layers.insert(0, Arc::new(layer));
            }
            layers
        }
    }

    /// Finds the extent at the start of `range` and its layer by asking one layer after the other.
    pub(in crate::overlay) fn slow(
        layers: &[Arc<Overlay>],
        mut range: Range<u64>,
    ) -> (Extent, usize) {
        for (depth, layer) in layers.iter().enumerate() {
            let extent = layer.extent_at(range.clone(), Wait::Yes).unwrap();
            assert!(extent.range.start == range.start && !extent.is_empty());
            if extent.kind != ExtentKind::Lower {
                return (extent, depth);
            }
            range = extent.range;
        }
        (Extent::new(range, ExtentKind::Lower), layers.len())
    }

    /// Returns all pieces of a stack, joined; a hole has no layer.
    pub(in crate::overlay) fn pieces(
        size: u64,
        find: impl Fn(Range<u64>) -> (Extent, usize),
    ) -> Vec<(Range<u64>, ExtentKind, Option<usize>)> {
        let mut all: Vec<(Range<u64>, ExtentKind, Option<usize>)> = Vec::new();
        let mut at = 0;
        while at < size {
            let (extent, layer) = find(at..size);
            assert!(extent.range.start == at && !extent.is_empty() && extent.range.end <= size);
            at = extent.range.end;
            let layer = (extent.kind != ExtentKind::Hole).then_some(layer);
            match all.last_mut() {
                Some(last) if (last.1, last.2) == (extent.kind, layer) => last.0.end = at,
                _ => all.push((extent.range, extent.kind, layer)),
            }
        }
        all
    }

    /// Returns the parts of `range` that are compared.
    pub(in crate::overlay) fn parts(range: &Range<u64>) -> Vec<Range<u64>> {
        if range.end - range.start <= MAX_COMPARED_WHOLE {
            return vec![range.clone()];
        }
        vec![
            range.start..range.start + MAX_COMPARED_WHOLE / 2,
            range.end - MAX_COMPARED_WHOLE / 2..range.end,
        ]
    }

    /// Reads the bytes of `range` from the layers; 0xEE where no layer holds any.
    pub(in crate::overlay) fn bytes(layers: &[Arc<Overlay>], range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0xEE; (range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let (extent, layer) = slow(layers, at..range.end);
            let piece =
                &mut bytes[(at - range.start) as usize..(extent.range.end - range.start) as usize];
            match extent.kind {
                ExtentKind::Data => {
                    let got = layers[layer].read_at(piece, at, Wait::Yes).unwrap();
                    assert_eq!(got, extent);
                }
                ExtentKind::Zero | ExtentKind::Hole => piece.fill(0),
                ExtentKind::Lower => {}
            }
            at = extent.range.end;
        }
        bytes
    }

    fn fast_bytes(sealed: &Sealed, range: Range<u64>) -> Vec<u8> {
        let mut bytes = vec![0xEE; (range.end - range.start) as usize];
        let mut at = range.start;
        while at < range.end {
            let rest = &mut bytes[(at - range.start) as usize..];
            let extent = sealed.read_at(rest, at, Wait::Yes).unwrap();
            assert_eq!(extent, sealed.extent_at(at..range.end, Wait::Yes).unwrap());
            if matches!(extent.kind, ExtentKind::Hole | ExtentKind::Zero) {
                rest[..(extent.range.end - at) as usize].fill(0);
            }
            at = extent.range.end;
        }
        bytes
    }

    /// Counts the bytes that each layer shows, piece by piece.
    fn slow_shown(layers: &[Arc<Overlay>]) -> Vec<Usage> {
        let mut shown = vec![Usage { data: 0, zero: 0 }; layers.len()];
        let size = layers[0].size();
        let mut at = 0;
        while at < size {
            let (extent, layer) = slow(layers, at..size);
            let len = extent.range.end - at;
            match extent.kind {
                ExtentKind::Data => shown[layer].data += len,
                ExtentKind::Hole => {
                    let map = layers[layer].map.read();
                    let state = map.blocks.state(BlockIndex(at / layers[layer].block_size()));
                    if at < map.size && state == BlockState::Zero {
                        shown[layer].zero += len;
                    }
                }
                ExtentKind::Zero | ExtentKind::Lower => {}
            }
            at = extent.range.end;
        }
        shown
    }

    fn check(plan: &StackPlan, asked: &[(u64, u64)]) -> Sealed {
        let dir = tempfile::tempdir().unwrap();
        let layers = plan.build(dir.path());
        let size = layers[0].size();
        // The order of the lookups must not matter, although each fills the cache.
        let scattered = Sealed::new(layers.clone()).unwrap();
        for (at, len) in asked {
            let at = at % size.max(1);
            let range = at..at.saturating_add(*len).min(size);
            if !range.is_empty() {
                let (found, layer) = scattered.extent_and_layer(&range);
                let (expected, depth) = slow(&layers, range.clone());
                assert_eq!(found.kind, expected.kind, "at {at}");
                assert!(found.range.start == at && found.range.end <= range.end);
                assert!(found.kind == ExtentKind::Hole || layer == depth, "{layer}, not {depth}");
            }
        }
        assert_eq!(scattered.visible_usage(), slow_shown(&layers));
        let sealed = Sealed::new(layers.clone()).unwrap();
        let expected = pieces(size, |range| slow(&layers, range));
        assert_eq!(pieces(size, |range| scattered.extent_and_layer(&range)), expected);
        assert_eq!(pieces(size, |range| sealed.extent_and_layer(&range)), expected);
        for (range, ..) in expected {
            for part in parts(&range) {
                let around = part.start.saturating_sub(700)..(part.end + 700).min(size);
                assert!(fast_bytes(&sealed, around.clone()) == bytes(&layers, around), "{part:?}");
            }
        }
        assert_eq!(sealed.visible_usage(), slow_shown(&layers));
        assert_eq!(sealed.size(), size);
        sealed
    }

    proptest! {
        #[test]
        fn lookups_in_small_layers_match_a_layer_by_layer_search(
            plan in small(), asked in vec((any::<u64>(), 1u64..100_000), 0..20),
        ) {
            check(&plan, &asked);
        }
    }

    proptest! {
        // Each case walks through hundreds of thousands of blocks.
        #![proptest_config(ProptestConfig { max_shrink_iters: 200, ..ProptestConfig::with_cases(32) })]

        #[test]
        fn lookups_in_layers_of_many_chunks_match_a_layer_by_layer_search(
            plan in large(), asked in vec((any::<u64>(), 1u64..100_000_000), 0..20),
        ) {
            check(&plan, &asked);
        }
    }

    #[test]
    fn each_kind_of_cached_chunk_answers_like_its_layers() {
        let chunk = 512 * CHUNK_BLOCKS;
        let lower = vec![
            LayerChange::Chunk(0, 0, BlockState::Data),
            LayerChange::Write(chunk + 50_000, 3000, 1),
            LayerChange::Chunk(2, 1, BlockState::Data),
            LayerChange::Chunk(3, 1, BlockState::Data),
        ];
        let upper = vec![
            LayerChange::Write(chunk + 100, 10_000, 2),
            LayerChange::Chunk(3, 2, BlockState::Zero),
            LayerChange::Zero(chunk * 5, 1024),
        ];
        let base = (6 * chunk, 5 * chunk + 300);
        let sealed = check(&StackPlan { block: 512, base, layers: vec![lower, upper] }, &[]);
        let directory = sealed.owners.directory.read();
        let whole = |layer, state| BlockOwner { layer, state };
        assert!(
            matches!(&directory[&0], ChunkOwners::Uniform { end: 1, owner } if *owner == whole(1, BlockState::Data))
        );
        assert!(matches!(&directory[&1], ChunkOwners::Runs(runs) if runs.len() > 2));
        assert!(matches!(&directory[&2], ChunkOwners::Walk(layers) if **layers == [1]));
        assert!(matches!(&directory[&3], ChunkOwners::Walk(layers) if **layers == [0, 1]));
        assert!(
            matches!(&directory[&4], ChunkOwners::Uniform { end: 5, owner } if *owner == sealed.owners.lower_owner())
        );
    }
}
