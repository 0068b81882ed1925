//! Why something was not done to a disk's layers.

use std::io;

use crate::overlay::reflink::ReflinkError;
use crate::overlay::stack::StackError;

/// Why an operation on a disk's layers was not done; one line each. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// `mode=ro`, `mode=rw`, a stream.
    #[error("it has no overlay: only copy-on-write disks have {0}")]
    NoOverlay(&'static str),
    /// A name that cannot be a snapshot's.
    #[error("'{name}' {why}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is one already.
    #[error("there is a snapshot '{0}' already: take another name, or delete that one first")]
    SnapshotExists(String),
    /// There is none.
    #[error("there is no snapshot '{0}': cowslip snapshot --list shows those there are")]
    NoSnapshot(String),
    /// Somebody may be writing.
    #[error("it is open for writing")]
    Writers,
    /// There is no base to go back to.
    #[error(
        "it stands alone since it was hydrated, so a reset leaves nothing of it: use --force if you mean it"
    )]
    Detached,
    /// One thing at a time.
    #[error("{0} is going on: wait for its end")]
    Busy(&'static str),
    /// A sync has failed.
    #[error("it is read-only since a sync failed: unmount it and see the log")]
    Latched,
    /// Its base is neither old nor new.
    #[error("a commit of it was cut short: cowslip commit finishes it, then try again")]
    CommitUnfinished,
    /// A writer does not come back.
    #[error("a change still waits for the base or the host: try again")]
    WriterStuck,
    /// The mount ends, or nobody waits for it any more.
    #[error("interrupted: nothing is lost, run it again")]
    Interrupted,
    /// Its files.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// Its reflink overlay.
    #[error("it {0}")]
    Reflink(#[from] ReflinkError),
    /// The host said no.
    #[error("{what}: {error}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        error: io::Error,
    },
    /// It cannot be done to this disk; what, and what to do.
    #[error("{0}")]
    Refused(String),
}

impl OperationError {
    /// Names what was being done when the host said no.
    pub(in crate::disk) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(libc::EINTR) => Self::Interrupted,
            _ => Self::Io { what, error },
        }
    }
}
