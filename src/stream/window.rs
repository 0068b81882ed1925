//! The sliding window of an output stream: which bytes may be changed, and which must be sent. No
//! data, no I/O.
//!
//! ```text
//!                             |<--- window --->|<------ spill ------>|
//!   accepted  | leaving       | rewritable     | rewritable          |
//!   +---------+---------------+----------------+---------------------+--> size
//!   0     accepted taken   frontier           edge = frontier + window
//! ```
//!
//! - At most `spill` bytes of data are at or past the edge. When a write adds more, the frontier
//!   advances until the limit is met again, by the least amount and with the lowest data first.
//!   docs/streams.md proves that no other policy does better.
//! - Bytes before the frontier have left for good, even if the sink has not accepted them yet: the
//!   writes that a stream accepts never depend on the speed of its sink.
//! - Zeros, holes and unwritten ranges cost nothing anywhere.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::needed::{Needed, NeededSizes};
use super::runs::{Written, WrittenRuns};
use crate::extents::{Extent, ExtentKind};
use crate::zeros::is_zero;

/// The most runs remembered for accepted ranges, about 5 MiB of memory. Beyond it neighbours are
/// joined, and count as data.
const MAX_RUNS: usize = 128 << 10;
/// The gap in bytes up to which runs are joined first.
const MIN_COARSEN_GAP: u64 = 64 << 10;

/// Bytes of a write that are compared with zeros at a time.
const ZERO_SCAN_LEN: usize = 4096;

/// The state of an output stream without its data. All offsets are in bytes.
#[derive(Debug)]
pub struct Window {
    size: u64,
    window: u64,
    spill: u64,
    frontier: u64,
    taken: u64,
    accepted: u64,
    highest: u64,
    runs: WrittenRuns,
    needed: Needed,
    /// The bytes of data at and past the edge.
    beyond: u64,
    /// The bytes of data at and past `accepted`.
    unaccepted: u64,
    /// The bytes written and neither punched nor truncated since. Shared, so that a stat reads it
    /// without the lock of the stream.
    written: Arc<AtomicU64>,
    /// The number of bytes before the frontier that can be read back, for which the runs must stay
    /// exact.
    read_window: u64,
    /// The gap up to which runs are joined next time there are too many.
    coarsen_gap: u64,
    /// The number of runs beyond which they are joined.
    max_runs: usize,
    is_exact: bool,
}

/// The next run for the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingRun {
    /// The position in bytes.
    pub range: Range<u64>,
    /// The content; `None` if the run was never written.
    pub written: Option<Written>,
}

impl Window {
    /// Creates the window of a stream of `size` bytes of which nothing is written. A `spill` of
    /// `u64::MAX` means no limit.
    #[must_use]
    pub fn new(size: u64, window: u64, spill: u64) -> Self {
        Self {
            size,
            window,
            spill,
            frontier: 0,
            taken: 0,
            accepted: 0,
            highest: 0,
            runs: WrittenRuns::default(),
            needed: Needed::new(size, window),
            beyond: 0,
            unaccepted: 0,
            written: Arc::default(),
            read_window: 0,
            coarsen_gap: MIN_COARSEN_GAP,
            max_runs: MAX_RUNS,
            is_exact: true,
        }
    }

    /// Keeps the runs of the last `bytes` bytes before the frontier exact, so that they can be read
    /// back.
    pub fn set_read_window(&mut self, bytes: u64) {
        self.read_window = bytes;
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the frontier: the first byte that can still be changed.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// Returns the offset of the first byte that has not been given to the sink.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Returns the offset of the first byte that the sink has not accepted.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.accepted
    }

    /// Returns the end of the highest write.
    #[must_use]
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// Returns the bytes of data that the sink has not accepted.
    #[must_use]
    pub fn unaccepted(&self) -> u64 {
        self.unaccepted
    }

    /// Returns the bytes of data in the window, between frontier and edge.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.runs.data_bytes(self.frontier..self.edge())
    }

    /// Returns the bytes of data beyond the window.
    #[must_use]
    pub fn beyond(&self) -> u64 {
        self.beyond
    }

    /// Returns the number of bytes written, which follows the window.
    #[must_use]
    pub fn written(&self) -> &Arc<AtomicU64> {
        &self.written
    }

    /// Returns the smallest window without spill, and the smallest spill with the current window,
    /// that would have sufficed so far.
    #[must_use]
    pub fn needed(&self) -> NeededSizes {
        NeededSizes { window: self.needed.window, spill: self.needed.spill }
    }

    /// Returns the written runs.
    #[must_use]
    pub fn runs(&self) -> &WrittenRuns {
        &self.runs
    }

    /// Returns whether the runs of accepted ranges are still exact, that is, no runs have been
    /// joined.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    fn edge(&self) -> u64 {
        self.frontier.saturating_add(self.window)
    }

    /// Describes a prefix of `range`, which must be inside the disk and not empty.
    #[must_use]
    pub fn extent_at(&self, range: Range<u64>) -> Extent {
        let (end, written) = self.runs.at(range.start);
        let kind = if written.is_some() { ExtentKind::Data } else { ExtentKind::Hole };
        Extent::new(range.start..end.min(range.end), kind)
    }

    /// Returns the first offset at which writing `buf` at `offset` may change the content, as far
    /// as the runs tell without looking at data: a non-zero byte where there is no data, or any
    /// byte where there is data.
    #[must_use]
    pub fn first_change(&self, offset: u64, buf: &[u8]) -> Option<u64> {
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (stop, written) = self.runs.at(at);
            if written == Some(Written::Data) {
                return Some(at);
            }
            let stop = stop.min(end);
            let part = &buf[index(at - offset)..index(stop - offset)];
            // Whole zeros are skipped by comparison, many times faster than byte by byte.
            let zeros = part.chunks(ZERO_SCAN_LEN).take_while(|piece| is_zero(piece));
            let skip = zeros.map(<[u8]>::len).sum::<usize>();
            if let Some(found) = part[skip..].iter().position(|byte| *byte != 0) {
                return Some(at + (skip + found) as u64);
            }
            at = stop;
        }
        None
    }

    /// Records, before the change, that a request changes the byte at `at`, for the needed sizes.
    pub fn note_change(&mut self, at: u64) {
        self.needed.before_change(&self.runs, at);
    }

    /// Sets `range` to `written`. Only frames that carry offsets may set ranges before the
    /// frontier. The frontier does not move; [`advance`](Self::advance) moves it.
    pub fn set(&mut self, range: Range<u64>, written: Option<Written>) {
        if range.is_empty() {
            return;
        }
        self.needed.before_set(&self.runs, &range, written);
        let before: u64 = self.runs.within(range.clone()).map(|(part, _)| len(&part)).sum();
        let edge = self.edge();
        for part in self.runs.data_within(range.clone()) {
            self.unaccepted -= len(&clip(&part, self.accepted..u64::MAX));
            self.beyond -= len(&clip(&part, edge..u64::MAX));
        }
        if written == Some(Written::Data) {
            self.unaccepted += len(&clip(&range, self.accepted..u64::MAX));
            self.beyond += len(&clip(&range, edge..u64::MAX));
        }
        // Joined runs contain more bytes than were ever written.
        let mut total = self.written.load(Ordering::Relaxed).saturating_sub(before);
        if written.is_some() {
            total += len(&range);
            self.highest = self.highest.max(range.end);
        }
        self.written.store(total, Ordering::Relaxed);
        self.runs.set(range, written);
    }

    /// Advances the frontier by the least amount that leaves no more than `spill` bytes of data
    /// past the edge. Returns whether it moved.
    pub fn advance(&mut self) -> bool {
        self.advance_to_budget(self.spill)
    }

    /// Advances the frontier as [`advance`](Self::advance) does, with another budget: for a host
    /// without room for the full spill.
    pub fn advance_to_budget(&mut self, spill: u64) -> bool {
        let frontier = self.frontier_for_budget(spill);
        if frontier == self.frontier {
            return false;
        }
        self.beyond = spill;
        self.frontier = frontier;
        self.coarsen_accepted();
        true
    }

    /// Returns the lowest frontier with at most `spill` bytes of data beyond the window.
    #[must_use]
    pub fn frontier_for_budget(&self, spill: u64) -> u64 {
        let mut excess = self.beyond.saturating_sub(spill);
        if excess == 0 {
            return self.frontier;
        }
        let mut edge = self.edge();
        for part in self.runs.data_within(edge..self.size) {
            let inside = len(&part).min(excess);
            edge = part.start + inside;
            excess -= inside;
            if excess == 0 {
                break;
            }
        }
        edge - self.window
    }

    /// Moves the frontier to `end`, so that everything before it is sent.
    pub fn finish(&mut self, end: u64) {
        self.frontier = self.frontier.max(end);
        self.beyond = self.runs.data_bytes(self.edge()..self.size);
    }

    /// Forgets the data at and past `from` that has not left. Returns whether only zeros had left
    /// of that range. `from` becomes the new end of the data.
    pub fn truncate(&mut self, from: u64) -> bool {
        let gone = from..self.frontier.max(from);
        if self.runs.data_within(gone).next().is_some() {
            return false;
        }
        self.set(from.max(self.frontier)..self.size, None);
        self.highest = self.highest.min(from.max(self.frontier));
        true
    }

    /// Takes the next run for the sink, with at most `most` bytes of data.
    pub fn take_next(&mut self, most: u64) -> Option<OutgoingRun> {
        if self.taken >= self.frontier {
            return None;
        }
        let (end, written) = self.runs.at(self.taken);
        let mut end = end.min(self.frontier);
        if written == Some(Written::Data) {
            end = end.min(self.taken + most);
        }
        let range = self.taken..end;
        self.taken = end;
        Some(OutgoingRun { range, written })
    }

    /// Records that the sink has accepted everything before `to`.
    pub fn mark_accepted(&mut self, to: u64) {
        self.unaccepted -= self.runs.data_bytes(self.accepted..to.max(self.accepted));
        self.accepted = self.accepted.max(to);
    }

    /// Bounds the memory used for the runs of accepted ranges.
    fn coarsen_accepted(&mut self) {
        if self.runs.len() <= self.max_runs {
            return;
        }
        // Only accepted ranges that cannot be read back: the other runs must stay exact.
        let limit = self.accepted.min(self.frontier.saturating_sub(self.read_window));
        self.runs.coarsen(limit, self.coarsen_gap);
        self.needed.recount(&self.runs);
        self.coarsen_gap *= 2;
        self.is_exact = false;
        // Runs that cannot be joined must not be visited again at every step.
        self.max_runs = MAX_RUNS.max(self.runs.len() + self.runs.len() / 4);
    }
}

fn index(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

fn len(range: &Range<u64>) -> u64 {
    range.end.saturating_sub(range.start)
}

fn clip(range: &Range<u64>, to: Range<u64>) -> Range<u64> {
    range.start.max(to.start)..range.end.min(to.end)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
