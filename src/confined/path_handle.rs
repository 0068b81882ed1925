//! What a path leads to, held without being open.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{FileAccess, open_nonblocking, wrong_type_error};

/// What a path leads to, held without being open: looking at it waits for nothing and starts
/// nothing, and what was judged is what is opened, whatever becomes of the path meanwhile.
#[derive(Debug)]
pub struct PathHandle {
    fd: OwnedFd,
    metadata: Metadata,
}

impl PathHandle {
    /// What is at `path`; links are followed, whoever made them: for what a user names to read, such as
    /// the base of a disk. What is written or believed is found by
    /// [`trusted_path::locate`](crate::trusted_path::locate).
    ///
    /// # Errors
    /// The host's errno.
    pub fn at(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Self::of(File::from(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// What `file` is, which was opened with `O_PATH`.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn of(file: File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self { fd: file.into(), metadata })
    }

    /// What it is, as it was when it was found.
    #[must_use]
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Where it lies now: absolute, without links.
    ///
    /// # Errors
    /// The host's errno; `ENOENT` when it has no name any more.
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

    /// Opens it, without waiting: neither for the other end of a pipe nor for a terminal.
    ///
    /// # Errors
    /// The host's errno.
    pub fn open(&self, flags: OFlags) -> io::Result<File> {
        open_nonblocking(CWD, Path::new(&proc_fd_path(&self.fd)), flags)
    }
}

/// The path of the open file or directory: absolute, without links, and checked to lead to it.
///
/// A descriptor may come from another mount namespace (`/proc/PID/root/...`), in which the same
/// path leads to something else. So the path is opened again, without links, and must be the same
/// inode on the same mount. Mount ids are unique among all namespaces (proc_pid_mountinfo(5)).
///
/// # Errors
/// The host's errno; `ENOENT` when it has no name any more; a line when its path does not lead to it.
pub fn real_path(fd: impl AsFd) -> io::Result<PathBuf> {
    let mut tries = 3;
    loop {
        let path = std::fs::read_link(proc_fd_path(&fd))?;
        // The kernel marks what was unlinked so; a file may also be called that.
        let is_gone = path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)")
            && rustix::fs::fstat(&fd)?.st_nlink == 0;
        if is_gone || !path.is_absolute() {
            return Err(io::Error::from_raw_os_error(libc::ENOENT));
        }
        if leads_to(&path, &fd)? {
            return Ok(path);
        }
        // Its directory may have been renamed meanwhile.
        tries -= 1;
        if tries == 0 {
            let shown = path.display();
            let line =
                format!("its path '{shown}' leads elsewhere: it is in another mount namespace");
            return Err(io::Error::other(line));
        }
    }
}

/// Whether `path`, which has no links in it, leads to what `fd` is: the same inode on the same mount.
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

/// The id of the mount that `fd` was opened on, as in `/proc/self/mountinfo`. Nothing is asked of
/// the file system.
///
/// # Errors
/// The host's errno; `ENOSYS` when the kernel does not say.
pub fn mount_id(fd: impl AsFd) -> io::Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", fd.as_fd().as_raw_fd());
    let info = std::fs::read_to_string(path)?;
    let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    Ok(id.ok_or(Errno::NOSYS)?)
}

/// The name by which the kernel lets a descriptor be opened once more.
fn proc_fd_path(fd: impl AsFd) -> String {
    format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd())
}
