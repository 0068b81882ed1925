//! A file that was found under a path and is held without being open.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use super::{FileAccess, open_nonblocking, wrong_type_error};

/// A file that was found under a path and is not open. Examining it waits for nothing and starts
/// nothing, and exactly the file that was judged is opened later, whatever happens to the path.
#[derive(Debug)]
pub struct PathHandle {
    fd: OwnedFd,
    metadata: Metadata,
}

impl PathHandle {
    /// Finds the file at `path`. Links are followed, whoever made them: this is for a file that the user
    /// names to be read, such as the base of a disk. A file that is written or trusted is found by
    /// [`trusted_path::locate`](crate::trusted_path::locate).
    ///
    /// # Errors
    /// The host's errno.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Self::of(File::from(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Holds `file`, which was opened with `O_PATH`.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { fd: file.into(), metadata })
    }

    /// Returns the metadata of the file at the time when it was found.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Returns the present path of the file: absolute, without links.
    ///
    /// # Errors
    /// The host's errno; `ENOENT` for a file that has no name any more.
    pub fn real_path(&self) -> io::Result<PathBuf> {
        real_path(&self.fd)
    }

    /// Opens the file for input, as [`open_input`](super::open_input) does.
    ///
    /// # Errors
    /// The errors of [`open_input`](super::open_input).
    pub fn open_input(&self, access: FileAccess) -> io::Result<File> {
        let kind = self.metadata.file_type();
        if kind.is_file() || kind.is_block_device() {
            self.open(access.flags())
        } else {
            Err(wrong_type_error(kind))
        }
    }

    /// Opens the file without waiting for the other end of a pipe or for a terminal.
    ///
    /// # Errors
    /// The host's errno.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        open_nonblocking(CWD, Path::new(&proc_fd_path(&self.fd)), flags)
    }
}

/// Returns the path of an open file or directory: absolute, without links, and verified to lead to
/// the file.
///
/// A descriptor may come from another mount namespace (`/proc/PID/root/...`), in which the same
/// path leads to something else. So the path is opened again, without links, and must be the same
/// inode on the same mount. Mount ids are unique among all namespaces (proc_pid_mountinfo(5)).
///
/// # Errors
/// The host's errno; `ENOENT` for a file that has no name any more; a line when the path does not lead
/// to the file.
pub fn real_path(fd: impl AsFd) -> io::Result<PathBuf> {
    let mut tries = 3;
    loop {
        let path = std::fs::read_link(proc_fd_path(&fd))?;
        // The kernel marks unlinked files this way; a file may also have such a name.
        let is_gone = path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)")
            && rustix::fs::fstat(&fd)?.st_nlink == 0;
        if is_gone || !path.is_absolute() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        if leads_to(&path, &fd)? {
            return Ok(path);
        }
        // A directory on the path may have been renamed meanwhile.
        tries -= 1;
        if tries == 0 {
            let shown = path.display();
            let line =
                format!("its path '{shown}' leads elsewhere: it is in another mount namespace");
            return Err(io::Error::other(line));
        }
    }
}

/// Whether `path`, which contains no links, leads to the file `fd`: the same inode on the same mount.
fn leads_to(path: &Path, fd: impl AsFd) -> io::Result<bool> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let there = match rustix::fs::openat2(CWD, path, flags, Mode::empty(), resolve) {
        Ok(there) => there,
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if mount_id(&there)? != mount_id(&fd)? {
        return Ok(false);
    }
    let (there, here) = (rustix::fs::fstat(&there)?, rustix::fs::fstat(&fd)?);
    Ok((there.st_dev, there.st_ino) == (here.st_dev, here.st_ino))
}

/// Returns the id of the mount that `fd` was opened on, as in `/proc/self/mountinfo`, without asking
/// the file system.
///
/// # Errors
/// The host's errno; `ENOSYS` on a kernel that does not report the id.
pub fn mount_id(fd: impl AsFd) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path)?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    Ok(id.ok_or(Errno::NOSYS)?)
}

/// `STATX_MNT_ID_UNIQUE` (linux/stat.h, since 6.8): an id that no later mount gets.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What tells one mount from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MountIds {
    /// The id of mountinfo. The kernel gives it to a later mount once this one is gone.
    pub(crate) id: u64,
    /// The id that no later mount gets, if the kernel has one and lets this user ask.
    pub(crate) unique: Option<u64>,
}

impl MountIds {
    /// Returns the ids of the mount that `fd` was opened on, without asking the file system.
    ///
    /// # Errors
    /// The errors of [`mount_id`].
    pub(crate) fn of(fd: impl AsFd) -> io::Result<Self> {
        let id = mount_id(&fd)?;
        // EACCES: a mount of another user, which answers nobody else. Its parent and its id identify
        // it then, as on a kernel without unique ids.
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let unique = rustix::fs::statx(&fd, "", flags, MNT_ID_UNIQUE).ok();
        let has_id = |stat: &rustix::fs::Statx| stat.stx_mask & MNT_ID_UNIQUE.bits() != 0;
        Ok(Self { id, unique: unique.filter(has_id).map(|stat| stat.stx_mnt_id) })
    }

    /// Returns whether `fd` was opened on this mount. Where the unique id is not known, a later mount
    /// with the same id counts as this one.
    ///
    /// # Errors
    /// The errors of [`mount_id`].
    pub(crate) fn are_of(self, fd: impl AsFd) -> io::Result<bool> {
        let found = Self::of(fd)?;
        Ok(found.id == self.id && (self.unique.is_none() || found.unique == self.unique))
    }
}

/// Opens the file of `fd` once more, with `O_PATH`: a descriptor that gives no access to it.
///
/// # Errors
/// The host's errno.
pub(crate) fn open_path(fd: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::open(proc_fd_path(fd), flags, Mode::empty())?)
}

/// Returns the path by which the kernel opens a descriptor's file once more (proc(5)).
fn proc_fd_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
