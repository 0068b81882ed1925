//! How an output stream ends: finished, given up, or with its mount.

use std::thread;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::{Core, Output, State, answer_all, plain_size};
use crate::spec::{FinishWhen, Pad, format_size};

/// How long `finish` waits for writers to go: RELEASE comes after close(2) has returned.
const WRITERS: Duration = Duration::from_secs(5);
/// How many times longer a sink may work that was given everything already.
const LAST: u32 = 10;
/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long an aborted sink may take to let go.
const ABORTING: Duration = Duration::from_secs(5);

/// How long a sink is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes.
    Endless,
    /// So long.
    Total(Duration),
    /// Until it has taken nothing for so long.
    Stalled(Duration),
}

impl Patience {
    /// As a request has it: so many milliseconds, or as long as it takes.
    #[must_use]
    pub fn of_request(milliseconds: Option<u64>) -> Self {
        milliseconds.map_or(Self::Endless, |time| Self::Total(Duration::from_millis(time)))
    }

    fn wait(self) -> Option<Duration> {
        match self {
            Self::Endless => None,
            Self::Total(time) | Self::Stalled(time) => Some(time),
        }
    }
}

/// Why a stream is not finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// Somebody may still write.
    #[error("is open for writing")]
    Busy,
    /// The time is over and the sink still works on it.
    #[error("{0}")]
    StillFinishing(String),
    /// It will never be.
    #[error("{0}")]
    Failed(String),
}

impl Output {
    /// Where the stream will end, in bytes.
    pub(super) fn end_of(&self, core: &Core) -> u64 {
        match self.pad {
            Pad::Size => self.size,
            Pad::Highest => core.window.highest().max(core.window.frontier()),
        }
    }

    /// Bytes accepted, and how many there will be.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let core = self.core.lock();
        (self.watch.accepted(), self.end_of(&core))
    }

    /// Completes the stream: waits for writers to go, sends what is held, and waits for the sink.
    /// Called again it waits on, or repeats the result. What it says is for the user.
    ///
    /// # Errors
    /// [`FinishError`]; when `patience` is over the sink goes on, and may be asked for again.
    pub fn finish(
        &self,
        has_writers: &dyn Fn() -> bool,
        patience: Patience,
    ) -> Result<String, FinishError> {
        let mut until = patience.wait().map(|time| Instant::now() + time);
        let grace = Instant::now() + patience.wait().map_or(WRITERS, |time| time.min(WRITERS));
        loop {
            let mut core = self.core.lock();
            if core.state != State::Open {
                break;
            }
            if !has_writers() {
                self.begin_finish(&mut core);
                break;
            }
            drop(core);
            if Instant::now() >= grace {
                return Err(FinishError::Busy);
            }
            thread::sleep(LOOK);
        }
        let mut core = self.core.lock();
        let mut before = self.watch.accepted();
        let mut at_last = false;
        while core.state == State::Finishing {
            let Some(end) = until else {
                self.changed.wait(&mut core);
                continue;
            };
            if !self.changed.wait_until(&mut core, end).timed_out()
                || core.state != State::Finishing
            {
                continue;
            }
            let now = self.watch.accepted();
            let has_all = now >= self.end_of(&core);
            let more = match patience {
                Patience::Stalled(time) if now > before => Some(time),
                // What it still does with the last of it may take its time, but not for ever.
                Patience::Stalled(time) if has_all && !std::mem::replace(&mut at_last, true) => {
                    Some(time * LAST)
                }
                _ => None,
            };
            let Some(more) = more else {
                return Err(FinishError::StillFinishing(self.how_far(&core)));
            };
            before = now;
            until = Some(Instant::now() + more);
        }
        self.result(&core)
    }

    /// The stream gets whole, in its own time.
    pub fn finish_later(&self) {
        let mut core = self.core.lock();
        if core.state == State::Open {
            self.begin_finish(&mut core);
        }
    }

    fn begin_finish(&self, core: &mut MutexGuard<'_, Core>) {
        core.state = State::Finishing;
        let end = self.end_of(core);
        core.window.finish(end);
        self.work.notify_all();
        let refused = core.queue.take_all();
        MutexGuard::unlocked(core, || answer_all(refused, libc::EIO));
    }

    /// Why a stream is given up that could not be finished in time.
    pub fn too_late(&self, error: FinishError) -> String {
        match error {
            FinishError::StillFinishing(_) => {
                let (done, total) = self.progress();
                let (done, total) = (format_size(done), format_size(total));
                format!("the stream is given up: its sink had {done} of {total} when time was over")
            }
            FinishError::Busy => "the stream is given up: it is open for writing".to_owned(),
            FinishError::Failed(why) => why,
        }
    }

    fn how_far(&self, core: &Core) -> String {
        let (done, total) = (self.watch.accepted(), self.end_of(core));
        format!(
            "{} of {} are sent, and the sink still works: cowslip finish again waits on, cowslip abort gives up",
            format_size(done),
            format_size(total)
        )
    }

    fn result(&self, core: &Core) -> Result<String, FinishError> {
        let sink = self.watch.describe();
        let (window, spill) = core.window.needed();
        match (core.state, &core.error) {
            (State::Finished, _) if self.watch.kind() == "measure" => Ok(format!(
                "{}: needs window={} (without spill), or spill={} (with window={})",
                self.name,
                plain_size(window),
                plain_size(spill),
                plain_size(self.window),
            )),
            (State::Finished, _) => {
                let end = format_size(self.end_of(core));
                Ok(format!("{}: finished, {end} in {sink}", self.name))
            }
            (_, Some(error)) => Err(FinishError::Failed(error.clone())),
            (state, None) => Err(FinishError::Failed(format!("the stream is {}", state.name()))),
        }
    }

    /// Gives the stream up: its programs are killed before their input ends.
    ///
    /// # Errors
    /// A line when it is finished already, or when its sink does not let go.
    pub fn abort(&self, why: &str) -> Result<(), String> {
        let mut core = self.core.lock();
        match core.state {
            State::Finished => return Err("it is finished already".to_owned()),
            State::Open | State::Finishing => {
                log::warn!("{}: the stream is given up: {why}", self.name);
                core.state = State::Aborted;
                core.error = Some(why.to_owned());
            }
            State::Failed | State::Aborted => {}
        }
        let refused = core.queue.take_all();
        self.stop.stop();
        self.work.notify_all();
        self.changed.notify_all();
        MutexGuard::unlocked(&mut core, || {
            answer_all(refused, libc::EIO);
            self.watch.kill();
        });
        let working = |core: &mut Core| !core.ended;
        if self.changed.wait_while_for(&mut core, working, ABORTING).timed_out() {
            return Err("its sink does not let go".to_owned());
        }
        Ok(())
    }

    /// The end of the mount: a stream that is not complete is finished, if it is one that ends
    /// with the mount, or given up.
    ///
    /// # Errors
    /// A line when it is not whole, and nobody had given it up.
    pub fn close(
        &self,
        has_writers: &dyn Fn() -> bool,
        patience: Patience,
    ) -> Result<Option<String>, String> {
        let state = self.core.lock().state;
        let result = match (state, self.finish) {
            (State::Open, FinishWhen::Umount) | (State::Finishing | State::Finished, _) => {
                match self.finish(has_writers, patience) {
                    Ok(line) => Ok((state != State::Finished).then_some(line)),
                    Err(error) => {
                        let why = self.too_late(error);
                        // What has failed stays so; what still works does not any more.
                        let _ = self.abort(&why);
                        Err(why)
                    }
                }
            }
            (State::Open, _) => self.give_up(),
            (State::Failed, _) => {
                let error = self.core.lock().error.clone().unwrap_or_default();
                Err(format!("the stream failed: {error}"))
            }
            (State::Aborted, _) => Ok(None),
        };
        if self.core.lock().ended
            && let Some(sender) = self.sender.lock().take()
        {
            // It has ended; a panic in it ends the process.
            let _ = sender.join();
        }
        result
    }

    fn give_up(&self) -> Result<Option<String>, String> {
        let was_written = self.core.lock().window.highest() > 0;
        self.abort("unmounted before it was finished")?;
        let line =
            "the stream was not finished, and is given up: cowslip finish comes before umount";
        if was_written { Err(line.to_owned()) } else { Ok(Some(format!("{}: {line}", self.name))) }
    }
}
