//! The storage of a disk's overlay: unnamed files, or a directory that others may move or remove.

use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use crate::host::mountinfo;
use crate::overlay::persist::{Holder, OverlayDir};
use crate::overlay::tree::LayerTree;

/// The files of a disk's overlay, and the tree of its layers.
#[expect(clippy::large_enum_variant, reason = "one a disk, which hardly ever moves")]
pub(super) enum OverlayFiles {
    /// The disk has no overlay.
    NoOverlay,
    /// Unnamed files in this directory, which vanish with the mount.
    Temporary { tree: LayerTree, dir: PathBuf },
    /// An overlay directory.
    Persistent(OverlayDir),
}

impl OverlayFiles {
    /// Returns the overlay's layers, or `None` without an overlay.
    fn tree(&self) -> Option<LayerTree> {
        match self {
            Self::NoOverlay => None,
            Self::Temporary { tree, .. } => Some(tree.clone()),
            Self::Persistent(dir) => Some(dir.stack.tree()).filter(|tree| !tree.layers.is_empty()),
        }
    }

    /// The overlay directory, if the overlay has one.
    pub(super) fn as_persistent(&mut self) -> Option<&mut OverlayDir> {
        match self {
            Self::Persistent(dir) => Some(dir),
            Self::NoOverlay | Self::Temporary { .. } => None,
        }
    }
}

/// The path of an overlay's directory, and the directory's identity when the overlay was opened.
struct OverlayDirId {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl OverlayDirId {
    /// Identifies the directory that is at `path` now.
    fn at(path: &Path) -> Self {
        let found = std::fs::metadata(path);
        Self { path: path.to_owned(), identity: found.ok().map(|found| dev_ino(&found)) }
    }
}

fn dev_ino(found: &Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// The state of an overlay's directory while the overlay is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayDirState {
    /// The directory is in place.
    InPlace,
    /// The directory was renamed; writes still reach it.
    Moved,
    /// The directory or its files were removed: all of it vanishes with the mount.
    Removed,
}

/// The storage of a disk's overlay.
pub(super) struct OverlayLocation {
    /// Locked also while layers are opened and the `stack` is made durable.
    files: Mutex<OverlayFiles>,
    /// Has a lock of its own, so that `status` does not wait for the device.
    dir: Mutex<Option<OverlayDirId>>,
}

impl OverlayLocation {
    /// No overlay.
    pub(super) fn none() -> Self {
        Self { files: Mutex::new(OverlayFiles::NoOverlay), dir: Mutex::new(None) }
    }

    /// Unnamed files in `dir`.
    pub(super) fn temporary(tree: LayerTree, dir: PathBuf) -> Self {
        Self { files: Mutex::new(OverlayFiles::Temporary { tree, dir }), dir: Mutex::new(None) }
    }

    /// The overlay directory at `path`.
    pub(super) fn persistent(dir: OverlayDir, path: &Path) -> Self {
        let id = OverlayDirId::at(path);
        Self { files: Mutex::new(OverlayFiles::Persistent(dir)), dir: Mutex::new(Some(id)) }
    }

    /// Makes the directory at `path` the overlay's location.
    pub(super) fn move_to(&self, dir: OverlayDir, path: &Path) {
        *self.files.lock() = OverlayFiles::Persistent(dir);
        *self.dir.lock() = Some(OverlayDirId::at(path));
    }

    /// Takes the overlay away, and returns its directory if it has one.
    pub(super) fn take(&self) -> Option<OverlayDir> {
        match std::mem::replace(&mut *self.files.lock(), OverlayFiles::NoOverlay) {
            OverlayFiles::Persistent(dir) => Some(dir),
            OverlayFiles::NoOverlay | OverlayFiles::Temporary { .. } => None,
        }
    }

    /// Locks the files and the tree of the layers.
    pub(super) fn lock(&self) -> MutexGuard<'_, OverlayFiles> {
        self.files.lock()
    }

    /// The overlay's layers, or `None` without an overlay.
    pub(super) fn tree(&self) -> Option<LayerTree> {
        self.files.lock().tree()
    }

    /// Whether the overlay ends with the mount.
    pub(super) fn is_temporary(&self) -> bool {
        matches!(&*self.files.lock(), OverlayFiles::Temporary { .. })
    }

    /// Whether the overlay has a directory that was not removed.
    pub(super) fn is_on_disk(&self) -> bool {
        self.files.lock().as_persistent().is_some_and(|dir| dir.is_on_disk())
    }

    /// Removes a layer that is not part of the stack from the directory.
    pub(super) fn remove_layer(&self, uuid: Uuid) {
        if let Some(dir) = self.files.lock().as_persistent() {
            dir.remove_layer(uuid);
        }
    }

    /// Records in the directory that this daemon holds it.
    pub(super) fn write_holder(&self, holder: &Holder) {
        if let Some(dir) = self.files.lock().as_persistent() {
            dir.write_holder(holder);
        }
    }

    /// Removes that record.
    pub(super) fn remove_holder(&self) {
        if let Some(dir) = self.files.lock().as_persistent() {
            dir.remove_holder();
        }
    }

    /// The path of the directory.
    pub(super) fn path(&self) -> Option<PathBuf> {
        self.dir.lock().as_ref().map(|dir| dir.path.clone())
    }

    /// The path of the directory in which the layers' files are.
    pub(super) fn files_dir(&self) -> Option<PathBuf> {
        match &*self.lock() {
            OverlayFiles::NoOverlay => return None,
            OverlayFiles::Temporary { dir, .. } => return Some(dir.clone()),
            OverlayFiles::Persistent(_) => {}
        }
        self.path()
    }

    /// The state of the directory, whose data file is `data`; `None` without a directory.
    pub(super) fn dir_state(&self, data: impl FnOnce() -> Option<File>) -> Option<OverlayDirState> {
        let (path, identity) = {
            let dir = self.dir.lock();
            let dir = dir.as_ref()?;
            (dir.path.clone(), dir.identity)
        };
        let data = data().and_then(|file| file.metadata().ok());
        let found = mountinfo::open_recorded(&path).and_then(|found| found.metadata());
        let is_there = match found {
            Ok(found) => identity.is_none_or(|identity| identity == dev_ino(&found)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) if mountinfo::is_foreign_mount(&error) => false,
            // No permission to look tells nothing about the directory.
            Err(_) => true,
        };
        Some(match (data.map(|data| data.nlink()), is_there) {
            (Some(0), _) | (None, false) => OverlayDirState::Removed,
            (_, true) => OverlayDirState::InPlace,
            (Some(_), false) => OverlayDirState::Moved,
        })
    }
}
