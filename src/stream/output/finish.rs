//! The end of an output stream: finished, aborted, or closed with its mount.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::MutexGuard;

use super::{Output, OutputCore, OutputState, reply_all, spec_size};
use crate::config::{FinishWhen, Pad, format_size};
use crate::host::os_error;

/// The longest wait of `finish` for writers to close: RELEASE arrives after close(2) has returned.
const WRITERS_TIMEOUT: Duration = Duration::from_secs(5);
/// The factor by which the wait is extended, once, for a sink that has been given everything.
const FINAL_WAIT_FACTOR: u32 = 10;
/// The interval at which `finish` checks for writers.
const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The time that an aborted sink has to end.
const ABORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The limit on waiting for a sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DrainTimeout {
    /// No limit.
    Unlimited,
    /// At most this long in total.
    Total(Duration),
    /// Until the sink has accepted nothing for this long.
    Stalled(Duration),
}

impl DrainTimeout {
    /// Converts the timeout of a request: a number of milliseconds, or no limit.
    #[must_use]
    pub fn from_millis(milliseconds: Option<u64>) -> Self {
        milliseconds.map_or(Self::Unlimited, |time| Self::Total(Duration::from_millis(time)))
    }

    fn duration(self) -> Option<Duration> {
        match self {
            Self::Unlimited => None,
            Self::Total(time) | Self::Stalled(time) => Some(time),
        }
    }
}

/// Why a stream is not finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// A writer still has the stream open.
    #[error("is open for writing")]
    Busy,
    /// The timeout has passed, and the sink is still working.
    #[error("{0}")]
    StillFinishing(String),
    /// The stream can never be finished.
    #[error("{0}")]
    Failed(String),
}

impl Output {
    /// Returns the end of the stream in bytes.
    pub(super) fn end_offset(&self, core: &OutputCore) -> u64 {
        match self.pad {
            Pad::Size => self.size,
            Pad::Highest => core.window.highest().max(core.window.frontier()),
        }
    }

    /// Returns the bytes accepted by the sink, and the total.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let core = self.core.lock();
        (self.monitor.accepted(), self.end_offset(&core))
    }

    /// Completes the stream: waits for writers to close, sends the held data, and waits for the
    /// sink. A repeated call continues to wait, or returns the same result. The returned line is
    /// for the user. A stream of which a write was refused and not repeated fails.
    ///
    /// # Errors
    /// [`FinishError`]. When `timeout` has run out, the sink goes on, and `finish` may be called
    /// again.
    pub fn finish(
        &self,
        has_writers: &dyn Fn() -> bool,
        timeout: DrainTimeout,
    ) -> Result<String, FinishError> {
        let mut deadline = timeout.duration().map(|time| Instant::now() + time);
        let writers_deadline = Instant::now()
            + timeout.duration().map_or(WRITERS_TIMEOUT, |time| time.min(WRITERS_TIMEOUT));
        loop {
            let mut core = self.core.lock();
            if core.state != OutputState::Open {
                break;
            }
            if !has_writers() {
                self.begin_finish(&mut core);
                break;
            }
            drop(core);
            if Instant::now() >= writers_deadline {
                return Err(FinishError::Busy);
            }
            thread::sleep(POLL_INTERVAL);
        }
        let mut core = self.core.lock();
        let mut before = self.monitor.accepted();
        let mut is_final_wait = false;
        while core.state == OutputState::Finishing {
            let Some(end) = deadline else {
                self.changed.wait(&mut core);
                continue;
            };
            if !self.changed.wait_until(&mut core, end).timed_out()
                || core.state != OutputState::Finishing
            {
                continue;
            }
            let now = self.monitor.accepted();
            let has_all = now >= self.end_offset(&core);
            let extension = match timeout {
                DrainTimeout::Stalled(time) if now > before => Some(time),
                // The sink may take its time to process the last data, but not without limit.
                DrainTimeout::Stalled(time)
                    if has_all && !std::mem::replace(&mut is_final_wait, true) =>
                {
                    Some(time * FINAL_WAIT_FACTOR)
                }
                _ => None,
            };
            let Some(extension) = extension else {
                return Err(FinishError::StillFinishing(self.progress_line(&core)));
            };
            before = now;
            deadline = Some(Instant::now() + extension);
        }
        self.finish_result(&core)
    }

    /// Completes the stream without waiting for the sink.
    pub fn finish_in_background(&self) {
        let mut core = self.core.lock();
        if core.state == OutputState::Open {
            self.begin_finish(&mut core);
        }
    }

    fn begin_finish(&self, core: &mut MutexGuard<'_, OutputCore>) {
        // A write that still waits is refused, like all after it.
        let waiting = core.queue.take_all();
        for write in &waiting {
            let range = write.offset..write.offset + write.len as u64;
            self.note_refused(core, range, write.source, &os_error(libc::EIO));
        }
        if let Some(debt) = core.refused.debt() {
            self.fail(core, debt);
        }
        if core.state == OutputState::Open {
            core.state = OutputState::Finishing;
            let end = self.end_offset(core);
            core.window.finish(end);
            self.work.notify_all();
        }
        MutexGuard::unlocked(core, || reply_all(waiting, libc::EIO));
    }

    /// Explains why a stream is aborted that could not be finished in time.
    pub fn abort_reason(&self, error: FinishError) -> String {
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

    fn progress_line(&self, core: &OutputCore) -> String {
        let (done, total) = (self.monitor.accepted(), self.end_offset(core));
        format!(
            "{} of {} are sent, and the sink still works: cowslip finish again waits on, cowslip abort gives up",
            format_size(done),
            format_size(total)
        )
    }

    fn finish_result(&self, core: &OutputCore) -> Result<String, FinishError> {
        let sink = self.monitor.describe();
        let needed = core.window.needed();
        match (core.state, &core.error) {
            (OutputState::Finished, _) if self.monitor.kind() == "measure" => Ok(format!(
                "{}: needs window={} (without spill), or spill={} (with window={})",
                self.name,
                spec_size(needed.window),
                spec_size(needed.spill),
                spec_size(self.window_size),
            )),
            (OutputState::Finished, _) => {
                let end = format_size(self.end_offset(core));
                Ok(format!("{}: finished, {end} in {sink}", self.name))
            }
            (_, Some(error)) => Err(FinishError::Failed(error.clone())),
            (state, None) => Err(FinishError::Failed(format!("the stream is {}", state.name()))),
        }
    }

    /// Aborts the stream: its programs are killed before their input ends.
    ///
    /// # Errors
    /// A line for the user if the stream is already finished, or its sink does not end in time.
    pub fn abort(&self, why: &str) -> Result<(), String> {
        let mut core = self.core.lock();
        match core.state {
            OutputState::Finished => return Err("it is finished already".to_owned()),
            OutputState::Open | OutputState::Finishing => {
                log::warn!("{}: the stream is given up: {why}", self.name);
                core.state = OutputState::Aborted;
                self.has_failed.store(true, Ordering::Release);
                core.error = Some(why.to_owned());
            }
            OutputState::Failed | OutputState::Aborted => {}
        }
        let refused = core.queue.take_all();
        self.stop.stop();
        self.work.notify_all();
        self.changed.notify_all();
        MutexGuard::unlocked(&mut core, || {
            reply_all(refused, libc::EIO);
            self.monitor.kill();
        });
        let working = |core: &mut OutputCore| !core.sender_ended;
        if self.changed.wait_while_for(&mut core, working, ABORT_TIMEOUT).timed_out() {
            return Err("its sink does not let go".to_owned());
        }
        Ok(())
    }

    /// Ends the stream with its mount: an incomplete stream is finished if `finish=umount` is set,
    /// and aborted otherwise.
    ///
    /// # Errors
    /// A line for the user if the stream is incomplete and was not aborted on request.
    pub fn close(
        &self,
        has_writers: &dyn Fn() -> bool,
        timeout: DrainTimeout,
    ) -> Result<Option<String>, String> {
        let state = self.core.lock().state;
        let result = match (state, self.finish) {
            (OutputState::Open, FinishWhen::Umount)
            | (OutputState::Finishing | OutputState::Finished, _) => {
                match self.finish(has_writers, timeout) {
                    Ok(line) => Ok((state != OutputState::Finished).then_some(line)),
                    Err(error) => {
                        let why = self.abort_reason(error);
                        // A failed stream stays failed; a sink that is still working is stopped.
                        let _ = self.abort(&why);
                        Err(why)
                    }
                }
            }
            (OutputState::Open, _) => self.abort_unfinished(),
            (OutputState::Failed, _) => {
                let error = self.core.lock().error.clone().unwrap_or_default();
                Err(format!("the stream failed: {error}"))
            }
            (OutputState::Aborted, _) => Ok(None),
        };
        if self.core.lock().sender_ended
            && let Some(sender) = self.sender.lock().take()
        {
            // The thread has ended; a panic in it ends the process.
            let _ = sender.join();
        }
        result
    }

    fn abort_unfinished(&self) -> Result<Option<String>, String> {
        let core = self.core.lock();
        let was_written = core.window.highest() > 0 || !core.refused.is_empty();
        drop(core);
        self.abort("unmounted before it was finished")?;
        let line =
            "the stream was not finished, and is given up: cowslip finish comes before umount";
        if was_written { Err(line.to_owned()) } else { Ok(Some(format!("{}: {line}", self.name))) }
    }
}
