//! The key `partitions`: each partition of a disk is a file beside the disk and presents a range of
//! the disk's own bytes. The tables are written by parted; the files are used through common tools.

use std::fs::{self, File};
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use crate::common::mount::*;
use proptest::prelude::*;
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

/// parted commands for two adjacent primary partitions and a logical one.
const MBR: &str = "mklabel msdos mkpart primary 1MiB 5MiB mkpart primary 5MiB 20MiB \
     mkpart extended 20MiB 40MiB mkpart logical 21MiB 30MiB";
const GPT: &str = "mklabel gpt mkpart a 1MiB 5MiB mkpart b 5MiB 6MiB mkpart c 6MiB 40MiB rm 2";
/// Number and byte range of each partition.
const MBR_PARTS: [(u32, Range<u64>); 3] =
    [(1, MIB..5 * MIB), (2, 5 * MIB..20 * MIB), (5, 21 * MIB..30 * MIB)];
const GPT_PARTS: [(u32, Range<u64>); 2] = [(1, MIB..5 * MIB), (3, 6 * MIB..40 * MIB)];

/// Creates a file `name` of 48 MiB with random data, except for its partition table and a hole of 2
/// MiB in partition 2.
fn partitioned(lab: &mut Lab, name: &str, script: &str) {
    let file = File::create(lab.path(name)).unwrap();
    file.write_all_at(&noise(48 * MIB, 3), 0).unwrap();
    file.write_all_at(&[0; MIB as usize], 0).unwrap();
    fallocate(&file, PUNCH, 8 * MIB..10 * MIB).unwrap();
    lab.sh(&format!("parted -s {name} {script}"));
    lab.watch(name);
}

/// Mounts `disk.img`, which has an MBR, with its partitions.
fn mounted() -> Lab {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", MBR);
    lab.mount("disk.img,overlay=ov,partitions");
    lab
}

fn entries(lab: &Lab) -> Vec<String> {
    let names = fs::read_dir(lab.path("m")).unwrap();
    let mut names: Vec<String> =
        names.map(|name| name.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn every_partition_is_a_file_beside_its_disk() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "mbr.img", MBR);
    partitioned(&mut lab, "gpt.img", GPT);
    for (name, parts) in [("mbr.img", &MBR_PARTS[..]), ("gpt.img", &GPT_PARTS)] {
        for mode in ["cow", "ro"] {
            let said = lab.mount(&format!("{name},mode={mode},partitions"));
            assert!(said.contains(&format!("shown as {name}.p1 (4 MiB), {name}.p")), "{said}");
            let want = parts.iter().map(|(number, _)| format!("{name}.p{number}"));
            let want: Vec<String> = std::iter::once(name.to_owned()).chain(want).collect();
            assert_eq!(entries(&lab), want);
            let whole = lab.open_ro(name);
            for (number, range) in parts {
                let found = fs::read(lab.path(&format!("m/{name}.p{number}"))).unwrap();
                assert!(found == read(&whole, range.start, range.end - range.start));
            }
            let values: Vec<Value> = parts
                .iter()
                .map(|(number, range)| {
                    json!({ "number": number, "name": format!("{name}.p{number}"),
                            "offset": range.start, "size": range.end - range.start })
                })
                .collect();
            assert_eq!(lab.disk(name)["partitions"], json!(values));
            let text = lab.ok("status m");
            assert!(text.contains(&format!("{name}.p1: 4 MiB, bytes 1048576..5242880 of {name}")));
            lab.umount();
        }
    }
    // The key changes only the view of the disk; the overlay does not record it.
    lab.mount("mbr.img,overlay=ov,partitions");
    lab.umount();
    lab.mount("mbr.img,overlay=ov");
    assert_eq!(entries(&lab), ["mbr.img"]);
    lab.umount();
    lab.sh("printf '[[disk]]\\nsource = \"mbr.img\"\\npartitions = true\\n' > c.toml");
    lab.ok("mount m --config c.toml");
    assert_eq!(entries(&lab).len(), 4);
}

#[test]
fn partition_files_have_the_attributes_of_the_disk_except_size_and_blocks() {
    let lab = mounted();
    let disk = fs::metadata(lab.path("m/disk.img")).unwrap();
    let part = fs::metadata(lab.path("m/disk.img.p2")).unwrap();
    assert_eq!((part.len(), part.blocks() * 512), (15 * MIB, 13 * MIB));
    assert_eq!((part.uid(), part.gid(), part.mode()), (disk.uid(), disk.gid(), disk.mode()));
    let mut inos: Vec<u64> = entries(&lab)
        .iter()
        .map(|name| fs::metadata(lab.path(&format!("m/{name}"))).unwrap().ino())
        .collect();
    let listed = lab.sh("ls -i m | awk '{ print $1 }'");
    let listed: Vec<u64> = listed.lines().map(|ino| ino.parse().unwrap()).collect();
    assert_eq!(listed, inos);
    lab.umount();
    lab.mount("disk.img,overlay=ov,partitions");
    assert_eq!(part.ino(), fs::metadata(lab.path("m/disk.img.p2")).unwrap().ino());
    inos.sort_unstable();
    inos.dedup();
    assert_eq!(inos.len(), 4);
    let path = lab.path("m/disk.img.p2");
    let mode = fs::Permissions::from_mode(0o640);
    assert_eq!(errno_of(fs::set_permissions(&path, mode.clone())), libc::EPERM);
    assert_eq!(errno_of(std::os::unix::fs::chown(&path, Some(1), None)), libc::EPERM);
    fs::set_permissions(lab.path("m/disk.img"), mode).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o640);
    // A hole punched through the disk changes the partition's blocks at once.
    fallocate(&lab.open("m/disk.img"), PUNCH, 5 * MIB..8 * MIB).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().blocks() * 512, 10 * MIB);
}

#[test]
fn file_system_in_a_partition_changes_only_that_range_of_the_disk() {
    let lab = mounted();
    lab.sh("mkfs.ext4 -q m/disk.img.p2; mkdir mnt; mount -o loop m/disk.img.p2 mnt
            cp -r /etc/apt mnt; dd if=/dev/urandom of=mnt/big bs=1M count=4 status=none
            umount mnt; e2fsck -fn m/disk.img.p2 >&2
            tail -c +5242881 m/disk.img | head -c 15728640 | cmp - m/disk.img.p2
            head -c 5242880 m/disk.img > left; head -c 5242880 disk.img | cmp - left
            tail -c +20971521 m/disk.img > right; tail -c +20971521 disk.img | cmp - right");
    let sum = lab.sh("md5sum < m/disk.img.p2");
    lab.umount();
    lab.mount("root=disk.img,overlay=ov");
    assert_eq!(lab.sh("tail -c +5242881 m/root | head -c 15728640 | md5sum"), sum);
}

/// Opens `name` and caches its page at `offset`. Returns the file and the bytes read.
fn cached(lab: &Lab, name: &str, offset: u64) -> (File, Vec<u8>) {
    let file = lab.open_ro(name);
    let found = read(&file, offset, 4096);
    (file, found)
}

#[test]
fn changes_through_a_partition_are_read_through_the_disk_at_once() {
    let lab = mounted();
    let part = lab.open("m/disk.img.p2");
    for round in 0..200_u64 {
        let at = round * 12_288;
        let (reader, _) = cached(&lab, "m/disk.img", 5 * MIB + at);
        let bytes = noise(4096, round + 100);
        part.write_all_at(&bytes, at).unwrap();
        assert!(read(&reader, 5 * MIB + at, 4096) == bytes, "round {round}");
        fallocate(&part, PUNCH, at..at + 4096).unwrap();
        assert!(read(&reader, 5 * MIB + at, 4096) == [0; 4096], "punched, round {round}");
        copy_range(&lab.open_ro("disk.img"), 0, &part, at, 0).unwrap();
        assert_eq!(copy_range(&part, 14 * MIB, &part, at, 4096).unwrap(), 4096);
        assert!(read(&reader, 5 * MIB + at, 4096) == read(&part, 14 * MIB, 4096));
    }
    // Opened between the writes: pages cached earlier must not be read.
    for round in 0..20_u64 {
        cached(&lab, "m/disk.img", 5 * MIB);
        let bytes = noise(4096, round + 500);
        part.write_all_at(&bytes, 0).unwrap();
        assert!(cached(&lab, "m/disk.img", 5 * MIB).1 == bytes, "reopened, round {round}");
    }
    let (reader, _) = cached(&lab, "m/disk.img", 5 * MIB);
    fs::write(lab.path("one"), noise(4096, 77)).unwrap();
    lab.sh("dd if=one of=m/disk.img.p2 bs=4k oflag=dsync conv=notrunc status=none");
    assert!(read(&reader, 5 * MIB, 4096) == noise(4096, 77));
    // Truncating a partition discards all its bytes.
    part.set_len(0).unwrap();
    assert!(read(&reader, 5 * MIB, 15 * MIB).iter().all(|byte| *byte == 0));
    assert_eq!(fs::metadata(lab.path("m/disk.img.p2")).unwrap().len(), 15 * MIB);
    drop((part, reader));
}

/// Access to a mapping.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Map {
    Read,
    Write,
}

/// A shared mapping of a part of a file.
struct Mapped(*mut u8, usize);

impl Mapped {
    /// Maps `len` bytes at `offset`.
    fn new(file: &File, offset: u64, len: usize, map: Map) -> Self {
        let access = libc::PROT_READ | if map == Map::Write { libc::PROT_WRITE } else { 0 };
        let offset = i64::try_from(offset).unwrap();
        // SAFETY: the kernel chooses a free address.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                access,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        Self(at.cast(), len)
    }

    fn bytes(&self) -> Vec<u8> {
        // SAFETY: `self.1` bytes are mapped until `drop`.
        (0..self.1).map(|at| unsafe { self.0.add(at).read_volatile() }).collect()
    }

    fn put(&self, offset: usize, byte: u8) {
        assert!(offset < self.1);
        // SAFETY: `offset` is inside the mapping, which is writable.
        unsafe { self.0.add(offset).write_volatile(byte) };
    }

    fn sync(&self) {
        // SAFETY: the mapping belongs to `self`.
        assert_eq!(unsafe { libc::msync(self.0.cast(), self.1, libc::MS_SYNC) }, 0);
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: `new` mapped this range, and nothing uses it any more.
        unsafe { libc::munmap(self.0.cast(), self.1) };
    }
}

#[test]
fn mapping_of_one_file_sees_changes_through_another() {
    let lab = mounted();
    let (whole, part) = (lab.open("m/disk.img"), lab.open("m/disk.img.p1"));
    let of_part = Mapped::new(&lab.open_ro("m/disk.img.p1"), 0, 8192, Map::Read);
    let of_whole = Mapped::new(&lab.open_ro("m/disk.img"), MIB, 8192, Map::Read);
    for round in 0..50_u64 {
        assert!(of_part.bytes() == of_whole.bytes());
        let bytes = noise(8192, round + 1000);
        let writer = if round % 2 == 0 { (&whole, MIB) } else { (&part, 0) };
        writer.0.write_all_at(&bytes, writer.1).unwrap();
        assert!(of_part.bytes() == bytes && of_whole.bytes() == bytes, "round {round}");
    }
    fallocate(&whole, ZERO, MIB..MIB + 4096).unwrap();
    assert!(of_part.bytes()[..4096] == [0; 4096]);
    copy_range(&whole, 2 * MIB, &whole, MIB, 4096).unwrap();
    assert!(of_part.bytes()[..4096] == read(&whole, 2 * MIB, 4096));
    drop((of_part, of_whole));

    // Writes through mappings at both ends of one page, alternating with plain writes: nothing is
    // lost, and nothing deadlocks.
    let (of_part, of_whole) =
        (Mapped::new(&part, 0, 8192, Map::Write), Mapped::new(&whole, MIB, 8192, Map::Write));
    for round in 0..50_u8 {
        // Reading caches the page in this mapping, so the page has to be invalidated.
        assert!(of_whole.bytes().len() == 8192);
        of_part.put(10, round);
        of_part.sync();
        wait_until("the other mapping sees it", || of_whole.bytes()[10] == round);
        of_whole.put(20, round);
        // The page has not been synced: the plain write must not be undone when this page is
        // written back.
        part.write_all_at(&[round; 5], 30).unwrap();
        let want = [round; 5];
        assert_eq!(
            (read(&whole, MIB + 20, 1)[0], &read(&whole, MIB + 30, 5)[..]),
            (round, &want[..])
        );
        assert_eq!((read(&part, 20, 1)[0], &read(&part, 30, 5)[..]), (round, &want[..]));
        of_whole.sync();
    }
    drop((of_part, of_whole, whole, part));
}

#[test]
fn mapping_shows_no_discarded_bytes_after_the_call_returned() {
    let lab = mounted();
    let part = lab.open("m/disk.img.p1");
    let of_part = Mapped::new(&lab.open_ro("m/disk.img.p1"), 0, 4096, Map::Read);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        // Busy threads on other CPUs, so that the thread which has to invalidate the page is not
        // always scheduled at once.
        for _ in 0..3 {
            scope.spawn(|| {
                while !is_over.load(Ordering::Relaxed) {
                    std::hint::spin_loop();
                }
            });
        }
        let _end = Ends(&is_over);
        let stale = (0..3000_u64).find(|round| {
            part.write_all_at(&noise(4096, round + 1), 0).unwrap();
            assert!(of_part.bytes() == noise(4096, round + 1));
            part.set_len(0).unwrap();
            // SAFETY: the address is mapped.
            let first = unsafe { of_part.0.read_volatile() };
            first != 0 || of_part.bytes() != [0; 4096]
        });
        assert_eq!(stale, None, "the round that showed old bytes");
    });
    drop((of_part, part));
}

#[test]
fn truncating_a_partition_with_dirty_pages_does_not_deadlock() {
    let lab = mounted();
    let part = lab.open("m/disk.img.p1");
    let of_part = Mapped::new(&part, 0, 8192, Map::Write);
    let all: Vec<_> = (0..20).map(|_| lab.open("m/disk.img.p1")).collect();
    for round in 0..3 {
        of_part.put(0, 1 + round);
        of_part.put(4096, 1 + round);
        thread::scope(|scope| {
            all.iter().for_each(|file| {
                scope.spawn(|| file.set_len(0).unwrap());
            });
        });
        part.write_all_at(b"after", 4096).unwrap();
        assert_eq!(read(&part, 4096, 5), b"after");
    }
    drop((of_part, part, all));
}

#[test]
fn partition_file_has_fixed_ends_like_a_block_device() {
    let lab = mounted();
    let part = lab.open("m/disk.img.p1");
    let size = 4 * MIB;
    assert_eq!(part.write_at(&[1; 100], size - 40).unwrap(), 40);
    for at in [size, size + 1, 40 * MIB] {
        assert_eq!(errno_of(part.write_at(&[1], at)), libc::ENOSPC);
        assert_eq!(part.read_at(&mut [0; 10], at).unwrap(), 0);
        for whence in [SeekFrom::Data(at), SeekFrom::Hole(at)] {
            assert_eq!(seek(&part, whence), Err(libc::ENXIO));
        }
    }
    assert_eq!(part.read_at(&mut [0; 100], size - 40).unwrap(), 40);
    let file = rustix::fs::FallocateFlags::empty();
    assert_eq!(errno_of(fallocate(&part, file, 0..size + 1)), libc::ENOSPC);
    assert_eq!(errno_of(fallocate(&part, ZERO, size..size + 1)), libc::ENOSPC);
    fallocate(&part, file, 0..size).unwrap();
    let next = read(&lab.open_ro("m/disk.img.p2"), 0, MIB);
    fallocate(&part, PUNCH, size - 4096..size + MIB).unwrap();
    assert_eq!(
        copy_range(&lab.open_ro("m/disk.img.p2"), 0, &part, size - 100, 4096)
            .unwrap_err()
            .raw_os_error(),
        Some(libc::ENOSPC)
    );
    assert!(read(&part, size - 100, 100) == next[..100]);
    assert!(read(&lab.open_ro("m/disk.img.p2"), 0, MIB) == next);
    let mut sum = lab.open_ro("m/disk.img.p1");
    assert_eq!(io::copy(&mut sum, &mut io::sink()).unwrap(), size);
    for other in [1, size - 1, size + 1] {
        assert_eq!(errno_of(part.set_len(other)), libc::EINVAL);
    }
    part.set_len(size).unwrap();
    // Truncates the disk inside the partition, and extends it again.
    let whole = lab.open("m/disk.img");
    whole.set_len(3 * MIB).unwrap();
    assert_eq!(part.metadata().unwrap().len(), 2 * MIB);
    assert_eq!(errno_of(part.write_at(&[1], 2 * MIB)), libc::ENOSPC);
    assert_eq!(fs::metadata(lab.path("m/disk.img.p2")).unwrap().len(), 0);
    whole.set_len(48 * MIB).unwrap();
    assert!(read(&part, 2 * MIB, 2 * MIB).iter().all(|byte| *byte == 0));
    part.sync_all().unwrap();
    drop((part, whole, sum));
    let full = lab.output("dd", &["if=/dev/zero", "of=m/disk.img.p1", "bs=1M"]);
    let said = String::from_utf8_lossy(&full.stderr);
    assert!(said.contains("No space left on device") && said.contains("4194304 bytes"), "{said}");
}

#[test]
fn plain_tools_see_the_holes_of_a_partition() {
    let lab = mounted();
    let part = lab.open_ro("m/disk.img.p2");
    assert_eq!(data_runs(&part), [0..3 * MIB, 5 * MIB..15 * MIB]);
    lab.sh("cp --sparse=auto m/disk.img.p2 copy; cmp copy m/disk.img.p2
            qemu-img compare -f raw -F raw copy m/disk.img.p2 >&2
            qemu-img info -f raw m/disk.img.p2 | grep -q '15 MiB'
            tail -c +5242881 disk.img | head -c 15728640 | cmp - copy");
    assert_eq!(allocated(&lab.path("copy")), 13 * MIB);
    // A hole at the end of the partition, although data of the disk follows.
    fallocate(&lab.open("m/disk.img.p2"), PUNCH, 14 * MIB..15 * MIB).unwrap();
    assert_eq!(data_runs(&part), [0..3 * MIB, 5 * MIB..14 * MIB]);
    assert_eq!(seek(&part, SeekFrom::Hole(14 * MIB + 5)), Ok(14 * MIB + 5));
    assert_eq!(seek(&part, SeekFrom::Data(14 * MIB)), Err(libc::ENXIO));
    // Copies into a partition, and from one to another.
    lab.sh("cp --sparse=always copy m/disk.img.p2; cmp copy m/disk.img.p2
            qemu-img convert -n -f raw -O raw m/disk.img.p1 m/disk.img.p5
            head -c 4194304 m/disk.img.p5 | cmp - m/disk.img.p1");
    drop(part);
}

#[test]
fn copies_stay_inside_their_partitions() {
    let lab = mounted();
    let (one, two) = (lab.open("m/disk.img.p1"), lab.open("m/disk.img.p2"));
    let whole = lab.open("m/disk.img");
    assert_eq!(copy_range(&one, 0, &two, MIB, 64 * MIB).unwrap(), 4 * MIB, "to the source's end");
    assert!(read(&whole, 6 * MIB, 4 * MIB) == read(&whole, MIB, 4 * MIB));
    assert_eq!(copy_range(&whole, 30 * MIB, &one, 4096, 8192).unwrap(), 8192);
    assert!(read(&one, 4096, 8192) == read(&whole, 30 * MIB, 8192));
    let onto_itself = copy_range(&whole, MIB + 100, &one, 0, 4096);
    assert_eq!(errno_of(onto_itself), libc::EINVAL);
    drop((one, two, whole));
}

#[test]
fn open_partition_keeps_its_disk_and_mount_in_use() {
    let lab = mounted();
    let part = lab.open_ro("m/disk.img.p5");
    assert_eq!(lab.disk("disk.img")["openers"], 1);
    let line = lab.refused(1, "umount m");
    assert!(line.contains("in use"), "{line}");
    let line = lab.refused(1, "remove m/disk.img");
    assert!(line.contains("in use"), "{line}");
    drop(part);
    let writer = lab.open("m/disk.img.p5");
    lab.ok("snapshot m/disk.img s");
    let line = lab.refused(1, "revert m/disk.img s");
    assert!(line.contains("writ"), "{line}");
    drop(writer);
    lab.ok("remove m/disk.img");
    assert!(entries(&lab).is_empty());
    assert!(!lab.path("m/disk.img.p5").exists());
    lab.ok("add m d=disk.img,overlay=ov,partitions");
    assert_eq!(entries(&lab), ["d", "d.p1", "d.p2", "d.p5"]);
}

#[test]
fn commands_given_a_partition_name_its_disk() {
    let lab = mounted();
    let at = lab.path("m").display().to_string();
    for words in
        ["map", "commit", "status", "snapshot", "reset", "prefetch", "diff -o x", "hydrate"]
    {
        let line = lab.refused(1, &format!("{words} m/disk.img.p5"));
        let want = format!(
            "'disk.img.p5' is partition 5 of the disk 'disk.img' and no disk: name '{at}/disk.img'"
        );
        assert!(line.contains(&want), "{words}: {line}");
    }
    let line = lab.refused(1, "keep m/disk.img.p5 there");
    assert!(line.contains("is partition 5 of the disk 'disk.img'"), "{line}");
    let line = lab.refused(1, "remove m/disk.img.p5");
    assert!(line.contains("is partition 5 of the disk 'disk.img'"), "{line}");
    let line = lab.refused(1, "map m/disk.img.p3");
    assert!(line.contains("there is no disk 'disk.img.p3'"), "{line}");
}

#[test]
fn revert_and_reset_are_seen_through_a_partition() {
    let lab = mounted();
    let before = lab.sh("md5sum < m/disk.img.p1");
    lab.ok("snapshot m/disk.img s");
    lab.open("m/disk.img.p1").write_all_at(&noise(MIB, 9), 0).unwrap();
    // Mapped, so that the kernel caches pages with the newer bytes.
    let file = lab.open_ro("m/disk.img.p1");
    let mapped = Mapped::new(&file, 0, 4096, Map::Read);
    assert!(mapped.bytes() == noise(MIB, 9)[..4096]);
    lab.ok("revert m/disk.img s");
    assert!(mapped.bytes() == read(&lab.open_ro("disk.img"), MIB, 4096));
    assert_eq!(lab.sh("md5sum < m/disk.img.p1"), before);
    drop((mapped, file));
    lab.open("m/disk.img.p1").write_all_at(b"new", 0).unwrap();
    lab.ok("reset m/disk.img");
    assert_eq!(lab.sh("md5sum < m/disk.img.p1"), before);
}

#[test]
fn mode_ro_rejects_writes_and_mode_rw_writes_inside_the_partition() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", MBR);
    lab.mount("disk.img,mode=ro,partitions");
    let opened = File::options().write(true).open(lab.path("m/disk.img.p1"));
    assert_eq!(errno_of(opened), libc::EROFS);
    lab.umount();
    lab.sh("cp disk.img rw.img");
    lab.mount("rw.img,mode=rw,partitions");
    let part = lab.open("m/rw.img.p1");
    let (reader, _) = cached(&lab, "m/rw.img", MIB);
    part.write_all_at(&[7; 4096], 0).unwrap();
    assert!(read(&reader, MIB, 4096) == [7; 4096]);
    assert_eq!(part.write_at(&[8; 10], 4 * MIB - 4).unwrap(), 4);
    for size in [0, 1, 5 * MIB] {
        assert_eq!(errno_of(part.set_len(size)), libc::EINVAL);
    }
    part.sync_all().unwrap();
    drop((part, reader));
    lab.umount();
    let mut want = fs::read(lab.path("disk.img")).unwrap();
    want[MIB as usize..MIB as usize + 4096].fill(7);
    want[5 * MIB as usize - 4..5 * MIB as usize].fill(8);
    assert!(fs::read(lab.path("rw.img")).unwrap() == want);
    // A device with large sectors.
    lab.file_with_holes("big.img", 48 * MIB);
    let device = lab.loop_device("big.img", "-b 4096");
    lab.sh(&format!("parted -s {device} {MBR}; sync"));
    lab.mount(&format!("d={device},mode=rw,partitions"));
    assert_eq!(fs::metadata(lab.path("m/d.p2")).unwrap().len(), 15 * MIB);
    lab.umount();
}

#[test]
fn mount_without_usable_partitions_fails_and_leaves_nothing() {
    let mut lab = Lab::new();
    lab.base("bare.img", 4 * MIB);
    partitioned(&mut lab, "disk.img", MBR);
    partitioned(&mut lab, "gpt.img", GPT);
    lab.sh("cp gpt.img bad.img
            dd if=/dev/zero of=bad.img bs=512 seek=1 count=1 conv=notrunc status=none
            truncate -s 45M bad.img; cp disk.img disk.img.p2");
    for (words, why) in [
        (
            "bare.img,overlay=ov,partitions",
            "bare.img: has no partition table: leave out partitions",
        ),
        ("bad.img,overlay=ov,partitions", "bad.img: has a damaged partition table ("),
        ("bare.img,overlay=st,partitions --store st", "has no partition table"),
        ("disk.img,partitions disk.img.p2", "disk.img.p2: that is the name of partition 2"),
        ("disk.img.p2 disk.img,partitions", "disk.img: partition 2 is shown as 'disk.img.p2'"),
    ] {
        let line = lab.refused(1, &format!("mount m {words}"));
        assert!(line.contains(why), "{line}");
        assert!(!lab.path("ov").exists());
        assert!(
            !lab.path("st/disks").is_dir()
                || fs::read_dir(lab.path("st/disks")).unwrap().next().is_none()
        );
    }
    for (words, why) in [
        ("s=stream:1M,to=measure:,partitions", "'partitions' is not for streams"),
        ("disk.img,overlay=ov,reflink,partitions", "'partitions' is not for reflink"),
        ("disk.img,partitions --cache writeback", "does not go with --cache writeback"),
    ] {
        let line = lab.refused(2, &format!("mount m {words}"));
        assert!(line.contains(why), "{line}");
    }
    let long = "x".repeat(254);
    let line = lab.refused(1, &format!("mount m {long}=disk.img,partitions"));
    assert!(line.contains("partition 1 would have too long a name"), "{line}");
    lab.mount("disk.img.p2 --cache writeback");
    let line = lab.refused(1, "add m disk.img,partitions");
    assert!(line.contains("does not go with --cache writeback"), "{line}");
    lab.umount();
    lab.mount("disk.img.p2");
    let line = lab.refused(1, "add m disk.img,partitions,overlay=ov");
    assert!(
        line.contains("partition 2 is shown as 'disk.img.p2', and so is another disk"),
        "{line}"
    );
    lab.ok("remove m/disk.img.p2");
    lab.ok("add m disk.img,partitions");
    let line = lab.refused(1, "add m disk.img.p2");
    assert!(line.contains("there is a disk 'disk.img.p2' in the mount already"), "{line}");
}

#[test]
fn partition_table_written_in_a_mount_takes_effect_at_the_next_mount() {
    let mut lab = Lab::new();
    let said = lab.mount("b=blank:48M,overlay=ov,partitions");
    assert!(
        said.contains("b: has no partitions yet: those made now are shown at the next"),
        "{said}"
    );
    lab.sh("parted -s m/b mklabel msdos mkpart primary 1MiB 5MiB");
    assert_eq!(entries(&lab), ["b"]);
    lab.umount();
    let said = lab.mount("b=blank:48M,overlay=ov,partitions");
    assert!(said.contains("b: partitions are shown as b.p1 (4 MiB)"), "{said}");
    assert_eq!(entries(&lab), ["b", "b.p1"]);
    // A partition that ends past the present size of the disk.
    lab.umount();
    lab.mount("b=blank:48M,overlay=ov");
    lab.open("m/b").set_len(3 * MIB).unwrap();
    lab.umount();
    let said = lab.mount("b=blank:48M,overlay=ov,partitions");
    assert!(said.contains("b: partition 1 ends past the end of the disk"), "{said}");
    assert_eq!(fs::metadata(lab.path("m/b.p1")).unwrap().len(), 2 * MIB);
    lab.umount();
    // The table is read through the disk: here the overlay has one and the base has none.
    lab.base("bare.img", 48 * MIB);
    lab.mount("c=bare.img,overlay=oc");
    lab.sh("parted -s m/c mklabel gpt mkpart a 1MiB 5MiB");
    lab.umount();
    lab.mount("c=bare.img,overlay=oc,partitions");
    assert_eq!(entries(&lab), ["c", "c.p1"]);
}

#[test]
fn partitions_follow_the_name_of_a_disk_in_a_store() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", MBR);
    let words = "--store st d=disk.img,overlay=st,partitions";
    lab.mount(words);
    assert_eq!(entries(&lab), ["d", "d.p1", "d.p2", "d.p5"]);
    lab.open("m/d.p1").write_all_at(b"mine", 0).unwrap();
    let path = |name: &str| lab.path(&format!("m/{name}"));
    assert_eq!(errno_of(fs::remove_file(path("d.p1"))), libc::EPERM);
    assert_eq!(errno_of(fs::rename(path("d.p1"), path("x"))), libc::EPERM);
    File::create(path("y")).unwrap().write_all(b"y").unwrap();
    assert_eq!(errno_of(fs::rename(path("y"), path("d.p1"))), libc::EPERM);
    assert_eq!(errno_of(File::create_new(path("d.p1"))), libc::EEXIST);
    let line = lab.refused(1, "clone m/y d.p2");
    assert!(line.contains("there is a disk 'd.p2' already"), "{line}");
    File::create(path("e.p5")).unwrap();
    assert_eq!(errno_of(fs::rename(path("d"), path("e"))), libc::EEXIST);
    fs::remove_file(path("e.p5")).unwrap();
    fs::rename(path("d"), path("e")).unwrap();
    assert_eq!(entries(&lab), ["e", "e.p1", "e.p2", "e.p5", "y"]);
    assert!(!path("d.p1").exists());
    assert_eq!(read(&lab.open_ro("m/e.p1"), 0, 4), b"mine");
    fs::rename(path("e"), path("d")).unwrap();
    lab.umount();
    // The disk exists already; the key presents its partitions again, read through its overlay.
    let said = lab.mount(words);
    assert!(said.contains("d: partitions are shown as d.p1 (4 MiB)"), "{said}");
    let part = lab.open("m/d.p1");
    assert_eq!(read(&part, 0, 4), b"mine");
    fs::remove_file(path("d")).unwrap();
    assert_eq!(entries(&lab), ["y"]);
    part.write_all_at(b"late", 4).unwrap();
    assert_eq!(read(&part, 0, 8), b"minelate");
    drop(part);
    wait_until("the disk goes with its last handle", || {
        fs::read_dir(lab.path("st/disks")).unwrap().count() == 1
    });
    lab.umount();
    lab.mount("--store st");
    assert_eq!(entries(&lab), ["y"]);
}

/// An operation through one of the files: 0 is the disk, the others are its partitions.
#[derive(Clone, Debug)]
enum Op {
    Write { file: usize, at: u64, len: u64, fill: u8 },
    Punch { file: usize, at: u64, len: u64 },
    Zero { file: usize, at: u64, len: u64 },
    Copy { from: usize, at: u64, len: u64, to: usize, offset: u64 },
    Empty { file: usize },
    Sync { file: usize },
    Reopen { file: usize },
}

fn op() -> impl Strategy<Value = Op> {
    let file = || 0..4_usize;
    let at = || prop_oneof![(0..40_u64).prop_map(|block| block * 4096), 0..200_000_u64];
    let len = || prop_oneof![1..600_u64, Just(4096), 1..70_000_u64];
    prop_oneof![
        8 => (file(), at(), len(), 1..=255_u8)
            .prop_map(|(file, at, len, fill)| Op::Write { file, at, len, fill }),
        2 => (file(), at(), len()).prop_map(|(file, at, len)| Op::Punch { file, at, len }),
        2 => (file(), at(), len()).prop_map(|(file, at, len)| Op::Zero { file, at, len }),
        3 => (file(), at(), len(), file(), at())
            .prop_map(|(from, at, len, to, offset)| Op::Copy { from, at, len, to, offset }),
        1 => (1..4_usize).prop_map(|file| Op::Empty { file }),
        1 => file().prop_map(|file| Op::Sync { file }),
        2 => file().prop_map(|file| Op::Reopen { file }),
    ]
}

/// The files of a small disk, and the array of bytes that each file presents a range of.
struct Model {
    names: [&'static str; 4],
    ranges: [Range<u64>; 4],
    writers: Vec<File>,
    readers: Vec<File>,
    maps: Vec<Mapped>,
    bytes: Vec<u8>,
    /// Ends after the files are closed.
    lab: Lab,
}

impl Model {
    fn new() -> Self {
        let mut lab = Lab::new();
        lab.base("b.img", 400_000);
        lab.sh("cp b.img t.img
                parted -s -a none t.img unit s mklabel msdos mkpart primary 8 107 \
                    mkpart primary 108 308 mkpart primary 400 699");
        lab.watch("t.img");
        lab.mount("d=t.img,overlay=ov,partitions");
        let names = ["m/d", "m/d.p1", "m/d.p2", "m/d.p3"];
        let sectors = |range: Range<u64>| range.start * 512..range.end * 512;
        let ranges = [0..400_000, sectors(8..108), sectors(108..309), sectors(400..700)];
        let bytes = fs::read(lab.path("t.img")).unwrap();
        let open = |write: bool| -> Vec<File> {
            names
                .iter()
                .map(|name| if write { lab.open(name) } else { lab.open_ro(name) })
                .collect()
        };
        let (writers, readers) = (open(true), open(false));
        let map = |(file, range): (&File, &Range<u64>)| {
            Mapped::new(file, 0, (range.end - range.start) as usize, Map::Read)
        };
        let maps = readers.iter().zip(&ranges).map(map).collect();
        Self { lab, names, ranges, writers, readers, maps, bytes }
    }

    /// Returns the range of the disk that `len` bytes at `at` of a file cover, clamped to the
    /// file's end.
    fn place(&self, file: usize, at: u64, len: u64) -> Range<u64> {
        let Range { start, end } = self.ranges[file];
        (start + at).min(end)..(start + at + len).min(end)
    }

    fn fill(&mut self, place: Range<u64>, bytes: &[u8]) {
        self.bytes[place.start as usize..place.end as usize].copy_from_slice(bytes);
    }

    fn perform(&mut self, op: &Op) {
        match *op {
            Op::Write { file, at, len, fill } => {
                let place = self.place(file, at, len);
                let bytes: Vec<u8> = place.clone().map(|at| fill ^ (at % 251) as u8).collect();
                if !bytes.is_empty() {
                    self.writers[file].write_all_at(&bytes, at).unwrap();
                }
                self.fill(place, &bytes);
            }
            Op::Punch { file, at, len } | Op::Zero { file, at, len } => {
                let flags = if matches!(op, Op::Punch { .. }) { PUNCH } else { ZERO_KEEP };
                let place = self.place(file, at, len);
                if !place.is_empty() {
                    fallocate(&self.writers[file], flags, at..at + len).unwrap();
                }
                self.fill(place.clone(), &vec![0; (place.end - place.start) as usize]);
            }
            Op::Copy { from, at, len, to, offset } => {
                let source = self.place(from, at, len);
                let target = self.place(to, offset, source.end - source.start);
                let source = source.start..source.start + (target.end - target.start);
                if target.is_empty() || source.start < target.end && target.start < source.end {
                    return;
                }
                let len = target.end - target.start;
                let (source_file, target_file) = (&self.writers[from], &self.writers[to]);
                assert_eq!(copy_range(source_file, at, target_file, offset, len).unwrap(), len);
                let bytes = self.bytes[source.start as usize..source.end as usize].to_vec();
                self.fill(target, &bytes);
            }
            Op::Empty { file } => {
                self.writers[file].set_len(0).unwrap();
                let place = self.ranges[file].clone();
                self.fill(place.clone(), &vec![0; (place.end - place.start) as usize]);
            }
            Op::Sync { file } => self.writers[file].sync_all().unwrap(),
            Op::Reopen { file } => self.readers[file] = self.lab.open_ro(self.names[file]),
        }
    }

    /// Checks that every file presents its bytes, read and mapped.
    fn check(&self, op: &Op) {
        for (file, range) in self.ranges.iter().enumerate() {
            let want = &self.bytes[range.start as usize..range.end as usize];
            let by_read = read(&self.readers[file], 0, want.len() as u64);
            for (how, found) in [("read", by_read), ("mapped", self.maps[file].bytes())] {
                let wrong = want.iter().zip(&found).position(|(one, two)| one != two);
                assert_eq!(wrong, None, "{op:?}: {} differs, {how}", self.names[file]);
            }
        }
        if matches!(op, Op::Sync { .. }) {
            self.check_holes(op);
        }
    }

    /// Checks that no hole of any file hides data. The SEEK_DATA calls make the kernel drop cached
    /// pages.
    fn check_holes(&self, op: &Op) {
        for (file, range) in self.ranges.iter().enumerate() {
            let want = &self.bytes[range.start as usize..range.end as usize];
            let mut at = 0;
            for run in data_runs(&self.readers[file]) {
                assert!(want[at as usize..run.start as usize].iter().all(|byte| *byte == 0));
                at = run.end;
            }
            assert!(want[at as usize..].iter().all(|byte| *byte == 0), "{op:?}: a hole hides data");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 60, failure_persistence: None,
                                        ..ProptestConfig::default() })]

    #[test]
    fn disk_and_its_partitions_are_one_array_of_bytes(ops in prop::collection::vec(op(), 1..60)) {
        let mut model = Model::new();
        for op in &ops {
            model.perform(op);
            model.check(op);
        }
        model.check_holes(&Op::Sync { file: 0 });
    }
}

#[test]
fn process_with_an_open_partition_is_named_as_a_user_of_its_disk() {
    let lab = mounted();
    let mut command = lab.command("sh");
    let sleeper = Running(command.args(["-c", "exec sleep 100 <m/disk.img.p1"]).spawn().unwrap());
    wait_until("it has the partition", || lab.disk("disk.img")["openers"] == 1);
    let line = lab.refused(1, "remove --timeout 300ms m/disk.img");
    assert!(line.contains(&format!("sleep (pid {}) has disk.img.p1", sleeper.pid())), "{line}");
    drop(sleeper);
    lab.umount();
}
