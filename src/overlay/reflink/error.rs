//! The errors of reflink overlays, each one line for the user.

use std::io;
use std::path::PathBuf;

use super::intent::RevertSource;
use crate::overlay::error::OverlayError;

/// An error of a reflink overlay. The caller puts the overlay's path in front of the message.
#[derive(Debug, thiserror::Error)]
pub enum ReflinkError {
    /// An error of the directory, its `stack` or its lock.
    #[error(transparent)]
    Overlay(#[from] OverlayError),
    /// The base's blocks cannot be shared across file systems.
    #[error(
        "is not on the file system of its base '{}', so it cannot share its blocks: put it there, or leave out reflink",
        .0.display()
    )]
    Elsewhere(PathBuf),
    /// The file system cannot share blocks.
    #[error(
        "cannot share blocks with its base: {fs} has no reflinks here ({error}): use XFS or btrfs, or leave out reflink"
    )]
    NoReflinks {
        /// The file system.
        fs: &'static str,
        /// The host's error.
        error: io::Error,
    },
    /// The base is not a file that could be shared.
    #[error("needs a file as its base for reflink, and this is {0}: leave out reflink")]
    Base(String),
    /// The overlay exists and is of the other kind.
    #[error("keeps a block map: leave out reflink, how an overlay works is fixed at creation")]
    Blocks,
    /// There is no such snapshot.
    #[error("has no snapshot '{0}'")]
    NoSnapshot(String),
    /// There already is a snapshot of that name.
    #[error("has a snapshot '{0}' already: take another name, or delete that one first")]
    Exists(String),
    /// The name cannot be a snapshot's name.
    #[error("cannot have a snapshot '{name}': {why}")]
    Name {
        /// The name as given, escaped for printing.
        name: String,
        /// The reason why the name is invalid.
        why: &'static str,
    },
    /// The intent file of an unfinished revert cannot be read.
    #[error(
        "is in the middle of a revert or a reset, and its 'intent' is damaged: put one there from a backup"
    )]
    Intent,
    /// An unfinished revert could not be finished.
    #[error("is in the middle of a {of}, which cannot be finished: {error}")]
    Unfinished {
        /// The interrupted operation.
        of: RevertSource,
        /// The host's error.
        error: io::Error,
    },
    /// An earlier sync failed, or a revert could not be finished.
    #[error("is read-only since a sync failed: unmount it and mount it again")]
    Latched,
}

impl ReflinkError {
    /// Returns the errno that corresponds to this error, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Overlay(OverlayError::Io { error, .. })
            | Self::NoReflinks { error, .. }
            | Self::Unfinished { error, .. } => error.raw_os_error(),
            Self::NoSnapshot(_) => Some(libc::ENOENT),
            Self::Exists(_) => Some(libc::EEXIST),
            Self::Name { .. } => Some(libc::EINVAL),
            Self::Latched => Some(libc::EIO),
            _ => None,
        }
    }
}
