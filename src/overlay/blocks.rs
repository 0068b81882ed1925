//! The overlay's block map in memory: which blocks are Lower, Data or Zero.
//!
//! Most of a disk is long runs and a little of it is finely mixed, so the map is a run-length
//! directory of chunks of [`CHUNK_BLOCKS`] blocks: an entry is either a uniform run of whole chunks
//! or one mixed chunk, a leaf. A block that no entry covers is [`BlockState::Lower`].
//!
//! ```text
//!   chunk       0      1      2      3      4      5      6      7      8 ...
//!   directory          |leaf| |------- Data -------|      |leaf||leaf|
//!   state       Lower  mixed  Data   Data   Data   Lower  mixed  mixed  Lower ...
//! ```
//!
//! Invariants (`check` in the tests):
//! - uniform runs are Data or Zero, never Lower, and two runs of one state never touch: they are
//!   merged;
//! - a leaf holds at least two states; a leaf that becomes uniform goes back into the directory;
//! - the counts of Data and Zero blocks match the entries.
//!
//! Therefore an untouched disk takes no entry at all, a seek across empty space takes one step, a
//! run of one state crosses at most three entries (the tail of a leaf, a uniform run, the head of a
//! leaf), and setting a whole disk is one directory update that drops the leaves in between.
//!
//! Pure: no files, no locks, no I/O. The owner guards the map with a lock and never holds that lock
//! across I/O.

use std::collections::BTreeMap;
use std::ops::Range;

use super::leaf::{BlockCounts, Leaf};
use super::state::{BlockIndex, BlockRun, BlockState};

/// Blocks in a chunk: 256 MiB of disk with blocks of 4 KiB. A plane of a leaf is then 8 KiB: small
/// enough to scan in a microsecond, large enough that 16 TiB take at most 65,536 entries.
pub const CHUNK_BLOCKS: u64 = 65_536;

/// The state of every block, for block indexes up to those of the largest disk and far beyond.
///
/// `CHUNK` is the number of blocks in a chunk; only tests choose a value other than the default.
///
/// The last `CHUNK` indexes before `u64::MAX` are never stored and always Lower, so that a range up
/// to `u64::MAX` ("everything that follows") consists of whole chunks. No disk reaches them: 2⁶⁴
/// bytes are 2⁵⁵ blocks of the smallest size.
#[derive(Clone, Debug, Default)]
pub struct BlockMap<const CHUNK: u64 = CHUNK_BLOCKS> {
    /// Entries, each under its first chunk.
    directory: BTreeMap<u64, ChunkEntry>,
    counts: BlockCounts,
}

/// The entry of the directory at a chunk.
#[derive(Clone, Debug)]
enum ChunkEntry {
    /// All blocks from the chunk under which the entry is stored up to the chunk `end` (exclusive).
    Uniform { end: u64, state: BlockState },
    /// One chunk with more than one state.
    Leaf(Box<Leaf>),
}

impl BlockMap {
    /// Creates a map in which every block is Lower.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }
}

impl<const CHUNK: u64> BlockMap<CHUNK> {
    /// The first block that is never stored: the end of the last whole chunk.
    const END: u64 = u64::MAX - u64::MAX % CHUNK;

    /// Blocks in a chunk, as a `usize`.
    #[expect(clippy::cast_possible_truncation, reason = "65,536, or less in tests")]
    const LEN: usize = CHUNK as usize;

    /// Returns the state of one block.
    #[must_use]
    pub fn state(&self, block: BlockIndex) -> BlockState {
        let chunk = block.0 / CHUNK;
        match self.directory.range(..=chunk).next_back() {
            Some((_, ChunkEntry::Uniform { end, state })) if chunk < *end => *state,
            Some((start, ChunkEntry::Leaf(leaf))) if chunk == *start => {
                leaf.state(Self::offset_in_chunk(block.0))
            }
            _ => BlockState::Lower,
        }
    }

    /// Returns the longest run of one state that starts at `range.start`, cut at `range.end`.
    ///
    /// The run crosses chunks as long as the state stays the same. An empty range gives an empty
    /// run.
    #[must_use]
    pub fn run_at(&self, range: Range<BlockIndex>) -> BlockRun {
        let (first, limit) = (range.start.0, range.end.0.max(range.start.0));
        let (state, mut end) = self.run_in_entry(first, limit);
        while end < limit {
            let (next, next_end) = self.run_in_entry(end, limit);
            if next != state {
                break;
            }
            end = next_end;
        }
        BlockRun { range: range.start..BlockIndex(end), state }
    }

    /// Returns the state of all blocks of `chunk` and the first later chunk where that state may
    /// change. The state is `None` for a mixed chunk, which is always returned alone.
    #[must_use]
    pub fn chunk_at(&self, chunk: u64) -> (Option<BlockState>, u64) {
        match self.directory.range(..=chunk).next_back() {
            Some((_, ChunkEntry::Uniform { end, state })) if chunk < *end => (Some(*state), *end),
            Some((start, ChunkEntry::Leaf(_))) if chunk == *start => (None, chunk + 1),
            _ => {
                let next = self.directory.range(chunk..).next();
                (Some(BlockState::Lower), next.map_or(u64::MAX / CHUNK, |(start, _)| *start))
            }
        }
    }

    /// Iterates over the runs that make up `range`: ascending, each as long as possible, without
    /// gaps.
    pub fn runs(
        &self,
        range: Range<BlockIndex>,
    ) -> impl Iterator<Item = BlockRun> + use<'_, CHUNK> {
        let mut rest = range;
        std::iter::from_fn(move || {
            let run = (!rest.is_empty()).then(|| self.run_at(rest.clone()))?;
            rest.start = run.range.end;
            Some(run)
        })
    }

    /// Returns the total number of Data blocks.
    #[must_use]
    pub fn data_blocks(&self) -> u64 {
        self.counts.data
    }

    /// Returns the total number of Zero blocks.
    #[must_use]
    pub fn zero_blocks(&self) -> u64 {
        self.counts.zero
    }

    /// Returns the number of blocks of `range` that are in `state`.
    #[must_use]
    pub fn count(&self, range: Range<BlockIndex>, state: BlockState) -> u64 {
        if range.is_empty() {
            return 0;
        }
        let len = range.end.0 - range.start.0;
        let counts = self.counts_in(range.start.0..range.end.0.min(Self::END));
        match state {
            BlockState::Lower => len - counts.data - counts.zero,
            BlockState::Data => counts.data,
            BlockState::Zero => counts.zero,
        }
    }

    /// Sets all blocks of `range` to `state`.
    ///
    /// ```text
    ///   chunks     |          |          |          |          |
    ///   range            |---------------------------------|
    ///                    |head|--- whole chunks ----| tail |
    /// ```
    ///
    /// Only the head and the tail, which cover parts of a chunk, can create a leaf.
    pub fn set(&mut self, range: Range<BlockIndex>, state: BlockState) {
        let (start, end) = (range.start.0, range.end.0.min(Self::END));
        if start >= end {
            return;
        }
        let (first, last) = (start / CHUNK, end / CHUNK);
        let (from, to) = (Self::offset_in_chunk(start), Self::offset_in_chunk(end));
        if first == last {
            return self.set_in_chunk(first, from..to, state);
        }
        let whole = start.div_ceil(CHUNK)..last;
        if first < whole.start {
            self.set_in_chunk(first, from..Self::LEN, state);
        }
        if !whole.is_empty() {
            self.set_chunks(whole, state);
        }
        if to > 0 {
            self.set_in_chunk(last, 0..to, state);
        }
    }

    /// Sets every block at and past `block` to Lower, because a smaller disk does not have them.
    pub fn clear_from(&mut self, block: BlockIndex) {
        self.set(block..BlockIndex(u64::MAX), BlockState::Lower);
    }

    /// Returns the position of a block within its chunk.
    #[expect(clippy::cast_possible_truncation, reason = "less than CHUNK, which is 65,536")]
    fn offset_in_chunk(block: u64) -> usize {
        (block % CHUNK) as usize
    }

    /// Returns the state at `block` and the end of its run within the entry there, cut at `limit`.
    fn run_in_entry(&self, block: u64, limit: u64) -> (BlockState, u64) {
        let chunk = block / CHUNK;
        match self.directory.range(..=chunk).next_back() {
            Some((_, ChunkEntry::Uniform { end, state })) if chunk < *end => {
                (*state, limit.min(end * CHUNK))
            }
            Some((start, ChunkEntry::Leaf(leaf))) if chunk == *start => {
                let base = chunk * CHUNK;
                let from = Self::offset_in_chunk(block);
                let to = usize::try_from(limit - base).map_or(Self::LEN, |to| to.min(Self::LEN));
                let (state, end) = leaf.run_at(from..to);
                (state, base + end as u64)
            }
            _ => {
                let next = self.directory.range(chunk..).next();
                let end = next.map_or(limit, |(start, _)| limit.min(start * CHUNK));
                (BlockState::Lower, end)
            }
        }
    }

    /// Counts the blocks of a range that ends at or before [`Self::END`].
    fn counts_in(&self, blocks: Range<u64>) -> BlockCounts {
        let mut counts = BlockCounts::default();
        if blocks.is_empty() {
            return counts;
        }
        let chunk = blocks.start / CHUNK;
        let before = self.directory.range(..chunk).next_back();
        let inside = self.directory.range(chunk..blocks.end.div_ceil(CHUNK));
        for (&start, entry) in before.into_iter().chain(inside) {
            let end = entry.end(start);
            let (from, to) = (blocks.start.max(start * CHUNK), blocks.end.min(end * CHUNK));
            if from >= to {
                continue;
            }
            counts.add(match entry {
                ChunkEntry::Uniform { state, .. } => BlockCounts::of(*state, to - from),
                ChunkEntry::Leaf(leaf) if to - from == CHUNK => leaf.counts(),
                ChunkEntry::Leaf(leaf) => {
                    let from = Self::offset_in_chunk(from);
                    leaf.counts_in(from..Self::offset_in_chunk(to - 1) + 1)
                }
            });
        }
        counts
    }

    /// Sets part of one chunk to `state`: in its leaf, or in a new leaf if the chunk was uniform.
    fn set_in_chunk(&mut self, chunk: u64, blocks: Range<usize>, state: BlockState) {
        if !matches!(self.directory.get(&chunk), Some(ChunkEntry::Leaf(_))) {
            let (old, _) = self.run_in_entry(chunk * CHUNK, (chunk + 1) * CHUNK);
            if old == state {
                return;
            }
            self.clear_chunks(chunk..chunk + 1);
            self.counts.add(BlockCounts::of(old, CHUNK));
            let leaf = Box::new(Leaf::uniform(old, Self::LEN));
            self.directory.insert(chunk, ChunkEntry::Leaf(leaf));
        }
        let Some(ChunkEntry::Leaf(leaf)) = self.directory.get_mut(&chunk) else {
            return; // Unreachable: the leaf was found or inserted above.
        };
        self.counts.subtract(leaf.counts());
        leaf.set(blocks, state);
        self.counts.add(leaf.counts());
        if leaf.is_uniform(state) {
            self.set_chunks(chunk..chunk + 1, state);
        }
    }

    /// Sets whole chunks to `state`: one entry, merged with its neighbours.
    fn set_chunks(&mut self, chunks: Range<u64>, state: BlockState) {
        self.clear_chunks(chunks.clone());
        if state == BlockState::Lower {
            return;
        }
        let blocks = (chunks.end - chunks.start) * CHUNK;
        self.counts.add(BlockCounts::of(state, blocks));
        let Range { mut start, mut end } = chunks;
        if let Some((&left, entry)) = self.directory.range(..start).next_back()
            && entry.as_uniform() == Some((start, state))
        {
            start = left;
        }
        if let Some((right, other)) = self.directory.get(&end).and_then(ChunkEntry::as_uniform)
            && other == state
        {
            self.directory.remove(&end);
            end = right;
        }
        self.directory.insert(start, ChunkEntry::Uniform { end, state });
    }

    /// Removes `chunks` from the directory, so that all their blocks are Lower.
    ///
    /// ```text
    ///   before   |----- Data ------||leaf|     |---- Zero ----|
    ///   chunks             |-----------------------|
    ///   after    |-- Data -|                       |-- Zero --|
    /// ```
    fn clear_chunks(&mut self, chunks: Range<u64>) {
        let mut remainder = None;
        if let Some((_, ChunkEntry::Uniform { end, state })) =
            self.directory.range_mut(..chunks.start).next_back()
            && *end > chunks.start
        {
            let (reach, state) = (*end, *state);
            *end = chunks.start;
            let gone = (reach.min(chunks.end) - chunks.start) * CHUNK;
            self.counts.subtract(BlockCounts::of(state, gone));
            remainder = Some((reach, state));
        }
        for (start, entry) in self.directory.extract_if(chunks.clone(), |_, _| true) {
            match entry {
                ChunkEntry::Leaf(leaf) => self.counts.subtract(leaf.counts()),
                ChunkEntry::Uniform { end, state } => {
                    let gone = (end.min(chunks.end) - start) * CHUNK;
                    self.counts.subtract(BlockCounts::of(state, gone));
                    remainder = Some((end, state));
                }
            }
        }
        if let Some((end, state)) = remainder
            && end > chunks.end
        {
            self.directory.insert(chunks.end, ChunkEntry::Uniform { end, state });
        }
    }
}

impl ChunkEntry {
    /// Returns the chunk after the last one covered by an entry stored under `start`.
    fn end(&self, start: u64) -> u64 {
        match self {
            Self::Uniform { end, .. } => *end,
            Self::Leaf(_) => start + 1,
        }
    }

    /// Returns the end and the state of a uniform run.
    fn as_uniform(&self) -> Option<(u64, BlockState)> {
        match self {
            Self::Uniform { end, state } => Some((*end, *state)),
            Self::Leaf(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::BlockState::{Data, Lower, Zero};
    use super::*;

    impl<const CHUNK: u64> BlockMap<CHUNK> {
        /// Asserts the invariants of the directory, its leaves and the counts.
        fn check(&self) {
            let mut counts = BlockCounts::default();
            let mut last = (0, Lower);
            for (&start, entry) in &self.directory {
                let end = entry.end(start);
                assert!(last.0 <= start && start < end, "entries overlap or are empty");
                assert!(end <= Self::END / CHUNK, "an entry beyond the last whole chunk");
                let state = match entry {
                    ChunkEntry::Uniform { state, .. } => {
                        assert_ne!(*state, Lower, "a uniform Lower run is stored");
                        assert_ne!(last, (start, *state), "neighbours are not merged");
                        counts.add(BlockCounts::of(*state, (end - start) * CHUNK));
                        *state
                    }
                    ChunkEntry::Leaf(leaf) => {
                        leaf.check(Self::LEN);
                        counts.add(leaf.counts());
                        Lower // A leaf merges with nothing.
                    }
                };
                last = (end, state);
            }
            assert_eq!(counts, self.counts, "the counts are wrong");
        }

        fn leaves(&self) -> usize {
            self.directory.values().filter(|entry| matches!(entry, ChunkEntry::Leaf(_))).count()
        }
    }

    impl Leaf {
        fn check(&self, len: usize) {
            assert_eq!(self.len, len);
            self.zero.check(len);
            let both = |at: &usize| self.zero.has(*at);
            assert_eq!(self.data.check(len).into_iter().find(both), None, "a block in two states");
            for state in [Lower, Data, Zero] {
                assert!(!self.is_uniform(state), "a leaf is uniformly {state:?}");
            }
        }
    }

    fn blocks(range: Range<u64>) -> Range<BlockIndex> {
        BlockIndex(range.start)..BlockIndex(range.end)
    }

    fn run(range: Range<u64>, state: BlockState) -> BlockRun {
        BlockRun { range: blocks(range), state }
    }

    const EVERYTHING: Range<u64> = 0..u64::MAX;

    #[test]
    fn an_untouched_map_has_no_entry_and_is_one_run() {
        let map = BlockMap::new();
        map.check();
        assert!(map.directory.is_empty());
        assert_eq!(map.run_at(blocks(EVERYTHING)), run(EVERYTHING, Lower));
        assert_eq!(map.state(BlockIndex(u64::MAX)), Lower);
        assert_eq!(map.count(blocks(EVERYTHING), Lower), u64::MAX);
    }

    #[test]
    fn setting_every_block_takes_one_entry() {
        let mut map = BlockMap::new();
        map.set(blocks(EVERYTHING), Zero);
        map.check();
        assert_eq!(map.directory.len(), 1);
        assert_eq!(map.zero_blocks(), BlockMap::<CHUNK_BLOCKS>::END);
        assert_eq!(map.state(BlockIndex(1 << 55)), Zero);
        map.clear_from(BlockIndex(0));
        map.check();
        assert!(map.directory.is_empty());
    }

    #[test]
    fn a_run_continues_across_a_leaf_a_uniform_run_and_a_leaf() {
        let mut map = BlockMap::<64>::default();
        map.set(blocks(60..64 * 5 + 7), Data);
        map.check();
        assert_eq!((map.directory.len(), map.leaves()), (3, 2));
        let runs: Vec<_> = map.runs(blocks(0..1000)).collect();
        assert_eq!(runs, [run(0..60, Lower), run(60..327, Data), run(327..1000, Lower)]);
        assert_eq!(map.run_at(blocks(62..300)), run(62..300, Data));
    }

    #[test]
    fn an_empty_range_gives_an_empty_run_and_changes_nothing() {
        let mut map = BlockMap::<64>::default();
        map.set(blocks(10..20), Data);
        for at in [0, 10, 20, 64, u64::MAX] {
            assert!(map.run_at(blocks(at..at)).is_empty());
            assert_eq!(map.runs(blocks(at..at)).count(), 0);
            assert_eq!(map.count(blocks(at..at), Lower), 0);
            map.set(blocks(at..at), Zero);
        }
        map.check();
        assert_eq!((map.data_blocks(), map.zero_blocks()), (10, 0));
    }

    #[test]
    fn a_leaf_that_becomes_uniform_merges_with_its_neighbours() {
        let mut map = BlockMap::<64>::default();
        map.set(blocks(0..64), Data);
        map.set(blocks(128..256), Data);
        for block in 64..128 {
            assert_eq!(map.leaves(), usize::from(block > 64));
            map.set(blocks(block..block + 1), Data);
            map.check();
        }
        assert_eq!((map.directory.len(), map.leaves()), (1, 0));
        assert_eq!(map.run_at(blocks(0..u64::MAX)), run(0..256, Data));
    }

    #[test]
    fn a_plane_takes_memory_only_while_it_holds_a_block() {
        let planes = |map: &BlockMap<64>| match map.directory.get(&0) {
            Some(ChunkEntry::Leaf(leaf)) => {
                (leaf.data.heap_bytes() > 0, leaf.zero.heap_bytes() > 0)
            }
            _ => (false, false),
        };
        let mut map = BlockMap::<64>::default();
        map.set(blocks(3..5), Data);
        assert_eq!(planes(&map), (true, false));
        map.set(blocks(4..6), Zero);
        assert_eq!(planes(&map), (true, true));
        map.set(blocks(0..4), Lower);
        assert_eq!(planes(&map), (false, true));
        map.check();
    }

    #[test]
    fn one_block_in_each_chunk_takes_bytes_not_kilobytes() {
        let mut map = BlockMap::new();
        for chunk in 0..1000 {
            map.set(blocks(chunk * CHUNK_BLOCKS + 7..chunk * CHUNK_BLOCKS + 8), Data);
            // Also one Zero block in each of as many chunks of Data.
            let held = 5000 + chunk;
            map.set(blocks(held * CHUNK_BLOCKS..(held + 1) * CHUNK_BLOCKS), Data);
            map.set(blocks(held * CHUNK_BLOCKS + 9..held * CHUNK_BLOCKS + 10), Zero);
        }
        map.check();
        assert_eq!((map.leaves(), map.data_blocks()), (2000, 1000 * CHUNK_BLOCKS));
        let leaves = map.directory.values().filter_map(|entry| match entry {
            ChunkEntry::Leaf(leaf) => Some(leaf.data.heap_bytes() + leaf.zero.heap_bytes()),
            ChunkEntry::Uniform { .. } => None,
        });
        assert!(leaves.sum::<usize>() < 2000 * 100);
    }

    #[test]
    fn every_other_block_of_four_chunks_makes_four_leaves() {
        let mut map = BlockMap::new();
        let end = 4 * CHUNK_BLOCKS;
        for block in (0..end).step_by(2) {
            map.set(blocks(block..block + 1), Data);
        }
        map.check();
        assert_eq!((map.leaves(), map.data_blocks()), (4, end / 2));
        assert_eq!(map.count(blocks(1..end - 1), Lower), end / 2 - 1);
        let runs = map.runs(blocks(0..end));
        assert_eq!(runs.map(|run| run.len()).max(), Some(1));
        // One step removes all leaves.
        map.set(blocks(0..end), Zero);
        map.check();
        assert_eq!((map.directory.len(), map.leaves()), (1, 0));
    }

    #[test]
    fn a_scattered_map_of_sixteen_tib_is_cleared_in_one_call() {
        let mut map = BlockMap::new();
        let size = 1 << 32; // Blocks: 16 TiB at 4 KiB.
        for chunk in (0..size / CHUNK_BLOCKS).step_by(64) {
            map.set(blocks(chunk * CHUNK_BLOCKS + 5..chunk * CHUNK_BLOCKS + 6), Data);
        }
        map.check();
        assert_eq!(map.leaves(), 1024);
        assert_eq!(map.runs(blocks(0..size)).count(), 1 + 2 * 1024);
        map.clear_from(BlockIndex(5));
        map.check();
        assert!(map.directory.is_empty());
    }

    #[test]
    fn a_clone_is_independent_of_its_original() {
        let mut map = BlockMap::<64>::default();
        map.set(blocks(10..20), Data);
        let copy = map.clone();
        map.set(blocks(0..64), Zero);
        assert_eq!((copy.state(BlockIndex(12)), map.state(BlockIndex(12))), (Data, Zero));
        copy.check();
    }

    #[test]
    fn a_map_can_be_shared_between_threads() {
        fn shareable<T: Send + Sync>() {}
        shareable::<BlockMap>();
    }

    /// A change to a window of blocks; positions are relative to the window.
    #[derive(Clone, Debug)]
    enum Op {
        Set(Range<u64>, BlockState),
        /// Everything from the position to `u64::MAX`.
        SetFrom(u64, BlockState),
        ClearFrom(u64),
    }

    /// The expected map: Lower before the window, a vector inside it, one state past it.
    struct Oracle<const CHUNK: u64> {
        base: u64,
        window: Vec<BlockState>,
        beyond: BlockState,
    }

    impl<const CHUNK: u64> Oracle<CHUNK> {
        fn end(&self) -> u64 {
            self.base + self.window.len() as u64
        }

        fn apply(&mut self, op: &Op) {
            let index = |at: u64| usize::try_from(at).unwrap();
            match *op {
                Op::Set(ref range, state) => {
                    self.window[index(range.start)..index(range.end)].fill(state);
                }
                Op::SetFrom(at, state) => {
                    self.window[index(at)..].fill(state);
                    self.beyond = state;
                }
                Op::ClearFrom(at) => self.apply(&Op::SetFrom(at, Lower)),
            }
        }

        fn state(&self, block: u64) -> BlockState {
            let kept = block >= self.base && block < BlockMap::<CHUNK>::END;
            let at = usize::try_from(block.wrapping_sub(self.base)).unwrap();
            let state = self.window.get(at).copied().unwrap_or(self.beyond);
            if kept { state } else { Lower }
        }

        fn total(&self, state: BlockState) -> u64 {
            let inside = self.window.iter().filter(|other| **other == state).count() as u64;
            let beyond = BlockMap::<CHUNK>::END - self.end();
            inside + if self.beyond == state { beyond } else { 0 }
        }

        /// Compares states, runs and counts in `range`, which may reach slightly past the window on
        /// each side.
        fn compare(&self, map: &BlockMap<CHUNK>, range: Range<u64>) {
            map.check();
            assert_eq!(map.data_blocks(), self.total(Data));
            assert_eq!(map.zero_blocks(), self.total(Zero));

            let mut expected: Vec<BlockRun> = Vec::new();
            for block in range.clone() {
                let state = self.state(block);
                assert_eq!(map.state(BlockIndex(block)), state, "block {block}");
                match expected.last_mut() {
                    Some(last) if last.state == state => last.range.end.0 = block + 1,
                    _ => expected.push(run(block..block + 1, state)),
                }
            }
            assert_eq!(map.runs(blocks(range.clone())).collect::<Vec<_>>(), expected);
            for state in [Lower, Data, Zero] {
                let runs = expected.iter().filter(|run| run.state == state);
                let count = runs.map(BlockRun::len).sum::<u64>();
                assert_eq!(map.count(blocks(range.clone()), state), count, "{state:?}");
            }
        }
    }

    fn agrees_with_a_vector<const CHUNK: u64>(base: u64, len: u64, ops: &[Op], seen: Range<u64>) {
        let window = vec![Lower; usize::try_from(len).unwrap()];
        let mut oracle = Oracle::<CHUNK> { base, window, beyond: Lower };
        let mut map = BlockMap::<CHUNK>::default();
        for op in ops {
            oracle.apply(op);
            let from = |at: u64| BlockIndex(base + at);
            match *op {
                Op::Set(ref range, state) => map.set(from(range.start)..from(range.end), state),
                Op::SetFrom(at, state) => map.set(from(at)..BlockIndex(u64::MAX), state),
                Op::ClearFrom(at) => map.clear_from(from(at)),
            }
            oracle.compare(&map, base + seen.start..base + seen.end);
        }
        let end = (base + len).saturating_add(CHUNK);
        oracle.compare(&map, base.saturating_sub(CHUNK)..end);
    }

    fn state() -> impl Strategy<Value = BlockState> {
        prop_oneof![Just(Lower), Just(Data), Just(Zero)]
    }

    /// Generates positions on and around the borders of chunks, and anywhere else.
    fn position(chunk: u64, len: u64) -> impl Strategy<Value = u64> {
        let border = (0..=len / chunk, 0_u64..3)
            .prop_map(move |(at, aside)| (at * chunk + aside).saturating_sub(1).min(len));
        prop_oneof![border, 0..=len]
    }

    fn range(chunk: u64, len: u64) -> impl Strategy<Value = Range<u64>> {
        let far = (position(chunk, len), position(chunk, len))
            .prop_map(|(one, two)| one.min(two)..one.max(two));
        let near = (position(chunk, len), 1_u64..9)
            .prop_map(move |(start, blocks)| start..(start + blocks).min(len));
        prop_oneof![far, near]
    }

    fn op(chunk: u64, len: u64) -> impl Strategy<Value = Op> {
        prop_oneof![
            12 => (range(chunk, len), state()).prop_map(|(range, state)| Op::Set(range, state)),
            1 => (position(chunk, len), state()).prop_map(|(at, state)| Op::SetFrom(at, state)),
            1 => position(chunk, len).prop_map(Op::ClearFrom),
        ]
    }

    fn ops(chunk: u64, len: u64) -> impl Strategy<Value = (Vec<Op>, Range<u64>)> {
        (prop::collection::vec(op(chunk, len), 1..40), range(chunk, len))
    }

    proptest! {
        #[test]
        fn chunks_of_64_blocks_match_a_vector((ops, seen) in ops(64, 64 * 7)) {
            agrees_with_a_vector::<64>(0, 64 * 7, &ops, seen);
        }

        #[test]
        fn chunks_of_100_blocks_match_a_vector((ops, seen) in ops(100, 100 * 5)) {
            agrees_with_a_vector::<100>(100 * 3 + 50, 100 * 5, &ops, seen);
        }

        #[test]
        fn chunks_of_256_blocks_match_a_vector((ops, seen) in ops(256, 256 * 4)) {
            agrees_with_a_vector::<256>(256 * 9, 256 * 4, &ops, seen);
        }

        #[test]
        fn the_last_chunks_of_the_index_space_match_a_vector((ops, seen) in ops(64, 64 * 4)) {
            agrees_with_a_vector::<64>(BlockMap::<64>::END - 64 * 4, 64 * 4, &ops, seen);
        }
    }

    proptest! {
        // Four chunks of the real size are a quarter of a million blocks to compare.
        #![proptest_config(ProptestConfig::with_cases(12))]
        #[test]
        fn chunks_of_the_real_size_match_a_vector(
            (ops, _) in ops(CHUNK_BLOCKS, 4 * CHUNK_BLOCKS),
        ) {
            agrees_with_a_vector::<CHUNK_BLOCKS>(0, 4 * CHUNK_BLOCKS, &ops, 0..0);
        }
    }
}
