//! Threads in reserve, for pools that cannot start any: one thread that exists from the start of the
//! mount and serves all pools of a kind.
//!
//! The caller of [`Pool::run`] does not do the work itself: it is a worker of the FUSE session, or
//! the thread that keeps the deadlines. If each of those waited for a host, or for the kernel to
//! write back a page, nobody would be left to answer the kernel.
//!
//! A job that waits for the work of other pools needs a reserve that does not serve those pools.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::{Attended, Pool};

/// Pause between two attempts to start a thread for a pool that still has some.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// For pools whose jobs wait for the host only.
pub(crate) static HOST_WAITS: Reserve = Reserve::new();
/// For pools whose jobs wait for the kernel, and so for jobs of [`HOST_WAITS`].
pub(crate) static KERNEL_WAITS: Reserve = Reserve::new();
/// For requests to the control files, which wait for all others.
pub(crate) static REQUESTS: Reserve = Reserve::new();

/// Number of threads that [`start`] starts.
pub(crate) const THREADS: usize = 3;

/// Starts the threads in reserve of this process.
///
/// # Errors
/// The host's errno.
pub(crate) fn start() -> io::Result<()> {
    let all: [&'static Reserve; THREADS] = [&HOST_WAITS, &KERNEL_WAITS, &REQUESTS];
    all.into_iter().try_for_each(Reserve::start)
}

/// A thread that works for pools which cannot start one.
pub struct Reserve {
    starved: Mutex<VecDeque<Arc<Pool>>>,
    pool_added: Condvar,
    is_started: AtomicBool,
}

impl Reserve {
    /// Creates a reserve without its thread.
    pub(super) const fn new() -> Self {
        Self {
            starved: Mutex::new(VecDeque::new()),
            pool_added: Condvar::new(),
            is_started: AtomicBool::new(false),
        }
    }

    /// Starts the thread, unless it runs already.
    pub(super) fn start(&'static self) -> io::Result<()> {
        if self.is_started.load(Ordering::SeqCst) {
            return Ok(());
        }
        let thread = thread::Builder::new().name("cowslip-reserve".to_owned());
        thread.spawn(|| self.serve())?;
        self.is_started.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Attends to `pool` until its queue is empty or it has threads for it. In a process without a
    /// reserve the caller does so.
    pub(super) fn take_over(&self, pool: &Arc<Pool>) {
        if self.is_started.load(Ordering::SeqCst) {
            self.starved.lock().push_back(Arc::clone(pool));
            self.pool_added.notify_one();
            return;
        }
        loop {
            match pool.attend() {
                Attended::Done => return,
                Attended::Worked => {}
                Attended::Starved => thread::sleep(RETRY_INTERVAL),
            }
        }
    }

    fn serve(&self) {
        let mut starved = self.starved.lock();
        loop {
            let Some(pool) = starved.pop_front() else {
                self.pool_added.wait(&mut starved);
                continue;
            };
            drop(starved);
            let attended = pool.attend();
            if attended == Attended::Starved {
                thread::sleep(RETRY_INTERVAL);
            }
            starved = self.starved.lock();
            if attended != Attended::Done {
                // Each pool in turn.
                starved.push_back(pool);
            }
        }
    }
}
