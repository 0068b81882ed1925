//! The errors of persistent overlays: of the directory, and of the log of one layer.

use std::io;
use std::path::{Path, PathBuf};

use uuid::Uuid;

use super::FORMAT_VERSION;
use crate::config::format_size;
use crate::host::mountinfo::{MountEntry, mount_at};
use crate::trust::TrustError;

/// The reason why a persistent overlay cannot be created or opened; each displays as one line, and
/// the caller puts the path in front.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// A system call on the host failed.
    #[error("{what}: {error}")]
    Io {
        /// The action that failed.
        what: &'static str,
        /// The host's error.
        error: io::Error,
    },
    /// The directory in which the overlay would be created does not exist.
    #[error("cannot be made: '{}' is no directory: make it first", .0.display())]
    NoParent(PathBuf),
    /// The overlay would lie inside a store, which removes what it does not know.
    #[error(
        "cannot be made: it lies inside the store '{}', which sweeps what it does not know: name the store itself, or a directory elsewhere",
        .0.display()
    )]
    InStore(PathBuf),
    /// Another user could have written to the directory.
    #[error(transparent)]
    Untrusted(#[from] TrustError),
    /// The directory holds something else.
    #[error("is not an overlay: it holds no 'stack'; name an empty or a new directory")]
    NotAnOverlay,
    /// The checksum of the `stack` does not match.
    #[error("its 'stack' is damaged (the checksum does not match): restore it from a backup")]
    Damaged,
    /// The `stack` is not the TOML that this version knows.
    #[error("its 'stack' is not understood: {0}")]
    Syntax(String),
    /// A command serves the base, which is started only when a user names it.
    #[error(
        "has a base that a command serves, and no overlay starts one: mount it with that command, \
         and name the mounted disk"
    )]
    Command,
    /// Another version wrote the `stack`.
    #[error(
        "has format version {0}, this cowslip knows version {FORMAT_VERSION}: use a newer cowslip"
    )]
    Version(u32),
    /// The overlay is a reflink overlay, which has no block map.
    #[error(
        "is a reflink overlay, which has no block map: it can only be mounted, over the base it was made with"
    )]
    Reflink,
    /// The directory is a disk of a store without that store.
    #[error(
        "holds no layers: a disk of a store has them in the store: mount that with --store, and \
         'cowslip keep' makes an overlay of its own of a disk"
    )]
    NoLayers,
    /// Another daemon has the overlay open.
    #[error("is in use by the cowslip mount at '{mountpoint}' (pid {pid}): {}",
        unmount_advice(.mountpoint))]
    InUse {
        /// The daemon's process id, 0 when unknown.
        pid: u32,
        /// The daemon's mountpoint.
        mountpoint: String,
    },
    /// The log of a layer cannot be used.
    #[error("layer {uuid}: {error}")]
    Log {
        /// The layer.
        uuid: Uuid,
        /// The reason.
        error: LogError,
    },
}

impl OverlayError {
    /// Names the action that failed, for [`Result::map_err`].
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Io { what, error }
    }
}

/// The reason why a layer cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// An I/O error of the host.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The log is not as it was written.
    #[error("the log is damaged at record {record} ({why}): restore the overlay from a backup")]
    Damaged {
        /// The first record that is not good, counted from 0.
        record: u64,
        /// The reason, in words.
        why: &'static str,
    },
    /// The data file ends before data that the log names.
    #[error(
        "the data file is too short, {} of data from byte {first} on are missing: restore the overlay from a backup",
        format_size(*bytes)
    )]
    DataMissing {
        /// Bytes of data that are missing.
        bytes: u64,
        /// The offset of the first of them on the disk.
        first: u64,
    },
    /// The layer needs recovery, but its file system is read-only.
    #[error(
        "it was not closed in good order, and its file system is read-only: mount it once where it can be written to"
    )]
    ReadOnly,
    /// A later version wrote the log.
    #[error("the log holds a record of kind {0}: it was written by a newer version of cowslip")]
    Newer(u8),
}

/// Tells the user how to end the daemon whose mount is, or was, at `mountpoint`.
fn unmount_advice(mountpoint: &str) -> &'static str {
    let is_mounted = |entry: MountEntry| entry.is_cowslip();
    match mount_at(Path::new(mountpoint)).is_some_and(is_mounted) {
        true => "unmount that first",
        false => {
            "nothing is mounted there any more, so somebody has a file of it open, or another mount \
             namespace has a copy: end that"
        }
    }
}
