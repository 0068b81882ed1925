//! The overlays that a path denotes, for commands that work on overlays that are not mounted.
//!
//! ```text
//!   vm.cow                an overlay
//!   STORE                 all disks of a store that have a name
//!   STORE/names/NAME      one disk of a store
//!   STORE/disks/UUID      the same
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context as _;

use crate::overlay::persist::OverlayPath;

/// One overlay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct OverlayTarget {
    /// Directory with the overlay's `stack`.
    pub(super) dir: PathBuf,
    /// Directory of the layers, unless they are inside `dir`.
    pub(super) layers: Option<PathBuf>,
    /// Name of the overlay for people.
    pub(super) display_name: String,
}

impl OverlayTarget {
    /// Returns the overlay's path for the overlay code.
    pub(super) fn overlay_path(&self) -> OverlayPath<'_> {
        OverlayPath { dir: &self.dir, layers: self.layers.as_deref() }
    }
}

/// Returns whether `dir` is a store rather than an overlay.
pub(super) fn is_store(dir: &Path) -> bool {
    !dir.join("stack").exists() && dir.join("names").is_dir()
}

/// Returns the overlay at `dir`, or all named disks of the store at `dir`. The next mount removes
/// disks without a name.
///
/// # Errors
/// A line for the user.
pub(super) fn overlay_targets(dir: &Path) -> anyhow::Result<Vec<OverlayTarget>> {
    if is_store(dir) { store_targets(dir) } else { Ok(vec![single_target(dir)?]) }
}

/// Returns the overlay at `dir`.
///
/// # Errors
/// A line for the user when `dir` is something else.
pub(super) fn single_target(dir: &Path) -> anyhow::Result<OverlayTarget> {
    let has = |name: &str| dir.join(name).exists();
    let shown = dir.display().to_string();
    if dir.exists() && !dir.is_dir() {
        anyhow::bail!("'{shown}' is a file: name the directory of an overlay or a store");
    }
    if dir.is_dir() && !has("stack") && !has("layers") {
        anyhow::bail!("'{shown}' is no overlay and no store: it holds neither 'stack' nor 'names'");
    }
    let layers = if has("layers") { None } else { store_layers(dir) };
    Ok(OverlayTarget { dir: dir.to_owned(), layers, display_name: shown })
}

/// Returns the layers directory of the store that contains the disk at `dir`.
fn store_layers(dir: &Path) -> Option<PathBuf> {
    let dir = dir.canonicalize().ok()?;
    let disks = dir.parent().filter(|disks| disks.ends_with("disks"))?;
    Some(disks.parent()?.join("layers")).filter(|layers| layers.is_dir())
}

/// Returns whether the overlay at `dir` is a disk of a store, with its layers in the store.
pub(super) fn is_in_store(dir: &Path) -> bool {
    !dir.join("layers").exists() && store_layers(dir).is_some()
}

fn store_targets(dir: &Path) -> anyhow::Result<Vec<OverlayTarget>> {
    let reading = || format!("cannot read the store '{}'", dir.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(dir.join("names")).with_context(reading)? {
        let entry = entry.with_context(reading)?;
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
        let line =
            |name: &str| format!("{:#}", single_target(&home.path().join(name)).unwrap_err());
        fs::write(home.path().join("vm.img"), b"bytes").unwrap();
        assert!(line("vm.img").contains("is a file: name the directory of an overlay"));
        fs::create_dir(home.path().join("empty")).unwrap();
        assert!(line("empty").contains("is no overlay and no store"));
    }
}
