//! The open sealed layers: each is opened once per process and shared by the disks that use it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::Overlay;

/// Open sealed layers by their uuid, shared by the disks of a store.
#[derive(Default)]
pub struct LayerCache {
    open: Mutex<HashMap<Uuid, Weak<Overlay>>>,
    changing: Mutex<()>,
}

impl LayerCache {
    /// Returns the layer `uuid`, opening it with `open` unless it is open already.
    ///
    /// # Errors
    /// The errors of `open`.
    pub fn get_or_open<E>(
        &self,
        uuid: Uuid,
        open: impl FnOnce() -> Result<Arc<Overlay>, E>,
    ) -> Result<Arc<Overlay>, E> {
        // Locked during `open`, so that an unclosed layer is recovered only once.
        let mut layers = self.open.lock();
        if let Some(layer) = layers.get(&uuid).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = open()?;
        layers.insert(uuid, Arc::downgrade(&layer));
        layers.retain(|_, layer| layer.strong_count() > 0);
        Ok(layer)
    }

    /// Locks changes of the layers that disks use, so that no disk begins to use a layer between
    /// the check that it is unused and its removal.
    pub fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.changing.lock()
    }

    /// Adds a layer that was just sealed.
    pub fn insert(&self, uuid: Uuid, layer: &Arc<Overlay>) {
        self.open.lock().insert(uuid, Arc::downgrade(layer));
    }
}
