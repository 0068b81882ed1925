//! The state of a disk's history: its open sealed layers, and the files of its snapshots.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::diff::DiffFile;
use super::merge_schedule::MergeSchedule;
use crate::config::Locking;
use crate::disk::Disk;
use crate::log_throttle::LogThrottle;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::stack::LayerRecord;
use crate::overlay::{Overlay, Usage};

/// Returns the layers used by the disks other than the given one.
pub type LayerUsers = Arc<dyn Fn(&Uuid) -> io::Result<HashSet<Uuid>> + Send + Sync>;

/// The sizes of a disk after a reset, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::disk) struct ResetSizes {
    /// The size of the disk.
    pub(in crate::disk) size: u64,
    /// The length of the base that shows through the empty top.
    pub(in crate::disk) lower_limit: u64,
}

/// A disk's open sealed layers, the files of its snapshots, and what a new top needs to know.
pub(in crate::disk) struct History {
    /// When layers are merged.
    pub(super) merges: MergeSchedule,
    /// The open sealed layers of this disk, including those it does not read through.
    pub(super) sealed: Mutex<HashMap<Uuid, Arc<Overlay>>>,
    /// The sealed layers open in this process.
    pub(super) layer_cache: Mutex<Arc<LayerCache>>,
    /// Reports which layers other disks use; `None` if no disk shares layers.
    pub(super) layer_users: Mutex<Option<LayerUsers>>,
    /// The files of snapshots that were looked up, by their layer.
    pub(super) snapshot_files: Mutex<HashMap<Uuid, Arc<Disk>>>,
    pub(super) damage_log: LogThrottle,
    /// The files of differences.
    pub(super) diff_files: Mutex<Vec<DiffFile>>,
    /// The sizes of an empty top above the base.
    pub(in crate::disk) reset_sizes: Mutex<ResetSizes>,
    /// How a commit locks the base.
    pub(in crate::disk) locking: Option<Locking>,
    /// The most bytes that all layers of the disk may hold together.
    pub(in crate::disk) limit: Option<u64>,
    /// The last result of counting the visible bytes of each layer, with the revision and uuid of
    /// the top.
    pub(super) visible_usage: Mutex<Option<(u64, Uuid, Vec<Usage>)>>,
}

impl History {
    /// Creates the state of a disk whose layers may hold `limit` bytes together.
    pub(in crate::disk) fn new(reset_sizes: ResetSizes, limit: Option<u64>) -> Self {
        Self {
            merges: MergeSchedule::wanted(),
            sealed: Mutex::default(),
            layer_cache: Mutex::default(),
            layer_users: Mutex::default(),
            snapshot_files: Mutex::default(),
            damage_log: LogThrottle::default(),
            diff_files: Mutex::default(),
            reset_sizes: Mutex::new(reset_sizes),
            locking: None,
            limit,
            visible_usage: Mutex::default(),
        }
    }

    /// The sealed layers open in this process.
    pub(in crate::disk) fn layer_cache(&self) -> Arc<LayerCache> {
        Arc::clone(&self.layer_cache.lock())
    }

    /// All open sealed layers of the disk, including layers that only snapshots use.
    pub(in crate::disk) fn open_sealed(&self) -> Vec<Arc<Overlay>> {
        self.sealed.lock().values().cloned().collect()
    }

    /// Records all open sealed layers: `below`, top to bottom, of the stack whose layers are
    /// `chain`, and `snapshot_layers`, which only snapshots use.
    pub(in crate::disk) fn set_sealed(
        &self,
        chain: &[LayerRecord],
        below: &[Arc<Overlay>],
        snapshot_layers: Vec<(Uuid, Arc<Overlay>)>,
    ) {
        let below = chain.iter().skip(1).map(|record| record.uuid).zip(below.iter().cloned());
        *self.sealed.lock() = below.chain(snapshot_layers).collect();
    }

    /// Drops the files of snapshots and of differences.
    pub(in crate::disk) fn drop_files(&self) {
        self.diff_files.lock().clear();
        self.snapshot_files.lock().clear();
    }
}

impl Disk {
    /// Makes the disk one of a store, whose sealed layers other disks may share.
    pub fn share_layers(&self, layer_cache: &Arc<LayerCache>, others: LayerUsers) {
        // Other disks' layers are determined when something was deleted, not at every mount.
        self.history.merges.forget();
        *self.history.layer_cache.lock() = Arc::clone(layer_cache);
        *self.history.layer_users.lock() = Some(others);
    }
}
