//! The thread that reads the source and answers parked reads.

use std::io;
use std::os::fd::AsFd;

use rustix::event::PollFlags;

use super::read_buffer::CHUNK_SIZE;
use super::state::{InputCore, InputPhase, READ_AHEAD, ReadyRead};
use super::{Input, InputState, Source};
use crate::host::os_error;

/// The next action of the thread.
enum ReaderStep {
    /// Read at most this many bytes.
    Read(usize),
    /// Check whether the source ends where the disk does.
    Check,
}

/// The way the thread ended.
enum ReaderEnd {
    /// Every byte has arrived, and no more.
    Complete,
    /// The source ended too early.
    Early,
    /// Stopped before the end.
    Stopped,
    /// Failed in another way, described in one line.
    Failed(String),
}

impl Input {
    /// Runs the thread.
    pub(super) fn run(&self, mut source: Box<dyn Source>) {
        let end = self.pump(&mut *source);
        let mut failure = match &end {
            ReaderEnd::Failed(why) => Some(why.clone()),
            ReaderEnd::Early => {
                let arrived = self.core.lock().arrived;
                Some(format!("ended after {arrived} bytes, the disk has {}", self.size))
            }
            ReaderEnd::Complete | ReaderEnd::Stopped => None,
        };
        // Answer parked reads first: they should not wait for a command to exit.
        self.fail_pending(failure.as_deref());
        let mut outcome = InputState::Open;
        if matches!(end, ReaderEnd::Complete | ReaderEnd::Early) {
            match source.finish() {
                Ok(()) => outcome = InputState::Finished,
                // The failure may be a consequence of the stop.
                Err(_) if self.stop.is_stopped() => {}
                Err(why) => failure = Some(why),
            }
        } else {
            source.close();
        }
        self.set_outcome(outcome, failure.as_deref());
    }

    /// Reads the source to its end, or until stopped.
    fn pump(&self, source: &mut dyn Source) -> ReaderEnd {
        let mut buf = vec![0; CHUNK_SIZE];
        loop {
            let next = match self.next_step() {
                Ok(next) => next,
                Err(error) => return self.read_failure(&error),
            };
            let most = match next {
                ReaderStep::Read(most) => most,
                ReaderStep::Check => 1,
            };
            match (source.read(&mut buf[..most]), next) {
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
                (Err(error), _) => return self.read_failure(&error),
                (Ok(0), _) if self.stop.is_stopped() => return ReaderEnd::Stopped,
                (Ok(0), ReaderStep::Check) => return ReaderEnd::Complete,
                (Ok(0), ReaderStep::Read(_)) => return ReaderEnd::Early,
                (Ok(_), ReaderStep::Check) => {
                    let line = format!("the source goes on past the disk's size, {}", self.size);
                    return ReaderEnd::Failed(line);
                }
                (Ok(len), ReaderStep::Read(_)) => {
                    if let Err(why) = self.deliver(&buf[..len]) {
                        return ReaderEnd::Failed(why);
                    }
                }
            }
        }
    }

    fn read_failure(&self, error: &io::Error) -> ReaderEnd {
        if self.stop.is_stopped() {
            return ReaderEnd::Stopped;
        }
        ReaderEnd::Failed(format!("reading the source: {error}"))
    }

    /// Returns the next action; waits until there is one.
    ///
    /// # Errors
    /// `ECANCELED` once stopped.
    fn next_step(&self) -> io::Result<ReaderStep> {
        loop {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            if let Some(next) = self.plan_step(&mut self.core.lock()) {
                return Ok(next);
            }
            self.stop.wait_for(self.wake_fd.as_fd(), PollFlags::IN, None)?;
            // Reset the eventfd; it does no harm if it is already reset.
            let _ = rustix::io::read(&self.wake_fd, &mut [0_u8; 8]);
        }
    }

    fn plan_step(&self, core: &mut InputCore) -> Option<ReaderStep> {
        core.idle = false;
        if self.is_all_read(core) {
            core.phase = InputPhase::Ending;
            return Some(ReaderStep::Check);
        }
        let goal = match self.spool {
            Some(_) => self.size,
            None => core.demanded().saturating_add(READ_AHEAD).min(self.size),
        };
        if core.arrived >= goal {
            core.idle = true;
            return None;
        }
        let most =
            usize::try_from(goal - core.arrived).map_or(CHUNK_SIZE, |most| most.min(CHUNK_SIZE));
        Some(ReaderStep::Read(most))
    }

    /// Wakes the thread if it is idle and has enough to do.
    pub(super) fn wake(&self, core: &mut InputCore) {
        // Half of the read-ahead at a time, rather than a wake-up for every read.
        let goal = core.demanded().saturating_add(READ_AHEAD / 2).min(self.size);
        if core.idle && (core.arrived < goal || self.is_all_read(core)) {
            core.idle = false;
            // The write fails only if the counter is full, and the eventfd is readable then anyway.
            let _ = rustix::io::write(&self.wake_fd, &1_u64.to_ne_bytes());
        }
    }

    /// Takes the next bytes and answers the reads that waited for them.
    fn deliver(&self, bytes: &[u8]) -> Result<(), String> {
        if let Some(spool) = &self.spool {
            // Only this thread changes `arrived`.
            let at = self.core.lock().arrived;
            spool
                .store(bytes, at)
                .map_err(|error| format!("the spool in {}: {error}", spool.dir().display()))?;
        }
        let mut core = self.core.lock();
        core.append(bytes);
        let arrived = core.arrived;
        let there = core.take_pending(|read| read.range.end <= arrived);
        let ready: Vec<ReadyRead> = there.into_iter().map(|read| core.complete(read)).collect();
        core.trim();
        drop(core);
        ready.into_iter().for_each(|ready| self.send_reply(ready));
        Ok(())
    }

    /// Answers a read whose bytes have arrived; call it without the lock.
    pub(super) fn send_reply(&self, ready: ReadyRead) {
        let bytes = match (ready.bytes, &self.spool) {
            (None, Some(spool)) => spool.read(&ready.range),
            (bytes, _) => bytes.ok_or_else(|| os_error(libc::EIO)),
        };
        (ready.reply)(bytes);
    }

    /// Answers all parked reads with `EIO`: nothing more will arrive.
    fn fail_pending(&self, failure: Option<&str>) {
        let mut core = self.core.lock();
        core.phase = InputPhase::Ending;
        core.fail(failure);
        let refused = core.take_pending(|_| true);
        drop(core);
        refused.into_iter().for_each(|read| (read.reply)(Err(os_error(libc::EIO))));
    }

    fn set_outcome(&self, outcome: InputState, failure: Option<&str>) {
        if let Some(why) = failure {
            log::error!("{}: the stream failed: {why}", self.name);
        }
        let mut core = self.core.lock();
        core.phase = InputPhase::Ended;
        core.outcome = outcome;
        core.fail(failure);
        self.ended.notify_all();
    }
}
