//! A file that gets its name only when it is complete.
//!
//! ```text
//!   NAME.part, locked ──written──> synced ──rename──> NAME ──> its directory synced
//! ```
//!
//! All operations use the directory as it was opened at the beginning; if its path later leads
//! elsewhere, that has no effect. The lock keeps two writers from sharing one part. After an
//! interruption `NAME.part` stays, so that the user can see how far the write came, or resume it.
//! An existing file of the final name is replaced only on request, even if another process creates
//! it at the last moment.
//!
//! A lock is on a file, not on its name: whoever may write the directory can give `NAME.part` to
//! another file. So a rename looks before it and after it which file has the name.

mod unnamed;

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, flock, fstat, linkat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::Errno;

pub use self::unnamed::UnnamedFile;
use crate::config::Overwrite;
use crate::confined;
use crate::host::{os_message, sync_dir};
use crate::trusted_path;

/// Why a part cannot be opened or created; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum PartFileError {
    /// Another process is writing the part.
    #[error("'{}' is being written by another cowslip: wait for it", .0.display())]
    Busy(PathBuf),
    /// Something other than a regular file has the part's name.
    #[error("'{}' is no file: remove it", path.display())]
    NotAFile {
        /// The path of the part.
        path: PathBuf,
        /// The type of file found there.
        kind: FileType,
    },
    /// Another user's file has the part's name.
    #[error("'{}' belongs to another user (uid {uid}): remove it", path.display())]
    Foreign {
        /// The path of the part.
        path: PathBuf,
        /// The owner of the file found there.
        uid: u32,
    },
    /// The host returned an error.
    #[error("cannot {verb} '{}': {}", path.display(), os_message(error))]
    Host {
        /// The operation that failed, as a verb for the message.
        verb: &'static str,
        /// The path the operation was for.
        path: PathBuf,
        /// The host's error.
        error: io::Error,
    },
}

impl PartFileError {
    fn host(verb: &'static str, path: &Path, error: impl Into<io::Error>) -> Self {
        Self::Host { verb, path: path.to_owned(), error: error.into() }
    }
}

/// Returns `path` with `suffix` appended to its name.
#[must_use]
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// Returns the path of the part of `name`.
#[must_use]
pub fn part_path(name: &Path) -> PathBuf {
    with_suffix(name, ".part")
}

/// A file name together with its open directory.
#[derive(Clone, Debug)]
pub struct FileSlot {
    dir: Arc<File>,
    name: OsString,
}

impl FileSlot {
    /// Opens the directory of `path` and keeps it with the last component of `path`.
    ///
    /// # Errors
    /// `EISDIR` if `path` does not end with a file name; the host's errno if the directory cannot
    /// be opened; a line about a link of another user on the way.
    pub fn of(path: &Path) -> io::Result<Self> {
        let (dir, name) = trusted_path::parent_and_name(path)?;
        Ok(Self { dir: Arc::new(trusted_path::open_dir(dir)?), name: name.to_owned() })
    }

    /// Returns the directory.
    #[must_use]
    pub fn dir(&self) -> &File {
        &self.dir
    }

    /// Returns the name with `suffix` appended.
    #[must_use]
    pub fn with_suffix(&self, suffix: &str) -> OsString {
        let mut name = self.name.clone();
        name.push(suffix);
        name
    }

    /// Returns the name of the part in the directory.
    fn part_name(&self) -> OsString {
        self.with_suffix(".part")
    }
}

/// A part, locked for as long as this value lives.
#[derive(Debug)]
pub struct PartFile {
    file: Arc<File>,
    slot: FileSlot,
    path: PathBuf,
    name: PathBuf,
}

impl PartFile {
    /// Opens and locks the existing part of `name`; returns `None` if there is none.
    ///
    /// # Errors
    /// [`PartFileError`]: another process holds the part, it is not a regular file, or the host
    /// refuses.
    pub fn find(name: &Path) -> Result<Option<Self>, PartFileError> {
        let path = part_path(name);
        let slot =
            FileSlot::of(name).map_err(|error| PartFileError::host("write", &path, error))?;
        loop {
            let Some(file) = open_existing(&slot, &path, OFlags::RDWR)? else { return Ok(None) };
            lock(&file, &path)?;
            // The previous holder of the lock may have renamed or replaced the file.
            if is_still_named(&file, &slot) {
                return Ok(Some(Self { file: Arc::new(file), slot, path, name: name.to_owned() }));
            }
        }
    }

    /// Opens the existing part of `name` for reading, without a lock; returns `None` if there is
    /// none.
    ///
    /// # Errors
    /// As for [`find`](Self::find).
    pub fn open_unlocked(name: &Path) -> Result<Option<(File, FileSlot)>, PartFileError> {
        let path = part_path(name);
        let slot = FileSlot::of(name).map_err(|error| PartFileError::host("read", &path, error))?;
        Ok(open_existing(&slot, &path, OFlags::RDONLY)?.map(|file| (file, slot)))
    }

    /// Creates an empty part of `name` with permissions `mode`, less the umask. `old` is the part
    /// found there before, which the new one replaces.
    ///
    /// # Errors
    /// [`PartFileError`]: another process was faster, or the host refuses.
    pub fn create(name: &Path, old: Option<Self>, mode: u32) -> Result<Self, PartFileError> {
        let path = part_path(name);
        let failed = |error: io::Error| PartFileError::host("write", &path, error);
        let slot = match &old {
            Some(old) => old.slot.clone(),
            None => FileSlot::of(name).map_err(failed)?,
        };
        // A new inode: whatever was recorded about the old file cannot be taken for this one.
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
        // Before the lock was taken, another process may have found the file and replaced it.
        if !is_still_named(&file, &slot) {
            return Err(PartFileError::Busy(path));
        }
        Ok(Self { file: Arc::new(file), slot, path, name: name.to_owned() })
    }

    /// Returns the file to write into.
    #[must_use]
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Returns the final name with its directory; the name of the part extends it.
    #[must_use]
    pub fn slot(&self) -> &FileSlot {
        &self.slot
    }

    /// Returns the path of the part, valid until [`commit`](Self::commit) renames it.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the final path.
    #[must_use]
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Makes the complete file durable and renames it to its final name.
    ///
    /// # Errors
    /// A line for the user. The file is still a part then, unless only syncing the directory
    /// failed.
    pub fn commit(&self, overwrite: Overwrite) -> Result<(), String> {
        let (path, name) = (self.path.display(), self.name.display());
        // Sync first: the name promises that all of the file is there, even after a power cut.
        let synced = self.file.sync_all();
        synced.map_err(|error| format!("cannot write '{path}': {}", os_message(&error)))?;
        rename(&self.file, self.slot.dir(), &self.slot.part_name(), &self.slot.name, overwrite)
            .map_err(|error| error.line(&self.path, &self.name))?;
        let synced = sync_dir(self.slot.dir());
        synced.map_err(|error| {
            format!("cannot write the directory of '{name}': {}", os_message(&error))
        })
    }

    /// Returns whether the file still has the name of a part: it was neither renamed nor replaced.
    #[must_use]
    pub fn has_its_name(&self) -> bool {
        is_still_named(&self.file, &self.slot)
    }

    /// Deletes the part when its content is not needed.
    pub fn remove(&self) {
        // If it cannot be deleted, it does no harm.
        if is_still_named(&self.file, &self.slot) {
            let _ = confined::remove_file(self.slot.dir(), self.slot.part_name());
        }
    }
}

/// Why a complete file could not be renamed to its final name.
enum RenameError {
    /// Another file has the name of the part.
    PartReplaced,
    /// Another file has the final name, or none has, although the rename succeeded.
    NameReplaced,
    /// The host returned an error; `EEXIST` for a file that may not be replaced.
    Host(Errno),
}

impl RenameError {
    /// Explains why the complete file at `path` could not be renamed to `name`.
    fn line(&self, path: &Path, name: &Path) -> String {
        let (path, name) = (path.display(), name.display());
        match self {
            Self::PartReplaced => format!(
                "'{path}' was replaced by another file meanwhile: '{name}' is not made, begin anew"
            ),
            Self::NameReplaced => format!(
                "'{name}' is not the file that was written: '{path}' or it was replaced meanwhile; \
                 look at it, and begin anew"
            ),
            Self::Host(Errno::EXIST) => {
                format!("'{name}' was made by somebody else meanwhile: all of it is in '{path}'")
            }
            Self::Host(error) => {
                format!("cannot rename '{path}' to '{name}': {}", os_message(&(*error).into()))
            }
        }
    }
}

/// Renames `file` from `from` to `to` in `dir`, replacing an existing file only with
/// [`Overwrite::Yes`].
fn rename(
    file: &File,
    dir: &File,
    from: &OsStr,
    to: &OsStr,
    overwrite: Overwrite,
) -> Result<(), RenameError> {
    match is_named(file, dir, from) {
        Ok(true) => {}
        Ok(false) => return Err(RenameError::PartReplaced),
        Err(error) => return Err(RenameError::Host(error)),
    }
    rename_by_name(dir, from, to, overwrite).map_err(RenameError::Host)?;
    match is_named(file, dir, to) {
        Ok(true) => Ok(()),
        Ok(false) | Err(Errno::NOENT) => Err(RenameError::NameReplaced),
        Err(error) => Err(RenameError::Host(error)),
    }
}

/// Renames whatever file has the name `from`.
fn rename_by_name(dir: &File, from: &OsStr, to: &OsStr, overwrite: Overwrite) -> Result<(), Errno> {
    if overwrite == Overwrite::Yes {
        return renameat(dir, from, dir, to);
    }
    match renameat_with(dir, from, dir, to, RenameFlags::NOREPLACE) {
        // The file system has no RENAME_NOREPLACE. A link refuses an existing name too.
        Err(Errno::INVAL | Errno::NOSYS) => {}
        done => return done,
    }
    match linkat(dir, from, dir, to, AtFlags::empty()) {
        Ok(()) => unlinkat(dir, from, AtFlags::empty()),
        Err(Errno::EXIST) => Err(Errno::EXIST),
        // No hard links either: look first, which leaves a short race with another process.
        Err(_) => match statat(dir, to, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Err(Errno::EXIST),
            Err(Errno::NOENT) => renameat(dir, from, dir, to),
            Err(error) => Err(error),
        },
    }
}

/// Opens the existing part without blocking; accepts regular files only.
fn open_existing(
    slot: &FileSlot,
    path: &Path,
    access: OFlags,
) -> Result<Option<File>, PartFileError> {
    // O_NONBLOCK: the file may be a named pipe.
    let flags = access | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
    let is_no_file = |kind| PartFileError::NotAFile { path: path.to_owned(), kind };
    let file = match rustix::fs::openat(slot.dir(), slot.part_name(), flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => {
            // The errno for a link, a pipe or a socket does not say what the file is.
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
    // Its owner could change what this process takes for written and checked.
    if !confined::is_own(found.uid()) {
        return Err(PartFileError::Foreign { path: path.to_owned(), uid: found.uid() });
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

/// Returns whether `file` still has the part's name in `slot`.
fn is_still_named(file: &File, slot: &FileSlot) -> bool {
    is_named(file, slot.dir(), &slot.part_name()).unwrap_or(false)
}

/// Returns whether `file` has the name `name` in `dir`; `ENOENT` if no file has it.
fn is_named(file: &File, dir: &File, name: &OsStr) -> Result<bool, Errno> {
    let (file, named) = (fstat(file)?, statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?);
    Ok((file.st_dev, file.st_ino) == (named.st_dev, named.st_ino))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_part_is_locked_by_its_writer_and_found_again_after_the_writer_ends() {
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
    fn an_existing_file_is_replaced_only_on_request() {
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
    fn a_file_that_took_the_name_of_the_part_is_not_renamed_and_not_removed() {
        let home = tempfile::tempdir().unwrap();
        let (name, away) = (home.path().join("x"), home.path().join("away"));
        for overwrite in [Overwrite::No, Overwrite::Yes] {
            let part = PartFile::create(&name, None, 0o600).unwrap();
            fs::write(part.path(), b"mine").unwrap();
            fs::rename(part.path(), &away).unwrap();
            let line = part.commit(overwrite).unwrap_err();
            assert!(line.starts_with("cannot rename"), "{line}");
            fs::write(part.path(), b"other").unwrap();
            let line = part.commit(overwrite).unwrap_err();
            assert!(line.contains("x.part' was replaced by another file meanwhile"), "{line}");
            part.remove();
            assert_eq!((fs::read(part.path()).unwrap(), name.exists()), (b"other".to_vec(), false));
            fs::rename(&away, part.path()).unwrap();
            part.commit(overwrite).unwrap();
            assert_eq!(fs::read(&name).unwrap(), b"mine");
            fs::remove_file(&name).unwrap();
        }
    }

    /// Only a check after the rename notices a file that comes between the first check and it.
    #[test]
    fn a_commit_that_succeeds_has_named_its_own_file_whatever_others_rename_meanwhile() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let home = tempfile::tempdir().unwrap();
        let (name, other) = (home.path().join("x"), home.path().join("other"));
        let (is_over, mut wrong) = (AtomicBool::new(false), 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    fs::write(&other, b"other").unwrap();
                    let _ = renameat_with(
                        rustix::fs::CWD,
                        &other,
                        rustix::fs::CWD,
                        part_path(&name),
                        RenameFlags::EXCHANGE,
                    );
                }
            });
            for _ in 0..200 {
                let Ok(part) = PartFile::create(&name, None, 0o600) else {
                    let _ = fs::remove_file(part_path(&name));
                    continue;
                };
                rustix::io::pwrite(&**part.file(), b"mine", 0).unwrap();
                if part.commit(Overwrite::Yes).is_ok() {
                    let found = fs::metadata(&name).map(|found| found.ino()).ok();
                    wrong += u32::from(found != part.file().metadata().map(|it| it.ino()).ok());
                }
                let _ = fs::remove_file(part_path(&name));
            }
            is_over.store(true, Ordering::Relaxed);
        });
        assert_eq!(wrong, 0);
    }

    #[test]
    fn find_refuses_a_part_that_is_not_a_regular_file() {
        let home = tempfile::tempdir().unwrap();
        let name = home.path().join("x");
        rustix::fs::mkfifoat(rustix::fs::CWD, part_path(&name), Mode::RUSR | Mode::WUSR).unwrap();
        let found = PartFile::find(&name).unwrap_err();
        assert!(matches!(found, PartFileError::NotAFile { kind: FileType::Fifo, .. }), "{found}");
    }
}
