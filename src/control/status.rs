//! The text of the `status` files.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::{Control, history, json_line};
use crate::catalog::CatalogEntry;
use crate::disk::{Disk, OverlayDirState, PartitionFile};
use crate::overlay::recover::Recovered;
use crate::stream::Stream;

/// The reader of a disk's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusAudience {
    /// Root or the user who mounted.
    Trusted,
    /// A user who may read the disk but need not know its surroundings: paths on the host, commands
    /// (which may contain passwords) and messages about either are withheld.
    Other,
}

impl Control {
    /// Generates the text of `.cowslip/status`.
    #[must_use]
    pub fn status(&self) -> Vec<u8> {
        let state = if self.draining.load(Ordering::SeqCst) { "draining" } else { "ready" };
        let disks: Vec<Value> = self
            .catalog
            .list()
            .iter()
            .map(|(name, entry)| self.disk_value(name, entry, StatusAudience::Trusted))
            .collect();
        let mount = json!({
            "mountpoint": self.catalog.mountpoint.to_string_lossy(),
            "source": self.source,
            "pid": std::process::id(),
            "state": state,
            "disks": disks,
        });
        json_line(&json!({ "schema": 1, "mounts": [mount] }))
    }

    /// Generates the text of `.cowslip/DISK/status`.
    #[must_use]
    pub fn disk_status(&self, name: &str, entry: &CatalogEntry, reader: StatusAudience) -> Vec<u8> {
        json_line(&self.disk_value(name, entry, reader))
    }

    fn disk_value(&self, name: &str, entry: &CatalogEntry, reader: StatusAudience) -> Value {
        let mut value = self.full_disk_value(name, entry);
        if reader == StatusAudience::Other {
            redact(&mut value);
        }
        value
    }

    fn full_disk_value(&self, name: &str, entry: &CatalogEntry) -> Value {
        let disk = &entry.disk;
        let (state, error) = if disk.is_latched() {
            let why = "a sync failed: nothing written since is safe, see the log";
            ("read-only", Some(why.to_owned()))
        } else if disk.overlay_dir_state() == Some(OverlayDirState::Removed) {
            let why =
                "its overlay was removed while it is in use: what is in it ends with the mount";
            ("lost", Some(why.to_owned()))
        } else {
            match disk.stream().and_then(Stream::failure) {
                Some(why) => ("failed", Some(why)),
                None => ("ok", None),
            }
        };
        let overlay = disk.overlay().map(|overlay| {
            let chain = disk.layer_usages();
            let since = chain.last().map_or_else(|| overlay.usage(), |lowest| lowest.since);
            let recovered = match disk.recovered() {
                Recovered::New | Recovered::Clean => None,
                Recovered::All => Some("all"),
                Recovered::Vouched { .. } => Some("vouched"),
            };
            json!({
                "temporary": overlay.is_temporary(),
                "path": disk.overlay_dir().map(|dir| dir.to_string_lossy().into_owned()),
                "block": overlay.block_size(),
                "changed": since.data,
                "zeroed": since.zero,
                "allocated": allocated_on_host(disk),
                "free": disk.space().map(|space| space.available).unwrap_or(0),
                "recovered": recovered,
                "doing": disk.operation(),
                "committing": overlay.is_committing(),
                "hydration": disk.hydration_status(),
                "done": disk.progress().0,
                "total": disk.progress().1,
                "limit": disk.limit(),
                "chain": chain.iter().map(history::layer_value).collect::<Vec<_>>(),
                "kind": "blocks",
            })
        });
        let overlay = overlay.or_else(|| reflink_value(disk));
        json!({
            "name": name,
            "inode": disk.ino(),
            "path": self.catalog.mountpoint.join(name).to_string_lossy(),
            "size": disk.size(),
            "mode": disk.mode.to_string(),
            "state": state,
            "error": error,
            "warning": disk.no_space_status(),
            "openers": disk.handle_count(),
            "base": disk.base_description(),
            "overlay": overlay,
            "stream": disk.stream().map(stream_value),
            "partitions": partitions_value(name, disk),
        })
    }
}

/// Removes the facts that are not for every reader of the disk.
fn redact(disk: &mut Value) {
    if !disk["error"].is_null() {
        disk["error"] = json!("whoever mounted it can see why");
    }
    let paths = [
        "/base",
        "/overlay/path",
        "/stream/sink/description",
        "/stream/sink/status",
        "/stream/source/description",
        "/stream/source/status",
    ];
    for path in paths {
        if let Some(value) = disk.pointer_mut(path) {
            *value = Value::Null;
        }
    }
    let layers = disk.pointer_mut("/overlay/chain").and_then(Value::as_array_mut);
    for layer in layers.into_iter().flatten() {
        layer["uuid"] = Value::Null;
    }
}

/// Encodes the partitions of a disk for `status`: each file's name, and its range in the disk.
fn partitions_value(name: &str, disk: &Disk) -> Vec<Value> {
    let one = |window: &Arc<PartitionFile>| {
        let range = window.range();
        json!({
            "number": window.number(),
            "name": window.name(name),
            "offset": range.start,
            "size": range.end - range.start,
        })
    };
    disk.partition_files().iter().map(one).collect()
}

/// Encodes a stream for `status`.
fn stream_value(stream: &Stream) -> Value {
    match stream {
        Stream::Output(output) => {
            let status = output.status();
            json!({
                "direction": "out",
                "state": status.state.name(),
                "frontier": status.frontier,
                "highest": status.highest,
                "accepted": status.accepted,
                "window": { "size": status.window.0, "used": status.window.1 },
                "spill": { "size": status.spill.0, "used": status.spill.1 },
                "needed": { "window": status.needed.0, "spill": status.needed.1 },
                "sink": {
                    "kind": status.kind,
                    "description": status.sink,
                    "status": status.error.as_deref().unwrap_or(status.state.name()),
                },
            })
        }
        Stream::Input { input, monitor } => {
            let status = crate::stream::input_status(input, monitor);
            json!({
                "direction": "in",
                "state": status.state.name(),
                "frontier": status.arrived,
                "highest": status.highest,
                "accepted": status.arrived,
                "window": { "size": status.window, "used": status.used },
                "spill": { "size": Value::Null, "used": status.spooled },
                "needed": { "window": status.needed, "spill": 0 },
                "sink": Value::Null,
                "source": {
                    "kind": monitor.kind(),
                    "description": monitor.describe(),
                    "status": status.error.as_deref().unwrap_or(status.state.name()),
                },
            })
        }
    }
}

/// Encodes a reflink overlay for `status`.
fn reflink_value(disk: &Disk) -> Option<Value> {
    use std::os::unix::fs::MetadataExt;
    let reflink = disk.reflink()?;
    let allocated = reflink.data().metadata().map_or(0, |found| found.blocks() * 512);
    Some(json!({
        "temporary": false,
        "path": disk.overlay_dir().map(|dir| dir.to_string_lossy().into_owned()),
        "block": disk.block(),
        "changed": reflink.estimate_changed().unwrap_or(disk.size()),
        "zeroed": 0,
        "allocated": allocated,
        "free": disk.space().map(|space| space.available).unwrap_or(0),
        "recovered": Value::Null,
        "kind": "reflink",
    }))
}

/// Returns the bytes that the overlay's data file takes on the host.
fn allocated_on_host(disk: &Disk) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let file = disk.overlay().and_then(|overlay| overlay.data_file());
    file.and_then(|file| file.metadata().ok()).map_or(0, |found| found.blocks() * 512)
}
