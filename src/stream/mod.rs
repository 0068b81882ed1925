//! Streams: disks whose bytes leave in order while they are written, or arrive in order to be read.
//!
//! ```text
//!   Output:  write ──> window + store ──> sender ──> sink (fifo, file, device, command, stdout)
//!   Input:   source ──> reader ──> read-window or spool ──> read
//! ```
//!
//! `window` decides which bytes may still be changed and which must be sent, and `needed` computes
//! the window and spill that the writes so far would have needed. Both, like `runs`, hold no data
//! and do no I/O. `page_store` holds the data, `spill` holds the part that memory has no room for
//! (in `segments`, as the spool does), and `queue` holds the writes that wait for a stalled sink. `parked` limits what waits for streams. `output` and `input` combine these
//! parts, with one thread per stream. docs/streams.md explains the policy.
//!
//! Locks: each stream has one lock, held no longer than it takes to copy a request. Sinks, sources
//! and replies are called without it.

pub mod command;
pub mod context;
pub mod error;
mod fifo;
pub mod input;
mod layer;
pub mod monitor;
pub mod needed;
pub mod output;
pub mod page_store;
pub(crate) mod parked;
mod queue;
pub mod runs;
mod segments;
pub mod sink;
pub mod source;
mod spill;
mod stdio;
pub mod window;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use self::input::{Input, InputState, InputStatus};
use self::monitor::Monitor;
use self::output::{DrainTimeout, Output, OutputState};

/// A running stream.
pub enum Stream {
    /// An output stream: bytes written to the disk are sent to a sink.
    Output(Arc<Output>),
    /// An input stream: bytes read from the disk arrive from a source.
    Input {
        /// The reading side of the stream, with the data received so far.
        input: Arc<Input>,
        /// The handle of the source.
        monitor: Monitor,
    },
}

/// The treatment of unfinished streams when their mount ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum UnmountPolicy {
    /// Finish the streams that end with the mount, and abort the others.
    #[default]
    Settle,
    /// Finish all streams.
    Finish,
    /// Abort all unfinished streams.
    Abort,
    /// Do nothing yet: the mount lives on for the processes that have files of it open.
    Leave,
}

impl Stream {
    /// Returns the sink or source as the user wrote it.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Output(output) => output.status().sink,
            Self::Input { monitor, .. } => monitor.describe(),
        }
    }

    /// Returns the reason why the stream has failed, or `None` while it works.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        match self {
            Self::Output(output) => output.status().error,
            Self::Input { input, monitor } => input_status(input, monitor).error,
        }
    }

    /// Ends the stream according to `policy` when its mount ends; returns a line for the user if
    /// there is anything to report.
    ///
    /// # Errors
    /// A line for the user: the stream is incomplete.
    pub fn end_stream(
        &self,
        policy: UnmountPolicy,
        has_writers: &dyn Fn() -> bool,
        timeout: DrainTimeout,
    ) -> Result<Option<String>, String> {
        match (self, policy) {
            (_, UnmountPolicy::Leave) => Ok(None),
            (Self::Input { input, monitor }, _) => {
                // The failure is read first: `close` kills the commands of the source.
                let failure = input_status(input, monitor).error;
                input.close()?;
                failure.map_or(Ok(None), Err)
            }
            (Self::Output(output), UnmountPolicy::Settle) => output.close(has_writers, timeout),
            (Self::Output(output), UnmountPolicy::Finish) => {
                let line = output.finish(has_writers, timeout).map_err(|error| {
                    let why = output.abort_reason(error);
                    // After a failed finish the stream can never be completed.
                    let _ = output.abort(&why);
                    why
                });
                line.map(Some)
            }
            (Self::Output(output), UnmountPolicy::Abort) => match output.status().state {
                OutputState::Finished => Ok(None),
                OutputState::Failed => output.close(has_writers, timeout),
                _ => output.abort("the mount ended before it was finished").map(|()| None),
            },
        }
    }
}

/// Returns the status of an input stream. A failed command is reported even if its last bytes
/// have not been read.
#[must_use]
pub fn input_status(input: &Input, monitor: &Monitor) -> InputStatus {
    let mut status = input.status();
    if status.state == InputState::Open
        && status.error.is_none()
        && let Some(why) = monitor.failure()
    {
        status.state = InputState::Failed;
        status.error = Some(why);
    }
    status
}
