//! The replay of a trace: its bytes are fetched before they are read.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use super::Trace;
use crate::arrival::Arrival;
use crate::remote::cache::Urgency;
use crate::remote::fetcher::Fetcher;

/// The ranges that are wanted at a time. The fetcher sends as many of them as the link takes.
const WINDOW: usize = 64;
/// The bytes that are wanted at once; under a rate a few times a second, so long as these are not few.
const MIN_STEP: u64 = 64 << 10;
const MAX_STEP: u64 = 1 << 20;
/// How often a replay that is paced looks whether its image is closed.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// A trace that is replayed, or was.
pub(in crate::remote) struct Replay {
    trace: Trace,
    is_running: AtomicBool,
}

impl Replay {
    /// Reads the trace in `file`, of an image of `size` bytes; `None` when there is no such file.
    ///
    /// # Errors
    /// A line without the name of the file.
    pub(super) fn read(file: &Path, size: u64) -> Result<Option<Arc<Self>>, String> {
        let found = Trace::read(file, size)?;
        Ok(found.map(|trace| Arc::new(Self { trace, is_running: AtomicBool::new(false) })))
    }

    /// Begins to fetch the trace, at most `rate` bytes a second (0: no limit), until that is done or
    /// `fetcher` is dropped.
    ///
    /// # Errors
    /// The host's errno, when no thread can be started.
    pub(super) fn start(self: &Arc<Self>, fetcher: &Arc<Fetcher>, rate: u64) -> io::Result<()> {
        let (this, fetcher) = (Arc::clone(self), Arc::downgrade(fetcher));
        self.is_running.store(true, Ordering::Relaxed);
        let thread = thread::Builder::new().name("cowslip-trace".to_owned());
        let started = thread.spawn(move || {
            fetch_all(&this.trace.fetches(), &fetcher, rate);
            this.is_running.store(false, Ordering::Relaxed);
        });
        started.map(|_| ()).inspect_err(|_| self.is_running.store(false, Ordering::Relaxed))
    }

    /// Whether the trace has all of `range`, so that nothing besides it is to be fetched for a read.
    pub(super) fn contains(&self, range: &Range<u64>) -> bool {
        self.trace.blocks.contains(range)
    }

    /// Whether bytes of the trace are still being fetched.
    pub(super) fn is_running(&self) -> bool {
        self.is_running.load(Ordering::Relaxed)
    }
}

/// Cuts `range` into pieces of `step` bytes.
fn steps(range: &Range<u64>, step: u64) -> impl Iterator<Item = Range<u64>> + use<> {
    let (mut at, end) = (range.start, range.end);
    std::iter::from_fn(move || {
        let piece = at..end.min(at.saturating_add(step));
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

fn fetch_all(ranges: &[Range<u64>], fetcher: &Weak<Fetcher>, rate: u64) {
    let mut wanted: VecDeque<Arrival> = VecDeque::new();
    let (begun, mut bytes) = (Instant::now(), 0_u64);
    let step = if rate == 0 { MAX_STEP } else { (rate / 4).clamp(MIN_STEP, MAX_STEP) };
    for range in ranges.iter().flat_map(|range| steps(range, step)) {
        // Held while something is waited for: so all that was asked for arrives.
        let Some(open) = fetcher.upgrade() else { return };
        wanted.extend(open.fetch(&range, Urgency::Ahead));
        if wanted.len() >= WINDOW
            && let Some(oldest) = wanted.pop_front()
        {
            // What fails is fetched when it is read.
            let _ = oldest.wait();
        }
        drop(open);
        bytes += range.end - range.start;
        let due = bytes.saturating_mul(1_000_000).checked_div(rate).map(Duration::from_micros);
        while let Some(left) = due.and_then(|due| due.checked_sub(begun.elapsed()))
            && fetcher.strong_count() > 0
        {
            thread::sleep(left.min(POLL_INTERVAL));
        }
    }
}
