//! A new overlay while it is being created: a directory beside its place, under a temporary name.
//!
//! ```text
//!   .cowslip-XXXXXX, locked ──all of it durable──> renamed into place, unlocked
//! ```
//!
//! A directory that is not moved into place removes itself. A process that is killed leaves it
//! behind, unlocked; the next overlay that is created in the same parent directory removes it.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, FlockOperation, flock};
use tempfile::TempDir;

use super::remove_layer;
use crate::confined::{entry_names, foreign_entry_error, open_subdir, remove_file};
use crate::trusted_path::open_dir;

/// The prefix of the temporary name.
pub(crate) const STAGING_PREFIX: &str = ".cowslip-";
/// The age from which on an unlocked directory counts as abandoned: a younger one may not be locked
/// yet.
const MIN_ABANDONED_AGE: Duration = Duration::from_secs(60);
/// The files that such a directory may contain, besides its directories.
const KNOWN_FILES: [&str; 4] = ["data", "stack", "stack.new", "holder.new"];

/// The directory of an overlay that is being created.
pub(in crate::overlay) struct StagingDir {
    dir: File,
    /// Closed before the directory removes itself, which takes a descriptor for each level: running
    /// out of descriptors may be the reason why it has to.
    _spare_fd: File,
    temp: TempDir,
}

impl StagingDir {
    /// Creates a directory in `parent` that only this user can enter, and locks it.
    ///
    /// # Errors
    /// The host's errno.
    pub(in crate::overlay) fn new(parent: &Path) -> io::Result<Self> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(STAGING_PREFIX).permissions(Permissions::from_mode(0o700));
        let temp = builder.tempdir_in(parent).map_err(without_path)?;
        let dir = open_dir(temp.path())?;
        flock(&dir, FlockOperation::NonBlockingLockExclusive)?;
        Ok(Self { dir, _spare_fd: File::open("/dev/null")?, temp })
    }

    /// Returns the open directory.
    pub(in crate::overlay) fn dir(&self) -> &File {
        &self.dir
    }

    /// Renames the directory to `path`, in the directory `parent`, durably.
    ///
    /// # Errors
    /// The host's errno. The directory is removed in that case.
    pub(in crate::overlay) fn move_into_place(
        self,
        path: &Path,
        parent: &Path,
    ) -> io::Result<File> {
        let parent = open_dir(parent)?;
        std::fs::rename(self.temp.path(), path)?;
        if let Err(error) = parent.sync_all() {
            // Nobody may take it for an overlay: its data may be that of a disk in use.
            if let Err(error) = std::fs::rename(path, self.temp.path()) {
                log::error!("'{}' is left behind and is no overlay: {error}", path.display());
            }
            return Err(error);
        }
        // Nothing is left under the old name, so nothing must be removed.
        let _ = self.temp.keep();
        if let Err(error) = flock(&self.dir, FlockOperation::Unlock) {
            // It is in its place, durably. Nobody waits for the lock of a directory with this name.
            log::debug!("the lock on '{}' stays: {error}", path.display());
        }
        Ok(self.dir)
    }
}

/// Restores the errno that tempfile hides behind a path, as far as the error's kind tells.
fn without_path(error: io::Error) -> io::Error {
    let code = match error.kind() {
        io::ErrorKind::StorageFull => libc::ENOSPC,
        io::ErrorKind::QuotaExceeded => libc::EDQUOT,
        io::ErrorKind::ReadOnlyFilesystem => libc::EROFS,
        io::ErrorKind::PermissionDenied => libc::EACCES,
        io::ErrorKind::NotFound => libc::ENOENT,
        _ => return error,
    };
    io::Error::from_raw_os_error(code)
}

/// Removes from `parent` the directories that killed processes left behind. Best effort.
pub(in crate::overlay) fn remove_all_abandoned(parent: &Path) {
    let Ok(dir) = open_dir(parent) else { return };
    let Ok(listing) = rustix::fs::Dir::read_from(&dir) else { return };
    let names =
        listing.flatten().filter_map(|entry| entry.file_name().to_str().ok().map(str::to_owned));
    for name in names.filter(|name| name.starts_with(STAGING_PREFIX)) {
        match remove_abandoned(&dir, &name) {
            Ok(true) => {
                log::info!("removed '{name}', left behind by an overlay that was being made");
            }
            Ok(false) => {}
            Err(error) => log::debug!("'{name}' is left behind: {error}"),
        }
    }
}

/// Removes the directory `name` from `parent` if it is abandoned. Returns whether it was removed.
fn remove_abandoned(parent: &File, name: &str) -> io::Result<bool> {
    let dir = open_subdir(parent, name)?;
    let found = dir.metadata()?;
    let age = found.modified()?.elapsed().or_else(|_| SystemTime::UNIX_EPOCH.elapsed());
    let is_ours = found.uid() == rustix::process::geteuid().as_raw();
    if !is_ours || age.is_ok_and(|age| age < MIN_ABANDONED_AGE) {
        return Ok(false);
    }
    match flock(&dir, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(rustix::io::Errno::WOULDBLOCK) => return Ok(false),
        Err(error) => return Err(error.into()),
    }
    let inside = entry_names(&dir)?;
    let is_known = |name: &&String| {
        matches!(&***name, "layers" | "snapshots") || KNOWN_FILES.contains(&&***name)
    };
    if let Some(other) = inside.iter().find(|name| !is_known(name)) {
        return Err(foreign_entry_error(name, other));
    }
    if inside.iter().any(|name| name == "layers") {
        let layers = open_subdir(&dir, "layers")?;
        for layer in entry_names(&layers)? {
            let uuid = layer.parse().map_err(|_| foreign_entry_error("layers", &layer))?;
            remove_layer(&layers, uuid)?;
        }
    }
    for name in &inside {
        match name.as_str() {
            "layers" | "snapshots" => rustix::fs::unlinkat(&dir, name, AtFlags::REMOVEDIR)?,
            name => remove_file(&dir, name)?,
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)?;
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::PathBuf;

    use super::*;

    /// Creates an unfinished overlay with a layer, of the given age.
    fn unfinished(parent: &Path, name: &str, age: Duration) -> PathBuf {
        let dir = parent.join(name);
        let layer = dir.join("layers/00000000-0000-4000-8000-000000000001");
        fs::create_dir_all(&layer).unwrap();
        for file in [dir.join("stack.new"), layer.join("data"), layer.join("log")] {
            fs::write(file, b"half").unwrap();
        }
        File::open(&dir).unwrap().set_modified(SystemTime::now() - age).unwrap();
        dir
    }

    #[test]
    fn only_abandoned_directories_are_removed() {
        let room = tempfile::tempdir().unwrap();
        let old = Duration::from_secs(3600);
        let abandoned = unfinished(room.path(), ".cowslip-aaaaaa", old);
        let young = unfinished(room.path(), ".cowslip-bbbbbb", Duration::ZERO);
        let locked = unfinished(room.path(), ".cowslip-cccccc", old);
        let lock = File::open(&locked).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let other = unfinished(room.path(), ".cowslip-dddddd", old);
        fs::write(other.join("thesis"), b"text").unwrap();
        File::open(&other).unwrap().set_modified(SystemTime::now() - old).unwrap();
        fs::write(room.path().join(".cowslip-eeeeee"), b"a file").unwrap();
        let overlay = unfinished(room.path(), "vm.cow", old);
        remove_all_abandoned(room.path());
        assert!(!abandoned.exists());
        for left in
            [young, locked, other.join("stack.new"), overlay, room.path().join(".cowslip-eeeeee")]
        {
            assert!(left.exists(), "{}", left.display());
        }
    }

    #[test]
    fn a_new_overlay_is_locked_until_it_is_in_place() {
        let room = tempfile::tempdir().unwrap();
        let is_locked = |path: &Path| {
            flock(File::open(path).unwrap(), FlockOperation::NonBlockingLockExclusive).is_err()
        };
        let path = room.path().join("vm.cow");
        let made = StagingDir::new(room.path()).unwrap();
        assert!(is_locked(made.temp.path()));
        let _dir = made.move_into_place(&path, room.path()).unwrap();
        assert!(!is_locked(&path));
        drop(StagingDir::new(room.path()).unwrap());
        assert_eq!(fs::read_dir(room.path()).unwrap().count(), 1);
    }
}
