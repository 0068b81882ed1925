//! The requests of a client and its connections, under one lock; nothing here waits.
//!
//! ```text
//!   begin ──▶ queue ──▶ sent on a connection ──▶ answered
//!               ▲              │        └──▶ too old: ETIMEDOUT
//!               └── lost ──────┘
//! ```

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::codec::export::Export;
use super::codec::replies::Event;
use super::codec::request::encode;
use super::connection::Connection;
use super::request::{Operation, Outcome, Request};

/// The most bytes of reads and writes on their way to or from the server.
const MAX_BYTES: usize = 64 << 20;

/// The most requests on one connection. Servers work on 16 at a time; more wait there, not here.
const MAX_REQUESTS: usize = 64;

/// What a connection has to do before another one takes part: requests that servers work on at a time,
/// or bytes of reads and writes. Many small requests are sent, and answered, with fewer system calls over
/// one connection; long ones are copied on several CPUs over several.
const FULL_REQUESTS: usize = 16;
const FULL_BYTES: usize = 64 << 10;

/// The fewest requests that a connection has before another one is opened: that takes several round trips.
const BUSY_REQUESTS: usize = 4;

/// A place for a connection.
#[derive(Default)]
pub(super) struct Slot {
    pub(super) connection: Option<Arc<Connection>>,
    /// Requests that were sent and not answered.
    requests: usize,
    /// The bytes of these.
    bytes: usize,
    /// A thread works for this place.
    pub(super) is_taken: bool,
}

impl Slot {
    fn has_enough(&self) -> bool {
        self.requests >= FULL_REQUESTS || self.bytes >= FULL_BYTES
    }
}

/// A time without any connection.
#[derive(Clone, Debug)]
pub(super) struct Outage {
    pub(super) since: Instant,
    pub(super) why: String,
}

/// The changes that need a flush.
#[derive(Debug, Default)]
struct Changes {
    /// Answered so far.
    answered: u64,
    /// Of these, durable by now.
    durable: u64,
    /// The server may have lost answered changes: every later flush fails.
    may_be_lost: bool,
}

/// The state of a client.
pub(super) struct State {
    requests: HashMap<u64, Request>,
    queue: VecDeque<u64>,
    next_cookie: u64,
    bytes: usize,
    pub(super) slots: Vec<Slot>,
    /// No other connection is opened before this time.
    pub(super) open_after: Instant,
    pub(super) outage: Option<Outage>,
    changes: Changes,
    /// Whether changes are durable only after a flush.
    needs_flush: bool,
    /// The thread that watches the time of requests sleeps until there is one.
    pub(super) is_unwatched: bool,
    /// The errno of all requests from now on.
    pub(super) latch: Option<i32>,
}

impl State {
    pub(super) fn new(connections: usize, export: &Export) -> Self {
        Self {
            requests: HashMap::new(),
            queue: VecDeque::new(),
            next_cookie: 0,
            bytes: 0,
            slots: std::iter::repeat_with(Slot::default).take(connections.max(1)).collect(),
            open_after: Instant::now(),
            outage: None,
            changes: Changes::default(),
            needs_flush: export.flags.can_flush(),
            is_unwatched: false,
            latch: None,
        }
    }

    /// Returns the number of changes that were answered.
    pub(super) fn answered_changes(&self) -> u64 {
        self.changes.answered
    }

    /// Begins a request that fails after `timeout`; at once when no request can succeed.
    pub(super) fn begin(&mut self, operation: Operation, timeout: Duration) -> Result<(), Outcome> {
        if let Some(errno) = self.latch {
            return Err(operation.fail(errno));
        }
        if self.changes.may_be_lost && matches!(operation, Operation::Flush { .. }) {
            return Err(operation.fail(libc::EIO));
        }
        let (cookie, deadline) = (self.next_cookie, Instant::now() + timeout);
        self.next_cookie += 1;
        self.requests.insert(cookie, Request { operation, deadline, sent: None });
        self.queue.push_back(cookie);
        Ok(())
    }

    /// Gives queued requests to connections, and returns those that have something to send.
    pub(super) fn dispatch(&mut self, export: &Export) -> Vec<Arc<Connection>> {
        let mut touched: Vec<Arc<Connection>> = Vec::new();
        while let Some(cookie) = self.queue.front().copied() {
            let Some(request) = self.requests.get_mut(&cookie) else {
                self.queue.pop_front();
                continue;
            };
            let weight = request.operation.weight();
            if self.bytes > 0 && self.bytes + weight > MAX_BYTES {
                break;
            }
            let free = self.slots.iter_mut().enumerate().filter_map(|(at, slot)| {
                let connection = slot.connection.clone()?;
                (slot.requests < MAX_REQUESTS).then_some((at, slot, connection))
            });
            // The one that has most to do, but not enough; when all have that, the one that has least.
            let order = |slot: &Slot| match slot.has_enough() {
                true => (true, slot.requests),
                false => (false, FULL_REQUESTS - slot.requests),
            };
            let Some((at, slot, connection)) = free.min_by_key(|(_, slot, _)| order(slot)) else {
                break;
            };
            self.queue.pop_front();
            let (command, range, expected, payload) = request.operation.message();
            let len = range.end - range.start;
            // Ranges are cut to what the headers can say when a request begins.
            let Some(header) = encode(export.headers, command, cookie, range.start, len) else {
                continue;
            };
            request.sent = Some((at, Instant::now()));
            slot.requests += 1;
            slot.bytes += weight;
            self.bytes += weight;
            connection.enqueue(cookie, expected, header, payload);
            if !touched.iter().any(|other| Arc::ptr_eq(other, &connection)) {
                touched.push(connection);
            }
        }
        touched
    }

    fn remove(&mut self, cookie: u64) -> Option<Request> {
        let request = self.requests.remove(&cookie)?;
        self.release(&request);
        Some(request)
    }

    fn release(&mut self, request: &Request) {
        if let Some((at, _)) = request.sent {
            let weight = request.operation.weight();
            self.bytes = self.bytes.saturating_sub(weight);
            if let Some(slot) = self.slots.get_mut(at) {
                slot.requests = slot.requests.saturating_sub(1);
                slot.bytes = slot.bytes.saturating_sub(weight);
            }
        }
    }

    /// Ends the request of `event`; `None` when it goes on, or is over already.
    pub(super) fn answer(&mut self, event: Event) -> Option<Outcome> {
        let mut request = self.remove(event.cookie)?;
        let answer = match event.result {
            Ok(answer) => answer,
            Err(failure) => return Some(request.operation.fail(failure.errno)),
        };
        match &mut request.operation {
            Operation::Flush { covers, .. } => {
                if self.changes.may_be_lost {
                    return Some(request.operation.fail(libc::EIO));
                }
                self.changes.durable = self.changes.durable.max(*covers);
            }
            operation if operation.is_change() && self.needs_flush => self.changes.answered += 1,
            _ => {}
        }
        Some(request.operation.succeed(answer))
    }

    /// Takes the requests of a lost connection back into the queue, before the others and in their
    /// order. Reads keep what has come of them, `partial`, in whole blocks of `block` bytes. Returns those
    /// that cannot be asked again.
    pub(super) fn lose(
        &mut self,
        at: usize,
        partial: Vec<(u64, Vec<u8>)>,
        block: u32,
    ) -> Vec<Outcome> {
        for (cookie, bytes) in partial {
            if let Some(request) = self.requests.get_mut(&cookie) {
                request.operation.keep(bytes, block);
            }
        }
        if let Some(slot) = self.slots.get_mut(at) {
            slot.connection = None;
        }
        if self.changes.answered > self.changes.durable {
            self.changes.may_be_lost = true;
        }
        let sent_here = |request: &Request| request.sent.is_some_and(|(slot, _)| slot == at);
        let requests = self.requests.iter().filter(|(_, request)| sent_here(request));
        let mut lost: Vec<u64> = requests.map(|(cookie, _)| *cookie).collect();
        lost.sort_unstable();
        let mut failed = Vec::new();
        for cookie in lost.into_iter().rev() {
            let Some(mut request) = self.remove(cookie) else { continue };
            if self.changes.may_be_lost && matches!(request.operation, Operation::Flush { .. }) {
                failed.push(request.operation.fail(libc::EIO));
                continue;
            }
            request.sent = None;
            self.requests.insert(cookie, request);
            self.queue.push_front(cookie);
        }
        failed
    }

    /// Returns whether there are requests, whose time is to be watched.
    pub(super) fn has_requests(&self) -> bool {
        !self.requests.is_empty()
    }

    /// Ends the requests whose time is over. Ends connections too: those on which such a change was sent,
    /// which must not be sent, or done, any later; those on which no reply was complete since such a
    /// request was sent, whatever the server has said; those that still receive such a reply, for which
    /// others would have to wait; and those on which it has said nothing for `silence`. The last two
    /// only while nothing but reads is open: a change may take the server long, and with the connection
    /// those would be lost that need a flush.
    pub(super) fn expire(&mut self, now: Instant, silence: Duration) -> Vec<Outcome> {
        let is_over = |request: &Request| request.deadline <= now;
        let over = self.requests.iter().filter(|(_, request)| is_over(request));
        let mut over: Vec<u64> = over.map(|(cookie, _)| *cookie).collect();
        over.sort_unstable();
        let has_changes = self.has_changes();
        let mut outcomes = Vec::new();
        for cookie in over {
            let Some(request) = self.remove(cookie) else { continue };
            if let Some((at, since)) = request.sent {
                let is_change = request.operation.is_change();
                self.end_connection_if(at, |open| {
                    let is_stuck = open.last_reply() <= since || open.is_receiving(cookie);
                    is_change || open.last_heard() <= since || !has_changes && is_stuck
                });
            }
            outcomes.push(request.operation.fail(libc::ETIMEDOUT));
        }
        let has_changes = self.has_changes();
        let sent = self.requests.values().filter_map(|request| request.sent);
        for (at, since) in sent.filter(|_| !has_changes) {
            self.end_connection_if(at, |open| open.last_heard().max(since) + silence <= now);
        }
        outcomes
    }

    /// Whether changes, or a flush of them, are open or may be lost with a connection.
    fn has_changes(&self) -> bool {
        self.changes.answered > self.changes.durable
            || self.requests.values().any(|request| request.operation.changes_or_flushes())
    }

    fn end_connection_if(&self, at: usize, is_over: impl FnOnce(&Connection) -> bool) {
        let connection = self.slots.get(at).and_then(|slot| slot.connection.as_ref());
        if let Some(connection) = connection.filter(|open| is_over(open)) {
            connection.shut_down();
        }
    }

    /// Ends all requests with an errno.
    pub(super) fn fail_all(&mut self, errno: i32) -> Vec<Outcome> {
        self.queue.clear();
        self.bytes = 0;
        for slot in &mut self.slots {
            (slot.requests, slot.bytes) = (0, 0);
        }
        self.requests.drain().map(|(_, request)| request.operation.fail(errno)).collect()
    }

    /// Returns a free place for another connection when those that there are have enough to do.
    pub(super) fn place_for_another(&mut self, now: Instant) -> Option<usize> {
        let open = self.slots.iter().filter(|slot| slot.connection.is_some()).count();
        let taken = self.slots.iter().filter(|slot| slot.is_taken).count();
        // One is opened at a time; during an outage none is.
        let requests = self.requests.len();
        let is_busy = requests > open * FULL_REQUESTS
            || requests >= open * BUSY_REQUESTS && self.bytes > open * FULL_BYTES;
        if open != taken || !is_busy || now < self.open_after {
            return None;
        }
        let (at, slot) = self.slots.iter_mut().enumerate().find(|(_, slot)| !slot.is_taken)?;
        slot.is_taken = true;
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicI32, Ordering};

    use super::*;
    use crate::remote::nbd::codec::Headers;
    use crate::remote::nbd::codec::export::{BlockSizes, ExportFlags};
    use crate::remote::nbd::codec::replies::Answer;
    use crate::remote::nbd::codec::request::Durability;
    use crate::remote::transport::ChangeDone;

    const LONG: Duration = Duration::from_secs(600);

    fn state(flags: u16) -> State {
        let (flags, blocks) = (ExportFlags::new(flags), BlockSizes::default());
        let (headers, allocation, name) = (Headers::Simple, None, None);
        State::new(1, &Export { size: 1 << 40, flags, blocks, headers, allocation, name })
    }

    /// A receiver that leaves the errno, or 0, in `outcome`; it was -1.
    fn leave(outcome: &Arc<AtomicI32>) -> ChangeDone {
        let outcome = Arc::clone(outcome);
        Box::new(move |result| {
            let errno = result.err().and_then(|error| error.raw_os_error()).unwrap_or(0);
            outcome.store(errno, Ordering::SeqCst);
        })
    }

    fn begin(state: &mut State, make: impl FnOnce(ChangeDone) -> Operation) -> Arc<AtomicI32> {
        let outcome = Arc::new(AtomicI32::new(-1));
        if let Err(ended) = state.begin(make(leave(&outcome)), LONG) {
            ended.tell();
        }
        outcome
    }

    fn zero(state: &mut State, len: u64) -> Arc<AtomicI32> {
        let durability = Durability::AtFlush;
        begin(state, |done| Operation::Zero { range: 0..len, punch: true, durability, done })
    }

    fn flush(state: &mut State) -> Arc<AtomicI32> {
        let covers = state.answered_changes();
        begin(state, |done| Operation::Flush { covers, done })
    }

    fn answer(state: &mut State, cookie: u64) {
        if let Some(ended) = state.answer(Event { cookie, result: Ok(Answer::Done) }) {
            ended.tell();
        }
    }

    #[test]
    fn a_flush_covers_only_what_was_answered_when_it_began() {
        let mut state = state(0x45);
        let first = zero(&mut state, 1);
        answer(&mut state, 0);
        let flushed = flush(&mut state);
        let second = zero(&mut state, 1);
        answer(&mut state, 2);
        answer(&mut state, 1);
        assert_eq!([first, second, flushed].map(|it| it.load(Ordering::SeqCst)), [0, 0, 0]);
        state.lose(0, Vec::new(), 1);
        assert_eq!(flush(&mut state).load(Ordering::SeqCst), libc::EIO);
    }

    #[test]
    fn without_a_flush_at_the_server_nothing_waits_for_one() {
        let mut state = state(0x41);
        zero(&mut state, 1);
        answer(&mut state, 0);
        state.lose(0, Vec::new(), 1);
        let flushed = flush(&mut state);
        assert_eq!(flushed.load(Ordering::SeqCst), -1);
        answer(&mut state, 1);
        assert_eq!(flushed.load(Ordering::SeqCst), 0);
    }

    #[test]
    fn answers_after_the_time_is_over_are_dropped() {
        let mut state = state(0x45);
        let late = zero(&mut state, 1);
        let after = Instant::now() + LONG + LONG;
        state.expire(after, LONG).into_iter().for_each(Outcome::tell);
        assert_eq!(late.load(Ordering::SeqCst), libc::ETIMEDOUT);
        assert!(state.answer(Event { cookie: 0, result: Ok(Answer::Done) }).is_none());
        assert!(!state.has_requests());
    }
}
