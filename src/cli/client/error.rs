//! The reasons why a mount gave no answer, in words for the user.

use std::io;
use std::path::PathBuf;

/// The reason why a mount did not answer; each displays as one line.
#[derive(Debug, thiserror::Error)]
pub(in crate::cli) enum AskError {
    /// The mount did not answer in time.
    #[error("the mount at '{path}' does not answer: cowslip umount -l '{path}' ends it",
        path = .0.display())]
    Silent(PathBuf),
    /// The mount's daemon has exited.
    #[error("the mount at '{path}' is dead: cowslip umount '{path}' clears it",
        path = .0.display())]
    Dead(PathBuf),
    /// Only the owner of the mount may ask.
    #[error("the mount at '{}' does not let you ask: do it as the user who mounted it",
        .0.display())]
    Denied(PathBuf),
    /// The mount belongs to another user, and its answers cannot be trusted.
    #[error(
        "the mount at '{}' is another user's (uid {uid}), who can have it answer anything: \
         do it as that user", .path.display()
    )]
    Foreign {
        /// The mountpoint.
        path: PathBuf,
        /// User ID of the owner.
        uid: u32,
    },
    /// The user interrupted the request, which also tells the daemon.
    #[error("interrupted")]
    Interrupted,
    /// The mount already runs the maximum number of requests.
    #[error("the mount at '{}' works on as many requests as it may: try again later", .0.display())]
    Full(PathBuf),
    /// The mount accepts no requests (`-o ro`).
    #[error("the mount at '{}' is read-only: nothing in it has changed or can be",
        .0.display())]
    ReadOnly(PathBuf),
    /// The mount has no such disk.
    #[error("there is no disk '{disk}' in the mount at '{}': cowslip status lists them",
        mountpoint.display())]
    NoDisk {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The requested name.
        disk: String,
    },
    /// The file is a partition of a disk.
    #[error("'{part}' is partition {number} of the disk '{disk}' and no disk: name '{}'",
        mountpoint.join(disk).display())]
    Partition {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// Name of the partition file.
        part: String,
        /// Name of the disk.
        disk: String,
        /// Number of the partition.
        number: u32,
    },
    /// The disk's name now belongs to another disk.
    #[error("'{}' was renamed, removed or replaced meanwhile: nothing is done: ask again",
        .0.display())]
    Changed(PathBuf),
    /// Any other error.
    #[error("cannot ask the mount at '{}': {error}", mountpoint.display())]
    Host {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// The disk is in use.
    #[error("{0}")]
    Busy(String),
    /// The mount refused the request, or failed to do it.
    #[error("{0}")]
    Refused(String),
}

/// The reason why a mount is not asked, or no longer. Carried by an [`io::Error`].
#[derive(Debug, thiserror::Error)]
pub(super) enum AskAbort {
    #[error("it is another user's")]
    Foreign(u32),
    #[error("interrupted")]
    Interrupted,
}
