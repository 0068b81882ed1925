//! The overlays that a path denotes.
//!
//! ```text
//!   vm.cow                an overlay
//!   STORE                 all disks of a store that have a name
//!   STORE/names/NAME      one disk of a store
//!   STORE/disks/UUID      the same
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use super::OfflineError;
use crate::overlay::persist::OverlayPath;

/// One overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OverlayTarget {
    /// Directory with the overlay's `stack`.
    pub dir: PathBuf,
    /// Directory of the layers, unless they are inside `dir`.
    pub layers: Option<PathBuf>,
    /// Name of the overlay for people.
    pub display_name: String,
}

impl OverlayTarget {
    /// Returns the overlay's path for the overlay code.
    #[must_use]
    pub(crate) fn overlay_path(&self) -> OverlayPath<'_> {
        OverlayPath { dir: &self.dir, layers: self.layers.as_deref() }
    }
}

/// Returns whether `dir` is a store rather than an overlay.
#[must_use]
pub(crate) fn is_store(dir: &Path) -> bool {
    !dir.join("stack").exists() && dir.join("names").is_dir()
}

/// Returns the overlay at `dir`, or all named disks of the store at `dir`. The next mount removes
/// disks without a name.
///
/// # Errors
/// [`OfflineError::File`] or [`OfflineError::NotAnOverlay`] when `dir` is something else, or the
/// host's error.
pub(crate) fn overlay_targets(dir: &Path) -> Result<Vec<OverlayTarget>, OfflineError> {
    if is_store(dir) { store_targets(dir) } else { Ok(vec![single_target(dir)?]) }
}

/// Returns the overlay at `dir`.
///
/// # Errors
/// [`OfflineError::File`] or [`OfflineError::NotAnOverlay`] when `dir` is something else.
pub(crate) fn single_target(dir: &Path) -> Result<OverlayTarget, OfflineError> {
    let has = |name: &str| dir.join(name).exists();
    if dir.exists() && !dir.is_dir() {
        return Err(OfflineError::File(dir.to_owned()));
    }
    if dir.is_dir() && !has("stack") && !has("layers") {
        return Err(OfflineError::NotAnOverlay(dir.to_owned()));
    }
    let layers = if has("layers") { None } else { store_layers(dir) };
    let display_name = dir.display().to_string();
    Ok(OverlayTarget { dir: dir.to_owned(), layers, display_name })
}

/// Returns the layers directory of the store that contains the disk at `dir`.
fn store_layers(dir: &Path) -> Option<PathBuf> {
    let dir = dir.canonicalize().ok()?;
    let disks = dir.parent().filter(|disks| disks.ends_with("disks"))?;
    Some(disks.parent()?.join("layers")).filter(|layers| layers.is_dir())
}

/// Returns whether the overlay at `dir` is a disk of a store, with its layers in the store.
#[must_use]
pub(crate) fn is_in_store(dir: &Path) -> bool {
    !dir.join("layers").exists() && store_layers(dir).is_some()
}

fn store_targets(dir: &Path) -> Result<Vec<OverlayTarget>, OfflineError> {
    let failed =
        |error| OfflineError::host(format!("cannot read the store '{}'", dir.display()))(error);
    let mut found = Vec::new();
    for entry in fs::read_dir(dir.join("names")).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // An entry that is no link to a disk is an unfinished name.
        let Ok(link) = fs::read_link(entry.path()) else {
            continue;
        };
        found.push(OverlayTarget {
            dir: dir.join("disks").join(link.file_name().unwrap_or_default()),
            layers: Some(dir.join("layers")),
            display_name: entry.file_name().to_string_lossy().into_owned(),
        });
    }
    found.sort_by(|a, b| a.display_name.cmp(&b.display_name));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_or_empty_directory_is_no_overlay() {
        let home = tempfile::tempdir().unwrap();
        let line = |name: &str| single_target(&home.path().join(name)).unwrap_err().to_string();
        fs::write(home.path().join("vm.img"), b"bytes").unwrap();
        assert!(line("vm.img").contains("is a file: name the directory of an overlay"));
        fs::create_dir(home.path().join("empty")).unwrap();
        assert!(line("empty").contains("is no overlay and no store"));
    }
}
