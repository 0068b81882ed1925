//! The place of an overlay on the host: whether there is one, and whether the way to it is trusted.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use crate::confined;
use crate::overlay::error::OverlayError;
use crate::trust;
use crate::trusted_path::open_dir;

/// The directories of a store, in the order in which they are created. The overlays of its disks are
/// made there by the store, and no other overlay lies in a store.
pub(crate) const STORE_DIRS: [&str; 3] = ["layers", "disks", "names"];

/// The place of a persistent overlay.
#[derive(Clone, Copy, Debug)]
pub struct OverlayPath<'a> {
    /// The directory with the `stack`.
    pub dir: &'a Path,
    /// The directory of the layers; `None` for `layers` inside `dir`.
    pub layers: Option<&'a Path>,
}

/// Returns whether there is an overlay at `dir`, to be opened rather than created.
///
/// # Errors
/// [`OverlayError::NotAnOverlay`] when `dir` is something else; the host's errno.
pub fn exists(dir: &Path) -> Result<bool, OverlayError> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            Err(OverlayError::NotAnOverlay)
        }
        Err(error) => Err(OverlayError::io("opening it")(error)),
        Ok(mut entries) => match dir.join("stack").try_exists() {
            Ok(true) => Ok(true),
            Ok(false) if entries.next().is_none() => Ok(false),
            Ok(false) => Err(OverlayError::NotAnOverlay),
            Err(error) => Err(OverlayError::io("opening its 'stack'")(error)),
        },
    }
}

/// Returns whether `dir` is the directory of an overlay, or a store, as far as that can be told by its
/// files.
pub(crate) fn is_overlay_or_store(dir: &Path) -> bool {
    let is_store = || STORE_DIRS.iter().all(|name| dir.join(name).is_dir());
    let has_data = || dir.join("layers").is_dir() || dir.join("data").is_file();
    dir.join("stack").is_file() && has_data() || is_store()
}

/// Opens the directory of an overlay, which no untrusted user could have put there.
///
/// # Errors
/// [`OverlayError::NotAnOverlay`] when it is no directory, [`OverlayError::Untrusted`]; the host's
/// errno.
pub fn open_overlay_dir(dir: &Path) -> Result<File, OverlayError> {
    let dir = open_dir(dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => OverlayError::NotAnOverlay,
        _ => OverlayError::io("opening it")(error),
    })?;
    trust::check(&dir)?;
    Ok(dir)
}

/// Returns the real path of the overlay at `dir`, which need not exist yet. Only trusted directories
/// lead to it and no links, so that nobody can redirect it afterwards.
///
/// # Errors
/// [`OverlayError`]: untrusted, no directory, or no directory to create the overlay in.
pub fn resolve_overlay_path(dir: &Path) -> Result<PathBuf, OverlayError> {
    let looking = || OverlayError::io("looking for its place");
    match open_overlay_dir(dir) {
        Ok(found) => return confined::real_path(&found).map_err(looking()),
        Err(OverlayError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(looking()(io::ErrorKind::NotFound.into()));
    };
    let found = open_dir(parent).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidInput => looking()(error),
        _ => OverlayError::NoParent(parent.to_owned()),
    })?;
    trust::check_parent(&found)?;
    Ok(confined::real_path(&found).map_err(looking())?.join(name))
}

/// Returns the directory in which a new overlay at `dir` is created: its parent.
///
/// # Errors
/// [`OverlayError::NoParent`], [`OverlayError::InStore`], [`OverlayError::Untrusted`]; the host's
/// errno.
pub(in crate::overlay) fn parent_for_new(dir: &Path) -> Result<&Path, OverlayError> {
    let parent = dir.parent().unwrap_or(Path::new("/"));
    if !parent.is_dir() {
        return Err(OverlayError::NoParent(parent.to_owned()));
    }
    let is_store = |dir: &&Path| STORE_DIRS.iter().all(|name| dir.join(name).is_dir());
    trust::check_parent(&open_dir(parent).map_err(OverlayError::io("looking for its place"))?)?;
    let real = parent.canonicalize().map_err(OverlayError::io("looking for its place"))?;
    match real.ancestors().find(is_store) {
        Some(store) => Err(OverlayError::InStore(store.to_owned())),
        None => Ok(parent),
    }
}
