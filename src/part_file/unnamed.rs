//! A file without a name until it is complete.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, linkat, openat};
use rustix::io::Errno;
use uuid::Uuid;

use super::{FileSlot, PartFileError, is_named, rename};
use crate::config::Overwrite;
use crate::confined;
use crate::host::{os_message, sync_dir};

/// A new file without a name until it is complete, so that a killed writer leaves nothing behind.
/// Where it needs a temporary name (on a file system without `O_TMPFILE`, and to replace a file), that
/// is `NAME.XXXXXXXX.part`, which nobody else has: `NAME.part` may be one that can be resumed. A killed
/// writer may leave such a file behind; nothing reads it.
#[derive(Debug)]
pub struct UnnamedFile {
    file: File,
    slot: FileSlot,
    name: PathBuf,
    /// The temporary name, once there is one.
    temp: Option<TempName>,
}

/// A temporary name.
#[derive(Debug)]
struct TempName {
    in_dir: OsString,
    path: PathBuf,
}

impl TempName {
    /// Gives a file a name that nothing has yet: `make` fails with `EEXIST` for one that is taken.
    fn find<T>(
        slot: &FileSlot,
        path: &Path,
        mut make: impl FnMut(&OsStr) -> Result<T, Errno>,
    ) -> Result<(T, Self), Errno> {
        /// Maximum length in bytes of what is taken over from the name; a name has 255.
        const MAX_STEM_LEN: usize = 200;
        /// Two random names of eight digits hardly ever meet.
        const TRIES: usize = 100;
        let mut stem = slot.name.to_string_lossy().into_owned();
        stem.truncate(stem.floor_char_boundary(MAX_STEM_LEN));
        let mut error = Errno::EXIST;
        for _ in 0..TRIES {
            let random = Uuid::new_v4().as_fields().0;
            let in_dir = OsString::from(format!("{stem}.{random:08x}.part"));
            match make(&in_dir) {
                Ok(made) => {
                    let path = path.with_file_name(&in_dir);
                    return Ok((made, Self { in_dir, path }));
                }
                Err(Errno::EXIST) => {}
                Err(other) => {
                    error = other;
                    break;
                }
            }
        }
        Err(error)
    }
}

impl UnnamedFile {
    /// Creates an empty file that [`commit`](Self::commit) will name `name`, with permissions
    /// `mode`, less the umask.
    ///
    /// # Errors
    /// [`PartFileError`].
    pub fn create(name: &Path, mode: u32) -> Result<Self, PartFileError> {
        let failed = |error: io::Error| PartFileError::host("write", name, error);
        let slot = FileSlot::of(name).map_err(failed)?;
        let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(mode));
        let (fd, temp) = match openat(slot.dir(), ".", flags | OFlags::TMPFILE, mode) {
            Ok(fd) => (fd, None),
            // The errors by which kernels and file systems report that they have no unnamed files.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL | Errno::NOENT) => {
                let flags = flags | OFlags::CREATE | OFlags::EXCL;
                let made =
                    TempName::find(&slot, name, |temp| openat(slot.dir(), temp, flags, mode));
                let (fd, temp) = made.map_err(|error| failed(error.into()))?;
                (fd, Some(temp))
            }
            Err(error) => return Err(failed(error.into())),
        };
        Ok(Self { file: File::from(fd), slot, name: name.to_owned(), temp })
    }

    /// Returns the file to write into.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Returns the path of the file, if it has a temporary name: a process ended by a signal has to
    /// delete it.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        self.temp.as_ref().map(|temp| &*temp.path)
    }

    /// Discards the file and leaves nothing behind.
    pub fn discard(self) {
        if let Some(temp) = &self.temp
            && is_named(&self.file, self.slot.dir(), &temp.in_dir).unwrap_or(false)
        {
            // If it cannot be deleted, it does no harm.
            let _ = confined::remove_file(self.slot.dir(), &temp.in_dir);
        }
    }

    /// Makes the complete file durable and gives it its final name.
    ///
    /// # Errors
    /// A line for the user. A file that could not be named is left under its temporary name, if the
    /// line says so.
    pub fn commit(mut self, overwrite: Overwrite) -> Result<(), String> {
        let name = self.name.display();
        self.file
            .sync_all()
            .map_err(|error| format!("cannot write '{name}': {}", os_message(&error)))?;
        let naming = |error: Errno| format!("cannot name '{name}': {}", os_message(&error.into()));
        if overwrite == Overwrite::No && self.temp.is_none() {
            match self.link(&self.slot.name) {
                Err(Errno::EXIST) => {}
                Err(error) => return Err(naming(error)),
                Ok(()) => return self.sync_dir(),
            }
        }
        // linkat(2) replaces nothing, so the file first gets a name of its own.
        let temp = match self.temp.take() {
            Some(temp) => temp,
            None => {
                let found = TempName::find(&self.slot, &self.name, |temp| self.link(temp));
                found.map_err(naming)?.1
            }
        };
        rename(&self.file, self.slot.dir(), &temp.in_dir, &self.slot.name, overwrite)
            .map_err(|error| error.line(&temp.path, &self.name))?;
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

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::super::part_path;
    use super::*;

    #[test]
    fn an_unnamed_file_is_not_in_its_directory_until_commit() {
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
        // Another command may be about to resume an old part.
        fs::write(part_path(&name), "old").unwrap();
        make(b"second").commit(Overwrite::Yes).unwrap();
        assert_eq!(names(), ["x", "x.part"]);
        assert_eq!(fs::read(&name).unwrap(), b"second");
        let line = make(b"third").commit(Overwrite::No).unwrap_err();
        assert_eq!(fs::read(&name).unwrap(), b"second");
        assert_eq!(fs::read(part_path(&name)).unwrap(), b"old");
        let left = names().into_iter().find(|name| name != "x" && name != "x.part").unwrap();
        assert!(line.contains(&format!("{}'", left.display())), "{line}");
        assert_eq!(fs::read(home.path().join(left)).unwrap(), b"third");
        let long = home.path().join("ü".repeat(127));
        UnnamedFile::create(&long, 0o640).unwrap().commit(Overwrite::Yes).unwrap();
        assert!(long.exists());
    }
}
