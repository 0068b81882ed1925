//! Where a persistent overlay lies, and whether it still does.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::Disk;

/// The directory of an overlay: its path, and which directory that was when it was opened.
pub(super) struct OverlayDirId {
    pub(super) path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl OverlayDirId {
    /// In the directory that is at `path` now.
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned(), identity: std::fs::metadata(path).ok().map(dev_ino) }
    }
}

#[allow(clippy::needless_pass_by_value)] // What is asked for is thrown away.
fn dev_ino(found: Metadata) -> (u64, u64) {
    (found.dev(), found.ino())
}

/// What has become of the directory of an overlay while it is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OverlayDirState {
    /// It is where it was.
    InPlace,
    /// It has another name now; what is written goes on into it.
    Moved,
    /// It, or what is in it, has no name any more: all of it ends with the mount.
    Removed,
}

impl Disk {
    /// The directory of its persistent overlay.
    #[must_use]
    pub fn overlay_dir(&self) -> Option<PathBuf> {
        self.overlay_dir.lock().as_ref().map(|dir| dir.path.clone())
    }

    /// What has become of that directory; `None` for a disk without one.
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
            // Who may not look does not know better.
            Err(_) => true,
        };
        Some(match (data.map(|data| data.nlink()), is_there) {
            (Some(0), _) | (None, false) => OverlayDirState::Removed,
            (_, true) => OverlayDirState::InPlace,
            (Some(_), false) => OverlayDirState::Moved,
        })
    }
}
