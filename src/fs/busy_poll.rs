//! A worker that has answered looks for the next request before it goes to sleep.
//!
//! One client that waits for each answer (a database, `qemu` at depth one, a walk of `lseek`) asks
//! again within microseconds. Waking a thread on another core costs as much as the request itself,
//! and more in a virtual machine. So one worker, and never more, asks the connection again and again
//! for a moment. Whether that pays is learnt from what comes: a client that thinks for longer, and a
//! queue that is never empty, soon have workers that sleep, and a look now and then.

use std::hint::spin_loop;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// How long a worker looks: a client that does nothing but ask is back within this.
const BUSY_POLL_TIME: Duration = Duration::from_micros(10);
/// A look in vain takes twice to four times what one that finds something saves, and takes it from
/// whoever else wants to run. So it uses up the credit of so many others...
const MISS_COST: u32 = 4;
/// ...of which there is never more than this.
const MAX_CREDIT: u32 = 16;
/// Without credit so many answers go by without a look, twice as many each time...
const MIN_BACKOFF: u32 = 8;
/// ...up to this.
const MAX_BACKOFF: u32 = 4096;
/// So many go by when the next request was there already: more are coming than one worker takes.
const QUEUED_BACKOFF: u32 = 16;

/// Looks for the next request, when that pays.
pub(super) struct BusyPoll {
    /// The connection; `None` where nobody could ask while a worker looks.
    device: Option<OwnedFd>,
    /// Somebody looks.
    is_polling: AtomicBool,
    /// Answers to come that nobody looks after.
    backoff: AtomicU32,
    /// How many there are to be the next time.
    next_backoff: AtomicU32,
    /// How well the last looks have paid.
    credit: AtomicU32,
}

/// What a look has found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PollOutcome {
    /// A request that was there before.
    Queued,
    /// One that came.
    Arrived,
    /// Nothing.
    Nothing,
}

impl BusyPoll {
    /// Looks at `device`, the connection to the kernel.
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

    /// Called by a worker that has answered and would go back to ask for the next request.
    pub(super) fn poll_request(&self) {
        let Some(device) = &self.device else { return };
        let rest = self.backoff.load(Ordering::Relaxed);
        if rest > 0 {
            // Counted by several at once some are lost, which is as good.
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
        let mut asked = [PollFd::new(device, PollFlags::IN)];
        // An error is the reading worker's to see.
        if poll(&mut asked, Some(&Timespec::default())) != Ok(0) {
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
    fn looks_in_vain_become_rare_and_one_that_pays_brings_them_back() {
        let linger = BusyPoll::new(Some(pipe().0));
        let rest = || linger.backoff.swap(0, Ordering::Relaxed);
        for expected in [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 4096] {
            linger.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), expected);
        }
        // One that pays is not enough, and three of four are not.
        for _ in 0..20 {
            (0..3).for_each(|_| linger.adapt(PollOutcome::Arrived));
            linger.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), MAX_BACKOFF);
        }
        linger.adapt(PollOutcome::Queued);
        assert_eq!(rest(), QUEUED_BACKOFF);
        (0..=MAX_CREDIT).for_each(|_| linger.adapt(PollOutcome::Arrived));
        for expected in [0, 0, 0, 0, MIN_BACKOFF] {
            linger.adapt(PollOutcome::Nothing);
            assert_eq!(rest(), expected);
        }
    }

    #[test]
    fn a_look_ends_when_something_comes_and_without() {
        let (read, mut write) = pipe();
        assert_eq!(poll_device(&read), PollOutcome::Nothing);
        write.write_all(b"x").unwrap();
        assert_eq!(poll_device(&read), PollOutcome::Queued);
    }

    #[test]
    fn while_one_looks_and_while_it_rests_nobody_else_does() {
        let (read, _write) = pipe();
        let linger = BusyPoll::new(Some(read));
        linger.is_polling.store(true, Ordering::Relaxed);
        linger.poll_request();
        assert_eq!(linger.backoff.load(Ordering::Relaxed), 0, "it did not look");
        linger.is_polling.store(false, Ordering::Relaxed);
        linger.backoff.store(5, Ordering::Relaxed);
        linger.poll_request();
        assert_eq!(linger.backoff.load(Ordering::Relaxed), 4);
    }
}
