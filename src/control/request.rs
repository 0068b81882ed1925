//! Requests written to a `ctl`, to the mount or to a disk, and their answers.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::node::ControlNode;
use super::session::ProgressFn;
use super::{Control, history};
use crate::base::self_reference;
use crate::catalog::CatalogEntry;
use crate::config::{format_size, format_zeroed};
use crate::disk::{Disk, OverlayDirState};
use crate::overlay::Usage;
use crate::overlay::persist::{self, OverlayPath};
use crate::stream::output::{DrainTimeout, FinishError};
use crate::stream::{Stream, UnmountPolicy};
use crate::trust;

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum MountRequest {
    /// Syncs every disk, reports what an unmount will discard, and ends the streams.
    Drain {
        #[serde(default)]
        streams: UnmountPolicy,
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Mounts another disk; relative paths in its description start at `cwd`.
    Add {
        disk: String,
        cwd: PathBuf,
        #[serde(default)]
        force: bool,
        #[serde(default)]
        allow_backing: Vec<PathBuf>,
        #[serde(default)]
        trust: Vec<PathBuf>,
    },
    /// Removes a disk that was named on the command line or by `Add`.
    Remove {
        name: String,
        #[serde(default)]
        inode: Option<u64>,
    },
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
enum DiskRequest {
    /// Makes a temporary overlay persistent.
    Keep {
        dir: PathBuf,
        #[serde(default)]
        trust: Vec<PathBuf>,
    },
    /// Completes a stream.
    Finish {
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Aborts a stream.
    Abort,
    /// Takes a snapshot of the disk.
    Snapshot {
        #[serde(default)]
        name: Option<String>,
        #[serde(default)]
        sync: bool,
    },
    /// Lists the disk's snapshots.
    Snapshots,
    /// Deletes a snapshot.
    Unsnapshot { name: String },
    /// Reverts the disk to a snapshot.
    Revert {
        name: String,
        #[serde(default)]
        force: bool,
    },
    /// Resets the disk to its base.
    Reset {
        #[serde(default)]
        force: bool,
    },
    /// Creates another disk with the same contents.
    Clone { name: String },
    /// Commits the overlay to its base.
    Commit {
        #[serde(default)]
        force: bool,
    },
    /// Prefetches the bytes from `start` to `end`.
    Prefetch {
        start: u64,
        end: u64,
        #[serde(default)]
        copy: bool,
    },
    /// Freezes the disk and answers with the changes since a snapshot or the base.
    Difference {
        #[serde(default)]
        since: Option<String>,
        #[serde(default)]
        until: Option<String>,
    },
    /// Copies the base into the overlay until the base is no longer needed; `rate` in bytes a
    /// second.
    Hydrate {
        #[serde(default)]
        rate: u64,
        #[serde(default)]
        action: HydrateAction,
    },
}

/// An action on a hydration.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum HydrateAction {
    /// Starts or resumes; answered at the end.
    #[default]
    Wait,
    /// Starts or resumes; answered at once.
    Start,
    Pause,
    Cancel,
}

/// Parses a request to a disk, and the inode number of the disk it means.
fn parse_disk_request(request: &[u8]) -> serde_json::Result<(Option<u64>, DiskRequest)> {
    let mut request: Value = serde_json::from_slice(request)?;
    let inode = request.as_object_mut().and_then(|keys| keys.remove("inode"));
    let inode = inode.map_or(Ok(None), serde_json::from_value)?;
    Ok((inode, serde_json::from_value(request)?))
}

/// Whether `disk` is the one that a request means: any disk, if the request names no inode.
pub(super) fn matches_inode(disk: &Disk, inode: Option<u64>) -> bool {
    inode.is_none_or(|inode| inode == disk.ino())
}

/// Answers that a request reached another disk than the one it means.
pub(super) fn stale_answer(name: &str) -> Value {
    json!({
        "error": format!(
            "{name} is another disk by now, the one that was meant was renamed, removed or replaced: \
             nothing is done: ask again"
        ),
        "stale": true,
    })
}

/// Whether `request` is a valid request to a mount or to a disk; for the fuzz target.
#[doc(hidden)]
#[must_use]
pub fn is_valid_request(request: &[u8]) -> bool {
    serde_json::from_slice::<MountRequest>(request).is_ok() || parse_disk_request(request).is_ok()
}

impl Control {
    /// Answers a request to the mount.
    pub(super) fn answer_mount(&self, request: &[u8]) -> Value {
        match serde_json::from_slice(request) {
            Ok(MountRequest::Drain { streams, timeout_ms }) => {
                self.drain(streams, DrainTimeout::from_millis(timeout_ms))
            }
            Ok(MountRequest::Add { disk, cwd, force, allow_backing, trust }) => {
                match trust_dirs(&trust) {
                    Ok(()) => self.add(&disk, &cwd, force, allow_backing),
                    Err(line) => json!({ "error": line }),
                }
            }
            Ok(MountRequest::Remove { name, inode }) => self.remove(&name, inode),
            Err(error) => json!({ "error": format!("request not understood: {error}") }),
        }
    }

    /// Makes everything durable and answers what an unmount will do to each disk.
    fn drain(&self, streams: UnmountPolicy, patience: DrainTimeout) -> Value {
        let (mut said, mut failed) = (Vec::new(), Vec::new());
        for (name, entry) in self.catalog.list() {
            if entry.disk.stream().is_some() {
                match entry.disk.end_stream(streams, patience) {
                    Ok(line) => said.extend(line),
                    Err(why) => failed.push(format!("{name}: {why}")),
                }
                continue;
            }
            if let Err(error) = entry.disk.sync() {
                failed.push(format!("{name}: could not be made durable: {error}"));
                continue;
            }
            match unmount_summary(&name, &entry.disk) {
                Ok(line) => said.extend(line),
                Err(line) => failed.push(line),
            }
        }
        json!({ "ok": { "lines": said, "failed": failed } })
    }

    /// Answers a request to a disk.
    pub(super) fn answer_disk(
        &self,
        slot: u64,
        request: &[u8],
        is_gone: &(dyn Fn() -> bool + Sync),
    ) -> Value {
        let Some((name, entry)) = self.catalog.disk_by_slot(slot) else {
            return json!({ "error": "the disk is gone" });
        };
        let (inode, request) = match parse_disk_request(request) {
            Ok(parsed) => parsed,
            Err(error) => return json!({ "error": format!("request not understood: {error}") }),
        };
        if !matches_inode(&entry.disk, inode) {
            return stale_answer(&name);
        }
        match request {
            DiskRequest::Keep { dir, trust } => {
                match trust_dirs(&trust).and_then(|()| self.keep(&name, &entry, &dir)) {
                    Ok(()) => {
                        let line = format!("{name}: changes are kept in '{}'", dir.display());
                        log::info!("{line}");
                        json!({ "ok": { "line": line } })
                    }
                    Err(error) => json!({ "error": error }),
                }
            }
            DiskRequest::Finish { timeout_ms } => finish(&name, &entry.disk, timeout_ms),
            DiskRequest::Abort => abort(&name, &entry.disk),
            DiskRequest::Snapshot { name: snapshot, sync } => {
                self.snapshot(&name, &entry.disk, snapshot.as_deref(), sync)
            }
            DiskRequest::Snapshots => history::list_snapshots(&name, &entry.disk),
            DiskRequest::Unsnapshot { name: snapshot } => {
                self.delete_snapshot(&name, &entry, &snapshot)
            }
            DiskRequest::Revert { name: snapshot, force } => {
                self.restore(&name, &entry.disk, Some(&snapshot), force.into())
            }
            DiskRequest::Reset { force } => self.restore(&name, &entry.disk, None, force.into()),
            DiskRequest::Clone { name: new } => self.clone_disk(&name, &entry, &new),
            DiskRequest::Commit { force } => {
                self.invalidate_cache(&entry.disk);
                history::commit(&name, &entry.disk, force.into(), is_gone)
            }
            DiskRequest::Prefetch { start, end, copy } => {
                history::prefetch(&name, &entry.disk, start..end, copy, is_gone)
            }
            DiskRequest::Difference { since, until } => {
                self.difference(&name, &entry.disk, since.as_deref(), until.as_deref())
            }
            DiskRequest::Hydrate { rate, action } => {
                history::hydrate(&name, &entry.disk, rate, action)
            }
        }
    }

    /// Returns the function that reports the progress of a request to `spot`: bytes done, and in
    /// total.
    pub(super) fn progress_of(&self, spot: ControlNode) -> Option<ProgressFn> {
        let ControlNode::DiskCtl(slot) = spot else {
            return None;
        };
        let disk = Arc::clone(&self.catalog.disk_by_slot(slot)?.1.disk);
        match disk.stream() {
            Some(Stream::Output(output)) => {
                let output = Arc::clone(output);
                Some(Box::new(move || Some(output.progress())))
            }
            Some(Stream::Input { .. }) => None,
            None => Some(Box::new(move || Some(disk.progress()).filter(|(_, all)| *all > 0))),
        }
    }

    fn keep(&self, name: &str, entry: &CatalogEntry, dir: &Path) -> Result<(), String> {
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
                let place = OverlayPath { dir: &real, layers: None };
                entry.disk.keep(place).map_err(|error| error.to_string())?;
            }
        }
        entry.disk.write_holder(&self.holder());
        Ok(())
    }
}

fn finish(name: &str, disk: &Disk, timeout_ms: Option<u64>) -> Value {
    let Some(Stream::Output(output)) = disk.stream() else {
        return json!({ "error": format!("{name} is no output stream: there is nothing to finish") });
    };
    match output.finish(&|| disk.has_writers(), DrainTimeout::from_millis(timeout_ms)) {
        Ok(line) => json!({ "ok": { "line": line } }),
        Err(error @ FinishError::Busy) => {
            json!({ "error": format!("{name} {error}"), "busy": true })
        }
        Err(error) => json!({ "error": format!("{name}: {error}") }),
    }
}

fn abort(name: &str, disk: &Disk) -> Value {
    let result = match disk.stream() {
        Some(Stream::Output(output)) => output.abort("aborted"),
        Some(Stream::Input { input, .. }) => {
            // An earlier failure no longer matters: the stream ends now.
            let _ = input.close();
            Ok(())
        }
        None => Err("it is no stream: there is nothing to abort".to_owned()),
    };
    match result {
        Ok(()) => json!({ "ok": { "line": format!("{name}: aborted") } }),
        Err(why) => json!({ "error": format!("{name}: {why}") }),
    }
}

/// Says what an unmount does to the changes of a disk, if there are any.
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
