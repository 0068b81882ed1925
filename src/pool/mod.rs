//! Thread pools for work that must not hold a FUSE worker: reads from a slow base, syncs, waits for
//! a lock.
//!
//! Every disk has its own pools, so a hanging base holds only threads of its own disk. Threads are
//! started when there is work and end when there is none. While no thread can be started, the work
//! of a pool without threads is done by its [`Reserve`].

pub(crate) mod reserve;

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use self::reserve::Reserve;
use crate::host::os_error;

/// The most threads of a pool by default: enough to keep a device busy and to let syncs and reads
/// pass each other.
pub(crate) const MAX_THREADS: usize = 8;
/// How long an idle thread stays.
const IDLE_TIMEOUT: Duration = Duration::from_secs(5);

thread_local! {
    /// The request that this thread works on.
    static CURRENT_REQUEST: RefCell<Option<Rc<dyn Cancellable>>> = const { RefCell::new(None) };
}

/// A request that may be answered before the work on it has ended.
pub(crate) trait Cancellable {
    /// Whether the request has been answered, so that nobody waits for the work any more.
    fn is_cancelled(&self) -> bool;

    /// Protects the request from being given up; returns `false` if it was given up already.
    fn hold(&self) -> bool;

    /// Ends the protection by [`hold`](Self::hold).
    fn release(&self);
}

/// Runs `work`, in which [`check_cancelled`] fails once `request` has been given up.
pub(crate) fn run_cancellable<T>(
    request: impl Cancellable + 'static,
    work: impl FnOnce() -> T,
) -> T {
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
pub(crate) fn check_cancelled() -> io::Result<()> {
    let given_up =
        CURRENT_REQUEST.with_borrow(|request| request.as_ref().is_some_and(|r| r.is_cancelled()));
    if given_up { Err(os_error(libc::EIO)) } else { Ok(()) }
}

/// Checks as [`check_cancelled`] does, before a change that may take long and cannot be cancelled:
/// the request is not given up until this thread drops the returned hold.
///
/// # Errors
/// The errors of [`check_cancelled`].
pub(crate) fn hold_reply() -> io::Result<ReplyHold> {
    let request = CURRENT_REQUEST.with_borrow(Clone::clone);
    match &request {
        Some(held) if !held.hold() => Err(os_error(libc::EIO)),
        _ => Ok(ReplyHold(request)),
    }
}

/// A change under way for a request, which waits for its end.
#[must_use]
pub(crate) struct ReplyHold(Option<Rc<dyn Cancellable>>);

impl Drop for ReplyHold {
    fn drop(&mut self) {
        if let Some(request) = &self.0 {
            request.release();
        }
    }
}

/// A piece of work for a pool.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// Starts a thread that works for a pool.
type StartThread = fn(Arc<Pool>) -> io::Result<()>;

/// A bounded set of threads that work through a queue.
pub struct Pool {
    /// The most threads.
    max_threads: usize,
    start_thread: StartThread,
    reserve: &'static Reserve,
    state: Mutex<PoolState>,
    job_queued: Condvar,
    thread_ended: Condvar,
}

#[derive(Default)]
struct PoolState {
    queue: VecDeque<Job>,
    /// Threads that run or are being started, and the reserve while it does a job of this pool.
    threads: usize,
    idle: usize,
    stopping: bool,
    /// The reserve has this pool in its queue, or is attending to it.
    is_in_reserve: bool,
}

impl Default for Pool {
    fn default() -> Self {
        Self::with_threads(MAX_THREADS)
    }
}

impl Pool {
    /// Creates a pool of up to `most` threads, whose jobs may wait for the host and for nothing of
    /// this process but locks; no thread is started before there is work.
    #[must_use]
    pub fn with_threads(most: usize) -> Self {
        Self::with_reserve(most, &reserve::HOST_WAITS)
    }

    /// Creates a pool of up to `most` threads. `reserve` must serve no pool that this one's jobs
    /// wait for.
    #[must_use]
    pub fn with_reserve(most: usize, reserve: &'static Reserve) -> Self {
        Self::with_start(most, reserve, start_thread)
    }

    fn with_start(most: usize, reserve: &'static Reserve, start_thread: StartThread) -> Self {
        let (state, more, less) = (Mutex::default(), Condvar::new(), Condvar::new());
        Self {
            max_threads: most,
            start_thread,
            reserve,
            state,
            job_queued: more,
            thread_ended: less,
        }
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
        if let Err(error) = (self.start_thread)(Arc::clone(self)) {
            log::error!("no thread for a disk's work: {error}");
            self.handle_spawn_failure();
        }
    }

    /// Handles a thread that could not be started. Others may have counted on it: whatever is
    /// queued goes to the reserve, which leaves it to the pool's own threads if there are any.
    fn handle_spawn_failure(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.threads -= 1;
        self.thread_ended.notify_all();
        if state.queue.is_empty() || std::mem::replace(&mut state.is_in_reserve, true) {
            return;
        }
        drop(state);
        self.reserve.take_over(self);
    }

    /// Attends once to a pool that is in the reserve: starts a thread for its queue or, if that
    /// fails and it has none, does one of its jobs.
    fn attend(self: &Arc<Self>) -> Attended {
        let mut state = self.state.lock();
        if state.queue.is_empty() || state.threads >= self.max_threads {
            state.is_in_reserve = false;
            return Attended::Done;
        }
        state.threads += 1;
        drop(state);
        let started = (self.start_thread)(Arc::clone(self));
        let mut state = self.state.lock();
        if started.is_ok() {
            // The new thread may have left already, but not before the queue was empty.
            state.is_in_reserve = state.threads == 0 && !state.queue.is_empty();
            return if state.is_in_reserve { Attended::Worked } else { Attended::Done };
        }
        // The pool's own threads come first, unless the only one is this one.
        let job = if state.threads == 1 { state.queue.pop_front() } else { None };
        let attended = if job.is_some() { Attended::Worked } else { Attended::Starved };
        if let Some(job) = job {
            drop(state);
            job();
            state = self.state.lock();
        }
        state.threads -= 1;
        self.thread_ended.notify_all();
        attended
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
            .wait_while_for(
                &mut state,
                |state| state.threads > 0 || !state.queue.is_empty(),
                patience,
            )
            .timed_out()
    }
}

/// What the reserve could do for a pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attended {
    /// The pool needs the reserve no more.
    Done,
    /// One job was done; there may be more.
    Worked,
    /// No thread could be started for the queue, which threads of the pool will reach.
    Starved,
}

fn start_thread(pool: Arc<Pool>) -> io::Result<()> {
    let thread = thread::Builder::new().name("cowslip-io".to_owned());
    thread.spawn(move || pool.run_worker()).map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

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

    const PATIENCE: Duration = Duration::from_secs(10);
    const CALLERS: usize = 6;

    fn no_thread(_: Arc<Pool>) -> io::Result<()> {
        Err(os_error(libc::EAGAIN))
    }

    /// Has [`CALLERS`] threads call [`Pool::run`] with `job`, returning as each call returns.
    fn run_from_many(pool: &Arc<Pool>, job: impl Fn() + Copy + Send + 'static) {
        let callers = (0..CALLERS).map(|_| {
            let pool = Arc::clone(pool);
            thread::spawn(move || pool.run(Box::new(job)))
        });
        callers.collect::<Vec<_>>().into_iter().for_each(|caller| caller.join().unwrap());
    }

    #[test]
    fn all_jobs_are_done_if_none_of_the_callers_can_start_a_thread() {
        static RESERVE: Reserve = Reserve::new();
        static DONE: AtomicUsize = AtomicUsize::new(0);
        static FAILING: Barrier = Barrier::new(CALLERS);
        /// Fails once all callers have counted on a thread; the reserve's attempts fail at once.
        fn no_thread_for_any(_: Arc<Pool>) -> io::Result<()> {
            static CALLS: AtomicUsize = AtomicUsize::new(0);
            if CALLS.fetch_add(1, Ordering::SeqCst) < CALLERS {
                FAILING.wait();
            }
            Err(os_error(libc::EAGAIN))
        }
        RESERVE.start().unwrap();
        let pool = Arc::new(Pool::with_start(MAX_THREADS, &RESERVE, no_thread_for_any));
        run_from_many(&pool, || _ = DONE.fetch_add(1, Ordering::SeqCst));
        assert!(pool.stop(PATIENCE));
        assert_eq!(DONE.load(Ordering::SeqCst), CALLERS);
    }

    #[test]
    fn callers_do_all_jobs_if_there_is_no_reserve() {
        static RESERVE: Reserve = Reserve::new();
        static DONE: AtomicUsize = AtomicUsize::new(0);
        let pool = Arc::new(Pool::with_start(1, &RESERVE, no_thread));
        run_from_many(&pool, || _ = DONE.fetch_add(1, Ordering::SeqCst));
        assert!(pool.stop(PATIENCE));
        assert_eq!(DONE.load(Ordering::SeqCst), CALLERS);
    }

    #[test]
    fn caller_does_no_job_itself_and_threads_come_back_while_the_reserve_hangs() {
        static RESERVE: Reserve = Reserve::new();
        static CAN_START: AtomicBool = AtomicBool::new(false);
        fn start_if_possible(pool: Arc<Pool>) -> io::Result<()> {
            if CAN_START.load(Ordering::SeqCst) { start_thread(pool) } else { no_thread(pool) }
        }
        RESERVE.start().unwrap();
        let pool = Arc::new(Pool::with_start(MAX_THREADS, &RESERVE, start_if_possible));
        let (release, released) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let begun = tell.clone();
        pool.run(Box::new(move || {
            begun.send("hangs").unwrap();
            released.recv().unwrap();
        }));
        assert_eq!(told.recv_timeout(PATIENCE), Ok("hangs"));
        CAN_START.store(true, Ordering::SeqCst);
        pool.run(Box::new(move || tell.send("done").unwrap()));
        assert_eq!(told.recv_timeout(PATIENCE), Ok("done"));
        assert!(!pool.stop(Duration::from_millis(20)));
        release.send(()).unwrap();
        assert!(pool.stop(PATIENCE));
    }
}
