//! `cowslip snapshot`, `revert`, `reset` and `clone`: the history of an overlay.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use super::client::Endpoint;
use super::request::ask_and_print;
use super::table::{Align, Table};
use super::{EXIT_OK, print, print_json, restore_sigpipe};
use crate::config::format_size;
use crate::control::api::{DiskRequest, SnapshotList, SnapshotRecord};

#[derive(Debug, Args)]
pub(super) struct SnapshotArgs {
    /// The mounted disk
    file: PathBuf,
    /// What to call it (the time it is taken)
    #[arg(conflicts_with_all = ["list", "delete"])]
    name: Option<String>,
    /// Show the snapshots there are
    #[arg(long, conflicts_with_all = ["delete", "sync"])]
    list: bool,
    /// Delete a snapshot; the disk and the other snapshots stay as they are
    #[arg(long, value_name = "NAME", conflicts_with = "sync")]
    delete: Option<String>,
    /// Return only when all that is in it is durable
    #[arg(long)]
    sync: bool,
    /// With --list: one JSON array
    // Conflicts are checked first: clap drops a requirement that cannot be met.
    #[arg(long, requires = "list", conflicts_with_all = ["name", "delete", "sync"])]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RevertArgs {
    /// The mounted disk
    file: PathBuf,
    /// The snapshot to go back to
    name: String,
    /// Also while it is open for writing
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct ResetArgs {
    /// The mounted disk
    file: PathBuf,
    /// Also while it is open for writing
    #[arg(long)]
    force: bool,
}

#[derive(Debug, Args)]
pub(super) struct CloneArgs {
    /// The mounted disk, of a store
    file: PathBuf,
    /// The name of the new disk in the same mount
    new: PathBuf,
}

/// Takes, lists or deletes a snapshot.
pub(super) fn snapshot(args: &SnapshotArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    if args.list {
        restore_sigpipe();
        if args.json {
            // Also keys that only a daemon of another version knows.
            let answer: SnapshotList<Value> = disk.ask(&DiskRequest::Snapshots, |_| {})?;
            print_json(&answer.snapshots)?;
        } else {
            let answer: SnapshotList<Vec<SnapshotRecord>> =
                disk.ask(&DiskRequest::Snapshots, |_| {})?;
            print(&snapshot_table(&answer.snapshots))?;
        }
        return Ok(EXIT_OK);
    }
    let request = match &args.delete {
        Some(name) => DiskRequest::Unsnapshot { name: name.clone() },
        None => DiskRequest::Snapshot { name: args.name.clone(), sync: args.sync },
    };
    ask_and_print(&disk, &request)
}

/// Reverts a disk to a snapshot.
pub(super) fn revert(args: &RevertArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    ask_and_print(&disk, &DiskRequest::Revert { name: args.name.clone(), force: args.force })
}

/// Resets a disk to its base.
pub(super) fn reset(args: &ResetArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    ask_and_print(&disk, &DiskRequest::Reset { force: args.force })
}

/// Creates a disk with the current contents of another one.
pub(super) fn clone(args: &CloneArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    let name = clone_name(&disk.mountpoint, &args.new)?;
    ask_and_print(&disk, &DiskRequest::Clone { name })
}

/// Returns the name in the mount that `given`, a name or a path, denotes.
fn clone_name(mountpoint: &Path, given: &Path) -> anyhow::Result<String> {
    let elsewhere = || {
        anyhow::anyhow!(
            "'{}' is not right in the mount at '{}': a clone lives beside its disk",
            given.display(),
            mountpoint.display()
        )
    };
    let is_mountpoint = |given: Endpoint| given.disk.is_none() && given.mountpoint == mountpoint;
    if Endpoint::of(given).is_ok_and(is_mountpoint) {
        anyhow::bail!(
            "'{path}' is the mountpoint: name the new disk, '{path}/NAME'",
            path = given.display()
        );
    }
    let name = given.file_name().and_then(|name| name.to_str()).ok_or_else(elsewhere)?;
    match given.parent() {
        None => {}
        Some(parent) if parent.as_os_str().is_empty() => {}
        Some(parent) => match Endpoint::of(parent) {
            Ok(Endpoint { mountpoint: there, disk: None, .. }) if there == mountpoint => {}
            _ => return Err(elsewhere()),
        },
    }
    Ok(name.to_owned())
}

/// Formats the snapshots as a table.
pub(super) fn snapshot_table(snapshots: &[SnapshotRecord]) -> String {
    let size = |bytes: Option<u64>| bytes.map_or_else(|| "-".to_owned(), format_size);
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("TAKEN", Align::Left),
        ("SIZE", Align::Right),
        ("HOLDS", Align::Right),
        ("ZEROED", Align::Right),
        ("CHANGED SINCE", Align::Right),
    ]);
    for snapshot in snapshots {
        let taken = jiff::Timestamp::from_second(snapshot.taken).unwrap_or_default();
        table.add_row([
            snapshot.name.clone().unwrap_or_else(|| "-".to_owned()),
            taken.strftime("%Y-%m-%d %H:%M:%S UTC").to_string(),
            size(snapshot.size),
            size(snapshot.changed),
            size(snapshot.zeroed),
            size(snapshot.since.map(|since| since.changed)),
        ]);
    }
    table.to_string()
}
