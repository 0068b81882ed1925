//! The sliding window of an output stream: what may be changed, what must leave. No bytes, no I/O.
//!
//! ```text
//!                             |<--- window --->|<------ spill ------>|
//!   accepted  | leaving       | rewritable     | rewritable          |
//!   +---------+---------------+----------------+---------------------+--> size
//!   0        sent  taken   frontier           edge = frontier + window
//! ```
//!
//! - At most `spill` bytes of data lie at and past the edge. When a write brings more, the
//!   frontier advances until they do not: the least that helps, and the lowest data first.
//!   docs/streams.md proves that nothing does better.
//! - What lies before the frontier has left for good, though the sink may not have taken it yet:
//!   what a stream accepts never depends on how fast its sink is.
//! - Zeros, holes and what was never written cost nothing anywhere.

use std::ops::Range;

use super::needed::Needed;
use super::runs::{Written, WrittenRuns};
use crate::extents::{Extent, ExtentKind};

/// What was sent is remembered in at most so many runs; then neighbours are joined and count as
/// data. About 5 MiB.
const MAX_RUNS: usize = 128 << 10;
/// Runs closer than this are joined first.
const MIN_COARSEN_GAP: u64 = 64 << 10;

static ZEROS: [u8; 4096] = [0; 4096];

/// The state of an output stream, without its bytes. All offsets in bytes.
#[derive(Clone, Debug)]
pub struct Window {
    size: u64,
    window: u64,
    spill: u64,
    frontier: u64,
    taken: u64,
    sent: u64,
    highest: u64,
    runs: WrittenRuns,
    needed: Needed,
    /// Data at and past the edge.
    beyond: u64,
    /// Data at and past `sent`.
    unsent: u64,
    /// Everything that was written and is neither punched nor truncated.
    written: u64,
    /// Bytes behind the frontier that can be read back: they are still needed to the byte.
    read_window: u64,
    /// The next gap to be joined, when there are too many runs.
    coarsen_gap: u64,
    /// More runs than this are too many.
    max_runs: usize,
    is_exact: bool,
}

/// What the sink gets next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutgoingRun {
    /// Where it lies.
    pub range: Range<u64>,
    /// What it is; `None`: never written.
    pub written: Option<Written>,
}

impl Window {
    /// A stream of `size` bytes of which nothing is written. `spill` of `u64::MAX` is no limit.
    #[must_use]
    pub fn new(size: u64, window: u64, spill: u64) -> Self {
        Self {
            size,
            window,
            spill,
            frontier: 0,
            taken: 0,
            sent: 0,
            highest: 0,
            runs: WrittenRuns::default(),
            needed: Needed::new(size, window),
            beyond: 0,
            unsent: 0,
            written: 0,
            read_window: 0,
            coarsen_gap: MIN_COARSEN_GAP,
            max_runs: MAX_RUNS,
            is_exact: true,
        }
    }

    /// Has `bytes` before the frontier remembered to the byte: they can be read back.
    pub fn set_read_window(&mut self, bytes: u64) {
        self.read_window = bytes;
    }

    /// The size of the disk.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The first byte that has not left.
    #[must_use]
    pub fn frontier(&self) -> u64 {
        self.frontier
    }

    /// The first byte that the sink was not given.
    #[must_use]
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// The first byte that the sink has not accepted.
    #[must_use]
    pub fn sent(&self) -> u64 {
        self.sent
    }

    /// The end of the highest write.
    #[must_use]
    pub fn highest(&self) -> u64 {
        self.highest
    }

    /// Bytes of data that the sink has not accepted.
    #[must_use]
    pub fn unsent(&self) -> u64 {
        self.unsent
    }

    /// Bytes of data in the window, between frontier and edge.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.runs.data_bytes(self.frontier..self.edge())
    }

    /// Bytes of data beyond the window.
    #[must_use]
    pub fn beyond(&self) -> u64 {
        self.beyond
    }

    /// Bytes that were written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written
    }

    /// The smallest window without spill, and the smallest spill with this window, that would have
    /// done so far.
    #[must_use]
    pub fn needed(&self) -> (u64, u64) {
        (self.needed.window, self.needed.spill)
    }

    /// What was written where.
    #[must_use]
    pub fn runs(&self) -> &WrittenRuns {
        &self.runs
    }

    /// Whether everything that was sent is remembered to the byte.
    #[must_use]
    pub fn is_exact(&self) -> bool {
        self.is_exact
    }

    fn edge(&self) -> u64 {
        self.frontier.saturating_add(self.window)
    }

    /// Describes a prefix of `range`, which lies inside the disk and is not empty.
    #[must_use]
    pub fn extent_at(&self, range: Range<u64>) -> Extent {
        let (end, written) = self.runs.at(range.start);
        let kind = if written.is_some() { ExtentKind::Data } else { ExtentKind::Hole };
        Extent::new(range.start..end.min(range.end), kind)
    }

    /// The first byte of `buf`, written at `offset`, that is another than what is there as far as
    /// that is known without looking at data: a byte that is not zero where there was none, or
    /// any byte where there is data.
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
            // Whole zeros by comparison, which is many times faster than byte by byte.
            let zeros =
                part.chunks(ZEROS.len()).take_while(|piece| **piece == ZEROS[..piece.len()]);
            let skip = zeros.map(<[u8]>::len).sum::<usize>();
            if let Some(found) = part[skip..].iter().position(|byte| *byte != 0) {
                return Some(at + (skip + found) as u64);
            }
            at = stop;
        }
        None
    }

    /// Notes that a request changes the byte at `at`, for what is needed. Before the change.
    pub fn note_change(&mut self, at: u64) {
        self.needed.before_change(&self.runs, at);
    }

    /// `range` now is what `written` says. Parts before the frontier are for frames that carry
    /// offsets only; the frontier does not move: [`advance`](Self::advance) does that.
    pub fn set(&mut self, range: Range<u64>, written: Option<Written>) {
        if range.is_empty() {
            return;
        }
        self.needed.before_set(&self.runs, &range, written);
        let before: u64 = self.runs.within(range.clone()).map(|(part, _)| len(&part)).sum();
        let edge = self.edge();
        for part in self.runs.data_within(range.clone()) {
            self.unsent -= len(&clip(&part, self.sent..u64::MAX));
            self.beyond -= len(&clip(&part, edge..u64::MAX));
        }
        if written == Some(Written::Data) {
            self.unsent += len(&clip(&range, self.sent..u64::MAX));
            self.beyond += len(&clip(&range, edge..u64::MAX));
        }
        // Joined runs hold more than was ever written.
        self.written = self.written.saturating_sub(before);
        if written.is_some() {
            self.written += len(&range);
            self.highest = self.highest.max(range.end);
        }
        self.runs.set(range, written);
    }

    /// Lets leave what must: the frontier moves by the least that puts no more than `spill` bytes
    /// of data past the edge. Returns whether it moved.
    pub fn advance(&mut self) -> bool {
        self.advance_to_budget(self.spill)
    }

    /// As [`advance`](Self::advance) with another budget: for a host that has no room for what
    /// the spill allows.
    pub fn advance_to_budget(&mut self, spill: u64) -> bool {
        let frontier = self.frontier_for_budget(spill);
        if frontier == self.frontier {
            return false;
        }
        self.beyond = spill;
        self.frontier = frontier;
        self.coarsen_sent();
        true
    }

    /// The lowest frontier with at most `spill` bytes of data beyond the window.
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

    /// Lets everything leave, up to `end`.
    pub fn finish(&mut self, end: u64) {
        self.frontier = self.frontier.max(end);
        self.beyond = self.runs.data_bytes(self.edge()..self.size);
    }

    /// Forgets what lies at and past `from` and has not left; whether nothing but zeros had left
    /// of it. `from` is the new end of the data.
    pub fn truncate(&mut self, from: u64) -> bool {
        let gone = from..self.frontier.max(from);
        if self.runs.data_within(gone).next().is_some() {
            return false;
        }
        self.set(from.max(self.frontier)..self.size, None);
        self.highest = self.highest.min(from.max(self.frontier));
        true
    }

    /// What the sink gets next, at most `most` bytes of data; that counts as taken.
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

    /// The sink has accepted everything before `to`.
    pub fn mark_accepted(&mut self, to: u64) {
        self.unsent -= self.runs.data_bytes(self.sent..to.max(self.sent));
        self.sent = self.sent.max(to);
    }

    /// Keeps the memory of what has left bounded.
    fn coarsen_sent(&mut self) {
        if self.runs.len() <= self.max_runs {
            return;
        }
        // Only what is sent and cannot be read back: the rest is still needed to the byte.
        let limit = self.sent.min(self.frontier.saturating_sub(self.read_window));
        self.runs.coarsen(limit, self.coarsen_gap);
        self.needed.recount(&self.runs);
        self.coarsen_gap *= 2;
        self.is_exact = false;
        // What cannot be joined must not be looked at again at every step.
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
