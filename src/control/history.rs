//! Requests that change or compare the layers of a disk: snapshot, revert, reset, clone, commit, diff,
//! prefetch, hydrate. Before most of them the kernel writes back and drops the pages it has cached.

use std::ops::Range;
use std::sync::Arc;

use super::api::{
    Answer, DiffBaseRecord, DifferenceFiles, HydrateAction, Outcome, Refusal, SnapshotList,
    SnapshotRecord, UsageStatus,
};
use super::{Control, ControlNode, Invalidation, log_and_answer};
use crate::catalog::CatalogEntry;
use crate::config::{CacheMode, format_size, format_zeroed};
use crate::disk::{
    CommitSummary, DiffBase, Disk, Force, HydrateCommand, OperationError, PrefetchMode, SizeChange,
    SnapshotInfo,
};

/// Converts the failure of an operation on the disk `name`. Open writers are worth another try.
fn refuse_operation(name: &str, error: &OperationError) -> Refusal {
    let is_busy = matches!(error, OperationError::Writers);
    Refusal::new(format!("{name}: {error}")).with_busy(is_busy)
}

/// Lists the snapshots of a disk.
pub(super) fn list_snapshots(name: &str, disk: &Disk) -> Answer {
    let snapshots = disk.snapshots().map_err(|error| refuse_operation(name, &error))?;
    let record = |snapshot: SnapshotInfo| SnapshotRecord {
        name: Some(snapshot.name),
        taken: snapshot.taken,
        size: Some(snapshot.size),
        changed: snapshot.usage.map(|usage| usage.data),
        zeroed: snapshot.usage.map(|usage| usage.zero),
        since: snapshot.since.map(UsageStatus::from),
    };
    let snapshots = snapshots.into_iter().map(record).collect();
    Ok(Outcome::Snapshots(SnapshotList { snapshots }))
}

/// Commits a disk. A commit stops when its client is gone, and the next one finishes it.
pub(super) fn commit(
    name: &str,
    disk: &Disk,
    force: Force,
    is_gone: &(dyn Fn() -> bool + Sync),
) -> Answer {
    let CommitSummary { committed, remaining } =
        disk.commit(force, is_gone).map_err(|error| refuse_operation(name, &error))?;
    let (data, zeroed) = (format_size(committed.data), format_zeroed(committed.zero));
    let mut line = format!("{name}: {data}{zeroed} are in its base now");
    if remaining.data > 0 || remaining.zero > 0 {
        let (data, zeroed) = (format_size(remaining.data), format_zeroed(remaining.zero));
        line += &format!("; {data}{zeroed} were written meanwhile and stay in the overlay");
    }
    log_and_answer(line)
}

/// Prefetches a range of a disk, into the host's cache or into the overlay.
pub(super) fn prefetch(
    name: &str,
    disk: &Disk,
    range: Range<u64>,
    mode: PrefetchMode,
    is_gone: &(dyn Fn() -> bool + Sync),
) -> Answer {
    if range.start >= disk.size() && disk.size() > 0 {
        let size = format_size(disk.size());
        return Err(format!("{name}: the range begins past its end: it has {size}").into());
    }
    let bytes =
        disk.prefetch(range, mode, is_gone).map_err(|error| match error.raw_os_error() {
            Some(libc::EROFS) => format!("{name}: it has no overlay to copy into"),
            _ => format!("{name}: {error}"),
        })?;
    let size = format_size(bytes);
    log_and_answer(match disk.prefetch_copies_up(mode) {
        true => format!("{name}: {size} copied up into its overlay"),
        false => format!("{name}: {size} read into the host's cache"),
    })
}

/// Starts, pauses or cancels a hydration.
pub(super) fn hydrate(name: &str, disk: &Arc<Disk>, rate: u64, action: HydrateAction) -> Answer {
    let is_running = disk.control_hydration(match action {
        HydrateAction::Wait | HydrateAction::Start => HydrateCommand::Run(rate),
        HydrateAction::Pause => HydrateCommand::Pause,
        HydrateAction::Cancel => HydrateCommand::Cancel,
    });
    match (action, is_running) {
        (HydrateAction::Wait | HydrateAction::Start, true) => {
            log_and_answer(format!("{name}: goes on being hydrated"))
        }
        (HydrateAction::Pause, true) => log_and_answer(format!("{name}: its hydration is paused")),
        (HydrateAction::Cancel, true) => {
            log_and_answer(format!("{name}: its hydration has ended; what was copied stays"))
        }
        (HydrateAction::Pause | HydrateAction::Cancel, false) => {
            Err(format!("{name}: it is not being hydrated").into())
        }
        (HydrateAction::Wait, false) => {
            disk.hydrate(rate).map_err(|error| refuse_operation(name, &error))?;
            log_and_answer(format!("{name}: detached from its base"))
        }
        (HydrateAction::Start, false) => start_hydration(name, disk, rate),
    }
}

/// Starts a hydration on a thread of its own.
fn start_hydration(name: &str, disk: &Arc<Disk>, rate: u64) -> Answer {
    // Reasons for a refusal are answered here, where the client reads them.
    disk.check_hydratable().map_err(|error| refuse_operation(name, &error))?;
    let (disk, log_name) = (Arc::clone(disk), name.to_owned());
    let work = move || match disk.hydrate(rate) {
        Ok(()) => log::info!("{log_name}: detached from its base"),
        Err(error) => log::error!("{log_name}: {error}"),
    };
    std::thread::Builder::new()
        .name("cowslip-hydrate".to_owned())
        .spawn(work)
        .map_err(|error| format!("{name}: no thread for it: {error}"))?;
    log_and_answer(format!("{name}: is being hydrated"))
}

impl Control {
    /// Takes a snapshot; with `sync` the snapshot is durable before the answer.
    pub(super) fn snapshot(
        &self,
        name: &str,
        disk: &Disk,
        snapshot: Option<&str>,
        sync: bool,
    ) -> Answer {
        // Bytes written through a mapping may be only in the kernel's cache, and belong in the
        // snapshot.
        self.drop_cached_pages(disk);
        let taken = disk.snapshot(snapshot).map_err(|error| refuse_operation(name, &error))?;
        if sync {
            disk.sync().map_err(|error| {
                format!("{name}: snapshot '{taken}' is taken and not durable: {error}")
            })?;
        }
        log_and_answer(format!("{name}: snapshot '{taken}' taken"))
    }

    /// Deletes a snapshot.
    pub(super) fn delete_snapshot(
        &self,
        name: &str,
        entry: &CatalogEntry,
        snapshot: &str,
    ) -> Answer {
        let deleted = entry.disk.delete_snapshot(snapshot);
        deleted.map_err(|error| refuse_operation(name, &error))?;
        let parent = ControlNode::Snapshots(entry.slot).ino();
        self.wait_for_invalidation(
            &entry.disk,
            Invalidation::Name { parent, name: snapshot.to_owned() },
        );
        let disk = Arc::clone(&entry.disk);
        let merging =
            std::thread::Builder::new().name("cowslip-tidy".to_owned()).spawn(move || {
                if let Err(error) = disk.merge_layers() {
                    log::warn!("{}: layers are not merged: {error}", disk.source);
                }
            });
        if let Err(error) = merging {
            log::warn!("{name}: layers are merged later: {error}");
        }
        log_and_answer(format!("{name}: snapshot '{snapshot}' deleted"))
    }

    /// Reverts the disk to `snapshot`, or resets it to its base.
    pub(super) fn revert_or_reset(
        &self,
        name: &str,
        disk: &Arc<Disk>,
        snapshot: Option<&str>,
        force: Force,
    ) -> Answer {
        let change = match self.cache {
            CacheMode::Writeback => SizeChange::Unseen,
            CacheMode::Auto | CacheMode::None => SizeChange::Seen,
        };
        // Dirty pages in the kernel's cache must not be written back after the switch.
        self.drop_cached_pages(disk);
        let result = match snapshot {
            Some(snapshot) => disk.revert(snapshot, force, change),
            None => disk.reset(force, change),
        };
        // Also after an error: the bytes of a reflink copy may have changed before it.
        self.drop_cached_pages(disk);
        if disk.take_renumbering() {
            let old = self.catalog.renumber(disk);
            disk.release_opens();
            let files = vec![(name.to_owned(), old)];
            self.wait_for_invalidation(disk, Invalidation::Disk { files });
        }
        result.map_err(|error| refuse_operation(name, &error))?;
        log_and_answer(match snapshot {
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
    ) -> Answer {
        // Bytes written through a mapping may be only in the kernel's cache, and belong in the
        // result.
        self.drop_cached_pages(disk);
        let found =
            disk.difference(since, until).map_err(|error| refuse_operation(name, &error))?;
        let base = match found.base {
            DiffBase::Zeros => None,
            DiffBase::Part => Some(DiffBaseRecord::Part),
            DiffBase::File(path, format) => Some(match path.into_os_string().into_string() {
                Ok(path) => DiffBaseRecord::File { path, format },
                // JSON cannot name it, so no other format will.
                Err(_) => DiffBaseRecord::Part,
            }),
        };
        Ok(Outcome::Difference(DifferenceFiles {
            file: found.frozen_file,
            changed: found.changes_file,
            base,
        }))
    }

    /// Creates the disk `new` as a clone of the disk `name`.
    pub(super) fn clone_disk(&self, name: &str, entry: &CatalogEntry, new: &str) -> Answer {
        self.drop_cached_pages(&entry.disk);
        let clone = self.catalog.clone_disk(entry, new);
        let clone = clone.map_err(|line| format!("{name}: {line}"))?;
        clone.write_holder(&self.holder());
        log_and_answer(format!("{new}: cloned from {name}"))
    }
}
