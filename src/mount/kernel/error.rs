//! Why a mount does not come about: each reason is one line for the user.

use std::io;
use std::path::PathBuf;

/// Why a mount could not be made. Every message is one line with its remedy.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no `/dev/fuse`, or a container does not let us have it.
    #[error("no /dev/fuse: in a container add --device /dev/fuse --cap-add SYS_ADMIN")]
    NoDevice,
    /// `/dev/fuse` is there and does not open.
    #[error("cannot open /dev/fuse: {error}: load the module with modprobe fuse")]
    Device {
        /// What open(2) said.
        error: io::Error,
    },
    /// `/dev/fuse` is root's alone, and the helper opens it as the user.
    #[error("users may not open /dev/fuse: chmod 666 /dev/fuse as root, or mount as root")]
    DeviceRootOnly,
    /// A user without the set-uid helper.
    #[error("not root and no fusermount3: install the package fuse3")]
    NoFusermount,
    /// `allow_other` asked for by a user whom the host does not let.
    #[error(
        "allow_other is not permitted: \
         add the line user_allow_other to /etc/fuse.conf, or mount as root"
    )]
    AllowOther,
    /// `mount(2)` is `EPERM` for a root that lacks the capability.
    #[error("mounting on '{}' is not permitted: in a container add --cap-add SYS_ADMIN",
        .mountpoint.display())]
    NotPermitted {
        /// Where it should have gone.
        mountpoint: PathBuf,
    },
    /// The kernel, or fusermount3, refused for another reason.
    #[error("cannot mount on '{}': {reason}", .mountpoint.display())]
    Refused {
        /// Where it should have gone.
        mountpoint: PathBuf,
        /// What the kernel or the helper said, in one line.
        reason: String,
    },
    /// The mountpoint is not there.
    #[error("mountpoint '{}' does not exist: create it with mkdir", .0.display())]
    Missing(PathBuf),
    /// The mountpoint is something else.
    #[error("mountpoint '{}' is not a directory: name an empty directory", .0.display())]
    NotADirectory(PathBuf),
    /// What is in the mountpoint would be hidden.
    #[error("mountpoint '{}' is not empty: name an empty directory, or add -o nonempty",
        .0.display())]
    NotEmpty(PathBuf),
    /// A live cowslip is mounted there.
    #[error("'{}' is already a cowslip mount: name another, or cowslip umount it first",
        .0.display())]
    AlreadyMounted(PathBuf),
    /// A dead mount that is not ours to clear.
    #[error("'{path}' is a dead {fstype} mount: unmount it with umount -l '{path}'",
        path = .mountpoint.display())]
    ForeignDead {
        /// Where it is.
        mountpoint: PathBuf,
        /// Whose it is, as mountinfo names it.
        fstype: String,
    },
    /// A dead cowslip mount that does not go away.
    #[error("cannot clear the dead cowslip mount on '{path}': {error}: run umount -l '{path}' \
         as root", path = .mountpoint.display())]
    ClearDead {
        /// Where it is.
        mountpoint: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The mountpoint cannot be looked at.
    #[error("cannot look at mountpoint '{}': {error}", .mountpoint.display())]
    Inspect {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// What the host said.
        error: io::Error,
    },
}
