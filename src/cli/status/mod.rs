//! `cowslip status`: the mounts of this host and their disks.
//!
//! Each mount reports its own state. A mount that cannot (it is dead, hangs, or is another user's) gets
//! a state here, so that one bad mount does not hide the others.

mod report;

use std::path::{Path, PathBuf};
use std::thread;

use clap::Args;
use serde::Serialize;
use serde_json::Value;

use self::report::MountReport;
use super::client::{AskError, Endpoint};
use super::{EXIT_OK, EXIT_UNHEALTHY, print, print_json, restore_sigpipe};
use crate::control::api::{MountState, StatusDocument};
use crate::host::mountinfo::{self, MountEntry};
use crate::mount::kernel::{self, MountHealth};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// A mountpoint or a mounted disk; without it all mounts of this host
    path: Option<PathBuf>,
    /// One JSON document
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<u8> {
    restore_sigpipe();
    // As JSON, with keys that only a daemon of another version knows.
    let mounts = match &args.path {
        Some(path) => vec![path_status(path)?],
        None => all_statuses(&mountinfo::cowslip_mounts()),
    };
    let reports: Vec<MountReport> = mounts.iter().map(MountReport::parse).collect();
    if args.json {
        print_json(&serde_json::to_value(StatusDocument::new(mounts))?)?;
    } else if reports.is_empty() {
        print("no cowslip mounts\n")?;
    } else {
        let shown: Vec<String> = reports.iter().map(MountReport::render).collect();
        print(&shown.join("\n"))?;
    }
    Ok(match reports.iter().all(MountReport::is_healthy) {
        true => EXIT_OK,
        false => EXIT_UNHEALTHY,
    })
}

/// Returns the status of the mount at or around `path`; if `path` is a disk, with that disk only.
fn path_status(path: &Path) -> anyhow::Result<Value> {
    let given = Endpoint::of(path)?;
    let mount = Endpoint::mount(&given.mountpoint);
    let mut status = match (mountinfo::mount_at(&given.mountpoint), mount.status()) {
        (_, Ok(document)) => first_mount(document),
        (Some(entry), Err(AskError::Dead(_))) => stub_status(&entry, MountState::Dead, None),
        (Some(entry), Err(error @ AskError::Denied(_))) => match partial_status(&entry) {
            Some(status) => status,
            None => return Err(error.into()),
        },
        (_, Err(error)) => return Err(error.into()),
    };
    let is_private = status["state"] == MountState::Private.as_str();
    let disks = status.get_mut("disks").and_then(Value::as_array_mut);
    if let (Some(name), Some(disks)) = (&given.disk, disks)
        && retain_disk(disks, name).is_err()
    {
        // The disk may exist, but belong to another user.
        if is_private {
            return Err(AskError::Denied(given.mountpoint).into());
        }
        if let Some(error) = given.partition_error() {
            return Err(error.into());
        }
        anyhow::bail!(
            "there is no disk '{}' in the mount at '{}': cowslip status lists them",
            name,
            given.mountpoint.display()
        );
    }
    Ok(status)
}

/// Returns the first mount in a status document, `null` if there is none.
fn first_mount(mut document: Value) -> Value {
    document.pointer_mut("/mounts/0").map(Value::take).unwrap_or_default()
}

/// Removes all disks but the disk `name`.
fn retain_disk(disks: &mut Vec<Value>, name: &str) -> Result<(), ()> {
    // A dead mount reports no disks.
    if disks.is_empty() {
        return Ok(());
    }
    disks.retain(|disk| disk["name"] == name);
    if disks.is_empty() { Err(()) } else { Ok(()) }
}

/// Returns the statuses of all mounts, asked at the same time: a mount that hangs shows that only after
/// a while. A mount that ended meanwhile is left out.
fn all_statuses(entries: &[MountEntry]) -> Vec<Value> {
    let statuses: Vec<Value> = thread::scope(|scope| {
        let ask = |entry| {
            let builder = thread::Builder::new().name("status".into());
            builder.spawn_scoped(scope, move || mount_status(entry)).map_err(|_| entry)
        };
        // Where no more threads can be started, one mount after the other.
        let asked: Vec<_> = entries.iter().map(|entry| (entry, ask(entry))).collect();
        let statuses = asked.into_iter().map(|(entry, thread)| match thread {
            Ok(thread) => {
                thread.join().unwrap_or_else(|_| stub_status(entry, MountState::Silent, None))
            }
            Err(entry) => mount_status(entry),
        });
        statuses.collect()
    });
    let remaining = mountinfo::cowslip_mounts();
    let is_mounted = |entry: &MountEntry| remaining.iter().any(|other| other.id == entry.id);
    let both = entries.iter().zip(statuses);
    both.filter(|(entry, _)| is_mounted(entry)).map(|(_, status)| status).collect()
}

/// Returns the status of one mount, whatever state it is in.
fn mount_status(entry: &MountEntry) -> Value {
    // Check first whether the mount is dead: that has a shorter time limit.
    if kernel::mount_health(&entry.mountpoint) == MountHealth::Dead {
        return stub_status(entry, MountState::Dead, None);
    }
    let private = |error| stub_status(entry, MountState::Private, Some(error));
    match Endpoint::mount(&entry.mountpoint).status() {
        Ok(document) => first_mount(document),
        Err(AskError::Dead(_)) => stub_status(entry, MountState::Dead, None),
        Err(error @ AskError::Foreign { .. }) => private(error.to_string()),
        Err(error @ AskError::Denied(_)) => {
            partial_status(entry).unwrap_or_else(|| private(error.to_string()))
        }
        Err(error) => stub_status(entry, MountState::Silent, Some(error.to_string())),
    }
}

/// Returns the status of a mount that shows only some of its disks to the caller; `None` if it shows
/// none.
fn partial_status(entry: &MountEntry) -> Option<Value> {
    let (disks, all) = Endpoint::mount(&entry.mountpoint).visible_disks().ok()?;
    if disks.is_empty() {
        return None;
    }
    let line =
        format!("you may look at {} of its {all} disks; whoever mounted it sees more", disks.len());
    let mut status = stub_status(entry, MountState::Private, Some(line));
    status["disks"] = Value::from(disks);
    Some(status)
}

/// The status of a mount that does not report its own.
#[derive(Serialize)]
struct StubStatus {
    mountpoint: String,
    source: String,
    /// Not known.
    pid: Option<u32>,
    state: MountState,
    error: Option<String>,
    disks: [Value; 0],
}

fn stub_status(entry: &MountEntry, state: MountState, error: Option<String>) -> Value {
    let status = StubStatus {
        mountpoint: entry.mountpoint.to_string_lossy().into_owned(),
        source: entry.source.to_string_lossy().into_owned(),
        pid: None,
        state,
        error,
        disks: [],
    };
    serde_json::to_value(status).unwrap_or_default()
}

/// Renders the first mount in a status document, and the document as if it were a mount. Returns the
/// length of the output; for the fuzz target.
pub(super) fn render_document(document: Value) -> usize {
    let shown = MountReport::parse(&document).render().len();
    shown + MountReport::parse(&first_mount(document)).render().len()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn entry() -> MountEntry {
        MountEntry {
            id: 9,
            parent: 1,
            dev: (0, 9),
            root: "/".into(),
            mountpoint: "/m".into(),
            fstype: mountinfo::FSTYPE.into(),
            source: "vm.img".into(),
            owner: Some(0),
        }
    }

    #[test]
    fn dead_mount_is_unhealthy() {
        let dead = MountReport::parse(&stub_status(&entry(), MountState::Dead, None));
        assert!(!dead.is_healthy());
        assert_eq!(dead.render(), "/m  (dead: cowslip umount /m clears it)\n");
    }

    #[test]
    fn private_mount_is_healthy_and_one_that_hangs_is_not() {
        let denied = Some(AskError::Denied("/m".into()).to_string());
        let private = MountReport::parse(&stub_status(&entry(), MountState::Private, denied));
        assert!(private.is_healthy());
        assert!(private.render().starts_with("/m  (private, vm.img)\n  the mount at '/m'"));
        let silent = Some(AskError::Silent("/m".into()).to_string());
        let silent = MountReport::parse(&stub_status(&entry(), MountState::Silent, silent));
        assert!(!silent.is_healthy());
        assert!(!MountReport::parse(&json!({ "disks": 5 })).is_healthy());
    }

    #[test]
    fn stub_has_all_keys_of_a_mount() {
        let stub = stub_status(&entry(), MountState::Dead, None);
        assert_eq!(
            stub.to_string(),
            r#"{"mountpoint":"/m","source":"vm.img","pid":null,"state":"dead","error":null,"disks":[]}"#
        );
    }

    #[test]
    fn path_of_a_disk_shows_only_that_disk() {
        let mut disks = vec![json!({ "name": "vm.img" }), json!({ "name": "b" })];
        retain_disk(&mut disks, "b").unwrap();
        assert_eq!(disks, [json!({ "name": "b" })]);
        assert!(retain_disk(&mut disks, "none").is_err());
    }
}
