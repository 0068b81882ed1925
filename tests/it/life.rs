//! Snapshots, reverts, resets and clones, and the requests they reject: on a real mount, with the
//! real program.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::mount::*;
use rustix::fs::SeekFrom;

/// Returns the path of a snapshot's file.
fn shot(disk: &str, name: &str) -> String {
    format!("m/.cowslip/{disk}/snapshots/{name}")
}

/// Reads all bytes of a file.
fn all(lab: &Lab, name: &str) -> Vec<u8> {
    fs::read(lab.path(name)).unwrap()
}

/// Returns the number of layers in the overlay or store `dir`.
fn layers(lab: &Lab, dir: &str) -> usize {
    fs::read_dir(lab.path(dir).join("layers")).unwrap().count()
}

/// Mounts a disk `d` over a base of 16 MiB with the overlay `ov`.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img,overlay=ov");
    lab
}

/// Waits until merging has left `count` layers in `dir`.
fn wait_for_layers(lab: &Lab, dir: &str, count: usize) {
    wait_until("layers are merged", || layers(lab, dir) == count);
}

#[test]
fn snapshot_is_a_raw_file_for_qemu() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 5), 3 * MIB + 7).unwrap();
    fallocate(&file, PUNCH, 0..MIB).unwrap();
    lab.ok("snapshot m/d a");
    let before = all(&lab, "m/d");
    file.write_all_at(&noise(MIB, 6), 3 * MIB).unwrap();
    let path = shot("d", "a");
    let info = lab.sh(&format!("qemu-img info --output=json -f raw {path}"));
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["virtual-size"], 16 * MIB);
    lab.sh(&format!("qemu-img convert -f raw -O qcow2 {path} a.qcow2"));
    lab.sh("qemu-img convert -O raw a.qcow2 a.raw");
    assert!(all(&lab, "a.raw") == before);
    assert!(all(&lab, &path) == before);
    assert!(all(&lab, "m/d") != before);
    drop(file);
}

#[test]
fn snapshot_is_read_only() {
    let lab = lab();
    lab.ok("snapshot m/d a");
    let found = fs::metadata(lab.path(&shot("d", "a"))).unwrap();
    assert_eq!(found.permissions().mode() & 0o222, 0);
    let opened = fs::OpenOptions::new().write(true).open(lab.path(&shot("d", "a")));
    assert!(opened.is_err());
}

#[test]
fn snapshots_and_clones_of_a_mounted_ext4_pass_fsck() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("truncate -s 64M m/d; mkfs.ext4 -q -F m/d; mkdir in");
    let device = lab.loop_device("m/d", "");
    lab.sh(&format!("mount {device} in"));
    lab.sh("for i in 1 2 3 4 5 6 7 8; do head -c 300000 /dev/urandom > in/$i; done; echo kept > in/word; sync -f in");
    // A process writes to the file system the whole time.
    let mut writer = lab.command("sh");
    writer.args([
        "-c",
        "i=0; while echo $i > in/busy$((i % 50)); do rm -f in/busy$((i % 7)); i=$((i+1)); done",
    ]);
    let mut writer = Running(writer.stderr(std::process::Stdio::null()).spawn().unwrap());
    for round in 0..4 {
        lab.ok(&format!("snapshot m/d s{round}"));
        lab.ok(&format!("clone m/d c{round}"));
    }
    writer.0.kill().unwrap();
    writer.0.wait().unwrap();
    // The last child of the writer may still be running.
    wait_until("nobody is in it", || lab.output("umount", &["in"]).status.success());
    lab.sh(&format!("losetup -d {device}"));
    // The journal of a file system in use is replayed first; for a snapshot on a copy.
    lab.sh("mkdir out");
    for round in 0..4 {
        let path = shot("d", &format!("s{round}"));
        lab.sh(&format!("cp --sparse=always {path} copy; for f in copy m/c{round}; do e2fsck -fy $f || [ $? = 1 ]; e2fsck -fn $f; done"));
        let device = lab.loop_device(&format!("m/c{round}"), "-r");
        lab.sh(&format!("mount -o ro,noload {device} out"));
        assert_eq!(
            lab.sh("cat out/word; cmp in/1 out/1 2>/dev/null || true; ls out | grep -c '^[1-8]$'"),
            "kept\n8\n"
        );
        lab.sh(&format!("umount out; losetup -d {device}"));
    }
    lab.sh("e2fsck -fn m/d");
}

#[test]
fn snapshot_can_be_checked_through_a_read_only_loop_device() {
    let lab = Lab::new();
    lab.mount("d=blank:32M,overlay=ov");
    lab.sh("mkfs.ext4 -q -F m/d");
    lab.ok("snapshot m/d fresh");
    lab.sh("dd if=/dev/urandom of=m/d bs=1M count=8 conv=notrunc status=none");
    let device = lab.loop_device(&shot("d", "fresh"), "-r");
    lab.sh(&format!("e2fsck -fn {device}"));
    lab.sh(&format!("losetup -d {device}"));
}

#[test]
fn reads_and_map_depths_are_correct_with_64_snapshots() {
    let lab = lab();
    let file = lab.open("m/d");
    let mut models = Vec::new();
    let at = |layer: u64| 5 * MIB + layer * 100 * KIB;
    for layer in 0..64 {
        file.write_all_at(&noise(8 * KIB, layer + 1), at(layer)).unwrap();
        // Every layer has data here.
        file.write_all_at(&noise(4 * KIB, layer + 1), 15 * MIB).unwrap();
        lab.ok(&format!("snapshot m/d s{layer}"));
        models.push(read(&file, 0, 16 * MIB));
    }
    for layer in (0..64).step_by(9) {
        assert!(all(&lab, &shot("d", &format!("s{layer}"))) == models[layer], "s{layer}");
    }
    assert!(all(&lab, "m/d") == models[63]);
    let map: serde_json::Value = serde_json::from_str(&lab.ok("map m/d --json")).unwrap();
    let depth = |offset: u64| {
        let inside = |piece: &&serde_json::Value| {
            let start = piece["start"].as_u64().unwrap();
            start <= offset && offset < start + piece["length"].as_u64().unwrap()
        };
        map.as_array().unwrap().iter().find(inside).unwrap()["depth"].as_u64().unwrap()
    };
    for layer in 0..64 {
        // The layer of the latest snapshot has depth 1, since only the top is above it.
        assert_eq!(depth(at(layer)), 64 - layer, "layer {layer}");
        assert_eq!(depth(at(layer) + 8 * KIB), 65);
    }
    assert_eq!(depth(15 * MIB), 1);
    drop(file);
    lab.umount();
    lab.mount("d=base.img,overlay=ov");
    assert!(all(&lab, "m/d") == models[63]);
    assert!(all(&lab, &shot("d", "s20")) == models[20]);
}

#[test]
fn readable_map_names_the_layer_instead_of_the_base() {
    let lab = lab();
    lab.open("m/d").write_all_at(&noise(4096, 1), 6 * MIB).unwrap();
    lab.ok("snapshot m/d a");
    let map = lab.ok("map m/d");
    let row = map.lines().find(|line| line.trim_start().starts_with(&(6 * MIB).to_string()));
    let row = row.unwrap_or_else(|| panic!("{map}"));
    assert!(!row.ends_with("base"), "{row}");
}

#[test]
fn invalid_and_duplicate_snapshot_names_are_rejected_without_changes() {
    let lab = lab();
    lab.ok("snapshot m/d a");
    let before = lab.ok("snapshot m/d --list");
    let count = layers(&lab, "ov");
    for (words, says) in [
        ("snapshot m/d a", "already"),
        ("snapshot m/d x/y", "'/'"),
        ("snapshot m/d .", "no name"),
        ("snapshot m/d ..", "no name"),
        ("snapshot m/d --delete b", "no snapshot 'b'"),
        ("revert m/d b", "no snapshot 'b'"),
        (&format!("snapshot m/d {}", "x".repeat(256)), "255"),
    ] {
        let line = lab.refused(1, words);
        assert!(line.contains(says), "{words}: {line}");
    }
    assert_eq!(lab.ok("snapshot m/d --list"), before);
    assert_eq!(layers(&lab, "ov"), count);
}

#[test]
fn disk_without_an_overlay_rejects_snapshots() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.sh("cp base.img rw.img");
    lab.mount("r=base.img,mode=ro w=rw.img,mode=rw");
    for words in ["snapshot m/r a", "snapshot m/w a", "revert m/r a", "reset m/w"] {
        assert!(lab.refused(1, words).contains("no overlay"), "{words}");
    }
}

#[test]
fn revert_and_reset_name_the_writers_unless_forced() {
    let lab = lab();
    let base = all(&lab, "base.img");
    lab.open("m/d").write_all_at(&noise(5000, 1), 100).unwrap();
    lab.ok("snapshot m/d a");
    let at_a = all(&lab, "m/d");
    let mut sleeper = lab.command("sh");
    sleeper.args(["-c", "exec 3<>m/d; echo > ready; exec sleep 50"]);
    let mut sleeper = Running(sleeper.spawn().unwrap());
    wait_until("it is open", || lab.path("ready").exists());
    let file = lab.open("m/d");
    file.write_all_at(&noise(9000, 2), 50).unwrap();
    for words in ["revert m/d a", "reset m/d"] {
        let line = lab.refused(1, words);
        assert!(line.contains(&format!("pid {}", sleeper.pid())), "{line}");
        assert!(line.contains("--force"), "{line}");
        assert!(read(&file, 50, 9000) == noise(9000, 2));
    }
    lab.ok("revert m/d a --force");
    assert!(read(&file, 0, 16 * MIB) == at_a);
    file.write_all_at(b"on", 50).unwrap();
    lab.ok("reset m/d --force");
    assert!(read(&file, 0, 16 * MIB) == base);
    drop(file);
    sleeper.0.kill().unwrap();
    sleeper.0.wait().unwrap();
    assert!(all(&lab, &shot("d", "a")) == at_a);
}

#[test]
fn revert_and_reset_restore_the_size() {
    let lab = lab();
    lab.ok("snapshot m/d a");
    lab.sh("truncate -s 3M m/d");
    lab.ok("snapshot m/d b");
    lab.sh("truncate -s 40M m/d");
    let len = || fs::metadata(lab.path("m/d")).unwrap().len() / MIB;
    for (words, size) in [("revert m/d b", 3), ("revert m/d a", 16), ("reset m/d", 16)] {
        lab.ok(words);
        assert_eq!(len(), size, "{words}");
        assert_eq!(lab.sh("wc -c < m/d").trim(), (size * MIB).to_string());
    }
}

/// A write of a part of a page, behind the end that the disk had before a revert or a reset, keeps the
/// rest of the page. `disk` is mounted as `d`, with 4 MiB of `base`.
fn new_size_is_seen_under_writeback(lab: &Lab, disk: &str, base: &[u8]) {
    let ino = || fs::metadata(lab.path("m/d")).unwrap().ino();
    let first = ino();
    lab.ok("snapshot m/d full");
    lab.sh("truncate -s 1M m/d");
    lab.ok("snapshot m/d small");
    // Somebody refers to the file, and keeps the kernel's inode.
    let held = lab.open_with("m/d", libc::O_PATH);
    let old = format!("/proc/self/fd/{}", held.as_raw_fd());
    for (words, len) in
        [("revert m/d full", 4), ("revert m/d small", 1), ("reset m/d", 4), ("revert m/d full", 4)]
    {
        let before = ino();
        let len_before = fs::metadata(lab.path("m/d")).unwrap().len();
        lab.ok(words);
        assert_eq!(fs::metadata(lab.path("m/d")).unwrap().len(), len * MIB, "{words}");
        assert_eq!(ino() == before, len_before == len * MIB, "{words}");
        assert_eq!(lab.sh("wc -c < m/d").trim(), (len * MIB).to_string(), "{words}");
    }
    // What was the file is none any more: its page cache and its size are old.
    let reopened = fs::OpenOptions::new().write(true).open(&old);
    assert_eq!(reopened.err().and_then(|error| error.raw_os_error()), Some(libc::ESTALE));
    assert_eq!(lab.disk("d")["inode"], ino());
    drop(held);
    let at = 2 * MIB + 100;
    let file = lab.open("m/d");
    file.write_all_at(b"0123456789", at).unwrap();
    file.sync_all().unwrap();
    drop(file);
    lab.umount();
    lab.mount(disk);
    assert_eq!(ino(), first);
    let mut expected = base.to_vec();
    let at = usize::try_from(at).unwrap();
    expected[at..at + 10].copy_from_slice(b"0123456789");
    assert!(all(lab, "m/d") == expected);
}

#[test]
fn revert_and_reset_restore_the_size_with_cache_writeback() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let base = all(&lab, "base.img");
    lab.mount("d=base.img,overlay=ov --cache writeback");
    new_size_is_seen_under_writeback(&lab, "d=base.img,overlay=ov", &base);
}

#[test]
fn revert_and_reset_of_a_reflink_disk_restore_the_size_with_cache_writeback() {
    let mut lab = Lab::new();
    lab.host("host", "xfs", 400 * MIB);
    lab.base("host/base.img", 4 * MIB);
    let base = all(&lab, "host/base.img");
    let disk = "d=host/base.img,overlay=host/ov,reflink";
    lab.mount(&format!("{disk} --cache writeback"));
    new_size_is_seen_under_writeback(&lab, disk, &base);
}

#[test]
fn another_size_under_an_open_file_is_refused_with_cache_writeback() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount("d=base.img,overlay=ov --cache writeback");
    lab.ok("snapshot m/d full");
    lab.open("m/d").write_all_at(&noise(MIB, 1), 0).unwrap();
    lab.ok("snapshot m/d same");
    lab.sh("truncate -s 1M m/d");
    let file = lab.open_ro("m/d");
    for words in ["revert m/d full", "revert m/d full --force", "reset m/d"] {
        let line = lab.refused(1, words);
        assert!(line.contains("from 1 MiB to 4 MiB"), "{line}");
        assert!(line.contains("close it"), "{line}");
    }
    assert_eq!(file.metadata().unwrap().len(), MIB);
    drop(file);
    lab.ok("revert m/d full");
    let file = lab.open("m/d");
    // The size stays.
    lab.ok("revert m/d same --force");
    assert!(read(&file, 0, MIB) == noise(MIB, 1));
}

#[test]
fn holes_are_correct_right_after_revert_and_reset() {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=ov");
    let reader = lab.open_ro("m/d");
    lab.open("m/d").write_all_at(&noise(MIB, 1), MIB).unwrap();
    lab.ok("snapshot m/d a");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 4 * MIB).unwrap();
    fallocate(&lab.open("m/d"), PUNCH, MIB..2 * MIB).unwrap();
    let runs = || data_runs(&reader).into_iter().map(|run| (run.start / MIB, run.end / MIB));
    assert!(runs().eq([(4, 5)]));
    lab.ok("revert m/d a");
    assert_eq!(seek(&reader, SeekFrom::Hole(MIB)), Ok(2 * MIB));
    assert!(runs().eq([(1, 2)]));
    assert_eq!(fs::metadata(lab.path("m/d")).unwrap().blocks() * 512, MIB);
    lab.ok("reset m/d");
    assert_eq!(seek(&reader, SeekFrom::Data(0)), Err(libc::ENXIO));
    assert!(runs().eq([]));
    drop(reader);
}

#[test]
fn revert_discards_cached_newer_bytes() {
    let lab = lab();
    lab.ok("snapshot m/d a");
    let before = all(&lab, "m/d");
    lab.open("m/d").write_all_at(&noise(MIB, 4), 0).unwrap();
    assert!(all(&lab, "m/d") != before);
    lab.ok("revert m/d a");
    assert!(all(&lab, "m/d") == before);
}

#[test]
fn snapshot_keeps_mode_and_mtime_of_the_disk() {
    let lab = lab();
    lab.sh("chmod 640 m/d; touch -d '2001-02-03 04:05:06 UTC' m/d");
    let before = lab.sh("stat -c '%a %Y' m/d");
    assert_eq!(before, "640 981173106\n");
    lab.ok("snapshot m/d a");
    assert_eq!(lab.sh("stat -c '%a %Y' m/d"), before);
    assert_eq!(lab.sh(&format!("stat -c '%a %Y' {}", shot("d", "a"))), "440 981173106\n");
    lab.umount();
    lab.mount("d=base.img,overlay=ov");
    assert_eq!(lab.sh("stat -c '%a %Y' m/d"), before);
}

#[test]
fn layers_that_have_no_room_to_be_merged_wait_without_growing() {
    let lab = Lab::new();
    lab.host("host", "ext4", 80 * MIB);
    lab.sh("truncate -s 80M base.img; head -c 30M /dev/urandom >host/ballast; sync host/ballast");
    lab.mount("d=base.img,overlay=host/ov");
    let file = lab.open("m/d");
    file.write_all_at(&noise(30 * MIB, 1), 0).unwrap();
    file.sync_all().unwrap();
    // Every send seals the changes, which are to be merged when it ends.
    lab.sh(&format!("{COWSLIP} send m/d >sent"));
    file.write_all_at(&noise(64 * KIB, 2), 4 * MIB).unwrap();
    file.sync_all().unwrap();
    lab.sh(&format!("{COWSLIP} send m/d >sent"));
    let held = layers(&lab, "host/ov");
    assert!(held > 1, "{held}");
    let free = || lab.sh("df --output=avail host | tail -1").trim().parse::<u64>().unwrap();
    let before = free();
    wait_until("the lack of space is told", || !lab.disk("d")["warning"].is_null());
    for round in 0..8 {
        file.write_all_at(&noise(4096, round), (20 + round) * MIB).unwrap();
        // The merge is tried again at once, since the commit wants it.
        let line = lab.refused(1, "commit m/d");
        assert!(line.contains("are not merged for lack of space"), "{line}");
    }
    assert!(layers(&lab, "host/ov") <= held, "{} layers, {held} before", layers(&lab, "host/ov"));
    assert!(free() + 2048 > before, "{} of {before} KiB are free", free());
    let warning = lab.disk("d")["warning"].to_string();
    assert!(warning.contains("the merging of layers failed"), "{warning}");
    // With room the merge is done, and the commit after it.
    let image = all(&lab, "m/d");
    lab.sh("rm host/ballast");
    drop(file);
    lab.ok("commit m/d");
    assert_eq!(layers(&lab, "host/ov"), 1);
    assert!(all(&lab, "base.img") == image);
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn deleting_a_snapshot_changes_no_byte_and_removes_its_layer() {
    let lab = lab();
    let file = lab.open("m/d");
    let mut models = Vec::new();
    for layer in 0..5u64 {
        file.write_all_at(&noise(MIB, layer + 1), layer * MIB).unwrap();
        fallocate(&file, PUNCH, (layer + 8) * MIB + 100..(layer + 9) * MIB).unwrap();
        lab.ok(&format!("snapshot m/d s{layer}"));
        models.push(read(&file, 0, 16 * MIB));
    }
    drop(file);
    let reader = lab.open_ro(&shot("d", "s2"));
    for gone in [2, 0, 4] {
        lab.ok(&format!("snapshot m/d --delete s{gone}"));
    }
    wait_for_layers(&lab, "ov", 3);
    // An open handle can still read the deleted snapshot; its name no longer exists.
    assert!(read(&reader, 0, 16 * MIB) == models[2]);
    assert!(!lab.path(&shot("d", "s2")).exists());
    drop(reader);
    for _ in 0..2 {
        for kept in [1, 3] {
            assert!(all(&lab, &shot("d", &format!("s{kept}"))) == models[kept], "s{kept}");
        }
        assert!(all(&lab, "m/d") == models[4]);
        lab.umount();
        lab.mount("d=base.img,overlay=ov");
    }
    assert_eq!(layers(&lab, "ov"), 3);
    lab.umount();
    assert!(lab.ok("check ov").contains("clean"));
}

#[test]
fn writes_continue_while_layers_are_merged() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(&noise(8 * MIB, 1), 0).unwrap();
    lab.ok("snapshot m/d a");
    file.write_all_at(&noise(8 * MIB, 2), 4 * MIB).unwrap();
    let mut expected = read(&file, 0, 16 * MIB);
    lab.ok("snapshot m/d --delete a");
    for step in 0..200u64 {
        let (bytes, at) = (noise(3000, step + 9), step * 70_001 % (15 * MIB));
        file.write_all_at(&bytes, at).unwrap();
        expected[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
    }
    wait_for_layers(&lab, "ov", 1);
    assert!(read(&file, 0, 16 * MIB) == expected);
    drop(file);
    lab.umount();
    lab.mount("d=base.img,overlay=ov");
    assert!(all(&lab, "m/d") == expected);
}

#[test]
fn deleting_a_snapshot_keeps_the_clones_that_need_it() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("--store st d=base.img,overlay=st");
    lab.open("m/d").write_all_at(&noise(MIB, 1), 9 * MIB).unwrap();
    lab.ok("snapshot m/d a");
    lab.ok("clone m/d e");
    let before = all(&lab, "m/d");
    assert!(all(&lab, "m/e") == before);
    lab.open("m/d").write_all_at(&noise(MIB, 2), 9 * MIB).unwrap();
    lab.ok("snapshot m/d --delete a");
    lab.ok("reset m/d");
    assert!(all(&lab, "m/e") == before);
    lab.sh("rm m/d");
    assert!(all(&lab, "m/e") == before);
    lab.umount();
    lab.mount("--store st");
    assert!(all(&lab, "m/e") == before);
    lab.sh("rm m/e");
    lab.umount();
    lab.mount("--store st");
    assert_eq!(layers(&lab, "st"), 0);
}

#[test]
fn clone_and_origin_are_independent() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("truncate -s 8M m/d");
    lab.open("m/d").write_all_at(&noise(MIB, 1), MIB).unwrap();
    lab.ok("clone m/d e");
    lab.open("m/e").write_all_at(&noise(100, 2), MIB).unwrap();
    lab.open("m/d").write_all_at(&noise(100, 3), MIB + 50_000).unwrap();
    let (d, e) = (all(&lab, "m/d"), all(&lab, "m/e"));
    assert!(d[MIB as usize..][..100] == noise(MIB, 1)[..100]);
    assert!(e[MIB as usize..][..100] == noise(100, 2));
    assert!(e[MIB as usize + 50_000..][..100] == noise(MIB, 1)[50_000..][..100]);
    assert_eq!(lab.ok("snapshot m/e --list").lines().count(), 1, "a clone has no snapshots");
    lab.ok("clone m/e f");
    lab.kill();
    lab.mount("--store st");
    assert!(all(&lab, "m/d") == d && all(&lab, "m/e") == e && all(&lab, "m/f") == e);
}

/// Creates a store with the disks `golden` and `vm`, for tests of renames: a name that the kernel
/// has cached must not lead a command to the disk that had the name before.
fn golden_and_vm() -> Lab {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo golden >m/golden; echo changed >m/vm");
    lab
}

#[test]
fn command_after_a_rename_changes_the_disk_that_has_the_name_now() {
    let lab = golden_and_vm();
    for round in 0..4 {
        // The snapshot makes the kernel look up the control files of 'vm'.
        lab.ok(&format!("snapshot m/vm before{round}"));
        lab.sh("mv m/vm m/vm.old; $COWSLIP clone m/golden m/vm");
        assert_eq!(lab.ok("snapshot m/vm --list").lines().count(), 1, "a clone has no snapshots");
        let reset = lab.sh("$COWSLIP reset m/vm; cat m/vm.old m/vm");
        assert_eq!(reset, "vm: is identical to its base\nchanged\n", "round {round}");
        lab.sh("rm m/vm; mv m/vm.old m/vm");
        assert_eq!(lab.sh("$COWSLIP send m/vm --frames raw | cat"), "changed\n");
        assert_eq!(lab.disk("vm")["inode"], lab.path("m/vm").metadata().unwrap().ino());
    }
}

#[test]
fn command_after_a_rename_reads_the_disk_that_has_the_name_now() {
    let lab = golden_and_vm();
    let vm = lab.sh("stat -c %i m/vm");
    for _ in 0..4 {
        lab.sh("$COWSLIP map m/vm >/dev/null; $COWSLIP snapshot m/vm --list >/dev/null");
        lab.sh("mv m/vm m/vm.old; mv m/golden m/vm");
        assert_eq!(lab.sh("$COWSLIP send m/vm --frames raw | cat"), "golden\n");
        lab.sh(
            "$COWSLIP diff m/vm --full -O qcow2 -o d.q; qemu-img convert -O raw d.q d.raw; rm d.q",
        );
        assert_eq!(lab.sh("head -c 7 d.raw; rm d.raw"), "golden\n");
        assert_eq!(
            lab.sh("$COWSLIP clone m/vm m/copy >/dev/null; cat m/copy; rm m/copy"),
            "golden\n"
        );
        let known =
            |name: &str| lab.sh(&format!("grep -o '\"inode\":[0-9]*' m/.cowslip/{name}/status"));
        assert_eq!(known("vm.old").trim().strip_prefix("\"inode\":"), Some(vm.trim()));
        assert!(known("vm") != known("vm.old"));
        lab.sh("mv m/vm m/golden; mv m/vm.old m/vm");
        // A name can be reused as soon as it is free.
        lab.sh("$COWSLIP snapshot m/vm x; cp m/golden m/ci; $COWSLIP snapshot m/ci a; rm m/ci");
        lab.sh("$COWSLIP clone m/golden m/ci; $COWSLIP snapshot m/ci b; rm m/ci");
        lab.sh("$COWSLIP snapshot m/vm --delete x; ! test -e m/.cowslip/vm/snapshots/x");
    }
}

#[test]
fn request_for_another_inode_is_rejected_as_stale() {
    let lab = golden_and_vm();
    lab.sh("$COWSLIP clone m/vm m/other; $COWSLIP add m g=blank:1M");
    let inode = |name: &str| lab.path(name).metadata().unwrap().ino();
    let ask = |ctl: &str, request: &str| {
        let mut file = lab.open(&format!("m/.cowslip/{ctl}"));
        file.write_all(request.as_bytes()).unwrap();
        let mut said = String::new();
        file.read_to_string(&mut said).unwrap();
        said
    };
    let requests = [
        r#""op":"reset""#,
        r#""op":"revert","name":"s""#,
        r#""op":"snapshot","name":"t""#,
        r#""op":"unsnapshot","name":"s""#,
        r#""op":"clone","name":"c""#,
        r#""op":"commit""#,
        r#""op":"keep","dir":"/nowhere""#,
        r#""op":"difference""#,
        r#""op":"hydrate""#,
        r#""op":"prefetch","start":0,"end":1"#,
        r#""op":"snapshots""#,
        r#""op":"finish""#,
        r#""op":"abort""#,
    ];
    lab.ok("snapshot m/vm s");
    for request in requests {
        let said = ask("vm/ctl", &format!("{{{request},\"inode\":{}}}", inode("m/other")));
        assert!(said.contains("\"stale\":true") && said.contains("nothing is done"), "{said}");
    }
    let remove = |inode: u64| format!(r#"{{"op":"remove","name":"g","inode":{inode}}}"#);
    let said = ask("ctl", &remove(inode("m/vm")));
    assert!(said.contains("\"stale\":true"), "{said}");
    assert_eq!(
        lab.sh("cat m/vm; ls m/.cowslip/vm/snapshots; ls m"),
        "changed\ns\ng\ngolden\nother\nvm\n"
    );
    // A request with this disk's inode, and one without an inode.
    let said =
        ask("vm/ctl", &format!(r#"{{"op":"snapshot","name":"t","inode":{}}}"#, inode("m/vm")));
    assert!(said.contains("'t' taken"), "{said}");
    let said = ask("vm/ctl", r#"{"op":"reset"}"#);
    assert!(said.contains("is identical to its base"), "{said}");
    let said = ask("ctl", &remove(inode("m/g")));
    assert!(said.contains("\"ok\""), "{said}");
    assert_eq!(lab.sh("cat m/vm; ls m"), "golden\nother\nvm\n");
}

#[test]
fn command_never_acts_on_a_disk_renamed_into_its_target() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo mine >m/vm; echo others >m/other; touch bound; mount --bind m/vm bound");
    let over = AtomicBool::new(false);
    let (mut done, mut refused) = (0, 0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                for (from, to) in [("vm", "x"), ("other", "vm"), ("x", "other")] {
                    fs::rename(lab.path("m").join(from), lab.path("m").join(to)).unwrap();
                }
                // Long enough under each name for a command to succeed.
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let _end = Ends(&over);
        for round in 0..60 {
            let words = ["reset bound --force", "snapshot bound", "clone bound c"][round % 3];
            let output = lab.cowslip(words);
            match output.status.success() {
                true => done += 1,
                false => {
                    let line = one_line(1, &output, words);
                    let known = ["renamed, removed or replaced", "there is no disk '"];
                    assert!(known.iter().any(|known| line.contains(known)), "{line}");
                    refused += 1;
                }
            }
            if fs::exists(lab.path("m/c")).unwrap() {
                assert!(lab.sh("cat m/c; rm m/c") != "others\n", "a clone of the other one");
            }
        }
    });
    // The reset applied to the bind-mounted disk, whatever its name was at that time.
    assert_eq!(lab.sh("cat bound; umount bound; cat m/vm m/other"), "others\n");
    assert!(done > 0, "{refused} were refused and none came through");
}

#[test]
fn clone_of_an_unsuitable_disk_is_rejected_with_a_remedy() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("t=base.img");
    assert!(lab.refused(1, "clone m/t u").contains("--store"));
    lab.umount();
    lab.mount("--store st t=base.img o=base.img,overlay=ov r=base.img,mode=ro");
    lab.sh("echo x > m/d");
    for (words, says) in [
        ("clone m/t u", "cowslip keep"),
        ("clone m/o u", "outside the store"),
        ("clone m/r u", "no overlay"),
        ("clone m/d o", "already"),
        ("clone m/d .cowslip", "name"),
        ("clone m/d st/u", "beside"),
        ("clone m/d m", "is the mountpoint"),
    ] {
        let line = lab.refused(1, words);
        assert!(line.contains(says), "{words}: {line}");
    }
    assert_eq!(lab.sh("ls m"), "d\no\nr\nt\n");
}

#[test]
fn thousand_clones_keep_their_own_bytes_across_a_remount() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    // On tmpfs: thousands of syncs would wait for a device that other tests keep busy.
    lab.sh("mkdir fast; mount -t tmpfs none fast");
    lab.mount("--store fast/st d=base.img,overlay=fast/st");
    lab.open("m/d").write_all_at(b"common", 5000).unwrap();
    let common = all(&lab, "m/d");
    let ask = |name: &str| {
        // The control file that the command itself uses: starting a thousand processes would be
        // slow.
        let control = lab.open("m/.cowslip/d/ctl");
        let request = format!("{{\"op\":\"clone\",\"name\":\"{name}\"}}\n");
        control.write_all_at(request.as_bytes(), 0).unwrap();
        let mut answer = [0; 4096];
        let len = control.read_at(&mut answer, 0).unwrap();
        let answer = String::from_utf8_lossy(&answer[..len]).into_owned();
        assert!(answer.contains("\"ok\""), "{name}: {answer}");
    };
    for number in 0..1000u64 {
        let name = format!("c{number}");
        ask(&name);
        lab.open(&format!("m/{name}")).write_all_at(&number.to_le_bytes(), number * 8).unwrap();
    }
    let check = || {
        for number in 0..1000usize {
            let mut expected = common.clone();
            expected[number * 8..number * 8 + 8].copy_from_slice(&(number as u64).to_le_bytes());
            assert!(all(&lab, &format!("m/c{number}")) == expected, "clone {number}");
        }
        assert!(all(&lab, "m/d") == common);
    };
    check();
    // The frozen layer, a top layer for each clone, and the top layer of `d`.
    assert_eq!(layers(&lab, "fast/st"), 1002);
    lab.umount();
    lab.mount("--store fast/st d=base.img,overlay=fast/st");
    check();
    lab.umount();
    lab.sh("umount fast");
}

#[test]
fn sync_makes_the_snapshots_of_a_disk_durable() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    // Counts the layers that `check` reports as not closed.
    let open = |lab: &Lab| lab.ok("check ov").matches("needs recovery").count();
    lab.mount("d=base.img,overlay=ov");
    for name in ["a", "b"] {
        lab.open("m/d").write_all_at(&noise(MIB, 1), 0).unwrap();
        lab.ok(&format!("snapshot m/d {name}"));
        lab.ok("reset m/d");
    }
    lab.sh("sync m/d");
    // The sync alone must suffice, without the end of the mount.
    lab.kill();
    let said = lab.ok("check ov");
    for name in ["a", "b"] {
        let row = said.lines().find(|line| line.starts_with(&format!("{name} "))).unwrap();
        assert!(row.ends_with("clean"), "{said}");
    }
    lab.mount("d=base.img,overlay=ov");
    lab.umount();
    assert_eq!(open(&lab), 0);
    // The same after a kill of the daemon.
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 0).unwrap();
    lab.ok("snapshot m/d c");
    lab.ok("revert m/d a");
    lab.kill();
    assert!(open(&lab) > 0);
    lab.mount("d=base.img,overlay=ov");
    lab.umount();
    assert_eq!(open(&lab), 0);
    // The same for a temporary disk that is kept.
    lab.mount("d=base.img");
    lab.open("m/d").write_all_at(&noise(MIB, 3), 0).unwrap();
    lab.ok("snapshot m/d a");
    lab.ok("reset m/d");
    lab.ok("keep m/d kept");
    lab.umount();
    assert!(!lab.ok("check kept").contains("needs recovery"));
}

#[test]
fn keep_keeps_all_snapshots_of_a_temporary_disk() {
    for dir in ["kept", "host/kept"] {
        let mut lab = Lab::new();
        lab.base("base.img", 16 * MIB);
        // For another file system the data has to be copied.
        lab.host("host", "ext4", 128 * MIB);
        lab.mount("d=base.img");
        let file = lab.open("m/d");
        let mut models = Vec::new();
        for layer in 0..4u64 {
            file.write_all_at(&noise(MIB, layer + 1), layer * 3 * MIB + 77).unwrap();
            lab.ok(&format!("snapshot m/d s{layer}"));
            models.push(read(&file, 0, 16 * MIB));
            if layer == 2 {
                // The next snapshot is based on `s0`.
                drop(lab.ok("revert m/d s0 --force"));
            }
        }
        file.write_all_at(&noise(5000, 9), 5 * MIB).unwrap();
        let now = read(&file, 0, 16 * MIB);
        drop(file);
        lab.ok(&format!("keep m/d {dir}"));
        for _ in 0..2 {
            assert!(all(&lab, "m/d") == now);
            for (layer, model) in models.iter().enumerate() {
                assert!(all(&lab, &shot("d", &format!("s{layer}"))) == *model, "s{layer} in {dir}");
            }
            lab.kill();
            lab.mount(&format!("d=base.img,overlay={dir}"));
        }
        lab.ok("revert m/d s2");
        assert!(all(&lab, "m/d") == models[2]);
        lab.umount();
        lab.sh("umount host");
    }
}

#[test]
fn umount_does_not_wait_for_a_merge() {
    let lab = Lab::new();
    lab.mount("d=blank:1G,overlay=ov");
    lab.sh("head -c 64M /dev/urandom | dd of=m/d bs=1M conv=notrunc status=none");
    lab.ok("snapshot m/d a");
    lab.sh("head -c 64M /dev/urandom | dd of=m/d bs=1M seek=32 conv=notrunc status=none");
    let crc = checksum(&lab.path("m/d"));
    lab.ok("snapshot m/d --delete a");
    lab.umount();
    lab.mount("d=blank:1G,overlay=ov");
    assert_eq!(checksum(&lab.path("m/d")), crc);
    // The interrupted merge is completed now.
    wait_for_layers(&lab, "ov", 1);
    assert_eq!(checksum(&lab.path("m/d")), crc);
}

#[test]
fn command_without_a_free_descriptor_fails_alone() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    for files in 36..44 {
        let limit = format!("--nofile={files}");
        let words = ["mount", "m", "x=base.img,overlay=cow"];
        let words: Vec<&str> = [&*limit, COWSLIP].into_iter().chain(words).collect();
        if !lab.output("prlimit", &words).status.success() {
            continue;
        }
        let ok = |words: &str| lab.cowslip(words).status.success();
        while ok(&format!("snapshot m/x s{}", lab.sh("ls m/.cowslip/x/snapshots | wc -l").trim())) {
        }
        lab.sh("head -c 40K /dev/urandom | dd of=m/x bs=4k conv=notrunc status=none");
        while ok(&format!("add m q{}=base.img", lab.sh("ls m | wc -l").trim())) {}
        let _ = lab.cowslip("snapshot m/x --delete s1");
        lab.sh("head -c 4K /dev/urandom | dd of=m/x bs=4k conv=notrunc status=none");
        assert!(!lab.log().contains("read-only"), "{files}: {}", lab.log());
        lab.umount();
        assert!(lab.ok("check cow").contains("clean"), "{files}");
        lab.sh("rm -r cow");
    }
}
