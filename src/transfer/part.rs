//! The file while it is received: `NAME.part`, locked, and renamed when it is whole.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags, flock, linkat, renameat_with, unlinkat,
};
use rustix::io::Errno;

use super::TransferError;
use super::error::plain;
use super::state::State;

/// `path` with `suffix` at the end of its name.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// What a path names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Spot {
    /// Nothing yet.
    Free(PathBuf),
    /// A file, with its owner and mode; what a link leads to.
    File(PathBuf, Owner),
    /// A block device.
    Device(PathBuf),
}

/// Whose a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Spot {
    /// What `path` names.
    ///
    /// # Errors
    /// A line when nothing can be received there.
    pub(super) fn of(path: &Path) -> Result<Self, TransferError> {
        let failed = |error: io::Error| TransferError::host("write", path, &error);
        let refused = |what: &str| {
            let path = path.display();
            let remedy = "name a file or a block device";
            Err(TransferError::Refused(format!("'{path}' is {what}: {remedy}")))
        };
        let meta = match fs::metadata(path) {
            Ok(meta) => meta,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return match fs::symlink_metadata(path) {
                    Ok(_) => refused("a link to nothing"),
                    Err(_) if path.file_name().is_none() => refused("no name of a file"),
                    Err(_) if path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
                        refused("the name of a directory")
                    }
                    Err(_) => Ok(Self::Free(path.to_owned())),
                };
            }
            Err(error) => return Err(failed(error)),
        };
        let kind = meta.file_type();
        let real = fs::canonicalize(path).map_err(failed)?;
        if kind.is_block_device() {
            return Ok(Self::Device(real));
        }
        if kind.is_file() {
            let owner = Owner { mode: meta.mode() & 0o7777, uid: meta.uid(), gid: meta.gid() };
            return Ok(Self::File(real, owner));
        }
        refused(if kind.is_dir() { "a directory" } else { "no file" })
    }
}

/// A part that is locked.
#[derive(Debug)]
pub(super) struct Part {
    pub(super) file: Arc<File>,
    pub(super) path: PathBuf,
    /// The name it gets.
    pub(super) name: PathBuf,
}

impl Part {
    /// The part of `name` that is there, locked; `None` when there is none.
    pub(super) fn find(name: &Path) -> Result<Option<Self>, TransferError> {
        let path = with_suffix(name, ".part");
        let failed = |error: Errno| TransferError::host("write", &path, &error.into());
        loop {
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
            let file = match rustix::fs::open(&path, flags, Mode::empty()) {
                Ok(fd) => File::from(fd),
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(failed(error)),
            };
            let meta = file.metadata().map_err(|error| TransferError::host("read", &path, &error));
            let meta = meta?;
            if !meta.is_file() {
                let line = format!("'{}' is no file: remove it", path.display());
                return Err(TransferError::Refused(line));
            }
            lock(&file, &path)?;
            // Whoever had the lock may have renamed or replaced it.
            if fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == meta.ino()) {
                let name = name.to_owned();
                return Ok(Some(Self { file: Arc::new(file), path, name }));
            }
        }
    }

    /// A new, empty part of `name`, in place of any that is there. `owner`: of the file that it
    /// will replace.
    pub(super) fn create(
        name: &Path,
        old: Option<Self>,
        owner: Option<Owner>,
    ) -> Result<Self, TransferError> {
        let path = with_suffix(name, ".part");
        let failed = |error: io::Error| TransferError::host("write", &path, &error);
        // First: a state must never meet a file that it does not speak of.
        State::remove(&path).map_err(failed)?;
        if old.is_some() {
            fs::remove_file(&path).map_err(failed)?;
        }
        let mode = if owner.is_some() { 0o600 } else { 0o666 };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let fd = match rustix::fs::open(&path, flags, Mode::from_raw_mode(mode)) {
            Ok(fd) => fd,
            Err(Errno::EXIST) => return Err(busy(&path)),
            Err(error) => return Err(failed(error.into())),
        };
        drop(old);
        let file = File::from(fd);
        lock(&file, &path)?;
        // Before it was locked another one may have found it, and begun anew.
        let inode = file.metadata().map_err(failed)?.ino();
        if !fs::symlink_metadata(&path).is_ok_and(|now| now.ino() == inode) {
            return Err(busy(&path));
        }
        if let Some(owner) = owner {
            // Only root can give files away; then it is the mode that matters.
            let _ = std::os::unix::fs::fchown(&file, Some(owner.uid), Some(owner.gid));
            file.set_permissions(fs::Permissions::from_mode(owner.mode)).map_err(failed)?;
        }
        Ok(Self { file: Arc::new(file), path, name: name.to_owned() })
    }

    /// It is whole and durable: gives it its name.
    ///
    /// # Errors
    /// A line; it stays what it is then.
    pub(super) fn commit(&self, replace: bool) -> Result<(), TransferError> {
        self.rename(replace).map_err(|error| match error {
            Errno::EXIST => TransferError::Late(format!(
                "'{}' was made by somebody else meanwhile: what arrived is whole in '{}'",
                self.name.display(),
                self.path.display()
            )),
            error => TransferError::Late(format!(
                "cannot rename '{}' to '{}': {}",
                self.path.display(),
                self.name.display(),
                plain(&error.into())
            )),
        })?;
        sync_parent(&self.name)
            .map_err(|error| TransferError::host("write the directory of", &self.name, &error))?;
        State::remove(&self.path).map_err(|error| TransferError::host("remove", &self.path, &error))
    }

    fn rename(&self, replace: bool) -> Result<(), Errno> {
        let (from, to) = (&self.path, &self.name);
        if replace {
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
            Err(_) if fs::symlink_metadata(to).is_ok() => Err(Errno::EXIST),
            Err(_) => rustix::fs::rename(from, to),
        }
    }
}

fn busy(path: &Path) -> TransferError {
    let line = format!("'{}' is being received by another cowslip: wait for it", path.display());
    TransferError::Refused(line)
}

fn lock(file: &File, path: &Path) -> Result<(), TransferError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(busy(path)),
        Err(error) => Err(TransferError::host("lock", path, &error.into())),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    match File::open(parent)?.sync_all() {
        // Some file systems cannot sync a directory; there it is as durable as it gets.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}
