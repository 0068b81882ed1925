//! A disk and its place: what was temporary is kept, what was made for no mount is removed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use super::history::OperationError;
use super::open::{OpenError, new_stack};
use super::overlay_dir::OverlayDirId;
use super::{Disk, OverlayLocation};
use crate::overlay::persist::{self, OpenedOverlay, OverlayPath};
use crate::overlay::recover::Recovered;
use crate::overlay::{DEFAULT_BLOCK_SIZE, keep};
use crate::stream::UnmountPolicy;
use crate::stream::output::DrainTimeout;

impl Disk {
    /// What its bottom is called in `status`.
    #[must_use]
    pub fn base_path(&self) -> Option<PathBuf> {
        self.bottom().path().map(Path::to_owned)
    }

    /// Whether its overlay is still in its directory, and not removed.
    pub(super) fn has_overlay_dir(&self) -> bool {
        self.overlay_location.lock().as_persistent().is_some_and(|home| home.is_on_disk())
    }

    /// The mount did not come about: closes the disk in good order, and removes an overlay that
    /// was made for it.
    pub fn abandon(&self) {
        if self.stream().is_some() {
            if let Err(error) = self.end_stream(UnmountPolicy::Abort, DrainTimeout::Unlimited) {
                log::warn!("{}: {error}", self.source);
            }
            return;
        }
        if let Err(error) = self.close(Duration::MAX) {
            log::warn!("{}: {error}", self.source);
        }
        if self.recovered == Recovered::New
            && let Some(dir) = self.overlay_dir()
            && let Err(error) = std::fs::remove_dir_all(&dir)
        {
            log::warn!("'{}' is left behind: {error}", dir.display());
        }
    }

    pub(in crate::disk) fn keep_at(&self, place: OverlayPath<'_>) -> Result<(), OpenError> {
        let dir = place.dir;
        let nothing = |why: &str| Err(OpenError::NothingToKeep(why.to_owned()));
        if self.stream().is_some() {
            return nothing("the disk is a stream: what was written has left or will");
        }
        let _turn = self
            .begin_operation("keeping it")
            .map_err(|error| OpenError::NothingToKeep(error.to_string()))?;
        // A change that hangs is not waited for: nobody else could do anything until it ends.
        let _gate =
            self.gate_for_layers().map_err(|error| OpenError::NothingToKeep(error.to_string()))?;
        let layers = self.layers();
        let Some(overlay) = layers.top.overlay() else {
            if let Some(dir) = self.overlay_dir() {
                return nothing(&format!("the disk is kept already, in '{}'", dir.display()));
            }
            return nothing("the disk has no overlay: mode=ro and mode=rw have nothing to keep");
        };
        if let Some(dir) = self.overlay_dir() {
            return nothing(&format!("the disk is kept already, in '{}'", dir.display()));
        }
        if persist::exists(dir).map_err(OpenError::overlay(dir))? {
            return Err(OpenError::Mismatch {
                dir: dir.to_owned(),
                why: "is there already: name a new directory".to_owned(),
            });
        }
        let block = u32::try_from(overlay.block_size()).unwrap_or(DEFAULT_BLOCK_SIZE);
        let refused = |error: OperationError| OpenError::NothingToKeep(error.to_string());
        let tree = self.tree("changes to keep").map_err(refused)?;
        let stack = new_stack(self.uuid, &self.bottom(), self.owner(), block)?;
        self.record_mtime(overlay);
        let all = self.all_layers(&tree).map_err(refused)?;
        let kept = keep::keep(&all, place, stack.with_tree(tree.clone()));
        let kept = kept.map_err(OpenError::overlay(dir))?;
        if let Err(error) = self.apply_direct_to_all(&kept) {
            // The disk goes on where it was.
            if let Err(error) = std::fs::remove_dir_all(dir) {
                log::warn!("'{}' is left behind: {error}", dir.display());
            }
            return Err(OpenError::NoDirect { dir: dir.to_owned(), error });
        }
        let OpenedOverlay { overlay, below, snapshot_layers: aside, dir: home, .. } = kept;
        self.history.set_sealed(&tree.live(), &below, aside);
        overlay.set_lower_layers(&below);
        *self.layers.write() = Arc::new(layers.with_top(Arc::new(overlay), below));
        *self.overlay_location.lock() = OverlayLocation::Persistent(home);
        *self.overlay_dir.lock() = Some(OverlayDirId::at(dir));
        Ok(())
    }
}
