//! Disks whose files bypass the host's page cache (`direct`), over real file systems: which pages
//! are in the cache afterwards, that the bytes are correct, and that new layers are direct as well.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::mount::*;
use crate::common::random::*;
use rustix::process::Signal;

const SIZE: u64 = 4 * MIB;

/// Creates a lab with a base on a file system of its own, whose device has sectors of `sector`
/// bytes.
fn lab_on(fs: &str, sector: u32) -> Lab {
    let mut lab = Lab::new();
    File::create(lab.path("host.fs")).unwrap().set_len(400 * MIB).unwrap();
    let device = lab.loop_device("host.fs", &format!("-b {sector}"));
    lab.sh(&format!("mkfs.{fs} -q {device}; mkdir host; mount {device} host"));
    lab.base("host/base.img", SIZE);
    lab
}

/// Returns the number of pages of `file` in the host's cache.
fn cached(lab: &Lab, file: &Path) -> u64 {
    lab.sh(&format!("fincore -n -r -o PAGES {}", file.display())).trim().parse().unwrap()
}

/// Drops all pages of a file from the host's cache.
fn forget(file: &Path) {
    let file = File::open(file).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Returns the data files of all layers of the overlay `host/ov`.
fn data_files(lab: &Lab) -> Vec<PathBuf> {
    let layers = fs::read_dir(lab.path("host/ov/layers")).unwrap();
    layers.map(|layer| layer.unwrap().path().join("data")).collect()
}

/// Writes `m/d` at various offsets, checks all reads, and returns the new content.
fn use_all(lab: &Lab, mut model: Vec<u8>) -> Vec<u8> {
    let file = lab.open("m/d");
    for (offset, len) in
        [(0, 1 << 20), (1_500_000, 3), (4095, 2), (2 << 20, 4096), (3_000_000, 70_000)]
    {
        let bytes = noise(len, offset);
        file.write_all_at(&bytes, offset).unwrap();
        model[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
    }
    assert!(read(&file, 0, SIZE) == model);
    assert_eq!(read(&file, 4097, 1001), model[4097..5098]);
    assert!(read(&lab.open_ro("m/d"), 0, SIZE) == model);
    file.sync_all().unwrap();
    model
}

/// Reads and writes the disk `words`, and returns the number of pages of the base and of the
/// overlay in the host's cache afterwards.
fn left_behind(lab: &Lab, words: &str) -> (u64, u64) {
    lab.mount(words);
    let base = lab.path("host/base.img");
    // Drops the pages that were read to identify the base.
    forget(&base);
    use_all(lab, whole(lab, "m/d"));
    let layers = if words.contains("overlay") { data_files(lab) } else { Vec::new() };
    let found = (cached(lab, &base), layers.iter().map(|data| cached(lab, data)).sum());
    lab.umount();
    found
}

#[test]
fn direct_disk_leaves_no_pages_in_the_hosts_cache() {
    for (fs, sector) in [("ext4", 512), ("xfs", 4096)] {
        let lab = lab_on(fs, sector);
        let (base, data) = left_behind(&lab, "d=host/base.img,overlay=host/ov");
        assert!(base > 0 && data > 0, "{fs}: {base}, {data}");
        lab.sh("rm -r host/ov");
        assert_eq!(left_behind(&lab, "d=host/base.img,overlay=host/ov,direct"), (0, 0), "{fs}");
        lab.sh("rm -r host/ov");
    }
}

#[test]
fn direct_file_without_an_overlay_leaves_no_pages_in_the_hosts_cache() {
    let lab = lab_on("ext4", 512);
    lab.mount("d=host/base.img,mode=ro,direct");
    let (base, bytes) = (lab.path("host/base.img"), whole(&lab, "host/base.img"));
    forget(&base);
    assert!(read(&lab.open_ro("m/d"), 0, SIZE) == bytes);
    assert_eq!(cached(&lab, &base), 0);
    lab.umount();
    lab.mount("d=host/base.img,mode=ro");
    assert!(read(&lab.open_ro("m/d"), 0, SIZE) == bytes);
    assert!(cached(&lab, &base) > 0);
    lab.umount();

    lab.sh("cp host/base.img host/rw.img");
    lab.mount("d=host/rw.img,mode=rw,direct");
    forget(&lab.path("host/rw.img"));
    let model = use_all(&lab, bytes);
    assert_eq!(cached(&lab, &lab.path("host/rw.img")), 0);
    lab.umount();
    assert!(whole(&lab, "host/rw.img") == model);
}

#[test]
fn direct_disk_matches_the_model() {
    for (fs, sector, block) in
        [("ext4", 512, "4K"), ("ext4", 4096, "512"), ("xfs", 512, "64K"), ("xfs", 4096, "512")]
    {
        let lab = lab_on(fs, sector);
        let words = format!("d=host/base.img,overlay=host/ov,block={block},direct");
        model(&lab, "host/base.img", &words);
    }
}

#[test]
fn direct_part_of_a_file_or_device_matches_the_model() {
    let lab = lab_on("xfs", 4096);
    lab.sh("head -c 3000000 host/base.img | tail -c +1537 >part; cp part host/part");
    let words = "d=host/base.img,offset=1536,len=2998464,overlay=host/ov,direct";
    model(&lab, "host/part", words);
    lab.sh("cp host/base.img host/dev.img");
    let device = lab.loop_device("host/dev.img", "-b 4096");
    model(&lab, &device, &format!("d={device},overlay=host/ow,block=512,direct"));
    let mut model = whole(&lab, &device);
    lab.mount(&format!("d={device},mode=rw,direct"));
    let file = lab.open("m/d");
    file.write_all_at(&[7; 70_000], 1234).unwrap();
    model[1234..71_234].fill(7);
    fallocate(&file, PUNCH, 5000..30_001).unwrap();
    model[5000..30_001].fill(0);
    fallocate(&file, ZERO_KEEP, 40_000..41_000).unwrap();
    model[40_000..41_000].fill(0);
    assert!(read(&file, 0, SIZE) == model);
    drop(file);
    lab.umount();
    assert!(whole(&lab, &device) == model);
    lab.sh(&format!("losetup -d {device}"));
}

#[test]
fn direct_file_of_mode_rw_matches_the_model() {
    for (fs, sector) in [("ext4", 512), ("xfs", 4096), ("btrfs", 512)] {
        let lab = lab_on(fs, sector);
        lab.sh("cp host/base.img host/rw.img");
        model(&lab, "host/rw.img", "d=host/rw.img,mode=rw,direct");
    }
}

#[test]
fn killed_daemon_of_a_direct_disk_loses_no_completed_write() {
    /// Length of each write in bytes: no multiple of any sector size, so that neighbours share
    /// sectors.
    const SLOT: u64 = 700;
    for (sector, words) in [
        (512, "d=host/base.img,overlay=host/ov,direct"),
        (4096, "d=host/base.img,overlay=host/ov,block=512,direct"),
        (4096, "d=host/rw.img,mode=rw,direct"),
    ] {
        let lab = lab_on("xfs", sector);
        lab.sh("cp host/base.img host/rw.img");
        lab.mount(words);
        let (pid, file, told) = (lab.pid(), lab.open("m/d"), Mutex::new(Vec::new()));
        thread::scope(|scope| {
            for writer in 0..6_u64 {
                let (file, told) = (&file, &told);
                scope.spawn(move || {
                    for slot in (writer..SIZE / SLOT).step_by(6) {
                        if file.write_all_at(&noise(SLOT, slot), slot * SLOT).is_err() {
                            return;
                        }
                        told.lock().unwrap().push(slot);
                    }
                });
            }
            wait_until("there are writes", || told.lock().unwrap().len() > 600);
            signal(pid, Signal::KILL).unwrap();
        });
        drop(file);
        lab.mount(words);
        let file = lab.open_ro("m/d");
        for slot in told.into_inner().unwrap() {
            assert!(read(&file, slot * SLOT, SLOT) == noise(SLOT, slot), "{words}: {slot} is lost");
        }
        drop(file);
    }
}

#[test]
fn direct_disk_stays_direct_in_new_layers() {
    for (key, is_direct) in [("direct", true), ("direct=off", false)] {
        let lab = lab_on("xfs", 512);
        // The temporary overlay is on the file system where it will be kept, so that keep only
        // renames it.
        lab.sh(&format!("TMPDIR=$PWD/host $COWSLIP mount m d=host/base.img,{key} --log log.txt"));
        let was = whole(&lab, "host/base.img");
        let mut seen = Vec::new();
        let mut look = |step: &str| {
            seen.extend(
                data_files(&lab).into_iter().map(|data| (step.to_owned(), cached(&lab, &data))),
            );
        };
        let first = use_all(&lab, was.clone());
        lab.ok("keep m/d host/ov");
        // Drops the pages that were read to identify the base.
        forget(&lab.path("host/base.img"));
        let again = use_all(&lab, first.clone());
        look("kept");
        lab.ok("snapshot m/d one");
        let mut changed = again.clone();
        let file = lab.open("m/d");
        file.write_all_at(&[7; 100_000], 12_345).unwrap();
        changed[12_345..112_345].fill(7);
        assert!(read(&file, 0, SIZE) == changed);
        drop(file);
        look("snapshot");
        lab.ok("revert m/d one");
        assert!(use_all(&lab, again.clone()) == again);
        look("revert");
        lab.ok("reset m/d");
        assert!(use_all(&lab, was) == first);
        look("reset");
        // The snapshot still has its bytes.
        assert!(whole(&lab, "m/.cowslip/d/snapshots/one") == again);
        if is_direct {
            assert!(seen.iter().all(|(_, pages)| *pages == 0), "{seen:?}");
            assert_eq!(cached(&lab, &lab.path("host/base.img")), 0);
        } else {
            assert!(seen.iter().all(|(_, pages)| *pages > 0), "{seen:?}");
        }
    }
}

#[test]
fn reopened_direct_disk_reads_its_old_layers_past_the_cache() {
    let lab = lab_on("ext4", 512);
    let words = "d=host/base.img,overlay=host/ov,direct";
    lab.mount(words);
    let model = use_all(&lab, whole(&lab, "m/d"));
    lab.ok("snapshot m/d one");
    lab.umount();
    lab.mount(words);
    let all = data_files(&lab);
    assert_eq!(all.len(), 2);
    all.iter().for_each(|data| forget(data));
    assert!(whole(&lab, "m/d") == model);
    assert_eq!(all.iter().map(|data| cached(&lab, data)).sum::<u64>(), 0);
    lab.umount();
    lab.mount(words.trim_end_matches(",direct"));
    assert!(whole(&lab, "m/d") == model);
    assert!(all.iter().map(|data| cached(&lab, data)).sum::<u64>() > 0);
}

#[test]
fn copies_made_by_the_host_bypass_the_cache() {
    for (fs, sector) in [("ext4", 512), ("xfs", 4096)] {
        let lab = lab_on(fs, sector);
        lab.sh("cp host/base.img host/rw.img");
        lab.mount("d=host/rw.img,overlay=host/ov,block=512,direct e=host/base.img,direct");
        let mut model = use_all(&lab, whole(&lab, "m/d"));
        let (file, other) = (lab.open("m/d"), lab.open("m/e"));
        let write = |offset: u64, len: u64, model: &mut Vec<u8>| {
            let bytes = noise(len, offset + len);
            file.write_all_at(&bytes, offset).unwrap();
            model[offset as usize..(offset + len) as usize].copy_from_slice(&bytes);
        };
        // From one disk to the other.
        let copied = noise(300_000, 5);
        other.write_all_at(&copied, 1000).unwrap();
        for (from, to, len) in [(1000, 512, 200_000), (1500, 700_000, 100_001)] {
            assert_eq!(copy_range(&other, from, &file, to, len).unwrap(), len);
            let at = from as usize - 1000;
            model[to as usize..(to + len) as usize].copy_from_slice(&copied[at..at + len as usize]);
            write(to + 100, 50, &mut model);
            write(to + len - 10, 5000, &mut model);
        }
        assert!(read(&file, 0, SIZE) == model, "{fs}");
        // Merges the layers of a deleted snapshot.
        lab.ok("snapshot m/d one");
        write(2_000_001, 9000, &mut model);
        lab.ok("snapshot m/d --delete one");
        wait_until("the layers are one", || data_files(&lab).len() == 1);
        write(2_000_500, 700, &mut model);
        assert!(read(&file, 0, SIZE) == model, "{fs}");
        // Commits into the base, and writes again afterwards.
        drop((file, other));
        lab.ok("commit m/d");
        let file = lab.open("m/d");
        file.write_all_at(b"again", 2_000_600).unwrap();
        model[2_000_600..2_000_605].copy_from_slice(b"again");
        assert!(read(&file, 0, SIZE) == model, "{fs}");
        drop(file);
        lab.umount();
    }
}

#[test]
fn hung_direct_writes_block_no_other_disk() {
    let lab = lab_on("xfs", 512);
    lab.mount("d=host/base.img,overlay=host/ov,direct e=blank:1M");
    let (hanging, other) = (lab.open("m/d"), lab.open("m/e"));
    let ended = AtomicUsize::new(0);
    lab.sh("fsfreeze -f host");
    thread::scope(|scope| {
        for writer in 0..16_u64 {
            let (hanging, ended) = (&hanging, &ended);
            scope.spawn(move || {
                hanging.write_all_at(&[1; 4096], writer * 64 * KIB).unwrap();
                ended.fetch_add(1, Ordering::SeqCst);
            });
        }
        wait_held_up(std::process::id(), libc::SYS_pwrite64, 16);
        for round in 0..50_u64 {
            other.write_all_at(&[round as u8; 600], round * 600).unwrap();
            assert_eq!(read(&other, round * 600, 600), [round as u8; 600]);
        }
        let hung = ended.load(Ordering::SeqCst);
        lab.sh("fsfreeze -u host");
        assert_eq!(hung, 0, "they did not hang");
    });
    assert_eq!(ended.load(Ordering::SeqCst), 16);
    assert_eq!(read(&hanging, 64 * KIB, 4096), [1; 4096]);
    drop((hanging, other));
}

#[test]
fn hung_direct_write_is_completed_and_answered_late() {
    let lab = lab_on("xfs", 512);
    lab.mount("d=host/base.img,overlay=host/ov,direct -o io_timeout=1");
    let file = lab.open("m/d");
    lab.sh("fsfreeze -f host");
    thread::scope(|scope| {
        let first = scope.spawn(|| file.write_all_at(&[1; 8192], 4096));
        thread::sleep(Duration::from_millis(2800));
        // Neither completed nor failed: a failed write must not happen later.
        assert!(!first.is_finished());
        // The first write keeps its range locked; a second one to the range fails in time and never
        // happens.
        let second = scope.spawn(|| lab.open("m/d").write_all_at(&[2; 8192], 4096));
        assert_eq!(errno_of(second.join().unwrap()), libc::EIO);
        assert!(!first.is_finished());
        lab.sh("fsfreeze -u host");
        first.join().unwrap().unwrap();
    });
    drop(file);
    // Nothing that was begun is still to come after an unmount.
    lab.umount();
    lab.mount("d=host/base.img,overlay=host/ov");
    assert_eq!(read(&lab.open_ro("m/d"), 4096, 8192), [1; 8192]);
}

#[test]
fn clone_of_a_direct_disk_is_direct() {
    let lab = lab_on("xfs", 512);
    lab.mount("--store host/st d=host/base.img,overlay=host/st,direct");
    let model = use_all(&lab, whole(&lab, "m/d"));
    lab.ok("clone m/d c");
    let layers = || lab.sh("ls host/st/layers/*/data").lines().map(|l| lab.path(l)).collect();
    let all: Vec<PathBuf> = layers();
    assert!(all.len() > 1);
    all.iter().for_each(|data| forget(data));
    forget(&lab.path("host/base.img"));
    assert!(whole(&lab, "m/c") == model);
    let (file, bytes) = (lab.open("m/c"), noise(9000, 3));
    file.write_all_at(&bytes, 777).unwrap();
    assert_eq!(read(&file, 777, 9000), bytes);
    drop(file);
    let pages = |all: &[PathBuf]| all.iter().map(|data| cached(&lab, data)).sum::<u64>();
    assert_eq!(pages(&all) + cached(&lab, &lab.path("host/base.img")), 0);
    lab.umount();
    // A store does not record the key.
    lab.mount("--store host/st");
    assert!(whole(&lab, "m/d") == model);
    assert!(pages(&all) > 0);
}

#[test]
fn direct_is_rejected_without_o_direct_and_leaves_nothing() {
    let lab = lab_on("ext4", 512);
    // With data journalling, ext4 has no direct I/O.
    File::create(lab.path("journal.fs")).unwrap().set_len(64 * MIB).unwrap();
    let device = lab.loop_device("journal.fs", "");
    lab.sh(&format!("mkfs.ext4 -q {device}; mkdir j; mount -o data=journal {device} j"));
    lab.sh("cp host/base.img j/base.img; qemu-img create -q -f qcow2 host/q.qcow2 1M");
    for (code, words, says) in [
        (2, "d=host/base.img,overlay=host/ov,reflink,direct", "'direct' is not for reflink"),
        (2, "d=host/base.img,mode=ro,passthrough,direct", "'direct' is not for passthrough"),
        (2, "d=host/q.qcow2,format=qcow2,direct", "'direct' is for raw bases"),
        (1, "d=j/base.img,direct", "base.img' cannot be read past the host's cache"),
        (1, "d=host/base.img,overlay=j/ov,direct", "overlay '"),
        (1, "d=blank:1M,overlay=j/ov,direct", "its file system has no O_DIRECT"),
    ] {
        let line = lab.refused(code, &format!("mount m {words}"));
        assert!(line.contains(says), "{line}");
        assert!(code == 2 || line.contains("leave out direct"), "{line}");
        assert!(!lab.path("j/ov").exists() && !lab.path("host/ov").exists(), "{line}");
    }
    lab.mount("d=host/base.img,direct");
    let line = lab.refused(1, "keep m/d j/ov");
    assert!(line.contains("leave out direct") && !lab.path("j/ov").exists(), "{line}");
    // The disk still works, and can be kept elsewhere.
    let model = use_all(&lab, whole(&lab, "m/d"));
    lab.ok("keep m/d host/ov");
    assert!(whole(&lab, "m/d") == model);
    lab.umount();
    lab.sh("umount j");
}
