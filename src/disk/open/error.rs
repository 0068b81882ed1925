//! Why a disk is not opened: each reason is one line for the user.

use std::io;
use std::path::PathBuf;

use crate::base::BaseError;
use crate::base::self_reference::SelfReferenceError;
use crate::disk::PartitionsError;
use crate::overlay::stack::StackError;

/// Why a disk cannot be mounted; each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its base.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A file of it lies where it would wait for itself.
    #[error(transparent)]
    SelfReference(#[from] SelfReferenceError),
    /// Its overlay.
    #[error("overlay '{}' {error}", dir.display())]
    Overlay {
        /// The overlay's directory.
        dir: PathBuf,
        /// What is wrong with it.
        error: StackError,
    },
    /// The overlay belongs to something else, or to something that has changed.
    #[error("overlay '{}' {why}", dir.display())]
    Mismatch {
        /// The overlay's directory.
        dir: PathBuf,
        /// What does not fit and what to do.
        why: String,
    },
    /// No file for a temporary overlay.
    #[error("no temporary overlay in '{}': {error}; set TMPDIR to a directory on a disk", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// The host's answer.
        error: io::Error,
    },
    /// The base could not be read to recognise it later.
    #[error("base '{}' cannot be read: {error}", path.display())]
    Unreadable {
        /// The base.
        path: PathBuf,
        /// The host's answer.
        error: io::Error,
    },
    /// The files of its overlay, on a file system that has no direct I/O.
    #[error(
        "overlay '{}' cannot be written past the host's cache, its file system has no O_DIRECT ({}): leave out direct, or put it on ext4, XFS or btrfs",
        dir.display(), crate::host::os_message(error)
    )]
    NoDirect {
        /// The directory of the overlay, or of the files of a temporary one.
        dir: PathBuf,
        /// The host's answer.
        error: io::Error,
    },
    /// Its sink or its source.
    #[error("{0}")]
    Stream(String),
    /// Its partitions.
    #[error(transparent)]
    Partitions(#[from] PartitionsError),
    /// There is nothing to keep.
    #[error("{0}")]
    NothingToKeep(String),
}

impl OpenError {
    /// The host's errno behind it, if there is one.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Overlay { error: StackError::Io { error, .. }, .. }
            | Self::Temporary { error, .. }
            | Self::Unreadable { error, .. } => error.raw_os_error(),
            _ => None,
        }
    }
}
