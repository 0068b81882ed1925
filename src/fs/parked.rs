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
use crate::pool::{self, Request};

/// A reply that can refuse.
pub(super) trait Refuse: Send + 'static {
    /// Answers with an errno.
    fn refuse(self, errno: Errno);

    /// Answers with what the host said. That a call of ours was interrupted, or would have had to
    /// wait, is nothing that a client could make anything of: it would ask again for ever.
    fn fail(self, error: io::Error)
    where
        Self: Sized,
    {
        self.refuse(match error.raw_os_error() {
            Some(libc::EINTR | libc::EAGAIN) => Errno::EIO,
            _ => error.into(),
        });
    }
}

macro_rules! refuse {
    ($($reply:ident)*) => {
        $(impl Refuse for fuser::$reply {
            fn refuse(self, errno: Errno) {
                self.error(errno);
            }
        })*
    };
}
refuse!(ReplyAttr ReplyCreate ReplyData ReplyEmpty ReplyEntry ReplyLseek ReplyOpen ReplyStatfs);
refuse!(ReplyWrite);

/// Whether a wait may be as long as it takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bound {
    /// It ends with `EIO` after the mount's bound.
    Base,
    /// It takes what it takes: a sync of much data is no failure.
    Open,
}

/// Which of a disk's pools does it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lane {
    /// What waits for the host.
    Work,
    /// What waits for the device: many syncs at once leave the reads their threads.
    Sync,
    /// What tells the kernel to drop its cache: it may wait for a write of the kernel's own, and
    /// so for a worker or for [`Lane::Work`], which never waits for this one.
    Notices,
    /// What describes the disk, for whoever reads its map.
    Map,
}

/// The requests that must be answered by a certain time, oldest first.
pub struct Deadlines {
    bound: Duration,
    waiting: Mutex<VecDeque<Waiting>>,
}

struct Waiting {
    until: Instant,
    reply: Arc<dyn Late>,
    disk: Arc<Disk>,
}

/// A reply that may not have been given yet.
trait Late: Send + Sync {
    /// Whether it was given.
    fn is_given(&self) -> bool;

    /// Answers `EIO` if nobody has answered and no change is under way.
    fn expire(&self) -> Expired;
}

/// What became of a reply whose time has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expired {
    /// It was given in time.
    Given,
    /// It is `EIO` now.
    Refused,
    /// What would be refused is being done: it ends when the host has done it.
    Held,
}

/// A reply until it is given.
struct Slot<R> {
    reply: Mutex<Option<R>>,
    /// A change is under way that cannot be called back. Written under the lock of `reply`.
    held: AtomicBool,
}

impl<R: Refuse> Late for Slot<R> {
    fn is_given(&self) -> bool {
        self.reply.lock().is_none()
    }

    fn expire(&self) -> Expired {
        let mut reply = self.reply.lock();
        if reply.is_some() && self.held.load(Ordering::Relaxed) {
            return Expired::Held;
        }
        match reply.take() {
            Some(reply) => {
                reply.refuse(Errno::EIO);
                Expired::Refused
            }
            None => Expired::Given,
        }
    }
}

/// The request behind a slot, as the work sees it.
struct Asked<R>(Arc<Slot<R>>);

impl<R> Request for Asked<R> {
    fn is_given_up(&self) -> bool {
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
    /// Requests are answered after `bound` at the latest.
    #[must_use]
    pub fn new(bound: Duration) -> Self {
        Self { bound, waiting: Mutex::default() }
    }

    /// Answers what has waited too long, and forgets what was answered. Called every second.
    pub fn expire(&self) {
        let now = Instant::now();
        let mut due = Vec::new();
        {
            let mut waiting = self.waiting.lock();
            waiting.retain(|waiting| !waiting.reply.is_given());
            while waiting.front().is_some_and(|first| first.until <= now) {
                due.extend(waiting.pop_front());
            }
        }
        for mut late in due {
            // A long operation of ours may hold the disk: not the base's fault.
            let is_ours = late.disk.held.load(Ordering::SeqCst);
            match if is_ours { Expired::Held } else { late.reply.expire() } {
                Expired::Given => {}
                Expired::Held => {
                    late.until = now + self.bound;
                    self.waiting.lock().push_back(late);
                }
                Expired::Refused => {
                    log::error!("{}: no answer for {:?}: EIO", late.disk.source, self.bound);
                }
            }
        }
    }

    /// Has `work` done by the pool of `disk` and `send` its result as the reply.
    pub(super) fn later<R: Refuse, T>(
        &self,
        disk: &Arc<Disk>,
        lane: Lane,
        bound: Bound,
        reply: R,
        work: impl FnOnce() -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let slot = Arc::new(Slot { reply: Mutex::new(Some(reply)), held: false.into() });
        if bound == Bound::Base {
            let until = Instant::now() + self.bound;
            let (reply, disk) = (Arc::clone(&slot) as Arc<dyn Late>, Arc::clone(disk));
            self.waiting.lock().push_back(Waiting { until, reply, disk });
        }
        let threads = match lane {
            Lane::Work => disk.pool(),
            Lane::Notices => disk.notices(),
            Lane::Sync => disk.syncs(),
            Lane::Map => disk.maps(),
        };
        threads.run(Box::new(move || {
            if slot.is_given() {
                return; // It was given up while it stood in the queue: nothing is done.
            }
            let result = pool::while_wanted(Asked(Arc::clone(&slot)), work);
            let Some(reply) = slot.reply.lock().take() else {
                return;
            };
            match result {
                Ok(value) => send(reply, value),
                Err(error) => reply.fail(error),
            }
        }));
    }
}
