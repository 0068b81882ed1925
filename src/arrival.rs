//! Bytes that are on their way from a server.
//!
//! A layer that is asked under [`Wait::No`](crate::layer::Wait::No) for bytes that must be fetched
//! begins to fetch them, leaves the [`Arrival`] here, on the thread, and answers `EAGAIN`. Whoever
//! asked takes it and repeats the request when the bytes are there, so that no thread waits with it.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// Work to be done once the bytes have arrived, or cannot.
type Continuation = Box<dyn FnOnce(Result<(), i32>) + Send>;

thread_local! {
    /// The arrival that the last `EAGAIN` on this thread waits for.
    static EXPECTED: RefCell<Option<Arrival>> = const { RefCell::new(None) };
}

/// The arrival of some bytes: in the future, or done.
#[derive(Clone, Default)]
pub(crate) struct Arrival(Arc<Shared>);

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    done: Condvar,
}

#[derive(Default)]
struct State {
    /// The outcome: `Err` is an errno.
    outcome: Option<Result<(), i32>>,
    continuations: Vec<Continuation>,
}

impl Arrival {
    /// Leaves this arrival for the caller who is told `EAGAIN`.
    pub(crate) fn expect(&self) {
        EXPECTED.set(Some(self.clone()));
    }

    /// Takes the arrival that an `EAGAIN` on this thread waits for; `None` when the wait is for
    /// something else.
    pub(crate) fn take_expected() -> Option<Self> {
        EXPECTED.take()
    }

    /// Forgets an arrival that nobody took, so that it is not taken for that of a later `EAGAIN`.
    pub(crate) fn forget_expected() {
        EXPECTED.set(None);
    }

    /// Ends the wait: the bytes are there, or an errno says why they are not. Continuations run on
    /// this thread.
    pub(crate) fn complete(&self, outcome: Result<(), i32>) {
        let continuations = {
            let mut state = self.0.state.lock();
            if state.outcome.is_some() {
                return;
            }
            state.outcome = Some(outcome);
            std::mem::take(&mut state.continuations)
        };
        self.0.done.notify_all();
        for continuation in continuations {
            continuation(outcome);
        }
    }

    /// Runs `continuation` with the outcome: at once when there is one, else on the thread that
    /// brings it. It must not block.
    pub(crate) fn then(&self, continuation: Continuation) {
        let mut state = self.0.state.lock();
        match state.outcome {
            Some(outcome) => {
                drop(state);
                continuation(outcome);
            }
            None => state.continuations.push(continuation),
        }
    }

    /// Waits for the outcome.
    ///
    /// # Errors
    /// The errno of the fetch.
    pub(crate) fn wait(&self) -> io::Result<()> {
        let mut state = self.0.state.lock();
        while state.outcome.is_none() {
            self.0.done.wait(&mut state);
        }
        state.outcome.unwrap_or(Ok(())).map_err(io::Error::from_raw_os_error)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    use super::*;

    #[test]
    fn every_continuation_and_every_waiter_gets_the_outcome_once() {
        static SUM: AtomicUsize = AtomicUsize::new(0);
        let count = |by| {
            Box::new(move |outcome| {
                assert_eq!(outcome, Err(libc::EIO));
                SUM.fetch_add(by, Ordering::Relaxed);
            })
        };
        let arrival = Arrival::default();
        let waiter = arrival.clone();
        let waiter = thread::spawn(move || waiter.wait().unwrap_err().raw_os_error());
        arrival.then(count(1));
        arrival.then(count(10));
        assert_eq!(SUM.load(Ordering::Relaxed), 0);
        arrival.complete(Err(libc::EIO));
        arrival.complete(Ok(()));
        arrival.then(count(100));
        assert_eq!(SUM.load(Ordering::Relaxed), 111);
        assert_eq!(waiter.join().unwrap(), Some(libc::EIO));
    }

    #[test]
    fn an_arrival_is_expected_on_its_thread_until_it_is_taken() {
        let arrival = Arrival::default();
        arrival.expect();
        assert!(thread::spawn(|| Arrival::take_expected().is_none()).join().unwrap());
        arrival.complete(Ok(()));
        assert!(Arrival::take_expected().unwrap().wait().is_ok());
        assert!(Arrival::take_expected().is_none());
    }
}
