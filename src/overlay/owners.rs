//! The directory of sealed layers: which layer owns which block, determined once per chunk.
//!
//! ```text
//!   chunk      0        1        2        3 ...
//!   layer 0    .        .d.d.    .        .          d: data or zeros, .: nothing
//!   layer 1    .        ..ddd    .        .
//!   layer 2    .        .        ddddd    .
//!   cached     Uniform  Runs     Uniform  Uniform    an entry of `ChunkOwners`
//! ```
//!
//! - `Uniform`: one owner for all blocks, which may be no layer at all.
//! - `Runs`: the owner of each run.
//! - `Walk`: the layers that own blocks there, to be asked one after the other. For a chunk in which
//!   a single layer owns some blocks, whose map answers as fast, and for one with too many runs to
//!   list.
//!
//! Sealed layers never change, so an entry stays valid as long as the directory.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

use super::Overlay;
use super::blocks::CHUNK_BLOCKS;
use super::state::{BlockIndex, BlockState};

/// The most runs listed for one chunk: 16 KiB, about the size of a leaf of the map.
const MAX_LISTED_RUNS: usize = 4096;

/// Layers, top to bottom, and the owners of their blocks as far as they were asked for.
pub(super) struct OwnerDirectory {
    /// The layers; at least one.
    layers: Vec<Arc<Overlay>>,
    /// The owners of the blocks, each entry under its first chunk.
    pub(super) directory: RwLock<BTreeMap<u64, ChunkOwners>>,
}

/// The owners of the blocks of a chunk.
pub(super) enum ChunkOwners {
    /// One owner for all blocks up to the chunk `end` (exclusive).
    Uniform { end: u64, owner: BlockOwner },
    /// The owner of each run, under the run's first block counted from the start of the chunk.
    Runs(Box<[(u16, BlockOwner)]>),
    /// The layers to ask, top to bottom; no other layer owns a block here.
    Walk(Box<[u16]>),
}

/// The layer that owns a block, and the block's state there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BlockOwner {
    /// The layer's position, counted from the top; the number of layers when none of them owns the
    /// block.
    pub(super) layer: u16,
    pub(super) state: BlockState,
}

/// The owner of the run of blocks at an offset.
pub(super) struct OwnedRun {
    pub(super) owner: BlockOwner,
    /// The first byte after the run; the owner may change there.
    pub(super) end: u64,
}

impl OwnerDirectory {
    /// Creates an empty directory of `layers`, top to bottom, of which there is at least one.
    pub(super) fn new(layers: Vec<Arc<Overlay>>) -> Self {
        Self { layers, directory: RwLock::default() }
    }

    /// Returns the layers, top to bottom.
    #[inline]
    pub(super) fn layers(&self) -> &[Arc<Overlay>] {
        &self.layers
    }

    pub(super) fn block_size(&self) -> u64 {
        self.layers[0].block_size()
    }

    pub(super) fn lower_owner(&self) -> BlockOwner {
        BlockOwner {
            layer: u16::try_from(self.layers.len()).unwrap_or(u16::MAX),
            state: BlockState::Lower,
        }
    }

    /// Finds the layer that owns the first block of `range`, and the end of its run.
    pub(super) fn owner_at(&self, range: &Range<u64>) -> OwnedRun {
        let first = range.start / self.block_size();
        let chunk = first / CHUNK_BLOCKS;
        if let Some(found) = self.known_owner_at(first, chunk) {
            return found;
        }
        let owners = self.resolve_chunk(chunk);
        self.directory.write().insert(chunk, owners);
        self.known_owner_at(first, chunk).unwrap_or_else(|| {
            // Unreachable: the entry was inserted above. Asking the layers below for one block and
            // then looking again is always safe.
            OwnedRun { owner: self.lower_owner(), end: (first + 1) * self.block_size() }
        })
    }

    fn known_owner_at(&self, first: u64, chunk: u64) -> Option<OwnedRun> {
        let bytes = |block: u64| block.saturating_mul(self.block_size());
        let directory = self.directory.read();
        let (start, owners) = directory.range(..=chunk).next_back()?;
        match owners {
            ChunkOwners::Uniform { end, owner } if chunk < *end => {
                Some(OwnedRun { owner: *owner, end: bytes(end.saturating_mul(CHUNK_BLOCKS)) })
            }
            ChunkOwners::Runs(runs) if chunk == *start => {
                let base = chunk * CHUNK_BLOCKS;
                let after = runs.partition_point(|(at, _)| u64::from(*at) <= first - base);
                let end = runs.get(after).map_or(CHUNK_BLOCKS, |(at, _)| u64::from(*at));
                let owner = runs.get(after.checked_sub(1)?)?.1;
                Some(OwnedRun { owner, end: bytes(base + end) })
            }
            ChunkOwners::Walk(layers) if chunk == *start => {
                let end = (chunk + 1) * CHUNK_BLOCKS;
                let (owner, end) = self.walk(layers, first, end);
                Some(OwnedRun { owner, end: bytes(end) })
            }
            _ => None,
        }
    }

    /// Finds the owner of the blocks from `first` on among `layers`, looking no further than `end`.
    fn walk(&self, layers: &[u16], first: u64, mut end: u64) -> (BlockOwner, u64) {
        for &layer in layers {
            let map = self.layers[usize::from(layer)].map.read();
            let run = map.blocks.run_at(BlockIndex(first)..BlockIndex(end));
            end = run.range.end.0;
            if run.state != BlockState::Lower {
                return (BlockOwner { layer, state: run.state }, end);
            }
        }
        (self.lower_owner(), end)
    }

    /// Determines the owners of the blocks of `chunk`.
    fn resolve_chunk(&self, chunk: u64) -> ChunkOwners {
        let mut end = u64::MAX;
        let mut mixed = Vec::new();
        let mut bottom = self.lower_owner();
        for (layer, at) in self.layers.iter().zip(0u16..) {
            let (state, reaches) = layer.map.read().blocks.chunk_at(chunk);
            end = end.min(reaches);
            match state {
                Some(BlockState::Lower) => {}
                Some(state) => {
                    bottom = BlockOwner { layer: at, state };
                    break;
                }
                None => mixed.push(at),
            }
        }
        if mixed.is_empty() {
            return ChunkOwners::Uniform { end, owner: bottom };
        }
        let walk = || {
            let last = (bottom != self.lower_owner()).then_some(bottom.layer);
            ChunkOwners::Walk(mixed.iter().copied().chain(last).collect())
        };
        if mixed.len() == 1 && bottom == self.lower_owner() {
            return walk();
        }
        match self.list_runs(chunk, &mixed, bottom) {
            Some(runs) => ChunkOwners::Runs(runs),
            None => walk(),
        }
    }

    /// Lists the runs of a chunk in which the layers `mixed` own blocks above `bottom`; `None` when
    /// there are too many runs.
    fn list_runs(
        &self,
        chunk: u64,
        mixed: &[u16],
        bottom: BlockOwner,
    ) -> Option<Box<[(u16, BlockOwner)]>> {
        let base = chunk * CHUNK_BLOCKS;
        let whole = BlockIndex(base)..BlockIndex(base + CHUNK_BLOCKS);
        let index = |block: BlockIndex| usize::try_from(block.0 - base).unwrap_or(usize::MAX);
        let mut owners = vec![bottom; index(whole.end)];
        for &layer in mixed.iter().rev() {
            let map = self.layers[usize::from(layer)].map.read();
            for run in map.blocks.runs(whole.clone()).filter(|run| run.state != BlockState::Lower) {
                let owner = BlockOwner { layer, state: run.state };
                owners[index(run.range.start)..index(run.range.end)].fill(owner);
            }
        }
        let mut runs = Vec::new();
        let mut at = 0;
        for run in owners.chunk_by(|one, next| one == next) {
            if runs.len() == MAX_LISTED_RUNS {
                return None;
            }
            runs.push((u16::try_from(at).ok()?, run[0]));
            at += run.len();
        }
        Some(runs.into_boxed_slice())
    }

    /// Returns the layer that answers for all blocks of `chunk` as the only one, when its owners are
    /// known and it has more than one state there.
    pub(super) fn sole_owner(&self, chunk: u64) -> Option<usize> {
        match self.directory.read().get(&chunk) {
            Some(ChunkOwners::Walk(layers)) if layers.len() == 1 => Some(usize::from(layers[0])),
            _ => None,
        }
    }
}
