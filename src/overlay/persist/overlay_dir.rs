//! The open directory of an overlay: its `stack`, the files of its layers, and its lock.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;

use rustix::fs::{AtFlags, FlockOperation};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layer_dir::{empty_data, make_layer, open_sealed, remove_layer};
use crate::confined;
use crate::overlay::Overlay;
use crate::overlay::error::OverlayError;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::record::LayerMap;
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{LayerRecord, Stack};

/// The daemon that has an overlay open, as its `holder` file tells people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The daemon's process id.
    pub pid: u32,
    /// The daemon's mountpoint.
    pub mountpoint: String,
    /// Whether the daemon is ending, so that waiting for it is worthwhile.
    pub draining: bool,
}

/// A persistent overlay that is open.
pub struct OpenedOverlay {
    /// The layer that takes the writes.
    pub overlay: Overlay,
    /// The sealed layers below the top, top to bottom.
    pub below: Vec<Arc<Overlay>>,
    /// The sealed layers that only snapshots use.
    pub snapshot_layers: Vec<(Uuid, Arc<Overlay>)>,
    /// The condition in which the overlay was found.
    pub recovered: Recovered,
    /// The open directory, with the lock.
    pub dir: OverlayDir,
}

/// The open directory of a persistent overlay, with its `stack` and its lock.
pub struct OverlayDir {
    /// The layers and the base of the disk.
    pub stack: Stack,
    dir: File,
    layers_dir: File,
    /// The lock; released when the last descriptor of this open file is closed.
    lock: File,
    /// Whether the `stack` on disk may differ from this one.
    torn: bool,
}

impl OverlayDir {
    /// Combines the open directory `dir` of an overlay, the directory of its layers, and the lock.
    pub(in crate::overlay) fn new(stack: Stack, dir: File, layers_dir: File, lock: File) -> Self {
        Self { stack, dir, layers_dir, lock, torn: false }
    }

    /// Replaces the `stack`, durably.
    ///
    /// # Errors
    /// The host's errno; the old `stack` is in place in that case.
    pub fn replace_stack(&mut self, stack: Stack) -> Result<(), OverlayError> {
        // The inode tells the old file from the new one, and statting needs no descriptor: running out
        // of descriptors may be the reason why the write fails.
        let inode = || rustix::fs::statat(&self.dir, "stack", AtFlags::SYMLINK_NOFOLLOW);
        let before = inode().map(|found| found.st_ino);
        if let Err(error) = stack.write(&self.dir) {
            // The new `stack` may be in place without the rename being durable.
            let is_old = before.is_ok_and(|old| inode().is_ok_and(|now| now.st_ino == old));
            if !is_old && let Err(again) = self.stack.write(&self.dir) {
                log::error!("the old 'stack' could not be put back: {again}");
                self.torn = true;
            }
            return Err(error);
        }
        self.stack = stack;
        Ok(())
    }

    /// Returns whether the `stack` on disk may differ from this one, so that nothing may be
    /// acknowledged any more.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Returns whether the directory still holds this `stack` and was not removed.
    #[must_use]
    pub fn is_on_disk(&self) -> bool {
        match Stack::read(&self.dir) {
            Ok(found) => found == self.stack,
            Err(OverlayError::Io { error, .. }) => error.kind() != io::ErrorKind::NotFound,
            Err(_) => false,
        }
    }

    /// Replaces the `stack` like [`replace_stack`](Self::replace_stack) when the top changes;
    /// `lock` is the new top's lock.
    ///
    /// # Errors
    /// The errors of [`replace_stack`](Self::replace_stack).
    pub fn replace_top(&mut self, stack: Stack, lock: File) -> Result<(), OverlayError> {
        self.replace_stack(stack)?;
        self.lock = lock;
        Ok(())
    }

    /// Creates a layer that no stack names yet, durably, and locks it.
    ///
    /// # Errors
    /// [`OverlayError`]; nothing is left behind in that case.
    pub fn add_layer(
        &self,
        record: &LayerRecord,
        map: &LayerMap,
        limit: Option<u64>,
    ) -> Result<(Overlay, File), OverlayError> {
        make_layer(&self.layers_dir, record, map, limit, |dir| empty_data(dir, map.size))
            .inspect_err(|_| self.remove_layer(record.uuid))
    }

    /// Returns the sealed layer `uuid` of this disk from `cache`, opening it if necessary.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn open_layer(&self, uuid: Uuid, cache: &LayerCache) -> Result<Arc<Overlay>, OverlayError> {
        let record = self.stack.layers.iter().find(|layer| layer.uuid == uuid);
        let record = record.ok_or_else(|| {
            OverlayError::io("opening its layer")(io::Error::from_raw_os_error(libc::ENOENT))
        })?;
        cache.get_or_open(uuid, || {
            open_sealed(&self.layers_dir, &self.stack.tree(), record).map(|(layer, _)| layer)
        })
    }

    /// Removes the files of a layer that no stack names any more. Best effort: remaining files are
    /// removed when the overlay is opened the next time.
    pub fn remove_layer(&self, uuid: Uuid) {
        if self.torn {
            return; // The stack on disk may still name the layer.
        }
        if let Err(error) = remove_layer(&self.layers_dir, uuid) {
            log::debug!("the files of layer {uuid} are left behind: {error}");
        }
    }

    /// Writes the `holder` file for display. Best effort: only the lock counts.
    pub fn write_holder(&self, holder: &Holder) {
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(holder)?;
            confined::recreate_file(&self.dir, "holder.new")?.write_all(&bytes)?;
            rustix::fs::renameat(&self.dir, "holder.new", &self.dir, "holder")?;
            Ok(())
        };
        if let Err(error) = write() {
            log::debug!("the holder file is not written: {error}");
        }
    }

    /// Removes the `holder` file.
    pub fn remove_holder(&self) {
        let _ = rustix::fs::unlinkat(&self.dir, "holder", AtFlags::empty());
    }

    /// Releases the lock at once, while this process goes on: a child that was just forked shares
    /// the open file until it executes its program. This process must not use the overlay any more.
    pub fn unlock(self) {
        self.remove_holder();
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            log::debug!("an overlay is unlocked only when it is closed: {error}");
        }
    }
}
