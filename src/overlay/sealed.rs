//! The sealed layers of a disk, looked up as one.
//!
//! A read that falls through the top would ask one layer after the other, 64 of them in a deep
//! stack. Sealed layers never change, so who has what is found out once a chunk and kept:
//!
//! ```text
//!   chunk      0        1        2        3 ...
//!   layer 0    .        .d.d.    .        .          d: data or zeros, .: nothing
//!   layer 1    .        ..ddd    .        .
//!   layer 2    .        .        ddddd    .
//!   kept       Lower    Runs     Uniform  Lower      which layer has which blocks
//! ```
//!
//! - A chunk where one layer alone has something is that layer's to answer (`Walk`).
//! - One with too many runs to list asks the layers that have something there, and only those.
//!
//! Sizes cut what is seen: nothing of a layer shows past its own size, nor past the smallest size
//! (`lower_limit`) of any layer above it. `reach` holds that bound for each.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use super::blocks::{BlockIndex, CHUNK_BLOCKS, State};
use super::{Overlay, Usage};
use crate::extents::{Extent, Kind};
use crate::host::errno;
use crate::layer::{Copy, Layer, Wait};

/// A chunk with more runs than this is not listed: 16 KiB, about what a leaf of the map takes.
const MOST_RUNS: usize = 4096;

/// Sealed layers, one above the other.
pub struct Sealed {
    /// Top to bottom; at least one.
    layers: Vec<Arc<Overlay>>,
    /// Bytes at or past this offset are not seen of the layer; the last is for what lies below.
    reach: Vec<u64>,
    /// By the first chunk.
    directory: RwLock<BTreeMap<u64, Segment>>,
}

/// Who has the blocks of a chunk.
enum Segment {
    /// The same for all up to the chunk `end` (not included).
    Uniform { end: u64, owner: Owner },
    /// By the first block of each run, counted from the chunk's.
    Runs(Box<[(u16, Owner)]>),
    /// To be asked for, of these layers only, top to bottom.
    Walk(Box<[u16]>),
}

/// Which layer has a block, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Owner {
    /// The layer, counted from the top; their number for what lies below all of them.
    layer: u16,
    state: State,
}

/// What lies at a place.
struct Found {
    owner: Owner,
    /// The first byte past it that may be another's.
    end: u64,
}

impl Sealed {
    /// Looks `layers`, top to bottom, up as one. `None` when there is none, or more than 2^15.
    #[must_use]
    pub fn new(layers: Vec<Arc<Overlay>>) -> Option<Self> {
        if layers.is_empty() || layers.len() > 1 << 15 {
            return None;
        }
        let mut reach = Vec::with_capacity(layers.len() + 1);
        let mut seen = u64::MAX;
        for layer in &layers {
            let map = layer.map.read();
            seen = seen.min(map.size);
            reach.push(seen);
            seen = seen.min(map.lower_limit);
        }
        reach.push(seen);
        Some(Self { layers, reach, directory: RwLock::default() })
    }

    /// The layers, top to bottom.
    #[must_use]
    pub fn layers(&self) -> &[Arc<Overlay>] {
        &self.layers
    }

    /// How far down into what lies below all of them one can see, in bytes.
    #[must_use]
    pub fn lower_limit(&self) -> u64 {
        self.reach.last().copied().unwrap_or(0)
    }

    fn block(&self) -> u64 {
        self.layers[0].block()
    }

    fn below(&self) -> Owner {
        Owner { layer: u16::try_from(self.layers.len()).unwrap_or(u16::MAX), state: State::Lower }
    }

    /// Who has the first block of `range`, and how far.
    fn find(&self, range: &Range<u64>) -> Found {
        let first = range.start / self.block();
        let chunk = first / CHUNK_BLOCKS;
        if let Some(found) = self.find_in_directory(first, chunk) {
            return found;
        }
        let segment = self.compose(chunk);
        self.directory.write().insert(chunk, segment);
        self.find_in_directory(first, chunk).unwrap_or_else(|| {
            // Cannot be: it was put there above. One block of what lies below is always safe
            // to ask about again.
            Found { owner: self.below(), end: (first + 1) * self.block() }
        })
    }

    fn find_in_directory(&self, first: u64, chunk: u64) -> Option<Found> {
        let bytes = |block: u64| block.saturating_mul(self.block());
        let directory = self.directory.read();
        let (start, segment) = directory.range(..=chunk).next_back()?;
        match segment {
            Segment::Uniform { end, owner } if chunk < *end => {
                Some(Found { owner: *owner, end: bytes(end.saturating_mul(CHUNK_BLOCKS)) })
            }
            Segment::Runs(runs) if chunk == *start => {
                let base = chunk * CHUNK_BLOCKS;
                let after = runs.partition_point(|(at, _)| u64::from(*at) <= first - base);
                let end = runs.get(after).map_or(CHUNK_BLOCKS, |(at, _)| u64::from(*at));
                let owner = runs.get(after.checked_sub(1)?)?.1;
                Some(Found { owner, end: bytes(base + end) })
            }
            Segment::Walk(layers) if chunk == *start => {
                let end = (chunk + 1) * CHUNK_BLOCKS;
                let (owner, end) = self.walk(layers, first, end);
                Some(Found { owner, end: bytes(end) })
            }
            _ => None,
        }
    }

    /// Asks `layers` about the blocks from `first` on, up to `end`.
    fn walk(&self, layers: &[u16], first: u64, mut end: u64) -> (Owner, u64) {
        for &layer in layers {
            let map = self.layers[usize::from(layer)].map.read();
            let run = map.blocks.run_at(BlockIndex(first)..BlockIndex(end));
            end = run.range.end.0;
            if run.state != State::Lower {
                return (Owner { layer, state: run.state }, end);
            }
        }
        (self.below(), end)
    }

    /// Finds out who has what in `chunk`.
    fn compose(&self, chunk: u64) -> Segment {
        let mut end = u64::MAX;
        let mut mixed = Vec::new();
        let mut bottom = self.below();
        for (layer, at) in self.layers.iter().zip(0u16..) {
            let (state, reaches) = layer.map.read().blocks.chunk_at(chunk);
            end = end.min(reaches);
            match state {
                Some(State::Lower) => {}
                Some(state) => {
                    bottom = Owner { layer: at, state };
                    break;
                }
                None => mixed.push(at),
            }
        }
        if mixed.is_empty() {
            return Segment::Uniform { end, owner: bottom };
        }
        let asked = || {
            let last = (bottom != self.below()).then_some(bottom.layer);
            Segment::Walk(mixed.iter().copied().chain(last).collect())
        };
        if mixed.len() == 1 && bottom == self.below() {
            return asked();
        }
        match self.list(chunk, &mixed, bottom) {
            Some(runs) => Segment::Runs(runs),
            None => asked(),
        }
    }

    /// The runs of a chunk that `mixed` layers share, over `bottom`; `None` when they are many.
    fn list(&self, chunk: u64, mixed: &[u16], bottom: Owner) -> Option<Box<[(u16, Owner)]>> {
        let base = chunk * CHUNK_BLOCKS;
        let whole = BlockIndex(base)..BlockIndex(base + CHUNK_BLOCKS);
        let place = |block: BlockIndex| usize::try_from(block.0 - base).unwrap_or(usize::MAX);
        let mut owners = vec![bottom; place(whole.end)];
        for &layer in mixed.iter().rev() {
            let map = self.layers[usize::from(layer)].map.read();
            for run in map.blocks.runs(whole.clone()).filter(|run| run.state != State::Lower) {
                let owner = Owner { layer, state: run.state };
                owners[place(run.range.start)..place(run.range.end)].fill(owner);
            }
        }
        let mut runs = Vec::new();
        let mut at = 0;
        for run in owners.chunk_by(|one, next| one == next) {
            if runs.len() == MOST_RUNS {
                return None;
            }
            runs.push((u16::try_from(at).ok()?, run[0]));
            at += run.len();
        }
        Some(runs.into_boxed_slice())
    }

    /// For each layer the bytes of which it decides what is read: what it holds and no layer above
    /// hides. So the sum over some layers from the top is what changed since the one below them.
    #[must_use]
    pub fn shown(&self) -> Vec<Usage> {
        let mut shown = vec![Usage { data: 0, zero: 0 }; self.layers.len()];
        let (mut at, size) = (0, self.reach[0]);
        while at < size {
            let (first, chunk) = (at / self.block(), at / self.block() / CHUNK_BLOCKS);
            let end = (chunk + 1).saturating_mul(CHUNK_BLOCKS).saturating_mul(self.block());
            if let Some((layer, usage)) = self.alone_in(first, chunk, end) {
                shown[layer].data += usage.data;
                shown[layer].zero += usage.zero;
                at = end;
                continue;
            }
            let Found { owner, end } = self.find(&(at..size));
            let layer = usize::from(owner.layer);
            let len = end.min(self.reach[layer]).saturating_sub(at);
            match owner.state {
                State::Data => shown[layer].data += len,
                State::Zero => shown[layer].zero += len,
                State::Lower => {}
            }
            at = end;
        }
        shown
    }

    /// What the only layer with anything in `chunk`, which begins at block `first` and ends at
    /// byte `end`, has there: counted without a step for each of its runs.
    fn alone_in(&self, first: u64, chunk: u64, end: u64) -> Option<(usize, Usage)> {
        if first != chunk * CHUNK_BLOCKS {
            return None;
        }
        self.find(&(first * self.block()..end));
        let directory = self.directory.read();
        let Some(Segment::Walk(layers)) = directory.get(&chunk) else {
            return None;
        };
        let [layer] = layers[..] else { return None };
        let layer = usize::from(layer);
        if end > self.reach[layer] {
            return None;
        }
        let map = self.layers[layer].map.read();
        let blocks = BlockIndex(first)..BlockIndex(first + CHUNK_BLOCKS);
        let bytes = |state| map.blocks.count(blocks.clone(), state) * self.block();
        Some((layer, Usage { data: bytes(State::Data), zero: bytes(State::Zero) }))
    }

    /// What is at the start of `range` (bytes, not empty), and which layer has it: their number
    /// for [`Kind::Lower`].
    #[must_use]
    pub fn extent_of(&self, range: &Range<u64>) -> (Extent, usize) {
        let Found { owner, end } = self.find(range);
        let layer = usize::from(owner.layer);
        let reach = self.reach[layer];
        let end = end.min(range.end);
        if range.start >= reach {
            // Whoever has it, it was cut off.
            return (Extent::new(range.start..end, Kind::Hole), layer.min(self.layers.len() - 1));
        }
        let extent = Extent::new(
            range.start..end.min(reach),
            match owner.state {
                State::Data => Kind::Data,
                State::Zero => Kind::Hole,
                State::Lower => Kind::Lower,
            },
        );
        (extent, layer)
    }
}

impl Layer for Sealed {
    fn size(&self) -> u64 {
        self.layers[0].size()
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        Ok(self.extent_of(&range).0)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let (extent, layer) = self.extent_of(&(offset..offset + buf.len() as u64));
        if extent.kind == Kind::Data {
            let len = usize::try_from(extent.len()).map_err(|_| errno(libc::EFBIG))?;
            // A sealed layer frees nothing that its map calls Data: no reader has to be counted.
            self.layers[layer].data.read_at(&mut buf[..len], offset, wait)?;
        }
        Ok(extent)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        _: Wait,
        copy: Copy<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let (extent, layer) = self.extent_of(&range);
        let file = match extent.kind {
            Kind::Data => self.layers[layer].data.backing(extent.range.clone()),
            _ => None,
        };
        let copied = file.map(|file| copy(file, extent.range.clone())).transpose()?;
        Ok((extent, copied))
    }
}
