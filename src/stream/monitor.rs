//! A handle for observing and killing a sink or a source while its own thread works with it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::command::Pipeline;
use crate::host::os_message;

/// The time that a program that has closed its input has to exit with a reason.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// A handle on a running sink or source; all clones refer to the same one.
#[derive(Clone, Debug)]
pub struct Monitor {
    kind: &'static str,
    label: Arc<str>,
    pipeline: Option<Arc<Pipeline>>,
    counters: Arc<StreamCounters>,
}

/// The counters of the working thread.
#[derive(Debug, Default)]
pub(super) struct StreamCounters {
    /// The offset of the disk before which everything has passed, in bytes.
    pub(super) accepted: AtomicU64,
    /// The number of bytes on the wire.
    pub(super) wire_bytes: AtomicU64,
}

impl Monitor {
    pub(super) fn new(kind: &'static str, label: &str, pipeline: Option<Arc<Pipeline>>) -> Self {
        Self { kind, label: label.into(), pipeline, counters: Arc::default() }
    }

    pub(super) fn counters(&self) -> &Arc<StreamCounters> {
        &self.counters
    }

    pub(super) fn pipeline(&self) -> Option<&Pipeline> {
        self.pipeline.as_deref()
    }

    /// Returns the kind of sink or source: `fifo`, `file`, `device`, `cmd`, `stdout`, `stdin` or
    /// `measure`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// Returns the sink or source as the user would write it: `file:/srv/o.img`, `cmd:zstd -c | ssh
    /// h`.
    #[must_use]
    pub fn describe(&self) -> String {
        self.label.to_string()
    }

    /// Describes a command that has ended with a failure, if any; never waits.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.pipeline.as_ref().and_then(|pipeline| pipeline.failure())
    }

    /// Kills the commands, if there are any. Its [`Stop`](crate::program::stop::Stop) ends the wait of a thread
    /// for the sink or the source.
    pub fn kill(&self) {
        if let Some(pipeline) = &self.pipeline {
            pipeline.kill();
        }
    }

    /// Returns the offset of the disk, in bytes, before which a sink has accepted, or a source has
    /// delivered, everything; exact even after a failure.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Acquire)
    }

    /// Explains to the user why the sink or source returned `error`: `'zstd' exited with status 1:
    /// No space left`. Waits up to a second for a command that is about to exit.
    #[must_use]
    pub fn explain(&self, error: &io::Error) -> String {
        match error.raw_os_error() {
            Some(libc::ECANCELED) => format!("{} was stopped", self.label),
            Some(libc::EPIPE) => self.explain_epipe(),
            _ => format!("{}: {}", self.label, os_message(error)),
        }
    }

    fn explain_epipe(&self) -> String {
        let sent = self.counters.wire_bytes.load(Ordering::Acquire);
        let Some(pipeline) = &self.pipeline else {
            return format!("the reader of {} has gone after {sent} bytes", self.label);
        };
        let until = Instant::now() + EXIT_TIMEOUT;
        loop {
            // In this order: a program that ends between the two checks is examined once more.
            let ended = pipeline.has_ended() || Instant::now() >= until;
            if let Some(failure) = pipeline.failure() {
                return failure;
            }
            if ended {
                return format!(
                    "'{}' stopped reading after {sent} bytes",
                    pipeline.first_program()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}
