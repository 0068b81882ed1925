//! The replacement of a disk's layers: what snapshot, revert and reset come down to.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use uuid::Uuid;

use super::super::{Disk, Home, Layers, Top};
use super::{Force, LifeError};
use crate::host::errno;
use crate::layer::Layer;
use crate::overlay::persist::Residence;
use crate::overlay::record::Image;
use crate::overlay::sealed::Sealed;
use crate::overlay::stack::{LayerRecord, Stack};
use crate::overlay::tree::Tree;
use crate::overlay::{Overlay, keep};

/// Above what a new top is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Above {
    /// The old top, which is sealed by that.
    Top,
    /// A sealed layer.
    Layer(Uuid),
    /// The base.
    Base,
}

/// A top that is made and not yet in its place.
pub(super) struct NewTop {
    pub(super) uuid: Uuid,
    pub(super) overlay: Overlay,
    lock: Option<File>,
}

impl Disk {
    /// Opens the layer `uuid` and all below it, top to bottom.
    pub(super) fn open_chain(
        &self,
        tree: &Tree,
        uuid: Uuid,
    ) -> Result<Vec<Arc<Overlay>>, LifeError> {
        let mut chain = Vec::new();
        // The lowest first: what stands on it is read only once it is as it will stay.
        for record in tree.chain(uuid).iter().rev() {
            let known = self.life.sealed.lock().get(&record.uuid).cloned();
            let layer = match (known, &mut *self.home.lock()) {
                (Some(layer), _) => layer,
                (None, Home::Kept(home)) => home.sealed(record.uuid, &self.life.shelf())?,
                (None, _) => return Err(LifeError::host("opening a layer")(errno(libc::ENOENT))),
            };
            self.take_along(&layer)
                .map_err(LifeError::host("opening a layer past the host's cache"))?;
            self.life.sealed.lock().insert(record.uuid, Arc::clone(&layer));
            chain.push(layer);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Makes an empty layer for this disk, which no stack names yet.
    pub(super) fn make_layer(
        &self,
        tree: &Tree,
        parent: Option<Uuid>,
        image: &Image,
        limit: Option<u64>,
    ) -> Result<NewTop, LifeError> {
        let uuid = Uuid::new_v4();
        let block = tree.top().map_or(crate::overlay::DEFAULT_BLOCK, |top| top.block);
        let record = LayerRecord { uuid, block, parent };
        let (overlay, lock) = match &mut *self.home.lock() {
            Home::Kept(home) => {
                let (overlay, lock) = home.add_layer(&record, image, limit)?;
                (overlay, Some(lock))
            }
            Home::Temporary { dir, .. } => {
                let made = keep::temporary(dir, block, image.size, image.lower_limit, limit);
                (made.map_err(LifeError::host("making a file for a layer"))?, None)
            }
            Home::Nowhere => return Err(LifeError::NoOverlay("layers")),
        };
        if let Err(error) = self.take_along(&overlay) {
            self.unmake(uuid);
            return Err(LifeError::host("opening a layer past the host's cache")(error));
        }
        Ok(NewTop { uuid, overlay, lock })
    }

    /// Removes a layer that did not come into a stack.
    pub(super) fn unmake(&self, uuid: Uuid) {
        if let Some(home) = self.home.lock().residence() {
            home.remove_layer(uuid);
        }
    }

    /// What a top above `below` may hold, in bytes of data.
    pub(super) fn limit_above(&self, below: &[Arc<Overlay>]) -> Option<u64> {
        let held: u64 = below.iter().map(|layer| layer.usage().data).sum();
        self.life.limit.map(|limit| limit.saturating_sub(held))
    }

    /// Puts an empty top in place. `change` is given the new tree and the old top.
    pub(super) fn put_top(
        &self,
        above: Above,
        force: Force,
        change: impl FnOnce(&mut Tree, Uuid),
    ) -> Result<(), LifeError> {
        let tree = self.tree("layers")?;
        let old = tree.top().map(|top| top.uuid).ok_or(LifeError::NoOverlay("layers"))?;
        let Some(top) = self.overlay() else { return Err(LifeError::NoOverlay("layers")) };
        if top.is_committing() {
            return Err(LifeError::Unfinished);
        }
        let parent = match above {
            Above::Top => Some(old),
            Above::Layer(layer) => Some(layer),
            Above::Base => None,
        };
        let mut below = match above {
            Above::Top => self.layers().sealed.as_ref().map_or(Vec::new(), |s| s.layers().to_vec()),
            Above::Layer(layer) => self.open_chain(&tree, layer)?,
            Above::Base => Vec::new(),
        };
        if above == Above::Top {
            below.insert(0, Arc::clone(&top));
        }
        let limit = self.limit_above(&below);
        let size = below.first().map_or(0, |layer| layer.size());
        let fresh = *self.life.fresh.lock();
        let image = |top: &Overlay| match above {
            Above::Base => Image::new(fresh.0, fresh.1),
            Above::Top => Image::new(top.size(), top.size()),
            Above::Layer(_) => Image::new(size, size),
        };
        // Made before the gate is taken: writers wait for the switch alone.
        let mut new = self.make_layer(&tree, parent, &image(&top), limit)?;
        let mut uuid = new.uuid;
        let shelf = self.life.shelf();
        let _alone = shelf.alone();
        let switch = || -> Result<Tree, LifeError> {
            let _gate = self.enter_to_switch()?;
            self.check_writers(force)?;
            if above == Above::Top {
                if top.is_latched() {
                    return Err(LifeError::Latched);
                }
                if top.size() != new.overlay.size() {
                    self.unmake(uuid);
                    new = self.make_layer(&tree, parent, &image(&top), limit)?;
                    uuid = new.uuid;
                }
                self.record_mtime(&top);
                shelf.put(old, &top);
                self.life.sealed.lock().insert(old, Arc::clone(&top));
            }
            let mut next = tree.clone();
            next.grow(uuid, parent);
            change(&mut next, old);
            next.prune();
            self.install(&next, new, below)?;
            if above != Above::Top {
                self.touch(&self.layers().top);
            }
            Ok(next)
        };
        match switch() {
            Ok(next) => {
                self.drop_layers(&tree, &next);
                Ok(())
            }
            Err(error) => {
                self.unmake(uuid);
                Err(error)
            }
        }
    }

    /// Makes `new` the top, above `below`, and `next` the disk's tree. The gate is the caller's.
    pub(super) fn install(
        &self,
        next: &Tree,
        new: NewTop,
        below: Vec<Arc<Overlay>>,
    ) -> Result<(), LifeError> {
        let layers = self.layers();
        let NewTop { overlay, lock, .. } = new;
        overlay.stand_on(&self.to_settle(next, &below));
        if let Top::Overlay(old) = &layers.top {
            overlay.follow(old);
        }
        self.times.recorded.store(i64::MIN, Ordering::SeqCst);
        self.record_mtime(&overlay);
        self.replace_stack(next, lock)?;
        let top = Top::Overlay(Arc::new(overlay));
        let layers = Layers::new(top, Sealed::new(below).map(Arc::new), layers.bottom.clone());
        *self.layers.write() = Arc::new(layers);
        Ok(())
    }

    /// What a sync of a disk with the layers `next` makes durable: `below`, and what only
    /// snapshots stand on.
    pub(super) fn to_settle(&self, next: &Tree, below: &[Arc<Overlay>]) -> Vec<Arc<Overlay>> {
        let known = self.life.sealed.lock();
        let known = known.iter().filter(|(uuid, _)| next.layer(**uuid).is_some());
        below.iter().chain(known.map(|(_, layer)| layer)).cloned().collect()
    }

    /// Makes `next` the disk's tree, durably when it is kept.
    pub(in crate::disk) fn replace_stack(
        &self,
        next: &Tree,
        lock: Option<File>,
    ) -> Result<(), LifeError> {
        match &mut *self.home.lock() {
            Home::Nowhere => Err(LifeError::NoOverlay("layers")),
            Home::Temporary { tree, .. } => {
                *tree = next.clone();
                Ok(())
            }
            Home::Kept(home) => {
                let stack = home.stack.with_tree(next.clone());
                self.put_stack(home, stack, lock)
            }
        }
    }

    /// Makes `stack` that of `home`, durably; `lock` is that of a new top. When nobody knows
    /// whether it is, the disk takes no changes any more.
    pub(in crate::disk) fn put_stack(
        &self,
        home: &mut Residence,
        stack: Stack,
        lock: Option<File>,
    ) -> Result<(), LifeError> {
        let replaced = match lock {
            Some(lock) => home.replace_top(stack, lock),
            None => home.replace(stack),
        };
        if replaced.is_err()
            && home.is_torn()
            && let Some(overlay) = self.overlay()
        {
            overlay.give_up();
        }
        Ok(replaced?)
    }

    /// Lets go of the layers that were in `old` and are not in `next`. The caller holds the
    /// shelf alone.
    pub(in crate::disk) fn drop_layers(&self, old: &Tree, next: &Tree) {
        let gone = |uuid: &Uuid| next.layer(*uuid).is_none();
        self.life.sealed.lock().retain(|uuid, _| !gone(uuid));
        // Who has one open goes on reading it, and is counted.
        self.life.files.lock().retain(|uuid, file| !gone(uuid) || file.openers() > 0);
        let dropped: Vec<Uuid> = old.layers.iter().map(|layer| layer.uuid).filter(gone).collect();
        if dropped.is_empty() {
            return;
        }
        match self.layers_of_others() {
            Ok(needed) => {
                dropped.into_iter().filter(|uuid| !needed.contains(uuid)).for_each(|uuid| {
                    self.unmake(uuid);
                });
            }
            Err(error) => log::warn!("{}: layers are left behind: {error}", self.source),
        }
    }

    /// The layers that other disks stand on.
    pub(super) fn layers_of_others(&self) -> io::Result<HashSet<Uuid>> {
        let others = self.life.others.lock().clone();
        others.map_or_else(|| Ok(HashSet::new()), |others| others(&self.uuid))
    }

    /// All its layers, each after the one below it, to be kept in a directory.
    pub(in crate::disk) fn all_layers(&self, tree: &Tree) -> Result<Vec<Arc<Overlay>>, LifeError> {
        let top = tree.top().map(|top| top.uuid);
        let open = |record: &LayerRecord| -> Result<Arc<Overlay>, LifeError> {
            let missing = || LifeError::NoOverlay("layers");
            if Some(record.uuid) == top {
                return self.overlay().ok_or_else(missing);
            }
            self.open_chain(tree, record.uuid)?.into_iter().next().ok_or_else(missing)
        };
        tree.layers.iter().map(open).collect()
    }
}
