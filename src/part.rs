//! A file that gets its name only when it is whole.
//!
//! ```text
//!   NAME.part, locked ──written──> synced ──rename──> NAME ──> its directory synced
//! ```
//!
//! The lock keeps two writers from sharing one. What was cut short stays as `NAME.part`, for
//! whoever wants to see how far it came, or to go on with it. A name that is there already is
//! replaced only when asked for, also when somebody makes it at the last moment.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Mode, OFlags, RenameFlags, flock, linkat,
    renameat_with, unlinkat,
};
use rustix::io::Errno;

use crate::host::{said, sync_dir_of};
use crate::spec::Overwrite;

/// Why there is no part; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum PartError {
    /// Somebody else is writing it.
    #[error("'{}' is being written by another cowslip: wait for it", .0.display())]
    Busy(PathBuf),
    /// Something else than a file is in its place.
    #[error("'{}' is no file: remove it", path.display())]
    NoFile {
        /// The part.
        path: PathBuf,
        /// What it is.
        kind: FileType,
    },
    /// The host refuses.
    #[error("cannot {verb} '{}': {}", path.display(), said(error))]
    Host {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
}

impl PartError {
    fn host(verb: &'static str, path: &Path, error: impl Into<io::Error>) -> Self {
        Self::Host { verb, path: path.to_owned(), error: error.into() }
    }
}

/// `path` with `suffix` at the end of its name.
#[must_use]
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Where the part of `name` is.
#[must_use]
pub fn path_for(name: &Path) -> PathBuf {
    with_suffix(name, ".part")
}

/// A part, locked as long as this is there.
#[derive(Debug)]
pub struct Part {
    file: Arc<File>,
    path: PathBuf,
    name: PathBuf,
}

impl Part {
    /// The part of `name` that is there, locked; `None` when there is none.
    ///
    /// # Errors
    /// [`PartError`]: another one has it, it is no file, the host refuses.
    pub fn find(name: &Path) -> Result<Option<Self>, PartError> {
        let path = path_for(name);
        // NONBLOCK: what is there may be a named pipe.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        loop {
            let file = match rustix::fs::open(&path, flags | OFlags::NOCTTY, Mode::empty()) {
                Ok(fd) => File::from(fd),
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(PartError::host("write", &path, error)),
            };
            let found = file.metadata().map_err(|error| PartError::host("read", &path, error))?;
            if !found.is_file() {
                return Err(PartError::NoFile {
                    path,
                    kind: FileType::from_raw_mode(found.mode()),
                });
            }
            lock(&file, &path)?;
            // Whoever had the lock may have renamed or replaced it.
            if is_at(&file, &path) {
                return Ok(Some(Self { file: Arc::new(file), path, name: name.to_owned() }));
            }
        }
    }

    /// A new, empty part of `name`, in place of `old`, the one that was found there. `mode`: of the
    /// new file, less the umask.
    ///
    /// # Errors
    /// [`PartError`]: another one was faster, the host refuses.
    pub fn create(name: &Path, old: Option<Self>, mode: u32) -> Result<Self, PartError> {
        let path = path_for(name);
        let failed = |error: Errno| PartError::host("write", &path, error);
        // Another inode than the old one's, which nothing that was said of that can mean.
        if old.is_some() {
            unlinkat(CWD, &path, AtFlags::empty()).map_err(failed)?;
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => fd,
            Err(Errno::EXIST) => return Err(PartError::Busy(path)),
            Err(error) => return Err(failed(error)),
        };
        drop(old);
        let file = File::from(fd);
        lock(&file, &path)?;
        // Before it was locked another one may have found it, and begun anew.
        if !is_at(&file, &path) {
            return Err(PartError::Busy(path));
        }
        Ok(Self { file: Arc::new(file), path, name: name.to_owned() })
    }

    /// The file, to write into.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Where it is until it is whole.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name it gets.
    #[must_use]
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// It is whole: makes it durable and gives it its name.
    ///
    /// # Errors
    /// A line for the user; unless the directory alone could not be synced, it is a part as before.
    pub fn commit(&self, overwrite: Overwrite) -> Result<(), String> {
        let (path, name) = (self.path.display(), self.name.display());
        // First: the name promises that all of it is there, also after a power cut.
        let synced = self.file.sync_all();
        synced.map_err(|error| format!("cannot write '{path}': {}", said(&error)))?;
        self.rename(overwrite).map_err(|error| match error {
            Errno::EXIST => {
                format!("'{name}' was made by somebody else meanwhile: all of it is in '{path}'")
            }
            error => format!("cannot rename '{path}' to '{name}': {}", said(&error.into())),
        })?;
        let synced = sync_dir_of(&self.name);
        synced.map_err(|error| format!("cannot write the directory of '{name}': {}", said(&error)))
    }

    /// Removes it: there is nothing in it that anybody wants.
    pub fn remove(&self) {
        // The lock is still held, so it is ours. What stays is in nobody's way.
        let _ = unlinkat(CWD, &self.path, AtFlags::empty());
    }

    fn rename(&self, overwrite: Overwrite) -> Result<(), Errno> {
        let (from, to) = (&self.path, &self.name);
        if overwrite == Overwrite::Yes {
            return rustix::fs::rename(from, to);
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
            Err(_) => match fs::symlink_metadata(to) {
                Ok(_) => Err(Errno::EXIST),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    rustix::fs::rename(from, to)
                }
                Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
            },
        }
    }
}

fn lock(file: &File, path: &Path) -> Result<(), PartError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(PartError::Busy(path.to_owned())),
        Err(error) => Err(PartError::host("lock", path, error)),
    }
}

/// Whether `path` still names `file`.
fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(file), Ok(named)) => (file.dev(), file.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_one_writers_and_is_found_again_once_he_is_gone() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        assert!(Part::find(&name).unwrap().is_none());
        let part = Part::create(&name, None, 0o600).unwrap();
        assert!(matches!(Part::find(&name), Err(PartError::Busy(_))));
        assert!(matches!(Part::create(&name, None, 0o600), Err(PartError::Busy(_))));
        fs::write(part.path(), b"half").unwrap();
        drop(part);
        let old = Part::find(&name).unwrap().unwrap();
        let inode = old.file().metadata().unwrap().ino();
        assert_eq!(fs::read(old.path()).unwrap(), b"half");
        let new = Part::create(&name, Some(old), 0o600).unwrap();
        let found = new.file().metadata().unwrap();
        assert!(found.len() == 0 && found.ino() != inode, "it is another one");
    }

    #[test]
    fn a_name_is_replaced_only_when_asked_for() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        let part = Part::create(&name, None, 0o600).unwrap();
        fs::write(part.path(), b"new").unwrap();
        fs::write(&name, b"old").unwrap();
        let line = part.commit(Overwrite::No).unwrap_err();
        assert!(line.contains("was made by somebody else meanwhile: all of it is in"), "{line}");
        assert_eq!((fs::read(&name).unwrap(), part.path().exists()), (b"old".to_vec(), true));
        part.commit(Overwrite::Yes).unwrap();
        assert_eq!((fs::read(&name).unwrap(), part.path().exists()), (b"new".to_vec(), false));
    }

    #[test]
    fn what_is_no_file_is_no_part() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        rustix::fs::mkfifoat(CWD, path_for(&name), Mode::RUSR | Mode::WUSR).unwrap();
        let found = Part::find(&name).unwrap_err();
        assert!(matches!(found, PartError::NoFile { kind: FileType::Fifo, .. }), "{found}");
    }
}
