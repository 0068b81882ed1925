//! Thread pools for work that must not hold a FUSE worker: reads from a slow base, syncs, waits for
//! a lock.
//!
//! Every disk has its own pools, so a hanging base holds only threads of its own disk. Threads are
//! started when there is work and end when there is none.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::host::os_error;

/// The most threads of a pool by default: enough to keep a device busy and to let syncs and reads
/// pass each other.
const MAX_THREADS: usize = 8;
/// How long an idle thread stays.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

thread_local! {
    /// The request that this thread works on.
    static CURRENT_REQUEST: RefCell<Option<Rc<dyn Cancellable>>> = const { RefCell::new(None) };
}

/// A request that may be answered before the work on it has ended.
pub trait Cancellable {
    /// Whether the request has been answered, so that nobody waits for the work any more.
    fn is_cancelled(&self) -> bool;

    /// Protects the request from being given up; returns `false` if it was given up already.
    fn hold(&self) -> bool;

    /// Ends the protection by [`hold`](Self::hold).
    fn release(&self);
}

/// Runs `work`, in which [`check_cancelled`] fails once `request` has been given up.
pub fn run_cancellable<T>(request: impl Cancellable + 'static, work: impl FnOnce() -> T) -> T {
    CURRENT_REQUEST.set(Some(Rc::new(request)));
    let result = work();
    CURRENT_REQUEST.set(None);
    result
}

/// Checks, after a wait and before a change, that this thread's request was not given up. A request
/// that was answered `EIO` because it waited too long must change nothing any more, for a later one
/// may have been acknowledged.
///
/// # Errors
/// `EIO` when this thread's request has been given up.
pub fn check_cancelled() -> io::Result<()> {
    let given_up =
        CURRENT_REQUEST.with_borrow(|request| request.as_ref().is_some_and(|r| r.is_cancelled()));
    if given_up { Err(os_error(libc::EIO)) } else { Ok(()) }
}

/// Checks as [`check_cancelled`] does, before a change that may take long and cannot be cancelled:
/// the request is not given up until this thread drops the returned hold.
///
/// # Errors
/// The errors of [`check_cancelled`].
pub fn hold_reply() -> io::Result<ReplyHold> {
    let request = CURRENT_REQUEST.with_borrow(Clone::clone);
    match &request {
        Some(held) if !held.hold() => Err(os_error(libc::EIO)),
        _ => Ok(ReplyHold(request)),
    }
}

/// A change under way for a request, which waits for its end.
#[must_use]
pub struct ReplyHold(Option<Rc<dyn Cancellable>>);

impl Drop for ReplyHold {
    fn drop(&mut self) {
        if let Some(request) = &self.0 {
            request.release();
        }
    }
}

/// A piece of work for a pool.
pub type Job = Box<dyn FnOnce() + Send>;

/// A bounded set of threads that work through a queue.
pub struct Pool {
    /// The most threads.
    max_threads: usize,
    state: Mutex<PoolState>,
    job_queued: Condvar,
    thread_ended: Condvar,
}

#[derive(Default)]
struct PoolState {
    queue: VecDeque<Job>,
    threads: usize,
    idle: usize,
    stopping: bool,
}

impl Default for Pool {
    fn default() -> Self {
        Self::with_threads(MAX_THREADS)
    }
}

impl Pool {
    /// Creates a pool of up to `most` threads; none is started before there is work.
    #[must_use]
    pub fn with_threads(most: usize) -> Self {
        let (state, more, less) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self { max_threads: most, state, job_queued: more, thread_ended: less }
    }

    /// Queues `job` for one of the pool's threads.
    pub fn run(self: &Arc<Self>, job: Job) {
        let mut state = self.state.lock();
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads >= self.max_threads {
            drop(state);
            self.job_queued.notify_one();
            return;
        }
        state.threads += 1;
        drop(state);
        let pool = Arc::clone(self);
        let made =
            thread::Builder::new().name("cowslip-io".to_owned()).spawn(move || pool.run_worker());
        if let Err(error) = made {
            log::error!("no thread for a disk's work: {error}");
            self.handle_spawn_failure();
        }
    }

    /// Handles a thread that could not be started: if the pool has none at all, the caller does the
    /// work.
    fn handle_spawn_failure(self: &Arc<Self>) {
        let job = {
            let mut state = self.state.lock();
            state.threads -= 1;
            if state.threads == 0 { state.queue.pop_front() } else { None }
        };
        if let Some(job) = job {
            job();
        }
    }

    fn run_worker(&self) {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.queue.pop_front() {
                drop(state);
                job();
                state = self.state.lock();
                continue;
            }
            if state.stopping {
                break;
            }
            state.idle += 1;
            let waited = self.job_queued.wait_for(&mut state, IDLE_TIMEOUT);
            state.idle -= 1;
            if waited.timed_out() && state.queue.is_empty() {
                break;
            }
        }
        state.threads -= 1;
        self.thread_ended.notify_all();
    }

    /// Lets the threads finish the queue and end; returns whether all did within `patience`. A
    /// thread that hangs in the host's kernel cannot be joined.
    pub fn stop(&self, patience: Duration) -> bool {
        let mut state = self.state.lock();
        state.stopping = true;
        self.job_queued.notify_all();
        !self
            .thread_ended
            .wait_while_for(&mut state, |state| state.threads > 0, patience)
            .timed_out()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_hanging_job_does_not_hold_up_the_next() {
        let pool = Arc::new(Pool::default());
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        pool.run(Box::new(move || released.recv().unwrap()));
        pool.run(Box::new(move || tell.send(7).unwrap()));
        assert_eq!(told.recv(), Ok(7));
        assert!(!pool.stop(Duration::from_millis(20)));
        release.send(()).unwrap();
        assert!(pool.stop(Duration::from_secs(10)));
    }

    #[test]
    fn a_pool_runs_more_jobs_than_it_has_threads() {
        let pool = Arc::new(Pool::default());
        let (tell, told) = mpsc::channel();
        for number in 0..1000 {
            let tell = tell.clone();
            pool.run(Box::new(move || tell.send(number).unwrap()));
        }
        drop(tell);
        let mut all: Vec<i32> = told.iter().collect();
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
    }
}
