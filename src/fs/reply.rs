//! Replies that are given later, by a thread of the disk's pool, or not later than a bound.
//!
//! A client that waits for a reply cannot be killed, so every wait has an end: a request whose
//! base does not answer within the bound is answered `EIO`, and the thread that is still waiting
//! finds nobody to answer when it comes back.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::Mutex;

use crate::disk::Disk;
use crate::pool::{self, Cancellable};

/// A reply that can refuse.
pub(super) trait ErrorReply: Send + 'static {
    /// Answers with an errno.
    fn reply_errno(self, errno: Errno);

    /// Answers with what the host said. That a call of ours was interrupted, or would have had to
    /// wait, is nothing that a client could make anything of: it would ask again for ever.
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
impl_error_reply!(ReplyWrite);

/// Whether a wait may be as long as it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Deadline {
    /// It ends with `EIO` after the mount's bound.
    IoTimeout,
    /// It takes what it takes: a sync of much data is no failure.
    Unlimited,
}

/// Which of a disk's pools does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PoolKind {
    /// What waits for the host.
    Work,
    /// What waits for the device: many syncs at once leave the reads their threads.
    Sync,
    /// What tells the kernel to drop its cache: it may wait for a write of the kernel's own, and
    /// so for a worker or for [`PoolKind::Work`], which never waits for this one.
    Invalidate,
    /// What describes the disk, for whoever reads its map.
    Map,
}

/// The requests that must be answered by a certain time, oldest first.
pub struct Deadlines {
    io_timeout: Duration,
    pending: Mutex<VecDeque<TimedReply>>,
}

struct TimedReply {
    until: Instant,
    reply: Arc<dyn PendingReply>,
    disk: Arc<Disk>,
}

/// A reply that may not have been given yet.
trait PendingReply: Send + Sync {
    /// Whether it was given.
    fn is_replied(&self) -> bool;

    /// Answers `EIO` if nobody has answered and no change is under way.
    fn expire(&self) -> Expiry;
}

/// What became of a reply whose time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expiry {
    /// It was given in time.
    Replied,
    /// It is `EIO` now.
    TimedOut,
    /// What would be refused is being done: it ends when the host has done it.
    Held,
}

/// A reply until it is given.
struct ReplySlot<R> {
    reply: Mutex<Option<R>>,
    /// A change is under way that cannot be called back. Written under the lock of `reply`.
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
    /// Requests are answered after `io_timeout` at the latest.
    #[must_use]
    pub fn new(bound: Duration) -> Self {
        Self { io_timeout: bound, pending: Mutex::default() }
    }

    /// Answers what has waited too long, and forgets what was answered. Called every second.
    pub fn expire(&self) {
        let now = Instant::now();
        let mut due = Vec::new();
        {
            let mut waiting = self.pending.lock();
            waiting.retain(|waiting| !waiting.reply.is_replied());
            while waiting.front().is_some_and(|first| first.until <= now) {
                due.extend(waiting.pop_front());
            }
        }
        for mut late in due {
            // A long operation of ours may hold the disk: not the base's fault.
            let is_ours = late.disk.in_long_operation.load(Ordering::SeqCst);
            match if is_ours { Expiry::Held } else { late.reply.expire() } {
                Expiry::Replied => {}
                Expiry::Held => {
                    late.until = now + self.io_timeout;
                    self.pending.lock().push_back(late);
                }
                Expiry::TimedOut => {
                    log::error!("{}: no answer for {:?}: EIO", late.disk.source, self.io_timeout);
                }
            }
        }
    }

    /// Has `work` done by the pool of `disk` and `send` its result as the reply.
    pub(super) fn defer<R: ErrorReply, T>(
        &self,
        disk: &Arc<Disk>,
        lane: PoolKind,
        bound: Deadline,
        reply: R,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let slot = Arc::new(ReplySlot { reply: Mutex::new(Some(reply)), held: false.into() });
        if bound == Deadline::IoTimeout {
            let until = Instant::now() + self.io_timeout;
            let (reply, disk) = (Arc::clone(&slot) as Arc<dyn PendingReply>, Arc::clone(disk));
            self.pending.lock().push_back(TimedReply { until, reply, disk });
        }
        let threads = match lane {
            PoolKind::Work => disk.io_pool(),
            PoolKind::Invalidate => disk.notify_pool(),
            PoolKind::Sync => disk.sync_pool(),
            PoolKind::Map => disk.map_pool(),
        };
        threads.run(Box::new(move || {
            if slot.is_replied() {
                return; // It was given up while it stood in the queue: nothing is done.
            }
            let result = pool::run_cancellable(SlotRequest(Arc::clone(&slot)), work);
            let Some(reply) = slot.reply.lock().take() else {
                return;
            };
            match result {
                Ok(value) => send(reply, value),
                Err(error) => reply.reply_error(error),
            }
        }));
    }
}
