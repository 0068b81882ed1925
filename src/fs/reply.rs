//! Deferred replies, sent by a thread of the disk's pool, with an optional deadline; short reads of what a
//! server has are answered by the thread that receives it.
//!
//! A client that waits for a reply cannot be killed, so every wait has an end: a request whose base
//! does not answer before the deadline is answered `EIO`. The thread that still waits for the base
//! then finds its reply already sent.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::Mutex;

use crate::arrival::Arrival;
use crate::disk::Disk;
use crate::host::os_error;
use crate::layer::Wait;
use crate::pool::{self, Cancellable};

/// Whether work was given up because it would have had to wait.
pub(super) fn would_block<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

/// A reply that can carry an error.
pub(super) trait ErrorReply: Send + 'static {
    /// Replies with an errno.
    fn reply_errno(self, errno: Errno);

    /// Replies with an error of the host. `EINTR` and `EAGAIN` of this daemon's own system calls
    /// become `EIO`: a client could only retry for ever.
    fn reply_error(self, error: io::Error)
    where
        Self: Sized,
    {
        self.reply_errno(match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Errno::EIO,
            _ => error.into(),
        });
    }
}

macro_rules! impl_error_reply {
    ($($reply:ident)*) => {
        $(impl ErrorReply for fuser::$reply {
            fn reply_errno(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
impl_error_reply!(ReplyAttr ReplyCreate ReplyData ReplyEmpty ReplyEntry ReplyLseek ReplyOpen ReplyStatfs);
impl_error_reply!(ReplyDirectory ReplyWrite);

/// The thread that repeats work once the bytes have arrived that it lacked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RepeatOn {
    /// The thread that has brought them, once; a pool saves nothing where the work is short. It must not
    /// wait for the kernel, which may wait for what that thread brings next.
    Arrival,
    /// A thread of the disk's pool.
    Pool,
}

/// Whether a wait is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deadline {
    /// The wait ends with `EIO` after the mount's I/O timeout.
    IoTimeout,
    /// The wait is unbounded: a sync of much data is no failure.
    Unlimited,
}

/// One of a disk's thread pools.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PoolKind {
    /// For waits for the host.
    Work,
    /// For syncs, which wait for the device. Many syncs at once take no threads from reads.
    Sync,
    /// For invalidations of the kernel's cache. These may wait for a write of the kernel's own, and
    /// so for a worker or for [`PoolKind::Work`], which never waits for this pool.
    Invalidate,
    /// For descriptions of the disk, read through its map.
    Map,
}

/// The requests with a deadline, oldest first.
pub(crate) struct Deadlines {
    io_timeout: Duration,
    pending: Mutex<VecDeque<TimedReply>>,
}

struct TimedReply {
    until: Instant,
    reply: Arc<dyn PendingReply>,
    disk: Arc<Disk>,
}

/// A reply that may be pending.
trait PendingReply: Send + Sync {
    /// Whether the reply was sent.
    fn is_replied(&self) -> bool;

    /// Answers `EIO`, unless the reply was sent or a change is under way.
    fn expire(&self) -> Expiry;
}

/// The outcome of an expired deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expiry {
    /// The reply was sent in time.
    Replied,
    /// The reply is `EIO`.
    TimedOut,
    /// The change is under way and cannot be refused: the request ends when the host has finished
    /// it.
    Held,
}

/// A reply, until it is sent.
struct ReplySlot<R> {
    reply: Mutex<Option<R>>,
    /// A change is under way that cannot be cancelled. Written under the lock of `reply`.
    held: AtomicBool,
}

impl<R: ErrorReply> PendingReply for ReplySlot<R> {
    fn is_replied(&self) -> bool {
        self.reply.lock().is_none()
    }

    fn expire(&self) -> Expiry {
        let mut reply = self.reply.lock();
        if reply.is_some() && self.held.load(Ordering::Relaxed) {
            return Expiry::Held;
        }
        match reply.take() {
            Some(reply) => {
                reply.reply_errno(Errno::EIO);
                Expiry::TimedOut
            }
            None => Expiry::Replied,
        }
    }
}

/// The request behind a slot, as the work sees it.
struct SlotRequest<R>(Arc<ReplySlot<R>>);

impl<R> Cancellable for SlotRequest<R> {
    fn is_cancelled(&self) -> bool {
        self.0.reply.lock().is_none()
    }

    fn hold(&self) -> bool {
        let reply = self.0.reply.lock();
        self.0.held.store(true, Ordering::Relaxed);
        reply.is_some()
    }

    fn release(&self) {
        let _reply = self.0.reply.lock();
        self.0.held.store(false, Ordering::Relaxed);
    }
}

impl Deadlines {
    /// Creates the deadlines; each request is answered after `io_timeout` at the latest.
    #[must_use]
    pub(crate) fn new(io_timeout: Duration) -> Self {
        Self { io_timeout, pending: Mutex::default() }
    }

    /// Answers overdue requests and forgets answered ones. Called every second.
    pub(crate) fn expire(&self) {
        let now = Instant::now();
        let mut due = Vec::new();
        {
            let mut pending = self.pending.lock();
            pending.retain(|request| !request.reply.is_replied());
            while pending.front().is_some_and(|first| first.until <= now) {
                due.extend(pending.pop_front());
            }
        }
        for mut request in due {
            // A long operation of this daemon may hold the disk, which is not the base's fault.
            let is_ours = request.disk.deadlines_suspended();
            match if is_ours { Expiry::Held } else { request.reply.expire() } {
                Expiry::Replied => {}
                Expiry::Held => {
                    request.until = now + self.io_timeout;
                    self.pending.lock().push_back(request);
                }
                Expiry::TimedOut => {
                    log::error!(
                        "{}: no answer for {:?}: EIO",
                        request.disk.source,
                        self.io_timeout
                    );
                }
            }
        }
    }

    /// Runs `work` in a pool of `disk` and passes its result to `send` for the reply.
    pub(super) fn defer<R: ErrorReply, T>(
        &self,
        disk: &Arc<Disk>,
        pool: PoolKind,
        deadline: Deadline,
        reply: R,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let slot = self.slot_for(disk, deadline, reply);
        let pool = match pool {
            PoolKind::Work => &disk.pools.io,
            PoolKind::Invalidate => &disk.pools.notify,
            PoolKind::Sync => &disk.pools.sync,
            PoolKind::Map => &disk.pools.map,
        };
        pool.run(Box::new(move || {
            if let Some(result) = slot.run(work) {
                slot.finish(result, send);
            }
        }));
    }

    /// Repeats `work`, which has just answered `EAGAIN` on this thread: when the bytes that it needs
    /// have arrived, if they are on their way, and else at once in the disk's pool, where it may
    /// wait. The result goes to `send` for the reply.
    pub(super) fn repeat<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        reply: R,
        repeat_on: RepeatOn,
        work: impl Fn(Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let arrival = Arrival::take_expected();
        let slot = self.slot_for(disk, Deadline::IoTimeout, reply);
        Repetition { slot, disk: Arc::clone(disk), work, send }.after(arrival, repeat_on);
    }

    /// Returns the slot of a reply, which has its deadline from now on.
    fn slot_for<R: ErrorReply>(
        &self,
        disk: &Arc<Disk>,
        deadline: Deadline,
        reply: R,
    ) -> Arc<ReplySlot<R>> {
        let slot = Arc::new(ReplySlot { reply: Mutex::new(Some(reply)), held: false.into() });
        if deadline == Deadline::IoTimeout {
            let until = Instant::now() + self.io_timeout;
            let (reply, disk) = (Arc::clone(&slot) as Arc<dyn PendingReply>, Arc::clone(disk));
            self.pending.lock().push_back(TimedReply { until, reply, disk });
        }
        slot
    }
}

impl<R: ErrorReply> ReplySlot<R> {
    /// Runs `work` on behalf of the request; `None` when the deadline has passed, and nothing was
    /// done.
    fn run<T>(self: &Arc<Self>, work: impl FnOnce() -> io::Result<T>) -> Option<io::Result<T>> {
        if self.is_replied() {
            return None;
        }
        Some(pool::run_cancellable(SlotRequest(Arc::clone(self)), work))
    }

    /// Sends the reply, unless the deadline has passed.
    fn finish<T>(&self, result: io::Result<T>, send: impl FnOnce(R, T)) {
        let Some(reply) = self.reply.lock().take() else {
            return;
        };
        match result {
            Ok(value) => send(reply, value),
            Err(error) => reply.reply_error(error),
        }
    }
}

/// A request whose work is repeated until it needs nothing any more that has yet to arrive.
struct Repetition<R: ErrorReply, W, S> {
    slot: Arc<ReplySlot<R>>,
    disk: Arc<Disk>,
    work: W,
    send: S,
}

impl<R, T, W, S> Repetition<R, W, S>
where
    R: ErrorReply,
    T: 'static,
    W: Fn(Wait) -> io::Result<T> + Send + 'static,
    S: FnOnce(R, T) + Send + 'static,
{
    /// Goes on once the bytes are there for which `arrival` stands, in the disk's pool unless `repeat_on`
    /// says otherwise.
    fn after(self, arrival: Option<Arrival>, repeat_on: RepeatOn) {
        let pool = Arc::clone(&self.disk.pools.io);
        match arrival {
            None => pool.run(Box::new(move || self.attempt(Wait::Yes))),
            Some(arrival) => arrival.then(Box::new(move |outcome| match (outcome, repeat_on) {
                (Ok(()), RepeatOn::Arrival) => self.attempt_at_arrival(),
                (Ok(()), RepeatOn::Pool) => pool.run(Box::new(move || self.attempt(Wait::No))),
                (Err(errno), _) => self.slot.finish(Err(os_error(errno)), self.send),
            })),
        }
    }

    fn attempt(self, wait: Wait) {
        match self.run(wait) {
            Ok(()) => {}
            Err((this, None)) if wait == Wait::No => this.attempt(Wait::Yes),
            Err((this, arrival)) => this.after(arrival, RepeatOn::Pool),
        }
    }

    fn attempt_at_arrival(self) {
        if let Err((this, arrival)) = self.run(Wait::No) {
            this.after(arrival, RepeatOn::Pool);
        }
    }

    /// Does the work and replies. Returns it with what it waits for when it would have had to wait.
    fn run(self, wait: Wait) -> Result<(), (Self, Option<Arrival>)> {
        Arrival::forget_expected();
        let Some(result) = self.slot.run(|| (self.work)(wait)) else { return Ok(()) };
        if would_block(&result) {
            return Err((self, Arrival::take_expected()));
        }
        self.slot.finish(result, self.send);
        Ok(())
    }
}
