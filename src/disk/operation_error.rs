//! Errors of operations on a disk's layers.

use std::io;

use crate::config::format_size;
use crate::host::is_out_of_space;
use crate::overlay::error::OverlayError;
use crate::overlay::reflink::ReflinkError;

/// The reason why an operation on a disk's layers failed; one line each. Each
/// operation says what has changed by then.
#[derive(Debug, thiserror::Error)]
pub enum OperationError {
    /// The disk has no overlay: `mode=ro`, `mode=rw`, or a stream.
    #[error("it has no overlay: only copy-on-write disks have {0}")]
    NoOverlay(&'static str),
    /// The name cannot be a snapshot's.
    #[error("'{name}' {why}")]
    BadName {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A snapshot of this name exists.
    #[error("there is a snapshot '{0}' already: take another name, or delete that one first")]
    SnapshotExists(String),
    /// No snapshot of this name exists.
    #[error("there is no snapshot '{0}': cowslip snapshot --list shows those there are")]
    NoSnapshot(String),
    /// The disk is open for writing.
    #[error("it is open for writing")]
    Writers,
    /// The disk is open, and the kernel would keep its old size.
    #[error(
        "it is open, and would go from {} to {}, which the kernel does not see of an open file under --cache writeback: close it everywhere, then try again",
        format_size(*from), format_size(*to)
    )]
    OpenAtOldSize {
        /// The size in bytes.
        from: u64,
        /// The new one.
        to: u64,
    },
    /// The disk has no base to reset to.
    #[error(
        "it was detached from its base by hydrate, so a reset leaves nothing of it: use --force if you mean it"
    )]
    Detached,
    /// Another operation is running.
    #[error("{0} is going on: wait for its end")]
    Busy(&'static str),
    /// A sync has failed.
    #[error("it is read-only since a sync failed: unmount it and see the log")]
    Latched,
    /// An interrupted commit has left the base in between.
    #[error("a commit of it was cut short: cowslip commit finishes it, then try again")]
    CommitUnfinished,
    /// A writer does not finish.
    #[error("a change still waits for the base or the host: try again")]
    WriterStuck,
    /// The mount ends, or the client is gone.
    #[error("interrupted: nothing is lost, run it again")]
    Interrupted,
    /// The overlay's files failed.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The reflink overlay failed.
    #[error("it {0}")]
    Reflink(ReflinkError),
    /// The host has no room for a copy of layers.
    #[error(
        "its layers are not merged for lack of space: a copy takes {}, and {} are free",
        format_size(*needed),
        format_size(*free)
    )]
    NoRoomToMerge {
        /// Bytes that the copy takes.
        needed: u64,
        /// Bytes that are free.
        free: u64,
    },
    /// The host failed.
    #[error("{what}: {error}")]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The host's error.
        error: io::Error,
    },
    /// The operation cannot be done to this disk: why, and the remedy.
    #[error("{0}")]
    Refused(String),
}

impl From<ReflinkError> for OperationError {
    fn from(error: ReflinkError) -> Self {
        match error {
            // What was being done, where the others go on from the name of the overlay.
            ReflinkError::Overlay(error) => Self::Overlay(error),
            error => Self::Reflink(error),
        }
    }
}

impl OperationError {
    /// Whether the host, or a quota on it, is full.
    #[must_use]
    pub fn is_out_of_space(&self) -> bool {
        match self {
            Self::NoRoomToMerge { .. } => true,
            Self::Io { error, .. } | Self::Overlay(OverlayError::Io { error, .. }) => {
                is_out_of_space(error)
            }
            _ => false,
        }
    }

    /// Turns a host's error into an [`OperationError`] that names the failed action.
    pub(super) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(libc::EINTR) => Self::Interrupted,
            _ => Self::Io { what, error },
        }
    }
}
