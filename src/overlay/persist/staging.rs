//! A new overlay while it is being made: a directory beside its place that nobody takes for one.
//!
//! ```text
//!   .cowslip-XXXXXX, locked ──all of it durable──> renamed into its place, unlocked
//! ```
//!
//! One that is not put into its place removes itself. Whoever is killed leaves it behind, unlocked;
//! the next one that is made in the same directory removes it.

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

/// How the name of one begins.
pub(crate) const STAGING_PREFIX: &str = ".cowslip-";
/// One that is younger may not be locked yet.
const MIN_ABANDONED_AGE: Duration = Duration::from_secs(60);
/// The files that may lie right in one.
const KNOWN_FILES: [&str; 4] = ["data", "stack", "stack.new", "holder.new"];

/// An overlay that is being made.
pub(in crate::overlay) struct StagingDir {
    dir: File,
    /// Let go before the directory removes itself: that takes one descriptor for each level, and the
    /// want of one may be why it has to.
    _spare_fd: File,
    temp: TempDir,
}

impl StagingDir {
    /// Makes one in `parent`, for this user alone.
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

    /// The directory.
    pub(in crate::overlay) fn dir(&self) -> &File {
        &self.dir
    }

    /// Puts it into its place, `path` in the directory `parent`, durably.
    ///
    /// # Errors
    /// The host's errno; it is removed then.
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
        // There is nothing left under its old name.
        let _ = self.temp.keep();
        flock(&self.dir, FlockOperation::Unlock)?;
        Ok(self.dir)
    }
}

/// The errno that tempfile has hidden behind a path, as far as its kind tells.
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

/// Removes from `parent` what was being made by somebody who was killed. Best effort.
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

/// Removes the draft `name` from `parent` if nobody works on it; tells whether it did.
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

    /// Makes a draft with a layer in it, as old as is said.
    fn draft(room: &Path, name: &str, age: Duration) -> PathBuf {
        let dir = room.join(name);
        let layer = dir.join("layers/00000000-0000-4000-8000-000000000001");
        fs::create_dir_all(&layer).unwrap();
        for file in [dir.join("stack.new"), layer.join("data"), layer.join("log")] {
            fs::write(file, b"half").unwrap();
        }
        File::open(&dir).unwrap().set_modified(SystemTime::now() - age).unwrap();
        dir
    }

    #[test]
    fn what_a_killed_maker_left_is_removed_and_nothing_else() {
        let room = tempfile::tempdir().unwrap();
        let old = Duration::from_secs(3600);
        let abandoned = draft(room.path(), ".cowslip-aaaaaa", old);
        let young = draft(room.path(), ".cowslip-bbbbbb", Duration::ZERO);
        let locked = draft(room.path(), ".cowslip-cccccc", old);
        let lock = File::open(&locked).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let other = draft(room.path(), ".cowslip-dddddd", old);
        fs::write(other.join("thesis"), b"text").unwrap();
        File::open(&other).unwrap().set_modified(SystemTime::now() - old).unwrap();
        fs::write(room.path().join(".cowslip-eeeeee"), b"a file").unwrap();
        let overlay = draft(room.path(), "vm.cow", old);
        remove_all_abandoned(room.path());
        assert!(!abandoned.exists());
        for left in
            [young, locked, other.join("stack.new"), overlay, room.path().join(".cowslip-eeeeee")]
        {
            assert!(left.exists(), "{}", left.display());
        }
    }

    #[test]
    fn a_draft_is_locked_until_it_is_in_its_place() {
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
