//! Named pipes as ends of a stream: created for their owner, and opened without waiting. Also the
//! size and the mode of every pipe that carries a stream.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, mkfifoat};
use rustix::io::Errno;
use rustix::pipe::fcntl_setpipe_size;

use super::error::StreamOpenError;
use crate::confined::is_own;
use crate::host;
use crate::trusted_path;

/// The size of a pipe in bytes: 1 MiB, the most that an unprivileged process may ask for. It evens
/// out the speeds of its two ends.
const PIPE_SIZE: usize = 1 << 20;

/// Creates the named pipe `path`, for its owner only, if nothing is there.
///
/// # Errors
/// [`StreamOpenError::WrongKind`] if something else, or another user's pipe, is there; the host's
/// error.
pub(super) fn create_missing(path: &Path) -> Result<(), StreamOpenError> {
    let found = match trusted_path::locate(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => match make(path) {
            Ok(()) => return Ok(()),
            // Another process was faster, or the path is a link that leads nowhere.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                trusted_path::locate(path)
            }
            Err(error) => return Err(StreamOpenError::host("make the named pipe", path, &error)),
        },
        found => found,
    };
    let found = found.map_err(|error| StreamOpenError::host("open", path, &error))?;
    let found = found.metadata();
    match FileType::from_raw_mode(found.mode()) {
        // The owner of a pipe can open it again, and read what is sent or send what is read.
        FileType::Fifo if !is_own(found.uid()) => Err(StreamOpenError::wrong_kind(
            path,
            "a named pipe of another user",
            "fifo: needs a named pipe of your own, or nothing there",
        )),
        FileType::Fifo => Ok(()),
        kind => Err(StreamOpenError::wrong_kind(
            path,
            file_type_name(kind),
            "fifo: needs a named pipe, or nothing there",
        )),
    }
}

fn make(path: &Path) -> io::Result<()> {
    let (dir, name) = trusted_path::parent_and_name(path)?;
    Ok(mkfifoat(trusted_path::open_dir(dir)?, name, Mode::RUSR | Mode::WUSR)?)
}

/// Returns the words for a file type, for messages.
pub(super) fn file_type_name(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Fifo => "a named pipe",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Symlink | FileType::Unknown => "no file",
    }
}

/// Opens the named pipe `path`; returns a descriptor that does not block.
///
/// # Errors
/// `EINVAL` if the path is no named pipe any more; `EPERM` if the pipe is another user's by now;
/// `ENXIO` for a writer if there is no reader; the host's errno.
pub(super) fn open(path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    let located = trusted_path::locate(path)?;
    if !located.metadata().file_type().is_fifo() {
        return Err(Errno::INVAL.into());
    }
    // The owner of a pipe without a name is its creator, not the holder of the other end.
    if !is_own(located.metadata().uid()) || located.real_path().is_err() {
        return Err(Errno::PERM.into());
    }
    Ok(host::set_nonblocking(located.open(access)?)?)
}

/// Makes `pipe` as large as it may be.
pub(super) fn enlarge(pipe: &OwnedFd) {
    // The user's limit on pipe memory may be used up; a smaller pipe is only slower.
    let _: Result<usize, Errno> = fcntl_setpipe_size(pipe, PIPE_SIZE);
}
