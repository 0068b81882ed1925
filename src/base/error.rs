//! The error of opening a base.

use std::io;
use std::path::{Path, PathBuf};

use super::BaseAccess;
use super::advice::{reader_of, way_of_changes};
use super::foreign::error::ForeignError;
use super::lock::LockError;
use super::qcow2::ChainError;
use super::view::ViewError;
use crate::config::Format;
use crate::remote::RemoteError;

/// The reason why a base cannot be opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The path does not exist.
    #[error("base '{}' does not exist: check the path", .0.display())]
    Missing(PathBuf),
    /// The host denies the access.
    #[error(
        "no permission to {} base '{}': check its owner and mode, and those of its directories",
        verb(*access), path.display()
    )]
    Denied {
        /// The path as given.
        path: PathBuf,
        /// The access that was asked for.
        access: BaseAccess,
    },
    /// The path names neither a file nor a block device.
    #[error("base '{}' is {kind}: name a file or a block device", path.display())]
    NotAFile {
        /// The path as given.
        path: PathBuf,
        /// The kind of file found there, with its article: `a directory`.
        kind: String,
    },
    /// A device with nothing in it.
    #[error("base '{}' is an empty block device: put a medium in, or attach it first", .0.display())]
    EmptyDevice(PathBuf),
    /// A device that somebody has claimed.
    #[error(
        "'{}' is in use (mounted, or part of LVM, RAID or swap) and cannot be written: free it first",
        .0.display()
    )]
    DeviceBusy(PathBuf),
    /// The file has the marks of another format than raw.
    #[error(
        "'{}' looks like a {format} image: add ,format={format} (or ,format=raw for the bytes)",
        path.display()
    )]
    LooksLike {
        /// The path as given.
        path: PathBuf,
        /// The format whose marks it has.
        format: Format,
    },
    /// The base is encrypted, by its marks or by the user's word.
    #[error(
        "'{}' looks like a luks image: open it with cryptsetup and name the /dev/mapper device (or add ,format=raw for the encrypted bytes)",
        .0.display()
    )]
    Encrypted(PathBuf),
    /// Forensic images, which other programs show as raw ones.
    #[error(
        "'{}': {format} images are not read: let {} show it as a raw image, and name that (or add ,format=raw for the bytes)",
        path.display(), reader_of(path, *format)
    )]
    Forensic {
        /// The path as given.
        path: PathBuf,
        /// The format that was given, or whose marks the file has.
        format: Format,
    },
    /// The format is only read; QEMU writes such images.
    #[error(
        "'{}' is a {format} image, which is only read: keep the changes in an overlay, and then {}",
        path.display(), way_of_changes(*format)
    )]
    ReadOnlyFormat {
        /// The path as given.
        path: PathBuf,
        /// The format.
        format: Format,
    },
    /// The base is no file that the kernel could read and write itself.
    #[error(
        "'{}' is not a raw file, which alone is passed through: leave out passthrough",
        .0.display()
    )]
    NoPassthrough(PathBuf),
    /// The file system of the base has no direct I/O.
    #[error(
        "base '{}' cannot be read past the host's cache, its file system has no O_DIRECT ({}): leave out direct, or put it on ext4, XFS or btrfs",
        path.display(), crate::host::os_message(error)
    )]
    NoDirect {
        /// The path as given.
        path: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// A qcow2 image, or a file that it needs, cannot be used.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// QEMU cannot read the image, or is not there.
    #[error(transparent)]
    Foreign(#[from] ForeignError),
    /// The base has no such part.
    #[error("'{}' {error}", path.display())]
    Part {
        /// The path as given.
        path: PathBuf,
        /// The reason.
        error: ViewError,
    },
    /// The server cannot be reached, or does not have the image.
    #[error(transparent)]
    Remote(#[from] RemoteError),
    /// A stream has no base.
    #[error("a stream has no base")]
    Stream,
    /// A blank cannot be written to.
    #[error("blank: holds nothing that could be written: leave mode=rw away")]
    BlankIsReadOnly,
    /// Somebody else uses the base.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// Any other error of the host.
    #[error("cannot {} base '{}': {error}", verb(*access), path.display())]
    Io {
        /// The path as given.
        path: PathBuf,
        /// The access that was asked for.
        access: BaseAccess,
        /// The host's error.
        error: io::Error,
    },
}

impl BaseError {
    /// Converts the host's error from a use of `path`.
    pub(in crate::base) fn from_io(path: &Path, access: BaseAccess, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(path),
            Some(libc::EACCES | libc::EPERM) => Self::Denied { path, access },
            Some(libc::ENOMEDIUM) => Self::EmptyDevice(path),
            _ => Self::Io { path, access, error },
        }
    }
}

fn verb(access: BaseAccess) -> &'static str {
    match access {
        BaseAccess::Read => "read",
        BaseAccess::Write => "write",
    }
}
