//! The requests of one image: sent again until they are answered, and never more of them than the server
//! takes.
//!
//! ```text
//!   read ──▶ a slot ──▶ Exchange::ask ──▶ the bytes, to the receiver
//!     ▲                   │    │
//!     │                   │    └─ late, and somebody waits for it: asked once more beside it, and
//!     │                   │       the first answer counts
//!     └── a pause ────────┘ it failed: what came is kept, and the rest is asked for
//! ```
//!
//! A task waits for nothing but its request, so that many of them take no threads.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, Semaphore, SemaphorePermit, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout_at};

use super::answer::Version;
use super::error::HttpError;
use super::exchange::Exchange;
use super::late::Latency;
use super::retry::{pause, random};
use crate::host::os_error;

/// A failure that lasts this long is told in the log.
const TOLD_AFTER: Duration = Duration::from_secs(1);
/// Answers after which a server that was busy gets one more request at a time.
const RECOVERY: u32 = 32;

/// What the requests share.
pub(super) struct Requests {
    exchange: Exchange,
    version: Version,
    io_timeout: Duration,
    /// How long the server may be silent within a request.
    silence: Duration,
    connections: u32,
    /// Requests that may be sent now. Fewer while the server is busy, by `withheld`.
    slots: Semaphore,
    withheld: AtomicU32,
    answers: AtomicU32,
    /// The errno with which all requests end, once there is one.
    end: watch::Sender<Option<i32>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    outage: Option<Outage>,
    /// Until when a busy server wants no requests.
    busy_until: Option<Instant>,
    latency: Latency,
    /// What is told when somebody waits for the request that begins there.
    waited_for: HashMap<u64, Arc<Notify>>,
}

/// The time since the last answer.
struct Outage {
    since: Instant,
    why: String,
    is_told: bool,
}

/// The bytes that one try brought, and why there are not more.
type Tried = (Vec<u8>, Result<(), HttpError>);

impl Requests {
    /// Prepares requests for `version` of an image, at most `connections` at a time.
    pub(super) fn new(
        exchange: Exchange,
        version: Version,
        io_timeout: Duration,
        connections: u32,
    ) -> Self {
        let connections = connections.max(1);
        Self {
            exchange,
            version,
            io_timeout,
            silence: io_timeout / 2,
            connections,
            slots: Semaphore::new(usize::try_from(connections).unwrap_or(1)),
            withheld: AtomicU32::new(0),
            answers: AtomicU32::new(0),
            end: watch::Sender::new(None),
            state: Mutex::default(),
        }
    }

    /// Returns the version that is asked for.
    pub(super) fn version(&self) -> &Version {
        &self.version
    }

    /// Returns the most requests at a time.
    pub(super) fn connections(&self) -> u32 {
        self.connections
    }

    /// Returns for how long no request was answered, and why.
    pub(super) fn outage(&self) -> Option<(Duration, String)> {
        let state = self.state.lock();
        state.outage.as_ref().map(|outage| (outage.since.elapsed(), outage.why.clone()))
    }

    /// Ends all requests, now and from now on, with `errno`. Returns whether nothing had ended them.
    pub(super) fn end(&self, errno: i32) -> bool {
        self.end.send_if_modified(|end| {
            let is_first = end.is_none();
            end.get_or_insert(errno);
            is_first
        })
    }

    /// Notes a request for what begins at `start`, which [`hurry`](Self::hurry) may tell of.
    pub(super) fn note(&self, start: u64) -> Arc<Notify> {
        let waited_for = Arc::<Notify>::default();
        self.state.lock().waited_for.insert(start, Arc::clone(&waited_for));
        waited_for
    }

    /// Notes that somebody waits for the request for what begins at `start`.
    pub(super) fn hurry(&self, start: u64) {
        if let Some(waited_for) = self.state.lock().waited_for.get(&start) {
            waited_for.notify_one();
        }
    }

    /// Reads `range`, until it is there, its time is over, or all ends.
    pub(super) async fn read(
        &self,
        range: Range<u64>,
        waited_for: Arc<Notify>,
    ) -> io::Result<Vec<u8>> {
        let mut end = self.end.subscribe();
        let deadline = Instant::now() + self.io_timeout;
        let result = tokio::select! {
            biased;
            ended = end.wait_for(Option::is_some) => match ended {
                Ok(errno) => Err(errno.unwrap_or(libc::ECANCELED)),
                Err(_) => Err(libc::ECANCELED),
            },
            read = timeout_at(deadline, self.read_until_there(&range, &waited_for, deadline)) => {
                read.unwrap_or(Err(libc::ETIMEDOUT))
            }
        };
        let mut state = self.state.lock();
        if state.waited_for.get(&range.start).is_some_and(|it| Arc::ptr_eq(it, &waited_for)) {
            state.waited_for.remove(&range.start);
        }
        result.map_err(os_error)
    }

    /// Reads `range`, however often that fails.
    ///
    /// # Errors
    /// `ESTALE` when the image is another one.
    async fn read_until_there(
        &self,
        range: &Range<u64>,
        waited_for: &Notify,
        deadline: Instant,
    ) -> Result<Vec<u8>, i32> {
        let mut bytes = Vec::new();
        let mut failures = 0;
        loop {
            let rest = range.start + bytes.len() as u64..range.end;
            let (more, tried) = self.try_read(&rest, waited_for).await;
            // A connection that brings something each time, however little, is no failing server.
            if !more.is_empty() {
                failures = 0;
            }
            match bytes.is_empty() {
                true => bytes = more,
                false => bytes.extend(more),
            }
            let error = match tried {
                Ok(()) => {
                    self.note_answer();
                    return Ok(bytes);
                }
                Err(HttpError::Changed(why)) => {
                    self.latch(&why);
                    return Err(libc::ESTALE);
                }
                Err(error) => error,
            };
            self.note_failure(&error);
            failures += 1;
            // A kept connection may have been closed as we sent: not a fault of the server's.
            let is_first = failures == 1 && error.is_lost();
            if !is_first {
                // However long the pauses are by now, there is a last try shortly before the end.
                let left = deadline.saturating_duration_since(Instant::now());
                sleep(pause(failures, random(), None).min(left / 2)).await;
            }
        }
    }

    /// Asks for `range`, and once more beside that when it is late and somebody waits for it.
    async fn try_read(&self, range: &Range<u64>, waited_for: &Notify) -> Tried {
        let Ok(slot) = self.slots.acquire().await else {
            return (Vec::new(), Err(HttpError::Broken("it was closed".to_owned())));
        };
        loop {
            let busy_until = self.state.lock().busy_until;
            match busy_until.filter(|until| Instant::now() < *until) {
                Some(until) => sleep_until(until).await,
                None => break,
            }
        }
        let first = self.try_once(range, slot);
        tokio::pin!(first);
        let second_slot = tokio::select! {
            tried = &mut first => return tried,
            slot = self.repeat_when_late(waited_for) => slot,
        };
        let second = self.try_once(range, second_slot);
        tokio::pin!(second);
        let (one, other) = tokio::select! {
            tried = &mut first => match tried.1 {
                Ok(()) => return tried,
                Err(_) => (tried, second.await),
            },
            tried = &mut second => match tried.1 {
                Ok(()) => return tried,
                Err(_) => (tried, first.await),
            },
        };
        let is_changed = matches!(one.1, Err(HttpError::Changed(_)));
        // Of two that failed the one counts that brought more.
        let is_other = other.1.is_ok() || other.0.len() >= one.0.len();
        if is_other && !is_changed { other } else { one }
    }

    /// Returns once a request that began now is late, somebody waits for it, and it may be sent twice.
    async fn repeat_when_late(&self, waited_for: &Notify) -> SemaphorePermit<'_> {
        let begun = Instant::now();
        waited_for.notified().await;
        // Known again by the next try.
        waited_for.notify_one();
        let late_after = self.state.lock().latency.late_after();
        let Some(late_after) = late_after else { return pending().await };
        sleep_until(begun + late_after).await;
        match self.slots.try_acquire() {
            Ok(slot) if self.state.lock().latency.take_repeat() => slot,
            _ => pending().await,
        }
    }

    /// Asks for `range` once, which takes `slot` until it ends.
    async fn try_once(&self, range: &Range<u64>, slot: SemaphorePermit<'_>) -> Tried {
        let begun = Instant::now();
        let mut bytes = Vec::new();
        let tried = match self.exchange.ask(range, Some(&self.version)).await {
            Ok(part) => part.read(&mut bytes, self.silence).await,
            Err(error) => Err(error),
        };
        if tried.is_ok() {
            self.state.lock().latency.note(begun.elapsed());
        }
        drop(slot);
        (bytes, tried)
    }

    fn note_answer(&self) {
        let answers = self.answers.fetch_add(1, Ordering::Relaxed);
        let is_due = answers % RECOVERY == RECOVERY - 1;
        let less = |withheld: u32| withheld.checked_sub(1);
        if is_due && self.withheld.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        {
            self.slots.add_permits(1);
        }
        let outage = self.state.lock().outage.take();
        if let Some(outage) = outage.filter(|outage| outage.is_told) {
            let (home, lasted) = (self.exchange.home(), outage.since.elapsed());
            log::warn!("{home}: it answers again, after {lasted:.1?}");
        }
    }

    fn note_failure(&self, error: &HttpError) {
        let home = self.exchange.home();
        log::debug!("{home}: {error}");
        let mut state = self.state.lock();
        let now = Instant::now();
        let why = error.to_string();
        let new = || Outage { since: now, why: String::new(), is_told: false };
        let outage = state.outage.get_or_insert_with(new);
        outage.why.clone_from(&why);
        let is_due = !outage.is_told && now - outage.since >= TOLD_AFTER;
        outage.is_told |= is_due;
        if let Some(asked) = error.busy() {
            self.withhold_slot();
            let until = now.checked_add(asked.unwrap_or_default().min(self.io_timeout));
            state.busy_until = state.busy_until.max(until);
        }
        drop(state);
        if is_due {
            log::warn!("{home}: {why}; asking on");
        }
    }

    /// Sends one request less at a time, and always one.
    fn withhold_slot(&self) {
        if self.withheld.load(Ordering::Relaxed) + 1 < self.connections {
            let withheld = u32::try_from(self.slots.forget_permits(1)).unwrap_or(0);
            self.withheld.fetch_add(withheld, Ordering::Relaxed);
        }
    }

    /// Ends all requests: the image is another one.
    fn latch(&self, why: &str) {
        if self.end(libc::ESTALE) {
            let home = self.exchange.home();
            log::error!("{home}: the image is another one by now: {why}");
        }
    }
}
