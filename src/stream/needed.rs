//! The window and the spill that a workload has needed so far. No data, no I/O.
//!
//! With a spill of `S`, a frontier that advances as late as possible is, after each write, the lowest
//! `f` with at most `S` bytes of data at and past `f + window`. A write that changes a byte at `a`
//! needs a frontier at or before `a`, so it requires, after every write before it, a spill of `S` with
//! the given window, or a window of `W` without a spill:
//!
//! ```text
//!   S >= data in [a + window, size)          a + W >= end of the data
//! ```
//!
//! The maximum of these figures over all steps is itself kept as a set of bytes, `peak`: the most
//! data that was ever past `x` equals the number of bytes of `peak` past `x`. While data only
//! grows, the current data is the peak; it is folded in right before data shrinks.

use std::ops::Range;

use super::runs::{Written, WrittenRuns};

/// The most chunks into which a disk is divided for counting: 256 KiB of counters.
const MAX_CHUNKS: u64 = 32 << 10;
/// The smallest chunk worth a counter, in bytes.
const MIN_CHUNK: u64 = 64 << 10;
/// The most runs of a peak; beyond it the peak is rounded up.
const MAX_RUNS: usize = 128 << 10;

/// A counter of the data past an offset, whose cost does not grow with the number of runs.
#[derive(Clone, Debug)]
struct DataCounter {
    chunk: u64,
    /// A Fenwick tree of the bytes of data in each chunk.
    tree: Vec<u64>,
    total: u64,
}

impl DataCounter {
    fn new(size: u64) -> Self {
        let chunk = size.div_ceil(MAX_CHUNKS).max(MIN_CHUNK).next_power_of_two();
        let chunks = usize::try_from(size.div_ceil(chunk)).unwrap_or(0);
        Self { chunk, tree: vec![0; chunks + 1], total: 0 }
    }

    fn index(&self, offset: u64) -> usize {
        usize::try_from(offset / self.chunk).unwrap_or(usize::MAX - 1)
    }

    /// Adds `range` (bytes of data) to the counters, or subtracts it.
    fn apply(&mut self, range: Range<u64>, change: impl Fn(u64, u64) -> u64) {
        let mut at = range.start;
        while at < range.end {
            let end = (at / self.chunk + 1).saturating_mul(self.chunk).min(range.end);
            let mut node = self.index(at) + 1;
            while let Some(count) = self.tree.get_mut(node) {
                *count = change(*count, end - at);
                node += node & node.wrapping_neg();
            }
            at = end;
        }
        self.total = change(self.total, range.end.saturating_sub(range.start));
    }

    /// Returns the bytes of data in `runs` at and past `offset`.
    fn data_past(&self, runs: &WrittenRuns, offset: u64) -> u64 {
        let next = (offset / self.chunk + 1).saturating_mul(self.chunk);
        let mut before = 0;
        let mut node = (self.index(offset) + 1).min(self.tree.len() - 1);
        while node > 0 {
            before += self.tree[node];
            node &= node - 1;
        }
        runs.data_bytes(offset..next) + (self.total - before)
    }
}

/// The sizes in bytes with which the writes so far would have succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NeededSizes {
    /// The smallest window without a spill.
    pub window: u64,
    /// The smallest spill with the window that the stream has.
    pub spill: u64,
}

/// The needed window and spill, and the data they are computed from.
#[derive(Clone, Debug)]
pub struct Needed {
    size: u64,
    given: u64,
    counter: DataCounter,
    peak: Option<(WrittenRuns, DataCounter)>,
    /// Whether data has grown since the last fold into the peak.
    grown: bool,
    /// The bytes by which data has shrunk since the last fold, and how often: the data past an
    /// offset may have been larger by this amount meanwhile.
    slack: u64,
    shrink_count: usize,
    /// The end of the highest data at any time.
    highest: u64,
    /// The smallest window in bytes that would have sufficed without a spill.
    pub window: u64,
    /// The smallest spill in bytes that would have sufficed with the given window.
    pub spill: u64,
}

impl Needed {
    /// Creates the figures, initially 0, of a disk of `size` bytes whose window is `given`.
    #[must_use]
    pub fn new(size: u64, given: u64) -> Self {
        let count = DataCounter::new(size);
        Self {
            size,
            given,
            counter: count,
            peak: None,
            grown: false,
            slack: 0,
            shrink_count: 0,
            highest: 0,
            window: 0,
            spill: 0,
        }
    }

    /// Updates the figures before a request changes the byte at `at`; `runs` are the ranges written
    /// so far.
    pub fn before_change(&mut self, runs: &WrittenRuns, at: u64) {
        self.window = self.window.max(self.highest.saturating_sub(at));
        let edge = at.saturating_add(self.given);
        if edge >= self.highest {
            return;
        }
        let now = self.counter.data_past(runs, edge) + self.slack;
        let peak = self.peak.as_ref().map_or(0, |(runs, count)| count.data_past(runs, edge));
        self.spill = self.spill.max(now).max(peak);
    }

    /// Updates the counters before `range` of `runs` is set to `written`.
    pub fn before_set(&mut self, runs: &WrittenRuns, range: &Range<u64>, written: Option<Written>) {
        let grows = written == Some(Written::Data);
        if !grows && self.grown {
            let shrinks = runs.data_bytes(range.clone());
            if shrinks > 0 {
                self.fold_if_due(runs, shrinks);
            }
        }
        for part in runs.data_within(range.clone()) {
            self.counter.apply(part, u64::wrapping_sub);
        }
        if grows {
            self.counter.apply(range.clone(), u64::wrapping_add);
            self.highest = self.highest.max(range.end);
            self.grown = true;
        }
    }

    /// Recounts after runs have been joined into fewer runs with more data. From now on the figures
    /// are sufficient, but may be too large.
    pub fn recount(&mut self, runs: &WrittenRuns) {
        self.counter = DataCounter::new(self.size);
        for part in runs.data_within(0..self.size) {
            self.counter.apply(part, u64::wrapping_add);
        }
    }

    /// Folds before data shrinks by `shrinks` bytes. A fold visits all runs, so with many of them
    /// it is not done every time; the figures are then too high by at most a 64th.
    fn fold_if_due(&mut self, runs: &WrittenRuns, shrinks: u64) {
        let many = runs.len() + self.peak.as_ref().map_or(0, |(peak, _)| peak.len());
        if self.shrink_count >= many / 64 || self.slack + shrinks > self.counter.total / 64 {
            self.fold_into_peak(runs);
        } else {
            self.slack += shrinks;
            self.shrink_count += 1;
        }
    }

    /// Sets the peak to the maximum of itself and the current data at every offset.
    ///
    /// Works from the end downwards: while both have the same number of bytes past the offset, the
    /// result follows either; otherwise the smaller one has to catch up first.
    fn fold_into_peak(&mut self, runs: &WrittenRuns) {
        (self.grown, self.slack, self.shrink_count) = (false, 0, 0);
        let old = self.peak.take().map(|(runs, _)| runs).unwrap_or_default();
        let mut edges: Vec<u64> = vec![0];
        for part in runs.data_within(0..self.size).chain(old.data_within(0..self.size)) {
            edges.extend([part.start, part.end]);
        }
        edges.sort_unstable();
        edges.dedup();
        let is_data = |runs: &WrittenRuns, at: u64| runs.at(at).1 == Some(Written::Data);
        let (mut present, mut past) = (0u64, 0u64);
        let mut peak = WrittenRuns::default();
        for pair in edges.windows(2).rev() {
            let (start, len) = (pair[0], pair[1] - pair[0]);
            let before = present.max(past);
            present += if is_data(runs, start) { len } else { 0 };
            past += if is_data(&old, start) { len } else { 0 };
            // The increase is at the low end of the range: the smaller count catches up before
            // that.
            let rise = present.max(past) - before;
            peak.set(start..start + rise, Some(Written::Data));
        }
        if peak.len() > MAX_RUNS {
            peak.coarsen(u64::MAX, self.size.div_ceil(MAX_RUNS as u64));
        }
        let mut count = DataCounter::new(self.size);
        for part in peak.data_within(0..self.size) {
            count.apply(part, u64::wrapping_add);
        }
        self.peak = Some((peak, count));
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: u64 = 1 << 20;

    proptest! {
        /// Compares with the definition: the data at every step is counted directly.
        #[test]
        fn the_figures_are_the_maximum_over_all_steps(
            ops in prop::collection::vec((0..64u64, 1..16u64, 0..3u8), 1..40),
            given in 0..40u64,
        ) {
            let unit = SIZE / 64;
            let given = given * unit / 2;
            let mut runs = WrittenRuns::default();
            let mut needed = Needed::new(SIZE, given);
            let mut steps: Vec<Vec<bool>> = vec![vec![false; 64]];
            let (mut window, mut spill) = (0, 0);
            for (start, len, kind) in ops {
                let end = (start + len).min(64);
                let range = start * unit..end * unit;
                needed.before_change(&runs, range.start);
                for data in &steps {
                    let ends = |at: usize| (at as u64 + 1) * unit;
                    let top = data.iter().rposition(|held| *held).map_or(0, ends);
                    window = window.max(top.saturating_sub(range.start));
                    let edge = range.start + given;
                    let past: u64 = (0..64usize).filter(|at| data[*at])
                        .map(|at| ends(at).saturating_sub(edge.max(ends(at) - unit))).sum();
                    spill = spill.max(past);
                }
                prop_assert_eq!((needed.window, needed.spill), (window, spill));
                let written = [None, Some(Written::Data), Some(Written::Zeros)][kind as usize];
                needed.before_set(&runs, &range, written);
                runs.set(range, written);
                let mut data = steps[steps.len() - 1].clone();
                data[start as usize..end as usize].fill(written == Some(Written::Data));
                steps.push(data);
            }
        }
    }

    #[test]
    fn a_large_disk_is_counted_in_chunks() {
        let size = 16 << 40;
        let mut runs = WrittenRuns::default();
        let mut needed = Needed::new(size, 0);
        for at in [0, 1 << 30, 5 << 40, size - 4096] {
            let range = at..at + 4096;
            needed.before_set(&runs, &range, Some(Written::Data));
            runs.set(range, Some(Written::Data));
        }
        needed.before_change(&runs, (1 << 30) + 512);
        assert_eq!(needed.spill, 3 * 4096 - 512);
        assert_eq!(needed.window, size - (1 << 30) - 512);
    }
}
