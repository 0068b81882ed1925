//! `keep`: makes a temporary overlay persistent.

use super::Disk;
use super::open::{COMMAND_IN_STORE, OpenError, new_stack};
use crate::overlay::keep;
use crate::overlay::persist::{self, OpenedOverlay, OverlayPath};

#[allow(clippy::needless_pass_by_value)] // For `map_err`.
fn refused(why: impl ToString) -> OpenError {
    OpenError::Refused(why.to_string())
}

impl Disk {
    /// Makes the temporary overlay persistent at `path`. The overlay is durable on return.
    ///
    /// # Errors
    /// [`OpenError`] when there is no temporary overlay, when something exists at `path`, or when
    /// the host fails; the disk is unchanged then.
    pub fn keep(&self, path: OverlayPath<'_>) -> Result<(), OpenError> {
        self.references
            .with_deadlines_suspended(|| self.keep_at(path))
            .unwrap_or_else(|| Err(refused("the disk is being removed")))
    }

    fn keep_at(&self, path: OverlayPath<'_>) -> Result<(), OpenError> {
        let dir = path.dir;
        if self.stream().is_some() {
            return Err(refused("the disk is a stream: what was written has left or will"));
        }
        let _operation = self.operations.begin("keeping it").map_err(refused)?;
        // A change that hangs is not waited for: nobody else could do anything until it ends.
        let _gate = self.gate_for_layers().map_err(refused)?;
        let layers = self.layers();
        if let Some(dir) = self.overlay_dir() {
            return Err(refused(format!("the disk is kept already, in '{}'", dir.display())));
        }
        let Some(overlay) = layers.top.overlay() else {
            return Err(refused(
                "the disk has no overlay: mode=ro and mode=rw have nothing to keep",
            ));
        };
        let is_command = self.base_address().is_some_and(|address| address.is_command());
        if is_command && path.layers.is_some() {
            return Err(refused(COMMAND_IN_STORE));
        }
        if persist::exists(dir).map_err(OpenError::overlay(dir))? {
            return Err(OpenError::Mismatch {
                dir: dir.to_owned(),
                why: "is there already: name a new directory".to_owned(),
            });
        }
        let tree = self.tree("changes to keep").map_err(refused)?;
        let stack = new_stack(self.uuid, &self.described_base(), self.owner(), self.block_size())?;
        self.record_mtime(overlay);
        let all = self.all_layers(&tree).map_err(refused)?;
        let kept = keep::keep(&all, path, stack.with_tree(tree.clone()));
        let kept = kept.map_err(OpenError::overlay(dir))?;
        if let Err(error) = self.apply_direct_to_all(&kept) {
            // The disk goes on where it was.
            if let Err(error) = std::fs::remove_dir_all(dir) {
                log::warn!("'{}' is left behind: {error}", dir.display());
            }
            return Err(OpenError::NoDirect { dir: dir.to_owned(), error });
        }
        let OpenedOverlay { overlay, below, snapshot_layers, dir: overlay_dir, .. } = kept;
        self.history.set_sealed(&tree.top_chain(), &below, snapshot_layers);
        overlay.set_lower_layers(&below);
        *self.layers.write() = layers.with_top(overlay.into(), below).into();
        self.overlay_location.move_to(overlay_dir, dir);
        Ok(())
    }
}
