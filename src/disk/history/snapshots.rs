//! Views of a disk's layers: snapshots, their files, and the changes since each.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use crate::base::raw::{HostKind, RawBase};
use crate::config::{DiskMode, DiskSource, DiskSpec};
use crate::disk::Disk;
use crate::disk::attrs::{DiskOwner, Times, from_system_time, mtime_of};
use crate::disk::base_description::BaseDescription;
use crate::disk::layers::LayerStack;
use crate::disk::operation_error::OperationError;
use crate::host::os_error;
use crate::layer::Layer;
use crate::overlay::reflink::{self, Reflink};
use crate::overlay::sealed::Sealed;
use crate::overlay::stack::{LayerRecord, SnapshotRecord};
use crate::overlay::tree::LayerTree;
use crate::overlay::{Overlay, Usage};

/// The description of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotInfo {
    /// The snapshot's name.
    pub name: String,
    /// The time of the snapshot in seconds since the epoch.
    pub taken: i64,
    /// The disk's size at that time, in bytes.
    pub size: u64,
    /// Bytes held by the snapshot's own layer: the changes between the previous snapshot and this
    /// one. `None` for a reflink overlay, whose snapshots are whole files.
    pub usage: Option<Usage>,
    /// Bytes changed since the snapshot; `None` when the disk is not based on it.
    pub since: Option<Usage>,
}

/// A layer that a disk reads through, for `status`.
#[derive(Clone, Debug)]
pub struct LayerUsage {
    /// The name of the layer's snapshot; `None` for the top and for an unnamed layer.
    pub name: Option<String>,
    /// The layer's uuid.
    pub uuid: Uuid,
    /// Bytes held by the layer.
    pub usage: Usage,
    /// Bytes changed by this layer and the layers above it.
    pub since: Usage,
}

fn add_usage(one: Usage, other: Usage) -> Usage {
    Usage { data: one.data + other.data, zero: one.zero + other.zero }
}

impl Disk {
    /// Returns the disk's snapshots, oldest first.
    ///
    /// # Errors
    /// [`OperationError`] when the disk has no overlay or a layer cannot be opened.
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, OperationError> {
        if let Some(reflink) = self.reflink() {
            let info = |snapshot: reflink::ReflinkSnapshot| SnapshotInfo {
                name: snapshot.name,
                taken: from_system_time(snapshot.made) / 1_000_000_000,
                size: snapshot.size,
                usage: None,
                since: None,
            };
            return Ok(reflink.list_snapshots()?.into_iter().map(info).collect());
        }
        loop {
            let tree = self.tree("snapshots")?;
            match self.snapshots_of_tree(&tree) {
                // Layers were merged meanwhile, so the layers of this tree no longer exist.
                Err(_) if self.tree("snapshots")? != tree => {}
                found => return found,
            }
        }
    }

    fn snapshots_of_tree(&self, tree: &LayerTree) -> Result<Vec<SnapshotInfo>, OperationError> {
        let live = self.layer_usages();
        let mut infos = Vec::new();
        for SnapshotRecord { name, layer, taken } in &tree.snapshots {
            let opened = self.open_chain(tree, *layer)?;
            let Some(top) = opened.first() else { continue };
            // The changes in the layers above the snapshot.
            let at = live.iter().position(|since| since.uuid == *layer);
            let since = at.and_then(|at| live.get(at.checked_sub(1)?)).map(|above| above.since);
            infos.push(SnapshotInfo {
                name: name.clone(),
                taken: *taken,
                size: top.size(),
                usage: Some(top.usage()),
                since,
            });
        }
        Ok(infos)
    }

    /// The overlay's layers that the disk reads through, top to bottom, with the bytes each holds
    /// and the bytes changed since the layer below. Empty without an overlay.
    #[must_use]
    pub fn layer_usages(&self) -> Vec<LayerUsage> {
        let Some(tree) = self.overlay_location.tree() else {
            return Vec::new();
        };
        let layers = self.layers();
        let Some(top) = layers.top.overlay() else {
            return Vec::new();
        };
        let mut all = vec![Arc::clone(top)];
        all.extend(layers.sealed_layers().iter().cloned());
        let live = tree.top_chain();
        let visible = self.visible_usage(top, live.first().map(|top| top.uuid), &all);
        let mut since = Usage { data: 0, zero: 0 };
        let entries = live.iter().zip(all.iter().zip(visible));
        let describe = |(record, (layer, visible)): (&LayerRecord, (&Arc<Overlay>, Usage))| {
            since = add_usage(since, visible);
            let name = tree.snapshot_name_of(record.uuid).map(str::to_owned);
            LayerUsage { name, uuid: record.uuid, usage: layer.usage(), since }
        };
        entries.map(describe).collect()
    }

    /// Counts the visible bytes of each layer in `all`, again only after the top has changed.
    fn visible_usage(&self, top: &Overlay, uuid: Option<Uuid>, all: &[Arc<Overlay>]) -> Vec<Usage> {
        if all.len() == 1 {
            return vec![top.usage()];
        }
        let (revision, uuid) = (top.revision(), uuid.unwrap_or_default());
        let known = self.history.visible_usage.lock().clone();
        if let Some((at, of, visible)) = known
            && (at, of, visible.len()) == (revision, uuid, all.len())
        {
            return visible;
        }
        let visible = Sealed::new(all.to_vec()).map_or_else(Vec::new, |all| all.visible_usage());
        *self.history.visible_usage.lock() = Some((revision, uuid, visible.clone()));
        visible
    }

    /// Returns a read-only disk with the contents at snapshot `name`.
    ///
    /// # Errors
    /// `ENOENT` when there is no such snapshot; the host's errno.
    pub fn snapshot_file(&self, name: &str) -> io::Result<Arc<Self>> {
        let missing = || os_error(libc::ENOENT);
        if let Some(reflink) = self.reflink() {
            return self.reflink_snapshot_file(&reflink, name);
        }
        if let Some(file) = self.diff_file(name) {
            return Ok(file);
        }
        loop {
            let tree = self.overlay_location.tree().ok_or_else(missing)?;
            let record = tree.snapshot(name).ok_or_else(missing)?;
            match self.layered_snapshot_file(&tree, record) {
                Ok(file) => return Ok(file),
                // Layers were merged meanwhile, so the layers of this tree no longer exist.
                Err(_) if self.overlay_location.tree().as_ref() != Some(&tree) => {}
                Err(error) => {
                    if self.history.damage_log.allow() {
                        log::error!("{}: snapshot '{name}' cannot be opened: {error}", self.source);
                    }
                    return Err(os_error(libc::EIO));
                }
            }
        }
    }

    fn layered_snapshot_file(
        &self,
        tree: &LayerTree,
        record: &SnapshotRecord,
    ) -> Result<Arc<Self>, OperationError> {
        if let Some(file) = self.history.snapshot_files.lock().get(&record.layer) {
            return Ok(Arc::clone(file));
        }
        let chain = self.open_chain(tree, record.layer)?;
        let time = chain.first().and_then(|layer| layer.mtime()).map(|(mtime, _)| mtime);
        let bottom = self.layers().bottom.clone();
        let layers = LayerStack::read_only(chain, bottom);
        let time = time.unwrap_or(record.taken.saturating_mul(1_000_000_000));
        Ok(self.make_snapshot_file(&record.name, (record.layer, record.layer), layers, time))
    }

    fn reflink_snapshot_file(&self, reflink: &Reflink, name: &str) -> io::Result<Arc<Self>> {
        let uuid = snapshot_uuid(&self.uuid, name);
        if let Some(file) = self.history.snapshot_files.lock().get(&uuid) {
            return Ok(Arc::clone(file));
        }
        let file = reflink
            .open_snapshot(name)
            .map_err(|error| os_error(error.errno().unwrap_or(libc::ENOENT)))?;
        let found = file.metadata()?;
        let raw = RawBase::new(Arc::new(file), HostKind::File, found.len())?;
        let layers = LayerStack::read_only(Vec::new(), Some(Arc::new(raw)));
        // A later snapshot of the same name is another file: pages that the kernel has cached of
        // one must not be shown for the other.
        Ok(self.make_snapshot_file(name, (uuid, Uuid::new_v4()), layers, mtime_of(&found)))
    }

    /// Creates a read-only disk from the layers of a snapshot, with the given `uuid`, and keeps it
    /// under `key`.
    pub(super) fn make_snapshot_file(
        &self,
        name: &str,
        (key, uuid): (Uuid, Uuid),
        layers: LayerStack,
        mtime: i64,
    ) -> Arc<Self> {
        let mut spec = DiskSpec::new(name.to_owned(), DiskSource::Blank(layers.size()));
        spec.mode = DiskMode::ReadOnly;
        let owner = self.owner();
        let owner = DiskOwner { perm: owner.perm & 0o444, ..owner };
        let description = BaseDescription::Blank(layers.size());
        let mut disk = Disk::new(&spec, uuid, layers, description, owner);
        disk.attrs.times = Times::new(mtime, false, None);
        disk.source = format!("snapshot '{name}' of {}", self.source);
        let disk = Arc::new(disk);
        Arc::clone(self.history.snapshot_files.lock().entry(key).or_insert(disk))
    }

    /// The names of the disk's snapshots, oldest first.
    #[must_use]
    pub fn snapshot_names(&self) -> Vec<String> {
        if let Some(reflink) = self.reflink() {
            let listed = reflink.list_snapshots().unwrap_or_default();
            return listed.into_iter().map(|snapshot| snapshot.name).collect();
        }
        let tree = self.overlay_location.tree();
        tree.map_or_else(Vec::new, |tree| {
            tree.snapshots.into_iter().map(|snapshot| snapshot.name).collect()
        })
    }

    /// Returns the files of snapshots and diffs that the mount shows or somebody has open.
    #[must_use]
    pub fn snapshot_files(&self) -> Vec<Arc<Disk>> {
        self.history.snapshot_files.lock().values().map(Arc::clone).collect()
    }

    /// Number of open handles of the snapshots' files.
    pub(in crate::disk) fn snapshot_handle_count(&self) -> u32 {
        self.history.snapshot_files.lock().values().map(|file| file.handle_count()).sum()
    }
}

/// Derives the uuid of a snapshot that has no layer of its own.
pub(super) fn snapshot_uuid(disk: &Uuid, name: &str) -> Uuid {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    Uuid::from_u64_pair(disk.as_u64_pair().0 ^ hasher.finish(), disk.as_u64_pair().1)
}
