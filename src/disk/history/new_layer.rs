//! New layers of a disk, and the new tree and `stack` that name them: the core of snapshot, revert,
//! reset and merge.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::state::ResetSizes;
use crate::disk::Disk;
use crate::disk::new_size::SizeChange;
use crate::disk::operation::Force;
use crate::disk::operation_error::OperationError;
use crate::disk::overlay_location::OverlayFiles;
use crate::host::os_error;
use crate::layer::Layer;
use crate::overlay::persist::OverlayDir;
use crate::overlay::record::LayerMap;
use crate::overlay::stack::{LayerRecord, Stack};
use crate::overlay::tree::LayerTree;
use crate::overlay::{Overlay, keep};

/// The layer below a new top.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TopParent {
    /// The old top, which is sealed.
    Top,
    /// A sealed layer.
    Layer(Uuid),
    /// The base.
    Base,
}

/// A layer that was built and is in no tree yet: a new top, or one that two layers were merged into.
pub(super) struct NewLayer {
    pub(super) uuid: Uuid,
    pub(super) overlay: Overlay,
    lock: Option<File>,
}

impl Disk {
    /// Opens the layer `uuid` and all layers below it, top to bottom.
    pub(super) fn open_chain(
        &self,
        tree: &LayerTree,
        uuid: Uuid,
    ) -> Result<Vec<Arc<Overlay>>, OperationError> {
        let mut chain = Vec::new();
        // The lowest first: a layer is read only once the layers below it are final.
        for record in tree.chain(uuid).iter().rev() {
            let known = self.history.sealed.lock().get(&record.uuid).cloned();
            let layer = match (known, &mut *self.overlay_location.lock()) {
                (Some(layer), _) => layer,
                (None, OverlayFiles::Persistent(dir)) => {
                    dir.open_layer(record.uuid, &self.history.layer_cache())?
                }
                (None, _) => {
                    return Err(OperationError::io("opening a layer")(os_error(libc::ENOENT)));
                }
            };
            self.apply_direct(&layer)
                .map_err(OperationError::io("opening a layer past the host's cache"))?;
            self.history.sealed.lock().insert(record.uuid, Arc::clone(&layer));
            chain.push(layer);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Creates an empty layer for this disk, which is not part of a stack yet.
    pub(super) fn make_layer(
        &self,
        tree: &LayerTree,
        parent: Option<Uuid>,
        map: &LayerMap,
        limit: Option<u64>,
    ) -> Result<NewLayer, OperationError> {
        let uuid = Uuid::new_v4();
        let block = tree.top().map_or(crate::overlay::DEFAULT_BLOCK_SIZE, |top| top.block);
        let record = LayerRecord { uuid, block, parent };
        let (overlay, lock) = match &mut *self.overlay_location.lock() {
            OverlayFiles::Persistent(dir) => {
                let (overlay, lock) = dir.add_layer(&record, map, limit)?;
                (overlay, Some(lock))
            }
            OverlayFiles::Temporary { dir, .. } => {
                let made = keep::temporary(dir, block, map.size, map.lower_limit, limit);
                (made.map_err(OperationError::io("making a file for a layer"))?, None)
            }
            OverlayFiles::NoOverlay => return Err(OperationError::NoOverlay("layers")),
        };
        if let Err(error) = self.apply_direct(&overlay) {
            self.remove_layer(uuid);
            return Err(OperationError::io("opening a layer past the host's cache")(error));
        }
        Ok(NewLayer { uuid, overlay, lock })
    }

    /// Removes a layer that is not part of the stack.
    pub(super) fn remove_layer(&self, uuid: Uuid) {
        self.overlay_location.remove_layer(uuid);
    }

    /// The most bytes of data that a top above `below` may hold.
    pub(super) fn limit_above(&self, below: &[Arc<Overlay>]) -> Option<u64> {
        let held: u64 = below.iter().map(|layer| layer.usage().data).sum();
        self.history.limit.map(|limit| limit.saturating_sub(held))
    }

    /// Returns the uuid of the layer below a new top, and the layers below it, top to bottom. `old`
    /// is the present top.
    fn layers_below(
        &self,
        parent: TopParent,
        tree: &LayerTree,
        old: (Uuid, &Arc<Overlay>),
    ) -> Result<(Option<Uuid>, Vec<Arc<Overlay>>), OperationError> {
        Ok(match parent {
            TopParent::Top => {
                let mut below = self.layers().sealed_layers().to_vec();
                below.insert(0, Arc::clone(old.1));
                (Some(old.0), below)
            }
            TopParent::Layer(layer) => (Some(layer), self.open_chain(tree, layer)?),
            TopParent::Base => (None, Vec::new()),
        })
    }

    /// The map of an empty top above `below`.
    fn empty_map(&self, parent: TopParent, below: &[Arc<Overlay>]) -> LayerMap {
        let ResetSizes { size, lower_limit } = match parent {
            TopParent::Base => *self.history.reset_sizes.lock(),
            TopParent::Top | TopParent::Layer(_) => {
                let size = below.first().map_or(0, |layer| layer.size());
                ResetSizes { size, lower_limit: size }
            }
        };
        LayerMap::new(size, lower_limit)
    }

    /// Returns the top, unless a commit has left it in between.
    fn uncommitted_top(&self) -> Result<Arc<Overlay>, OperationError> {
        let top = self.overlay().ok_or(OperationError::NoOverlay("layers"))?;
        if top.is_committing() { Err(OperationError::CommitUnfinished) } else { Ok(top) }
    }

    /// Puts an empty top in place. `change` gets the new tree and the uuid of the old top.
    pub(super) fn put_empty_top(
        &self,
        parent: TopParent,
        force: Force,
        size_change: SizeChange,
        change: impl FnOnce(&mut LayerTree, Uuid),
    ) -> Result<(), OperationError> {
        let tree = self.tree("layers")?;
        let old = tree.top().map(|top| top.uuid).ok_or(OperationError::NoOverlay("layers"))?;
        let top = self.uncommitted_top()?;
        let (parent_uuid, below) = self.layers_below(parent, &tree, (old, &top))?;
        let limit = self.limit_above(&below);
        self.await_closed(self.empty_map(parent, &below).size, size_change);
        let make = || self.make_layer(&tree, parent_uuid, &self.empty_map(parent, &below), limit);
        // Created before the gate is taken: writers wait only for the switch.
        let mut new = make()?;
        let mut uuid = new.uuid;
        let layer_cache = self.history.layer_cache();
        let _layers_locked = layer_cache.lock_changes();
        let switch = || -> Result<LayerTree, OperationError> {
            let _gate = self.gate_for_layers()?;
            self.check_writers(force)?;
            self.begin_size_change(new.overlay.size(), size_change)?;
            if parent == TopParent::Top {
                if top.is_latched() {
                    return Err(OperationError::Latched);
                }
                if top.size() != new.overlay.size() {
                    self.remove_layer(uuid);
                    new = make()?;
                    uuid = new.uuid;
                }
                self.record_mtime(&top);
                layer_cache.insert(old, &top);
                self.history.sealed.lock().insert(old, Arc::clone(&top));
            }
            let mut next = tree.clone();
            next.push_top(uuid, parent_uuid);
            change(&mut next, old);
            next.prune();
            self.install_top(&next, new, below.clone())?;
            if parent != TopParent::Top {
                self.touch_times(&self.layers().top);
            }
            Ok(next)
        };
        match switch() {
            Ok(next) => {
                self.drop_unused_layers(&tree, &next);
                Ok(())
            }
            Err(error) => {
                // It takes writes again: its next sync must not close it.
                self.history.sealed.lock().remove(&old);
                self.remove_layer(uuid);
                Err(error)
            }
        }
    }

    /// Makes `new` the top, above `below`, and `next` the disk's tree. The caller holds the gate.
    pub(super) fn install_top(
        &self,
        next: &LayerTree,
        new: NewLayer,
        below: Vec<Arc<Overlay>>,
    ) -> Result<(), OperationError> {
        let layers = self.layers();
        let NewLayer { overlay, lock, .. } = new;
        overlay.set_lower_layers(&self.layers_to_sync(next, &below));
        if let Some(old) = layers.top.overlay() {
            overlay.continue_revision(old);
        }
        self.attrs.times.forget_recorded();
        self.record_mtime(&overlay);
        self.replace_tree(next, lock)?;
        *self.layers.write() = Arc::new(layers.with_top(Arc::new(overlay), below));
        Ok(())
    }

    /// The layers that a sync of a disk with the tree `next` makes durable: `below`, and those that
    /// only snapshots use.
    pub(super) fn layers_to_sync(
        &self,
        next: &LayerTree,
        below: &[Arc<Overlay>],
    ) -> Vec<Arc<Overlay>> {
        let known = self.history.sealed.lock();
        let known = known.iter().filter(|(uuid, _)| next.layer(**uuid).is_some());
        below.iter().chain(known.map(|(_, layer)| layer)).cloned().collect()
    }

    /// Makes `next` the disk's tree, durably if the overlay is persistent.
    pub(in crate::disk) fn replace_tree(
        &self,
        next: &LayerTree,
        lock: Option<File>,
    ) -> Result<(), OperationError> {
        match &mut *self.overlay_location.lock() {
            OverlayFiles::NoOverlay => Err(OperationError::NoOverlay("layers")),
            OverlayFiles::Temporary { tree, .. } => {
                *tree = next.clone();
                Ok(())
            }
            OverlayFiles::Persistent(dir) => {
                let stack = dir.stack.with_tree(next.clone());
                self.replace_stack(dir, stack, lock)
            }
        }
    }

    /// Makes `stack` the stack of the overlay directory `dir`, durably; `lock` is the lock of a
    /// new top. If it is unknown whether the replacement took effect, the disk accepts no more
    /// changes.
    pub(in crate::disk) fn replace_stack(
        &self,
        dir: &mut OverlayDir,
        stack: Stack,
        lock: Option<File>,
    ) -> Result<(), OperationError> {
        let replaced = match lock {
            Some(lock) => dir.replace_top(stack, lock),
            None => dir.replace_stack(stack),
        };
        if replaced.is_err() && dir.is_torn() {
            self.latch();
        }
        Ok(replaced?)
    }

    /// Drops the layers that are in `old` and not in `next`. The caller holds the lock of the layer
    /// cache (`lock_changes`).
    pub(in crate::disk) fn drop_unused_layers(&self, old: &LayerTree, next: &LayerTree) {
        let gone = |uuid: &Uuid| next.layer(*uuid).is_none();
        self.history.sealed.lock().retain(|uuid, _| !gone(uuid));
        // An open snapshot file stays readable and is still counted.
        self.history
            .snapshot_files
            .lock()
            .retain(|uuid, file| !gone(uuid) || file.handle_count() > 0);
        let dropped: Vec<Uuid> = old.layers.iter().map(|layer| layer.uuid).filter(gone).collect();
        if dropped.is_empty() {
            return;
        }
        match self.layers_used_by_others() {
            Ok(needed) => {
                dropped.into_iter().filter(|uuid| !needed.contains(uuid)).for_each(|uuid| {
                    self.remove_layer(uuid);
                });
            }
            Err(error) => log::warn!("{}: layers are left behind: {error}", self.source),
        }
    }

    /// The layers that other disks use.
    pub(super) fn layers_used_by_others(&self) -> io::Result<HashSet<Uuid>> {
        let others = self.history.layer_users.lock().clone();
        others.map_or_else(|| Ok(HashSet::new()), |others| others(&self.uuid))
    }

    /// All layers of the disk, each after the one below it, to be kept in a directory.
    pub(in crate::disk) fn all_layers(
        &self,
        tree: &LayerTree,
    ) -> Result<Vec<Arc<Overlay>>, OperationError> {
        let top = tree.top().map(|top| top.uuid);
        let open = |record: &LayerRecord| -> Result<Arc<Overlay>, OperationError> {
            let missing = || OperationError::NoOverlay("layers");
            if Some(record.uuid) == top {
                return self.overlay().ok_or_else(missing);
            }
            self.open_chain(tree, record.uuid)?.into_iter().next().ok_or_else(missing)
        };
        tree.layers.iter().map(open).collect()
    }
}
