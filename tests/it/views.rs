//! Disks over a part of a base: `offset=` and `len=`, and partitions as parted creates them and
//! util-linux sees them.

use std::fs::{self, File};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::common::mount::*;

/// parted commands for two primary partitions, and three logical ones in an extended one.
const MBR: &str = "mklabel msdos mkpart primary 1MiB 5MiB mkpart primary 6MiB 20MiB \
     mkpart extended 20MiB 60MiB mkpart logical 21MiB 30MiB mkpart logical 31MiB 33MiB \
     mkpart logical 40MiB 60MiB";
/// parted commands for three partitions, the second of which is deleted again.
const GPT: &str = "mklabel gpt mkpart a 1MiB 5MiB mkpart b 5MiB 6MiB mkpart c 6MiB 40MiB rm 2";

/// Creates a file `name` of 64 MiB with random data and the partition table that parted creates
/// from `script`.
fn partitioned(lab: &mut Lab, name: &str, script: &str) {
    let file = File::create(lab.path(name)).unwrap();
    file.write_all_at(&noise(64 * MIB, 3), 0).unwrap();
    file.write_all_at(&[0; MIB as usize], 0).unwrap();
    lab.sh(&format!("parted -s {name} {script}"));
    lab.watch(name);
}

/// Returns number and byte range of each partition of a file or device that holds data, as
/// util-linux sees them. (With a kernel without partition table support `losetup -P` shows none.)
fn seen_by_partx(lab: &Lab, disk: &str) -> Vec<(u32, Range<u64>)> {
    let listed = lab.sh(&format!("partx -g -o NR,START,SECTORS,TYPE {disk}"));
    let mut found = Vec::new();
    for line in listed.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |word: usize| words[word].parse::<u64>().unwrap();
        if !["0x5", "0xf"].contains(&words[3]) {
            // partx counts in units of 512 bytes with any sector size.
            let start = number(1) * 512;
            found.push((number(0) as u32, start..start + number(2) * 512));
        }
    }
    found
}

/// Mounts each of `partitions` of `base` and compares it with its range in the file `bytes`.
fn same_as_its_bytes(lab: &Lab, base: &str, bytes: &str, partitions: &[(u32, Range<u64>)]) {
    let word = |number: u32| format!(" p{number}={base},partition={number},mode=ro");
    lab.mount(partitions.iter().map(|(number, _)| word(*number)).collect::<String>().trim());
    let whole = lab.open_ro(bytes);
    for (number, range) in partitions {
        let name = format!("m/p{number}");
        let mut want = vec![0; (range.end - range.start) as usize];
        whole.read_exact_at(&mut want, range.start).unwrap();
        assert!(fs::read(lab.path(&name)).unwrap() == want, "{base}: {name}");
    }
    lab.umount();
}

#[test]
fn partitions_match_those_of_util_linux() {
    let mut lab = Lab::new();
    for (name, script, numbers) in
        [("mbr.img", MBR, &[1, 2, 5, 6, 7][..]), ("gpt.img", GPT, &[1, 3])]
    {
        partitioned(&mut lab, name, script);
        let seen = seen_by_partx(&lab, name);
        assert!(seen.iter().map(|(number, _)| number).eq(numbers), "{seen:?}");
        same_as_its_bytes(&lab, name, name, &seen);
        let device = lab.loop_device(name, "-r");
        same_as_its_bytes(&lab, &device, name, &seen);
    }
}

#[test]
fn tables_with_large_sectors_are_read_from_devices_and_gpts_from_files() {
    let lab = Lab::new();
    // sfdisk: parted 3.5 sometimes crashes on a device where there is no udev.
    let mbr = "label: dos\n1MiB,4MiB,83\n6MiB,14MiB,83\n20MiB,40MiB,5\n21MiB,9MiB,83\n\
               31MiB,2MiB,83\n40MiB,20MiB,83\n";
    let gpt = "label: gpt\n1MiB,4MiB\n3 : start=6MiB, size=34MiB\n";
    for (name, script, count) in [("mbr.img", mbr, 5), ("gpt.img", gpt, 2)] {
        lab.file_with_holes(name, 64 * MIB);
        let device = lab.loop_device(name, "-b 4096");
        put(&lab.path("script"), script.as_bytes());
        lab.sh(&format!("sfdisk -q --no-reread --no-tell-kernel {device} < script; sync"));
        let seen = seen_by_partx(&lab, &device);
        assert_eq!(seen.len(), count, "{seen:?}");
        assert_eq!(seen[0].1, MIB..5 * MIB);
        same_as_its_bytes(&lab, &device, name, &seen);
        if script == gpt {
            same_as_its_bytes(&lab, name, name, &seen);
        }
    }
}

#[test]
fn damaged_gpt_is_read_from_its_backup() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "gpt.img", GPT);
    let want = lab.sh("tail -c +6291457 gpt.img | head -c 35651584 | md5sum");
    for damage in ["seek=1 count=1", "seek=2 count=4"] {
        lab.sh(&format!(
            "cp gpt.img x.img; dd if=/dev/zero of=x.img bs=512 {damage} conv=notrunc status=none"
        ));
        lab.mount("c=x.img,partition=3,mode=ro");
        assert_eq!(lab.sh("cat m/c | md5sum"), want);
        lab.umount();
        assert!(lab.log().contains("its copy at the end is used"), "{}", lab.log());
    }
    lab.sh("truncate -s 63M x.img");
    let line = lab.refused(1, "mount m x.img,partition=3");
    assert!(line.contains("x.img' has a damaged partition table"), "{line}");
}

#[test]
fn partition_holds_a_file_system_and_its_base_is_unchanged() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", MBR);
    let said = lab.mount("root=disk.img,partition=7,overlay=ov");
    assert!(said.contains("root: 20 MiB, overlay"), "{said}");
    lab.sh("mkfs.ext4 -q m/root; mkdir mnt; mount -o loop m/root mnt; cp -r /etc/apt mnt
            umount mnt; e2fsck -fn m/root >&2");
    let before = lab.sh("md5sum < m/root");
    lab.umount();
    // The same range, by partition number or by bytes.
    for again in ["partition=7", "offset=40M,len=20M"] {
        lab.mount(&format!("root=disk.img,overlay=ov,{again}"));
        assert_eq!(lab.sh("md5sum < m/root"), before);
        lab.umount();
    }
    assert!(lab.ok("check ov").contains("base     bytes 41943040..62914560 of "));
    for (other, is) in [
        ("partition=6", "as bytes 32505856..34603008"),
        ("offset=40M,len=10M", "as bytes 41943040..52428800"),
        ("offset=40M", "as bytes 41943040..67108864"),
        ("mode=cow", "as a whole"),
    ] {
        let line = lab.refused(1, &format!("mount m root=disk.img,overlay=ov,{other}"));
        assert!(line.contains("disk.img' as bytes 41943040..62914560, not of '"), "{line}");
        assert!(line.contains(is) && line.contains("name the base it was made with"), "{line}");
        // This is no change of the base, so --force does not apply.
        lab.refused(1, &format!("mount m root=disk.img,overlay=ov,{other} --force"));
    }
}

#[test]
fn holes_of_a_base_are_holes_of_its_parts() {
    let mut lab = Lab::new();
    let file = File::create(lab.path("b.img")).unwrap();
    file.set_len(64 * MIB).unwrap();
    file.write_all_at(&noise(4 * MIB, 1), 16 * MIB).unwrap();
    lab.watch("b.img");
    lab.mount("d=b.img,offset=8M,len=32M");
    let map: serde_json::Value = serde_json::from_str(&lab.ok("map m/d --json")).unwrap();
    let runs = map.as_array().unwrap().iter();
    let runs: Vec<(u64, u64, bool)> = runs
        .map(|run| {
            let number = |key: &str| run[key].as_u64().unwrap();
            (number("start"), number("length"), run["data"].as_bool().unwrap())
        })
        .collect();
    let want = [(0, 8 * MIB, false), (8 * MIB, 4 * MIB, true), (12 * MIB, 20 * MIB, false)];
    assert_eq!(runs, want);
    // A part that begins and ends inside a block.
    lab.ok("add m odd=b.img,offset=17408512,len=100001");
    lab.sh("tail -c +17408513 b.img | head -c 100001 > want; cmp m/odd want
            printf x | dd of=m/odd bs=1 seek=100000 conv=notrunc status=none
            head -c 100000 m/odd > got; head -c 100000 want | cmp - got");
    lab.umount();
}

#[test]
fn partition_of_a_qcow2_image_can_be_a_disk() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", GPT);
    lab.sh("mkfs.ext4 -q -F -E offset=1048576 disk.img 4M
            qemu-img convert -c -f raw -O qcow2 disk.img packed.qcow2
            qemu-img create -q -f qcow2 -b packed.qcow2 -F qcow2 vm.qcow2
            head -c 5242880 disk.img | tail -c +1048577 > want");
    lab.watch("disk.img");
    lab.watch("vm.qcow2");
    lab.mount("one=vm.qcow2,format=qcow2,partition=1,overlay=ov");
    lab.sh("cmp m/one want; e2fsck -fn m/one >&2");
    lab.open("m/one").write_all_at(b"changed", 3 * MIB).unwrap();
    let before = lab.sh("md5sum < m/one");
    lab.umount();
    let line = lab.refused(1, "mount m one=vm.qcow2,format=qcow2,partition=3,overlay=ov");
    assert!(line.contains("as bytes 1048576..5242880, not of "), "{line}");
    lab.mount("one=vm.qcow2,format=qcow2,partition=1,overlay=ov");
    assert_eq!(lab.sh("md5sum < m/one"), before);
    let line = lab.refused(1, "commit m/one");
    assert!(line.contains("qcow2 image, which is only read"), "{line}");
    lab.umount();
    lab.refused(1, "mount m one=vm.qcow2,format=qcow2,partition=1,mode=rw");
}

#[test]
fn mode_rw_writes_only_inside_the_part() {
    let lab = Lab::new();
    fs::write(lab.path("b.img"), noise(4 * MIB, 9)).unwrap();
    let mut want = noise(4 * MIB, 9);
    lab.mount("d=b.img,offset=1M,len=1000000,mode=rw");
    let disk = lab.open("m/d");
    disk.write_all_at(&[1; 100_000], 900_000).unwrap();
    disk.write_all_at(&[2; 10], 0).unwrap();
    punch(&disk, 200_000..300_000);
    let full = disk.write_all_at(&[3; 2], 999_999).unwrap_err();
    assert_eq!(full.raw_os_error(), Some(libc::EINVAL));
    for size in [0, 999_999, 2 * MIB] {
        assert_eq!(disk.set_len(size).unwrap_err().raw_os_error(), Some(libc::EINVAL), "{size}");
    }
    disk.set_len(1_000_000).unwrap();
    assert_eq!(disk.metadata().unwrap().len(), 1_000_000);
    disk.sync_all().unwrap();
    drop(disk);
    lab.umount();
    let at = MIB as usize;
    want[at + 900_000..at + MIB as usize - 48_576].fill(1);
    want[at..at + 10].fill(2);
    want[at + 200_000..at + 300_000].fill(0);
    assert!(fs::read(lab.path("b.img")).unwrap() == want);
}

fn punch(file: &File, range: Range<u64>) {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, range.start, range.end - range.start).unwrap();
}

#[test]
fn commit_writes_only_the_part_and_keeps_the_size_of_the_file() {
    let lab = Lab::new();
    fs::write(lab.path("b.img"), noise(8 * MIB, 5)).unwrap();
    let mut want = noise(8 * MIB, 5);
    let (start, len) = (MIB as usize + 512, 3_000_001);
    let part = format!("offset={start},len={len}");
    lab.mount(&format!("d=b.img,{part},overlay=ov"));
    let disk = lab.open("m/d");
    // Aligned and unaligned data, at both ends, and zeros.
    for (at, bytes) in [(0, 5000), (1_000_000, 70_000), (len - 3, 3)] {
        disk.write_all_at(&vec![7; bytes], at as u64).unwrap();
        want[start + at..start + at + bytes].fill(7);
    }
    punch(&disk, MIB * 2..MIB * 2 + 200_000);
    want[start + 2 * MIB as usize..start + 2 * MIB as usize + 200_000].fill(0);
    drop(disk);
    lab.ok("commit m/d");
    assert!(fs::read(lab.path("b.img")).unwrap() == want);
    assert!(fs::read(lab.path("m/d")).unwrap() == want[start..start + len]);

    // A disk smaller than its part keeps the bytes beyond its end. Committed offline.
    lab.open("m/d").set_len(2 * MIB).unwrap();
    lab.open("m/d").write_all_at(&[8; 4096], 0).unwrap();
    want[start..start + 4096].fill(8);
    lab.umount();
    lab.ok("commit ov");
    assert!(fs::read(lab.path("b.img")).unwrap() == want);
    lab.mount(&format!("d=b.img,{part},overlay=ov"));
    assert!(fs::read(lab.path("m/d")).unwrap() == want[start..start + 2 * MIB as usize]);

    // A disk larger than its part is rejected, although the file has space.
    lab.open("m/d").set_len(len as u64 + 1).unwrap();
    let line = lab.refused(1, "commit m/d");
    assert!(line.contains("it is larger (2.9 MiB) than its base"), "{line}");
    assert!(fs::read(lab.path("b.img")).unwrap() == want);
    lab.umount();
    assert!(lab.ok("check ov").contains("unchanged"));
}

#[test]
fn store_clone_keep_and_rebase_preserve_the_part() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "disk.img", GPT);
    lab.sh("head -c 5242880 disk.img | tail -c +1048577 > want");
    lab.mount("--store st d=disk.img,partition=1,overlay=st");
    lab.ok("clone m/d e");
    lab.sh("cmp m/d want; cmp m/e want");
    lab.umount();
    lab.ok("mount m --store st");
    lab.sh("cmp m/d want; cmp m/e want");
    lab.umount();

    lab.mount("d=disk.img,partition=1,overlay=ov t=disk.img,partition=1");
    lab.ok("keep m/t kept");
    lab.umount();
    lab.sh("mkdir new; cp -p disk.img new");
    for overlay in ["ov", "kept"] {
        lab.ok(&format!("rebase {overlay} --base new/disk.img"));
        let checked = lab.ok(&format!("check {overlay}"));
        assert!(checked.contains("bytes 1048576..5242880 of "), "{checked}");
        lab.mount(&format!("d=new/disk.img,partition=1,overlay={overlay}"));
        lab.sh("cmp m/d want");
        lab.umount();
    }
    lab.sh("truncate -s 2M short.img");
    let line = lab.refused(1, "rebase ov --base short.img --force");
    assert!(line.contains("short.img' has no bytes 1048576..5242880"), "{line}");
}

#[test]
fn missing_part_is_rejected_with_a_list_of_partitions() {
    let mut lab = Lab::new();
    partitioned(&mut lab, "mbr.img", MBR);
    lab.base("bare.img", 4 * MIB);
    lab.sh("head -c 50M mbr.img > short.img");
    let has = "1 (4 MiB), 2 (14 MiB), 3 (extended), 5 (9 MiB), 6 (2 MiB), 7 (20 MiB)";
    for (disk, why) in [
        ("mbr.img,partition=4", format!("mbr.img' has no partition 4: there are {has}")),
        ("mbr.img,partition=8", format!("mbr.img' has no partition 8: there are {has}")),
        ("mbr.img,partition=3", "has an extended partition 3, which holds others".to_owned()),
        ("bare.img,partition=1", "bare.img' has no partition table".to_owned()),
        (
            "short.img,partition=7",
            "short.img' is cut off: partition 7 (20 MiB) ends at ".to_owned(),
        ),
        ("bare.img,offset=4M", "bare.img' ends at 4194304, and offset=4194304".to_owned()),
        ("bare.img,offset=1M,len=4M", "bare.img' has no bytes 1048576..5242880".to_owned()),
        ("bare.img,len=7E", "has no bytes 0..".to_owned()),
    ] {
        for mode in ["cow", "ro", "rw"] {
            let line = lab.refused(1, &format!("mount m {disk},mode={mode}"));
            assert!(line.contains(&why), "{line}");
        }
        lab.refused(1, &format!("mount m {disk},overlay=ov"));
        assert!(!lab.path("ov").exists());
    }
    for (disk, why) in [
        ("mbr.img,partition=1,offset=1M", "'partition' is there beside offset="),
        ("mbr.img,offset=1000", "take a multiple of 512"),
        ("mbr.img,len=0", "'0' is not a length"),
        ("mbr.img,partition=0", "count from 1"),
        ("mbr.img,partiton=1", "did you mean 'partition'?"),
        ("b=blank:1M,partition=1", "this disk is blank"),
    ] {
        let line = lab.refused(2, &format!("mount m {disk}"));
        assert!(line.contains(why), "{line}");
    }
    lab.sh("printf '[[disk]]\\nname = \"r\"\\nsource = \"mbr.img\"\\npartition = 5\\nmode = \"ro\"\\n\
            [[disk]]\\nname = \"o\"\\nsource = \"mbr.img\"\\noffset = 1048576\\nlen = \"4M\"\\n' > c.toml");
    lab.ok("mount m --config c.toml");
    assert_eq!(fs::metadata(lab.path("m/r")).unwrap().len(), 9 * MIB);
    assert_eq!(fs::metadata(lab.path("m/o")).unwrap().len(), 4 * MIB);
    lab.umount();
}

#[test]
fn reflink_overlay_requires_a_whole_file() {
    let mut lab = Lab::new();
    lab.host("host", "xfs", 400 * MIB);
    lab.base("host/b.img", 8 * MIB);
    let line = lab.refused(2, "mount m d=host/b.img,offset=1M,overlay=host/ov,reflink");
    assert!(line.contains("'reflink' is for whole files"), "{line}");
    lab.mount("d=host/b.img,overlay=host/ov,reflink");
    lab.umount();
    let line = lab.refused(1, "mount m d=host/b.img,offset=1M,overlay=host/ov");
    assert!(line.contains("as a whole, not of ") && line.contains("as bytes "), "{line}");
    // A block overlay on the same file system, whose copies are reflinked where possible.
    lab.mount("d=host/b.img,offset=1536,len=4M,overlay=host/blocks");
    lab.sh("tail -c +1537 host/b.img | head -c 4194304 > want
            cmp m/d want; cp m/d host/copy; cmp host/copy want");
    lab.ok("prefetch m/d --copy");
    lab.sh("cmp m/d want");
    lab.ok("hydrate m/d");
    lab.sh("cmp m/d want");
    lab.umount();
    lab.mount("d=blank:4M,overlay=host/blocks");
    lab.sh("cmp m/d want");
    lab.umount();
}
