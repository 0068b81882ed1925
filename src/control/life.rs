//! Requests about the life of an overlay: snapshots, going back, clones.

use serde_json::{Value, json};

use super::{Control, Spot, Stale};
use crate::catalog::Entry;
use crate::disk::{Disk, Force, LifeError, Since};

/// An answer that says in one line what was done.
pub(super) fn done(line: &str) -> Value {
    log::info!("{line}");
    json!({ "ok": { "line": line } })
}

/// The answer for what was not done to the disk `name`. Writers are worth asking again for.
pub(super) fn refused(name: &str, error: &LifeError) -> Value {
    let busy = matches!(error, LifeError::Writers);
    json!({ "error": format!("{name}: {error}"), "busy": busy })
}

impl From<bool> for Force {
    fn from(force: bool) -> Self {
        if force { Self::Yes } else { Self::No }
    }
}

/// A layer of a disk, as `status` shows it.
pub(super) fn layer_value(layer: &Since) -> Value {
    json!({
        "name": layer.name,
        "uuid": layer.uuid,
        "changed": layer.usage.data,
        "zeroed": layer.usage.zero,
        "since": { "changed": layer.since.data, "zeroed": layer.since.zero },
    })
}

/// The snapshots of a disk.
pub(super) fn list(name: &str, disk: &Disk) -> Value {
    let snapshots = match disk.snapshots() {
        Ok(snapshots) => snapshots,
        Err(error) => return refused(name, &error),
    };
    let values: Vec<Value> = snapshots
        .iter()
        .map(|snapshot| {
            json!({
                "name": snapshot.name,
                "taken": snapshot.taken,
                "size": snapshot.size,
                "changed": snapshot.usage.data,
                "zeroed": snapshot.usage.zero,
                "since": snapshot.since.map(|since| {
                    json!({ "changed": since.data, "zeroed": since.zero })
                }),
            })
        })
        .collect();
    json!({ "ok": { "snapshots": values } })
}

impl Control {
    /// Takes a snapshot; under `sync` all of it is durable when it is answered.
    pub(super) fn snapshot(
        &self,
        name: &str,
        disk: &Disk,
        snapshot: Option<&str>,
        sync: bool,
    ) -> Value {
        // What was written through a mapping and is only in the kernel's cache belongs into it.
        self.forget_bytes(disk);
        let taken = match disk.snapshot(snapshot) {
            Ok(taken) => taken,
            Err(error) => return refused(name, &error),
        };
        if sync && let Err(error) = disk.sync() {
            return json!({
                "error": format!("{name}: snapshot '{taken}' is taken and not durable: {error}")
            });
        }
        done(&format!("{name}: snapshot '{taken}' taken"))
    }

    /// Deletes a snapshot.
    pub(super) fn unsnapshot(&self, name: &str, entry: &Entry, snapshot: &str) -> Value {
        if let Err(error) = entry.disk.delete_snapshot(snapshot) {
            return refused(name, &error);
        }
        let parent = Spot::Snapshots(entry.slot).ino();
        self.forget(&entry.disk, Stale::Name { parent, name: snapshot.to_owned() });
        let disk = std::sync::Arc::clone(&entry.disk);
        let tidied = std::thread::Builder::new().name("cowslip-tidy".to_owned()).spawn(move || {
            if let Err(error) = disk.tidy() {
                log::warn!("{}: layers are not merged: {error}", disk.source);
            }
        });
        if let Err(error) = tidied {
            log::warn!("{name}: layers are merged later: {error}");
        }
        done(&format!("{name}: snapshot '{snapshot}' deleted"))
    }

    /// Makes the disk what it was at `snapshot`, or what its base is.
    pub(super) fn go_back(
        &self,
        name: &str,
        disk: &Disk,
        snapshot: Option<&str>,
        force: Force,
    ) -> Value {
        // Nothing that is in the kernel's cache may come after the switch.
        self.forget_bytes(disk);
        let result = match snapshot {
            Some(snapshot) => disk.revert(snapshot, force),
            None => disk.reset(force),
        };
        if let Err(error) = result {
            return refused(name, &error);
        }
        self.forget_bytes(disk);
        done(&match snapshot {
            Some(snapshot) => format!("{name}: is as it was at snapshot '{snapshot}'"),
            None => format!("{name}: is as its base"),
        })
    }

    /// Makes the disk `new`, which holds what the disk `name` holds now.
    pub(super) fn clone_disk(&self, name: &str, new: &str) -> Value {
        if let Some(entry) = self.catalog.named(name) {
            self.forget_bytes(&entry.disk);
        }
        match self.catalog.clone_disk(name, new) {
            Ok(disk) => {
                disk.announce(&self.holder());
                done(&format!("{new}: holds what {name} holds"))
            }
            Err(line) => json!({ "error": format!("{name}: {line}") }),
        }
    }

    /// Has the kernel write back and forget what it has cached of a disk.
    /// It keeps pages of a disk that nobody has open, too.
    pub(super) fn forget_bytes(&self, disk: &Disk) {
        self.forget(disk, Stale::Bytes { ino: disk.ino() });
    }
}
