//! The sealed layers that are open: each once in a process, whoever stands on it.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, MutexGuard};
use uuid::Uuid;

use super::Overlay;

/// Open sealed layers by their uuid. The disks of a store share one.
#[derive(Default)]
pub struct LayerCache {
    open: Mutex<HashMap<Uuid, Weak<Overlay>>>,
    changing: Mutex<()>,
}

impl LayerCache {
    /// The layer `uuid`, opened by `open` unless somebody has it open.
    ///
    /// # Errors
    /// What `open` says.
    pub fn get_or_open<E>(
        &self,
        uuid: Uuid,
        open: impl FnOnce() -> Result<Arc<Overlay>, E>,
    ) -> Result<Arc<Overlay>, E> {
        // Locked while it is opened: an unclosed layer is recovered once, and by one.
        let mut shelf = self.open.lock();
        if let Some(layer) = shelf.get(&uuid).and_then(Weak::upgrade) {
            return Ok(layer);
        }
        let layer = open()?;
        shelf.insert(uuid, Arc::downgrade(&layer));
        shelf.retain(|_, layer| layer.strong_count() > 0);
        Ok(layer)
    }

    /// Taken while the layers that a disk stands on change: between finding out that nobody else
    /// needs a layer and removing it, nobody begins to.
    pub fn lock_changes(&self) -> MutexGuard<'_, ()> {
        self.changing.lock()
    }

    /// Puts a layer there that was just sealed.
    pub fn insert(&self, uuid: Uuid, layer: &Arc<Overlay>) {
        self.open.lock().insert(uuid, Arc::downgrade(layer));
    }
}
