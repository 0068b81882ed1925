//! Making and opening persistent overlays, one process at a time.
//!
//! A new overlay is built under a temporary name beside its place and renamed into it when all
//! of it is durable, so there is never half an overlay to be found. The lock is on the inode of the
//! top layer's `data`: hard links, bind mounts and renames cannot fool it. The file `holder` only
//! tells people who has the lock.

mod build;
mod layer_dir;
mod open;
mod overlay_dir;
pub(super) mod staging;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

pub use self::build::{MakeData, NewLayer, NewOverlay, build, create};
pub(crate) use self::layer_dir::remove_layer;
pub(super) use self::layer_dir::{data_file_in, link_segment, open_layer_files, open_sealed};
pub(super) use self::open::take_lock;
pub use self::open::{LockedOverlay, lock_overlay};
pub use self::overlay_dir::OverlayDir;
pub(crate) use self::staging::STAGING_PREFIX;
pub(super) use self::staging::StagingDir;
use super::Overlay;
use super::recover::Recovered;
use super::stack::{LayerRecord, Stack, StackError, doing};
use crate::config::OverlayKind;
use crate::confined::{self, open_dir};
use crate::trust;

/// Where a persistent overlay lies.
#[derive(Clone, Copy, Debug)]
pub struct OverlayPath<'a> {
    /// The directory with its `stack`.
    pub dir: &'a Path,
    /// The directory of its layers; `None`: `layers` inside `dir`.
    pub layers: Option<&'a Path>,
}

/// Who has an overlay open, as its `holder` file tells people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The daemon's process id.
    pub pid: u32,
    /// Where it is mounted.
    pub mountpoint: String,
    /// It is on its way out: worth waiting for.
    pub draining: bool,
}

/// A persistent overlay that is open.
pub struct OpenedOverlay {
    /// The layer that takes the writes.
    pub overlay: Overlay,
    /// The sealed layers below it, top to bottom.
    pub below: Vec<Arc<Overlay>>,
    /// The sealed layers that only snapshots beside it stand on.
    pub snapshot_layers: Vec<(Uuid, Arc<Overlay>)>,
    /// How it was found.
    pub recovered: Recovered,
    /// The files that stay with it.
    pub dir: OverlayDir,
}

/// Whether something is at `dir` already, and has to be opened rather than made.
///
/// # Errors
/// [`StackError::NotAnOverlay`] when it is something else.
pub fn exists(dir: &Path) -> Result<bool, StackError> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(StackError::NotAnOverlay),
        Err(error) => Err(doing("opening it")(error)),
        Ok(mut entries) => match dir.join("stack").try_exists() {
            Ok(true) => Ok(true),
            Ok(false) if entries.next().is_none() => Ok(false),
            Ok(false) => Err(StackError::NotAnOverlay),
            Err(error) => Err(doing("opening its 'stack'")(error)),
        },
    }
}

/// Opens the directory of an overlay, which nobody else could have put there.
///
/// # Errors
/// [`StackError::NotAnOverlay`] when it is something else, [`StackError::Untrusted`]; the host's
/// errno.
pub fn open_overlay_dir(dir: &Path) -> Result<File, StackError> {
    let dir = open_dir(dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => StackError::NotAnOverlay,
        _ => doing("opening it")(error),
    })?;
    trust::check(&dir)?;
    Ok(dir)
}

/// Where the overlay at `dir` lies, or is to be made: a path without links that only believed
/// directories lead to, so that nobody can turn it elsewhere afterwards.
///
/// # Errors
/// [`StackError`]: untrusted, no directory, no directory to make it in.
pub fn resolve_overlay_path(dir: &Path) -> Result<PathBuf, StackError> {
    let looking = || doing("looking for its place");
    match open_overlay_dir(dir) {
        Ok(found) => return confined::real_path(&found).map_err(looking()),
        Err(StackError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else {
        return Err(looking()(io::ErrorKind::NotFound.into()));
    };
    let found = open_dir(parent).map_err(|_| StackError::NoParent(parent.to_owned()))?;
    trust::check_parent(&found)?;
    Ok(confined::real_path(&found).map_err(looking())?.join(name))
}

/// The layer that is written to.
fn top_layer(stack: &Stack) -> Result<LayerRecord, StackError> {
    if stack.kind == OverlayKind::Reflink {
        return Err(StackError::Reflink);
    }
    let top = stack.layers.last().cloned();
    top.ok_or_else(|| StackError::Syntax("it has no layer".to_owned()))
}
