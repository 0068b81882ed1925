//! Killed daemons, power cuts and failing syncs: on a real mount, over real file systems.
//!
//! A power cut is simulated by shutting down the file system of the overlay without a flush of its
//! log: whatever is not durable by then is lost.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::thread;

use crate::common::mount::*;
use crate::common::written;

const SECTOR: u64 = 512;

/// Shuts down the file system of `dir` without flushing its log.
fn cut_power(lab: &Lab, dir: &str) {
    /// EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, which are the same request: `_IOR('X', 125,
    /// __u32)`.
    const SHUTDOWN: libc::c_ulong = 0x8004_587d;
    // Do not flush the log.
    let mut flag: u32 = 2;
    let dir = File::open(lab.path(dir)).unwrap();
    // SAFETY: the request reads one u32, which outlives the call.
    let done = unsafe { libc::ioctl(dir.as_raw_fd(), SHUTDOWN as _, &raw mut flag) };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn killed_daemon_loses_no_completed_write() {
    let mut lab = Lab::new();
    lab.base("base.img", 32 * MIB);
    for round in 0..4u64 {
        lab.mount("d=base.img,overlay=ov e=blank:32M,overlay=ow");
        let pid = lab.pid();
        // The completed writes (disk, offset, seed), and the last write that each writer began.
        let told = Mutex::new(Vec::new());
        let begun = Mutex::new([(0, u64::MAX); 4]);
        let files = [lab.open("m/d"), lab.open("m/e")];
        thread::scope(|scope| {
            for writer in 0..4u64 {
                let (told, begun) = (&told, &begun);
                let disk = writer % 2;
                let file = &files[disk as usize];
                scope.spawn(move || {
                    for step in 0.. {
                        // Each writer has its own 64 KiB of every 256 KiB, so that none overwrites
                        // another.
                        let slot = (step * 7 + round) % 128 * 4 + writer;
                        let offset = slot * 64 * KIB + step * 100 % 50_000;
                        let seed = round << 32 | writer << 24 | step;
                        begun.lock().unwrap()[writer as usize] = (disk, offset);
                        if file.write_all_at(&noise(3000, seed), offset).is_err() {
                            return;
                        }
                        told.lock().unwrap().push((disk, offset, seed));
                    }
                });
            }
            let enough = 300 + round * 500;
            wait_until("there are writes", || told.lock().unwrap().len() as u64 > enough);
            signal(pid, rustix::process::Signal::KILL).unwrap();
        });
        drop(files);
        let said = lab.mount("d=base.img,overlay=ov e=blank:32M,overlay=ow");
        assert!(said.contains("cleared a dead mount"), "{said}");
        assert_eq!(lab.disk("d")["overlay"]["recovered"], "all");
        let (d, e) = (lab.open_ro("m/d"), lab.open_ro("m/e"));
        let (told, begun) = (told.into_inner().unwrap(), begun.into_inner().unwrap());
        for (index, (disk, offset, seed)) in told.iter().enumerate() {
            let covers = |other: u64, at: u64| other == *disk && at.abs_diff(*offset) < 3000;
            let is_told_later = told[index + 1..].iter().any(|later| covers(later.0, later.1));
            let is_cut_off = begun.iter().any(|last| last.1 != *offset && covers(last.0, last.1));
            if !is_told_later && !is_cut_off {
                let found = read(if *disk == 0 { &d } else { &e }, *offset, 3000);
                assert!(found == noise(3000, *seed), "disk {disk}: {offset} is lost");
            }
        }
        drop((d, e));
        lab.umount();
        assert!(lab.ok("check ov").contains("clean"));
    }
}

#[test]
fn umount_clears_a_dead_mount_and_nothing_is_lost() {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=ov");
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 1), 4097).unwrap();
    fallocate(&file, PUNCH, 8192..20_000).unwrap();
    file.set_len(7 * MIB).unwrap();
    let before = read(&file, 0, 7 * MIB);
    lab.kill();
    drop(file);
    assert!(lab.ok("umount m").contains("dead mount is cleared"));
    lab.mount("d=blank:8M,overlay=ov");
    let file = lab.open_ro("m/d");
    assert_eq!(file.metadata().unwrap().len(), 7 * MIB);
    assert!(read(&file, 0, 7 * MIB) == before);
    drop(file);
}

/// Writes and syncs data, writes more, cuts the power, and checks what is found.
fn a_power_cut_on(fs: &str, key: &str) {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    let device = lab.host("host", fs, 320 * MIB);
    let words = &format!("d=base.img,overlay=host/ov{key} e=blank:16M,overlay=host/ow{key}");
    lab.mount(words);
    // For each sector, its possible contents.
    let mut legal: Vec<Vec<Vec<u8>>> = Vec::new();
    let (d, e) = (lab.open("m/d"), lab.open("m/e"));
    for round in 0..3u64 {
        for index in 0..40u64 {
            let at = index * 300 * KIB + round * 1500;
            d.write_all_at(&noise(10_000, round * 1000 + index), at).unwrap();
        }
        fallocate(&d, PUNCH, (round + 1) * MIB..(round + 1) * MIB + 70_000).unwrap();
        d.sync_all().unwrap();
    }
    e.write_all_at(&noise(MIB, 9), 100).unwrap();
    e.sync_data().unwrap();
    for index in 0..150u64 {
        // Every third write goes to blocks that an earlier one has written.
        let at = 2 * MIB + (index - index % 3 * (index % 2)) * 5000;
        e.write_all_at(&noise(600, index), at).unwrap();
        e.sync_data().unwrap();
    }
    let journal = fs::metadata(layer_dir(&lab.path("host/ow")).join("journal"));
    assert_eq!(journal.is_ok_and(|found| found.len() > 0), key.is_empty(), "small syncs");
    let synced = read(&d, 0, 16 * MIB);
    let blank = read(&e, 0, 16 * MIB);
    let note = |legal: &mut Vec<Vec<Vec<u8>>>| {
        let now = read(&d, 0, 16 * MIB);
        for (sector, bytes) in now.chunks(SECTOR as usize).enumerate() {
            if legal.len() <= sector {
                legal.push(Vec::new());
            }
            if legal[sector].last().is_none_or(|last| last != bytes) {
                legal[sector].push(bytes.to_vec());
            }
        }
    };
    note(&mut legal);
    for round in 0..3u64 {
        for index in 0..30u64 {
            let at = index * 500 * KIB + round * 2000;
            d.write_all_at(&noise(9000, 50_000 + round * 1000 + index), at).unwrap();
        }
        fallocate(&d, ZERO, (round + 5) * MIB + 5..(round + 5) * MIB + 50_000).unwrap();
        fallocate(&d, PUNCH, (round + 9) * MIB..(round + 9) * MIB + 50_000).unwrap();
        note(&mut legal);
    }
    cut_power(&lab, "host");
    // None of these syncs may report success.
    assert_eq!(errno_of(d.sync_all()), libc::EIO);
    assert_eq!(errno_of(d.sync_all()), libc::EIO);
    lab.kill();
    drop((d, e));
    lab.ok("umount m");
    lab.sh(&format!("umount host; mount {device} host"));
    lab.mount(words);
    assert_eq!(lab.disk("d")["overlay"]["recovered"], "vouched");
    let found = read(&lab.open_ro("m/d"), 0, 16 * MIB);
    for (sector, bytes) in found.chunks(SECTOR as usize).enumerate() {
        let is_synced = bytes == &synced[sector * 512..][..512];
        assert!(
            is_synced || legal[sector].iter().any(|old| old == bytes),
            "sector {sector} is neither old nor new"
        );
    }
    assert!(read(&lab.open_ro("m/e"), 0, 16 * MIB) == blank);
    // The disk can be used again.
    let d = lab.open("m/d");
    d.write_all_at(b"on", 5).unwrap();
    d.sync_all().unwrap();
    drop(d);
    lab.umount();
    assert!(lab.ok("check host/ov").contains("clean"));
    lab.sh("umount host");
}

#[test]
fn power_cut_on_ext4_keeps_synced_data() {
    a_power_cut_on("ext4", "");
}

#[test]
fn power_cut_on_ext4_keeps_synced_data_of_a_direct_disk() {
    a_power_cut_on("ext4", ",direct");
}

#[test]
fn power_cut_on_xfs_keeps_synced_data() {
    a_power_cut_on("xfs", "");
}

#[test]
fn power_cut_on_xfs_keeps_synced_data_of_a_direct_disk() {
    a_power_cut_on("xfs", ",direct");
}

#[test]
fn store_survives_a_power_cut() {
    let lab = Lab::new();
    let device = lab.host("host", "ext4", 128 * MIB);
    lab.mount("--store host/st");
    lab.sh(
        "echo one > m/a; sync m/a; echo two > m/b; sync m/b; mv m/a m/c; rm m/b; echo x > m/late",
    );
    cut_power(&lab, "host");
    lab.kill();
    lab.ok("umount m");
    lab.sh(&format!("umount host; mount {device} host"));
    lab.mount("--store host/st");
    // Names are durable when the call returns; the bytes of `late` were not synced.
    assert_eq!(lab.sh("ls m"), "c\nlate\n");
    assert_eq!(lab.sh("cat m/c"), "one\n");
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn failed_sync_latches_its_disk_and_no_other() {
    let lab = Lab::new();
    let device = lab.host("host", "ext4", 128 * MIB);
    lab.mount("d=blank:16M,overlay=host/ov e=blank:16M,overlay=ow");
    let (d, e) = (lab.open("m/d"), lab.open("m/e"));
    d.write_all_at(&noise(MIB, 1), 0).unwrap();
    d.sync_all().unwrap();
    d.write_all_at(&noise(MIB, 2), 2 * MIB).unwrap();
    cut_power(&lab, "host");
    assert_eq!(errno_of(d.sync_all()), libc::EIO);
    assert_eq!(errno_of(d.write_all_at(b"x", 0)), libc::EIO);
    assert_eq!(errno_of(d.sync_data()), libc::EIO);
    let status = lab.cowslip("status m --json");
    assert_eq!(status.status.code(), Some(3), "{}", show(&status));
    let text = String::from_utf8_lossy(&status.stdout).into_owned();
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let state = |index: usize| all["mounts"][0]["disks"][index]["state"].clone();
    assert_eq!((state(0), state(1)), ("read-only".into(), "ok".into()));
    e.write_all_at(&noise(MIB, 3), 0).unwrap();
    e.sync_all().unwrap();
    drop((d, e));
    // The failure is reported, also by the exit code.
    let output = lab.cowslip("umount m");
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    assert!(String::from_utf8_lossy(&output.stderr).contains("d: "), "{}", show(&output));
    lab.sh(&format!("umount host; mount {device} host"));
    lab.mount("d=blank:16M,overlay=host/ov e=blank:16M,overlay=ow");
    assert!(read(&lab.open_ro("m/d"), 0, MIB) == noise(MIB, 1));
    assert!(read(&lab.open_ro("m/e"), 0, MIB) == noise(MIB, 3));
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn log_of_an_overlay_does_not_grow_by_mounts() {
    let lab = Lab::new();
    let mut most = 0;
    for round in 0..300 {
        lab.mount("d=blank:8M,overlay=ov");
        if round == 0 {
            lab.open("m/d").write_all_at(b"kept", 4096).unwrap();
        }
        lab.umount();
        let log = layer_dir(&lab.path("ov")).join("log");
        most = most.max(fs::metadata(log).unwrap().len());
    }
    // Two records per mount would make 19 KiB.
    assert!(most < 9 << 10, "{most} bytes");
    lab.mount("d=blank:8M,overlay=ov");
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 4), b"kept");
}

#[test]
fn torn_end_of_the_log_gives_the_older_state() {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=ov");
    let file = lab.open("m/d");
    file.write_all_at(b"first", 0).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(b"second", 8192).unwrap();
    lab.kill();
    drop(file);
    lab.ok("umount m");
    let log = layer_dir(&lab.path("ov")).join("log");
    let bytes = fs::read(&log).unwrap();
    fs::write(&log, &bytes[..written(&bytes) - 7]).unwrap();
    lab.mount("d=blank:8M,overlay=ov");
    let file = lab.open_ro("m/d");
    assert_eq!(read(&file, 0, 5), b"first");
    assert_eq!(read(&file, 8192, 6), [0; 6]);
    drop(file);
}

/// Returns a checksum of every file of the mount.
fn sums(lab: &Lab) -> String {
    lab.sh("cd m; sha256sum *")
}

/// Checks that the store at `t/st`, killed on a host without space, can be mounted, read and repaired,
/// and that its disks still hold `before`.
#[track_caller]
fn is_usable_without_space(lab: &Lab, before: &str) {
    for options in ["-o ro", "", ""] {
        lab.ok("umount m");
        let said = lab.ok("check t/st");
        assert!(said.contains("nothing is lost"), "{said}");
        lab.mount(&format!("--store t/st {options}"));
        assert_eq!(sums(lab), before, "{options}");
        lab.kill();
    }
    lab.ok("umount m");
    lab.ok("check t/st --repair");
    let said = lab.ok("check t/st");
    assert!(
        said.lines().all(|line| !line.starts_with("state") || line.ends_with("clean")),
        "{said}"
    );
    lab.mount("--store t/st");
    assert_eq!(sums(lab), before);
    // What is removed makes room, once the host has freed it.
    lab.sh("rm m/a*
        for turn in $(seq 100); do
            head -c 1M /dev/zero | tr '\\0' x >m/b 2>/dev/null && break
            sleep .1
        done
        sync m/b
        test $(stat -c %s m/b) = 1048576
        rm m/b");
    lab.umount();
}

/// Fills the file system `t` through a disk of a store there, and kills the daemon.
fn fill_and_kill(lab: &Lab) -> String {
    lab.mount("--store t/st");
    lab.sh("exec 2>/dev/null
        dd if=/dev/urandom of=m/a bs=4k || :
        dd if=/dev/urandom of=m/a bs=512 seek=190000 count=2000 conv=notrunc || :
        sync -f m || :");
    let before = sums(lab);
    lab.kill();
    before
}

#[test]
fn killed_store_that_fills_its_host_is_usable() {
    for (fs, size) in [("tmpfs", 40 * MIB), ("ext4 -m0", 64 * MIB), ("xfs", 320 * MIB)] {
        let lab = Lab::new();
        if fs == "tmpfs" {
            lab.sh(&format!("mkdir t; mount -t tmpfs -o size={size},mode=755 t t"));
        } else {
            lab.host("t", fs, size);
        }
        let before = fill_and_kill(&lab);
        is_usable_without_space(&lab, &before);
        lab.sh("umount t");
    }
}

#[test]
fn killed_store_that_has_used_the_inodes_of_its_host_is_usable() {
    let lab = Lab::new();
    lab.host("t", "ext4 -m0 -N 64", 64 * MIB);
    lab.mount("--store t/st");
    lab.sh("for k in $(seq 40); do echo $k >m/a$k || break; done 2>/dev/null");
    lab.sh("while touch t/fill$((k=${k:-0}+1)); do :; done 2>/dev/null");
    let before = sums(&lab);
    lab.kill();
    is_usable_without_space(&lab, &before);
    lab.sh("umount t");
}

#[test]
fn power_cut_on_a_host_without_space_keeps_synced_data() {
    for fill in ["head -c 1G /dev/zero >t/fill", "while touch t/fill$((k=${k:-0}+1)); do :; done"] {
        let lab = Lab::new();
        let device = lab.host("t", "ext4 -m0 -N 64", 64 * MIB);
        lab.mount("d=blank:8M,overlay=t/ov");
        let file = lab.open("m/d");
        file.write_all_at(&noise(MIB, 1), 0).unwrap();
        file.sync_all().unwrap();
        lab.sh(&format!("({fill}) 2>/dev/null || :; sync -f t"));
        file.write_all_at(&noise(MIB, 2), 0).unwrap();
        file.sync_all().unwrap();
        // Not synced; on a full host not even written.
        let _ = file.write_all_at(&noise(MIB, 3), 2 * MIB);
        cut_power(&lab, "t");
        lab.kill();
        drop(file);
        lab.ok("umount m");
        lab.sh(&format!("umount t; mount {device} t"));
        for options in ["-o ro", ""] {
            lab.mount(&format!("d=blank:8M,overlay=t/ov {options}"));
            assert!(read(&lab.open_ro("m/d"), 0, MIB) == noise(MIB, 2), "{fill}");
            lab.umount();
        }
        lab.sh("umount t");
    }
}

#[test]
fn closed_overlay_is_mounted_on_a_full_host() {
    let lab = Lab::new();
    lab.sh("mkdir t; mount -t tmpfs -o size=20m,mode=755 t t");
    lab.mount("d=blank:4M,overlay=t/ov");
    let file = lab.open("m/d");
    file.write_all_at(&noise(4 * MIB, 1), 0).unwrap();
    for turn in 0..200 {
        file.write_all_at(&noise(4096, turn), 4096).unwrap();
        fallocate(&file, PUNCH, 4096..8192).unwrap();
    }
    drop(file);
    lab.umount();
    lab.sh("head -c 1G /dev/zero >t/fill 2>/dev/null || :");
    for _ in 0..3 {
        lab.mount("d=blank:4M,overlay=t/ov");
        let file = lab.open("m/d");
        assert!(read(&file, 8192, 4096) == noise(4 * MIB, 1)[8192..12_288]);
        drop(file);
        lab.umount();
    }
    lab.mount("d=blank:4M,overlay=t/ov");
    let file = lab.open("m/d");
    fallocate(&file, PUNCH, 16_384..3 * MIB).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&noise(8192, 2), 16_384).unwrap();
    file.sync_all().unwrap();
    drop(file);
    lab.umount();
    lab.sh("umount t");
}

#[test]
fn append_that_a_file_size_limit_cuts_short_is_no_damage() {
    let lab = Lab::new();
    for limit in [199, 200, 208, 217] {
        lab.mount("d=blank:1M,overlay=ov");
        let file = lab.open("m/d");
        file.write_all_at(b"one", 0).unwrap();
        file.write_all_at(b"two", 8192).unwrap();
        file.write_all_at(b"three", 16_384).unwrap();
        file.sync_all().unwrap();
        lab.kill();
        drop(file);
        lab.ok("umount m");
        let limit = format!("--fsize={limit}:{limit}");
        let output = lab.output("prlimit", &[&limit, COWSLIP, "check", "ov", "--repair"]);
        assert_eq!(output.status.code(), Some(1), "{}", show(&output));
        let said = lab.ok("check ov");
        assert!(said.contains("nothing is lost") && !said.contains("unreadable"), "{said}");
        assert!(!lab.mount("d=blank:1M,overlay=ov").contains("damaged"));
        lab.umount();
        lab.sh("rm -r ov");
    }
}
