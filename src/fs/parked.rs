//! Replies that are given later, by a thread of the disk's pool, or not later than a bound.
//!
//! A client that waits for a reply cannot be killed, so every wait has an end: a request whose
//! base does not answer within the bound is answered `EIO`, and the thread that is still waiting
//! finds nobody to answer when it comes back.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fuser::Errno;
use parking_lot::Mutex;

use crate::disk::Disk;
use crate::pool;

/// A reply that can refuse.
pub(super) trait Refuse: Send + 'static {
    /// Answers with an errno.
    fn refuse(self, errno: Errno);
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
refuse!(ReplyAttr ReplyCreate ReplyData ReplyEmpty ReplyEntry ReplyLseek ReplyStatfs ReplyWrite);

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

    /// Answers `EIO` if nobody has answered; whether it did.
    fn expire(&self) -> bool;
}

impl<R: Refuse> Late for Mutex<Option<R>> {
    fn is_given(&self) -> bool {
        self.lock().is_none()
    }

    fn expire(&self) -> bool {
        let reply = self.lock().take();
        reply.map(|reply| reply.refuse(Errno::EIO)).is_some()
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
            if late.disk.held.load(Ordering::SeqCst) {
                // A long operation of ours holds the disk: not the base's fault.
                late.until = now + self.bound;
                self.waiting.lock().push_back(late);
            } else if late.reply.expire() {
                log::error!("{}: no answer for {:?}: EIO", late.disk.source, self.bound);
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
        let slot = Arc::new(Mutex::new(Some(reply)));
        if bound == Bound::Base {
            let until = Instant::now() + self.bound;
            let (reply, disk) = (Arc::clone(&slot) as Arc<dyn Late>, Arc::clone(disk));
            self.waiting.lock().push_back(Waiting { until, reply, disk });
        }
        let threads = match lane {
            Lane::Work => disk.pool(),
            Lane::Notices => disk.notices(),
            Lane::Sync => disk.syncs(),
        };
        threads.run(Box::new(move || {
            if slot.lock().is_none() {
                return; // It was given up while it stood in the queue: nothing is done.
            }
            let there = Arc::clone(&slot);
            let result = pool::while_wanted(move || there.lock().is_none(), work);
            let Some(reply) = slot.lock().take() else {
                return;
            };
            match result {
                Ok(value) => send(reply, value),
                Err(error) => reply.refuse(error.into()),
            }
        }));
    }
}
