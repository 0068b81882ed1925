//! The requests written to a `ctl`: what the mount or a disk does for each.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::api::{
    Answer, DiskRequest, Lines, MountRequest, Outcome, Progress, Refusal, parse_disk_request,
};
use super::node::ControlNode;
use super::session::ProgressFn;
use super::{Control, answer_line, history, log_and_answer};
use crate::base::self_reference;
use crate::catalog::CatalogEntry;
use crate::config::{format_size, format_zeroed};
use crate::disk::{Disk, Force, OverlayDirState, PrefetchMode};
use crate::overlay::Usage;
use crate::overlay::persist::{self, OverlayPath};
use crate::stream::output::{DrainTimeout, FinishError};
use crate::stream::{Stream, UnmountPolicy};
use crate::trust;

/// The time that an unmount has after its `drain`, in which no `keep` makes untrue what that has said.
const UNMOUNT_TIMEOUT: Duration = Duration::from_secs(5);

/// Whether `disk` is the one that a request means: any disk, if the request names no inode.
pub(super) fn matches_inode(disk: &Disk, inode: Option<u64>) -> bool {
    inode.is_none_or(|inode| inode == disk.ino())
}

/// Whether `request` is a valid request to a mount or to a disk; for the fuzz target.
#[doc(hidden)]
#[must_use]
pub fn is_valid_request(request: &[u8]) -> bool {
    serde_json::from_slice::<MountRequest>(request).is_ok() || parse_disk_request(request).is_ok()
}

impl From<bool> for Force {
    fn from(force: bool) -> Self {
        if force { Self::Yes } else { Self::No }
    }
}

impl Control {
    /// Carries out a request to the mount.
    pub(super) fn answer_mount(&self, request: &[u8]) -> Answer {
        match serde_json::from_slice(request).map_err(|error| not_understood(&error))? {
            MountRequest::Drain { streams, timeout_ms } => {
                Ok(self.drain(streams, DrainTimeout::from_millis(timeout_ms)))
            }
            MountRequest::Add { disk, cwd, force, allow_backing, trust } => {
                trust_dirs(&trust)?;
                self.add(&disk, &cwd, force, allow_backing)
            }
            MountRequest::Remove { name, inode } => self.remove(&name, inode),
        }
    }

    /// Makes everything durable and answers what an unmount will do to each disk.
    fn drain(&self, streams: UnmountPolicy, timeout: DrainTimeout) -> Outcome {
        let disks = self.catalog.list();
        let end = |(name, entry): &(String, Arc<CatalogEntry>)| {
            if entry.disk.stream().is_some() {
                let ended = entry.disk.end_stream(streams, timeout);
                return Some(ended.map_err(|reason| format!("{name}: {reason}")));
            }
            let synced = entry.disk.sync();
            synced.err().map(|error| Err(format!("{name}: could not be made durable: {error}")))
        };
        let ended: Vec<_> = disks.iter().map(end).collect();
        // A `keep` that is in progress decides what is said of its disk.
        let summarised = self.summarised.try_write_for(UNMOUNT_TIMEOUT);
        let (mut lines, mut failed) = (Vec::new(), Vec::new());
        for ((name, entry), ended) in disks.iter().zip(ended) {
            match ended.unwrap_or_else(|| unmount_summary(name, &entry.disk)) {
                Ok(line) => lines.extend(line),
                Err(line) => failed.push(line),
            }
        }
        if let Some(mut at) = summarised {
            *at = Some(Instant::now());
        }
        Outcome::Lines(Lines { lines, failed: Some(failed) })
    }

    /// Carries out a request to a disk.
    pub(super) fn answer_disk(
        &self,
        slot: u64,
        request: &[u8],
        is_gone: &(dyn Fn() -> bool + Sync),
    ) -> Answer {
        let found = self.catalog.disk_by_slot(slot);
        let (name, entry) = found.ok_or_else(|| Refusal::new("the disk is gone"))?;
        let (inode, request) =
            parse_disk_request(request).map_err(|error| not_understood(&error))?;
        if !matches_inode(&entry.disk, inode) {
            return Err(Refusal::stale(&name));
        }
        let disk = &entry.disk;
        match request {
            DiskRequest::Keep { dir, trust } => {
                trust_dirs(&trust)?;
                self.keep(&name, &entry, &dir)?;
                log_and_answer(format!("{name}: changes are kept in '{}'", dir.display()))
            }
            DiskRequest::Finish { timeout_ms } => finish(&name, disk, timeout_ms),
            DiskRequest::Abort => abort(&name, disk),
            DiskRequest::Snapshot { name: snapshot, sync } => {
                self.snapshot(&name, disk, snapshot.as_deref(), sync)
            }
            DiskRequest::Snapshots => history::list_snapshots(&name, disk),
            DiskRequest::Unsnapshot { name: snapshot } => {
                self.delete_snapshot(&name, &entry, &snapshot)
            }
            DiskRequest::Revert { name: snapshot, force } => {
                self.revert_or_reset(&name, disk, Some(&snapshot), force.into())
            }
            DiskRequest::Reset { force } => self.revert_or_reset(&name, disk, None, force.into()),
            DiskRequest::Clone { name: new } => self.clone_disk(&name, &entry, &new),
            DiskRequest::Commit { force } => {
                self.drop_cached_pages(disk);
                history::commit(&name, disk, force.into(), is_gone)
            }
            DiskRequest::Prefetch { start, end, copy } => {
                let mode = if copy { PrefetchMode::CopyUp } else { PrefetchMode::AsConfigured };
                history::prefetch(&name, disk, start..end, mode, is_gone)
            }
            DiskRequest::Difference { since, until } => {
                self.difference(&name, disk, since.as_deref(), until.as_deref())
            }
            DiskRequest::Hydrate { rate, action } => history::hydrate(&name, disk, rate, action),
        }
    }

    /// Returns the function that reports the progress of a request to `node`.
    pub(super) fn progress_of(&self, node: ControlNode) -> Option<ProgressFn> {
        let ControlNode::DiskCtl(slot) = node else {
            return None;
        };
        let disk = Arc::clone(&self.catalog.disk_by_slot(slot)?.1.disk);
        match disk.stream() {
            Some(Stream::Output(output)) => {
                let output = Arc::clone(output);
                Some(Box::new(move || {
                    let (done, total) = output.progress();
                    Progress::new(done, total)
                }))
            }
            Some(Stream::Input { .. }) => None,
            None => Some(Box::new(move || match disk.progress() {
                (_, 0) => Progress::default(),
                (done, total) => Progress::new(done, total),
            })),
        }
    }

    fn keep(&self, name: &str, entry: &CatalogEntry, dir: &Path) -> Result<(), String> {
        // Held to the end: what an unmount says of the disk is to be true when it is done.
        let summarised = self.summarised.read();
        if summarised.is_some_and(|at| at.elapsed() < UNMOUNT_TIMEOUT) {
            return Err(format!(
                "{name}: the mount is being unmounted, and its changes are discarded: try again in a few \
                 seconds, should it stay"
            ));
        }
        if !dir.is_absolute() {
            return Err(format!("'{}' is not an absolute path", dir.display()));
        }
        let device = self.device.get().copied();
        self_reference::check_self_reference(dir, &self.catalog.mountpoint, device)
            .map_err(|error| error.to_string())?;
        match self.catalog.keep_in_store(name, entry, dir) {
            Some(kept) => kept?,
            None => {
                let real = persist::resolve_overlay_path(dir)
                    .map_err(|error| format!("overlay '{}' {error}", dir.display()))?;
                let path = OverlayPath { dir: &real, layers: None };
                entry.disk.keep(path).map_err(|error| error.to_string())?;
            }
        }
        entry.disk.write_holder(&self.holder());
        Ok(())
    }
}

fn not_understood(error: &serde_json::Error) -> Refusal {
    Refusal::new(format!("request not understood: {error}"))
}

fn finish(name: &str, disk: &Disk, timeout_ms: Option<u64>) -> Answer {
    let Some(Stream::Output(output)) = disk.stream() else {
        return Err(format!("{name} is no output stream: there is nothing to finish").into());
    };
    let finished = output.finish(&|| disk.has_writers(), DrainTimeout::from_millis(timeout_ms));
    let line = finished.map_err(|error| match error {
        FinishError::Busy => Refusal::new(format!("{name} {error}")).with_busy(true),
        error => Refusal::new(format!("{name}: {error}")),
    })?;
    answer_line(line)
}

fn abort(name: &str, disk: &Disk) -> Answer {
    match disk.stream() {
        Some(Stream::Output(output)) => {
            output.abort("aborted").map_err(|reason| format!("{name}: {reason}"))?;
        }
        Some(Stream::Input { input, .. }) => {
            // An earlier failure no longer matters: the stream ends now.
            let _ = input.close();
        }
        None => return Err(format!("{name}: it is no stream: there is nothing to abort").into()),
    }
    answer_line(format!("{name}: aborted"))
}

/// Describes what an unmount does to the changes of a disk, if there are any.
///
/// # Errors
/// A line for the user when the changes are lost although they should have been kept.
pub(super) fn unmount_summary(name: &str, disk: &Disk) -> Result<Option<String>, String> {
    let usage = match (disk.reflink(), disk.overlay()) {
        (Some(reflink), _) => match reflink.estimate_changed() {
            Ok(data) => Usage { data, zero: 0 },
            Err(_) => return Ok(None),
        },
        (None, Some(overlay)) if disk.overlay_dir().is_none() && overlay.revision() == 0 => {
            return Ok(None);
        }
        (None, Some(overlay)) => {
            disk.layer_usages().last().map_or_else(|| overlay.usage(), |lowest| lowest.since)
        }
        (None, None) => return Ok(None),
    };
    let (data, zeroed) = (format_size(usage.data), format_zeroed(usage.zero));
    let changes = format!("{name}: {data} of changes{zeroed}");
    let dir = disk.overlay_dir().unwrap_or_default();
    let dir = dir.display();
    match disk.overlay_dir_state() {
        None => Ok(Some(format!("{changes} discarded (temporary overlay)"))),
        Some(OverlayDirState::InPlace) => Ok(Some(format!("{changes} kept in '{dir}'"))),
        Some(OverlayDirState::Moved) => {
            Ok(Some(format!("{changes} kept in what was '{dir}' and has another name now")))
        }
        Some(OverlayDirState::Removed) => {
            Err(format!("{changes} are lost: its overlay '{dir}' was removed while it was in use"))
        }
    }
}

/// Trusts the directories that the mounting user names.
fn trust_dirs(dirs: &[PathBuf]) -> Result<(), String> {
    dirs.iter().try_for_each(|dir| {
        trust::allow(dir).map_err(|error| format!("cannot trust '{}': {error}", dir.display()))
    })
}
