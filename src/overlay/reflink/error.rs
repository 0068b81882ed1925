//! Why a reflink overlay cannot do what it was asked; each is one line for the user.

use std::io;
use std::path::PathBuf;

use super::intent::RevertTarget;
use crate::overlay::stack::StackError;

/// What is wrong with a reflink overlay. The overlay's path is put in front by the caller.
#[derive(Debug, thiserror::Error)]
pub enum ReflinkError {
    /// Its directory, its `stack` or its lock.
    #[error(transparent)]
    Stack(#[from] StackError),
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
        /// The host's answer.
        error: io::Error,
    },
    /// The base is not a file that could be shared.
    #[error("needs a file as its base for reflink, and this is {0}: leave out reflink")]
    Base(&'static str),
    /// It is there, of the other kind.
    #[error("keeps a block map: leave out reflink, how an overlay works is fixed at creation")]
    Blocks,
    /// No such snapshot.
    #[error("has no snapshot '{0}'")]
    NoSnapshot(String),
    /// There is one of that name.
    #[error("has a snapshot '{0}' already: take another name, or delete that one first")]
    Exists(String),
    /// It cannot be a snapshot's name.
    #[error("cannot have a snapshot '{name}': {why}")]
    Name {
        /// The name, as it was given, printable.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The note on an unfinished revert cannot be read.
    #[error(
        "is in the middle of a revert or a reset, and its 'intent' is damaged: put one there from a backup"
    )]
    Intent,
    /// An unfinished revert could not be finished.
    #[error("is in the middle of a {of}, which cannot be finished: {error}")]
    Unfinished {
        /// What had begun.
        of: RevertTarget,
        /// The host's answer.
        error: io::Error,
    },
    /// A sync failed before.
    #[error("is read-only since a sync failed: unmount it and mount it again")]
    Latched,
}

impl ReflinkError {
    /// The host's errno behind it, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Stack(StackError::Io { error, .. })
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
