//! The check whether a mount is alive, with a time limit: a mount may never answer.

use std::ffi::{CStr, CString};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use super::MountHandle;
use crate::host::mountinfo::{MountEntry, enclosing_mount, mount_at};

/// The state of a mount, of any file system type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MountHealth {
    /// Nothing is mounted at exactly this path.
    NotMounted,
    /// Not known to be dead: the mount answers, or does not let this user ask (a user's mount without
    /// `allow_other` refuses root, too).
    Alive,
    /// It did not answer in time.
    Silent,
    /// The daemon is gone: `ENOTCONN`.
    Dead,
}

/// How long a mount may take to answer. A dead one fails at once.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a mount may take to answer whose file somebody is about to open.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the state of the mount at `mountpoint`. Waits 2 seconds at most.
pub(crate) fn mount_health(mountpoint: &Path) -> MountHealth {
    match mount_at(mountpoint) {
        None => MountHealth::NotMounted,
        Some(entry) => probe(&entry, None, &entry.mountpoint, PROBE_TIMEOUT),
    }
}

/// The cowslip mount in which a file lies does not answer.
#[derive(Debug, thiserror::Error)]
#[error("the mount at '{}' does not answer", .0.display())]
pub(crate) struct SilentMountError(pub(crate) PathBuf);

/// Checks that a call on `path` returns: one into a cowslip mount whose daemon does not answer would
/// hang. Whether anything is there is left to whoever opens `path`. Waits 10 seconds at most.
///
/// # Errors
/// [`SilentMountError`].
pub(crate) fn check_answers(path: &Path) -> Result<(), SilentMountError> {
    let Some(found) = enclosing_mount(path) else { return Ok(()) };
    match probe(&found.mount, None, &found.mount.mountpoint, OPEN_TIMEOUT) {
        MountHealth::Silent => Err(SilentMountError(found.mount.mountpoint)),
        MountHealth::NotMounted | MountHealth::Alive | MountHealth::Dead => Ok(()),
    }
}

impl MountHandle {
    /// Returns the state of this mount, as [`mount_health`] does.
    #[must_use]
    pub(crate) fn health(&self) -> MountHealth {
        match self.is_mounted() {
            true => probe(self.entry(), Some(self.parent()), self.name(), PROBE_TIMEOUT),
            false => MountHealth::NotMounted,
        }
    }
}

/// Checks whether the mount `entry` answers, to which `path` leads from `dir` (`None`: an absolute
/// path). A FUSE mount of another user is
/// not asked: its server could read the request and never answer it.
///
/// A process that waits for such an answer cannot end, not even by SIGKILL (`request_wait_answer` in
/// fs/fuse/dev.c). So a child asks, and is left behind if it gets no answer in time.
fn probe(
    entry: &MountEntry,
    dir: Option<BorrowedFd<'_>>,
    path: &Path,
    timeout: Duration,
) -> MountHealth {
    if entry.is_foreign() {
        return MountHealth::Alive;
    }
    let (Ok(path), Ok((reader, writer))) =
        (CString::new(path.as_os_str().as_bytes()), pipe_with(PipeFlags::CLOEXEC))
    else {
        return MountHealth::Alive;
    };
    // SAFETY: between fork and _exit the child makes system calls and nothing else, so it does not
    // matter which locks other threads held.
    let child = match unsafe { libc::fork() } {
        // SAFETY: this is the child.
        0 => unsafe { ask_and_exit(dir.map(|dir| dir.as_raw_fd()), &path, writer.as_raw_fd()) },
        child if child > 0 => Pid::from_raw(child),
        _ => None,
    };
    let Some(child) = child else { return MountHealth::Alive };
    drop(writer);
    let timeout = Timespec { tv_sec: timeout.as_secs().cast_signed(), tv_nsec: 0 };
    let mut fds = [PollFd::new(&reader, PollFlags::IN)];
    let answered = rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout)));
    let mut error = [0; 4];
    if !answered.is_ok_and(|ready| ready > 0) || rustix::io::read(&reader, &mut error) != Ok(4) {
        let _ = kill_process(child, Signal::KILL);
        let _ = waitpid(Some(child), WaitOptions::NOHANG);
        return MountHealth::Silent;
    }
    let _ = waitpid(Some(child), WaitOptions::empty());
    match i32::from_ne_bytes(error) {
        // ECONNABORTED: the connection was aborted through /sys/fs/fuse.
        libc::ENOTCONN | libc::ECONNABORTED => MountHealth::Dead,
        _ => MountHealth::Alive,
    }
}

/// Requests the attributes of `path`, which begins at `dir`, writes the errno (0 for none) to `to`,
/// and ends this process.
///
/// It may have to wait for as long as the mount is there. So it first gives up all that it has of the
/// caller's: whoever reads our output, or waits for a lock of our parents, would wait as long.
///
/// # Safety
/// Only for the child of a fork: no destructor runs.
unsafe fn ask_and_exit(dir: Option<RawFd>, path: &CStr, to: RawFd) -> ! {
    // FORCE_SYNC: cached attributes outlive the daemon.
    let flags = libc::AT_STATX_FORCE_SYNC | libc::AT_NO_AUTOMOUNT;
    // SAFETY: the path ends with a zero byte, all zeros is a valid statx, and `to` is open.
    unsafe {
        // The working directory keeps its file system busy; a directory of ours goes by this, too.
        let entered = match dir {
            Some(dir) => libc::fchdir(dir),
            None => libc::chdir(c"/".as_ptr()),
        };
        if entered != 0 {
            libc::write(to, (*libc::__errno_location()).to_ne_bytes().as_ptr().cast(), 4);
            libc::_exit(0);
        }
        // close_range(2), Linux 5.9; an older kernel leaves them open, which is no reason to fail.
        // `to` is a valid descriptor, so it is not negative.
        let to_number = to.cast_unsigned();
        if to_number > 0 {
            libc::syscall(libc::SYS_close_range, 0, to_number - 1, 0);
        }
        libc::syscall(libc::SYS_close_range, to_number + 1, libc::c_uint::MAX, 0);
        let mut found: libc::statx = std::mem::zeroed();
        let result = libc::statx(
            libc::AT_FDCWD,
            path.as_ptr(),
            flags,
            libc::STATX_BASIC_STATS,
            &raw mut found,
        );
        let error = if result == 0 { 0 } else { *libc::__errno_location() };
        libc::write(to, error.to_ne_bytes().as_ptr().cast(), 4);
        libc::_exit(0);
    }
}
