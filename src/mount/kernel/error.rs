//! The reasons why a mount cannot be made, each with one line for the user.

use std::io;
use std::path::PathBuf;

/// The reason why a mount could not be made. Every message is one line with its remedy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MountError {
    /// There is no `/dev/fuse`, or a container forbids it.
    #[error("no /dev/fuse: in a container add --device /dev/fuse --cap-add SYS_ADMIN")]
    NoDevice,
    /// `/dev/fuse` exists and cannot be opened.
    #[error("cannot open /dev/fuse: {error}: load the module with modprobe fuse")]
    Device {
        /// The error of open(2).
        error: io::Error,
    },
    /// Only root may open `/dev/fuse`, and the helper opens it as the user.
    #[error("users may not open /dev/fuse: chmod 666 /dev/fuse as root, or mount as root")]
    DeviceRootOnly,
    /// The caller is not root, and the set-uid helper is missing.
    #[error("not root and no fusermount3: install the package fuse3")]
    NoFusermount,
    /// The host does not permit `allow_other` for this user.
    #[error(
        "allow_other is not permitted: \
         add the line user_allow_other to /etc/fuse.conf, or mount as root"
    )]
    AllowOther,
    /// mount(2) returned `EPERM`: root lacks the capability.
    #[error("mounting on '{}' is not permitted: in a container add --cap-add SYS_ADMIN",
        .mountpoint.display())]
    NotPermitted {
        /// The mountpoint.
        mountpoint: PathBuf,
    },
    /// The kernel, or fusermount3, refused for another reason.
    #[error("cannot mount on '{}': {reason}", .mountpoint.display())]
    Refused {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The message of the kernel or the helper, in one line.
        reason: String,
    },
    /// The mountpoint does not exist.
    #[error("mountpoint '{}' does not exist: create it with mkdir", .0.display())]
    Missing(PathBuf),
    /// The mountpoint is not a directory.
    #[error("mountpoint '{}' is not a directory: name an empty directory", .0.display())]
    NotADirectory(PathBuf),
    /// The mountpoint has contents, which the mount would hide.
    #[error("mountpoint '{}' is not empty: name an empty directory, or add -o nonempty",
        .0.display())]
    NotEmpty(PathBuf),
    /// A live cowslip mount is there.
    #[error("'{}' is already a cowslip mount: name another, or cowslip umount it first",
        .0.display())]
    AlreadyMounted(PathBuf),
    /// A dead mount of another program is there, and is left alone.
    #[error("'{path}' is a dead {fstype} mount: unmount it with umount -l '{path}'",
        path = .mountpoint.display())]
    ForeignDead {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The file system type from mountinfo.
        fstype: String,
    },
    /// A dead cowslip mount cannot be unmounted.
    #[error("cannot clear the dead cowslip mount on '{path}': {error}: run umount -l '{path}' \
         as root", path = .mountpoint.display())]
    ClearDead {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The error of umount(2).
        error: io::Error,
    },
    /// The mountpoint cannot be inspected.
    #[error("cannot look at mountpoint '{}': {error}", .mountpoint.display())]
    Inspect {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The host's error.
        error: io::Error,
    },
}
