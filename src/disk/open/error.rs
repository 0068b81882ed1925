//! The reasons why a disk is not opened.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::BaseError;
use crate::base::self_reference::SelfReferenceError;
use crate::disk::base_description::UnreadableBase;
use crate::disk::partition::ShowPartitionsError;
use crate::overlay::error::OverlayError;

/// The reason why a disk cannot be mounted or kept; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The base cannot be opened.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A file of the disk lies inside the mount, where each would wait for the other.
    #[error(transparent)]
    SelfReference(#[from] SelfReferenceError),
    /// The overlay cannot be opened.
    #[error("overlay '{}' {error}", dir.display())]
    Overlay {
        /// The overlay's directory.
        dir: PathBuf,
        /// The overlay's error.
        error: OverlayError,
    },
    /// The overlay belongs to another base, or to a base that has changed.
    #[error("overlay '{}' {why}", dir.display())]
    Mismatch {
        /// The overlay's directory.
        dir: PathBuf,
        /// The mismatch, and the remedy.
        why: String,
    },
    /// A temporary overlay has no place for its files.
    #[error("no temporary overlay in '{}': {error}; set TMPDIR to a directory on a disk", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// The base cannot be read for the identity by which it is recognised later.
    #[error(transparent)]
    Unreadable(#[from] UnreadableBase),
    /// The overlay's files are on a file system without direct I/O.
    #[error(
        "overlay '{}' cannot be written past the host's cache, its file system has no O_DIRECT ({}): leave out direct, or put it on ext4, XFS or btrfs",
        dir.display(), crate::host::os_message(error)
    )]
    NoDirect {
        /// The directory of the overlay, or of the files of a temporary one.
        dir: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// The sink or the source of a stream fails.
    #[error("{0}")]
    Stream(String),
    /// The partitions cannot be shown.
    #[error(transparent)]
    Partitions(#[from] ShowPartitionsError),
    /// The disk cannot be kept or cloned, or not now: why, and the remedy.
    #[error("{0}")]
    Refused(String),
}

impl OpenError {
    /// Adds the overlay's directory to an error of the overlay.
    pub(in crate::disk) fn overlay(dir: &Path) -> impl FnOnce(OverlayError) -> Self {
        let dir = dir.to_owned();
        move |error| Self::Overlay { dir, error }
    }

    /// The host's errno, if the host caused the error.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Overlay { error: OverlayError::Io { error, .. }, .. }
            | Self::Temporary { error, .. }
            | Self::Unreadable(UnreadableBase { error, .. }) => error.raw_os_error(),
            _ => None,
        }
    }
}
