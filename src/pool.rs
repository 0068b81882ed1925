//! A few threads for what must not hold a FUSE worker: reads from a slow base, syncs, waiting for
//! a lock.
//!
//! Every disk has its own pool, so a base that hangs holds threads of its disk and nobody else's.
//! Threads are made when there is work and leave when there is none.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use crate::host::os_error;

/// Enough to keep a device busy and to let syncs and reads pass each other.
const MAX_THREADS: usize = 8;
/// How long a thread without work stays.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

thread_local! {
    /// The request that this thread works on.
    static CURRENT_REQUEST: RefCell<Option<Rc<dyn Cancellable>>> = const { RefCell::new(None) };
}

/// A request that may be answered before the work on it has ended.
pub trait Cancellable {
    /// Whether it was: nobody waits for the work any more.
    fn is_cancelled(&self) -> bool;

    /// From now on it is not given up; `false` when it was already.
    fn hold(&self) -> bool;

    /// It may be given up again.
    fn release(&self);
}

/// Runs `run_worker`, in which [`check_cancelled`] fails once `request` is given up.
pub fn run_cancellable<T>(request: impl Cancellable + 'static, work: impl FnOnce() -> T) -> T {
    CURRENT_REQUEST.set(Some(Rc::new(request)));
    let result = work();
    CURRENT_REQUEST.set(None);
    result
}

/// Called after a wait and before a change: a request that was answered `EIO` because it waited
/// too long must change nothing any more, for a later one may have been acknowledged.
///
/// # Errors
/// `EIO` when nobody waits for this thread's request.
pub fn check_cancelled() -> io::Result<()> {
    let given_up =
        CURRENT_REQUEST.with_borrow(|request| request.as_ref().is_some_and(|r| r.is_cancelled()));
    if given_up { Err(os_error(libc::EIO)) } else { Ok(()) }
}

/// As [`check_cancelled`], before a change that may take long itself and cannot be called back: until
/// the answer is dropped, by this thread, the request is not given up.
///
/// # Errors
/// As [`check_cancelled`].
pub fn hold_reply() -> io::Result<ReplyHold> {
    let request = CURRENT_REQUEST.with_borrow(Clone::clone);
    match &request {
        Some(held) if !held.hold() => Err(os_error(libc::EIO)),
        _ => Ok(ReplyHold(request)),
    }
}

/// A change under way, on behalf of a request that waits for its end.
#[must_use]
pub struct ReplyHold(Option<Rc<dyn Cancellable>>);

impl Drop for ReplyHold {
    fn drop(&mut self) {
        if let Some(request) = &self.0 {
            request.release();
        }
    }
}

/// A piece of work.
pub type Job = Box<dyn FnOnce() + Send>;

/// A bounded set of threads that work off a queue.
pub struct Pool {
    /// So many threads at most.
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
    /// A pool of up to `max_threads` threads; none of them is made before there is work.
    #[must_use]
    pub fn with_threads(most: usize) -> Self {
        let (state, more, less) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self { max_threads: most, state, job_queued: more, thread_ended: less }
    }

    /// Has `job` run by one of the pool's threads, soon.
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

    /// A thread could not be made: when there is none at all, the caller does the work.
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

    /// Lets the threads finish what is queued and leave; returns whether all did within
    /// `patience`. One that hangs in the host's kernel cannot be joined.
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
    fn a_job_that_hangs_does_not_hold_the_next() {
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
    fn more_jobs_than_threads_are_all_done() {
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
