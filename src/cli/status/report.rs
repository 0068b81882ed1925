//! The status of a mount as a line, a table of its disks, and notes.

use serde::Deserialize;
use serde_json::Value;

use crate::cli::table::{Align, Table};
use crate::config::format_size;
use crate::control::api::{
    BufferStatus, DiskState, DiskStatus, HydrationState, MountState, MountStatus, OverlayStatus,
    PartitionStatus, StreamStatus,
};
use crate::printable::line as printable;

/// A mount to be shown.
#[derive(Debug)]
pub(super) struct MountReport(MountStatus);

impl MountReport {
    /// Parses the status of a mount. A malformed one becomes the report that it is not understood.
    pub(super) fn parse(mount: &Value) -> Self {
        Self(MountStatus::deserialize(mount).unwrap_or_else(|error| MountStatus {
            mountpoint: mount["mountpoint"].as_str().unwrap_or("?").to_owned(),
            state: MountState::Silent,
            error: Some(format!("its status is not understood: {error}")),
            ..MountStatus::default()
        }))
    }

    /// Whether the mount answers and all its disks can be used. A mount that may not be asked counts
    /// as healthy.
    pub(super) fn is_healthy(&self) -> bool {
        matches!(self.0.state, MountState::Ready | MountState::Draining | MountState::Private)
            && self.0.disks.iter().all(|disk| disk.state == DiskState::Ok)
    }

    /// Formats the report, with a line feed after every line.
    pub(super) fn render(&self) -> String {
        let mount = &self.0;
        let mut text = printable(&mount.mountpoint).into_owned();
        text += &match (&mount.state, mount.pid) {
            (MountState::Ready, Some(pid)) => format!("  (pid {pid})"),
            (state, Some(pid)) => format!("  ({}, pid {pid})", printable(state.as_str())),
            (MountState::Dead, None) => {
                format!("  (dead: cowslip umount {} clears it)", printable(&mount.mountpoint))
            }
            (state, None) => {
                format!("  ({}, {})", printable(state.as_str()), printable(&mount.source))
            }
        };
        text.push('\n');
        if !mount.disks.is_empty() {
            text += &disk_table(&mount.disks).to_string();
        }
        let partitions = mount.disks.iter().flat_map(partition_lines);
        let remotes = mount.disks.iter().filter_map(remote_line);
        let activities = mount.disks.iter().filter_map(activity_line);
        let problems = mount.disks.iter().filter_map(problem_line);
        let problems = mount.error.clone().into_iter().chain(problems);
        for line in partitions.chain(remotes).chain(activities).chain(problems) {
            text += &format!("  {}\n", printable(&line));
        }
        text
    }
}

fn disk_table(disks: &[DiskStatus]) -> Table<8> {
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
    for disk in disks {
        table.add_row(disk_row(disk));
    }
    table
}

fn disk_row(disk: &DiskStatus) -> [String; 8] {
    let none = || "-".to_owned();
    if let Some(stream) = &disk.stream {
        return [
            disk.name.clone(),
            format_size(disk.size),
            stream.direction.as_str().to_owned(),
            stream.state.as_str().to_owned(),
            disk.openers.to_string(),
            format_size(stream.accepted),
            buffer_text(stream),
            disk.base.clone().unwrap_or_else(none),
        ];
    }
    let overlay = disk.overlay.as_ref();
    [
        disk.name.clone(),
        format_size(disk.size),
        disk.mode.clone(),
        disk.state.as_str().to_owned(),
        disk.openers.to_string(),
        overlay.map_or_else(none, |overlay| format_size(overlay.changed)),
        overlay.map_or_else(none, overlay_location),
        disk.base.as_deref().map_or_else(none, base_text),
    ]
}

/// Formats the used and the whole size of a stream's window and spill.
fn buffer_text(stream: &StreamStatus) -> String {
    let text = |name: &str, buffer: BufferStatus| {
        let size = buffer.size.filter(|size| *size > 0).map(format_size)?;
        Some(format!("{name} {} of {size}", format_size(buffer.used)))
    };
    let texts = [text("window", stream.window), text("spill", stream.spill)];
    let texts: Vec<String> = texts.into_iter().flatten().collect();
    if texts.is_empty() { "-".to_owned() } else { texts.join(", ") }
}

fn overlay_location(overlay: &OverlayStatus) -> String {
    match (&overlay.path, overlay.temporary) {
        (Some(path), _) => path.clone(),
        (None, true) => "temporary".to_owned(),
        (None, false) => "kept".to_owned(),
    }
}

/// Formats a base for people: the size of a blank one as a user would write it.
fn base_text(base: &str) -> String {
    let size = base.strip_prefix("blank:").and_then(|size| size.parse::<u64>().ok());
    match size {
        None => base.to_owned(),
        // A file in a store is only as large as what was written to it.
        Some(0) => "blank".to_owned(),
        Some(size) => {
            let power = (size.trailing_zeros() / 10).min(6);
            let unit = ["", "K", "M", "G", "T", "P", "E"].get(power as usize).unwrap_or(&"");
            format!("blank:{}{unit}", size >> (10 * power))
        }
    }
}

/// Describes the partitions of a disk, a line each.
fn partition_lines(disk: &DiskStatus) -> Vec<String> {
    let line = |part: &PartitionStatus| {
        let (start, end) = (part.offset, part.offset.saturating_add(part.size));
        let size = format_size(part.size);
        format!("{}: {size}, bytes {start}..{end} of {}", part.name, disk.name)
    };
    disk.partitions.iter().map(line).collect()
}

/// Describes the operation on the disk that is in progress or was interrupted.
fn activity_line(disk: &DiskStatus) -> Option<String> {
    let overlay = disk.overlay.as_ref()?.blocks.as_ref()?;
    let Some(operation) = &overlay.doing else {
        let line = "a commit was cut short: cowslip commit finishes it";
        return overlay.committing.then(|| format!("{}: {line}", disk.name));
    };
    let percent = match overlay.total {
        0 => String::new(),
        total => format!(", {} %", u128::from(overlay.done) * 100 / u128::from(total)),
    };
    let is_paused = overlay.hydration == Some(HydrationState::Paused);
    let paused = if is_paused { ", paused" } else { "" };
    Some(format!("{}: {operation} is going on{percent}{paused}", disk.name))
}

/// Describes what was fetched of a base on a server.
fn remote_line(disk: &DiskStatus) -> Option<String> {
    let remote = disk.remote.as_ref()?;
    let (name, requests) = (&disk.name, remote.requests);
    let (fetched, size) = (format_size(remote.fetched), format_size(remote.size));
    let kept = format_size(remote.cached);
    let failures = match remote.failures {
        0 => String::new(),
        failures => format!(" ({failures} failed)"),
    };
    let waiting = match remote.waiting {
        // A request takes a moment.
        None | Some(0) => String::new(),
        Some(secs) => format!(", waiting for the server since {secs} s"),
    };
    let outage = match &remote.outage {
        None => String::new(),
        Some(why) => format!(", no connection ({why})"),
    };
    let verified = match &remote.bmap {
        None => String::new(),
        Some(bmap) => format!(", {} of {} ranges verified", bmap.verified, bmap.ranges),
    };
    Some(format!(
        "{name}: fetched {fetched} of {size} in {requests} requests{failures}, {kept} kept here{verified}{waiting}{outage}"
    ))
}

fn problem_line(disk: &DiskStatus) -> Option<String> {
    let problem = disk.error.as_ref().or(disk.warning.as_ref())?;
    Some(format!("{}: {problem}", disk.name))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_base_on_a_server_has_a_line() {
        let disk = json!({
            "name": "vm", "remote": {
                "size": 10737418240u64, "fetched": 1048576, "cached": 524288, "requests": 4,
                "failures": 1, "waiting": 7, "outage": "refused",
                "bmap": { "ranges": 9, "verified": 2, "mismatch": null },
            },
        });
        let disk = DiskStatus::deserialize(&disk).unwrap();
        let line = "vm: fetched 1 MiB of 10 GiB in 4 requests (1 failed), 512 KiB kept here, \
                    2 of 9 ranges verified, waiting for the server since 7 s, no connection (refused)";
        assert_eq!(remote_line(&disk).as_deref(), Some(line));
        assert_eq!(remote_line(&DiskStatus::default()), None);
    }

    #[test]
    fn stream_row_shows_its_state_and_its_buffers() {
        let disk = json!({
            "name": "o", "size": 10737418240u64, "state": "ok", "openers": 1, "base": "cmd:zstd",
            "stream": {
                "direction": "out", "state": "open", "accepted": 1048576, "unknown": 1,
                "window": { "size": 16777216, "used": 4096 },
                "spill": { "size": 1073741824, "used": 0 },
            },
        });
        let disk = DiskStatus::deserialize(&disk).unwrap();
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
        assert_eq!(disk_row(&disk), row);
        let strict = json!({ "stream": { "window": { "size": 0 }, "spill": { "size": 0 } } });
        assert_eq!(disk_row(&DiskStatus::deserialize(&strict).unwrap())[6], "-");
    }

    #[test]
    fn blank_base_is_shown_as_users_write_it() {
        assert_eq!(base_text("blank:3221225472"), "blank:3G");
        assert_eq!(base_text("blank:1099511627776"), "blank:1T");
        assert_eq!(base_text("blank:1000"), "blank:1000");
        assert_eq!(base_text("blank:1536"), "blank:1536");
        assert_eq!(base_text("blank:0"), "blank");
        assert_eq!(base_text("/srv/blank:3"), "/srv/blank:3");
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
    fn mount_is_a_line_and_a_table() {
        let report = MountReport::parse(&mount("ok"));
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
        let shown = MountReport::parse(&mount).render();
        let want = "\n  vm.img.p1: 4 MiB, bytes 1048576..5242880 of vm.img\n\
                    \x20 vm.img.p5: 512 bytes, bytes 8388608..8389120 of vm.img\n";
        assert!(shown.ends_with(want), "{shown}");
    }

    #[test]
    fn failed_disk_is_unhealthy() {
        let failed = MountReport::parse(&mount("read-only"));
        assert!(!failed.is_healthy());
        assert!(failed.render().ends_with("\n  vm.img: a sync failed\n"));
    }
}
