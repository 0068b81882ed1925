//! One chunk of the block map whose blocks are in more than one state. No I/O.
//!
//! A leaf has a plane of bits for Data and one for Zero, 8 KiB each, only there while it has a bit
//! set; ranges are filled, counted and searched by whole words.

use std::ops::Range;

use bitvec::boxed::BitBox;
use bitvec::order::Lsb0;
use bitvec::vec::BitVec;

use super::blocks::State;

/// How many blocks are Data and Zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) data: u64,
    pub(super) zero: u64,
}

impl Counts {
    pub(super) fn of(state: State, blocks: u64) -> Self {
        let (data, zero) = match state {
            State::Lower => (0, 0),
            State::Data => (blocks, 0),
            State::Zero => (0, blocks),
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
    /// A leaf about to be changed: for this moment alone it may be uniform.
    pub(super) fn uniform(state: State, len: usize) -> Self {
        let mut leaf = Self { len, data: Plane::default(), zero: Plane::default() };
        leaf.set(0..len, state);
        leaf
    }

    pub(super) fn state(&self, at: usize) -> State {
        if self.data.has(at) {
            State::Data
        } else if self.zero.has(at) {
            State::Zero
        } else {
            State::Lower
        }
    }

    /// The state at the start of a range that is not empty, and where in the range it ends.
    pub(super) fn run(&self, range: Range<usize>) -> (State, usize) {
        let state = self.state(range.start);
        let end = match state {
            State::Data => self.data.end_of_ones(range),
            State::Zero => self.zero.end_of_ones(range),
            State::Lower => self.end_of_lower(range),
        };
        (state, end)
    }

    /// Where the Lower blocks at the start of a range end: where either plane has its first bit.
    ///
    /// Both are searched a stretch at a time, twice as long each time. Else a plane with few bits
    /// would be searched to its end for each short gap of a full one.
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

    pub(super) fn set(&mut self, range: Range<usize>, state: State) {
        // Clear first, so that a plane that empties is freed before the other one is allocated.
        if state != State::Data {
            self.data.clear(range.clone());
        }
        if state != State::Zero {
            self.zero.clear(range.clone());
        }
        match state {
            State::Lower => {}
            State::Data => self.data.fill(range, self.len),
            State::Zero => self.zero.fill(range, self.len),
        }
    }

    pub(super) fn is_uniform(&self, state: State) -> bool {
        match state {
            State::Lower => self.data.ones + self.zero.ones == 0,
            State::Data => self.data.ones == self.len,
            State::Zero => self.zero.ones == self.len,
        }
    }

    pub(super) fn counts(&self) -> Counts {
        Counts { data: self.data.ones as u64, zero: self.zero.ones as u64 }
    }

    pub(super) fn counts_in(&self, range: Range<usize>) -> Counts {
        Counts { data: self.data.count(range.clone()) as u64, zero: self.zero.count(range) as u64 }
    }
}

/// One bit a block; no memory while no bit is set. `bitvec` fills, counts and searches `Lsb0`
/// slices by whole words.
#[derive(Clone, Debug, Default)]
pub(super) struct Plane {
    /// As long as the chunk, or empty.
    pub(super) bits: BitBox<u64, Lsb0>,
    pub(super) ones: usize,
}

impl Plane {
    pub(super) fn has(&self, at: usize) -> bool {
        self.bits.get(at).is_some_and(|bit| *bit)
    }

    pub(super) fn fill(&mut self, range: Range<usize>, len: usize) {
        if self.bits.is_empty() {
            self.bits = BitVec::repeat(false, len).into_boxed_bitslice();
        }
        let bits = &mut self.bits[range];
        self.ones += bits.len() - bits.count_ones();
        bits.fill(true);
    }

    pub(super) fn clear(&mut self, range: Range<usize>) {
        if self.bits.is_empty() {
            return;
        }
        let bits = &mut self.bits[range];
        self.ones -= bits.count_ones();
        bits.fill(false);
        if self.ones == 0 {
            self.bits = BitBox::default();
        }
    }

    pub(super) fn count(&self, range: Range<usize>) -> usize {
        if self.bits.is_empty() { 0 } else { self.bits[range].count_ones() }
    }

    pub(super) fn end_of_ones(&self, range: Range<usize>) -> usize {
        let (from, to) = (range.start, range.end);
        if self.bits.is_empty() {
            return from;
        }
        self.bits[range].first_zero().map_or(to, |ones| from + ones)
    }

    pub(super) fn end_of_zeros(&self, range: Range<usize>) -> usize {
        let (from, to) = (range.start, range.end);
        if self.bits.is_empty() {
            return to;
        }
        self.bits[range].first_one().map_or(to, |zeros| from + zeros)
    }
}
