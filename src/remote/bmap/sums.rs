//! The SHA-256 of the ranges of an image, and which of them the bytes that were fetched match.
//!
//! ```text
//!                 fetched, up to here          all of it is kept           it matches
//!   From(byte) ◀──────────────────── Queued ───────────────────▶ Checking ───────────▶ Verified
//!       │                              ▲  ▲                          │ fetched again       │
//!       └── its byte is fetched ───────┘  └──────────────────────────┴─────────────────────┘
//! ```
//!
//! `From` has the first byte that was not kept when the range was looked at, so that most of what
//! is fetched costs no look at the cache. One thread looks and compares, a piece at a time. A range that is
//! fetched whole, in one request, is compared when it arrives.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::{Arc, OnceLock, Weak};
use std::thread;

use parking_lot::{Condvar, Mutex};
use sha2::{Digest, Sha256};

use crate::config::RemoteAddress;
use crate::formats::bmap::Bmap;
use crate::host::os_error;
use crate::layer::Wait;
use crate::remote::BLOCK_SIZE;
use crate::remote::cache::Cache;

/// The longest range that is fetched as a whole, and compared before it is kept: what a read fetches by
/// default.
const MAX_WHOLE: u64 = 256 << 10;
/// The bytes that are compared at a time.
const PIECE: usize = 1 << 20;

/// Which ranges of an image match the checksums of its bmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SumStatus {
    /// The number of ranges that match, as they are kept.
    pub verified: u64,
    /// The number of all ranges that have a checksum.
    pub ranges: u64,
    /// The bytes that do not match: nothing more of the image is read.
    pub mismatch: Option<Range<u64>>,
}

/// A range of the image, and the checksum of its bytes.
struct SummedRange {
    bytes: Range<u64>,
    sum: [u8; 32],
}

impl SummedRange {
    fn matches(&self, bytes: &[u8]) -> bool {
        <[u8; 32]>::from(Sha256::digest(bytes)) == self.sum
    }
}

/// How far the comparison of a range is. Bytes are those of the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    /// This byte was not kept; all before it in the range were.
    From(u64),
    /// To be looked at, from this byte on.
    Queued(u64),
    Checking,
    /// Being compared, while some of it was fetched again.
    Again,
    Verified,
}

struct State {
    /// One for each range.
    progress: Vec<Progress>,
    /// The ranges that are [`Progress::Queued`], and some that are not any more.
    queue: VecDeque<usize>,
    verified: usize,
    is_closed: bool,
}

/// The checksums of an image, while it is open.
pub(in crate::remote) struct RangeSums {
    address: RemoteAddress,
    size: u64,
    /// In ascending order, disjoint.
    ranges: Vec<SummedRange>,
    state: Mutex<State>,
    wakeup: Condvar,
    /// The bytes that do not match their checksum, once there are any.
    mismatch: OnceLock<Range<u64>>,
}

impl RangeSums {
    /// Takes the checksums of `bmap`, of the image at `address`; `None` where it has none.
    pub(in crate::remote) fn new(address: &RemoteAddress, bmap: &Bmap) -> Option<Arc<Self>> {
        let summed = bmap
            .ranges
            .iter()
            .filter_map(|range| Some(SummedRange { bytes: range.bytes.clone(), sum: range.sum? }));
        let ranges: Vec<_> = summed.collect();
        let progress = ranges.iter().map(|range| Progress::From(range.bytes.start)).collect();
        let state = State { progress, queue: VecDeque::new(), verified: 0, is_closed: false };
        (!ranges.is_empty()).then(|| {
            Arc::new(Self {
                address: address.clone(),
                size: bmap.image_size,
                ranges,
                state: Mutex::new(state),
                wakeup: Condvar::new(),
                mismatch: OnceLock::new(),
            })
        })
    }

    /// Starts the thread that compares what `cache` holds, until [`close`](Self::close) or a mismatch.
    /// What is there already is looked at first.
    ///
    /// # Errors
    /// The host's errno, when no thread can be started.
    pub(in crate::remote) fn start(self: &Arc<Self>, cache: &Arc<Cache>) -> io::Result<()> {
        if cache.counters().present_bytes > 0 {
            let mut state = self.state.lock();
            for (index, range) in self.ranges.iter().enumerate() {
                state.enqueue(index, range.bytes.start);
            }
        }
        let (this, cache) = (Arc::clone(self), Arc::downgrade(cache));
        let thread = thread::Builder::new().name("cowslip-bmap".to_owned());
        let run = move || while this.look_at_next(&cache).is_some() {};
        thread.spawn(run).map(|_| ())
    }

    /// Ends the thread soon.
    pub(in crate::remote) fn close(&self) {
        self.state.lock().is_closed = true;
        self.wakeup.notify_all();
    }

    /// Returns the bytes that do not match their checksum, once there are any.
    pub(in crate::remote) fn mismatch(&self) -> Option<&Range<u64>> {
        self.mismatch.get()
    }

    /// Returns the first range that is not known to match, with its number.
    pub(in crate::remote) fn first_unverified(&self) -> Option<(usize, Range<u64>)> {
        let progress = &self.state.lock().progress;
        let index = progress.iter().position(|progress| *progress != Progress::Verified)?;
        Some((index, self.ranges.get(index)?.bytes.clone()))
    }

    /// Whether range `index` matches.
    pub(in crate::remote) fn is_verified(&self, index: usize) -> bool {
        self.state.lock().progress.get(index) == Some(&Progress::Verified)
    }

    /// Returns what came of the comparison so far.
    pub(in crate::remote) fn status(&self) -> SumStatus {
        SumStatus {
            verified: self.state.lock().verified as u64,
            ranges: self.ranges.len() as u64,
            mismatch: self.mismatch().cloned(),
        }
    }

    /// Rounds `range` out so that it cuts no range that is to be fetched as a whole.
    pub(in crate::remote) fn whole(&self, range: Range<u64>) -> Range<u64> {
        let start = self.cut_at(range.start).map_or(range.start, |cut| cut.start);
        let end = self.cut_at(range.end).map_or(range.end, |cut| cut.end);
        start..end
    }

    /// Returns an end of `range`, which may be less than its own, at which no range is cut that is to be
    /// fetched as a whole; its own end where there is no other.
    pub(in crate::remote) fn end_between(&self, range: &Range<u64>) -> u64 {
        let cut = self.cut_at(range.end).map(|cut| cut.start);
        cut.filter(|start| *start > range.start).unwrap_or(range.end)
    }

    /// Returns the range that is to be fetched as a whole and that is cut at byte `at`.
    pub(in crate::remote) fn cut_at(&self, at: u64) -> Option<Range<u64>> {
        let range = self.ranges.get(self.ranges.partition_point(|range| range.bytes.end <= at))?;
        let bytes = &range.bytes;
        // Others share blocks of the cache with their neighbours.
        let is_aligned = bytes.start.is_multiple_of(BLOCK_SIZE)
            && (bytes.end.is_multiple_of(BLOCK_SIZE) || bytes.end == self.size);
        let is_short = bytes.end - bytes.start <= MAX_WHOLE;
        (bytes.start < at && is_aligned && is_short).then(|| bytes.clone())
    }

    /// The ranges that touch `bytes`, with their numbers.
    fn touching(&self, bytes: &Range<u64>) -> impl Iterator<Item = (usize, &SummedRange)> {
        let first = self.ranges.partition_point(|range| range.bytes.end <= bytes.start);
        let end = bytes.end;
        let rest = self.ranges.iter().enumerate().skip(first);
        rest.take_while(move |(_, range)| range.bytes.start < end)
    }

    /// Compares the ranges of which all bytes have arrived, `bytes` from byte `start` of the image on.
    ///
    /// # Errors
    /// `EIO` when one does not match, and from then on: nothing is to be kept.
    pub(in crate::remote) fn check_arrived(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        let arrived = start..start + bytes.len() as u64;
        for (_, range) in self.touching(&arrived).filter(|(_, it)| is_inside(&it.bytes, &arrived)) {
            let from = usize::try_from(range.bytes.start - start).unwrap_or(usize::MAX);
            let to = usize::try_from(range.bytes.end - start).unwrap_or(usize::MAX);
            if !bytes.get(from..to).is_some_and(|bytes| range.matches(bytes)) {
                self.latch(&range.bytes);
            }
        }
        match self.mismatch() {
            None => Ok(()),
            Some(_) => Err(os_error(libc::EIO)),
        }
    }

    /// Notes that `stored`, which was compared when it arrived, is kept now.
    pub(in crate::remote) fn note_stored(&self, stored: &Range<u64>) {
        let mut state = self.state.lock();
        for (index, range) in self.touching(stored) {
            let is_whole = is_inside(&range.bytes, stored);
            let Some(progress) = state.progress.get(index).copied() else { continue };
            match progress {
                Progress::From(_) | Progress::Queued(_) if is_whole => {
                    state.set(index, Progress::Verified);
                }
                Progress::From(at) if stored.contains(&at) => state.enqueue(index, at),
                Progress::Verified if !is_whole => state.enqueue(index, range.bytes.start),
                Progress::Checking => state.set(index, Progress::Again),
                _ => {}
            }
        }
        drop(state);
        self.wakeup.notify_one();
    }

    fn latch(&self, bytes: &Range<u64>) {
        if self.mismatch.set(bytes.clone()).is_ok() {
            let (address, start, last) = (&self.address, bytes.start, bytes.end - 1);
            log::error!(
                "'{address}': bytes {start} to {last} do not match what its bmap says: nothing more of it is read"
            );
        }
        self.close();
    }

    /// Looks at the next range, after a wait for it; `None` when no more are to be looked at.
    fn look_at_next(&self, cache: &Weak<Cache>) -> Option<()> {
        let (index, from) = self.next()?;
        let range = self.ranges.get(index)?;
        let kept = cache.upgrade()?;
        let missing = kept.first_missing(&(from..range.bytes.end));
        // What was kept before may have made room for others.
        let missing = missing.or_else(|| kept.first_missing(&(range.bytes.start..from)));
        drop(kept);
        match missing {
            Some(at) => self.wait_for(index, at.max(range.bytes.start), cache),
            None => self.check(index, range, cache),
        }
    }

    /// Waits for a range that is queued; returns its number, and the byte from which to look at it.
    fn next(&self) -> Option<(usize, u64)> {
        let mut state = self.state.lock();
        loop {
            if state.is_closed {
                return None;
            }
            match state.queue.pop_front() {
                Some(index) => {
                    if let Some(Progress::Queued(from)) = state.progress.get(index) {
                        return Some((index, *from));
                    }
                }
                None => self.wakeup.wait(&mut state),
            }
        }
    }

    /// Notes that byte `at` of range `index` is not kept, unless it is by now.
    fn wait_for(&self, index: usize, at: u64, cache: &Weak<Cache>) -> Option<()> {
        let cache = cache.upgrade()?;
        let mut state = self.state.lock();
        state.set(index, Progress::From(at));
        // It may have been stored while the range was queued, which nobody notes.
        if cache.first_missing(&(at..at + 1)).is_none() {
            state.enqueue(index, at);
        }
        Some(())
    }

    /// Compares `range`, number `index`, all of which was kept a moment ago.
    fn check(&self, index: usize, range: &SummedRange, cache: &Weak<Cache>) -> Option<()> {
        self.state.lock().set(index, Progress::Checking);
        let mut hasher = Sha256::new();
        let mut piece = vec![0; PIECE];
        let mut at = range.bytes.start;
        while at < range.bytes.end {
            let left = usize::try_from(range.bytes.end - at).unwrap_or(usize::MAX);
            let buf = piece.get_mut(..left.min(PIECE))?;
            let got = cache.upgrade()?.read_uncounted(buf, at, Wait::Yes).unwrap_or(0);
            if got == 0 {
                return self.wait_for(index, at, cache);
            }
            hasher.update(buf.get(..got)?);
            at += got as u64;
            if self.state.lock().is_closed {
                return None;
            }
        }
        if <[u8; 32]>::from(hasher.finalize()) != range.sum {
            // The next mount fetches it anew.
            cache.upgrade()?.forget(&range.bytes);
            self.latch(&range.bytes);
            return None;
        }
        let mut state = self.state.lock();
        match state.progress.get(index) {
            Some(Progress::Again) => state.enqueue(index, range.bytes.start),
            _ => state.set(index, Progress::Verified),
        }
        Some(())
    }
}

impl State {
    fn set(&mut self, index: usize, progress: Progress) {
        let Some(found) = self.progress.get_mut(index) else { return };
        self.verified -= usize::from(*found == Progress::Verified);
        self.verified += usize::from(progress == Progress::Verified);
        *found = progress;
    }

    fn enqueue(&mut self, index: usize, from: u64) {
        self.set(index, Progress::Queued(from));
        self.queue.push_back(index);
    }
}

/// Whether `inner` is inside `outer`.
fn is_inside(inner: &Range<u64>, outer: &Range<u64>) -> bool {
    outer.start <= inner.start && inner.end <= outer.end
}
