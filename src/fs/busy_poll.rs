//! Busy polling: a worker that has replied polls for the next request before it goes to sleep.
//!
//! A client that waits for each reply (a database, `qemu` at depth one, a walk of `lseek`) sends
//! its next request within microseconds. Waking a thread on another core costs as much as the
//! request itself, and more in a virtual machine. So one worker, and never more, polls the
//! connection for a moment. Whether that pays is learnt from the outcomes: with a client that
//! thinks for longer, or a queue that is never empty, the workers soon sleep and poll only now and
//! then.

use std::hint::spin_loop;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a worker polls: a client that does nothing but send requests is back within this time.
const BUSY_POLL_TIME: Duration = Duration::from_micros(10);
/// Credit that a poll in vain costs. Such a poll takes two to four times the time that a successful
/// one saves, and takes it from threads that want to run.
const MISS_COST: u32 = 4;
/// The most credit that successful polls can earn, one each.
const MAX_CREDIT: u32 = 16;
/// Number of replies without a poll once the credit is used up; doubled each time...
const MIN_BACKOFF: u32 = 8;
/// ...up to this number.
const MAX_BACKOFF: u32 = 4096;
/// Number of replies without a poll after a request was already queued: more requests arrive than
/// one worker handles.
const QUEUED_BACKOFF: u32 = 16;

/// Polls for the next request when that pays.
pub(super) struct BusyPoll {
    /// The connection; `None` on a single CPU, where no client could send anything while a worker
    /// polls.
    device: Option<OwnedFd>,
    /// Set while a worker polls.
    is_polling: AtomicBool,
    /// Number of coming replies that are not followed by a poll.
    backoff: AtomicU32,
    /// The value of `backoff` after the next poll in vain.
    next_backoff: AtomicU32,
    /// The credit earned by recent polls.
    credit: AtomicU32,
}

/// The outcome of a poll.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PollOutcome {
    /// A request was waiting already.
    Queued,
    /// A request arrived during the poll.
    Arrived,
    /// No request arrived.
    Nothing,
}

impl BusyPoll {
    /// Creates the state for polling `device`, the connection to the kernel.
    pub(super) fn new(device: Option<OwnedFd>) -> Self {
        let is_alone = thread::available_parallelism().map_or(1, usize::from) < 2;
        Self {
            device: device.filter(|_| !is_alone),
            is_polling: AtomicBool::new(false),
            backoff: AtomicU32::new(0),
            next_backoff: AtomicU32::new(MIN_BACKOFF),
            credit: AtomicU32::new(0),
        }
    }

    /// Polls if that is likely to pay. Called by a worker after its reply, before it reads the next
    /// request.
    pub(super) fn poll_request(&self) {
        let Some(device) = &self.device else { return };
        let rest = self.backoff.load(Ordering::Relaxed);
        if rest > 0 {
            // Concurrent decrements may get lost, which does no harm.
            self.backoff.store(rest - 1, Ordering::Relaxed);
            return;
        }
        if self.is_polling.swap(true, Ordering::Acquire) {
            return;
        }
        self.adapt(poll_device(device));
        self.is_polling.store(false, Ordering::Release);
    }

    fn adapt(&self, found: PollOutcome) {
        let credit = self.credit.load(Ordering::Relaxed);
        match found {
            PollOutcome::Arrived => {
                self.credit.store((credit + 1).min(MAX_CREDIT), Ordering::Relaxed);
                if credit == MAX_CREDIT {
                    self.next_backoff.store(MIN_BACKOFF, Ordering::Relaxed);
                }
            }
            PollOutcome::Queued => self.backoff.store(QUEUED_BACKOFF, Ordering::Relaxed),
            PollOutcome::Nothing if credit >= MISS_COST => {
                self.credit.store(credit - MISS_COST, Ordering::Relaxed);
            }
            PollOutcome::Nothing => {
                let rest = self.next_backoff.load(Ordering::Relaxed);
                self.credit.store(0, Ordering::Relaxed);
                self.backoff.store(rest, Ordering::Relaxed);
                self.next_backoff.store((rest * 2).min(MAX_BACKOFF), Ordering::Relaxed);
            }
        }
    }
}

fn poll_device(device: &OwnedFd) -> PollOutcome {
    let begin = Instant::now();
    let mut found = PollOutcome::Queued;
    loop {
        let mut fds = [PollFd::new(device, PollFlags::IN)];
        // An error is left to the worker's read, which reports it.
        if poll(&mut fds, Some(&Timespec::default())) != Ok(0) {
            return found;
        }
        if begin.elapsed() >= BUSY_POLL_TIME {
            return PollOutcome::Nothing;
        }
        found = PollOutcome::Arrived;
        spin_loop();
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pipe() -> (OwnedFd, std::fs::File) {
        let (read, write) = rustix::pipe::pipe().unwrap();
        (read, write.into())
    }

    #[test]
    fn polls_in_vain_become_rare_until_polls_pay_again() {
        let busy_poll = BusyPoll::new(Some(pipe().0));
        let rest = || busy_poll.backoff.swap(0, Ordering::Relaxed);
        for expected in [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096] {
            busy_poll.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), expected);
        }
        // One successful poll is not enough, nor are three of four.
        for _ in 0..20 {
            (0..3).for_each(|_| busy_poll.adapt(PollOutcome::Arrived));
            busy_poll.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), MAX_BACKOFF);
        }
        busy_poll.adapt(PollOutcome::Queued);
        assert_eq!(rest(), QUEUED_BACKOFF);
        (0..=MAX_CREDIT).for_each(|_| busy_poll.adapt(PollOutcome::Arrived));
        for expected in [0, 0, 0, 0, MIN_BACKOFF] {
            busy_poll.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), expected);
        }
    }

    #[test]
    fn a_poll_ends_with_a_request_and_after_its_time() {
        let (read, mut write) = pipe();
        assert_eq!(poll_device(&read), PollOutcome::Nothing);
        write.write_all(b"x").unwrap();
        assert_eq!(poll_device(&read), PollOutcome::Queued);
    }

    #[test]
    fn nobody_polls_during_another_poll_or_a_backoff() {
        let (read, _write) = pipe();
        let busy_poll = BusyPoll::new(Some(read));
        busy_poll.is_polling.store(true, Ordering::Relaxed);
        busy_poll.poll_request();
        assert_eq!(busy_poll.backoff.load(Ordering::Relaxed), 0, "it must not poll");
        busy_poll.is_polling.store(false, Ordering::Relaxed);
        busy_poll.backoff.store(5, Ordering::Relaxed);
        busy_poll.poll_request();
        assert_eq!(busy_poll.backoff.load(Ordering::Relaxed), 4);
    }
}
