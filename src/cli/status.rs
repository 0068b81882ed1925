//! `cowslip status`: the mounts of this host and their disks.
//!
//! Each mount tells its own state; what cannot tell (it is dead, hangs, or is another user's) gets
//! a state from here, so that one bad mount does not hide the others.

use std::path::{Path, PathBuf};
use std::thread;

use clap::Args;
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::{AskError, Endpoint};
use super::table::{Align, Table};
use super::{EXIT_OK, EXIT_UNHEALTHY, print, print_json, restore_sigpipe};
use crate::config::format_size;
use crate::host::mountinfo::{self, MountEntry};
use crate::mount::kernel::{self, MountHealth};
use crate::printable::line as printable;

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
    let mounts = match &args.path {
        Some(path) => vec![path_status(path)?],
        None => all_statuses(&mountinfo::cowslip_mounts()),
    };
    let reports: Vec<MountReport> = mounts.iter().map(MountReport::of).collect();
    if args.json {
        print_json(&json!({ "schema": 1, "mounts": mounts }))?;
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

/// The mount that `path` is or lies in, with that one disk only if it is one.
fn path_status(path: &Path) -> anyhow::Result<Value> {
    let place = Endpoint::of(path)?;
    let whole = Endpoint::mount(&place.mountpoint);
    let mut mount = match (mountinfo::entry_at(&place.mountpoint), whole.status()) {
        (_, Ok(status)) => first_mount(status),
        (Some(entry), Err(AskError::Dead(_))) => stub_report(&entry, "dead", None),
        (Some(entry), Err(error @ AskError::Denied(_))) => match partial_report(&entry) {
            Some(told) => told,
            None => return Err(error.into()),
        },
        (_, Err(error)) => return Err(error.into()),
    };
    let state = mount["state"].clone();
    let disks = mount.get_mut("disks").and_then(Value::as_array_mut);
    if let (Some(name), Some(disks)) = (&place.disk, disks)
        && retain_disk(disks, name).is_err()
    {
        // It may be there and somebody else's.
        if state == "private" {
            return Err(AskError::Denied(place.mountpoint).into());
        }
        if let Some(error) = place.partition_error() {
            return Err(error.into());
        }
        anyhow::bail!(
            "there is no disk '{}' in the mount at '{}': cowslip status lists them",
            name,
            place.mountpoint.display()
        );
    }
    Ok(mount)
}

/// The mount that a mount tells of.
pub(super) fn first_mount(mut status: Value) -> Value {
    status.pointer_mut("/mounts/0").map(Value::take).unwrap_or_default()
}

/// Leaves only the disk `name`.
fn retain_disk(disks: &mut Vec<Value>, name: &str) -> Result<(), ()> {
    // A dead mount has none to choose from.
    if disks.is_empty() {
        return Ok(());
    }
    disks.retain(|disk| disk["name"] == name);
    if disks.is_empty() { Err(()) } else { Ok(()) }
}

/// All mounts at once: some may take their time to show that they hang. One that ended between
/// the listing and the question is left out.
fn all_statuses(entries: &[MountEntry]) -> Vec<Value> {
    let told: Vec<Value> = thread::scope(|scope| {
        let ask = |entry| {
            let asker = thread::Builder::new().name("status".into());
            asker.spawn_scoped(scope, move || mount_status(entry)).map_err(|_| entry)
        };
        // As many at once as there are threads to spare, the others one after the other.
        let asked: Vec<_> = entries.iter().map(|entry| (entry, ask(entry))).collect();
        let told = asked.into_iter().map(|(entry, asked)| match asked {
            Ok(asked) => asked.join().unwrap_or_else(|_| stub_report(entry, "silent", None)),
            Err(entry) => mount_status(entry),
        });
        told.collect()
    });
    let still_there = mountinfo::cowslip_mounts();
    let is_there = |entry: &MountEntry| still_there.iter().any(|other| other.id == entry.id);
    let both = entries.iter().zip(told);
    both.filter(|(entry, _)| is_there(entry)).map(|(_, told)| told).collect()
}

/// What a mount says of itself, or what is to be said of it.
fn mount_status(entry: &MountEntry) -> Value {
    // First whether it is dead at all: that has a shorter bound.
    if kernel::mount_health(&entry.mountpoint) == MountHealth::Dead {
        return stub_report(entry, "dead", None);
    }
    match Endpoint::mount(&entry.mountpoint).status() {
        Ok(status) => first_mount(status),
        Err(AskError::Dead(_)) => stub_report(entry, "dead", None),
        Err(error @ AskError::Foreign { .. }) => stub_report(entry, "private", Some(&error)),
        Err(error @ AskError::Denied(_)) => {
            partial_report(entry).unwrap_or_else(|| stub_report(entry, "private", Some(&error)))
        }
        Err(error) => stub_report(entry, "silent", Some(&error)),
    }
}

/// The report on a mount that tells only of the disks that one may look at; `None` where there are
/// none.
fn partial_report(entry: &MountEntry) -> Option<Value> {
    let (disks, all) = Endpoint::mount(&entry.mountpoint).visible_disks().ok()?;
    if disks.is_empty() {
        return None;
    }
    let line =
        format!("you may look at {} of its {all} disks; whoever mounted it sees more", disks.len());
    let mut told = stub_report(entry, "private", None);
    told["error"] = Value::from(line);
    told["disks"] = Value::from(disks);
    Some(told)
}

/// What `status` shows of a mount that tells `mount` of itself.
pub(super) fn render_mount(mount: &Value) -> String {
    MountReport::of(mount).render()
}

/// The report on a mount that does not tell.
fn stub_report(entry: &MountEntry, state: &str, error: Option<&AskError>) -> Value {
    json!({
        "mountpoint": entry.mountpoint.to_string_lossy(),
        "source": entry.source.to_string_lossy(),
        "pid": null,
        "state": state,
        "error": error.map(ToString::to_string),
        "disks": [],
    })
}

/// A base for people: a blank one is told with its size as one would write it.
fn base_text(base: &str) -> String {
    let size = base.strip_prefix("blank:").and_then(|size| size.parse::<u64>().ok());
    match size {
        None => base.to_owned(),
        // A file of a store is as large as what was written to it.
        Some(0) => "blank".to_owned(),
        Some(size) => {
            let power = (size.trailing_zeros() / 10).min(6);
            let unit = ["", "K", "M", "G", "T", "P", "E"].get(power as usize).unwrap_or(&"");
            format!("blank:{}{unit}", size >> (10 * power))
        }
    }
}

/// A mount, as far as the table and the exit code need it. Unknown keys are left alone, missing
/// ones empty: the daemon may be of another version.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct MountReport {
    mountpoint: String,
    source: String,
    pid: Option<u32>,
    state: String,
    error: Option<String>,
    disks: Vec<DiskReport>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct DiskReport {
    name: String,
    size: u64,
    mode: String,
    state: String,
    error: Option<String>,
    /// What is not right and no failure.
    warning: Option<String>,
    openers: u64,
    base: Option<String>,
    overlay: Option<OverlayReport>,
    stream: Option<StreamReport>,
    partitions: Vec<PartitionReport>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct PartitionReport {
    name: String,
    offset: u64,
    size: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct StreamReport {
    direction: String,
    state: String,
    accepted: u64,
    window: BufferReport,
    spill: BufferReport,
}

/// How large something is, if it has a size, and how much of it is used.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct BufferReport {
    size: Option<u64>,
    used: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct OverlayReport {
    temporary: bool,
    path: Option<String>,
    changed: u64,
    /// What is being done to the disk as a whole.
    doing: Option<String>,
    hydration: Option<String>,
    done: u64,
    total: u64,
    /// A commit was begun and has not ended.
    committing: bool,
}

impl MountReport {
    fn of(mount: &Value) -> Self {
        Self::deserialize(mount).unwrap_or_else(|error| Self {
            mountpoint: mount["mountpoint"].as_str().unwrap_or("?").to_owned(),
            state: "silent".to_owned(),
            error: Some(format!("its status is not understood: {error}")),
            ..Self::default()
        })
    }

    /// Whether it answers and all its disks can be used. One that may not be asked is not known
    /// to be ill.
    fn is_healthy(&self) -> bool {
        matches!(self.state.as_str(), "ready" | "draining" | "private")
            && self.disks.iter().all(|disk| disk.state == "ok")
    }

    fn render(&self) -> String {
        let mut text = printable(&self.mountpoint).into_owned();
        text += &match (self.state.as_str(), self.pid) {
            ("ready", Some(pid)) => format!("  (pid {pid})"),
            (state, Some(pid)) => format!("  ({}, pid {pid})", printable(state)),
            ("dead", None) => {
                format!("  (dead: cowslip umount {} clears it)", printable(&self.mountpoint))
            }
            (state, None) => format!("  ({}, {})", printable(state), printable(&self.source)),
        };
        text.push('\n');
        let mut table = Table::new([
            ("DISK", Align::Left),
            ("SIZE", Align::Right),
            ("MODE", Align::Left),
            ("STATE", Align::Left),
            ("OPEN", Align::Right),
            ("CHANGED", Align::Right),
            ("OVERLAY", Align::Left),
            ("BASE", Align::Left),
        ])
        .indented("  ");
        for disk in &self.disks {
            table.add_row(disk.row());
        }
        if !self.disks.is_empty() {
            text += &table.to_string();
        }
        for part in self.disks.iter().flat_map(DiskReport::partition_lines) {
            text += &format!("  {}\n", printable(&part));
        }
        for news in self.disks.iter().filter_map(DiskReport::activity_line) {
            text += &format!("  {}\n", printable(&news));
        }
        let errors = self.disks.iter().filter_map(DiskReport::problem_line);
        for error in self.error.clone().into_iter().chain(errors) {
            text += &format!("  {}\n", printable(&error));
        }
        text
    }
}

impl DiskReport {
    fn row(&self) -> [String; 8] {
        let none = || "-".to_owned();
        if let Some(stream) = &self.stream {
            return [
                self.name.clone(),
                format_size(self.size),
                stream.direction.clone(),
                stream.state.clone(),
                self.openers.to_string(),
                format_size(stream.accepted),
                stream.buffer_text(),
                self.base.clone().unwrap_or_else(none),
            ];
        }
        let overlay = self.overlay.as_ref();
        [
            self.name.clone(),
            format_size(self.size),
            self.mode.clone(),
            self.state.clone(),
            self.openers.to_string(),
            overlay.map_or_else(none, |overlay| format_size(overlay.changed)),
            overlay.map_or_else(none, OverlayReport::location),
            self.base.as_deref().map_or_else(none, base_text),
        ]
    }

    /// Its partitions, a line each.
    fn partition_lines(&self) -> Vec<String> {
        let one = |part: &PartitionReport| {
            let (start, end) = (part.offset, part.offset.saturating_add(part.size));
            let size = format_size(part.size);
            format!("{}: {size}, bytes {start}..{end} of {}", part.name, self.name)
        };
        self.partitions.iter().map(one).collect()
    }

    /// What is being done to it, and how far that is.
    fn activity_line(&self) -> Option<String> {
        let overlay = self.overlay.as_ref()?;
        let Some(doing) = &overlay.doing else {
            let line = "a commit was cut short: cowslip commit finishes it";
            return overlay.committing.then(|| format!("{}: {line}", self.name));
        };
        let far = u128::from(overlay.done) * 100 / u128::from(overlay.total.max(1));
        let far = if overlay.total > 0 { format!(", {far} %") } else { String::new() };
        let paused = if overlay.hydration.as_deref() == Some("paused") { ", paused" } else { "" };
        Some(format!("{}: {doing} is going on{far}{paused}", self.name))
    }

    fn problem_line(&self) -> Option<String> {
        let error = self.error.as_ref().or(self.warning.as_ref())?;
        Some(format!("{}: {error}", self.name))
    }
}

impl StreamReport {
    /// Window and spill, used and whole.
    fn buffer_text(&self) -> String {
        let room = |name: &str, room: &BufferReport| {
            let size = room.size.filter(|size| *size > 0).map(format_size);
            size.map(|size| format!("{name} {} of {size}", format_size(room.used)))
        };
        let rooms = [room("window", &self.window), room("spill", &self.spill)];
        let rooms: Vec<String> = rooms.into_iter().flatten().collect();
        if rooms.is_empty() { "-".to_owned() } else { rooms.join(", ") }
    }
}

impl OverlayReport {
    fn location(&self) -> String {
        match (&self.path, self.temporary) {
            (Some(path), _) => path.clone(),
            (None, true) => "temporary".to_owned(),
            (None, false) => "kept".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_shows_its_state_and_its_rooms() {
        let disk = json!({
            "name": "o", "size": 10737418240u64, "state": "ok", "openers": 1, "base": "cmd:zstd",
            "stream": {
                "direction": "out", "state": "open", "accepted": 1048576, "unknown": 1,
                "window": { "size": 16777216, "used": 4096 },
                "spill": { "size": 1073741824, "used": 0 },
            },
        });
        let disk = DiskReport::deserialize(&disk).unwrap();
        let row = [
            "o",
            "10 GiB",
            "out",
            "open",
            "1",
            "1 MiB",
            "window 4 KiB of 16 MiB, spill 0 bytes of 1 GiB",
            "cmd:zstd",
        ];
        assert_eq!(disk.row(), row);
        let strict = json!({ "stream": { "window": { "size": 0 }, "spill": { "size": 0 } } });
        assert_eq!(DiskReport::deserialize(&strict).unwrap().row()[6], "-");
    }

    #[test]
    fn a_blank_base_is_shown_as_one_writes_it() {
        assert_eq!(base_text("blank:3221225472"), "blank:3G");
        assert_eq!(base_text("blank:1099511627776"), "blank:1T");
        assert_eq!(base_text("blank:1000"), "blank:1000");
        assert_eq!(base_text("blank:1536"), "blank:1536");
        assert_eq!(base_text("blank:0"), "blank");
        assert_eq!(base_text("/srv/blank:3"), "/srv/blank:3");
    }

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

    fn mount(disk_state: &str) -> Value {
        json!({
            "mountpoint": "/m", "source": "vm.img", "pid": 7, "state": "ready", "later": 1,
            "disks": [
                { "name": "vm.img", "size": 21_474_836_480u64, "mode": "cow", "state": disk_state,
                  "error": (disk_state != "ok").then_some("a sync failed"), "openers": 1,
                  "base": "/srv/vm.img",
                  "overlay": { "temporary": true, "path": null, "changed": 65536 } },
                { "name": "b", "size": 512, "mode": "ro", "state": "ok", "error": null,
                  "openers": 0, "base": "/srv/b", "overlay": null },
            ],
        })
    }

    #[test]
    fn a_mount_is_a_line_and_a_table() {
        let report = MountReport::of(&mount("ok"));
        assert!(report.is_healthy());
        assert_eq!(
            report.render(),
            "/m  (pid 7)\n\
             \x20 DISK         SIZE  MODE  STATE  OPEN  CHANGED  OVERLAY    BASE\n\
             \x20 vm.img     20 GiB  cow   ok        1   64 KiB  temporary  /srv/vm.img\n\
             \x20 b       512 bytes  ro    ok        0        -  -          /srv/b\n"
        );
    }

    #[test]
    fn partitions_are_listed_below_the_table() {
        let mut mount = mount("ok");
        mount["disks"][0]["partitions"] = json!([
            { "number": 1, "name": "vm.img.p1", "offset": 1048576, "size": 4194304 },
            { "number": 5, "name": "vm.img.p5", "offset": 8388608, "size": 512 },
        ]);
        let shown = MountReport::of(&mount).render();
        let want = "\n  vm.img.p1: 4 MiB, bytes 1048576..5242880 of vm.img\n\
                    \x20 vm.img.p5: 512 bytes, bytes 8388608..8389120 of vm.img\n";
        assert!(shown.ends_with(want), "{shown}");
    }

    #[test]
    fn a_disk_that_failed_and_a_dead_mount_are_unhealthy() {
        let failed = MountReport::of(&mount("read-only"));
        assert!(!failed.is_healthy());
        assert!(failed.render().ends_with("\n  vm.img: a sync failed\n"));
        let dead = MountReport::of(&stub_report(&entry(), "dead", None));
        assert!(!dead.is_healthy());
        assert_eq!(dead.render(), "/m  (dead: cowslip umount /m clears it)\n");
    }

    #[test]
    fn a_mount_that_may_not_be_asked_is_not_ill_and_one_that_hangs_is() {
        let denied = AskError::Denied("/m".into());
        let private = MountReport::of(&stub_report(&entry(), "private", Some(&denied)));
        assert!(private.is_healthy());
        assert!(private.render().starts_with("/m  (private, vm.img)\n  the mount at '/m'"));
        let hangs = AskError::Silent("/m".into());
        assert!(!MountReport::of(&stub_report(&entry(), "silent", Some(&hangs))).is_healthy());
        assert!(!MountReport::of(&json!({ "disks": 5 })).is_healthy());
    }

    #[test]
    fn a_path_of_a_disk_shows_that_disk() {
        let mut mount = mount("ok");
        let disks = mount["disks"].as_array_mut().unwrap();
        retain_disk(disks, "b").unwrap();
        assert_eq!((disks.len(), &disks[0]["name"]), (1, &json!("b")));
        assert!(retain_disk(disks, "none").is_err());
    }
}
