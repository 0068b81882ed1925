//! Common tools on a real mount: they see a disk with its true holes, and what they write reads
//! back as from a plain file.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};

use crate::common::mount::*;

/// Mounts a temporary disk `d` over a base of 48 MiB.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img");
    lab
}

/// Makes changes: data over a hole, a hole over data, data over data.
fn change(lab: &Lab, disk: &str) {
    let file = lab.open(disk);
    file.write_all_at(&noise(MIB, 77), 30 * MIB).unwrap();
    file.write_all_at(&noise(5000, 78), 40 * MIB + 100).unwrap();
    file.write_all_at(&noise(3 * 4096, 79), MIB).unwrap();
    fallocate(&file, PUNCH, 2 * MIB..4 * MIB).unwrap();
}

fn assert_same_holes(lab: &Lab, one: &str, two: &str) {
    let runs = |name: &str| data_runs(&lab.open_ro(name));
    assert_eq!(runs(one), runs(two), "{one} {two}");
}

#[test]
fn qemu_img_sees_the_holes_of_the_base() {
    let lab = lab();
    let map = |file: &str| {
        let text = lab.sh(&format!("qemu-img map --output=json -f raw {file}"));
        serde_json::from_str::<serde_json::Value>(&text).unwrap()
    };
    assert_eq!(map("m/d"), map("base.img"));
    lab.sh("qemu-img compare -s -f raw -F raw m/d base.img");
    change(&lab, "m/d");
    let line = lab.sh("qemu-img map --output=json -f raw m/d");
    let start = 30 * MIB;
    assert!(line.contains(&format!("\"start\": {start}, \"length\": {MIB}")), "{line}");
}

#[test]
fn qemu_img_converts_out_of_the_mount() {
    let lab = lab();
    change(&lab, "m/d");
    lab.sh("
        qemu-img convert -f raw -O qcow2 m/d out.qcow2
        qemu-img compare -f raw -F qcow2 m/d out.qcow2
        qemu-img convert -t none -T none -f raw -O raw m/d out.raw
        cmp m/d out.raw
        qemu-img convert -S 0 -f raw -O raw m/d full.raw
        cmp m/d full.raw
    ");
    assert!(allocated(&lab.path("out.raw")) < 24 * MIB);
}

#[test]
fn qemu_img_converts_into_the_mount() {
    let mut lab = Lab::new();
    lab.base("src.img", 40 * MIB);
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img e=blank:48M,overlay=ov f=base.img g=base.img");
    lab.sh("
        qemu-img convert -f raw -O qcow2 src.img src.qcow2
        qemu-img convert -f qcow2 -O raw src.qcow2 m/d
        cmp m/d src.img
        qemu-img resize -f raw --shrink m/e 40M
        qemu-img convert -n -t none -f qcow2 -O raw src.qcow2 m/e
        cmp m/e src.img
        qemu-img convert -n -W -m 8 -t none -f qcow2 -O raw src.qcow2 m/f
        cmp -n 41943040 m/f src.img
        cmp -i 41943040 m/f base.img
        qemu-img convert -n --target-is-zero -f qcow2 -O raw src.qcow2 m/g
    ");
    assert_eq!(data_runs(&lab.open_ro("m/e")), data_runs(&lab.open_ro("src.img")));
}

#[test]
fn qemu_img_resizes_a_disk() {
    let lab = lab();
    lab.sh("
        qemu-img resize -f raw m/d +16M
        [ $(stat -c %s m/d) = 67108864 ]
        cmp -n 50331648 m/d base.img
        qemu-img resize -f raw --shrink m/d 10M
        qemu-img resize -f raw m/d 48M
        cmp -n 10485760 m/d base.img
        cmp -i 10485760:0 -n 39845888 m/d /dev/zero
    ");
    let runs = data_runs(&lab.open_ro("m/d"));
    assert!(runs.iter().all(|run| run.end <= 10 * MIB), "{runs:?}");
}

#[test]
fn qcow2_rebased_from_the_disk_to_the_base_holds_only_the_difference() {
    let lab = lab();
    lab.sh("
        qemu-img create -q -f qcow2 -b m/d -F raw vm.qcow2
        qemu-io -c 'write -P 7 20M 64k' vm.qcow2
    ");
    change(&lab, "m/d");
    // The image's backing file is the disk; the rebase copies what differs from the base into the
    // qcow2.
    lab.sh("
        qemu-img create -q -f qcow2 -b m/d -F raw diff.qcow2
        qemu-img rebase -f qcow2 -b base.img -F raw diff.qcow2
        qemu-img compare -f qcow2 -F raw diff.qcow2 m/d
    ");
    assert!(allocated(&lab.path("diff.qcow2")) < 8 * MIB);
}

#[test]
fn dd_reads_and_writes_sparsely_and_with_direct_io() {
    let mut lab = lab();
    lab.base("src.img", 48 * MIB);
    lab.sh("
        dd if=m/d of=out bs=1M conv=sparse status=none
        truncate -s 48M out
        cmp out base.img
        dd if=m/d of=direct bs=1M iflag=direct status=none
        cmp direct base.img
        dd if=src.img of=m/d bs=1M oflag=direct conv=notrunc status=none
        cmp m/d src.img
        dd if=base.img of=m/d bs=64k conv=sparse,fsync status=none
        truncate -s 48M m/d
        cmp m/d base.img
        dd if=src.img of=m/d bs=100k oflag=sync conv=notrunc status=none
        cmp m/d src.img
    ");
    assert!(allocated(&lab.path("out")) < 24 * MIB);
}

#[test]
fn cp_out_of_the_mount_keeps_the_holes() {
    let lab = lab();
    change(&lab, "m/d");
    lab.sh("
        cp m/d auto && cmp m/d auto
        cp --sparse=always m/d always && cmp m/d always
        cp --sparse=never m/d never && cmp m/d never
        cp --reflink=auto m/d reflink && cmp m/d reflink
    ");
    assert_same_holes(&lab, "m/d", "auto");
    assert!(allocated(&lab.path("always")) <= allocated(&lab.path("auto")) + MIB);
    assert!(allocated(&lab.path("never")) >= 48 * MIB);
}

#[test]
fn cp_into_the_mount_gives_an_exact_copy() {
    let mut lab = lab();
    lab.base("small", 10 * MIB + 123);
    lab.base("large", 70 * MIB + 4567);
    lab.sh("
        for mode in auto always never; do
            for source in small large base.img; do
                cp --sparse=$mode $source m/d
                cmp $source m/d
                [ $(stat -c %s $source) = $(stat -c %s m/d) ]
            done
        done
        cp --sparse=auto large m/d
    ");
    let runs = |name: &str| data_runs(&lab.open_ro(name));
    // No data of the base may reappear: holes of the source are holes in the copy.
    let block = |at: u64| at.next_multiple_of(4096);
    let expected: Vec<_> = runs("large").iter().map(|run| run.start..block(run.end)).collect();
    let found: Vec<_> = runs("m/d").iter().map(|run| run.start..block(run.end)).collect();
    assert_eq!(found, expected);
}

#[test]
fn cp_inside_the_mount_copies_data_and_holes() {
    let mut lab = Lab::new();
    lab.base("base.img", 48 * MIB);
    lab.mount("d=base.img e=blank:64M f=base.img");
    change(&lab, "m/d");
    lab.sh("cp m/d m/e && cmp m/d m/e && cp --sparse=never m/e m/f && cmp m/e m/f");
    assert_same_holes(&lab, "m/d", "m/e");
}

#[test]
fn tar_keeps_the_holes_in_both_directions() {
    let lab = lab();
    change(&lab, "m/d");
    lab.sh("
        tar -S -cf d.tar -C m d
        mkdir out && tar -S -xf d.tar -C out
        cmp m/d out/d
    ");
    assert!(allocated(&lab.path("d.tar")) < 24 * MIB);
    assert_same_holes(&lab, "m/d", "out/d");
    lab.sh("
        truncate -s 0 m/d
        tar -S -xOf d.tar > m/d
        cmp m/d out/d
    ");
}

#[test]
fn rsync_keeps_the_holes_in_both_directions() {
    let lab = lab();
    change(&lab, "m/d");
    lab.sh("
        rsync -S m/d out && cmp m/d out
        rsync -I -S --inplace base.img m/d && cmp m/d base.img
        rsync -I --inplace --no-whole-file out m/d && cmp m/d out
        rsync -S --inplace -I base.img m/d && cmp m/d base.img
    ");
    assert!(allocated(&lab.path("out")) < 24 * MIB);
}

/// Creates a file system in a disk through a loop device, fills it, trims it, and checks it after a
/// remount.
fn file_system_in_a_disk(make: &str, check: &str, losetup: &str) {
    let lab = Lab::new();
    lab.mount("d=blank:512M,overlay=ov");
    let device = lab.loop_device("m/d", losetup);
    lab.sh(&format!(
        "
        {make} {device}
        mkdir inside && mount {device} inside
        dd if=/dev/urandom of=inside/big bs=1M count=64 status=none
        echo kept > inside/small
        sync inside/big; sync -f inside/small
        sync m/d
    "
    ));
    let data = data_file(&lab.path("ov"));
    let full = allocated(&data);
    assert!(full > 64 * MIB, "{full}");
    lab.sh("rm inside/big; sync -f inside/small");
    // XFS frees the blocks of a removed file in the background.
    wait_until("fstrim gives the space of a removed file back", || {
        lab.sh("fstrim inside; sync m/d");
        allocated(&data) + 60 * MIB < full
    });
    lab.sh(&format!("umount inside; {check} {device}; losetup -d {device}"));
    wait_until("the loop device lets go", || lab.disk("d")["openers"] == 0);
    lab.umount();
    lab.mount("d=blank:512M,overlay=ov");
    let device = lab.loop_device("m/d", losetup);
    lab.sh(&format!(
        "
        {check} {device}
        mount {device} inside
        [ $(cat inside/small) = kept ]
        umount inside; losetup -d {device}
    "
    ));
}

#[test]
fn ext4_on_a_loop_device_is_trimmed_and_passes_fsck() {
    file_system_in_a_disk("mkfs.ext4 -q", "e2fsck -fn", "");
}

#[test]
fn ext4_on_a_direct_loop_device_is_trimmed_and_passes_fsck() {
    file_system_in_a_disk("mkfs.ext4 -q", "e2fsck -fn", "--direct-io=on");
}

#[test]
fn xfs_on_a_loop_device_is_trimmed_and_passes_repair() {
    file_system_in_a_disk("mkfs.xfs -q", "xfs_repair -n", "");
}

#[test]
fn mkfs_on_the_disk_file_discards_old_data_and_passes_fsck() {
    let mut lab = Lab::new();
    lab.base("base.img", 512 * MIB);
    lab.mount("d=base.img e=base.img");
    lab.sh("
        mkfs.ext4 -q -F m/d && e2fsck -fn m/d
        mkfs.xfs -q -f m/e && xfs_repair -n -f m/e
    ");
    // The discard hides the base's data: only as much data is left as in a plain file.
    lab.sh("
        cp base.img plain.ext4 && mkfs.ext4 -q -F plain.ext4
        cp base.img plain.xfs && mkfs.xfs -q -f plain.xfs
    ");
    for (disk, plain) in [("m/d", "plain.ext4"), ("m/e", "plain.xfs")] {
        let data = |name: &str| -> u64 {
            data_runs(&lab.open_ro(name)).iter().map(|run| run.end - run.start).sum()
        };
        assert!(data(disk) <= data(plain) + MIB, "{disk}: {} {}", data(disk), data(plain));
    }
}

#[test]
fn seek_sees_writes_through_a_shared_mapping() {
    let lab = lab();
    let file = lab.open("m/d");
    let hole = 40 * MIB;
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Data(hole)), Ok((48 * MIB - 5000) / 4096 * 4096));
    // SAFETY: a new mapping of a file that stays open; nothing else uses its memory.
    let page = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            hole as i64,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    // SAFETY: the mapping exists, is writable and one page long.
    unsafe { page.cast::<u8>().write_volatile(42) };
    assert_eq!(seek(&file, rustix::fs::SeekFrom::Data(hole)), Ok(hole));
    lab.sh("cp m/d out");
    assert_eq!(read(&lab.open_ro("out"), hole, 1), [42]);
    // The mapping outlives its file handle, and its writes must still be seen.
    drop(file);
    // SAFETY: as above.
    unsafe { page.cast::<u8>().add(1).write_volatile(43) };
    lab.sh("cp m/d out2");
    assert_eq!(read(&lab.open_ro("out2"), hole, 2), [42, 43]);
    // SAFETY: unmaps the mapping created above, which has no users left.
    assert_eq!(unsafe { libc::munmap(page, 4096) }, 0);
    wait_until("the mapping lets go", || lab.disk("d")["openers"] == 0);
}

#[test]
fn st_blocks_reflects_the_holes_of_a_disk() {
    let lab = lab();
    let found = fs::metadata(lab.path("m/d")).unwrap();
    assert!(found.blocks() * 512 < found.len());
    let file = lab.open("m/d");
    file.write_all_at(&noise(48 * MIB, 5), 0).unwrap();
    let full = fs::metadata(lab.path("m/d")).unwrap();
    assert!(full.blocks() * 512 >= full.len());
    drop(file);
}

#[test]
fn fio_verifies_its_random_writes() {
    let lab = Lab::new();
    lab.mount("d=blank:64M e=blank:64M");
    for (disk, direct, engine) in [("d", 0, "psync"), ("e", 1, "libaio")] {
        lab.sh(&format!(
            "fio --name=t --filename=m/{disk} --size=64M --rw=randrw --bsrange=512-64k --direct={direct} \
             --blockalign=512 --ioengine={engine} --iodepth=8 --io_size=32M --verify=crc32c --verify_fatal=1 \
             --do_verify=1 --fallocate=none --randrepeat=1 --output-format=terse"
        ));
    }
}
