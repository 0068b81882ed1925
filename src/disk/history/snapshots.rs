//! What is seen of a disk's layers: its snapshots, their files, what changed since each.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;

use uuid::Uuid;

use super::super::bottom::Bottom;
use super::super::open::new_disk;
use super::super::{Disk, DiskOwner, LayerStack, Times, Top, from_system_time, mtime_of};
use super::OperationError;
use crate::base::raw::{HostKind, RawBase};
use crate::config::{DiskMode, DiskSource, DiskSpec};
use crate::host::os_error;
use crate::layer::Layer;
use crate::overlay::reflink::{self, Reflink};
use crate::overlay::sealed::Sealed;
use crate::overlay::stack::{LayerRecord, SnapshotRecord};
use crate::overlay::tree::LayerTree;
use crate::overlay::{Overlay, Usage};

/// What is seen of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since the epoch.
    pub taken: i64,
    /// The disk's size then, in bytes.
    pub size: u64,
    /// What its own layer holds: the changes between the snapshot before it and itself. `None`
    /// for a reflink overlay, whose snapshots are whole files.
    pub usage: Option<Usage>,
    /// What has changed since; `None` when the disk does not stand on it.
    pub since: Option<Usage>,
}

/// A layer that a disk reads through, for `status`.
#[derive(Clone, Debug)]
pub struct LayerUsage {
    /// The snapshot it is; `None` for the top and for a layer without a name.
    pub name: Option<String>,
    /// Its uuid.
    pub uuid: Uuid,
    /// What it holds.
    pub usage: Usage,
    /// What it and the layers above it have changed.
    pub since: Usage,
}

fn add_usage(one: Usage, other: Usage) -> Usage {
    Usage { data: one.data + other.data, zero: one.zero + other.zero }
}

impl Disk {
    /// The disk's snapshots, oldest first.
    ///
    /// # Errors
    /// [`OperationError`].
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
                // Layers were merged meanwhile: what the tree named is gone.
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
            // What the layers above it have changed.
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

    /// The overlay's layers that the disk reads through, top to bottom, with what each holds and
    /// what has changed since the one below it. Empty without an overlay.
    #[must_use]
    pub fn layer_usages(&self) -> Vec<LayerUsage> {
        let Some(tree) = self.overlay_location.lock().tree() else {
            return Vec::new();
        };
        let layers = self.layers();
        let Top::Overlay(top) = &layers.top else {
            return Vec::new();
        };
        let mut all = vec![Arc::clone(top)];
        all.extend(layers.sealed.iter().flat_map(|sealed| sealed.layers().to_vec()));
        let live = tree.live();
        let shown = self.visible_usage(top, live.first().map(|top| top.uuid), &all);
        let mut since = Usage { data: 0, zero: 0 };
        let entries = live.iter().zip(all.iter().zip(shown));
        let describe = |(record, (layer, shown)): (&LayerRecord, (&Arc<Overlay>, Usage))| {
            since = add_usage(since, shown);
            let name = tree.name_of(record.uuid).map(str::to_owned);
            LayerUsage { name, uuid: record.uuid, usage: layer.usage(), since }
        };
        entries.map(describe).collect()
    }

    /// What each of `all` shows, found out again when the top has changed.
    fn visible_usage(&self, top: &Overlay, uuid: Option<Uuid>, all: &[Arc<Overlay>]) -> Vec<Usage> {
        if all.len() == 1 {
            return vec![top.usage()];
        }
        let (revision, uuid) = (top.revision(), uuid.unwrap_or_default());
        let known = self.history.visible_usage.lock().clone();
        if let Some((at, of, shown)) = known
            && (at, of, shown.len()) == (revision, uuid, all.len())
        {
            return shown;
        }
        let shown = Sealed::new(all.to_vec()).map_or_else(Vec::new, |all| all.visible_usage());
        *self.history.visible_usage.lock() = Some((revision, uuid, shown.clone()));
        shown
    }

    /// The disk as it was at snapshot `name`, to be read.
    ///
    /// # Errors
    /// `ENOENT`; the host's errno.
    pub fn snapshot_file(&self, name: &str) -> io::Result<Arc<Self>> {
        let missing = || os_error(libc::ENOENT);
        if let Some(reflink) = self.reflink() {
            return self.reflink_snapshot_file(&reflink, name);
        }
        if let Some(file) = self.diff_file(name) {
            return Ok(file);
        }
        loop {
            let tree = self.overlay_location.lock().tree().ok_or_else(missing)?;
            match self.layered_snapshot_file(&tree, name) {
                // Layers were merged meanwhile: what the tree named is gone.
                Err(_) if self.overlay_location.lock().tree().as_ref() != Some(&tree) => {}
                found => return found,
            }
        }
    }

    fn layered_snapshot_file(&self, tree: &LayerTree, name: &str) -> io::Result<Arc<Self>> {
        let record = tree.snapshot(name).ok_or_else(|| os_error(libc::ENOENT))?;
        if let Some(file) = self.history.snapshot_files.lock().get(&record.layer) {
            return Ok(Arc::clone(file));
        }
        let chain = self.open_chain(tree, record.layer).map_err(|error| {
            log::error!("{}: snapshot '{name}' cannot be opened: {error}", self.source);
            os_error(libc::EIO)
        })?;
        let time = chain.first().and_then(|layer| layer.mtime()).map(|(mtime, _)| mtime);
        let bottom = self.layers().bottom.clone();
        let layers = LayerStack::new(Top::Nothing, Sealed::new(chain).map(Arc::new), bottom);
        let time = time.unwrap_or(record.taken.saturating_mul(1_000_000_000));
        Ok(self.make_snapshot_file(name, (record.layer, record.layer), layers, time))
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
        let layers = LayerStack::new(Top::Nothing, None, Some(Arc::new(raw)));
        // Another of this name is another file: what the kernel has cached of one is not the other's.
        Ok(self.make_snapshot_file(name, (uuid, Uuid::new_v4()), layers, mtime_of(&found)))
    }

    /// Makes a disk that is only read of the layers of a snapshot: it is kept under `key` and is
    /// `uuid`.
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
        let bottom = Bottom::Blank(layers.size());
        let mut disk = new_disk(&spec, uuid, layers, bottom, owner);
        disk.times = Times::new(mtime, false, None);
        disk.source = format!("snapshot '{name}' of {}", self.source);
        let disk = Arc::new(disk);
        Arc::clone(self.history.snapshot_files.lock().entry(key).or_insert(disk))
    }

    /// The names of its snapshots, oldest first.
    #[must_use]
    pub fn snapshot_names(&self) -> Vec<String> {
        if let Some(reflink) = self.reflink() {
            let listed = reflink.list_snapshots().unwrap_or_default();
            return listed.into_iter().map(|snapshot| snapshot.name).collect();
        }
        let tree = self.overlay_location.lock().tree();
        tree.map_or_else(Vec::new, |tree| {
            tree.snapshots.into_iter().map(|snapshot| snapshot.name).collect()
        })
    }

    /// Handles that its snapshots' files have.
    pub(in crate::disk) fn snapshot_handle_count(&self) -> u32 {
        self.history.snapshot_files.lock().values().map(|file| file.handle_count()).sum()
    }
}

/// What stands for a snapshot that has no layer of its own.
pub(super) fn snapshot_uuid(disk: &Uuid, name: &str) -> Uuid {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    Uuid::from_u64_pair(disk.as_u64_pair().0 ^ hasher.finish(), disk.as_u64_pair().1)
}
