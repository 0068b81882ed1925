//! Snapshots of a reflink overlay, and reverting to a snapshot or to the base.
//!
//! A snapshot is a FICLONE of `data` under a temporary name, then fsync, rename and fsync of the
//! directory; from then on its name counts. The host clones the file as of one moment, including
//! dirty pages.
//!
//! A revert is a FICLONE into `data`, which keeps its inode, between writing a durable `intent`
//! file and removing it. After a failure in between, the disk is neither old nor new: it latches
//! read-only, and the next open repeats the revert.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, RenameFlags};

use super::intent::{self, RevertSource};
use super::{Reflink, ReflinkError};
use crate::confined::{self, FileAccess};
use crate::name::{self, NameError};
use crate::overlay::error::OverlayError;

/// The name of a snapshot being created, outside `snapshots`, where a user might choose this name.
const NEW_SNAPSHOT_FILE: &str = "snapshot.new";

/// A snapshot of a reflink overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReflinkSnapshot {
    /// The snapshot's name.
    pub name: String,
    /// The disk's size in the snapshot, in bytes.
    pub size: u64,
    /// The time of the snapshot.
    pub made: SystemTime,
}

/// Checks that `name` can be the name of a snapshot.
pub(super) fn check_name(name: &str) -> Result<(), ReflinkError> {
    let why = match name::check(name) {
        Err(NameError::Empty) => "a name is needed",
        Err(NameError::Directory | NameError::Reserved) => "that is a directory's name",
        Err(NameError::Slash) => "a name holds no /",
        Err(NameError::ControlCharacter) => "a name holds no control characters",
        Err(NameError::TooLong) => "a name has at most 255 bytes",
        Ok(()) => return Ok(()),
    };
    Err(ReflinkError::Name { name: name.escape_default().to_string(), why })
}

/// Makes `to` a copy of `from` that shares its blocks, whatever `to` was before.
///
/// # Errors
/// The host's errno; `to` may hold any mixture in that case.
pub(super) fn reflink_into(from: &File, to: &File) -> io::Result<()> {
    let len = from.metadata()?.len();
    if to.metadata()?.len() > len {
        // A file that ends inside a block cannot be cloned into the middle of a longer file.
        to.set_len(len)?;
    }
    rustix::fs::ioctl_ficlone(to, from)?;
    Ok(())
}

/// Removes an unfinished snapshot that a crash has left behind.
pub(super) fn remove_unfinished_snapshot(dir: &File) {
    let _ = rustix::fs::unlinkat(dir, NEW_SNAPSHOT_FILE, AtFlags::empty());
}

/// Makes the disk a copy of `source`; the intent file exists already.
pub(super) fn revert_data(
    source: &RevertSource,
    data: &File,
    base: &File,
    snapshots: &File,
) -> io::Result<()> {
    match source {
        RevertSource::Base => reflink_into(base, data)?,
        RevertSource::Snapshot { name } => {
            reflink_into(&confined::open_file(snapshots, name, FileAccess::Read)?, data)?;
        }
    }
    data.sync_all()
}

impl Reflink {
    /// Saves the current state of the disk as the snapshot `name`, durably. The time depends on the
    /// number of the file's extents, not on its size.
    ///
    /// # Errors
    /// [`ReflinkError`]: the name is taken or invalid, or the host's errno (`ENOSPC`); nothing is
    /// left behind in that case.
    pub fn snapshot(&self, name: &str) -> Result<(), ReflinkError> {
        let _guard = self.changing.lock();
        check_name(name)?;
        self.check_latch()?;
        let made = self.make_snapshot(name);
        if made.is_err() {
            let _ = rustix::fs::unlinkat(&self.dir, NEW_SNAPSHOT_FILE, AtFlags::empty());
        }
        made
    }

    fn make_snapshot(&self, name: &str) -> Result<(), ReflinkError> {
        if self.open_snapshot(name).is_ok() {
            return Err(ReflinkError::Exists(name.to_owned()));
        }
        let copy = || -> io::Result<()> {
            let file = confined::recreate_file(&self.dir, NEW_SNAPSHOT_FILE)?;
            rustix::fs::ioctl_ficlone(&file, &self.data)?;
            file.set_permissions(Permissions::from_mode(0o400))?;
            file.sync_all()
        };
        copy().map_err(OverlayError::io("making a snapshot"))?;
        let flags = RenameFlags::NOREPLACE;
        match rustix::fs::renameat_with(&self.dir, NEW_SNAPSHOT_FILE, &self.snapshots, name, flags)
        {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => return Err(ReflinkError::Exists(name.to_owned())),
            Err(error) => return Err(OverlayError::io("naming a snapshot")(error.into()).into()),
        }
        if let Err(error) = self.snapshots.sync_all().and_then(|()| self.dir.sync_all()) {
            let _ = rustix::fs::unlinkat(&self.snapshots, name, AtFlags::empty());
            return Err(OverlayError::io("naming a snapshot")(error).into());
        }
        Ok(())
    }

    /// Opens the file of the snapshot `name` for reading.
    ///
    /// # Errors
    /// [`ReflinkError::NoSnapshot`]; the host's errno.
    pub fn open_snapshot(&self, name: &str) -> Result<File, ReflinkError> {
        check_name(name)?;
        match confined::open_file(&self.snapshots, name, FileAccess::Read) {
            Ok(file) => Ok(file),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(ReflinkError::NoSnapshot(name.to_owned()))
            }
            Err(error) => Err(OverlayError::io("opening a snapshot")(error).into()),
        }
    }

    /// Returns all snapshots, the oldest first.
    ///
    /// # Errors
    /// The host's errno.
    pub fn list_snapshots(&self) -> Result<Vec<ReflinkSnapshot>, ReflinkError> {
        let read = || -> io::Result<Vec<ReflinkSnapshot>> {
            let mut all = Vec::new();
            // Opened again by path, so that each listing has a position of its own.
            for entry in rustix::fs::Dir::read_from(&self.snapshots)? {
                let entry = entry?;
                let Ok(name) = entry.file_name().to_str() else { continue };
                if check_name(name).is_err() {
                    continue;
                }
                // Deleted since it was listed, or not a snapshot.
                let Ok(file) = confined::open_file(&self.snapshots, name, FileAccess::Read) else {
                    continue;
                };
                let found = file.metadata()?;
                let made = found.modified().unwrap_or(UNIX_EPOCH);
                all.push(ReflinkSnapshot { name: name.to_owned(), size: found.len(), made });
            }
            Ok(all)
        };
        let mut all = read().map_err(OverlayError::io("listing its snapshots"))?;
        all.sort_by(|a, b| (a.made, &a.name).cmp(&(b.made, &b.name)));
        Ok(all)
    }

    /// Deletes the snapshot `name`; open readers can continue.
    ///
    /// # Errors
    /// [`ReflinkError::NoSnapshot`]; the host's errno.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), ReflinkError> {
        let _guard = self.changing.lock();
        check_name(name)?;
        match rustix::fs::unlinkat(&self.snapshots, name, AtFlags::empty()) {
            Ok(()) => {
                Ok(self.snapshots.sync_all().map_err(OverlayError::io("deleting a snapshot"))?)
            }
            Err(rustix::io::Errno::NOENT) => Err(ReflinkError::NoSnapshot(name.to_owned())),
            Err(error) => Err(OverlayError::io("deleting a snapshot")(error.into()).into()),
        }
    }

    /// Returns the size in bytes of the snapshot `name`, or of the base.
    ///
    /// # Errors
    /// [`ReflinkError::NoSnapshot`] and the host's errno.
    pub fn size_of(&self, name: Option<&str>) -> Result<u64, ReflinkError> {
        let snapshot = name.map(|name| self.open_snapshot(name)).transpose()?;
        let size = crate::host::file_size(snapshot.as_ref().unwrap_or(&self.base));
        size.map_err(|error| OverlayError::io("looking at what it is to be")(error).into())
    }

    /// Reverts the disk to the snapshot `name`, durably. The caller holds the gate exclusive and
    /// afterwards invalidates the kernel's caches of the disk.
    ///
    /// # Errors
    /// [`ReflinkError`]: nothing has changed, or the disk has latched and the next open finishes
    /// the revert.
    pub fn revert(&self, name: &str) -> Result<(), ReflinkError> {
        self.open_snapshot(name)?;
        self.revert_to(&RevertSource::Snapshot { name: name.to_owned() })
    }

    /// Resets the disk to its base, durably. The snapshots stay. The caller holds the gate
    /// exclusive and afterwards invalidates the kernel's caches of the disk.
    ///
    /// # Errors
    /// The errors of [`revert`](Self::revert).
    pub fn reset(&self) -> Result<(), ReflinkError> {
        self.revert_to(&RevertSource::Base)
    }

    fn revert_to(&self, source: &RevertSource) -> Result<(), ReflinkError> {
        let _guard = self.changing.lock();
        self.check_latch()?;
        if let Err(error) = intent::write(&self.dir, source) {
            // The revert has not begun; an intent file that exists nevertheless would start it at
            // the next open.
            if intent::clear(&self.dir).is_err() {
                self.bytes.latch();
            }
            return Err(OverlayError::io("noting what is to be done")(error).into());
        }
        if let Err(error) = revert_data(source, &self.data, &self.base, &self.snapshots) {
            self.bytes.latch();
            return Err(ReflinkError::Unfinished { of: source.clone(), error });
        }
        if let Err(error) = intent::clear(&self.dir) {
            // The next open would repeat the revert and overwrite later writes.
            self.bytes.latch();
            return Err(OverlayError::io("noting that it is done")(error).into());
        }
        Ok(())
    }

    fn check_latch(&self) -> Result<(), ReflinkError> {
        if self.is_latched() { Err(ReflinkError::Latched) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_name_that_is_not_a_plain_file_name_is_refused() {
        for name in ["", ".", "..", "a/b", "/", "a\nb", &"x".repeat(256)] {
            assert!(matches!(check_name(name), Err(ReflinkError::Name { .. })), "{name:?}");
        }
        for name in ["a", ".hidden", "intent", "x.new", "ö ö", &"x".repeat(255)] {
            check_name(name).unwrap();
        }
    }
}
