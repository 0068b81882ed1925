//! `cowslip snapshot`, `revert`, `reset` and `clone`: the history of an overlay.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::client::{AskError, Endpoint};
use super::long_request::{self, LongRequest};
use super::progress::{ProgressDisplay, Verbosity};
use super::stream::describe_openers;
use super::table::{Align, Table};
use super::{EXIT_OK, print, print_json, print_line, restore_sigpipe};
use crate::config::format_size;

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
    let place = Endpoint::of_disk(&args.file)?;
    if args.list {
        restore_sigpipe();
        let done = place.ask(&json!({ "op": "snapshots" }), |_| {})?;
        match args.json {
            true => print_json(&done["snapshots"])?,
            false => print(&snapshot_table(&done["snapshots"]))?,
        }
        return Ok(EXIT_OK);
    }
    let request = match &args.delete {
        Some(name) => json!({ "op": "unsnapshot", "name": name }),
        None => json!({ "op": "snapshot", "name": args.name, "sync": args.sync }),
    };
    ask_and_print(&place, &request)
}

/// Reverts a disk to a snapshot.
pub(super) fn revert(args: &RevertArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    ask_and_print(&place, &json!({ "op": "revert", "name": args.name, "force": args.force }))
}

/// Resets a disk to its base.
pub(super) fn reset(args: &ResetArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    ask_and_print(&place, &json!({ "op": "reset", "force": args.force }))
}

/// Creates a disk with the current contents of another one.
pub(super) fn clone(args: &CloneArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let name = clone_name(&place.mountpoint, &args.new)?;
    ask_and_print(&place, &json!({ "op": "clone", "name": name }))
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
    let is_mountpoint = |place: Endpoint| place.disk.is_none() && place.mountpoint == mountpoint;
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

/// Sends a request, shows progress, and prints the result.
fn ask_and_print(place: &Endpoint, request: &Value) -> anyhow::Result<u8> {
    let mut progress = ProgressDisplay::new(Verbosity::default());
    let done = place.ask(request, |now| progress.show(now));
    progress.end();
    print_result(place, done.map_err(Into::into))
}

/// Sends a request like [`ask_and_print`], for an operation that takes long.
pub(super) fn ask_long(
    place: &Endpoint,
    request: &Value,
    work: LongRequest,
    verbosity: Verbosity,
) -> anyhow::Result<u8> {
    print_result(place, long_request::ask(place, request, work, verbosity))
}

fn print_result(place: &Endpoint, done: anyhow::Result<Value>) -> anyhow::Result<u8> {
    let done = done.map_err(|error| name_openers(place, error))?;
    if let Some(line) = done["line"].as_str() {
        print_line(line);
    }
    Ok(EXIT_OK)
}

/// Adds the openers of the disk to the error for a disk in use.
fn name_openers(place: &Endpoint, error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(AskError::Busy(said)) => {
            anyhow::anyhow!("{said}: {}: close it there, or use --force", describe_openers(place))
        }
        _ => error,
    }
}

/// Formats the snapshots as a table.
pub(super) fn snapshot_table(snapshots: &Value) -> String {
    let size = |value: &Value| value.as_u64().map_or_else(|| "-".to_owned(), format_size);
    let mut table = Table::new([
        ("NAME", Align::Left),
        ("TAKEN", Align::Left),
        ("SIZE", Align::Right),
        ("HOLDS", Align::Right),
        ("ZEROED", Align::Right),
        ("CHANGED SINCE", Align::Right),
    ]);
    for snapshot in snapshots.as_array().into_iter().flatten() {
        let taken = jiff::Timestamp::from_second(snapshot["taken"].as_i64().unwrap_or(0));
        let taken = taken.unwrap_or_default().strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
        table.add_row([
            snapshot["name"].as_str().unwrap_or("-").to_owned(),
            taken,
            size(&snapshot["size"]),
            size(&snapshot["changed"]),
            size(&snapshot["zeroed"]),
            size(&snapshot["since"]["changed"]),
        ]);
    }
    table.to_string()
}
