//! The directory of a persistent overlay, and whether it is still in place.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Disk;

/// The path of an overlay's directory, and the directory's identity when the overlay was opened.
pub(super) struct OverlayDirId {
    pub(super) path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl OverlayDirId {
    /// Identifies the directory that is at `path` now.
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: std::fs::metadata(path).ok().map(dev_ino) }
    }
}

#[allow(clippy::needless_pass_by_value)] // The metadata is used up here.
fn dev_ino(found: Metadata) -> (u64, u64) {
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

impl Disk {
    /// The directory of the disk's persistent overlay.
    #[must_use]
    pub fn overlay_dir(&self) -> Option<PathBuf> {
        self.overlay_dir.lock().as_ref().map(|dir| dir.path.clone())
    }

    /// The state of that directory; `None` for a disk without one.
    #[must_use]
    pub fn overlay_dir_state(&self) -> Option<OverlayDirState> {
        let (path, was) = {
            let dir = self.overlay_dir.lock();
            let dir = dir.as_ref()?;
            (dir.path.clone(), dir.identity)
        };
        let data = match (self.overlay(), self.reflink()) {
            (Some(overlay), _) => overlay.data_file().and_then(|file| file.metadata().ok()),
            (None, Some(reflink)) => reflink.data().metadata().ok(),
            (None, None) => None,
        };
        let is_there = match std::fs::metadata(path) {
            Ok(found) => was.is_none_or(|was| was == dev_ino(found)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
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
