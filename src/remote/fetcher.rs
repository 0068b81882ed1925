//! Fetches: each byte is asked for once, however many wait for it, and what somebody waits for goes
//! before what is only expected to be read.
//!
//! ```text
//!   queued   demand ──┐                     at most `max_in_flight` requests, and as many bytes as
//!                     │                     the link answers in a second or two;
//!            ahead  ──┴──▶ in flight ──▶    the last quarter is for demand alone
//!                              │
//!                              ▼ the bytes go to the cache, then everybody who waits is told
//! ```

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::bmap::RangeSums;
use super::cache::{Cache, Urgency};
use super::transport::Transport;
use crate::arrival::Arrival;
use crate::host::os_error;

/// The most bytes of an image that are on their way at a time: at 20 ms enough for 1.6 GB/s.
const MAX_BYTES: u64 = 32 << 20;
/// The bytes that may be on their way at first, and on the slowest link.
const MIN_BYTES: u64 = 2 << 20;
/// A request that is answered within this time leaves room for more on the link.
const QUICK_ANSWER: Duration = Duration::from_secs(1);
/// A request that takes longer than this shows that too much is on its way: far below the shortest
/// I/O timeout in use, since a request that only waits behind others must not fail.
const SLOW_ANSWER: Duration = Duration::from_secs(2);
/// The most bytes of one request: with more, a reader of the first of them would wait for the last.
const MAX_REQUEST: u64 = 1 << 20;
/// The time after which a part of an image that could not be read may be fetched at large again.
const FAILURE_MEMORY: Duration = Duration::from_secs(10);
/// The granularity of that memory in bytes.
const FAILURE_UNIT: u64 = 256 << 10;

/// The fetches of one image.
pub(super) struct Fetcher {
    transport: Arc<dyn Transport>,
    cache: Arc<Cache>,
    /// What the bytes must match.
    sums: Option<Arc<RangeSums>>,
    /// The longest request in bytes.
    max_request: u64,
    state: Mutex<State>,
    this: Weak<Self>,
}

struct State {
    /// What is queued or in flight, by its start: disjoint ranges.
    fetches: BTreeMap<u64, Fetch>,
    /// The starts of queued fetches, oldest first. One that was moved to `demand` stays in `ahead`.
    demand: VecDeque<u64>,
    ahead: VecDeque<u64>,
    /// The starts of requests that were sent ahead, and that somebody waits for now.
    hurried: Vec<u64>,
    /// A thread is handing requests to the transport.
    is_sending: bool,
    requests_in_flight: u32,
    bytes_in_flight: u64,
    /// The most bytes that may be on their way now.
    max_bytes: u64,
    /// Units of which a request failed, and when: there only what is needed is asked for.
    failures: HashMap<u64, Instant>,
    counters: Counters,
}

/// What was asked of the server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counters {
    /// Requests for bytes.
    pub(super) requests: u64,
    /// Bytes that arrived.
    pub(super) bytes: u64,
    /// Requests that failed.
    pub(super) failures: u64,
}

impl Default for State {
    fn default() -> Self {
        Self {
            fetches: BTreeMap::new(),
            demand: VecDeque::new(),
            ahead: VecDeque::new(),
            hurried: Vec::new(),
            is_sending: false,
            requests_in_flight: 0,
            bytes_in_flight: 0,
            max_bytes: MIN_BYTES,
            failures: HashMap::new(),
            counters: Counters::default(),
        }
    }
}

struct Fetch {
    end: u64,
    urgency: Urgency,
    /// The time at which it was sent; `None` while it is queued.
    sent: Option<Instant>,
    /// Since when it is wanted.
    since: Instant,
    arrival: Arrival,
}

impl Fetcher {
    /// Creates the fetcher of the image behind `transport`; what arrives, and matches `sums`, goes to
    /// `cache`.
    pub(super) fn new(
        transport: Arc<dyn Transport>,
        cache: Arc<Cache>,
        sums: Option<Arc<RangeSums>>,
    ) -> Arc<Self> {
        let limits = transport.limits();
        let alignment = u64::from(limits.alignment.max(1));
        let max_len = u64::from(limits.max_len).min(MAX_REQUEST);
        let max_request = (max_len - max_len % alignment).max(alignment);
        Arc::new_cyclic(|this| Self {
            transport,
            cache,
            sums,
            max_request,
            state: Mutex::default(),
            this: this.clone(),
        })
    }

    /// Returns whether a request near `range` failed a short while ago, so that only the bytes that
    /// are needed should be asked for.
    pub(super) fn has_failed(&self, range: &Range<u64>) -> bool {
        let mut state = self.state.lock();
        if state.failures.is_empty() {
            return false;
        }
        state.failures.retain(|_, when| when.elapsed() < FAILURE_MEMORY);
        units(range).any(|unit| state.failures.contains_key(&unit))
    }

    /// Returns what of `range` is neither cached nor on its way.
    pub(super) fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        let state = self.state.lock();
        let mut missing = Vec::new();
        for part in self.cache.missing(range) {
            let mut at = part.start;
            while at < part.end {
                match state.fetch_at(at) {
                    Some((_, end, _)) => at = end,
                    None => {
                        let next = state.fetches.range(at..).next();
                        let end = next.map_or(part.end, |(start, _)| part.end.min(*start));
                        missing.push(at..end);
                        at = end;
                    }
                }
            }
        }
        missing
    }

    /// Begins to fetch what is missing of `range`, unless it is on its way. Returns the arrival of
    /// the first missing byte; `None` when nothing is missing by now, or nothing is read any more.
    pub(super) fn fetch(&self, range: &Range<u64>, urgency: Urgency) -> Option<Arrival> {
        let sums = self.sums.as_deref();
        // Nothing more is read of an image that does not match its bmap.
        if sums.is_some_and(|sums| sums.mismatch().is_some()) {
            return None;
        }
        let alignment = u64::from(self.transport.limits().alignment.max(1));
        let mut first = None;
        let mut state = self.state.lock();
        for missing in self.cache.missing(range) {
            let missing = sums.map_or(missing.clone(), |sums| sums.whole(missing));
            let start = missing.start - missing.start % alignment;
            let end = missing.end.next_multiple_of(alignment).min(self.transport.size());
            let arrival = state.want(start..end, urgency, self.max_request, sums);
            first = first.or(arrival);
        }
        let hurried = std::mem::take(&mut state.hurried);
        drop(state);
        hurried.into_iter().for_each(|start| self.transport.hurry(start));
        self.send_queued();
        first
    }

    /// Sends queued requests, as many as may be in flight.
    fn send_queued(&self) {
        let limit = self.transport.limits().max_in_flight.max(1);
        if std::mem::replace(&mut self.state.lock().is_sending, true) {
            // Who does it already goes on with what was queued meanwhile.
            return;
        }
        loop {
            let (range, urgency) = {
                let mut state = self.state.lock();
                match state.take_next(limit) {
                    Some(next) => next,
                    None => return state.is_sending = false,
                }
            };
            let this = self.this.clone();
            let (start, end) = (range.start, range.end);
            let done = move |result| {
                if let Some(fetcher) = this.upgrade() {
                    fetcher.finish(start..end, result);
                }
            };
            self.transport.read(range, Box::new(done));
            if urgency == Urgency::Demand {
                self.transport.hurry(start);
            }
        }
    }

    /// Stores the bytes of `range`, and tells those who wait for them.
    fn finish(&self, range: Range<u64>, result: io::Result<Vec<u8>>) {
        let len = range.end - range.start;
        let urgency = self.state.lock().urgency_of(range.start);
        let result = result.and_then(|bytes| {
            if bytes.len() as u64 != len {
                return Err(os_error(libc::EIO));
            }
            if let Some(sums) = &self.sums {
                sums.check_arrived(range.start, &bytes)?;
            }
            self.cache.store(range.start, bytes, urgency);
            if let Some(sums) = &self.sums {
                sums.note_stored(&range);
            }
            Ok(())
        });
        let mut state = self.state.lock();
        state.requests_in_flight -= 1;
        state.bytes_in_flight -= len;
        let fetch = state.fetches.remove(&range.start);
        if let Some(sent) = fetch.as_ref().and_then(|fetch| fetch.sent) {
            state.adapt(len, sent.elapsed());
        }
        let outcome = match result {
            Ok(()) => {
                state.counters.bytes += len;
                Ok(())
            }
            Err(error) => {
                state.counters.failures += 1;
                state.failure(&range, &error)
            }
        };
        drop(state);
        self.send_queued();
        if let Some(fetch) = fetch {
            fetch.arrival.complete(outcome);
        }
    }

    /// Returns what was asked of the server so far.
    pub(super) fn counters(&self) -> Counters {
        self.state.lock().counters
    }

    /// Returns for how long the oldest request that somebody waits for has been waiting.
    pub(super) fn waiting_for(&self) -> Option<Duration> {
        let state = self.state.lock();
        let demanded = state.fetches.values().filter(|fetch| fetch.urgency == Urgency::Demand);
        demanded.map(|fetch| fetch.since.elapsed()).max()
    }
}

impl State {
    /// Queues what is not on its way of `range`, in requests of at most `max_request` bytes that cut
    /// none of `sums` that is to be whole; returns the arrival of the first byte.
    fn want(
        &mut self,
        range: Range<u64>,
        urgency: Urgency,
        max_request: u64,
        sums: Option<&RangeSums>,
    ) -> Option<Arrival> {
        let mut first = None;
        let mut at = range.start;
        while at < range.end {
            if let Some((start, end, arrival)) = self.fetch_at(at) {
                if urgency == Urgency::Demand {
                    self.hurry(start);
                }
                first = first.or(Some(arrival));
                at = end;
                continue;
            }
            let next = self.fetches.range(at..).next().map_or(range.end, |(start, _)| *start);
            let end = range.end.min(next).min(at + max_request);
            let end = sums.map_or(end, |sums| sums.end_between(&(at..end)));
            let arrival = Arrival::default();
            let since = Instant::now();
            let fetch = Fetch { end, urgency, sent: None, since, arrival: arrival.clone() };
            self.fetches.insert(at, fetch);
            match urgency {
                Urgency::Demand => self.demand.push_back(at),
                Urgency::Ahead => self.ahead.push_back(at),
            }
            first = first.or(Some(arrival));
            at = end;
        }
        first
    }

    /// Returns start, end and arrival of the fetch that has the byte `at`.
    fn fetch_at(&self, at: u64) -> Option<(u64, u64, Arrival)> {
        let (start, fetch) = self.fetches.range(..=at).next_back()?;
        (fetch.end > at).then(|| (*start, fetch.end, fetch.arrival.clone()))
    }

    /// Adapts the bytes that may be on their way to the time that an answer of `len` bytes took.
    fn adapt(&mut self, len: u64, took: Duration) {
        if took < QUICK_ANSWER {
            self.max_bytes = self.max_bytes.saturating_add(len).min(MAX_BYTES);
        } else if took > SLOW_ANSWER {
            self.max_bytes = (self.max_bytes / 2).max(MIN_BYTES);
        }
    }

    /// Returns why the fetch at `start` is wanted by now.
    fn urgency_of(&self, start: u64) -> Urgency {
        self.fetches.get(&start).map_or(Urgency::Ahead, |fetch| fetch.urgency)
    }

    /// Moves the fetch at `start` to those that somebody waits for.
    fn hurry(&mut self, start: u64) {
        let Some(fetch) = self.fetches.get_mut(&start) else { return };
        if fetch.urgency == Urgency::Ahead {
            fetch.urgency = Urgency::Demand;
            fetch.since = Instant::now();
            match fetch.sent {
                None => self.demand.push_back(start),
                Some(_) => self.hurried.push(start),
            }
        }
    }

    /// Takes the next range to ask for, if one more request may be in flight.
    fn take_next(&mut self, limit: u32) -> Option<(Range<u64>, Urgency)> {
        let has_room = self.bytes_in_flight < self.max_bytes;
        if self.requests_in_flight >= limit || !has_room && self.requests_in_flight > 0 {
            return None;
        }
        let start = match self.demand.pop_front() {
            Some(start) => start,
            None => self.next_ahead(limit)?,
        };
        let fetch = self.fetches.get_mut(&start)?;
        fetch.sent = Some(Instant::now());
        let (range, urgency) = (start..fetch.end, fetch.urgency);
        self.requests_in_flight += 1;
        self.bytes_in_flight += range.end - range.start;
        self.counters.requests += 1;
        Some((range, urgency))
    }

    /// Takes the start of the next range to be read ahead, which leaves room for what somebody may
    /// wait for soon.
    fn next_ahead(&mut self, limit: u32) -> Option<u64> {
        let most = (limit - limit / 4).max(1);
        while self.requests_in_flight < most {
            let start = self.ahead.pop_front()?;
            let is_queued = |fetch: &Fetch| fetch.sent.is_none() && fetch.urgency == Urgency::Ahead;
            if self.fetches.get(&start).is_some_and(is_queued) {
                return Some(start);
            }
        }
        None
    }

    /// Returns what those who wait for `range` are told after `error`: `EIO`, as of any base. Where more
    /// was asked for than anybody needs, they ask again, each for its own bytes.
    fn failure(&mut self, range: &Range<u64>, error: &io::Error) -> Result<(), i32> {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        let is_about_the_bytes = !matches!(errno, libc::ETIMEDOUT | libc::ESTALE);
        let is_new = units(range).any(|unit| !self.failures.contains_key(&unit));
        if !is_about_the_bytes || !is_new {
            return Err(libc::EIO);
        }
        let now = Instant::now();
        self.failures.extend(units(range).map(|unit| (unit, now)));
        Ok(())
    }
}

/// The units that `range` touches.
fn units(range: &Range<u64>) -> impl Iterator<Item = u64> + use<> {
    range.start / FAILURE_UNIT..range.end.div_ceil(FAILURE_UNIT)
}
