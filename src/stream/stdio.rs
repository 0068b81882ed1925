//! The standard input and output of the daemon as ends of a stream.
//!
//! `O_NONBLOCK` belongs to an open file description, which we share with whoever started us: set
//! on it, it would surprise them. So a pipe is opened once more, for a description of our own, and
//! where that cannot be the single calls are made such that they do not block.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Mode, OFlags, fstat, fstatfs};
use rustix::io::{Errno, fcntl_dupfd_cloexec};

/// How one reads or writes without being kept: by what a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FdMode {
    /// It is `O_NONBLOCK`, and of our own: poll, and then a call that may say `EAGAIN`.
    NonBlocking,
    /// Shared with others, and may block: poll, and then little enough that it does not.
    SharedBlocking,
    /// A socket, shared: poll, and a flag on each call.
    Socket,
    /// A file: poll says nothing about it, and every call ends by itself.
    Plain,
}

/// `PIPE_BUF`: what a pipe takes at once, without blocking, where poll says that it is writable
/// (pipe(7)).
pub(super) const PIPE_BUF: usize = 4096;

/// `statfs` of a pipe without a name (linux/magic.h).
const PIPEFS_MAGIC: i64 = 0x5049_5045;

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Direction {
    Reading,
    Writing,
}

/// A descriptor of our own for `fd`, and how to use it.
///
/// # Errors
/// `ENXIO` when it is a pipe that nobody reads; the errno of a call that failed.
pub(super) fn acquire(fd: BorrowedFd<'_>, way: Direction) -> io::Result<(OwnedFd, FdMode)> {
    let dup = || fcntl_dupfd_cloexec(fd, 3);
    let manner = match FileType::from_raw_mode(fstat(fd)?.st_mode) {
        FileType::Fifo => match reopen_pipe(fd, way) {
            Ok(Some(own)) => return Ok((own, FdMode::NonBlocking)),
            // Not ours to open (it is another user's), no /proc, or no use.
            Ok(None) | Err(Errno::ACCESS | Errno::PERM | Errno::NOENT | Errno::NOTDIR) => {
                FdMode::SharedBlocking
            }
            Err(error) => return Err(error.into()),
        },
        FileType::Socket => FdMode::Socket,
        FileType::CharacterDevice if way == Direction::Reading => FdMode::SharedBlocking,
        _ => FdMode::Plain,
    };
    Ok((dup()?, manner))
}

/// The pipe once more; `None` where that would lose something.
fn reopen_pipe(fd: BorrowedFd<'_>, way: Direction) -> Result<Option<OwnedFd>, Errno> {
    let access = match way {
        // A named pipe whose writer has gone already looks, opened anew, as if none had come yet.
        Direction::Reading if fstatfs(fd)?.f_type != PIPEFS_MAGIC => return Ok(None),
        Direction::Reading => OFlags::RDONLY,
        Direction::Writing => OFlags::WRONLY,
    };
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open(path, flags, Mode::empty()).map(Some)
}

/// Whether `fd` is a terminal.
pub(super) fn is_terminal(fd: impl AsFd) -> bool {
    std::io::IsTerminal::is_terminal(&fd.as_fd())
}
