//! Existing overlays: locking them first, reading them afterwards.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use super::layer_dir::{open_layer_files, open_sealed};
use super::overlay_dir::{Holder, OpenedOverlay, OverlayDir};
use super::path::{OverlayPath, open_overlay_dir};
use crate::confined;
use crate::overlay::error::{LogError, OverlayError};
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::recover::{self, LayerFiles, Recovered};
use crate::overlay::stack::{LayerRecord, Stack};
use crate::overlay::{Overlay, boot_tag};
use crate::trust;
use crate::trusted_path::open_dir;

/// The longest wait for a daemon that is draining, or that has died and is being cleaned up: 10 s.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest wait for a holder without a readable `holder` file: 200 ms. Such a daemon is just
/// starting or ending, or a child that it has forked is about to execute another program.
const UNKNOWN_HOLDER_TIMEOUT: Duration = Duration::from_millis(200);
/// The longest `holder` file in bytes: a path and a few numbers.
const MAX_HOLDER_LEN: u64 = 64 << 10;

/// A persistent overlay that is locked, before its log is read.
pub struct LockedOverlay {
    /// The layers and the base of the disk.
    pub stack: Stack,
    pub(in crate::overlay) dir: File,
    pub(in crate::overlay) layers_dir: File,
    lock: File,
    files: LayerFiles,
    top: LayerRecord,
}

/// Locks the overlay at `path`.
///
/// # Errors
/// [`OverlayError`]: missing, damaged, of another version, in use.
pub fn lock_overlay(path: OverlayPath<'_>) -> Result<LockedOverlay, OverlayError> {
    let dir = open_overlay_dir(path.dir)?;
    // Checked before the layers are opened: a reflink overlay has none.
    let mut record = Stack::read(&dir)?.top_layer()?;
    let layers_dir = match path.layers {
        None => confined::open_subdir(&dir, "layers"),
        Some(layers_dir) => open_dir(layers_dir).and_then(|dir| {
            trust::check(&dir).map_err(io::Error::other)?;
            Ok(dir)
        }),
    };
    let layers_dir = layers_dir.map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound if path.layers.is_none() => OverlayError::NoLayers,
        _ => OverlayError::io("opening its layers")(error),
    })?;
    loop {
        let layer = open_layer_files(&layers_dir, &record, |data| take_lock(&dir, data))?;
        // Read again under the lock: the last holder may have changed the stack.
        let stack = Stack::read(&dir)?;
        let top = stack.top_layer()?;
        if top == record {
            let (lock, files) = (layer.lock, layer.files);
            return Ok(LockedOverlay { stack, dir, layers_dir, lock, files, top: record });
        }
        record = top;
    }
}

/// Takes the lock. Waits for a daemon that is draining, and for the kernel while it cleans up after
/// a daemon that has died.
pub(in crate::overlay) fn take_lock(dir: &File, data: &File) -> Result<(), OverlayError> {
    let start = Instant::now();
    loop {
        match rustix::fs::flock(data, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(OverlayError::io("locking it")(error.into())),
        }
        let holder = read_holder(dir);
        let timeout = match &holder {
            None => UNKNOWN_HOLDER_TIMEOUT,
            Some(holder) if holder.draining || !is_running(holder.pid) => DRAIN_TIMEOUT,
            Some(_) => Duration::ZERO,
        };
        if start.elapsed() >= timeout {
            let (pid, mountpoint) =
                holder.map_or((0, "unknown".to_owned()), |holder| (holder.pid, holder.mountpoint));
            return Err(OverlayError::InUse { pid, mountpoint });
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn is_running(pid: u32) -> bool {
    Path::new("/proc").join(pid.to_string()).exists()
}

fn read_holder(dir: &File) -> Option<Holder> {
    let bytes = confined::read_file(dir, "holder", MAX_HOLDER_LEN).ok()?;
    serde_json::from_slice(&bytes).ok()
}

impl LockedOverlay {
    /// Returns the block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        self.top.block
    }

    fn log_error(&self) -> impl Fn(LogError) -> OverlayError + use<> {
        let uuid = self.top.uuid;
        move |error| OverlayError::Log { uuid, error }
    }

    /// Returns whether a commit into the base has begun and not ended.
    ///
    /// # Errors
    /// [`OverlayError::Log`].
    pub fn is_committing(&self) -> Result<bool, OverlayError> {
        let tag = boot_tag::current(&self.dir).map_err(OverlayError::io("reading the boot id"))?;
        let trusted = recover::examine(&self.files, tag).map_err(self.log_error())?;
        let map = recover::load_map(&self.files, &trusted).map_err(self.log_error())?;
        Ok(map.is_committing)
    }

    /// Opens the overlay for use, taking sealed layers that are already open from `cache`. `limit`
    /// caps the total bytes of data that all its layers may hold.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn open(
        self,
        limit: Option<u64>,
        cache: &LayerCache,
    ) -> Result<OpenedOverlay, OverlayError> {
        let tag = boot_tag::current(&self.dir).map_err(OverlayError::io("reading the boot id"))?;
        let mut recovered = Recovered::Clean;
        let mut below = Vec::new();
        // The lowest layer first: a layer must be recovered before the layers above it are read.
        let tree = self.stack.tree();
        for record in tree.top_chain().iter().skip(1).rev() {
            below.push(cache.get_or_open(record.uuid, || {
                let (layer, found) = open_sealed(&self.layers_dir, &tree, record)?;
                recovered = recovered.combine(found);
                Ok::<_, OverlayError>(layer)
            })?);
        }
        below.reverse();
        let snapshot_layers = self.open_snapshot_layers(cache);
        let held: u64 = below.iter().map(|layer| layer.usage().data).sum();
        let limit = limit.map(|limit| limit.saturating_sub(held));
        let (overlay, found) =
            Overlay::open(&self.files, tag, limit, &below).map_err(self.log_error())?;
        let Self { stack, dir, layers_dir, lock, .. } = self;
        let (recovered, dir) =
            (recovered.combine(found), OverlayDir::new(stack, dir, layers_dir, lock));
        Ok(OpenedOverlay { overlay, below, snapshot_layers, recovered, dir })
    }

    /// Opens the layers that only snapshots use: this disk has to make them durable, too.
    fn open_snapshot_layers(&self, cache: &LayerCache) -> Vec<(Uuid, Arc<Overlay>)> {
        let tree = self.stack.tree();
        let chain: Vec<Uuid> = tree.top_chain().iter().map(|layer| layer.uuid).collect();
        // The tree lists each layer after its parent.
        let side_layers = tree.layers.iter().filter(|layer| !chain.contains(&layer.uuid));
        let mut unopened = HashSet::new();
        let mut open = |record: &LayerRecord| {
            if record.parent.is_some_and(|parent| unopened.contains(&parent)) {
                // Opening it would close it, before the one below it.
                unopened.insert(record.uuid);
                return None;
            }
            let opened = cache.get_or_open(record.uuid, || {
                open_sealed(&self.layers_dir, &tree, record).map(|(layer, _)| layer)
            });
            match opened {
                Ok(layer) => Some((record.uuid, layer)),
                Err(error) => {
                    log::warn!("layer {}, of a snapshot, cannot be opened: {error}", record.uuid);
                    unopened.insert(record.uuid);
                    None
                }
            }
        };
        side_layers.filter_map(&mut open).collect()
    }

    /// Removes the layers that the stack does not name, left behind by an interrupted operation.
    /// Only for an overlay that does not share its directory of layers.
    pub fn remove_all_unused(&self) {
        for layer in self.unused_layers().unwrap_or_default() {
            if let Err(error) = self.remove_unused(layer) {
                let uuid = layer.uuid;
                log::warn!("layer {uuid}, which nothing needs, is left behind: {error}");
            }
        }
    }

    /// Returns the locked directory, for a caller that changes the `stack` but reads no layer.
    #[must_use]
    pub fn into_dir(self) -> OverlayDir {
        let Self { stack, dir, layers_dir, lock, .. } = self;
        OverlayDir::new(stack, dir, layers_dir, lock)
    }
}
