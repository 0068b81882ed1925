//! A reference to a mount that stays right when paths change.
//!
//! Between finding a mount and unmounting it lie seconds in which the daemon works and others may
//! rename directories: the same path may lead to another mount by then. So the parent directory of
//! the mountpoint is kept open, and the mount is recognized by its id:
//!
//! ```text
//!   /home/u/x/m      mountinfo: id 77 at /home/u/x/m
//!          │ └────── the last name, looked up in `parent` each time; its mount must be 77
//!          └──────── `parent`, open: renamed away or not, it is the same directory
//! ```
//!
//! A directory that something is mounted on cannot be renamed, so that name in `parent` is the
//! mount, or the mount is gone. The mount itself must not be kept open: it would be busy.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::unmount::{UnmountMode, unmount_in};
use crate::confined::MountIds;
use crate::host::mountinfo::{MountEntry, mount_at, open_resolved};

/// A mount that was found, and can be found again. See the module.
#[derive(Debug)]
pub(crate) struct MountHandle {
    entry: MountEntry,
    parent: OwnedFd,
    name: OsString,
    ids: MountIds,
}

impl MountHandle {
    /// Finds the topmost mount at exactly `path`, which has no symlinks; `None` if there is none.
    ///
    /// # Errors
    /// The errors of [`of`](Self::of).
    pub(crate) fn at(path: &Path) -> io::Result<Option<Self>> {
        mount_at(path).map(Self::of).transpose()
    }

    /// Finds the mount that `entry` describes.
    ///
    /// # Errors
    /// `ESTALE` if the mount is gone; those of [`open_resolved`] for its parent directory.
    pub(crate) fn of(entry: MountEntry) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (entry.mountpoint.parent(), entry.mountpoint.file_name())
        else {
            return Err(Errno::BUSY.into());
        };
        let parent = OwnedFd::from(open_resolved(parent)?);
        let name = name.to_owned();
        let ids = find_ids(&parent, &name)?;
        if ids.id != entry.id {
            return Err(Errno::STALE.into());
        }
        Ok(Self { entry, parent, name, ids })
    }

    /// The entry of mountinfo from when the mount was found.
    #[must_use]
    pub(crate) fn entry(&self) -> &MountEntry {
        &self.entry
    }

    /// The mountpoint from when the mount was found.
    #[must_use]
    pub(crate) fn mountpoint(&self) -> &Path {
        &self.entry.mountpoint
    }

    /// A path to the mount, whatever its parent directory is called by now. Valid only in this
    /// process.
    #[must_use]
    pub(crate) fn access_path(&self) -> PathBuf {
        self.directory().join(&self.name)
    }

    /// The directory in which the mountpoint lies.
    pub(super) fn parent(&self) -> BorrowedFd<'_> {
        self.parent.as_fd()
    }

    /// The name of the mountpoint in its directory.
    pub(super) fn name(&self) -> &Path {
        Path::new(&self.name)
    }

    fn directory(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.parent.as_raw_fd()).into()
    }

    /// The ids of the mount from when it was found.
    #[must_use]
    pub(crate) fn ids(&self) -> MountIds {
        self.ids
    }

    /// Whether the mount is still where it was. Sends no request to the mount.
    #[must_use]
    pub(crate) fn is_mounted(&self) -> bool {
        find_ids(&self.parent, &self.name).is_ok_and(|ids| ids == self.ids)
    }

    /// Unmounts this mount and no other.
    ///
    /// # Errors
    /// `EINVAL` if the mount is gone; `EBUSY` while it is in use; `EPERM` for a mount of another user;
    /// any other message of fusermount3 as it is.
    pub(crate) fn unmount(&self, mode: UnmountMode) -> io::Result<()> {
        if !self.is_mounted() {
            return Err(Errno::INVAL.into());
        }
        unmount_in(&self.directory(), &self.name, mode)
    }
}

/// Returns the ids of the mount that is called `name` in `parent` now. Sends no request to the mount.
fn find_ids(parent: &OwnedFd, name: &OsStr) -> io::Result<MountIds> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    MountIds::of(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}
