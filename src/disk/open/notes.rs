//! Notes for the user about features that the file systems below a disk lack. Each directory is
//! probed once for a mount.

use std::path::Path;

use super::context::OpenContext;
use crate::base::Base;
use crate::host::file_system;

/// The note about a disk whose overlay takes no changes.
pub(super) const READ_ONLY_NOTE: &str =
    "its overlay is on a read-only file system: the disk can only be read";

/// Describes the features that the base's file system lacks.
pub(super) fn notes_on_base(base: &Base, context: &OpenContext<'_>) -> Vec<String> {
    let (Some(path), Some(file)) = (&base.path, &base.file) else {
        return Vec::new();
    };
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let is_file = file.metadata().is_ok_and(|found| found.is_file());
    if !is_file || !context.probed_dirs.lock().insert(dir) {
        return Vec::new();
    }
    match file_system::shows_holes(file) {
        Ok(false) => {
            vec!["the base's file system cannot tell holes: all of it counts as data".to_owned()]
        }
        Ok(true) | Err(_) => Vec::new(),
    }
}

/// Describes the features that the overlay's file system lacks.
pub(super) fn notes_on_overlay(dir: &Path, context: &OpenContext<'_>) -> Vec<String> {
    // A name below the overlay's own directory, so that a base in that directory is probed as well.
    if !context.probed_dirs.lock().insert(dir.join("overlay")) {
        return Vec::new();
    }
    let Ok(found) = file_system::probe_features(dir) else {
        return Vec::new();
    };
    let line = |what| format!("'{}' is on {}: {what}", dir.display(), found.fs.name);
    found.missing().into_iter().map(line).collect()
}
