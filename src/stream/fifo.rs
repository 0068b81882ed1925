//! Named pipes.

use std::io;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, mkfifoat, stat};
use rustix::io::Errno;

use super::error::SinkError;

/// Makes the named pipe `path`, for its owner only, if nothing is there.
pub(super) fn ensure(path: &Path) -> Result<(), SinkError> {
    let found = match stat(path) {
        Err(Errno::NOENT) => match mkfifoat(CWD, path, Mode::RUSR | Mode::WUSR) {
            Ok(()) => return Ok(()),
            // Somebody was faster, or it is a link that leads nowhere.
            Err(Errno::EXIST) => stat(path),
            Err(error) => {
                return Err(SinkError::host("make the named pipe", path, &error.into()));
            }
        },
        found => found,
    };
    let found = found.map_err(|error| SinkError::host("open", path, &error.into()))?;
    match FileType::from_raw_mode(found.st_mode) {
        FileType::Fifo => Ok(()),
        kind => Err(SinkError::wrong(
            path,
            word_for(kind),
            "fifo: needs a named pipe, or nothing there",
        )),
    }
}

/// A file type in words.
pub(super) fn word_for(kind: FileType) -> &'static str {
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

/// `EINVAL` when `fd` is no named pipe: it was one when it was looked at.
pub(super) fn check(fd: impl std::os::fd::AsFd) -> io::Result<()> {
    match FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode) {
        FileType::Fifo => Ok(()),
        _ => Err(Errno::INVAL.into()),
    }
}
