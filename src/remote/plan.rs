//! Which bytes to fetch for a read, and which before they are read. Pure: no I/O, no clock.
//!
//! Every read is told to the [`Planner`], those that the cache answers too: only so is the next part of
//! a file on its way before the reader comes to it. A read continues a *stream*, or begins at a new
//! place:
//!
//! ```text
//!   start            end of what was read         issued                    a stream
//!   |---- consumed ----|------ on its way ----------|
//!                      |---------------- window ---------------|
//!                                                   |-- next --|   asked for once half of the window
//!                                                                  is read
//! ```
//!
//! The window is half of what was read of the stream, at first the guess below and at most
//! [`ahead`](PlanLimits::ahead): it grows as the reader goes on, and a reader that stops has made the
//! server send half as much again in vain. (A window as long as what was read fetched 2.2 times what a
//! boot touches, and was no faster.)
//!
//! At a new place, more than what is asked is fetched as a *guess*: the bytes around it. Each read that
//! misses far from all recent ones halves the guess, down to the blocks asked for, so that random reads
//! cost only themselves; one that misses close to a recent one doubles it, because a greater guess
//! would have had it.

use std::collections::VecDeque;
use std::ops::Range;

use super::BLOCK_SIZE;
use super::transport::RequestLimits;

/// The sequential readers that are followed at the same time.
const MAX_STREAMS: usize = 16;
/// The reads at new places that are remembered, for the next one to continue. They are apart from the
/// streams, so that random reads do not push these out.
const MAX_RECENT: usize = 32;
/// The longest distance, in bytes, by which a read may be out of order and still belong to a stream:
/// the kernel's largest read-ahead, whose requests come from several threads.
const MAX_GAP: u64 = 1 << 20;
/// The distance for small reads in bytes: 16 direct reads of 4 KiB may be on their way at a time.
const MIN_GAP: u64 = 64 << 10;
/// The most requests by which one read may be out of order: the kernel cuts a read-ahead of 1 MiB into
/// requests of 128 KiB where it knows no better.
const MAX_GAP_READS: u64 = 8;
/// The least distance, in bytes, at which a read is not elsewhere. After many random reads a guess is one
/// block, and its double would hardly ever reach the next read of a place.
const MIN_NEAR: u64 = 16 << 10;
/// The number of requests into which a window is cut, so that the first bytes do not wait for the last
/// ones and several connections share the work.
const PIECES_PER_WINDOW: u64 = 8;

/// The longest request in bytes, if the server takes it. What a request brings is in memory until it
/// is in the cache, and what waits for its first byte waits for its last one.
const MAX_REQUEST: u64 = 4 << 20;

/// The bounds of what is fetched, all in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlanLimits {
    /// The size of the image.
    pub(crate) image_size: u64,
    /// The key `fetch`: the first guess and the first window. A power of two.
    pub(crate) fetch: u64,
    /// The key `ahead`: the largest window.
    pub(crate) ahead: u64,
    /// The alignment of requests: a power of two, at least [`BLOCK_SIZE`].
    alignment: u64,
    /// The longest request, a multiple of `alignment`.
    max_len: u64,
}

impl PlanLimits {
    /// Combines the user's keys with the requests that a server takes. `fetch` is rounded up to a power
    /// of two and to what the server can be asked.
    #[must_use]
    pub(crate) fn new(image_size: u64, fetch: u64, ahead: u64, requests: RequestLimits) -> Self {
        let alignment = u64::from(requests.alignment).max(BLOCK_SIZE);
        let longest = u64::from(requests.max_len).min(MAX_REQUEST);
        let max_len = (longest - longest % alignment).max(alignment);
        let fetch = fetch.checked_next_power_of_two().unwrap_or(1 << 30).clamp(alignment, 1 << 30);
        Self { image_size, fetch, ahead, alignment, max_len }
    }

    /// Returns `range`, rounded out to multiples of `unit` but never past the end of the image.
    fn round_out(&self, range: &Range<u64>, unit: u64) -> Range<u64> {
        range.start - range.start % unit..self.round_up(range.end, unit)
    }

    fn round_up(&self, offset: u64, unit: u64) -> u64 {
        offset.checked_next_multiple_of(unit).unwrap_or(u64::MAX).min(self.image_size)
    }
}

/// Ranges to fetch, each as one request: aligned as the server wants it, in ascending order, and none
/// twice.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fetches {
    /// What the read waits for, and what comes with it.
    pub(crate) demand: Vec<Range<u64>>,
    /// What will be read next.
    pub(crate) ahead: Vec<Range<u64>>,
}

/// A sequential reader, or a read that may become one; offsets in bytes.
#[derive(Clone, Debug)]
struct Stream {
    start: u64,
    /// The end of what was read.
    end: u64,
    /// The end of what was asked for.
    issued: u64,
    consumed: u64,
    /// The value of [`Planner::clock`] at the last use.
    last_used: u64,
}

impl Stream {
    /// Returns by how many bytes `read` is out of order if it belongs to this stream.
    fn distance_to(&self, read: &Range<u64>) -> Option<u64> {
        let len = read.end - read.start;
        let gap = (len * MAX_GAP_READS).clamp(MIN_GAP, MAX_GAP);
        let behind = gap.max((self.end - self.start).min(MAX_GAP));
        let expected = self.end.saturating_sub(behind)..=self.end.saturating_add(gap);
        expected.contains(&read.start).then(|| read.start.abs_diff(self.end))
    }

    fn is_new_to(&self, read: &Range<u64>) -> bool {
        read.end > self.end || read.start < self.start
    }

    /// Whether `read` is within `distance` bytes of what this stream has asked for.
    fn is_near(&self, read: &Range<u64>, distance: u64) -> bool {
        read.start <= self.issued.max(self.end).saturating_add(distance)
            && self.start <= read.end.saturating_add(distance)
    }

    /// Takes in `read`. Bytes that were jumped over count, up to the length of the read: they are
    /// usually read by another thread at the moment.
    fn advance(&mut self, read: &Range<u64>) {
        let progress = read.end.saturating_sub(self.end) + self.start.saturating_sub(read.start);
        self.consumed += progress.min(2 * (read.end - read.start));
        self.start = self.start.min(read.start);
        self.end = self.end.max(read.end);
    }
}

/// The reads of one image, remembered to foresee the next ones.
#[derive(Debug)]
pub(crate) struct Planner {
    limits: PlanLimits,
    streams: Vec<Stream>,
    /// Reads at new places, the oldest first.
    recent: VecDeque<Stream>,
    /// Bytes to fetch at a new place; a power of two.
    guess: u64,
    clock: u64,
}

impl Planner {
    /// Creates a planner that has seen no read.
    #[must_use]
    pub(crate) fn new(limits: PlanLimits) -> Self {
        let guess = limits.fetch;
        Self { limits, streams: Vec::new(), recent: VecDeque::new(), guess, clock: 0 }
    }

    /// Decides what to fetch for `read` (bytes), which may be one that waited and is repeated.
    ///
    /// `missing` returns the parts of a range (whole blocks of [`BLOCK_SIZE`], except at the end of the
    /// image) that are neither there nor on their way: ascending, in whole blocks, inside the range.
    /// All of it that `read` touches is in [`Fetches::demand`].
    pub(crate) fn on_read(
        &mut self,
        read: &Range<u64>,
        missing: impl Fn(Range<u64>) -> Vec<Range<u64>>,
    ) -> Fetches {
        let read = read.start..read.end.min(self.limits.image_size);
        if read.is_empty() {
            return Fetches::default();
        }
        self.clock += 1;
        let wanted = missing(self.limits.round_out(&read, BLOCK_SIZE));
        match self.stream_of(&read) {
            Some(stream) => self.continue_stream(stream, &read, &wanted, missing),
            None => self.read_elsewhere(&read, &wanted, missing),
        }
    }

    /// Returns the index of the stream to which `read` belongs. A recent read that it continues becomes
    /// a stream.
    fn stream_of(&mut self, read: &Range<u64>) -> Option<usize> {
        let nearest = |streams: &mut dyn Iterator<Item = (usize, &Stream)>| {
            let near = streams.filter_map(|(at, stream)| Some((stream.distance_to(read)?, at)));
            near.min().map(|(_, at)| at)
        };
        if let Some(at) = nearest(&mut self.streams.iter().enumerate()) {
            return Some(at);
        }
        let mut new = self.recent.iter().enumerate().filter(|(_, other)| other.is_new_to(read));
        let at = nearest(&mut new)?;
        let stream = self.recent.remove(at)?;
        if self.streams.len() >= MAX_STREAMS {
            let oldest = self.streams.iter().enumerate().min_by_key(|(_, other)| other.last_used);
            let oldest = oldest.map(|(at, _)| at)?;
            self.streams.swap_remove(oldest);
        }
        self.streams.push(stream);
        Some(self.streams.len() - 1)
    }

    fn continue_stream(
        &mut self,
        at: usize,
        read: &Range<u64>,
        wanted: &[Range<u64>],
        missing: impl Fn(Range<u64>) -> Vec<Range<u64>>,
    ) -> Fetches {
        let (limits, guess) = (self.limits, self.guess);
        let Some(stream) = self.streams.get_mut(at) else { return Fetches::default() };
        stream.last_used = self.clock;
        let is_progress = stream.is_new_to(read);
        stream.advance(read);
        // The kernel's read-ahead at least doubles: its next one must be in what is fetched now.
        let next_readahead = 2 * (read.end - read.start);
        let window = (stream.consumed / 2).max(next_readahead).max(guess).min(limits.ahead);
        // Whole units, once the rest of one is little beside the window.
        let unit = if window < 4 * limits.fetch { BLOCK_SIZE } else { limits.fetch };
        let target = limits.round_up(stream.end.saturating_add(window), unit);
        let is_due = is_progress && stream.issued < stream.end.saturating_add(window / 2);
        if wanted.is_empty() && !is_due {
            return Fetches::default();
        }
        // A read that misses what was asked for says that it did not come: ask for all of it again.
        let from = match wanted.first() {
            Some(first) => first.start,
            None => stream.issued.max(stream.end),
        };
        let target = target.max(read.end);
        stream.issued = stream.issued.max(target);
        let piece = (window / PIECES_PER_WINDOW).max(limits.fetch);
        let mut fetches = Fetches::default();
        // The rest of a unit comes with what is waited for, so that a small read is one request.
        let together = limits.round_up(read.end, limits.fetch).min(target);
        for part in missing(limits.round_out(&(from..target), BLOCK_SIZE)) {
            if part.start >= read.end || wanted.is_empty() {
                fetches.ahead.push(part);
                continue;
            }
            let cut = part.end.min(limits.round_up(together, BLOCK_SIZE));
            fetches.demand.push(part.start..cut);
            if cut < part.end {
                fetches.ahead.push(cut..part.end);
            }
        }
        self.cut(fetches, piece)
    }

    fn read_elsewhere(
        &mut self,
        read: &Range<u64>,
        wanted: &[Range<u64>],
        missing: impl Fn(Range<u64>) -> Vec<Range<u64>>,
    ) -> Fetches {
        if wanted.is_empty() {
            self.remember(read, read.end);
            return Fetches::default();
        }
        let near = 2 * self.guess.max(MIN_NEAR);
        let mut known = self.recent.iter().chain(&self.streams);
        if known.any(|other| other.is_near(read, near)) {
            self.guess = (self.guess * 2).min(self.limits.fetch);
        } else if self.clock > 1 {
            self.guess = (self.guess / 2).max(BLOCK_SIZE);
        }
        let around = self.limits.round_out(read, self.guess);
        // Bytes on the other side of what is there already would be requests of their own.
        let is_wanted = |part: &Range<u64>| part.start < read.end && read.start < part.end;
        let demand: Vec<_> = missing(around).into_iter().filter(is_wanted).collect();
        let issued = demand.last().map_or(read.end, |last| last.end.max(read.end));
        self.remember(read, issued);
        self.cut(Fetches { demand, ahead: Vec::new() }, self.limits.max_len)
    }

    /// Remembers a read at a new place.
    fn remember(&mut self, read: &Range<u64>, issued: u64) {
        let is_repeated = |other: &Stream| other.start <= read.start && read.end <= other.end;
        if self.recent.iter().any(is_repeated) {
            return;
        }
        if self.recent.len() >= MAX_RECENT {
            self.recent.pop_front();
        }
        let consumed = read.end - read.start;
        let Range { start, end } = *read;
        self.recent.push_back(Stream { start, end, issued, consumed, last_used: self.clock });
    }

    /// Cuts what is to be fetched into requests, those ahead at multiples of `piece` bytes.
    fn cut(&self, fetches: Fetches, piece: u64) -> Fetches {
        let limits = &self.limits;
        let piece = (piece - piece % limits.alignment).clamp(limits.alignment, limits.max_len);
        let mut end = 0;
        let mut aligned = |parts: Vec<Range<u64>>, piece: u64| {
            let mut cut = Vec::with_capacity(parts.len());
            for part in parts {
                let part = limits.round_out(&part, limits.alignment);
                let mut start = part.start.max(end);
                while start < part.end {
                    let next = (start - start % piece + piece).min(part.end);
                    cut.push(start..next);
                    start = next;
                }
                end = end.max(part.end);
            }
            cut
        };
        let demand = aligned(fetches.demand, limits.max_len);
        Fetches { demand, ahead: aligned(fetches.ahead, piece) }
    }
}

#[cfg(test)]
mod tests;
