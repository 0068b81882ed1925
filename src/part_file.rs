//! A file that gets its name only when it is whole.
//!
//! ```text
//!   NAME.part, locked ──written──> synced ──rename──> NAME ──> its directory synced
//! ```
//!
//! All of it is done in the directory as it was opened first: a name of it that leads elsewhere
//! later has nothing to say. The lock keeps two writers from sharing one. What was cut short stays as `NAME.part`, for
//! whoever wants to see how far it came, or to go on with it. A name that is there already is
//! replaced only when asked for, also when somebody makes it at the last moment.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, flock, linkat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

use crate::config::Overwrite;
use crate::confined;
use crate::host::{os_message, sync_dir};

/// Why there is no part; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum PartFileError {
    /// Somebody else is writing it.
    #[error("'{}' is being written by another cowslip: wait for it", .0.display())]
    Busy(PathBuf),
    /// Something else than a file is in its place.
    #[error("'{}' is no file: remove it", path.display())]
    NotAFile {
        /// The part.
        path: PathBuf,
        /// What it is.
        kind: FileType,
    },
    /// The host refuses.
    #[error("cannot {verb} '{}': {}", path.display(), os_message(error))]
    Host {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host says.
        error: io::Error,
    },
}

impl PartFileError {
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
pub fn part_path(name: &Path) -> PathBuf {
    with_suffix(name, ".part")
}

/// A name in its directory, which is open.
#[derive(Clone, Debug)]
pub struct FileSlot {
    dir: Arc<File>,
    name: OsString,
}

impl FileSlot {
    /// That of `path`.
    ///
    /// # Errors
    /// `EISDIR` when it does not end with a name; the host's errno for its directory.
    pub fn of(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| io::Error::from(Errno::ISDIR))?;
        let dir = match path.parent() {
            Some(dir) if dir != Path::new("") => dir,
            _ => Path::new("."),
        };
        Ok(Self { dir: Arc::new(confined::open_dir(dir)?), name: name.to_owned() })
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &File {
        &self.dir
    }

    /// The name with `suffix` at its end.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> OsString {
        let mut name = self.name.clone();
        name.push(suffix);
        name
    }

    /// The name of the part.
    fn part_name(&self) -> OsString {
        self.with_suffix(".part")
    }
}

/// A part, locked as long as this is there.
#[derive(Debug)]
pub struct PartFile {
    file: Arc<File>,
    slot: FileSlot,
    path: PathBuf,
    name: PathBuf,
}

impl PartFile {
    /// The part of `name` that is there, locked; `None` when there is none.
    ///
    /// # Errors
    /// [`PartFileError`]: another one has it, it is no file, the host refuses.
    pub fn find(name: &Path) -> Result<Option<Self>, PartFileError> {
        let path = part_path(name);
        let slot =
            FileSlot::of(name).map_err(|error| PartFileError::host("write", &path, error))?;
        loop {
            let Some(file) = open_existing(&slot, &path, OFlags::RDWR)? else { return Ok(None) };
            lock(&file, &path)?;
            // Whoever had the lock may have renamed or replaced it.
            if is_still_named(&file, &slot) {
                return Ok(Some(Self { file: Arc::new(file), slot, path, name: name.to_owned() }));
            }
        }
    }

    /// The part of `name` that is there, to be read and not locked, and where it is.
    ///
    /// # Errors
    /// As [`find`](Self::find).
    pub fn open_unlocked(name: &Path) -> Result<Option<(File, FileSlot)>, PartFileError> {
        let path = part_path(name);
        let slot = FileSlot::of(name).map_err(|error| PartFileError::host("read", &path, error))?;
        Ok(open_existing(&slot, &path, OFlags::RDONLY)?.map(|file| (file, slot)))
    }

    /// A new, empty part of `name`, in place of `old`, the one that was found there. `mode`: of the
    /// new file, less the umask.
    ///
    /// # Errors
    /// [`PartFileError`]: another one was faster, the host refuses.
    pub fn create(name: &Path, old: Option<Self>, mode: u32) -> Result<Self, PartFileError> {
        let path = part_path(name);
        let failed = |error: io::Error| PartFileError::host("write", &path, error);
        let slot = match &old {
            Some(old) => old.slot.clone(),
            None => FileSlot::of(name).map_err(failed)?,
        };
        // Another inode than the old one's, which nothing that was said of that can mean.
        if old.is_some() {
            confined::remove_file(slot.dir(), slot.part_name()).map_err(failed)?;
        }
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::from_raw_mode(mode);
        let fd = match rustix::fs::openat(slot.dir(), slot.part_name(), flags, mode) {
            Ok(fd) => fd,
            Err(Errno::EXIST) => return Err(PartFileError::Busy(path)),
            Err(error) => return Err(failed(error.into())),
        };
        drop(old);
        let file = File::from(fd);
        lock(&file, &path)?;
        // Before it was locked another one may have found it, and begun anew.
        if !is_still_named(&file, &slot) {
            return Err(PartFileError::Busy(path));
        }
        Ok(Self { file: Arc::new(file), slot, path, name: name.to_owned() })
    }

    /// The file, to write into.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Its name in its directory, to which that of the part is a longer one.
    #[must_use]
    pub fn slot(&self) -> &FileSlot {
        &self.slot
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
        synced.map_err(|error| format!("cannot write '{path}': {}", os_message(&error)))?;
        self.rename(overwrite).map_err(|error| rename_error(&self.path, &self.name, error))?;
        let synced = sync_dir(self.slot.dir());
        synced.map_err(|error| {
            format!("cannot write the directory of '{name}': {}", os_message(&error))
        })
    }

    /// Removes it: there is nothing in it that anybody wants.
    pub fn remove(&self) {
        // The lock is still held, so it is ours. What stays is in nobody's way.
        let _ = confined::remove_file(self.slot.dir(), self.slot.part_name());
    }

    fn rename(&self, overwrite: Overwrite) -> Result<(), Errno> {
        let (dir, from, to) = (self.slot.dir(), self.slot.part_name(), &self.slot.name);
        rename(dir, &from, to, overwrite)
    }
}

/// A new file that has no name until it is whole, so that whoever is killed before that leaves
/// nothing. Where the file system has no files without a name it is a [`PartFile`].
#[derive(Debug)]
pub struct UnnamedFile {
    file: Arc<File>,
    slot: FileSlot,
    name: PathBuf,
    /// Where it had to be one.
    part: Option<PartFile>,
}

impl UnnamedFile {
    /// A new, empty file that is to be `name`. `mode`: of the file, less the umask.
    ///
    /// # Errors
    /// [`PartFileError`].
    pub fn create(name: &Path, mode: u32) -> Result<Self, PartFileError> {
        let failed = |error: io::Error| PartFileError::host("write", name, error);
        let slot = FileSlot::of(name).map_err(failed)?;
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let name = name.to_owned();
        match rustix::fs::openat(slot.dir(), ".", flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => Ok(Self { file: Arc::new(File::from(fd)), slot, name, part: None }),
            // As kernels and file systems say that they have none.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let part = PartFile::create(&name, PartFile::find(&name)?, mode)?;
                Ok(Self { file: Arc::clone(part.file()), slot, name, part: Some(part) })
            }
            Err(error) => Err(failed(error.into())),
        }
    }

    /// The file, to write into.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where it is meanwhile, if anywhere: whoever is ended by a signal removes it there.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.part.as_ref().map(PartFile::path)
    }

    /// Gives it up: nothing of it stays.
    pub fn discard(self) {
        if let Some(part) = &self.part {
            part.remove();
        }
    }

    /// It is whole: makes it durable and gives it its name.
    ///
    /// # Errors
    /// A line for the user; what could not be named is at [`part_path`] its name, if it says so.
    pub fn commit(self, overwrite: Overwrite) -> Result<(), String> {
        if let Some(part) = self.part {
            return part.commit(overwrite);
        }
        let name = self.name.display();
        self.file
            .sync_all()
            .map_err(|error| format!("cannot write '{name}': {}", os_message(&error)))?;
        if overwrite == Overwrite::No {
            match self.link(&self.slot.name) {
                Err(Errno::EXIST) => {}
                Err(error) => {
                    return Err(format!("cannot name '{name}': {}", os_message(&error.into())));
                }
                Ok(()) => return self.sync_dir(),
            }
        }
        // A link replaces nothing: it needs a name of its own first.
        let old = PartFile::find(&self.name).map_err(|error| error.to_string())?;
        if let Some(old) = &old {
            old.remove();
        }
        let part = self.slot.part_name();
        self.link(&part)
            .and_then(|()| rename(self.slot.dir(), &part, &self.slot.name, overwrite))
            .map_err(|error| rename_error(&part_path(&self.name), &self.name, error))?;
        self.sync_dir()
    }

    fn link(&self, name: &OsStr) -> Result<(), Errno> {
        let of_descriptor = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        let flags = AtFlags::SYMLINK_FOLLOW;
        linkat(rustix::fs::CWD, of_descriptor, self.slot.dir(), name, flags)
    }

    fn sync_dir(&self) -> Result<(), String> {
        let name = self.name.display();
        let synced = sync_dir(self.slot.dir());
        synced.map_err(|error| {
            format!("cannot write the directory of '{name}': {}", os_message(&error))
        })
    }
}

/// Why the whole file at `path` has not become `name`.
fn rename_error(path: &Path, name: &Path, error: Errno) -> String {
    let (path, name) = (path.display(), name.display());
    match error {
        Errno::EXIST => {
            format!("'{name}' was made by somebody else meanwhile: all of it is in '{path}'")
        }
        error => format!("cannot rename '{path}' to '{name}': {}", os_message(&error.into())),
    }
}

/// Renames `from` to `to` in `dir`; over another file only when that was asked for.
fn rename(dir: &File, from: &OsStr, to: &OsStr, overwrite: Overwrite) -> Result<(), Errno> {
    if overwrite == Overwrite::Yes {
        return renameat(dir, from, dir, to);
    }
    match renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        // The file system cannot. A link refuses an existing name too.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return done,
    }
    match linkat(dir, from, dir, to, AtFlags::empty()) {
        Ok(()) => unlinkat(dir, from, AtFlags::empty()),
        Err(Errno::EXIST) => Err(Errno::EXIST),
        // No links either: look first, which leaves a moment for somebody to be faster.
        Err(_) => match statat(dir, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => renameat(dir, from, dir, to),
            Err(error) => Err(error),
        },
    }
}

/// The part that is there, open; nothing is waited for, and nothing but a file is taken.
fn open_existing(
    slot: &FileSlot,
    path: &Path,
    access: OFlags,
) -> Result<Option<File>, PartFileError> {
    // NONBLOCK: what is there may be a named pipe.
    let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let is_no_file = |kind| PartFileError::NotAFile { path: path.to_owned(), kind };
    let file = match rustix::fs::openat(slot.dir(), slot.part_name(), flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => {
            // The errno of a link, a pipe or a socket tells nobody what it is.
            let found = statat(slot.dir(), slot.part_name(), AtFlags::SYMLINK_NOFOLLOW);
            let kind = found.map(|found| FileType::from_raw_mode(found.st_mode));
            return Err(match kind {
                Ok(kind) if kind != FileType::RegularFile => is_no_file(kind),
                _ => PartFileError::host("open", path, error),
            });
        }
    };
    let found = file.metadata().map_err(|error| PartFileError::host("read", path, error))?;
    if !found.is_file() {
        return Err(is_no_file(FileType::from_raw_mode(found.mode())));
    }
    Ok(Some(file))
}

fn lock(file: &File, path: &Path) -> Result<(), PartFileError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(PartFileError::Busy(path.to_owned())),
        Err(error) => Err(PartFileError::host("lock", path, error)),
    }
}

/// Whether `file` still is the part of `slot`.
fn is_still_named(file: &File, slot: &FileSlot) -> bool {
    match (file.metadata(), statat(slot.dir(), slot.part_name(), AtFlags::SYMLINK_NOFOLLOW)) {
        (Ok(file), Ok(named)) => (file.dev(), file.ino()) == (named.st_dev, named.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_part_is_one_writers_and_is_found_again_once_he_is_gone() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        assert!(PartFile::find(&name).unwrap().is_none());
        let part = PartFile::create(&name, None, 0o600).unwrap();
        assert!(matches!(PartFile::find(&name), Err(PartFileError::Busy(_))));
        assert!(matches!(PartFile::create(&name, None, 0o600), Err(PartFileError::Busy(_))));
        fs::write(part.path(), b"half").unwrap();
        drop(part);
        let old = PartFile::find(&name).unwrap().unwrap();
        let inode = old.file().metadata().unwrap().ino();
        assert_eq!(fs::read(old.path()).unwrap(), b"half");
        let new = PartFile::create(&name, Some(old), 0o600).unwrap();
        let found = new.file().metadata().unwrap();
        assert!(found.len() == 0 && found.ino() != inode, "it is another one");
    }

    #[test]
    fn a_name_is_replaced_only_when_asked_for() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        let part = PartFile::create(&name, None, 0o600).unwrap();
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
        rustix::fs::mkfifoat(rustix::fs::CWD, part_path(&name), Mode::RUSR | Mode::WUSR).unwrap();
        let found = PartFile::find(&name).unwrap_err();
        assert!(matches!(found, PartFileError::NotAFile { kind: FileType::Fifo, .. }), "{found}");
    }

    #[test]
    fn a_fresh_file_is_nowhere_until_it_has_its_name() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        let names = || {
            let entries = fs::read_dir(home.path()).unwrap().flatten();
            let mut names: Vec<_> = entries.map(|entry| entry.file_name()).collect();
            names.sort();
            names
        };
        let make = |bytes: &[u8]| {
            let fresh = UnnamedFile::create(&name, 0o640).unwrap();
            assert_eq!(fresh.path(), None);
            rustix::io::pwrite(fresh.file(), bytes, 0).unwrap();
            fresh
        };
        drop(make(b"given up"));
        assert!(names().is_empty());
        make(b"first").commit(Overwrite::No).unwrap();
        assert_eq!((names(), fs::read(&name).unwrap()), (vec!["x".into()], b"first".to_vec()));
        assert_eq!(fs::metadata(&name).unwrap().mode() & 0o777 & !0o640, 0);
        // An old part is in nobody's way.
        fs::write(part_path(&name), "old").unwrap();
        make(b"second").commit(Overwrite::Yes).unwrap();
        assert_eq!((names(), fs::read(&name).unwrap()), (vec!["x".into()], b"second".to_vec()));
        let line = make(b"third").commit(Overwrite::No).unwrap_err();
        assert!(line.contains("x.part'"), "{line}");
        assert_eq!(fs::read(&name).unwrap(), b"second");
        assert_eq!(fs::read(part_path(&name)).unwrap(), b"third");
    }
}
