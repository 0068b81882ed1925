//! The limit of FUSE workers that may block in the host at once, so that one worker can always
//! answer.
//!
//! A worker that writes into the host's page cache, or makes a few blocks durable, may be held up
//! there by a full cache or a hanging file system. If all workers were held up, no request of any
//! disk would be answered, nor the control files. So the last free worker does no such work; it
//! hands the work to the disk's pool. That costs more than most writes, so the worker first checks
//! briefly whether another one becomes free.
//!
//! A write to a disk with the key `direct` holds no worker at all: it takes as long as the device,
//! so the disk returns `EAGAIN` to a worker, and the pool does the write from the start.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// How long the last free worker waits for another: about as long as handing the work over takes.
const ACQUIRE_WAIT: Duration = Duration::from_micros(30);

/// The limit of workers in work that the host could hold up.
pub(super) struct WorkerLimit {
    taken: AtomicUsize,
    max: usize,
}

impl WorkerLimit {
    /// Creates permits for all of `workers` but one.
    pub(super) fn new(workers: usize) -> Self {
        Self { taken: AtomicUsize::new(0), max: workers.saturating_sub(1) }
    }

    /// Takes a permit; `None` if only one worker is free and remains so for [`ACQUIRE_WAIT`].
    pub(super) fn acquire(&self) -> Option<WorkerPermit<'_>> {
        self.try_acquire().or_else(|| self.acquire_within(ACQUIRE_WAIT))
    }

    fn acquire_within(&self, within: Duration) -> Option<WorkerPermit<'_>> {
        let begin = Instant::now();
        loop {
            // A permit's holder may be waiting for this very CPU.
            thread::yield_now();
            let permit = self.try_acquire();
            if permit.is_some() || begin.elapsed() >= within {
                return permit;
            }
        }
    }

    fn try_acquire(&self) -> Option<WorkerPermit<'_>> {
        let permit = WorkerPermit { limit: self };
        let taken = self.taken.fetch_add(1, Ordering::Relaxed);
        // Dropping the permit takes back the excess count.
        (taken < self.max).then_some(permit)
    }

    /// Takes a permit if no other one is taken.
    pub(super) fn try_acquire_first(&self) -> Option<WorkerPermit<'_>> {
        let permit = self.try_acquire()?;
        (self.taken.load(Ordering::Relaxed) == 1).then_some(permit)
    }
}

/// A permit, returned when dropped.
pub(super) struct WorkerPermit<'a> {
    limit: &'a WorkerLimit,
}

impl Drop for WorkerPermit<'_> {
    fn drop(&mut self) {
        self.limit.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_worker_gets_no_permit_until_another_is_free() {
        let limit = WorkerLimit::new(3);
        let first = limit.acquire();
        let second = limit.acquire();
        assert!(first.is_some() && second.is_some());
        assert!(limit.acquire().is_none());
        assert!(limit.try_acquire_first().is_none());
        drop(first);
        assert!(limit.acquire().is_some());
        let third = limit.acquire();
        assert!(thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.acquire_within(Duration::MAX).is_some());
            drop(third);
            waiting.join().unwrap()
        }));
        drop(second);
        let alone = limit.try_acquire_first();
        assert!(alone.is_some());
        assert!(limit.try_acquire_first().is_none() && limit.acquire().is_some());
    }
}
