//! Reflink overlays on a real XFS: mounted disks with and without the kernel's passthrough; and the
//! library's snapshots, reverts and resets, including interrupted ones.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use crate::common::mount::*;
use crate::common::random::*;
use cowslip::config::OverlayKind;
use cowslip::identity::Identity;
use cowslip::layer::{Layer, WritableLayer};
use cowslip::overlay::FORMAT_VERSION;
use cowslip::overlay::error::OverlayError;
use cowslip::overlay::reflink::{
    self, OpenedReflink, Reflink, ReflinkError, RevertSource, SharedBase,
};
use cowslip::overlay::stack::{BaseRecord, Stack};
use rustix::process::Signal;

const SIZE: u64 = 4 * MIB;
const DISK: &str = "d=host/base.img,overlay=host/ov,reflink";

/// Creates a lab with a base on a file system of its own.
fn lab() -> Lab {
    lab_on("xfs")
}

fn lab_on(fs: &str) -> Lab {
    let mut lab = Lab::new();
    lab.host("host", fs, 400 * MIB);
    lab.base("host/base.img", SIZE);
    lab
}

#[test]
fn passthrough_disk_matches_the_model() {
    let lab = lab();
    model(&lab, "host/base.img", DISK);
    assert!(!lab.log().contains("without passthrough"), "{}", lab.log());
}

#[test]
fn reflink_overlay_on_a_read_only_file_system_can_be_read() {
    let lab = lab();
    lab.mount(DISK);
    lab.open("m/d").write_all_at(&noise(9000, 1), 5000).unwrap();
    lab.umount();
    lab.sh("mount -o remount,ro host");
    for options in ["-o ro", ""] {
        assert!(lab.mount(&format!("{DISK} {options}")).contains("read-only file system"));
        assert_eq!(read(&lab.open_ro("m/d"), 5000, 9000), noise(9000, 1));
        let error = OpenOptions::new().write(true).open(lab.path("m/d")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EROFS));
        lab.umount();
    }
    lab.sh("mount -o remount,rw host");
}

#[test]
fn reflink_disk_on_btrfs_matches_the_model() {
    let lab = lab_on("btrfs");
    lab.sh("sync -f host");
    model(&lab, "host/base.img", DISK);
    assert!(!lab.log().contains("without passthrough"), "{}", lab.log());
    lab.sh("rm -r host/ov");
    let layer = create(&lab).layer;
    put(&layer, &[1; 4096], 64 * KIB);
    assert_eq!(layer.changed().unwrap().ranges, [64 * KIB..68 * KIB]);
    layer.snapshot("one").unwrap();
    let was = bytes_of(&layer);
    layer.reset().unwrap();
    assert_eq!(layer.changed().unwrap().ranges, []);
    assert_eq!(bytes_of(&layer), whole(&lab, "host/base.img"));
    layer.revert("one").unwrap();
    assert_eq!(bytes_of(&layer), was);
    drop(layer);
}

#[test]
fn reflink_disk_without_passthrough_matches_the_model() {
    let lab = lab();
    model(&lab, "host/base.img", &format!("{DISK} --cache none"));
    model_again_with(&lab, "--cache writeback");
}

/// Runs random operations without kills: with `--cache writeback` a killed daemon loses the pages
/// that the kernel has not written yet.
fn model_again_with(lab: &Lab, options: &str) {
    fs::remove_dir_all(lab.path("host/ov")).unwrap();
    let mut model = whole(lab, "host/base.img");
    let mut dice = Dice(77);
    for _ in 0..3 {
        lab.mount(&format!("{DISK} {options}"));
        let file = lab.open("m/d");
        for _ in 0..60 {
            step(&mut dice, &file, &mut model);
        }
        check(&file, &model);
        drop(file);
        lab.umount();
    }
}

#[test]
fn disk_on_a_stacked_file_system_is_served_without_passthrough() {
    let mut lab = lab();
    lab.sh("cd host; mkdir l u w s; mount -t overlay o -o lowerdir=l,upperdir=u,workdir=w s");
    lab.base("host/s/base.img", SIZE);
    model(&lab, "host/s/base.img", "d=host/s/base.img,overlay=host/s/ov,reflink");
    assert!(lab.log().contains("served without passthrough"), "{}", lab.log());
}

#[test]
fn disk_is_served_without_passthrough_in_a_user_namespace() {
    let lab = lab();
    // Root of a user namespace may mount, but may not use passthrough.
    lab.sh("unshare -Urm sh -euc '
        $COWSLIP mount m d=host/base.img,overlay=host/ov,reflink --log log.txt
        printf served | dd of=m/d bs=6 seek=1000 conv=notrunc,fsync status=none
        cmp -n 6 -i 6000:0 m/d - <<X
served
X
        $COWSLIP umount m'");
    assert!(lab.log().contains("served without passthrough"), "{}", lab.log());
    let mut wanted = whole(&lab, "host/base.img");
    wanted[6000..6006].copy_from_slice(b"served");
    assert!(whole(&lab, "host/ov/data") == wanted);
}

/// Returns the result of `ask` for `file`, run while the daemon is stopped.
#[track_caller]
fn without_the_daemon(
    lab: &Lab,
    file: &File,
    ask: impl FnOnce(&File) -> Vec<u8> + Send + 'static,
) -> Vec<u8> {
    let (pid, again) = (lab.pid(), file.try_clone().unwrap());
    let (tell, told) = mpsc::channel();
    stop(pid);
    let io = thread::spawn(move || tell.send(ask(&again)).unwrap());
    let found = told.recv_timeout(WAIT_TIMEOUT);
    signal(pid, Signal::CONT).unwrap();
    io.join().unwrap();
    found.unwrap()
}

#[test]
fn reads_and_writes_of_an_open_disk_bypass_the_daemon() {
    let lab = lab();
    lab.mount(DISK);
    let file = lab.open("m/d");
    // The first write lets the kernel learn that there are no extended attributes to request.
    file.write_all_at(b"x", 0).unwrap();
    let found = without_the_daemon(&lab, &file, |file| {
        file.write_all_at(b"past the daemon", 5000).unwrap();
        read(file, 5000, 15)
    });
    assert_eq!(found, b"past the daemon");
    assert_eq!(read(&lab.open_ro("host/ov/data"), 5000, 15), b"past the daemon");
    drop(file);
}

#[test]
fn passthrough_file_of_mode_rw_matches_the_model() {
    let lab = lab();
    lab.sh("cp host/base.img host/rw.img");
    model(&lab, "host/rw.img", "d=host/rw.img,mode=rw,passthrough");
    assert!(!lab.log().contains("without passthrough"), "{}", lab.log());
    lab.mount("d=host/rw.img,mode=rw,passthrough");
    let file = lab.open("m/d");
    file.write_all_at(b"x", 0).unwrap();
    let found = without_the_daemon(&lab, &file, |file| {
        file.write_all_at(b"past the daemon", 5000).unwrap();
        read(file, 5000, 15)
    });
    assert_eq!(found, b"past the daemon");
    assert_eq!(read(&lab.open_ro("host/rw.img"), 5000, 15), b"past the daemon");
    drop(file);
}

#[test]
fn passthrough_file_of_mode_ro_is_read_past_the_daemon_and_never_written() {
    let lab = lab();
    lab.mount("d=host/base.img,mode=ro,passthrough");
    let file = lab.open_ro("m/d");
    let found = without_the_daemon(&lab, &file, |file| read(file, 4000, 5000));
    assert_eq!(found, read(&lab.open_ro("host/base.img"), 4000, 5000));
    let written = OpenOptions::new().write(true).open(lab.path("m/d"));
    assert_eq!(errno_of(written), libc::EROFS);
    let before = lab.sh("stat -c %Y host/base.img");
    lab.sh("touch -d 2001-01-01 m/d || true");
    assert_eq!(lab.sh("stat -c %Y host/base.img"), before);
    drop(file);
}

#[test]
fn failed_sync_latches_a_file_of_mode_rw_and_status_reports_it() {
    for words in ["d=host/rw.img,mode=rw", "d=host/rw.img,mode=rw,passthrough"] {
        let lab = Lab::new();
        lab.host("host", "xfs", 400 * MIB);
        File::create(lab.path("host/rw.img")).unwrap().write_all(&noise(MIB, 1)).unwrap();
        lab.sh("sync -f host");
        lab.mount(words);
        let file = lab.open("m/d");
        file.write_all_at(&noise(5000, 2), 5000).unwrap();
        lab.sh("xfs_io -x -c shutdown host");
        for _ in 0..2 {
            assert_eq!(errno_of(file.sync_all()), libc::EIO, "{words}");
        }
        assert_eq!(lab.disk("d")["state"], "read-only", "{words}");
        let opened = OpenOptions::new().write(true).open(lab.path("m/d"));
        assert_eq!(errno_of(opened.and_then(|file| file.write_all_at(b"x", 0))), libc::EIO);
        drop(file);
        let output = lab.cowslip("umount m");
        assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    }
}

#[test]
fn passthrough_requires_a_whole_raw_file() {
    let lab = lab();
    lab.sh("qemu-img create -q -f qcow2 host/q.qcow2 1M");
    let device = lab.loop_device("host/base.img", "-r");
    for (code, words, says) in [
        (2, "d=host/base.img,passthrough", "is for mode=ro and mode=rw"),
        (2, "d=host/base.img,mode=ro,offset=512,passthrough", "is for whole files"),
        (1, "d=host/q.qcow2,format=qcow2,mode=ro,passthrough", "is not a raw file"),
        (1, &format!("d={device},mode=ro,passthrough"), "is not a raw file"),
    ] {
        let line = lab.refused(code, &format!("mount m {words}"));
        assert!(line.contains(says), "{line}");
    }
    lab.sh(&format!("losetup -d {device}"));
}

#[test]
fn write_past_the_end_is_seen_by_all_handles() {
    let lab = lab();
    lab.mount(DISK);
    let (file, reader) = (lab.open("m/d"), lab.open_ro("m/d"));
    let mut end = OpenOptions::new().append(true).open(lab.path("m/d")).unwrap();
    end.write_all(b"appended").unwrap();
    assert_eq!(file.metadata().unwrap().len(), SIZE + 8);
    assert_eq!(lab.disk("d")["size"], SIZE + 8);
    assert_eq!(read(&reader, SIZE, 8), b"appended");
    drop(OpenOptions::new().write(true).truncate(true).open(lab.path("m/d")).unwrap());
    assert_eq!(reader.metadata().unwrap().len(), 0);
    file.write_all_at(b"x", 10 * MIB).unwrap();
    assert_eq!(lab.sh("stat -c %s m/d").trim(), (10 * MIB + 1).to_string());
    assert_eq!(read(&reader, 9 * MIB, 8), [0; 8]);
    assert_eq!(data_runs(&reader), [10 * MIB..10 * MIB + 1]);
    drop((file, reader, end));
}

#[test]
fn holes_and_blocks_are_those_of_the_data_file() {
    let lab = lab();
    lab.mount(DISK);
    let (file, base) = (lab.open("m/d"), lab.open_ro("host/base.img"));
    assert_eq!(data_runs(&file), data_runs(&base));
    assert!(file.metadata().unwrap().blocks() * 512 < SIZE);
    let first = data_runs(&base)[0].clone();
    fallocate(&file, PUNCH, 64 * KIB..128 * KIB).unwrap();
    assert_eq!(data_runs(&file)[..2], [0..64 * KIB, 128 * KIB..first.end]);
    // Written through a mapping and not yet written back.
    lab.sh("python3 -c 'import mmap,os
fd = os.open(\"m/d\", os.O_RDWR)
m = mmap.mmap(fd, 1 << 20)
m[70000] = 7
os.close(fd)
assert os.lseek(os.open(\"m/d\", os.O_RDONLY), 65536, os.SEEK_DATA) <= 70000'");
    drop((file, base));
}

#[test]
fn times_owner_mode_and_inode_survive_a_remount() {
    let lab = lab();
    lab.mount(DISK);
    let then = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_234_567_890_123_456_789);
    lab.open("m/d").set_modified(then).unwrap();
    lab.sh("chown 12:34 m/d; chmod 640 m/d");
    let look = || lab.sh("stat -c '%i %u %g %a %Y %s' m/d");
    let was = look();
    assert!(was.contains(" 12 34 640 1234567890 "), "{was}");
    lab.umount();
    lab.mount(DISK);
    assert_eq!(look(), was);
    lab.umount();
    // The overlay itself records its kind.
    lab.mount("d=host/base.img,overlay=host/ov");
    assert_eq!(look(), was);
}

#[test]
fn completed_writes_survive_a_killed_daemon() {
    let lab = lab();
    lab.mount(DISK);
    let file = lab.open("m/d");
    file.write_all_at(&noise(100_000, 5), 50_000).unwrap();
    lab.kill();
    // A process that still has the file open can write, and keeps the overlay locked.
    file.write_all_at(b"late", 1000).unwrap();
    let line = lab.refused(1, &format!("mount m {DISK}"));
    assert!(line.contains("is in use by the cowslip mount at"), "{line}");
    drop(file);
    lab.mount(DISK);
    let file = lab.open_ro("m/d");
    assert_eq!(read(&file, 50_000, 100_000), noise(100_000, 5));
    assert_eq!(read(&file, 1000, 4), b"late");
    drop(file);
}

#[test]
fn power_cut_keeps_synced_data_and_a_failed_sync_latches() {
    let lab = Lab::new();
    let device = lab.host("host", "xfs", 400 * MIB);
    File::create(lab.path("host/base.img")).unwrap().write_all(&noise(SIZE, 1)).unwrap();
    lab.sh("sync -f host");
    lab.mount(DISK);
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 2), MIB).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&noise(MIB, 3), 2 * MIB).unwrap();
    // Shuts XFS down without a flush, which leaves the state of a power cut.
    lab.sh("xfs_io -x -c shutdown host");
    for _ in 0..2 {
        assert_eq!(errno_of(file.sync_all()), libc::EIO);
    }
    let opened = OpenOptions::new().write(true).open(lab.path("m/d"));
    assert_eq!(errno_of(opened.and_then(|file| file.write_all_at(b"x", 0))), libc::EIO);
    assert_eq!(errno_of(file.read_at(&mut [0; 512], 3 * MIB)), libc::EIO);
    let status = lab.cowslip("status m --json");
    assert_eq!(status.status.code(), Some(3), "{}", show(&status));
    assert_eq!(lab.disk("d")["state"], "read-only");
    drop(file);
    let output = lab.cowslip("umount m");
    assert_eq!(output.status.code(), Some(1), "{}", show(&output));
    lab.sh(&format!("umount host; mount {device} host"));
    lab.mount(DISK);
    let found = whole(&lab, "m/d");
    let (base, third) = (noise(SIZE, 1), noise(MIB, 3));
    assert!(found[MIB as usize..][..MIB as usize] == noise(MIB, 2));
    // Each sector that was not synced is the old one or the new one.
    for at in (0..MIB as usize).step_by(512) {
        let sector = &found[2 * MIB as usize + at..][..512];
        let is_old = *sector == base[2 * MIB as usize + at..][..512];
        assert!(is_old || *sector == third[at..][..512], "at {at}");
    }
}

#[test]
fn copy_between_disks_is_exact_and_reflinked_by_the_host() {
    let lab = lab();
    lab.mount(&format!("{DISK} e=host/base.img,overlay=host/ow,reflink"));
    let (from, to) = (lab.open("m/d"), lab.open("m/e"));
    from.write_all_at(&noise(MIB, 8), 0).unwrap();
    to.set_len(0).unwrap();
    assert_eq!(copy_range(&from, 0, &to, 0, SIZE).unwrap(), SIZE);
    assert_eq!(copy_range(&from, 4097, &to, SIZE + 5, 300_000).unwrap(), 300_000);
    let wanted = [&whole(&lab, "m/d")[..], &[0; 5], &whole(&lab, "m/d")[4097..304_097]].concat();
    check(&to, &wanted);
    to.sync_all().unwrap();
    let shared = lab.sh("xfs_io -r -c 'fiemap -v 0 1m' host/ow/data");
    assert!(shared.contains("0x20"), "nothing is shared: {shared}");
    drop((from, to));
}

#[test]
fn base_is_in_use_while_the_disk_is_mounted() {
    let lab = lab();
    lab.mount(DISK);
    lab.sh("mkdir m2");
    let line = lab.refused(1, "mount m2 w=host/base.img,mode=rw");
    assert!(line.contains("uses it as its base"), "{line}");
}

#[test]
fn second_mount_of_the_overlay_is_rejected() {
    let lab = lab();
    lab.mount(DISK);
    lab.sh("mkdir m2");
    let line = lab.refused(1, &format!("mount m2 {DISK}"));
    assert!(line.contains("is in use by the cowslip mount at"), "{line}");
}

#[test]
fn resize_off_keeps_the_size() {
    let lab = lab();
    lab.mount(&format!("{DISK},resize=off"));
    let file = lab.open("m/d");
    file.write_all_at(b"inside", SIZE - 6).unwrap();
    assert_eq!(errno_of(file.write_at(b"outside", SIZE)), libc::ENOSPC);
    assert_eq!(file.metadata().unwrap().len(), SIZE);
    drop(file);
}

#[test]
fn status_reports_the_kind_and_the_changed_bytes() {
    let lab = lab();
    let said = lab.mount(DISK);
    assert!(said.contains("4 MiB, reflink overlay"), "{said}");
    let file = lab.open("m/d");
    file.write_all_at(&[1; 8192], 1 << 20).unwrap();
    file.sync_all().unwrap();
    let overlay = lab.disk("d")["overlay"].clone();
    assert_eq!(overlay["kind"], "reflink");
    assert_eq!(overlay["changed"], 8192);
    assert_eq!(overlay["temporary"], false);
    drop(file);
    let said = lab.umount();
    assert!(said.contains("d: 8 KiB of changes kept in '"), "{said}");
}

#[test]
fn reflink_is_rejected_where_it_is_impossible() {
    let mut lab = lab();
    lab.base("plain.img", SIZE);
    let refused = |disk: &str| lab.refused(1, &format!("mount m {disk}"));
    for (disk, words) in [
        ("d=host/base.img,overlay=ov,reflink", "is not on the file system of its base"),
        ("d=plain.img,overlay=host/ov,reflink", "is not on the file system of its base"),
        ("d=plain.img,overlay=ov,reflink", "has no reflinks here"),
        ("d=host/base.img,overlay=host/no/ov,reflink", "make it first"),
    ] {
        let line = refused(disk);
        assert!(line.contains(words), "{disk}: {line}");
    }
    let device = lab.loop_device("plain.img", "-r");
    let line = refused(&format!("d={device},overlay=host/ov,reflink"));
    assert!(line.contains("needs a file as its base for reflink"), "{line}");
    assert!(!lab.path("ov").exists() && !lab.path("host/ov").exists());
    let left = lab.sh("ls -A host | grep -v base.img || true");
    assert_eq!(left, "", "something is left behind");
    for (disk, words) in [
        ("d=blank:1M,overlay=host/ov,reflink", "this disk is blank"),
        ("d=host/base.img,reflink", "write overlay=DIR,reflink"),
        ("d=host/base.img,overlay=host/ov,reflink,block=64K", "block"),
        ("d=host/base.img,overlay=host/ov,reflink,limit=1G", "limit"),
        ("d=host/base.img,mode=ro,reflink", "mode=cow"),
    ] {
        let line = lab.refused(2, &format!("mount m {disk}"));
        assert!(line.contains(words), "{disk}: {line}");
    }
}

#[test]
fn overlay_of_the_other_kind_is_rejected() {
    let lab = lab();
    lab.mount("d=host/base.img,overlay=host/ov");
    lab.umount();
    let line = lab.refused(1, &format!("mount m {DISK}"));
    assert!(line.contains("keeps a block map: leave out reflink"), "{line}");
    lab.sh("rm -r host/ov");
    lab.mount(DISK);
    lab.umount();
    let line = lab.refused(1, "mount m d=host/base.img,overlay=host/ov,block=64K");
    assert!(line.contains("leave out block="), "{line}");
    let line = lab.refused(1, &format!("mount m {DISK},size=8M"));
    assert!(line.contains("presents 4 MiB, not 8 MiB"), "{line}");
}

#[test]
fn changed_base_is_rejected_unless_forced() {
    let lab = lab();
    fs::copy(lab.path("host/base.img"), lab.path("host/b.img")).unwrap();
    let disk = "d=host/b.img,overlay=host/ov,reflink";
    lab.mount(disk);
    lab.open("m/d").write_all_at(b"mine", 0).unwrap();
    lab.umount();
    // The overlay is intact; it merely has no block map.
    for words in ["check host/ov", "rebase host/ov --base host/base.img"] {
        let line = lab.refused(1, words);
        assert!(line.contains("is a reflink overlay, which has no block map"), "{line}");
    }
    lab.open("host/b.img").write_all_at(b"changed", 100).unwrap();
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("does not fit its base"), "{line}");
    lab.mount(&format!("{disk} --force"));
    // The disk owns its blocks, so they did not change with the base.
    let mut wanted = whole(&lab, "host/base.img");
    wanted[..4].copy_from_slice(b"mine");
    check(&lab.open_ro("m/d"), &wanted);
}

// The library, without a mount.

/// The layer below a reflink disk: nothing, since the disk is one file.
struct Nothing;

impl cowslip::layer::ReadBelow for Nothing {
    fn read_below(&self, _: &mut [u8], _: u64, _: cowslip::layer::Wait) -> std::io::Result<()> {
        unreachable!("nothing is below")
    }

    fn is_zero_below(&self, _: Range<u64>, _: cowslip::layer::Wait) -> std::io::Result<bool> {
        unreachable!("nothing is below")
    }
}

fn base_of(lab: &Lab) -> Arc<File> {
    Arc::new(lab.open_ro("host/base.img"))
}

/// Creates an overlay at `host/ov`.
fn create(lab: &Lab) -> OpenedReflink {
    let (path, file) = (lab.path("host/base.img"), base_of(lab));
    let identity = Identity::of(&file).unwrap();
    let stack = Stack {
        version: FORMAT_VERSION,
        uuid: uuid::Uuid::new_v4(),
        uid: 0,
        gid: 0,
        perm: 0o600,
        kind: OverlayKind::Reflink,
        base: BaseRecord::File {
            path: path.clone(),
            format: "raw".to_owned(),
            offset: None,
            len: None,
            identity,
            needs: Vec::new(),
        },
        layers: Vec::new(),
        snapshots: Vec::new(),
    };
    let base = SharedBase { path: &path, file: &file };
    reflink::create(&lab.path("host/ov"), stack, &base, None).unwrap()
}

/// Locks the overlay at `dir`. Retries while it is in use: a child that another test has just
/// forked holds this process's files, and so the lock, until it executes its program.
fn find(dir: &Path) -> Result<reflink::LockedReflink, ReflinkError> {
    let deadline = Instant::now() + WAIT_TIMEOUT;
    loop {
        match reflink::lock_overlay(dir) {
            Err(ReflinkError::Overlay(OverlayError::InUse { .. })) if Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            found => return found,
        }
    }
}

fn open(lab: &Lab) -> Result<OpenedReflink, ReflinkError> {
    find(&lab.path("host/ov"))?.open(&base_of(lab))
}

fn put(layer: &Reflink, bytes: &[u8], offset: u64) {
    layer.write_at(bytes, offset, &Nothing, cowslip::layer::Wait::Yes).unwrap();
}

fn bytes_of(layer: &Reflink) -> Vec<u8> {
    read(layer.data(), 0, layer.size())
}

/// An overlay with two snapshots that both differ from the base, and the bytes of the disk at each.
struct Told {
    lab: Lab,
    base: Vec<u8>,
    monday: Vec<u8>,
    tuesday: Vec<u8>,
}

impl Told {
    fn new() -> Self {
        let lab = lab();
        let layer = create(&lab).layer;
        let base = bytes_of(&layer);
        for index in 0..200 {
            put(&layer, &noise(3000, index + 9), index * 20_000);
        }
        let monday = bytes_of(&layer);
        layer.snapshot("monday").unwrap();
        // Shorter, and not at a block boundary; then longer than the base.
        layer.set_size(SIZE / 2 + 77).unwrap();
        put(&layer, b"tuesday", 4242);
        let tuesday = bytes_of(&layer);
        layer.snapshot("tuesday.new").unwrap();
        layer.set_size(2 * SIZE + 5).unwrap();
        put(&layer, &noise(50_000, 3), SIZE);
        Self { lab, base, monday, tuesday }
    }

    fn ov(&self, name: &str) -> std::path::PathBuf {
        self.lab.path("host/ov").join(name)
    }
}

#[test]
fn revert_and_reset_restore_snapshots_and_base() {
    let told = Told::new();
    let layer = open(&told.lab).unwrap().layer;
    let inode = layer.data().metadata().unwrap().ino();
    let names =
        || layer.list_snapshots().unwrap().into_iter().map(|found| found.name).collect::<Vec<_>>();
    assert_eq!(names(), ["monday", "tuesday.new"]);
    for _ in 0..2 {
        layer.revert("tuesday.new").unwrap();
        assert!(bytes_of(&layer) == told.tuesday);
        layer.revert("monday").unwrap();
        assert!(bytes_of(&layer) == told.monday);
        put(&layer, &noise(9999, 1), 12_345);
        layer.reset().unwrap();
        assert!(bytes_of(&layer) == told.base);
        put(&layer, &noise(9999, 2), SIZE + 12_345 - SIZE % 7);
    }
    // The snapshots are separate read-only files.
    assert!(fs::read(told.ov("snapshots/monday")).unwrap() == told.monday);
    let mut file = layer.open_snapshot("tuesday.new").unwrap();
    assert!(file.write_all(b"x").is_err());
    assert_eq!(layer.list_snapshots().unwrap()[0].size, SIZE);
    layer.delete_snapshot("monday").unwrap();
    assert_eq!(names(), ["tuesday.new"]);
    layer.revert("tuesday.new").unwrap();
    assert!(bytes_of(&layer) == told.tuesday);
    assert_eq!(layer.data().metadata().unwrap().ino(), inode);
    drop(layer);
}

#[test]
fn invalid_missing_and_duplicate_snapshot_names_change_nothing() {
    let told = Told::new();
    let layer = open(&told.lab).unwrap().layer;
    let was = bytes_of(&layer);
    assert!(matches!(layer.snapshot("monday"), Err(ReflinkError::Exists(_))));
    for name in ["", "..", "a/b", "a\n"] {
        assert!(matches!(layer.snapshot(name), Err(ReflinkError::Name { .. })), "{name:?}");
        assert!(matches!(layer.revert(name), Err(ReflinkError::Name { .. })), "{name:?}");
        assert!(matches!(layer.delete_snapshot(name), Err(ReflinkError::Name { .. })), "{name:?}");
    }
    assert!(matches!(layer.revert("never"), Err(ReflinkError::NoSnapshot(_))));
    assert!(matches!(layer.delete_snapshot("never"), Err(ReflinkError::NoSnapshot(_))));
    assert!(bytes_of(&layer) == was);
    assert_eq!(layer.list_snapshots().unwrap().len(), 2);
    assert_eq!(fs::read(told.ov("snapshots/monday")).unwrap(), told.monday);
    drop(layer);
    let mut names: Vec<_> =
        fs::read_dir(told.ov("")).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["data", "snapshots", "stack"]);
}

/// Writes the `intent` file that an interrupted revert leaves.
fn leave_intent(told: &Told, body: &str) {
    let crc = crc32c::crc32c(body.as_bytes());
    let text = format!("checksum = \"crc32c:{crc:08x}\"\n{body}");
    fs::write(told.ov("intent"), text).unwrap();
}

#[test]
fn interrupted_revert_or_reset_is_finished_at_the_next_open() {
    let told = Told::new();
    let monday = "from = \"snapshot\"\nname = \"monday\"\n";
    let tuesday = "from = \"snapshot\"\nname = \"tuesday.new\"\n";
    let data = OpenOptions::new().read(true).write(true).open(told.ov("data")).unwrap();
    // Possible states of the data at the interruption: unchanged, truncated, and half of one state
    // and half of another.
    let nothing: &dyn Fn() = &|| {};
    let cut: &dyn Fn() = &|| data.set_len(1 << 20).unwrap();
    let mixed: &dyn Fn() = &|| {
        fs::write(told.ov("data"), &told.monday[..]).unwrap();
        data.write_all_at(&told.base[..1 << 20], 1 << 20).unwrap();
    };
    for (body, wanted) in
        [(monday, &told.monday), (tuesday, &told.tuesday), ("from = \"base\"\n", &told.base)]
    {
        for come_to in [nothing, cut, mixed] {
            come_to();
            leave_intent(&told, body);
            fs::write(told.ov("snapshot.new"), "half").unwrap();
            fs::write(told.ov("intent.new"), "half").unwrap();
            let opened = open(&told.lab).unwrap();
            let is_reset = opened.finished == Some(RevertSource::Base);
            assert!(opened.finished.is_some() && is_reset == body.contains("base"));
            assert!(bytes_of(&opened.layer) == *wanted, "{body}");
            for name in ["intent", "intent.new", "snapshot.new"] {
                assert!(!told.ov(name).exists(), "{name}");
            }
            put(&opened.layer, b"written after", 100);
            drop(opened);
            // The revert is finished: later writes stay.
            let again = open(&told.lab).unwrap();
            assert_eq!(again.finished, None);
            assert_eq!(&bytes_of(&again.layer)[100..113], b"written after");
        }
    }
    leave_intent(&told, monday);
    let said = told.lab.mount(DISK);
    assert!(said.contains("d: the interrupted revert to 'monday' is finished"), "{said}");
    assert!(whole(&told.lab, "m/d") == told.monday);
}

#[test]
fn revert_that_cannot_be_finished_is_rejected_and_left_unchanged() {
    let told = Told::new();
    let was = fs::read(told.ov("data")).unwrap();
    fs::write(told.ov("intent"), "checksum = \"crc32c:00000000\"\nfrom = \"base\"\n").unwrap();
    assert!(matches!(open(&told.lab), Err(ReflinkError::Intent)));
    leave_intent(&told, "from = \"snapshot\"\nname = \"gone\"\n");
    assert!(matches!(open(&told.lab), Err(ReflinkError::Unfinished { .. })));
    let line = told.lab.refused(1, &format!("mount m {DISK}"));
    assert!(line.contains("is in the middle of a revert to 'gone'"), "{line}");
    assert!(told.ov("intent").exists());
    assert!(fs::read(told.ov("data")).unwrap() == was);
}

#[test]
fn shared_extents_tell_which_ranges_differ_from_the_base() {
    let lab = lab();
    let layer = create(&lab).layer;
    assert_eq!(layer.changed().unwrap().ranges, []);
    put(&layer, &[1; 100], 5000);
    put(&layer, &[1; 8192], 8192);
    put(&layer, &[1; 1], SIZE - 1);
    let hole = data_runs(layer.data())[0].end.next_multiple_of(4096);
    put(&layer, &[1; 4096], hole + 4096);
    let last = (SIZE - 1) / 4096 * 4096;
    let changed = layer.changed().unwrap();
    assert_eq!(changed.ranges, [4096..16384, hole + 4096..hole + 8192, last..SIZE]);
    assert_eq!(changed.bytes, 12288 + 4096 + SIZE - last);
    assert_eq!(layer.estimate_changed().unwrap(), changed.bytes);
    layer.punch_hole(0..4096, &Nothing, cowslip::layer::Wait::Yes).unwrap();
    assert_eq!(layer.changed().unwrap().ranges[0], 0..16384);
    layer.set_size(SIZE + MIB).unwrap();
    put(&layer, &[1; 4096], SIZE + MIB / 2);
    let changed = layer.changed().unwrap().ranges;
    assert_eq!(changed.last(), Some(&(SIZE + MIB / 2..SIZE + MIB / 2 + 4096)));
    layer.reset().unwrap();
    assert_eq!(layer.changed().unwrap().ranges, []);
    drop(layer);
}

#[test]
fn overlay_lock_follows_the_data_file_across_a_rename() {
    let lab = lab();
    let one = create(&lab);
    fs::rename(lab.path("host/ov"), lab.path("host/renamed")).unwrap();
    let two = reflink::lock_overlay(Path::new(&lab.path("host/renamed")));
    assert!(matches!(two, Err(ReflinkError::Overlay(OverlayError::InUse { .. }))));
    drop(one);
    find(&lab.path("host/renamed")).unwrap();
}

#[test]
fn direct_io_reaches_the_data_file() {
    let lab = lab();
    lab.mount(DISK);
    let mut options = OpenOptions::new();
    let file = options.read(true).write(true).custom_flags(libc::O_DIRECT);
    let file = file.open(lab.path("m/d")).unwrap();
    let data = Aligned::of(&noise(8192, 4));
    file.write_all_at(data.bytes(), 4096).unwrap();
    let mut back = Aligned::of(&[0; 8192]);
    file.read_exact_at(back.bytes_mut(), 4096).unwrap();
    assert_eq!(back.bytes(), data.bytes());
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 8192), data.bytes());
    drop(file);
}
