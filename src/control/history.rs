//! Requests about the history of an overlay: snapshots, reverts, clones.

use std::ops::Range;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Control, ControlNode, HydrateAction, Invalidation};
use crate::catalog::CatalogEntry;
use crate::config::{format_size, format_zeroed};
use crate::disk::{
    CommitSummary, DiffBase, Disk, Force, HydrateCommand, LayerUsage, OperationError, PrefetchMode,
};

/// Answers, and logs, in one line what was done.
pub(super) fn ok_answer(line: &str) -> Value {
    log::info!("{line}");
    json!({ "ok": { "line": line } })
}

/// Answers that an operation on the disk `name` failed. Open writers are worth another try.
pub(super) fn error_answer(name: &str, error: &OperationError) -> Value {
    let busy = matches!(error, OperationError::Writers);
    json!({ "error": format!("{name}: {error}"), "busy": busy })
}

impl From<bool> for Force {
    fn from(force: bool) -> Self {
        if force { Self::Yes } else { Self::No }
    }
}

/// Encodes a layer of a disk for `status`.
pub(super) fn layer_value(layer: &LayerUsage) -> Value {
    json!({
        "name": layer.name,
        "uuid": layer.uuid,
        "changed": layer.usage.data,
        "zeroed": layer.usage.zero,
        "since": { "changed": layer.since.data, "zeroed": layer.since.zero },
    })
}

/// Lists the snapshots of a disk.
pub(super) fn list_snapshots(name: &str, disk: &Disk) -> Value {
    let snapshots = match disk.snapshots() {
        Ok(snapshots) => snapshots,
        Err(error) => return error_answer(name, &error),
    };
    let values: Vec<Value> = snapshots
        .iter()
        .map(|snapshot| {
            json!({
                "name": snapshot.name,
                "taken": snapshot.taken,
                "size": snapshot.size,
                "changed": snapshot.usage.map(|usage| usage.data),
                "zeroed": snapshot.usage.map(|usage| usage.zero),
                "since": snapshot.since.map(|since| {
                    json!({ "changed": since.data, "zeroed": since.zero })
                }),
            })
        })
        .collect();
    json!({ "ok": { "snapshots": values } })
}

/// Commits a disk. A commit stops when its client is gone, and the next one finishes it.
pub(super) fn commit(
    name: &str,
    disk: &Disk,
    force: Force,
    is_gone: &(dyn Fn() -> bool + Sync),
) -> Value {
    match disk.commit(force, is_gone) {
        Ok(CommitSummary { committed: gone, remaining: left }) => {
            let (data, zeroed) = (format_size(gone.data), format_zeroed(gone.zero));
            let mut line = format!("{name}: {data}{zeroed} are in its base now");
            if left.data > 0 || left.zero > 0 {
                let (data, zeroed) = (format_size(left.data), format_zeroed(left.zero));
                line += &format!("; {data}{zeroed} were written meanwhile and stay in the overlay");
            }
            ok_answer(&line)
        }
        Err(error) => error_answer(name, &error),
    }
}

/// Prefetches a range of a disk, into the host's cache or into the overlay.
pub(super) fn prefetch(
    name: &str,
    disk: &Disk,
    range: Range<u64>,
    copy: bool,
    is_gone: &(dyn Fn() -> bool + Sync),
) -> Value {
    if range.start >= disk.size() && disk.size() > 0 {
        let size = format_size(disk.size());
        return json!({ "error": format!("{name}: the range begins past its end: it has {size}") });
    }
    let fetch = if copy { PrefetchMode::CopyUp } else { PrefetchMode::AsConfigured };
    match disk.prefetch(range, fetch, is_gone) {
        Ok(bytes) if disk.prefetch_copies_up(fetch) => {
            ok_answer(&format!("{name}: {} copied up into its overlay", format_size(bytes)))
        }
        Ok(bytes) => {
            ok_answer(&format!("{name}: {} read into the host's cache", format_size(bytes)))
        }
        Err(error) if error.raw_os_error() == Some(libc::EROFS) => {
            json!({ "error": format!("{name}: it has no overlay to copy into") })
        }
        Err(error) => json!({ "error": format!("{name}: {error}") }),
    }
}

/// Starts, pauses or cancels a hydration.
pub(super) fn hydrate(name: &str, disk: &Arc<Disk>, rate: u64, action: HydrateAction) -> Value {
    let steered = disk.control_hydration(match action {
        HydrateAction::Wait | HydrateAction::Start => HydrateCommand::Run(rate),
        HydrateAction::Pause => HydrateCommand::Pause,
        HydrateAction::Cancel => HydrateCommand::Cancel,
    });
    match (action, steered) {
        (HydrateAction::Wait | HydrateAction::Start, true) => {
            ok_answer(&format!("{name}: goes on being hydrated"))
        }
        (HydrateAction::Pause, true) => ok_answer(&format!("{name}: its hydration is paused")),
        (HydrateAction::Cancel, true) => {
            ok_answer(&format!("{name}: its hydration has ended; what was copied stays"))
        }
        (HydrateAction::Pause | HydrateAction::Cancel, false) => {
            json!({ "error": format!("{name}: it is not being hydrated") })
        }
        (HydrateAction::Wait, false) => match disk.hydrate(rate) {
            Ok(()) => ok_answer(&format!("{name}: detached from its base")),
            Err(error) => error_answer(name, &error),
        },
        (HydrateAction::Start, false) => {
            // Reasons for a refusal are answered here, where the client reads them.
            if let Err(error) = disk.check_hydratable() {
                return error_answer(name, &error);
            }
            let (there, log_name) = (Arc::clone(disk), name.to_owned());
            let work = move || match there.hydrate(rate) {
                Ok(()) => log::info!("{log_name}: detached from its base"),
                Err(error) => log::error!("{log_name}: {error}"),
            };
            match std::thread::Builder::new().name("cowslip-hydrate".to_owned()).spawn(work) {
                Ok(_) => ok_answer(&format!("{name}: is being hydrated")),
                Err(error) => json!({ "error": format!("{name}: no thread for it: {error}") }),
            }
        }
    }
}

impl Control {
    /// Takes a snapshot; with `sync` the snapshot is durable before the answer.
    pub(super) fn snapshot(
        &self,
        name: &str,
        disk: &Disk,
        snapshot: Option<&str>,
        sync: bool,
    ) -> Value {
        // Bytes written through a mapping may be only in the kernel's cache, and belong in the
        // snapshot.
        self.invalidate_cache(disk);
        let taken = match disk.snapshot(snapshot) {
            Ok(taken) => taken,
            Err(error) => return error_answer(name, &error),
        };
        if sync && let Err(error) = disk.sync() {
            return json!({
                "error": format!("{name}: snapshot '{taken}' is taken and not durable: {error}")
            });
        }
        ok_answer(&format!("{name}: snapshot '{taken}' taken"))
    }

    /// Deletes a snapshot.
    pub(super) fn delete_snapshot(
        &self,
        name: &str,
        entry: &CatalogEntry,
        snapshot: &str,
    ) -> Value {
        if let Err(error) = entry.disk.delete_snapshot(snapshot) {
            return error_answer(name, &error);
        }
        let parent = ControlNode::Snapshots(entry.slot).ino();
        self.invalidate(&entry.disk, Invalidation::Name { parent, name: snapshot.to_owned() });
        let disk = Arc::clone(&entry.disk);
        let tidied = std::thread::Builder::new().name("cowslip-tidy".to_owned()).spawn(move || {
            if let Err(error) = disk.merge_layers() {
                log::warn!("{}: layers are not merged: {error}", disk.source);
            }
        });
        if let Err(error) = tidied {
            log::warn!("{name}: layers are merged later: {error}");
        }
        ok_answer(&format!("{name}: snapshot '{snapshot}' deleted"))
    }

    /// Reverts the disk to `snapshot`, or resets it to its base.
    pub(super) fn restore(
        &self,
        name: &str,
        disk: &Disk,
        snapshot: Option<&str>,
        force: Force,
    ) -> Value {
        // Dirty pages in the kernel's cache must not be written back after the switch.
        self.invalidate_cache(disk);
        let result = match snapshot {
            Some(snapshot) => disk.revert(snapshot, force),
            None => disk.reset(force),
        };
        // Also after an error: the bytes of a reflink copy may have changed before it.
        self.invalidate_cache(disk);
        if let Err(error) = result {
            return error_answer(name, &error);
        }
        ok_answer(&match snapshot {
            Some(snapshot) => format!("{name}: is as it was at snapshot '{snapshot}'"),
            None => format!("{name}: is identical to its base"),
        })
    }

    /// Freezes the disk and answers with the changes.
    pub(super) fn difference(
        &self,
        name: &str,
        disk: &Disk,
        since: Option<&str>,
        until: Option<&str>,
    ) -> Value {
        // Bytes written through a mapping may be only in the kernel's cache, and belong in the
        // result.
        self.invalidate_cache(disk);
        match disk.difference(since, until) {
            Ok(found) => json!({ "ok": {
                "file": found.frozen_file,
                "changed": found.changes_file,
                "base": match found.base {
                    DiffBase::Zeros => Value::Null,
                    DiffBase::Part => json!("part"),
                    DiffBase::File(path, format) => match path.to_str() {
                        Some(path) => json!({ "path": path, "format": format }),
                        // JSON cannot name it, so no other format will.
                        None => json!("part"),
                    },
                },
            } }),
            Err(error) => error_answer(name, &error),
        }
    }

    /// Creates the disk `new` as a clone of the disk `name`.
    pub(super) fn clone_disk(&self, name: &str, entry: &CatalogEntry, new: &str) -> Value {
        self.invalidate_cache(&entry.disk);
        match self.catalog.clone_disk(entry, new) {
            Ok(disk) => {
                disk.write_holder(&self.holder());
                ok_answer(&format!("{new}: cloned from {name}"))
            }
            Err(line) => json!({ "error": format!("{name}: {line}") }),
        }
    }

    /// Makes the kernel write back and drop its pages of a disk. The kernel keeps pages even of a
    /// disk that is not open.
    pub(super) fn invalidate_cache(&self, disk: &Disk) {
        let inos = disk.files_showing(0..u64::MAX).map(|(ino, _)| ino).collect();
        self.invalidate(disk, Invalidation::Bytes { inos });
    }
}
