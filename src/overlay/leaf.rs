//! One chunk of the block map with blocks in more than one state. No I/O.
//!
//! A leaf has a plane for Data and a plane for Zero, each a short list of runs or 8 KiB of bits.

use std::ops::Range;

use bitvec::boxed::BitBox;
use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

use super::state::BlockState;

/// The numbers of Data and Zero blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct BlockCounts {
    pub(super) data: u64,
    pub(super) zero: u64,
}

impl BlockCounts {
    pub(super) fn of(state: BlockState, blocks: u64) -> Self {
        let (data, zero) = match state {
            BlockState::Lower => (0, 0),
            BlockState::Data => (blocks, 0),
            BlockState::Zero => (0, blocks),
        };
        Self { data, zero }
    }

    pub(super) fn add(&mut self, other: Self) {
        self.data += other.data;
        self.zero += other.zero;
    }

    pub(super) fn subtract(&mut self, other: Self) {
        self.data -= other.data;
        self.zero -= other.zero;
    }
}

/// A chunk of mixed states. A block is in one plane or in none (Lower), never in both.
#[derive(Clone, Debug)]
pub(super) struct Leaf {
    pub(super) len: usize,
    pub(super) data: Plane,
    pub(super) zero: Plane,
}

impl Leaf {
    /// Creates a leaf of one state, which the caller changes at once: only until then may it be
    /// uniform.
    pub(super) fn uniform(state: BlockState, len: usize) -> Self {
        let mut leaf = Self { len, data: Plane::default(), zero: Plane::default() };
        leaf.set(0..len, state);
        leaf
    }

    pub(super) fn state(&self, at: usize) -> BlockState {
        if self.data.has(at) {
            BlockState::Data
        } else if self.zero.has(at) {
            BlockState::Zero
        } else {
            BlockState::Lower
        }
    }

    /// Returns the state at the start of a non-empty range, and the end of that state's run within
    /// the range.
    pub(super) fn run_at(&self, range: Range<usize>) -> (BlockState, usize) {
        let state = self.state(range.start);
        let end = match state {
            BlockState::Data => self.data.end_of_ones(range),
            BlockState::Zero => self.zero.end_of_ones(range),
            BlockState::Lower => self.end_of_lower(range),
        };
        (state, end)
    }

    /// Returns the end of the Lower blocks at the start of a range: the first bit set in either
    /// plane.
    ///
    /// Both planes are searched in stretches, each twice as long as the one before. Otherwise a
    /// sparse plane would be searched to its end for each short gap of a dense one.
    pub(super) fn end_of_lower(&self, range: Range<usize>) -> usize {
        let Range { start: mut from, end } = range;
        let mut stretch = 64;
        while from < end {
            let to = end.min(from + stretch);
            let data = self.data.end_of_zeros(from..to);
            let first = self.zero.end_of_zeros(from..data);
            if first < to {
                return first;
            }
            from = to;
            stretch *= 2;
        }
        end
    }

    pub(super) fn set(&mut self, range: Range<usize>, state: BlockState) {
        // Clear first, so that a plane that empties is freed before the other one is allocated.
        if state != BlockState::Data {
            self.data.clear(range.clone(), self.len);
        }
        if state != BlockState::Zero {
            self.zero.clear(range.clone(), self.len);
        }
        match state {
            BlockState::Lower => {}
            BlockState::Data => self.data.fill(range, self.len),
            BlockState::Zero => self.zero.fill(range, self.len),
        }
    }

    pub(super) fn is_uniform(&self, state: BlockState) -> bool {
        match state {
            BlockState::Lower => self.data.ones + self.zero.ones == 0,
            BlockState::Data => self.data.ones == self.len,
            BlockState::Zero => self.zero.ones == self.len,
        }
    }

    pub(super) fn counts(&self) -> BlockCounts {
        BlockCounts { data: self.data.ones as u64, zero: self.zero.ones as u64 }
    }

    pub(super) fn counts_in(&self, range: Range<usize>) -> BlockCounts {
        BlockCounts {
            data: self.data.count(range.clone()) as u64,
            zero: self.zero.count(range) as u64,
        }
    }
}

/// A set of blocks. A few runs are kept as a list, many as one bit per block. So a chunk never
/// takes more than its planes of bits, and a disk touched in one place per chunk takes only a few
/// bytes per chunk. `bitvec` fills, counts and searches `Lsb0` slices by whole words.
#[derive(Clone, Debug)]
pub(super) struct Plane {
    repr: PlaneRepr,
    pub(super) ones: usize,
}

#[derive(Clone, Debug)]
enum PlaneRepr {
    /// Ascending and apart: at least one block lies between two runs. At most [`max_runs`].
    Runs(Vec<Range<u32>>),
    /// One bit for each block of the chunk.
    Bits(BitBox<u64, Lsb0>),
}

/// Returns the most runs listed for a chunk of `len` blocks: a quarter of the size of its bits. So
/// a log record of 32 bytes never adds more than 32 bytes to a list.
fn max_runs(len: usize) -> usize {
    (len / 256).max(2)
}

impl Default for Plane {
    fn default() -> Self {
        Self { repr: PlaneRepr::Runs(Vec::new()), ones: 0 }
    }
}

/// Converts a position in a chunk to the type stored in runs.
#[expect(clippy::cast_possible_truncation, reason = "at most the length of a chunk, 65,536")]
fn index_in_chunk(at: usize) -> u32 {
    at as u32
}

fn run_len(run: &Range<u32>) -> usize {
    (run.end - run.start) as usize
}

/// Returns the length of the part of `run` inside `range`.
fn overlap_len(run: &Range<u32>, range: &Range<u32>) -> usize {
    run.end.min(range.end).saturating_sub(run.start.max(range.start)) as usize
}

impl Plane {
    pub(super) fn has(&self, at: usize) -> bool {
        match &self.repr {
            PlaneRepr::Bits(bits) => bits.get(at).is_some_and(|bit| *bit),
            PlaneRepr::Runs(runs) => {
                let at = index_in_chunk(at);
                let next = runs.partition_point(|run| run.end <= at);
                runs.get(next).is_some_and(|run| run.start <= at)
            }
        }
    }

    pub(super) fn fill(&mut self, range: Range<usize>, len: usize) {
        if range.is_empty() {
            return;
        }
        match &mut self.repr {
            PlaneRepr::Bits(bits) => {
                let bits = &mut bits[range];
                self.ones += bits.len() - bits.count_ones();
                bits.fill(true);
            }
            PlaneRepr::Runs(runs) => {
                let mut new = index_in_chunk(range.start)..index_in_chunk(range.end);
                let first = runs.partition_point(|run| run.end < new.start);
                let last = runs.partition_point(|run| run.start <= new.end);
                // Runs that touch the new one are merged with it.
                let old = &runs[first..last];
                let held: usize = old.iter().map(run_len).sum();
                new.start = old.first().map_or(new.start, |run| run.start.min(new.start));
                new.end = old.last().map_or(new.end, |run| run.end.max(new.end));
                self.ones += run_len(&new) - held;
                runs.splice(first..last, [new]);
                self.bits_if_many_runs(len);
            }
        }
    }

    pub(super) fn clear(&mut self, range: Range<usize>, len: usize) {
        if range.is_empty() {
            return;
        }
        match &mut self.repr {
            PlaneRepr::Bits(bits) => {
                let bits = &mut bits[range];
                self.ones -= bits.count_ones();
                bits.fill(false);
            }
            PlaneRepr::Runs(runs) => {
                let gone = index_in_chunk(range.start)..index_in_chunk(range.end);
                let first = runs.partition_point(|run| run.end <= gone.start);
                let last = runs.partition_point(|run| run.start < gone.end);
                let old = &runs[first..last];
                self.ones -= old.iter().map(|run| overlap_len(run, &gone)).sum::<usize>();
                let before = old.first().map(|run| run.start..gone.start);
                let after = old.last().map(|run| gone.end..run.end);
                let left = before.into_iter().chain(after).filter(|run| run.start < run.end);
                let left: Vec<_> = left.collect();
                runs.splice(first..last, left);
                self.bits_if_many_runs(len);
            }
        }
        if self.ones == 0 {
            *self = Self::default();
        }
    }

    /// Switches to bits when there are too many runs to list.
    fn bits_if_many_runs(&mut self, len: usize) {
        if let PlaneRepr::Runs(runs) = &self.repr
            && runs.len() > max_runs(len)
        {
            let mut bits: BitVec<u64, Lsb0> = BitVec::repeat(false, len);
            for run in runs {
                bits[run.start as usize..run.end as usize].fill(true);
            }
            self.repr = PlaneRepr::Bits(bits.into_boxed_bitslice());
        }
    }

    pub(super) fn count(&self, range: Range<usize>) -> usize {
        match &self.repr {
            PlaneRepr::Bits(bits) => bits[range].count_ones(),
            PlaneRepr::Runs(runs) => {
                let range = index_in_chunk(range.start)..index_in_chunk(range.end);
                let first = runs.partition_point(|run| run.end <= range.start);
                let inside = runs[first..].iter().take_while(|run| run.start < range.end);
                inside.map(|run| overlap_len(run, &range)).sum()
            }
        }
    }

    pub(super) fn end_of_ones(&self, range: Range<usize>) -> usize {
        let (from, to) = (range.start, range.end);
        match &self.repr {
            PlaneRepr::Bits(bits) => bits[range].first_zero().map_or(to, |ones| from + ones),
            PlaneRepr::Runs(runs) => {
                let at = index_in_chunk(from);
                let next = runs.partition_point(|run| run.end <= at);
                let run = runs.get(next).filter(|run| run.start <= at);
                run.map_or(from, |run| to.min(run.end as usize))
            }
        }
    }

    pub(super) fn end_of_zeros(&self, range: Range<usize>) -> usize {
        let (from, to) = (range.start, range.end);
        match &self.repr {
            PlaneRepr::Bits(bits) => bits[range].first_one().map_or(to, |zeros| from + zeros),
            PlaneRepr::Runs(runs) => {
                let at = index_in_chunk(from);
                let next = runs.partition_point(|run| run.end <= at);
                runs.get(next).map_or(to, |run| to.min((run.start as usize).max(from)))
            }
        }
    }

    /// Returns the bytes used on the heap.
    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        match &self.repr {
            PlaneRepr::Bits(bits) => bits.len() / 8,
            PlaneRepr::Runs(runs) => runs.capacity() * size_of::<Range<u32>>(),
        }
    }

    /// Asserts the invariants and returns the blocks in the plane.
    #[cfg(test)]
    pub(super) fn check(&self, len: usize) -> Vec<usize> {
        let ones: Vec<usize> = match &self.repr {
            PlaneRepr::Bits(bits) => {
                assert_eq!(bits.len(), len);
                assert!(self.ones > 0, "bits of nothing");
                bits.iter_ones().collect()
            }
            PlaneRepr::Runs(runs) => {
                assert!(runs.len() <= max_runs(len) && runs.iter().all(|run| !run.is_empty()));
                assert!(runs.is_sorted_by(|one, next| one.end < next.start), "{runs:?}");
                runs.iter().flat_map(|run| run.start as usize..run.end as usize).collect()
            }
        };
        assert_eq!(self.ones, ones.len(), "a plane is miscounted");
        assert!(ones.last().is_none_or(|last| *last < len));
        ones
    }
}
