//! A stop signal for threads that wait in poll(2).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use crate::host::os_error;

/// A stop signal for a waiting sink or source; all clones share one signal.
#[derive(Clone, Debug)]
pub struct Stop(Arc<StopInner>);

#[derive(Debug)]
struct StopInner {
    stopped: AtomicBool,
    /// An eventfd that is readable once stopped.
    fd: OwnedFd,
}

impl Stop {
    /// Creates a signal that is not yet raised.
    ///
    /// # Errors
    /// The errno of eventfd(2).
    pub fn new() -> io::Result<Self> {
        let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(StopInner { stopped: false.into(), fd })))
    }

    /// Raises the signal, permanently.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        // The write fails only if the counter is full, and the descriptor is readable then anyway.
        let _ = rustix::io::write(&self.0.fd, &1u64.to_ne_bytes());
    }

    /// Returns whether the signal has been raised.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }

    /// Returns a descriptor that becomes readable once the signal is raised.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }

    /// Waits until `fd` is ready for `what`, has an error, or `timeout` has passed.
    ///
    /// # Errors
    /// `ECANCELED` once stopped; the errno of poll(2).
    pub fn wait_for(
        &self,
        fd: BorrowedFd<'_>,
        what: PollFlags,
        timeout: Option<Timespec>,
    ) -> io::Result<PollFlags> {
        let mut fds = [
            PollFd::from_borrowed_fd(fd, what),
            PollFd::from_borrowed_fd(self.fd(), PollFlags::IN),
        ];
        loop {
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
                Ok(_) if self.is_stopped() => return Err(os_error(libc::ECANCELED)),
                Ok(_) => return Ok(fds[0].revents()),
            }
        }
    }

    /// Sleeps for `time`.
    ///
    /// # Errors
    /// `ECANCELED`, at once, when stopped.
    pub fn sleep(&self, time: Timespec) -> io::Result<()> {
        self.wait_for(self.fd(), PollFlags::IN, Some(time)).map(|_| ())
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn stop_wakes_a_waiter_with_ecanceled() {
        let stop = Stop::new().unwrap();
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let other = stop.clone();
        let waiting = thread::spawn(move || other.wait_for(reader.as_fd(), PollFlags::IN, None));
        thread::sleep(Duration::from_millis(20));
        stop.stop();
        let error = waiting.join().unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        assert!(stop.is_stopped());
    }
}
