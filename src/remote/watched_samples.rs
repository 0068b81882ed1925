//! The samples of an image that is written to (`mode=rw`), by which an image that took its place
//! during an outage is noticed.
//!
//! What is written changes the samples, so each is only known while it is as the server last showed
//! it and durable there:
//!
//! ```text
//!            a change touches it               a flush that began after the change
//!   known ─────────────────────▶ unknown ─────────────────────────────────────────▶ read again
//!     ▲                                                                                 │
//!     └──────────────────────── no change began meanwhile ──────────────────────────────┘
//! ```
//!
//! A new connection must show every known sample. Of an unknown one it may show the bytes before or
//! after a change, so nothing can be said of it.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::answer::answer_of;
use super::samples::Sample;
use super::transport::{IdentityCheck, ReadRanges, Transport};
use crate::identity::SampleHash;

/// A sample, and what is known of it.
struct Watched {
    sample: Sample,
    /// The hash of its bytes, while these are known.
    hash: Option<SampleHash>,
    /// Changes that touch it and have not ended.
    changing: usize,
    /// Number of changes that touched it.
    changes: u64,
    /// Number of flushes that had begun when the last of these changes ended.
    changed_at: u64,
    /// Whether it is being read again.
    is_asked: bool,
}

impl Watched {
    /// Whether it is unknown and all changes of it were durable when flush `durable` had succeeded.
    fn is_refreshable(&self, durable: u64) -> bool {
        self.hash.is_none() && self.changing == 0 && self.changed_at < durable && !self.is_asked
    }
}

#[derive(Default)]
struct State {
    samples: Vec<Watched>,
    /// Number of flushes that have begun.
    flushes: u64,
    /// The changes that ended before this flush began are durable.
    durable: u64,
}

/// The samples of an image that is written to. All ranges are in bytes of the image.
pub(super) struct WatchedSamples {
    state: Mutex<State>,
    alignment: u64,
}

impl WatchedSamples {
    /// Reads the samples of the image behind `transport`, all at once.
    ///
    /// # Errors
    /// The errno of a read.
    pub(super) fn read(transport: &dyn Transport) -> io::Result<Arc<Self>> {
        let alignment = u64::from(transport.limits().alignment.max(1));
        let asked: Vec<_> = Sample::all(transport.size(), alignment)
            .map(|sample| {
                let answer = answer_of(|done| transport.read(sample.range.clone(), done));
                (sample, answer)
            })
            .collect();
        let mut state = State::default();
        for (sample, answer) in asked {
            let hash = Some(sample.hash(&answer.wait()?)?);
            let (changing, changes, changed_at, is_asked) = (0, 0, 0, false);
            state.samples.push(Watched { sample, hash, changing, changes, changed_at, is_asked });
        }
        Ok(Arc::new(Self { state: Mutex::new(state), alignment }))
    }

    /// Notes a change of `range` that begins; it has ended when the guard is dropped.
    pub(super) fn begin_change(&self, range: Range<u64>) -> Change<'_> {
        let start = range.start - range.start % self.alignment;
        let range = start..range.end.checked_next_multiple_of(self.alignment).unwrap_or(u64::MAX);
        for watched in self.state.lock().touched_by(&range) {
            watched.hash = None;
            watched.changing += 1;
            watched.changes += 1;
        }
        Change { samples: self, range }
    }

    /// Notes a flush that begins. Returns its number.
    pub(super) fn begin_flush(&self) -> u64 {
        let mut state = self.state.lock();
        state.flushes += 1;
        state.flushes
    }

    /// Notes that flush `number` has succeeded.
    pub(super) fn end_flush(&self, number: u64) {
        let mut state = self.state.lock();
        state.durable = state.durable.max(number);
    }

    /// Whether [`refresh`](Self::refresh) would ask for a sample.
    pub(super) fn are_refreshable(&self) -> bool {
        let state = self.state.lock();
        state.samples.iter().any(|watched| watched.is_refreshable(state.durable))
    }

    /// Begins to read the unknown samples whose changes are durable. Waits for nothing.
    pub(super) fn refresh(self: &Arc<Self>, transport: &dyn Transport) {
        // The lock is released first: an answer may come before `read` returns.
        let due = self.state.lock().refreshable();
        for (at, range, changes) in due {
            let samples = Arc::clone(self);
            let done = move |result: io::Result<Vec<u8>>| {
                samples.state.lock().refresh(at, changes, result);
            };
            transport.read(range, Box::new(done));
        }
    }

    /// Returns the check that the image of a new connection shows the known samples.
    pub(super) fn check(self: &Arc<Self>) -> IdentityCheck {
        let samples = Arc::clone(self);
        Arc::new(move |read: ReadRanges<'_>| {
            let known: Vec<_> = samples.state.lock().known().collect();
            let ranges: Vec<_> = known.iter().map(|known| known.1.clone()).collect();
            let read = read(&ranges)?;
            let state = samples.state.lock();
            for ((at, _, changes), bytes) in known.into_iter().zip(read) {
                // A change that has begun meanwhile may or may not be in the bytes.
                if let Some(watched) = state.samples.get(at)
                    && watched.changes == changes
                    && watched.hash != Some(watched.sample.hash(&bytes)?)
                {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    #[cfg(test)]
    fn known_count(&self) -> usize {
        self.state.lock().known().count()
    }
}

impl State {
    fn touched_by(&mut self, range: &Range<u64>) -> impl Iterator<Item = &mut Watched> {
        let touches = |other: &Range<u64>| range.start < other.end && other.start < range.end;
        self.samples.iter_mut().filter(move |watched| touches(&watched.sample.range))
    }

    /// The known samples: index, range, and number of changes.
    fn known(&self) -> impl Iterator<Item = (usize, Range<u64>, u64)> {
        let known = self.samples.iter().enumerate().filter(|(_, watched)| watched.hash.is_some());
        known.map(|(at, watched)| (at, watched.sample.range.clone(), watched.changes))
    }

    /// Marks the samples that can be read again as asked for, and returns them.
    fn refreshable(&mut self) -> Vec<(usize, Range<u64>, u64)> {
        let durable = self.durable;
        let samples = self.samples.iter_mut().enumerate();
        samples
            .filter(|(_, watched)| watched.is_refreshable(durable))
            .map(|(at, watched)| {
                watched.is_asked = true;
                (at, watched.sample.range.clone(), watched.changes)
            })
            .collect()
    }

    /// Takes the bytes of a sample that was read again after so many `changes`.
    fn refresh(&mut self, at: usize, changes: u64, result: io::Result<Vec<u8>>) {
        let Some(watched) = self.samples.get_mut(at) else { return };
        watched.is_asked = false;
        if watched.changes == changes {
            // One that cannot be read stays unknown, and is asked for again.
            watched.hash = result.and_then(|bytes| watched.sample.hash(&bytes)).ok();
        }
    }
}

/// A change that is under way.
pub(super) struct Change<'a> {
    samples: &'a WatchedSamples,
    range: Range<u64>,
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        let mut state = self.samples.state.lock();
        let flushes = state.flushes;
        for watched in state.touched_by(&self.range) {
            watched.changing = watched.changing.saturating_sub(1);
            watched.changed_at = flushes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::remote::testing::{MemoryServer, pattern};

    const SIZE: usize = 1 << 20;

    fn span(range: &Range<u64>) -> Range<usize> {
        usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()
    }

    /// Whether `samples` takes an image of `bytes` for the same one.
    fn is_same(samples: &Arc<WatchedSamples>, bytes: &[u8]) -> bool {
        let mut read = |ranges: &[Range<u64>]| -> io::Result<Vec<Vec<u8>>> {
            Ok(ranges.iter().map(|range| bytes[span(range)].to_vec()).collect())
        };
        samples.check()(&mut read).unwrap()
    }

    #[test]
    fn samples_are_known_again_after_a_flush() {
        let mut bytes = pattern(SIZE);
        let samples = WatchedSamples::read(&MemoryServer::new(bytes.clone())).unwrap();
        let all = samples.known_count();
        assert!(is_same(&samples, &bytes));
        assert!(!is_same(&samples, &vec![7; SIZE]));

        let change = samples.begin_change(10..20);
        bytes[10] ^= 1;
        assert_eq!(samples.known_count(), all - 1);
        // Before and after the change.
        assert!(is_same(&samples, &bytes) && is_same(&samples, &pattern(SIZE)));
        assert!(!is_same(&samples, &vec![7; SIZE]));
        // A flush that began before the change ended does not cover it.
        let early = samples.begin_flush();
        drop(change);
        samples.end_flush(early);
        let server = MemoryServer::new(bytes.clone());
        samples.refresh(&server);
        assert_eq!(samples.known_count(), all - 1);

        samples.end_flush(samples.begin_flush());
        samples.refresh(&server);
        wait_until(|| samples.known_count() == all);
        assert!(is_same(&samples, &bytes) && !is_same(&samples, &pattern(SIZE)));
    }

    #[test]
    fn bytes_that_were_read_before_a_change_are_not_taken() {
        let samples = WatchedSamples::read(&MemoryServer::new(pattern(SIZE))).unwrap();
        let all = samples.known_count();
        drop(samples.begin_change(0..SIZE as u64));
        assert_eq!(samples.known_count(), 0);
        samples.end_flush(samples.begin_flush());
        let asked = samples.state.lock().refreshable();
        assert_eq!(asked.len(), all);
        // A second call does not ask for them again.
        assert!(samples.state.lock().refreshable().is_empty());
        drop(samples.begin_change(0..1));
        for (at, range, changes) in asked {
            let len = span(&range).len();
            samples.state.lock().refresh(at, changes, Ok(vec![0; len]));
        }
        assert_eq!(samples.known_count(), all - 1);
    }

    fn wait_until(holds: impl Fn() -> bool) {
        let began = std::time::Instant::now();
        while !holds() {
            assert!(began.elapsed().as_secs() < 10);
            std::thread::yield_now();
        }
    }
}
