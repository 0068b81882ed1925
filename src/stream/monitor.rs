//! What everybody may know of a sink or a source, and do to it, while its thread works with it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::command::Pipeline;
use crate::host::os_message;

/// How long a program that has closed its input may take to say why.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// A handle on a running sink or source; every clone is the same one.
#[derive(Clone, Debug)]
pub struct Monitor {
    kind: &'static str,
    label: Arc<str>,
    pipeline: Option<Arc<Pipeline>>,
    counters: Arc<StreamCounters>,
}

/// What the working thread counts.
#[derive(Debug, Default)]
pub(super) struct StreamCounters {
    /// The offset of the disk before which everything has passed.
    pub(super) accepted: AtomicU64,
    /// Bytes on the wire.
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

    /// What it is: `fifo`, `file`, `device`, `cmd`, `stdout`, `stdin` or `measure`.
    #[must_use]
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What it is, as one would write it: `file:/srv/o.img`, `cmd:zstd -c | ssh h`.
    #[must_use]
    pub fn describe(&self) -> String {
        self.label.to_string()
    }

    /// A command that has ended badly, in words; never waits.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        self.pipeline.as_ref().and_then(|pipeline| pipeline.failure())
    }

    /// Kills the commands, if it has any. (A wait elsewhere is ended by the `Stop` it was given.)
    pub fn kill(&self) {
        if let Some(pipeline) = &self.pipeline {
            pipeline.kill();
        }
    }

    /// The offset of the disk before which a sink has accepted, or a source has delivered,
    /// everything; exact also after a failure.
    #[must_use]
    pub fn accepted(&self) -> u64 {
        self.counters.accepted.load(Ordering::Acquire)
    }

    /// Why `error` came from it, for the user: `'zstd' exited with status 1: No space left`.
    /// Waits up to a second for a command that has just gone to say why.
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
            // In this order: what ends between the two is asked about once more.
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
