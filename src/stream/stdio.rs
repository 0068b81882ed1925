//! The standard input and output of the daemon as ends of a stream.
//!
//! `O_NONBLOCK` belongs to the open file description, which we share with our parent: setting it
//! there would surprise the parent. So a pipe is opened once more, for a description of our own;
//! where that is impossible, each single call is made in a way that does not block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// The way to read or write a descriptor without blocking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FdMode {
    /// An `O_NONBLOCK` description of our own: poll, then a call that may return `EAGAIN`.
    NonBlocking,
    /// A description shared with other processes that may block: poll, then a transfer small enough
    /// not to block.
    SharedBlocking,
    /// A shared socket: poll, then a call with a non-blocking flag.
    Socket,
    /// A file: poll says nothing about it, and every call returns by itself.
    Plain,
}

/// `PIPE_BUF` in bytes: the amount that a pipe accepts at once without blocking when poll reports
/// it writable (pipe(7)).
pub(super) const PIPE_BUF: usize = 4096;

/// The `statfs` type of an unnamed pipe (linux/magic.h).
const PIPEFS_MAGIC: i64 = 0x5049_5045;

/// The direction of the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Reading,
    Writing,
}

/// Returns a descriptor of our own for `fd`, and how to use it.
///
/// # Errors
/// `ENXIO` if `fd` is a pipe without a reader; otherwise the errno of the call that failed.
pub(super) fn acquire(fd: BorrowedFd<'_>, direction: Direction) -> io::Result<(OwnedFd, FdMode)> {
    let dup = || fcntl_dupfd_cloexec(fd, 3);
    let mode = match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Fifo => match reopen_pipe(fd, direction) {
            Ok(Some(own)) => return Ok((own, FdMode::NonBlocking)),
            // The pipe cannot be opened (it is another user's), there is no /proc, or reopening
            // would lose something.
            Ok(None) | Err(Errno::ACCESS | Errno::PERM | Errno::NOENT | Errno::NOTDIR) => {
                FdMode::SharedBlocking
            }
            Err(error) => return Err(error.into()),
        },
        FileType::Socket => FdMode::Socket,
        FileType::CharacterDevice if direction == Direction::Reading => FdMode::SharedBlocking,
        _ => FdMode::Plain,
    };
    Ok((dup()?, mode))
}

/// Opens the pipe once more; returns `None` where that would lose something.
fn reopen_pipe(fd: BorrowedFd<'_>, direction: Direction) -> Result<Option<OwnedFd>, Errno> {
    let access = match direction {
        // Opened anew, a named pipe whose writer has already left looks as if no writer had come
        // yet.
        Direction::Reading if fstatfs(fd)?.f_type != PIPEFS_MAGIC => return Ok(None),
        Direction::Reading => OFlags::RDONLY,
        Direction::Writing => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(Some)
}

/// Returns whether `fd` is a terminal.
pub(super) fn is_terminal(fd: impl AsFd) -> bool {
    std::io::IsTerminal::is_terminal(&fd.as_fd())
}
