//! History of an overlay: taking, deleting and reverting to snapshots, and resets to the base.
//!
//! Each operation is a single replacement of the `stack`. The slow part, merging layers that no
//! snapshot keeps separate any more, is done in the background afterwards (`merge_layers`), and
//! yields to other operations on the disk.

mod diff;
mod merge;
mod merge_schedule;
mod new_layer;
mod snapshots;
mod state;

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

pub use self::diff::{DiffBase, Difference};
use self::new_layer::TopParent;
use self::snapshots::snapshot_uuid;
pub use self::snapshots::{LayerUsage, SnapshotInfo};
pub use self::state::LayerUsers;
pub(super) use self::state::{History, ResetSizes};
use super::Disk;
use super::new_size::SizeChange;
use super::operation::Force;
use super::operation_error::OperationError;
use super::overlay_location::OverlayFiles;
use crate::layer::Layer;
use crate::overlay::Usage;
use crate::overlay::reflink::ReflinkError;
use crate::overlay::stack::{SnapshotRecord, Stack};
use crate::overlay::tree::{self, LayerTree};

/// The frozen state that a clone is based on.
pub(in crate::disk) struct FrozenLayer {
    /// The sealed layer.
    pub(in crate::disk) layer: Uuid,
    /// The size of the disk in it, in bytes.
    pub(in crate::disk) size: u64,
    /// The stack that the layer belongs to.
    pub(in crate::disk) stack: Stack,
}

impl Disk {
    /// Returns the disk's layers and their names; `needed_for` goes into the error.
    pub(in crate::disk) fn tree(
        &self,
        needed_for: &'static str,
    ) -> Result<LayerTree, OperationError> {
        if self.reflink().is_some() {
            return Err(OperationError::Refused(format!(
                "its overlay is a reflink copy of the base: only block maps have {needed_for}"
            )));
        }
        self.overlay_location.tree().ok_or(OperationError::NoOverlay(needed_for))
    }

    /// Takes a snapshot. On return the snapshot exists and contains all earlier writes; but only a
    /// sync makes it durable.
    ///
    /// # Errors
    /// [`OperationError`]; nothing has changed then.
    pub fn snapshot(&self, name: Option<&str>) -> Result<String, OperationError> {
        let _operation = self.operations.begin("a snapshot")?;
        let taken = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let names = self.snapshot_names();
        let name = name.map_or_else(|| unused_name(&names, taken), str::to_owned);
        if let Some(reflink) = self.reflink() {
            let _gate = self.gate_for_layers()?;
            reflink.snapshot(&name)?;
            return Ok(name);
        }
        let tree = self.tree("snapshots")?;
        if let Err(why) = tree::check_name(&name) {
            return Err(OperationError::BadName { name, why });
        }
        if tree.snapshot(&name).is_some() {
            return Err(OperationError::SnapshotExists(name));
        }
        if self.is_latched() {
            return Err(OperationError::Latched);
        }
        self.seal(Some((&name, taken.cast_signed())))?;
        Ok(name)
    }

    /// Seals the top and puts an empty one above it.
    pub(super) fn seal(&self, name: Option<(&str, i64)>) -> Result<(), OperationError> {
        self.put_empty_top(TopParent::Top, Force::Yes, SizeChange::Seen, |tree, old| {
            let named = |(name, taken): (&str, i64)| SnapshotRecord {
                name: name.to_owned(),
                layer: old,
                taken,
            };
            tree.snapshots.extend(name.map(named));
        })
    }

    /// Reverts the disk to snapshot `name`. Later changes are lost unless another snapshot holds
    /// them.
    ///
    /// # Errors
    /// [`OperationError`]; nothing has changed then.
    pub fn revert(
        &self,
        name: &str,
        force: Force,
        change: SizeChange,
    ) -> Result<(), OperationError> {
        let _operation = self.operations.begin("a revert")?;
        if let Some(reflink) = self.reflink() {
            let size = reflink.size_of(Some(name))?;
            return self.switch_reflink(force, (size, change), || reflink.revert(name));
        }
        let tree = self.tree("snapshots")?;
        let unknown = || OperationError::NoSnapshot(name.to_owned());
        let layer = tree.snapshot(name).ok_or_else(unknown)?.layer;
        self.check_writers(force)?;
        self.put_empty_top(TopParent::Layer(layer), force, change, |_, _| {})
    }

    /// Resets the disk to its base. Its snapshots stay.
    ///
    /// # Errors
    /// [`OperationError`]; nothing has changed then.
    pub fn reset(&self, force: Force, change: SizeChange) -> Result<(), OperationError> {
        let _operation = self.operations.begin("a reset")?;
        if let Some(reflink) = self.reflink() {
            let size = reflink.size_of(None)?;
            return self.switch_reflink(force, (size, change), || reflink.reset());
        }
        self.tree("changes to reset")?;
        if self.hydration.is_detached() && force == Force::No {
            return Err(OperationError::Detached);
        }
        self.check_writers(force)?;
        self.put_empty_top(TopParent::Base, force, change, |_, _| {})
    }

    /// Replaces the file of a reflink overlay by another of `size` bytes.
    fn switch_reflink(
        &self,
        force: Force,
        (size, change): (u64, SizeChange),
        switch: impl FnOnce() -> Result<(), ReflinkError>,
    ) -> Result<(), OperationError> {
        self.check_writers(force)?;
        self.await_closed(size, change);
        let _gate = self.gate_for_layers()?;
        self.check_writers(force)?;
        self.begin_size_change(size, change)?;
        Ok(switch()?)
    }

    /// Deletes a snapshot. Its name is removed at once. Space that only the snapshot used is freed
    /// in the background; layers that others use stay.
    ///
    /// # Errors
    /// [`OperationError`]; nothing has changed then.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), OperationError> {
        let _operation = self.operations.begin("the deletion of a snapshot")?;
        if let Some(reflink) = self.reflink() {
            reflink.delete_snapshot(name)?;
            if let Some(file) =
                self.history.snapshot_files.lock().remove(&snapshot_uuid(&self.uuid, name))
            {
                file.mark_unlinked();
            }
            return Ok(());
        }
        let tree = self.tree("snapshots")?;
        let Some(layer) = tree.snapshot(name).map(|snapshot| snapshot.layer) else {
            return Err(OperationError::NoSnapshot(name.to_owned()));
        };
        let mut next = tree.clone();
        next.snapshots.retain(|snapshot| snapshot.name != name);
        next.prune();
        let layer_cache = self.history.layer_cache();
        let _layers_locked = layer_cache.lock_changes();
        self.replace_tree(&next, None)?;
        if next.snapshot_name_of(layer).is_none()
            && let Some(file) = self.history.snapshot_files.lock().get(&layer)
        {
            file.mark_unlinked();
        }
        self.drop_unused_layers(&tree, &next);
        self.history.merges.want();
        Ok(())
    }

    /// Seals the disk's contents, unless they are sealed already. Returns the sealed layer.
    fn freeze_top(&self) -> Result<Uuid, OperationError> {
        let layers = self.layers();
        let Some(top) = layers.top.overlay() else {
            return Err(OperationError::NoOverlay("layers"));
        };
        let usage = top.usage();
        let is_same = layers.sealed.as_ref().is_some_and(|sealed| sealed.size() == top.size());
        if !is_same || usage != (Usage { data: 0, zero: 0 }) || top.lower_limit() != top.size() {
            self.seal(None)?;
        }
        let sealed = self.tree("layers")?.top().and_then(|top| top.parent);
        sealed.ok_or(OperationError::NoOverlay("layers"))
    }

    /// Seals the disk's contents for a clone.
    pub(in crate::disk) fn freeze(&self) -> Result<FrozenLayer, OperationError> {
        let layer = Some(self.freeze_top()?);
        // Not the size of the disk, which may have been resized since.
        let size = self.layers().sealed.as_ref().map(|sealed| sealed.size());
        match (&mut *self.overlay_location.lock(), layer, size) {
            (OverlayFiles::Persistent(dir), Some(layer), Some(size)) => {
                Ok(FrozenLayer { layer, size, stack: dir.stack.clone() })
            }
            _ => Err(OperationError::NoOverlay("clones")),
        }
    }

    /// The most bytes that all layers of the disk may hold together.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.history.limit
    }
}

/// Returns a name for an unnamed snapshot: the time it was taken.
fn unused_name(taken_names: &[String], taken: u64) -> String {
    let time = jiff::Timestamp::from_second(taken.cast_signed()).unwrap_or_default();
    let name = time.strftime("%Y-%m-%d_%H%M%S").to_string();
    let mut names = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    names.find(|name| !taken_names.contains(name)).unwrap_or(name)
}
