//! A mount that is to be acted on: held such that nothing else can take its place.
//!
//! Between the look at a mount and what is done about it lie seconds in which the daemon works and
//! others may rename directories: the same path may lead to another mount by then. So the directory
//! that the mountpoint is in stays open, and the mount is told by its id:
//!
//! ```text
//!   /home/u/x/m      mountinfo: id 77 at /home/u/x/m
//!          │ └────── the last name, looked up in `parent` each time; its mount must be 77
//!          └──────── `parent`, open: renamed away or not, it is the same directory
//! ```
//!
//! A directory that something is mounted on cannot be renamed, so what has that name in `parent` is
//! the mount, or it was unmounted there. The mount itself must not be held open: it would be busy.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::Errno;

use super::unmount::{UnmountMode, unmount_in};
use crate::confined::mount_id;
use crate::host::mountinfo::{MountEntry, entry_at};

/// `STATX_MNT_ID_UNIQUE` (linux/stat.h, since 6.8): an id that no later mount gets.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// A mount that was found; see the module.
#[derive(Debug)]
pub struct MountHandle {
    entry: MountEntry,
    parent: OwnedFd,
    name: OsString,
    /// Where the kernel has it and lets us ask.
    unique_id: Option<u64>,
}

impl MountHandle {
    /// The topmost mount at exactly `path`; `None` when there is none.
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn at(path: &Path) -> io::Result<Option<Self>> {
        entry_at(path).map(Self::of).transpose()
    }

    /// The mount that `entry` tells of.
    ///
    /// # Errors
    /// `ESTALE` when it is not there any more; the errno of opening the directory that it is in.
    pub fn of(entry: MountEntry) -> io::Result<Self> {
        let (Some(parent), Some(name)) = (entry.mountpoint.parent(), entry.mountpoint.file_name())
        else {
            return Err(Errno::BUSY.into());
        };
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(parent, flags, Mode::empty())?;
        let name = name.to_owned();
        let mut held = Self { entry, parent, name, unique_id: None };
        let (id, unique) = held.mount_ids()?;
        if id != held.entry.id {
            return Err(Errno::STALE.into());
        }
        held.unique_id = unique;
        Ok(held)
    }

    /// What mountinfo said of it when it was found.
    #[must_use]
    pub fn entry(&self) -> &MountEntry {
        &self.entry
    }

    /// Where it was mounted when it was found.
    #[must_use]
    pub fn mountpoint(&self) -> &Path {
        &self.entry.mountpoint
    }

    /// A path that leads to it, whatever its directory is called by now; for this process alone.
    #[must_use]
    pub fn access_path(&self) -> PathBuf {
        self.directory().join(&self.name)
    }

    fn directory(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.parent.as_raw_fd()).into()
    }

    /// The ids of the mount that has the name now. No call is made into it.
    fn mount_ids(&self) -> io::Result<(u64, Option<u64>)> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let there = rustix::fs::openat(&self.parent, &self.name, flags, Mode::empty())?;
        let id = mount_id(&there)?;
        // EACCES: a mount of another user, which answers nobody else; its parent and its id are
        // what it is told by then, as on a kernel without unique ids.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let unique = rustix::fs::statx(there.as_fd(), "", flags, MNT_ID_UNIQUE).ok();
        let has_it = |stat: &rustix::fs::Statx| stat.stx_mask & MNT_ID_UNIQUE.bits() != 0;
        Ok((id, unique.filter(has_it).map(|stat| stat.stx_mnt_id)))
    }

    /// Whether it is still mounted where it was.
    #[must_use]
    pub fn is_mounted(&self) -> bool {
        self.mount_ids().is_ok_and(|(id, unique)| id == self.entry.id && unique == self.unique_id)
    }

    /// Unmounts it, and nothing else.
    ///
    /// # Errors
    /// `EINVAL` when it is not mounted there any more; `EBUSY` while somebody uses it; `EPERM` for
    /// a mount of another user; what fusermount3 said when that is none of these.
    pub fn unmount(&self, how: UnmountMode) -> io::Result<()> {
        if !self.is_mounted() {
            return Err(Errno::INVAL.into());
        }
        unmount_in(&self.directory(), &self.name, how)
    }
}
