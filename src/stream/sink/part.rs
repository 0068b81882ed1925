//! A file that gets its name only when it is whole.
//!
//! It is written as `NAME.part`, under a lock, so that two streams cannot write one. What an
//! aborted stream has left under that name is used again; it stays until then for whoever wants
//! to see how far the stream came.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, fchmod, flock, fstat,
    linkat, renameat, renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::spec::Overwrite;
use crate::stream::error::SinkError;
use crate::stream::fifo::word_for;
use crate::stream::said;

/// The file while it is written; the lock ends with it.
#[derive(Debug)]
pub(super) struct Part {
    file: File,
    /// `NAME.part`.
    part: PathBuf,
    path: PathBuf,
    overwrite: Overwrite,
}

impl Part {
    /// Makes `path`.part, empty. `mode`: of the file that is to be replaced, if there is one; its
    /// successor is readable for nobody else.
    pub(super) fn create(
        path: &Path,
        overwrite: Overwrite,
        mode: Option<Mode>,
    ) -> Result<Self, SinkError> {
        let mut part = OsString::from(path);
        part.push(".part");
        let part = PathBuf::from(part);
        let file = loop {
            // Between open and lock its stream may have finished, and renamed it.
            if let Some(file) = open_locked(&part, mode)? {
                break file;
            }
        };
        let emptied = file.set_len(0).and_then(|()| match mode {
            Some(mode) => Ok(fchmod(&file, mode)?),
            None => Ok(()),
        });
        emptied.map_err(|error| SinkError::host("empty", &part, &error))?;
        Ok(Self { file, part, path: path.to_owned(), overwrite })
    }

    /// The file, to write into.
    pub(super) fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// It is whole: makes it `size` bytes long, if given, durable, and gives it its name.
    pub(super) fn commit(&self, size: Option<u64>) -> Result<(), String> {
        let complete = |verb: &str, done: io::Result<()>| {
            let part = self.part.display();
            done.map_err(|error| format!("cannot {verb} '{part}': {}", said(&error)))
        };
        if let Some(size) = size {
            complete("end", self.file.set_len(size))?;
        }
        complete("write", self.file.sync_all())?;
        self.rename().map_err(|error| match error {
            Errno::EXIST => format!(
                "'{}' was made by somebody else meanwhile: the stream is whole in '{}'",
                self.path.display(),
                self.part.display()
            ),
            error => format!(
                "cannot rename '{}' to '{}': {}",
                self.part.display(),
                self.path.display(),
                said(&error.into())
            ),
        })?;
        sync_parent(&self.path).map_err(|error| {
            format!("cannot write the directory of '{}': {}", self.path.display(), said(&error))
        })
    }

    /// Nothing was written into it: it goes.
    pub(super) fn remove(&self) {
        // The lock is still held, so it is ours. What stays is in nobody's way.
        let _ = unlinkat(CWD, &self.part, AtFlags::empty());
    }

    fn rename(&self) -> Result<(), Errno> {
        let (from, to) = (&self.part, &self.path);
        if self.overwrite == Overwrite::Yes {
            return renameat(CWD, from, CWD, to);
        }
        match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
            // The file system cannot. A link refuses an existing name too.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            done => return done,
        }
        match linkat(CWD, from, CWD, to, AtFlags::empty()) {
            Ok(()) => unlinkat(CWD, from, AtFlags::empty()),
            Err(Errno::EXIST) => Err(Errno::EXIST),
            // No links either: look first, which leaves a moment for somebody to be faster.
            Err(_) => match statat(CWD, to, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => Err(Errno::EXIST),
                Err(Errno::NOENT) => renameat(CWD, from, CWD, to),
                Err(error) => Err(error),
            },
        }
    }
}

/// Opens and locks `part`; `None` when that is not the file of this name any more.
fn open_locked(part: &Path, mode: Option<Mode>) -> Result<Option<File>, SinkError> {
    let failed = |error: Errno| SinkError::host("write", part, &error.into());
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    // NONBLOCK: what is there may be a named pipe.
    let flags = flags | OFlags::NONBLOCK | OFlags::NOCTTY;
    let all = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
    let fd = rustix::fs::open(part, flags, mode.unwrap_or(all)).map_err(failed)?;
    let found = fstat(fd.as_fd()).map_err(failed)?;
    let kind = FileType::from_raw_mode(found.st_mode);
    if kind != FileType::RegularFile {
        return Err(SinkError::wrong(
            part,
            word_for(kind),
            "remove it; the stream is written there",
        ));
    }
    match flock(&fd, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(SinkError::Busy(part.to_owned())),
        Err(error) => return Err(failed(error)),
    }
    let is_same = match statat(CWD, part, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(named) => (named.st_dev, named.st_ino) == (found.st_dev, found.st_ino),
        Err(_) => false,
    };
    Ok(is_same.then(|| File::from(fd)))
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    match File::open(parent)?.sync_all() {
        // Some file systems cannot sync a directory; there it is as durable as it gets.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}
