//! The thread that reads the source and answers who waited for it.

use std::io;
use std::os::fd::AsFd;

use rustix::event::PollFlags;

use super::kept::CHUNK;
use super::state::{AHEAD, Phase, Ready, State};
use super::{Input, InputState, Supplier};
use crate::host::errno;

/// What the thread does next.
enum Next {
    /// Read at most so many bytes.
    Read(usize),
    /// See whether the source ends where the disk does.
    Check,
}

/// How the thread came to its end.
enum End {
    /// Every byte has arrived, and no more.
    Complete,
    /// The source ended before that.
    Early,
    /// Stopped before the end.
    Stopped,
    /// Anything else, in one line.
    Failed(String),
}

impl Input {
    /// All that the thread does.
    pub(super) fn run(&self, mut supplier: Box<dyn Supplier>) {
        let end = self.pump(&mut *supplier);
        let mut failure = match &end {
            End::Failed(why) => Some(why.clone()),
            End::Early => {
                let arrived = self.state.lock().arrived;
                Some(format!("ended after {arrived} bytes, the disk has {}", self.size))
            }
            End::Complete | End::Stopped => None,
        };
        // Whoever waits is not kept waiting for a command to exit.
        self.no_more(failure.as_deref());
        let mut outcome = InputState::Open;
        if matches!(end, End::Complete | End::Early) {
            match supplier.end() {
                Ok(()) => outcome = InputState::Finished,
                // It may have failed because it was stopped.
                Err(_) if self.stop.is_stopped() => {}
                Err(why) => failure = Some(why),
            }
        } else {
            supplier.close();
        }
        self.conclude(outcome, failure.as_deref());
    }

    /// Reads the source to its end, or until stopped.
    fn pump(&self, supplier: &mut dyn Supplier) -> End {
        let mut buf = vec![0; CHUNK];
        loop {
            let next = match self.next() {
                Ok(next) => next,
                Err(error) => return self.broken(&error),
            };
            let most = match next {
                Next::Read(most) => most,
                Next::Check => 1,
            };
            match (supplier.read(&mut buf[..most]), next) {
                (Err(error), _) if error.kind() == io::ErrorKind::Interrupted => {}
                (Err(error), _) => return self.broken(&error),
                (Ok(0), _) if self.stop.is_stopped() => return End::Stopped,
                (Ok(0), Next::Check) => return End::Complete,
                (Ok(0), Next::Read(_)) => return End::Early,
                (Ok(_), Next::Check) => {
                    let line = format!("the source goes on past the disk's size, {}", self.size);
                    return End::Failed(line);
                }
                (Ok(len), Next::Read(_)) => {
                    if let Err(why) = self.arrive(&buf[..len]) {
                        return End::Failed(why);
                    }
                }
            }
        }
    }

    fn broken(&self, error: &io::Error) -> End {
        if self.stop.is_stopped() {
            return End::Stopped;
        }
        End::Failed(format!("reading the source: {error}"))
    }

    /// What to do now; waits until there is something.
    ///
    /// # Errors
    /// `ECANCELED` once stopped.
    fn next(&self) -> io::Result<Next> {
        loop {
            if self.stop.is_stopped() {
                return Err(errno(libc::ECANCELED));
            }
            if let Some(next) = self.step(&mut self.state.lock()) {
                return Ok(next);
            }
            self.stop.wait_for(self.wake.as_fd(), PollFlags::IN, None)?;
            // It is there to be emptied; that it is empty already does no harm.
            let _ = rustix::io::read(&self.wake, &mut [0_u8; 8]);
        }
    }

    fn step(&self, state: &mut State) -> Option<Next> {
        state.idle = false;
        if self.is_all_read(state) {
            state.phase = Phase::Ending;
            return Some(Next::Check);
        }
        let goal = match self.spool {
            Some(_) => self.size,
            None => state.demanded().saturating_add(AHEAD).min(self.size),
        };
        if state.arrived >= goal {
            state.idle = true;
            return None;
        }
        let most = usize::try_from(goal - state.arrived).map_or(CHUNK, |most| most.min(CHUNK));
        Some(Next::Read(most))
    }

    /// Wakes the thread if it is idle and has enough to do.
    pub(super) fn wake(&self, state: &mut State) {
        // Half of the read-ahead at a time, not a wake-up for every read.
        let goal = state.demanded().saturating_add(AHEAD / 2).min(self.size);
        if state.idle && (state.arrived < goal || self.is_all_read(state)) {
            state.idle = false;
            // It can only fail when the count is full, and is readable then all the same.
            let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
        }
    }

    /// Takes the next bytes and answers who waited for them.
    fn arrive(&self, bytes: &[u8]) -> Result<(), String> {
        if let Some(spool) = &self.spool {
            // Only this thread changes `arrived`.
            let at = self.state.lock().arrived;
            spool
                .store(bytes, at)
                .map_err(|error| format!("the spool in {}: {error}", spool.dir().display()))?;
        }
        let mut state = self.state.lock();
        state.append(bytes);
        let arrived = state.arrived;
        let there = state.unpark(|read| read.range.end <= arrived);
        let ready: Vec<Ready> = there.into_iter().map(|read| state.answer(read)).collect();
        state.trim();
        drop(state);
        ready.into_iter().for_each(|ready| self.give(ready));
        Ok(())
    }

    /// Answers a read whose bytes are there; without the lock.
    pub(super) fn give(&self, ready: Ready) {
        let bytes = match (ready.bytes, &self.spool) {
            (None, Some(spool)) => spool.read(&ready.range),
            (bytes, _) => bytes.ok_or_else(|| errno(libc::EIO)),
        };
        (ready.reply)(bytes);
    }

    /// Nothing arrives any more: who waits for it is told.
    fn no_more(&self, failure: Option<&str>) {
        let mut state = self.state.lock();
        state.phase = Phase::Ending;
        state.fail(failure);
        let refused = state.unpark(|_| true);
        drop(state);
        refused.into_iter().for_each(|read| (read.reply)(Err(errno(libc::EIO))));
    }

    fn conclude(&self, outcome: InputState, failure: Option<&str>) {
        if let Some(why) = failure {
            log::error!("{}: the stream failed: {why}", self.name);
        }
        let mut state = self.state.lock();
        state.phase = Phase::Over;
        state.outcome = outcome;
        state.fail(failure);
        self.over.notify_all();
    }
}
