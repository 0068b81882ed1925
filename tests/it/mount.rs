//! Every operation of a mount, called directly as a program does, without tools in between.

use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant, UNIX_EPOCH};

use crate::common::mount::*;
use crate::common::strace::Strace;
use crate::common::written;
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::process::Signal;

/// Mounts a temporary disk `d` over a base of 48 MiB.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img");
    lab
}

#[test]
fn attributes_survive_a_remount() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let words = "d=base.img,overlay=ov";
    lab.mount(words);
    let path = lab.path("m/d");
    let first = fs::metadata(&path).unwrap();
    assert_eq!(first.len(), 8 * MIB);
    assert_eq!(first.nlink(), 1);
    let time = UNIX_EPOCH + Duration::new(1_000_000_000, 123_456_789);
    fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(1234), Some(4321)).unwrap();
    let file = lab.open("m/d");
    file.set_len(9 * MIB + 1).unwrap();
    file.set_times(FileTimes::new().set_modified(time)).unwrap();
    drop(file);
    let before = fs::metadata(&path).unwrap();
    assert_eq!((before.uid(), before.gid(), before.mode() & 0o7777), (1234, 4321, 0o640));
    assert_eq!((before.len(), before.modified().unwrap()), (9 * MIB + 1, time));
    lab.umount();
    lab.mount(words);
    let after = fs::metadata(&path).unwrap();
    assert_eq!((after.uid(), after.gid(), after.mode()), (1234, 4321, before.mode()));
    assert_eq!((after.len(), after.modified().unwrap()), (9 * MIB + 1, time));
    assert_eq!(after.ino(), first.ino());
}

#[test]
fn times_before_1970_are_kept_to_the_nanosecond() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.sh("truncate -s 1M rw.img");
    let words = "d=base.img,overlay=ov w=rw.img,mode=rw";
    lab.mount(words);
    // stat(2) and utimensat(2): seconds may be negative, nanoseconds may not.
    let times =
        [(-2, 500_000_000), (-1, 750_000_000), (-1, 0), (-86_400, 1), (0, 0), (3, 999_999_999)];
    for name in ["m/d", "m/w"] {
        for (secs, nanos) in times {
            let time = rustix::fs::Timespec { tv_sec: secs, tv_nsec: nanos };
            let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
            rustix::fs::utimensat(
                rustix::fs::CWD,
                lab.path(name),
                &times,
                rustix::fs::AtFlags::empty(),
            )
            .unwrap();
            let found = fs::metadata(lab.path(name)).unwrap();
            assert_eq!((found.mtime(), found.mtime_nsec()), (secs, nanos), "{name}");
            assert_eq!((found.atime(), found.atime_nsec()), (secs, nanos), "{name}");
        }
    }
    lab.sh("touch -d '1969-12-31 23:59:58.25 UTC' m/d");
    lab.umount();
    lab.mount(words);
    assert_eq!(lab.sh("stat -c %.Y m/d"), "-1.750000000\n");
}

#[test]
fn st_blksize_is_no_coarser_than_the_holes_of_a_disk() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.host("host", "ext4 -b 1024", 16 * MIB);
    lab.sh("cp base.img host/fine.img; truncate -s 8M mbr.img");
    // One partition of 1000 sectors, starting at sector 63.
    let mut entry = [0; 66];
    (entry[4], entry[8]) = (0x83, 63);
    entry[64..].copy_from_slice(&[0x55, 0xAA]);
    entry[12..14].copy_from_slice(&1000u16.to_le_bytes());
    lab.open("mbr.img").write_all_at(&entry, 446).unwrap();
    lab.mount(
        "fine=base.img,block=512 usual=base.img blank=blank:8M,block=2M coarse=base.img,block=64K \
         host=host/fine.img,mode=ro odd=base.img,offset=32256 part=mbr.img,partitions",
    );
    let unit = |name: &str| fs::metadata(lab.path("m").join(name)).unwrap().blksize();
    let units = ["fine", "usual", "blank", "coarse", "host", "odd", "part", "part.p1"].map(unit);
    assert_eq!(units, [512, 4096, 2 << 20, 4096, 1024, 512, 4096, 512]);
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn attributes_survive_a_killed_daemon() {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=ov");
    let path = lab.path("m/d");
    fs::set_permissions(&path, Permissions::from_mode(0o604)).unwrap();
    lab.open("m/d").set_len(5 * MIB + 5).unwrap();
    let before = fs::metadata(&path).unwrap();
    lab.kill();
    lab.mount("d=blank:8M,overlay=ov");
    let after = fs::metadata(&path).unwrap();
    assert_eq!(
        (after.mode(), after.len(), after.ino()),
        (before.mode(), before.len(), before.ino())
    );
}

#[test]
fn disk_keys_set_owner_and_mode() {
    let lab = Lab::new();
    lab.mount("d=blank:1M,uid=7,gid=8,perm=0444");
    let found = fs::metadata(lab.path("m/d")).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777), (7, 8, 0o444));
}

#[test]
fn listing_shows_disks_but_not_the_control_directory() {
    let lab = Lab::new();
    lab.mount("b=blank:1M a=blank:2M c.img=blank:3M");
    let mut names: Vec<_> = fs::read_dir(lab.path("m"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(names, ["a", "b", "c.img"]);
    assert!(lab.path("m/.cowslip/status").is_file());
    assert_eq!(
        lab.sh("ls m/.cowslip; ls m/.cowslip/a"),
        "a\nb\nc.img\nctl\nlog\nstatus\nctl\nmap\nsnapshots\nstatus\n"
    );
    assert_eq!(errno_of(fs::metadata(lab.path("m/nothing"))), libc::ENOENT);
    for (name, size) in [("a", 2), ("b", 1), ("c.img", 3)] {
        assert_eq!(fs::metadata(lab.path("m").join(name)).unwrap().len(), size * MIB);
    }
}

#[test]
fn o_trunc_discards_all_data_of_a_disk() {
    let lab = lab();
    let path = lab.path("m/d");
    let file = OpenOptions::new().write(true).truncate(true).open(&path).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 0);
    file.set_len(48 * MIB).unwrap();
    drop(file);
    let file = lab.open_ro("m/d");
    assert_eq!(data_runs(&file), []);
    assert!(read(&file, 0, MIB).iter().all(|byte| *byte == 0));
    drop(file);
}

#[test]
fn o_append_writes_at_the_end_of_the_disk() {
    let lab = lab();
    let mut file = OpenOptions::new().append(true).open(lab.path("m/d")).unwrap();
    file.write_all(b"one").unwrap();
    file.write_all(b"two").unwrap();
    assert_eq!(file.metadata().unwrap().len(), 48 * MIB + 6);
    assert_eq!(read(&lab.open_ro("m/d"), 48 * MIB, 6), b"onetwo");
    drop(file);
}

#[test]
fn direct_io_works_at_every_offset() {
    let lab = lab();
    let file = lab.open_with("m/d", libc::O_DIRECT);
    let bytes = Aligned::of(&noise(8192, 9));
    for offset in [0, 512, 4096, 10 * MIB + 512, 48 * MIB - 8192, 48 * MIB - 512] {
        file.write_all_at(bytes.bytes(), offset).unwrap();
        let mut back = Aligned::of(&[0; 8192]);
        file.read_exact_at(back.bytes_mut(), offset).unwrap();
        assert!(back.bytes() == bytes.bytes(), "{offset}");
        assert!(read(&lab.open_ro("m/d"), offset, 8192) == bytes.bytes(), "{offset}");
    }
    drop(file);
}

/// Checks that a write to a file opened with `flag` adds the records of a sync to the log before
/// the write returns.
fn a_synced_write_is_vouched(flag: i32) {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=ov");
    let file = lab.open_with("m/d", flag);
    let log = layer_dir(&lab.path("ov")).join("log");
    let records = || written(&fs::read(&log).unwrap()) / 32;
    for block in 0..4 {
        let before = records();
        file.write_all_at(&noise(4096, block), block * 4096).unwrap();
        // A Set and a Vouch record; more when the file's times are recorded.
        assert!(records() >= before + 2, "no sync in the write");
    }
    drop(file);
}

#[test]
fn o_dsync_write_is_durable_when_it_returns() {
    a_synced_write_is_vouched(libc::O_DSYNC);
}

#[test]
fn o_sync_write_is_durable_when_it_returns() {
    a_synced_write_is_vouched(libc::O_SYNC);
}

#[test]
fn reads_stop_at_the_end_of_the_disk() {
    let lab = lab();
    for file in [lab.open_ro("m/d"), lab.open("m/d")] {
        let mut buffer = [0; 100];
        assert_eq!(file.read_at(&mut buffer, 48 * MIB - 10).unwrap(), 10);
        assert_eq!(file.read_at(&mut buffer, 48 * MIB).unwrap(), 0);
        assert_eq!(file.read_at(&mut buffer, 60 * MIB).unwrap(), 0);
    }
}

#[test]
fn write_past_the_end_extends_the_disk_with_zeros() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(b"far", 50 * MIB + 7).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 50 * MIB + 10);
    assert!(read(&file, 48 * MIB, 2 * MIB + 7).iter().all(|byte| *byte == 0));
    assert_eq!(read(&file, 50 * MIB + 7, 3), b"far");
    assert_eq!(
        read(&lab.open_ro("m/d"), 48 * MIB - 5000, 5000),
        read(&lab.open_ro("base.img"), 48 * MIB - 5000, 5000)
    );
    drop(file);
}

#[test]
fn fsync_and_fdatasync_succeed_on_disks_and_directory() {
    let lab = lab();
    let file = lab.open("m/d");
    file.write_all_at(b"x", 5).unwrap();
    file.sync_all().unwrap();
    file.sync_data().unwrap();
    File::open(lab.path("m")).unwrap().sync_all().unwrap();
    drop(file);
}

#[test]
fn lseek_finds_data_and_holes_and_ends_with_enxio() {
    let lab = Lab::new();
    lab.mount("d=blank:1M");
    let file = lab.open("m/d");
    file.write_all_at(&[1; 4096], 64 * KIB).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(64 * KIB));
    assert_eq!(seek(&file, SeekFrom::Hole(0)), Ok(0));
    assert_eq!(seek(&file, SeekFrom::Data(64 * KIB + 5)), Ok(64 * KIB + 5));
    assert_eq!(seek(&file, SeekFrom::Hole(64 * KIB)), Ok(68 * KIB));
    assert_eq!(seek(&file, SeekFrom::Data(68 * KIB)), Err(libc::ENXIO));
    assert_eq!(seek(&file, SeekFrom::Hole(MIB - 1)), Ok(MIB - 1));
    for at in [MIB, MIB + 1, 5 * TIB] {
        assert_eq!(seek(&file, SeekFrom::Data(at)), Err(libc::ENXIO), "{at}");
        assert_eq!(seek(&file, SeekFrom::Hole(at)), Err(libc::ENXIO), "{at}");
    }
    file.write_all_at(&[1], MIB - 1).unwrap();
    assert_eq!(seek(&file, SeekFrom::Hole(MIB - 1)), Ok(MIB));
    assert_eq!(seek(&file, SeekFrom::End(0)), Ok(MIB));
    drop(file);
}

#[test]
fn fallocate_zeroes_and_punches_at_any_offset() {
    let lab = lab();
    let file = lab.open("m/d");
    let mut model = read(&file, 0, 48 * MIB);
    let ranges =
        [0..1, 5..4097, 4096..8192, 100..200, 3 * MIB + 1..5 * MIB - 1, 48 * MIB - 5001..48 * MIB];
    for (index, range) in ranges.into_iter().enumerate() {
        for (how, flags) in [PUNCH, ZERO, ZERO_KEEP].into_iter().enumerate() {
            let shift = (index + how) as u64 % 3 * 1000;
            let range = range.start.saturating_sub(shift)
                ..range.end - shift.min(range.end - range.start - 1).min(range.start);
            model[range.start as usize..range.end as usize].fill(0);
            fallocate(&file, flags, range.clone()).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 48 * MIB);
            let (start, end) = (range.start.saturating_sub(5000), (range.end + 5000).min(48 * MIB));
            let found = read(&file, start, end - start);
            assert!(found == model[start as usize..end as usize], "{flags:?} {range:?}");
        }
    }
    assert!(read(&lab.open_ro("m/d"), 0, 48 * MIB) == model);
    drop(file);
}

#[test]
fn fallocate_extends_the_disk_only_without_keep_size() {
    let lab = lab();
    let file = lab.open("m/d");
    let size = || file.metadata().unwrap().len();
    fallocate(&file, FallocateFlags::KEEP_SIZE, 47 * MIB..60 * MIB).unwrap();
    assert_eq!(size(), 48 * MIB);
    fallocate(&file, ZERO_KEEP, 48 * MIB - 100..60 * MIB).unwrap();
    assert_eq!(size(), 48 * MIB);
    fallocate(&file, PUNCH, 48 * MIB - 50..60 * MIB).unwrap();
    assert_eq!(size(), 48 * MIB);
    fallocate(&file, FallocateFlags::empty(), 50 * MIB..51 * MIB + 3).unwrap();
    assert_eq!(size(), 51 * MIB + 3);
    fallocate(&file, ZERO, 51 * MIB..52 * MIB + 5).unwrap();
    assert_eq!(size(), 52 * MIB + 5);
    assert!(read(&file, 48 * MIB - 100, 4 * MIB).iter().all(|byte| *byte == 0));
    let bad = FallocateFlags::COLLAPSE_RANGE;
    assert_eq!(errno_of(fallocate(&file, bad, 0..4096)), libc::EOPNOTSUPP);
    drop(file);
}

#[test]
fn fallocate_keeps_the_data_it_covers() {
    let lab = lab();
    let file = lab.open("m/d");
    fallocate(&file, FallocateFlags::empty(), 0..48 * MIB).unwrap();
    lab.sh("cmp m/d base.img");
    drop(file);
}

#[test]
fn copy_file_range_copies_data_and_holes_between_disks() {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img e=base.img");
    let (from, to) = (lab.open_ro("m/d"), lab.open("m/e"));
    to.write_all_at(&noise(48 * MIB, 4), 0).unwrap();
    let mut model = read(&to, 0, 48 * MIB);
    let source = read(&from, 0, 48 * MIB);
    let pieces = [(100, 5000, 30 * MIB), (0, 0, 20 * MIB + 512), (MIB + 3, 40 * MIB, 7 * MIB + 1)];
    for (at, offset, len) in pieces {
        assert_eq!(copy_range(&from, at, &to, offset, len).unwrap(), len);
        let piece = &source[at as usize..(at + len) as usize];
        model[offset as usize..(offset + len) as usize].copy_from_slice(piece);
    }
    assert!(read(&to, 0, 48 * MIB) == model);
    // A copy stops at the end of the source, and grows the target when it ends past the target's
    // end.
    assert_eq!(copy_range(&from, 48 * MIB - 10, &to, 60 * MIB, 100).unwrap(), 10);
    assert_eq!(to.metadata().unwrap().len(), 60 * MIB + 10);
    drop((from, to));
}

#[test]
fn copy_file_range_works_within_a_disk() {
    let lab = lab();
    let file = lab.open("m/d");
    let source = read(&file, 0, 4 * MIB);
    assert_eq!(copy_range(&file, 0, &file, 33 * MIB + 77, 4 * MIB).unwrap(), 4 * MIB);
    assert!(read(&file, 33 * MIB + 77, 4 * MIB) == source);
    drop(file);
}

#[test]
fn statfs_reports_the_host_file_system() {
    let lab = lab();
    let found = rustix::fs::statvfs(lab.path("m/d")).unwrap();
    assert!(
        found.f_bsize > 0 && found.f_blocks > 0 && found.f_bavail > 0 && found.f_namemax == 255
    );
    let total: u64 = lab.sh("stat -f -c %b /var/tmp").trim().parse().unwrap();
    assert_eq!(found.f_blocks, total * 4096 / found.f_frsize);
}

#[test]
fn writes_update_mtime_and_ctime() {
    let lab = lab();
    let file = lab.open("m/d");
    let times = || {
        let found = fs::metadata(lab.path("m/d")).unwrap();
        ((found.mtime(), found.mtime_nsec()), (found.ctime(), found.ctime_nsec()))
    };
    let start = times();
    let moves = |what: &str, change: &dyn Fn()| {
        let before = times();
        thread::sleep(Duration::from_millis(12));
        change();
        let after = times();
        assert!(after.0 > before.0 && after.1 > before.1, "{what}: {before:?} {after:?}");
    };
    moves("write", &|| file.write_all_at(b"x", 0).unwrap());
    moves("overwrite", &|| file.write_all_at(b"y", 0).unwrap());
    moves("punch", &|| fallocate(&file, PUNCH, 0..8192).unwrap());
    moves("truncate", &|| file.set_len(5000).unwrap());
    assert!(times() > start);
    drop(file);
}

#[test]
fn file_locks_are_handled_by_the_kernel() {
    let lab = lab();
    let (one, two) = (lab.open("m/d"), lab.open("m/d"));
    one.lock().unwrap();
    assert!(two.try_lock().is_err());
    one.unlock().unwrap();
    two.try_lock().unwrap();
    // An OFD lock, as qemu takes.
    let lock = |file: &File, kind: i32| {
        // SAFETY: flock is plain data, and zero is a valid value of every field.
        let mut wanted: libc::flock = unsafe { std::mem::zeroed() };
        (wanted.l_type, wanted.l_start, wanted.l_len) = (kind as i16, 100, 1);
        // SAFETY: F_OFD_SETLK reads one flock, which outlives the call.
        unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const wanted) }
    };
    assert_eq!(lock(&one, libc::F_WRLCK), 0);
    assert_eq!(lock(&two, libc::F_RDLCK), -1);
    assert_eq!(lock(&one, libc::F_UNLCK), 0);
    assert_eq!(lock(&two, libc::F_RDLCK), 0);
    drop((one, two));
}

#[test]
fn cached_reader_sees_every_write_of_another_handle() {
    let lab = lab();
    let (reader, writer) = (lab.open_ro("m/d"), lab.open("m/d"));
    // SAFETY: a new read-only mapping of a file that stays open until the end of the test.
    let map = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            65536,
            libc::PROT_READ,
            libc::MAP_SHARED,
            reader.as_raw_fd(),
            0,
        )
    };
    assert_ne!(map, libc::MAP_FAILED);
    for round in 0..200u64 {
        let offset = round * 337 % 65000;
        let bytes = noise(300, round);
        writer.write_all_at(&bytes, offset).unwrap();
        assert_eq!(read(&reader, offset, 300), bytes, "pread, round {round}");
        for (index, byte) in
            bytes.iter().enumerate().filter(|(at, _)| *at + (offset as usize) < 65536)
        {
            // SAFETY: inside the mapping; volatile, since another handle writes to the file.
            let seen = unsafe { map.cast::<u8>().add(offset as usize + index).read_volatile() };
            assert_eq!(seen, *byte, "mmap, round {round}");
        }
    }
    // SAFETY: unmaps the mapping created above, which has no users left.
    assert_eq!(unsafe { libc::munmap(map, 65536) }, 0);
    drop((reader, writer));
}

#[test]
fn cached_reader_sees_punches_truncations_and_copies() {
    let lab = lab();
    let (reader, writer) = (lab.open_ro("m/d"), lab.open("m/d"));
    let warm = || read(&reader, 0, 64 * KIB);
    warm();
    fallocate(&writer, PUNCH, 4096..8192).unwrap();
    assert!(warm()[4096..8192].iter().all(|byte| *byte == 0));
    fallocate(&writer, ZERO, 100..200).unwrap();
    assert!(warm()[100..200].iter().all(|byte| *byte == 0));
    copy_range(&writer, MIB, &writer, 20 * KIB, 4096).unwrap();
    assert_eq!(warm()[20 * 1024..24 * 1024], read(&writer, MIB, 4096));
    writer.set_len(10_000).unwrap();
    writer.set_len(MIB).unwrap();
    assert!(warm()[10_000..].iter().all(|byte| *byte == 0));
    drop((reader, writer));
}

#[test]
fn parallel_seeks_over_a_dirty_mapping_do_not_deadlock() {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img,block=64K");
    let file = lab.open("m/d");
    let len = 16 * MIB as usize;
    // SAFETY: a new mapping of a file that stays open until the end of the test.
    let map = unsafe {
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        libc::mmap(
            std::ptr::null_mut(),
            len,
            prot,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            24 * MIB as i64,
        )
    };
    assert_ne!(map, libc::MAP_FAILED);
    let start = Instant::now();
    for round in 0..4 {
        for page in (0..len).step_by(8192) {
            // SAFETY: inside the mapping.
            unsafe { map.cast::<u8>().add(page).write_volatile(round + 1) };
        }
        // Every partial first write of a block reads from the base; these reads must not hit the
        // cache.
        lab.sh("sync base.img; dd if=base.img iflag=nocache count=0 status=none");
        thread::scope(|scope| {
            for _ in 0..24 {
                scope.spawn(|| {
                    let file = lab.open_ro("m/d");
                    assert_eq!(seek(&file, SeekFrom::Data(24 * MIB)), Ok(24 * MIB));
                });
            }
        });
    }
    assert!(start.elapsed() < WAIT_TIMEOUT, "{:?}", start.elapsed());
    // SAFETY: unmaps the mapping created above, which has no users left.
    assert_eq!(unsafe { libc::munmap(map, len) }, 0);
    drop(file);
}

#[test]
fn disks_have_the_exact_size_of_an_unaligned_base() {
    let mut lab = Lab::new();
    lab.base("odd.img", MIB + 1234);
    lab.base("tiny.img", 100);
    fs::write(lab.path("empty.img"), "").unwrap();
    lab.mount("odd=odd.img tiny=tiny.img empty=empty.img one=blank:1 wide=tiny.img,block=2M");
    for (name, base) in
        [("odd", "odd.img"), ("tiny", "tiny.img"), ("empty", "empty.img"), ("wide", "tiny.img")]
    {
        lab.sh(&format!("cmp m/{name} {base}"));
        let file = lab.open(&format!("m/{name}"));
        let size = file.metadata().unwrap().len();
        file.write_all_at(b"end", size).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size + 3);
        assert_eq!(read(&file, size, 3), b"end");
        lab.sh(&format!("cmp -n {size} m/{name} {base}"));
    }
    assert_eq!(fs::metadata(lab.path("m/one")).unwrap().len(), 1);
}

#[test]
fn block_map_does_not_grow_when_it_is_cleared_and_filled_again() {
    let lab = Lab::new();
    lab.mount("big=blank:16G");
    let file = lab.open("m/big");
    let size = 16 * GIB;
    let memory = || {
        let status = fs::read_to_string(format!("/proc/{}/status", lab.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * KIB
    };
    let mut found = Vec::new();
    for way in [PUNCH, ZERO_KEEP].repeat(2) {
        // More positions in each chunk of 256 MiB than the map keeps as a list.
        for at in (0..size).step_by(1020 << 10) {
            file.write_all_at(&[1; 4096], at).unwrap();
        }
        found.push(memory());
        fallocate(&file, way, 0..size).unwrap();
    }
    let (full, last) = (found[1], found[3]);
    assert!(last < full + MIB, "{found:?}");
    drop(file);
}

#[test]
fn disk_of_16_tib_can_be_written_up_to_its_last_byte() {
    let lab = Lab::new();
    lab.mount("big=blank:16T,overlay=ov");
    let file = lab.open("m/big");
    let size = 16 * TIB;
    assert_eq!(file.metadata().unwrap().len(), size);
    for offset in [size - 5, size - 8192, 8 * TIB - 3, 0] {
        file.write_all_at(b"there", offset).unwrap();
    }
    file.sync_all().unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(MIB)), Ok(8 * TIB - 4096));
    assert_eq!(seek(&file, SeekFrom::Data(8 * TIB + 4096)), Ok(size - 8192));
    fallocate(&file, PUNCH, 4096..size - 4096).unwrap();
    assert_eq!(seek(&file, SeekFrom::Data(4096)), Ok(size - 4096));
    drop(file);
    assert!(lab.disk("big")["overlay"]["allocated"].as_u64().unwrap() < MIB);
    lab.umount();
    lab.mount("big=blank:16T,overlay=ov");
    let file = lab.open("m/big");
    assert_eq!(read(&file, size - 5, 5), b"there");
    assert_eq!(read(&file, 0, 5), b"there");
    drop(file);
}

#[test]
fn disks_over_one_base_are_independent() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let names: Vec<String> = (0..20).map(|index| format!("d{index}")).collect();
    let words: Vec<String> = names.iter().map(|name| format!("{name}=base.img")).collect();
    lab.mount(&words.join(" "));
    for (index, name) in names.iter().enumerate() {
        lab.open(&format!("m/{name}")).write_all_at(&[index as u8; 5000], 100).unwrap();
    }
    for (index, name) in names.iter().enumerate() {
        let file = lab.open_ro(&format!("m/{name}"));
        assert_eq!(read(&file, 100, 5000), [index as u8; 5000]);
        assert_eq!(read(&file, 0, 100), read(&lab.open_ro("base.img"), 0, 100));
    }
}

#[test]
fn read_only_disk_rejects_every_change() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount("d=base.img,mode=ro");
    lab.sh("cmp m/d base.img");
    let path = lab.path("m/d");
    assert_eq!(errno_of(OpenOptions::new().write(true).open(&path)), libc::EROFS);
    assert_eq!(errno_of(OpenOptions::new().write(true).truncate(true).open(&path)), libc::EROFS);
    assert_eq!(errno_of(fs::set_permissions(&path, Permissions::from_mode(0o600))), libc::EROFS);
    assert_eq!(data_runs(&lab.open_ro("m/d")), data_runs(&lab.open_ro("base.img")));
}

#[test]
fn read_only_mount_rejects_writes() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount("d=base.img -o ro");
    assert_eq!(errno_of(OpenOptions::new().write(true).open(lab.path("m/d"))), libc::EROFS);
}

#[test]
fn mode_rw_writes_to_the_base() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("cp base.img target.img");
    lab.mount("d=target.img,mode=rw");
    let file = lab.open("m/d");
    file.write_all_at(b"through", MIB - 3).unwrap();
    fallocate(&file, PUNCH, 8192..12288).unwrap();
    fallocate(&file, ZERO, 100..300).unwrap();
    file.sync_all().unwrap();
    let base = lab.open_ro("target.img");
    assert_eq!(read(&base, MIB - 3, 7), b"through");
    assert!(read(&base, 8192, 4096).iter().chain(&read(&base, 100, 200)).all(|byte| *byte == 0));
    lab.sh("cmp m/d target.img");
    drop(file);
    lab.umount();
    lab.sh("! cmp -s base.img target.img");
}

#[test]
fn block_device_can_be_a_base() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let device = lab.loop_device("base.img", "--read-only");
    lab.mount(&format!("d={device} e={device},mode=ro"));
    lab.sh("cmp m/d base.img; cmp m/e base.img");
    lab.open("m/d").write_all_at(&noise(5000, 1), 1000).unwrap();
    assert_eq!(read(&lab.open_ro("m/d"), 1000, 5000), noise(5000, 1));
    lab.sh(&format!("cmp {device} base.img"));
    lab.umount();
    lab.sh(&format!("losetup -d {device}"));
}

#[test]
fn mode_rw_writes_to_a_block_device() {
    let lab = Lab::new();
    lab.sh("truncate -s 4M target.img");
    let device = lab.loop_device("target.img", "");
    lab.mount(&format!("d={device},mode=rw"));
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 1), 4096).unwrap();
    fallocate(&file, PUNCH, 8192..16384).unwrap();
    file.sync_all().unwrap();
    drop(file);
    lab.umount();
    lab.sh(&format!("losetup -d {device}"));
    let target = lab.open_ro("target.img");
    assert_eq!(read(&target, 4096, 4096), noise(MIB, 1)[..4096]);
    assert!(read(&target, 8192, 8192).iter().all(|byte| *byte == 0));
}

#[test]
fn write_past_the_overlay_limit_fails_with_enospc_only() {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img,overlay=ov,limit=1M");
    let file = lab.open("m/d");
    let mut written = 0;
    let error = loop {
        match file.write_all_at(&noise(64 * KIB, 3), written) {
            Ok(()) => written += 64 * KIB,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!((512 * KIB..=MIB).contains(&written), "{written}");
    assert_eq!(read(&file, 0, 64 * KIB), noise(64 * KIB, 3));
    file.sync_all().unwrap();
    // Freed space can be used again.
    fallocate(&file, PUNCH, 0..512 * KIB).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&noise(64 * KIB, 4), 10 * MIB).unwrap();
    assert_eq!(lab.disk("d")["state"], "ok");
    drop(file);
}

#[test]
fn full_host_gives_enospc_until_space_is_free_again() {
    let lab = Lab::new();
    lab.host("host", "ext4", 64 * MIB);
    lab.mount("d=blank:200M,overlay=host/ov");
    let file = lab.open("m/d");
    let mut written = 0;
    let error = loop {
        match file.write_all_at(&noise(256 * KIB, 3), written) {
            Ok(()) => written += 256 * KIB,
            Err(error) => break error,
        }
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    file.sync_all().unwrap();
    assert_eq!(read(&file, written - 256 * KIB, 256 * KIB), noise(256 * KIB, 3));
    // Repeated attempts must use up nothing, not even the last space of the log.
    let (mut refused, mut end) = (0, 200 * MIB);
    while refused < 20_000 {
        match file.write_all_at(&noise(4096, 5), end) {
            Ok(()) => end += 4096,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
                refused += 1;
            }
        }
    }
    file.sync_all().unwrap();
    fallocate(&file, PUNCH, 0..8 * MIB).unwrap();
    file.sync_all().unwrap();
    file.write_all_at(&noise(MIB, 4), 100 * MIB).unwrap();
    file.sync_all().unwrap();
    assert_eq!(lab.disk("d")["state"], "ok");
    drop(file);
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn resize_off_rejects_other_sizes() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount("d=base.img,resize=off");
    let file = lab.open("m/d");
    for size in [1, 4 * MIB - 1, 4 * MIB + 1] {
        assert!(file.set_len(size).is_err(), "{size}");
    }
    assert!(file.write_all_at(b"x", 4 * MIB).is_err());
    file.set_len(4 * MIB).unwrap();
    lab.sh("cmp m/d base.img");
    drop(file);
    // O_TRUNC discards the data and keeps the size.
    let file = OpenOptions::new().write(true).truncate(true).open(lab.path("m/d")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4 * MIB);
    lab.sh("cmp -n 4194304 m/d /dev/zero");
    drop(file);
}

#[test]
fn size_key_shrinks_or_grows_a_disk() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount("less=base.img,size=1M more=base.img,size=6M");
    lab.sh("
        [ $(stat -c %s m/less) = 1048576 ] && cmp -n 1048576 m/less base.img
        [ $(stat -c %s m/more) = 6291456 ] && cmp -n 4194304 m/more base.img
        cmp -i 4194304:0 -n 2097152 m/more /dev/zero
        truncate -s 4M m/less && cmp -n 1048576 m/less base.img
        cmp -i 1048576:0 -n 3145728 m/less /dev/zero
    ");
}

/// Checks the same writes and reads in the cache mode `cache`.
fn a_round_with_cache(cache: &str) {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount(&format!("d=base.img,overlay=ov --cache {cache}"));
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 1), 3 * MIB + 77).unwrap();
    file.write_all_at(b"end", 16 * MIB).unwrap();
    fallocate(&file, PUNCH, 0..100_000).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 16 * MIB + 3);
    assert!(data_runs(&file)[0].start >= 98304);
    file.sync_all().unwrap();
    drop(file);
    lab.sh("cp m/d copy && cmp m/d copy");
    lab.umount();
    lab.mount(&format!("d=base.img,overlay=ov --cache {cache}"));
    lab.sh("cmp m/d copy");
    assert_eq!(read(&lab.open_ro("m/d"), 3 * MIB + 77, MIB), noise(MIB, 1));
}

#[test]
fn cache_none_reads_and_writes_the_same_bytes() {
    a_round_with_cache("none");
}

#[test]
fn cache_writeback_reads_and_writes_the_same_bytes() {
    a_round_with_cache("writeback");
}

#[test]
fn seek_with_cache_writeback_sees_the_latest_write() {
    let lab = Lab::new();
    lab.mount("d=blank:16M --cache writeback");
    let mut file = lab.open("m/d");
    for round in 0..50 {
        let at = round * 3 % 50 * 64 * KIB;
        file.seek(std::io::SeekFrom::Start(at)).unwrap();
        file.write_all(&[1; 4096]).unwrap();
        assert_eq!(seek(&lab.open_ro("m/d"), SeekFrom::Data(at)), Ok(at));
    }
    drop(file);
}

#[test]
fn control_files_can_be_read_while_disks_are_open() {
    let lab = lab();
    let file = lab.open("m/d");
    assert_eq!(lab.disk("d")["openers"], 1);
    let text = lab.sh("cat m/.cowslip/status m/.cowslip/d/status m/.cowslip/log");
    assert!(text.contains("\"schema\":1"), "{text}");
    let map: serde_json::Value = serde_json::from_str(&lab.sh("cat m/.cowslip/d/map")).unwrap();
    assert_eq!(map[0]["start"], 0);
    assert!(
        OpenOptions::new().write(true).open(lab.path("m/.cowslip/status")).is_err()
            || lab.output("sh", &["-c", "echo x > m/.cowslip/status"]).status.code() != Some(0)
    );
    drop(file);
}

#[test]
fn cached_readers_never_see_an_older_write_after_a_newer_one() {
    let lab = Lab::new();
    lab.mount("d=blank:8M");
    let stop = AtomicBool::new(false);
    let writer = lab.open("m/d");
    thread::scope(|scope| {
        for part in 0..4u64 {
            let (lab, stop) = (&lab, &stop);
            scope.spawn(move || {
                let file = lab.open_ro("m/d");
                let mut newest = 0;
                while !stop.load(Ordering::Relaxed) {
                    let byte = read(&file, part * 2 * MIB + 77, 1)[0];
                    assert!(byte >= newest, "{byte} after {newest}");
                    newest = byte;
                }
                assert_eq!(read(&file, part * 2 * MIB + 77, 1), [250]);
            });
        }
        for round in 1..=250u8 {
            for part in 0..4u64 {
                writer.write_all_at(&[round; 4096], part * 2 * MIB).unwrap();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
    drop(writer);
}

/// Mounts a disk `slow`, whose base lies in another mount, and a disk `fast`. Reads of a base time
/// out after `io_timeout` seconds. Returns the lab and the process id of the other mount's daemon.
fn lab_with_a_slow_base(io_timeout: u32) -> (Lab, u32) {
    lab_with_a_slow_base_of(48 * MIB, io_timeout)
}

/// Does the same with a base of `size` bytes.
fn lab_with_a_slow_base_of(size: u64, io_timeout: u32) -> (Lab, u32) {
    let mut lab = Lab::new();
    lab.base("base.img", size);
    lab.sh("mkdir inner");
    lab.ok("mount inner far=base.img,mode=ro --cache none --log inner.log");
    lab.mount(&format!("slow=inner/far fast=base.img -o io_timeout={io_timeout}"));
    let text = lab.ok("status inner --json");
    let all: serde_json::Value = serde_json::from_str(&text).unwrap();
    let inner = all["mounts"][0]["pid"].as_u64().unwrap() as u32;
    (lab, inner)
}

/// A timeout in seconds that is longer than any test: an operation that finishes anyway has not
/// waited for the base.
const FOR_EVER: u32 = 3600;

/// Reads 4096 bytes past the page cache.
fn read_direct(file: &File, offset: u64) -> std::io::Result<Vec<u8>> {
    let mut buffer = Aligned::of(&[0; 4096]);
    file.read_exact_at(buffer.bytes_mut(), offset)?;
    Ok(buffer.bytes().to_vec())
}

#[test]
fn hung_base_blocks_only_its_own_readers() {
    let (lab, inner) = lab_with_a_slow_base(FOR_EVER);
    let slow = lab.open("m/slow");
    slow.write_all_at(&[7; 4096], 0).unwrap();
    let files: Vec<_> = (0..12).map(|_| lab.open_with("m/slow", libc::O_DIRECT)).collect();
    stop(inner);
    thread::scope(|scope| {
        let readers: Vec<_> = (0..)
            .zip(&files)
            .map(|(index, file)| scope.spawn(move || read_direct(file, MIB + index * 8192)))
            .collect();
        wait_held_up(std::process::id(), libc::SYS_pread64, readers.len());
        // All other requests are served in the meantime.
        lab.sh("cat m/.cowslip/status m/.cowslip/slow/status > status; ls m; ls -l m/fast");
        lab.sh("cmp m/fast base.img");
        lab.open("m/fast").write_all_at(b"on", 5).unwrap();
        assert_eq!(read(&slow, 0, 4096), [7; 4096]);
        // So is the same disk, with many concurrent writers: whole blocks need no base.
        let write_at = |at: u64| slow.write_all_at(&[at as u8; 4096], 16 * MIB + at * 4096);
        let writers: Vec<_> = (0..6)
            .map(|first| scope.spawn(move || (0..200).try_for_each(|n| write_at(first * 200 + n))))
            .collect();
        for writer in writers {
            writer.join().unwrap().unwrap();
        }
        assert!(!readers.iter().any(thread::ScopedJoinHandle::is_finished), "they did not hang");
        signal(inner, Signal::CONT).unwrap();
        for (index, reader) in (0..).zip(readers) {
            let expected = read(&lab.open_ro("base.img"), MIB + index * 8192, 4096);
            assert!(reader.join().unwrap().unwrap() == expected);
        }
    });
    drop((slow, files));
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn read_of_a_hung_base_times_out_and_works_again_later() {
    let (lab, inner) = lab_with_a_slow_base(2);
    // More readers than the mount has workers.
    let files: Vec<_> = (0..12).map(|_| lab.open_with("m/slow", libc::O_DIRECT)).collect();
    stop(inner);
    thread::scope(|scope| {
        let readers = (0..).zip(&files).map(|(index, file)| {
            scope.spawn(move || {
                let start = Instant::now();
                (read_direct(file, MIB + index * 8192), start.elapsed())
            })
        });
        for reader in readers.collect::<Vec<_>>() {
            // The read can only end through its timeout: the base continues later.
            let (found, took) = reader.join().unwrap();
            assert_eq!(errno_of(found), libc::EIO);
            assert!(took > Duration::from_millis(1500), "{took:?}");
        }
    });
    signal(inner, Signal::CONT).unwrap();
    wait_until("the base answers again", || read_direct(&files[0], 2 * MIB).is_ok());
    assert_eq!(read(&lab.open_ro("m/slow"), MIB, 4096), read(&lab.open_ro("base.img"), MIB, 4096));
    drop(files);
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn slow_read_is_answered_even_if_no_thread_can_be_created() {
    let (lab, _) = lab_with_a_slow_base(FOR_EVER);
    let slow = lab.open_with("m/slow", libc::O_DIRECT);
    // The pid is requested once, since a thread answers each request for the status.
    let pid = lab.pid();
    let is_in_a_pool = |thread: PathBuf| {
        fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.trim() == "cowslip-io")
    };
    wait_until("threads without work are gone", || !threads_of(pid).into_iter().any(is_in_a_pool));
    let no_more = "inject=?clone,?clone3:error=EAGAIN".to_owned();
    let strace = Strace::attach_with(&lab, pid, "?clone,?clone3", &[no_more]);
    for turn in 0..8 {
        let expected = read(&lab.open_ro("base.img"), turn * MIB, 4096);
        assert!(read_direct(&slow, turn * MIB).unwrap() == expected);
    }
    drop(slow);
    strace.end(&lab, || true);
    assert!(lab.log().contains("no thread for a disk's work"), "{}", lab.log());
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn concurrent_syncs_end_even_if_no_thread_can_be_created() {
    let lab = Lab::new();
    lab.mount("d=blank:8M,overlay=d");
    let disk = Arc::new(lab.open_with("m/d", libc::O_DIRECT | libc::O_DSYNC));
    // The delay makes several callers wait for a thread at the same time.
    let no_more = "inject=?clone,?clone3:error=EAGAIN:delay_enter=50000".to_owned();
    let strace = Strace::attach_with(&lab, lab.pid(), "?clone,?clone3", &[no_more]);
    let (tell, told) = mpsc::channel();
    for writer in 0..16 {
        let (disk, tell) = (Arc::clone(&disk), tell.clone());
        thread::spawn(move || {
            for turn in 0..10 {
                let offset = (writer * 10 + turn) as u64 * 4096;
                disk.write_all_at(Aligned::of(&noise(4096, offset)).bytes(), offset).unwrap();
            }
            tell.send(writer).unwrap();
        });
    }
    let until = Instant::now() + Duration::from_secs(30);
    for _ in 0..16 {
        let left = until.saturating_duration_since(Instant::now());
        told.recv_timeout(left).expect("a sync hangs");
    }
    drop(disk);
    strace.end(&lab, || true);
    assert!(lab.log().contains("no thread for a disk's work"), "{}", lab.log());
    lab.umount();
}

#[test]
fn segment_whose_name_is_not_durable_takes_no_write() {
    let lab = Lab::new();
    lab.mount("d=blank:9T,overlay=o");
    let disk = lab.open("m/d");
    let far = 17 << 39;
    let segments = || {
        let layer = fs::read_dir(lab.path("o/layers")).unwrap().next().unwrap().unwrap();
        let files = fs::read_dir(layer.path()).unwrap();
        let is_segment =
            |file: &fs::DirEntry| file.file_name().to_string_lossy().starts_with("data.");
        files.filter(|file| is_segment(file.as_ref().unwrap())).count()
    };
    let fail = "inject=fsync:error=EIO:when=1".to_owned();
    let strace = Strace::attach_with(&lab, lab.pid(), "fsync", &[fail]);
    assert_eq!(errno_of(disk.write_at(&[1; 4096], far)), libc::EIO);
    // The next write would take a file that is there for durable.
    assert_eq!(segments(), 0);
    strace.end(&lab, || true);
    disk.write_all_at(&[2; 4096], far).unwrap();
    disk.sync_all().unwrap();
    assert_eq!(segments(), 1);
    assert_eq!(read(&disk, far, 4096), [2; 4096]);
    drop(disk);
    lab.umount();
}

#[test]
fn hung_syncs_leave_a_worker_for_other_requests() {
    let lab = Lab::new();
    lab.mount("a=blank:8M,overlay=a b=blank:8M,overlay=b c=blank:8M,overlay=c d=blank:8M");
    let free = lab.open_with("m/d", libc::O_DIRECT);
    free.write_all_at(Aligned::of(&noise(4096, 1)).bytes(), 0).unwrap();
    // One hour: the syncs hang until strace detaches.
    let slow = "inject=fdatasync:delay_enter=3600000000".to_owned();
    let strace = Strace::attach_with(&lab, lab.pid(), "fdatasync", &[slow]);
    thread::scope(|scope| {
        let syncs = ["a", "b", "c"].map(|name| {
            let file = lab.open(&format!("m/{name}"));
            scope.spawn(move || {
                file.write_all_at(b"x", 0).unwrap();
                file.sync_all().unwrap();
            })
        });
        wait_held_up(std::process::id(), libc::SYS_fsync, syncs.len());
        let mut found = Aligned::of(&[0; 4096]);
        free.read_exact_at(found.bytes_mut(), 0).unwrap();
        assert_eq!(found.bytes(), noise(4096, 1));
        free.write_all_at(Aligned::of(&noise(4096, 2)).bytes(), 4096).unwrap();
        free.sync_all().unwrap();
        assert!(lab.sh("cat m/.cowslip/status").contains("\"d\""));
        assert!(!syncs.iter().any(thread::ScopedJoinHandle::is_finished), "they did not hang");
        strace.end(&lab, || true);
    });
    drop(free);
}

#[test]
fn small_overwrite_is_written_back_early_if_a_sync_is_expected() {
    let lab = Lab::new();
    lab.mount("d=blank:32M,overlay=ov");
    let file = lab.open("m/d");
    file.write_all_at(&noise(8 * MIB, 1), 0).unwrap();
    file.sync_all().unwrap();
    let begun = || fs::read_to_string(lab.path("strace.txt")).unwrap().lines().count();
    let early = |turns: u64, at: &dyn Fn(u64) -> u64, len: u64, is_synced: bool| {
        let strace = Strace::attach_with(&lab, lab.pid(), "sync_file_range", &[]);
        for turn in 0..turns {
            let before = begun();
            file.write_all_at(&noise(len, turn), at(turn)).unwrap();
            // Gives the worker time to start the early writeback; a sync that comes first leaves
            // nothing to start. Once a writeback was early, the following ones must be early too,
            // and are awaited for longer.
            let patience = Duration::from_millis(if before == 0 { 2 } else { 1000 });
            let start = Instant::now();
            while start.elapsed() < patience && begun() == before {
                thread::sleep(Duration::from_millis(1));
            }
            if is_synced || turn + 1 == turns {
                file.sync_all().unwrap();
            }
        }
        strace.end(&lab, || true).calls.len()
    };
    let there = |turn| turn * 3000 % (7 * MIB);
    assert_eq!(early(30, &there, 4096, false), 0, "no syncs");
    assert_eq!(early(30, &there, 128 * KIB, true), 0, "large ones");
    assert_eq!(early(30, &|turn| 8 * MIB + turn * 4096, 4096, true), 0, "first touches");
    // One larger sync invalidates the journal's records of the first touches.
    assert_eq!(early(1, &there, MIB, true), 0);
    assert_eq!(early(8, &there, 4096, true), 0, "too few");
    let found = early(30, &there, 4096, true);
    assert!((20..=30).contains(&found), "{found}");
    // With two writes per sync, one early writeback is started and then no more.
    let strace = Strace::attach_with(&lab, lab.pid(), "sync_file_range", &[]);
    for turn in 0..30 {
        file.write_all_at(&noise(4096, turn), 0).unwrap();
        file.write_all_at(&noise(4096, turn), 8192).unwrap();
        file.sync_all().unwrap();
    }
    let found = strace.end(&lab, || true).calls.len();
    assert!(found <= 4, "{found}");
    drop(file);
}

#[test]
fn fallocate_reserves_the_space_of_whole_blocks() {
    let lab = Lab::new();
    lab.mount("d=blank:64M,overlay=ov,block=64K");
    let file = lab.open("m/d");
    let reserved = || allocated(&data_file(&lab.path("ov")));
    let before = reserved();
    for at in [MIB, 2 * MIB + 5000, 3 * MIB - 1] {
        fallocate(&file, FallocateFlags::empty(), at..at + 1).unwrap();
    }
    assert_eq!(reserved() - before, 3 * 64 * KIB);
    file.write_all_at(b"x", 2 * MIB + 9000).unwrap();
    assert_eq!(reserved() - before, 3 * 64 * KIB);
    // Only written blocks are data.
    let written = 2 * MIB..2 * MIB + 64 * KIB;
    assert_eq!(data_runs(&file), std::slice::from_ref(&written));
    drop(file);
}

#[test]
fn eintr_and_eagain_of_a_base_become_eio() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("-o io_timeout=2 d=base.img");
    let file = lab.open("m/d");
    for errno in ["EINTR", "EAGAIN"] {
        let fails = format!("inject=lseek,pread64,preadv2:error={errno}");
        let strace = Strace::attach_with(&lab, lab.pid(), "lseek,pread64,preadv2", &[fails]);
        assert_eq!(seek(&file, SeekFrom::Data(0)), Err(libc::EIO), "{errno}");
        if errno == "EAGAIN" {
            assert_eq!(errno_of(file.read_at(&mut [0; 4096], MIB)), libc::EIO);
            // Half a block: the other half is read from the base.
            assert_eq!(errno_of(file.write_at(&[1; 100], 2 * MIB)), libc::EIO);
        }
        strace.end(&lab, || true);
    }
    assert_eq!(seek(&file, SeekFrom::Data(0)), Ok(0));
    assert_eq!(read(&file, 0, MIB), read(&lab.open_ro("base.img"), 0, MIB));
    drop(file);
}

#[test]
fn disk_with_a_hung_base_can_be_stated_opened_and_written() {
    let (lab, inner) = lab_with_a_slow_base(FOR_EVER);
    stop(inner);
    let found = fs::metadata(lab.path("m/slow")).map(|found| found.len());
    let opened = OpenOptions::new().read(true).write(true).open(lab.path("m/slow"));
    let written = opened.and_then(|file| file.write_all_at(&noise(8192, 1), 4096));
    signal(inner, Signal::CONT).unwrap();
    assert_eq!(found.unwrap(), 48 * MIB);
    written.unwrap();
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn mount_with_a_hung_base_can_be_unmounted() {
    let (lab, inner) = lab_with_a_slow_base(2);
    let slow = lab.open_with("m/slow", libc::O_DIRECT);
    stop(inner);
    assert_eq!(errno_of(read_direct(&slow, MIB)), libc::EIO);
    drop(slow);
    // The kernel lets no process exit while it waits for the reply of another; umount reports this.
    let line = lab.refused(1, "umount --timeout 3 m");
    assert!(line.contains("is unmounted, and its daemon"), "{line}");
    assert_eq!(mounts_below(&lab.path("m")).len(), 0);
    signal(inner, Signal::CONT).unwrap();
    wait_until("the daemon ends with its base's answer", || {
        lab.cowslip("umount inner").status.success()
    });
}

#[test]
fn other_users_have_no_access_without_allow_other() {
    let lab = lab();
    lab.sh("chmod 755 . && ! su nobody -s /bin/sh -c 'ls m' 2>/dev/null");
    lab.umount();
    lab.mount("d=base.img,perm=0644 -o allow_other");
    lab.sh("su nobody -s /bin/sh -c 'head -c 10 m/d | wc -c; ! echo x 2>/dev/null > m/d'");
}

#[test]
fn set_id_bits_are_dropped_in_the_mount() {
    let lab = lab();
    let found = lab.sh("chmod 6755 m/d || true; stat -c %a m/d");
    assert_eq!(found.trim(), "755");
    let mut options = OpenOptions::new();
    options.write(true).custom_flags(libc::O_NOFOLLOW);
    options.open(lab.path("m/d")).unwrap();
}

#[test]
fn write_on_a_hung_base_delays_no_sync_and_changes_nothing_after_eio() {
    let (lab, inner) = lab_with_a_slow_base(2);
    let slow = lab.open("m/slow");
    // Space that the next sync frees, under the same range lock as the write that will hang.
    slow.write_all_at(&[7; 8192], 9 * MIB).unwrap();
    slow.sync_all().unwrap();
    fallocate(&slow, PUNCH, 9 * MIB..9 * MIB + 4096).unwrap();
    stop(inner);
    let other = lab.open("m/slow");
    thread::scope(|scope| {
        let hanging = scope.spawn(|| other.write_all_at(&[1; 100], MIB + 10));
        wait_held_up(std::process::id(), libc::SYS_pwrite64, 1);
        // The kernel starts a sync only after the reply to the earlier write, which comes with the
        // timeout. The base continues later, so neither has waited for the base.
        slow.sync_all().unwrap();
        slow.write_all_at(&[2; 4096], 0).unwrap();
        assert_eq!(errno_of(hanging.join().unwrap()), libc::EIO);
    });
    signal(inner, Signal::CONT).unwrap();
    wait_until("the base answers again", || slow.read_exact_at(&mut [0; 4096], MIB).is_ok());
    // The hung write keeps its block locked until the base answers, and then finds that its request
    // was already answered.
    slow.write_all_at(&[3; 1], MIB).unwrap();
    let mut expected = read(&lab.open_ro("base.img"), MIB, 4096);
    expected[0] = 3;
    assert_eq!(read(&slow, MIB, 4096), expected);
    drop((slow, other));
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn growth_that_needs_a_hung_base_holds_up_no_other_change() {
    let size = MIB + 100;
    let (lab, inner) = lab_with_a_slow_base_of(size, 2);
    let slow = lab.open("m/slow");
    slow.write_all_at(&[7; 4096], 0).unwrap();
    stop(inner);
    assert_eq!(errno_of(slow.write_all_at(&[1; 10], size)), libc::EIO);
    slow.write_all_at(&[2; 4096], 0).unwrap();
    assert_eq!(errno_of(fallocate(&slow, ZERO, MIB + 50..MIB + 5000)), libc::EIO);
    slow.write_all_at(&[3; 4096], 0).unwrap();
    assert_eq!(slow.metadata().unwrap().len(), size);
    // Growth that needs no base goes on, too.
    slow.write_all_at(&[4; 4096], 2 * MIB).unwrap();
    signal(inner, Signal::CONT).unwrap();
    wait_until("the base answers again", || slow.read_exact_at(&mut [0; 4096], 4096).is_ok());
    // An append in part of a block takes the rest from the base.
    slow.set_len(size).unwrap();
    slow.write_all_at(&[5; 10], size).unwrap();
    let mut expected = read(&lab.open_ro("base.img"), 0, size);
    expected[..4096].fill(3);
    expected.extend([5; 10]);
    assert_eq!(slow.metadata().unwrap().len(), size + 10);
    assert!(read(&slow, 0, size + 10) == expected);
    drop(slow);
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn requests_reach_their_deadline_while_a_sync_of_another_disk_hangs() {
    let (lab, inner) = lab_with_a_slow_base(2);
    lab.ok("add m other=blank:8M,overlay=ov");
    let other = lab.open("m/other");
    // Small syncs one after the other go to the journal.
    for turn in 0..20 {
        other.write_all_at(&[1; 512], turn * 4096).unwrap();
        other.sync_all().unwrap();
    }
    let slow = lab.open_with("m/slow", libc::O_DIRECT);
    stop(inner);
    // One hour: the sync hangs until strace detaches.
    let hang = "inject=fdatasync:delay_enter=3600000000".to_owned();
    let strace = Strace::attach_with(&lab, lab.pid(), "fdatasync", &[hang]);
    thread::scope(|scope| {
        let hanging = scope.spawn(|| {
            other.write_all_at(&[2; 512], 0).unwrap();
            other.sync_all().unwrap();
        });
        wait_held_up(std::process::id(), libc::SYS_fsync, 1);
        // Longer than the time between two rounds of maintenance.
        for turn in 0..5 {
            assert_eq!(errno_of(read_direct(&slow, turn * 8192)), libc::EIO);
        }
        assert!(!hanging.is_finished());
        // strace cannot detach from threads that wait for the base.
        signal(inner, Signal::CONT).unwrap();
        strace.end(&lab, || true);
    });
    wait_until("the base answers again", || read_direct(&slow, MIB).is_ok());
    drop((slow, other));
    lab.umount();
    lab.ok("umount inner");
}

#[test]
fn sigterm_ends_a_daemon_whose_base_hangs() {
    let (lab, inner) = lab_with_a_slow_base(2);
    let pid = lab.pid();
    let slow = lab.open("m/slow");
    slow.write_all_at(&[7; 4096], 4096).unwrap();
    stop(inner);
    let hanging = thread::spawn({
        let other = lab.open("m/slow");
        move || other.write_all_at(&[1; 100], MIB + 10)
    });
    wait_held_up(std::process::id(), libc::SYS_pwrite64, 1);
    signal(pid, Signal::TERM).unwrap();
    wait_until("the daemon says that it could not do all", || {
        lab.log().contains("not all of it could be made durable")
    });
    // The daemon's last thread is still blocked in the kernel; the process exits with that thread.
    signal(inner, Signal::CONT).unwrap();
    wait_until("the daemon ends", || !is_alive(pid));
    assert_eq!(errno_of(hanging.join().unwrap()), libc::EIO);
    drop(slow);
    lab.ok("umount inner");
}

#[test]
fn st_blocks_is_correct_before_and_after_keep() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("d=blank:16M");
    let file = lab.open("m/d");
    (0..3).for_each(|at| file.write_all_at(&[1; 4096], at * MIB).unwrap());
    assert_eq!(file.metadata().unwrap().blocks(), 24);
    lab.ok("keep m/d kept");
    (0..3).for_each(|at| file.write_all_at(&[1; 65536], (at + 8) * MIB).unwrap());
    assert_eq!(file.metadata().unwrap().blocks(), 24 + 3 * 128);
    drop(file);
    lab.umount();
}

#[test]
fn overlay_on_a_read_only_file_system_can_be_checked_and_read() {
    let mut lab = Lab::new();
    lab.host("host", "ext4", 200 * MIB);
    lab.base("host/base.img", 4 * MIB);
    lab.mount("d=host/base.img,overlay=host/ov --store host/st");
    lab.open("m/d").write_all_at(&noise(9000, 1), 5000).unwrap();
    lab.ok("snapshot m/d a");
    lab.open("m/d").write_all_at(&noise(9000, 2), 7000).unwrap();
    lab.sh("echo hello > m/f");
    lab.umount();
    // Files left by a crash may remain.
    lab.sh("mkdir -m 700 host/st/layers/00000000-0000-4000-8000-000000000000");
    lab.mount("k=host/base.img,overlay=host/killed");
    lab.open("m/k").write_all_at(&noise(9000, 3), 5000).unwrap();
    lab.kill();
    lab.ok("umount m");
    let check = |dir: &str| {
        lab.ok(&format!("check {dir}/ov"));
        lab.ok(&format!("check {dir}/st"));
        assert!(lab.ok(&format!("check {dir}/killed")).contains("nothing is lost"));
        let words =
            format!("d={dir}/base.img,overlay={dir}/ov k={dir}/base.img,overlay={dir}/killed");
        for options in ["-o ro", ""] {
            let said = lab.mount(&format!("{words} --store {dir}/st {options}"));
            assert_eq!(said.matches("read-only file system").count(), 3, "{said}");
            assert_eq!(read(&lab.open_ro("m/d"), 7000, 9000), noise(9000, 2));
            assert_eq!(read(&lab.open_ro("m/d"), 5000, 2000), noise(9000, 1)[..2000]);
            assert_eq!(read(&lab.open_ro("m/k"), 5000, 9000), noise(9000, 3));
            assert_eq!(lab.sh("cat m/f"), "hello\n");
            let snapshot = lab.open_ro("m/.cowslip/d/snapshots/a");
            assert_eq!(read(&snapshot, 5000, 9000), noise(9000, 1));
            drop(snapshot);
            for name in ["m/d", "m/k", "m/f"] {
                let error = OpenOptions::new().write(true).open(lab.path(name)).unwrap_err();
                assert_eq!(error.raw_os_error(), Some(libc::EROFS), "{name}");
            }
            lab.refused(1, "snapshot m/d b");
            lab.umount();
        }
    };
    lab.sh("mkdir bound; mount --bind host bound; mount -o remount,bind,ro bound");
    check("bound");
    lab.sh("umount bound");
    wait_until("the host is not in use", || {
        lab.output("mount", &["-o", "remount,ro", "host"]).status.success()
    });
    check("host");
    lab.sh("mount -o remount,rw host");
    lab.mount("d=host/base.img,overlay=host/ov k=host/base.img,overlay=host/killed");
    assert_eq!(read(&lab.open_ro("m/k"), 5000, 9000), noise(9000, 3));
    lab.open("m/d").write_all_at(b"again", 0).unwrap();
}

#[test]
fn failed_fallocate_reserves_nothing() {
    let lab = Lab::new();
    lab.host("x", "ext4", 600 * MIB);
    lab.mount("big=blank:4G,overlay=x/ov");
    let free = || {
        let found = rustix::fs::statvfs(lab.path("x")).unwrap();
        found.f_bavail * found.f_frsize
    };
    let before = free();
    let file = lab.open("m/big");
    assert_eq!(errno_of(fallocate(&file, FallocateFlags::empty(), 0..3 * GIB)), libc::ENOSPC);
    assert!(free() + 8 * MIB > before, "{} of {before} are left", free());
    // Writes still succeed.
    file.write_all_at(&noise(MIB, 1), 0).unwrap();
    assert_eq!(read(&file, 0, MIB), noise(MIB, 1));
    drop(file);
    lab.umount();
}

/// A mount of a disk of 1 MiB whose overlay, `fs/ov`, is on an ext4 of 24 MiB; `keys` are more of its
/// keys.
fn small_ext4(keys: &str) -> Lab {
    let lab = Lab::new();
    lab.host("fs", "ext4", 24 * MIB);
    lab.mount(&format!("d=blank:1M,overlay=fs/ov{keys}"));
    lab
}

/// Returns the free bytes of the file system `fs`.
fn free_space(lab: &Lab) -> u64 {
    let found = rustix::fs::statvfs(lab.path("fs")).unwrap();
    found.f_bavail * found.f_frsize
}

#[test]
fn failed_fallocate_past_the_end_reserves_nothing_and_keeps_the_size() {
    for key in ["", ",mode=rw"] {
        let lab = Lab::new();
        lab.host("fs", "ext4", 24 * MIB);
        File::create(lab.path("fs/b")).unwrap().set_len(MIB).unwrap();
        lab.mount(&match key {
            "" => "d=fs/b,overlay=fs/ov".to_owned(),
            key => format!("d=fs/b{key}"),
        });
        let before = free_space(&lab);
        let file = lab.open("m/d");
        let refused = |flags| errno_of(fallocate(&file, flags, 0..100 * MIB));
        assert_eq!(refused(FallocateFlags::empty()), libc::ENOSPC, "{key}");
        if !key.is_empty() {
            // An overlay takes no space for zeros.
            assert_eq!(refused(FallocateFlags::ZERO_RANGE), libc::ENOSPC, "{key}");
        }
        let left = free_space(&lab);
        assert!(left + 2 * MIB > before, "{left} of {before} are left{key}");
        // Past the time for which the kernel caches the size.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(file.metadata().unwrap().len(), MIB, "{key}");
        let mut end = OpenOptions::new().append(true).open(lab.path("m/d")).unwrap();
        end.write_all(b"x").unwrap();
        assert_eq!(end.metadata().unwrap().len(), MIB + 1, "{key}");
        drop((file, end));
        lab.umount();
    }
}

#[test]
fn reserved_space_of_a_grown_disk_is_given_back() {
    let lab = small_ext4("");
    let before = free_space(&lab);
    let is_back = |lab: &Lab| free_space(lab) + 2 * MIB > before;
    let reserve = |lab: &Lab| {
        let file = lab.open("m/d");
        fallocate(&file, FallocateFlags::empty(), 0..16 * MIB).unwrap();
        assert!(free_space(lab) + 14 * MIB < before);
        file
    };
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let file = reserve(&lab);
    fallocate(&file, punch, 0..16 * MIB).unwrap();
    file.sync_all().unwrap();
    assert!(is_back(&lab), "{} of {before} after a punch", free_space(&lab));
    let file = reserve(&lab);
    file.set_len(0).unwrap();
    file.sync_all().unwrap();
    assert!(is_back(&lab), "{} of {before} after a truncation", free_space(&lab));
    drop(reserve(&lab));
    lab.ok("snapshot m/d a");
    lab.open("m/d").sync_all().unwrap();
    assert!(is_back(&lab), "{} of {before} after a snapshot", free_space(&lab));
    drop((file, reserve(&lab)));
    lab.kill();
    lab.mount("d=blank:1M,overlay=fs/ov");
    lab.open("m/d").sync_all().unwrap();
    assert!(is_back(&lab), "{} of {before} after a kill", free_space(&lab));
    // Kept by an end in good order.
    drop(reserve(&lab));
    lab.umount();
    lab.mount("d=blank:1M,overlay=fs/ov");
    assert!(!is_back(&lab), "{} of {before} after a new mount", free_space(&lab));
    lab.ok("snapshot m/d b");
    lab.open("m/d").sync_all().unwrap();
    assert!(is_back(&lab), "{} of {before} after another snapshot", free_space(&lab));
}

#[test]
fn space_reserved_under_a_limit_can_be_reserved_again_after_a_truncation() {
    let lab = small_ext4(",limit=16M");
    let file = lab.open("m/d");
    for _ in 0..3 {
        fallocate(&file, FallocateFlags::empty(), 0..14 * MIB).unwrap();
        file.set_len(0).unwrap();
    }
    drop(file);
}

#[test]
fn limit_includes_reserved_space() {
    let lab = Lab::new();
    lab.mount("d=blank:1G,overlay=ov,limit=16M");
    let file = lab.open("m/d");
    let mut reserved = 0;
    for at in (0..GIB).step_by(4 << 20) {
        match fallocate(&file, FallocateFlags::empty(), at..at + 4 * MIB) {
            Ok(()) => reserved += 4 * MIB,
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOSPC)),
        }
    }
    assert!((16 * MIB..=20 * MIB).contains(&reserved), "{reserved}");
    drop(file);
}

#[test]
fn refused_write_back_is_told_by_msync() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.mount("d=base.img,limit=1M");
    let (file, other) = (lab.open("m/d"), lab.open("m/d"));
    let len = 8 * MIB as usize;
    // SAFETY: a new mapping inside a file that stays open, used by nobody else.
    unsafe {
        let map = libc::mmap(
            std::ptr::null_mut(),
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(map, libc::MAP_FAILED);
        std::ptr::write_bytes(map.cast::<u8>(), 7, len);
        let result = libc::msync(map, len, libc::MS_SYNC);
        let error = std::io::Error::last_os_error().raw_os_error();
        assert_eq!((result, error), (-1, Some(libc::ENOSPC)));
        libc::munmap(map, len);
    }
    assert_eq!(errno_of(other.sync_all()), libc::ENOSPC);
}
