//! What the file systems below a disk cannot do, told once.

use std::path::Path;

use super::OpenContext;
use crate::base::Base;
use crate::base::self_reference;

/// What the base's file system cannot do.
pub(super) fn notes_on_base(base: &Base, setting: &OpenContext<'_>) -> Vec<String> {
    let (Some(path), Some(file)) = (&base.path, &base.file) else {
        return Vec::new();
    };
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let is_file = file.metadata().is_ok_and(|found| found.is_file());
    if !is_file || !setting.probed_dirs.lock().insert(dir) {
        return Vec::new();
    }
    match self_reference::shows_holes(file) {
        Ok(false) => {
            vec!["the base's file system cannot tell holes: all of it counts as data".to_owned()]
        }
        Ok(true) | Err(_) => Vec::new(),
    }
}

/// What the overlay's file system cannot do.
pub(in crate::disk) fn notes_on_overlay(dir: &Path, setting: &OpenContext<'_>) -> Vec<String> {
    // The overlay's own directory, with a mark so that a base beside it is looked at as well.
    if !setting.probed_dirs.lock().insert(dir.join("overlay")) {
        return Vec::new();
    }
    let Ok(found) = self_reference::probe_features(dir) else {
        return Vec::new();
    };
    let line = |what| format!("'{}' is on {}: {what}", dir.display(), found.fs.name);
    found.missing().into_iter().map(line).collect()
}
