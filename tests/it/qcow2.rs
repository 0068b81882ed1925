//! qcow2 bases: images created by the real qemu-img are read as QEMU reads them, and hostile ones
//! are rejected before any file that they name is opened.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crate::common::mount::*;
use crate::common::qemu::assert_same_as_qemu;
use cowslip::base::{BaseAccess, BaseOptions};
use cowslip::config::{DirectIo, DiskSource, Format, Locking, Passthrough, SourcePart};
use cowslip::extents::{Extent, ExtentKind};
use cowslip::layer::Wait;
use rustix::fs::{CWD, RenameFlags};

/// Mounts the images `names` read-only and checks that the disks equal what QEMU reads.
fn same_as_qemu(lab: &Lab, names: &[&str]) {
    let words = names.iter().map(|name| format!(" {name}={name}.qcow2,format=qcow2,mode=ro"));
    lab.mount(words.collect::<String>().trim_start());
    for name in names {
        assert_same_as_qemu(lab, name, "qcow2", &format!("{name}.qcow2"));
    }
    lab.umount();
}

#[test]
fn images_of_every_cluster_size_and_version_are_read_like_qemu() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let mut names = Vec::new();
    for bits in 9..=21 {
        for compat in ["0.10", "1.1"] {
            let name = format!("c{bits}v{}", compat.replace('.', ""));
            lab.sh(&format!(
                "qemu-img convert -f raw -O qcow2 -o cluster_size={},compat={compat} base.img {name}.qcow2
                 qemu-io -c 'write -P 9 1000K 30K' -c 'write -z 2M 1M' -c 'discard 4M 1M' {name}.qcow2",
                1 << bits
            ));
            names.push(name);
        }
    }
    same_as_qemu(&lab, &names.iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn compressed_and_preallocated_images_are_read_like_qemu() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("qemu-img convert -c -f raw -O qcow2 base.img packed.qcow2
         qemu-img convert -c -f raw -O qcow2 -o cluster_size=2M base.img large.qcow2
         qemu-img convert -c -f raw -O qcow2 -o cluster_size=512 base.img small.qcow2
         qemu-img create -q -f qcow2 -o preallocation=metadata meta.qcow2 9M
         qemu-io -c 'write -P 3 3M 1M' meta.qcow2
         qemu-img create -q -f qcow2 -o preallocation=full full.qcow2 3M
         qemu-img create -q -f qcow2 empty.qcow2 7M
         qemu-img create -q -f qcow2 odd.qcow2 1000448
         qemu-io -c 'write -P 5 990208 10240' odd.qcow2
         qemu-img snapshot -c one packed.qcow2
         qemu-io -c 'write -P 8 0 1M' packed.qcow2");
    same_as_qemu(&lab, &["packed", "large", "small", "meta", "full", "empty", "odd"]);
}

#[test]
fn backing_chains_are_read_down_to_the_last_image() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    lab.sh("mkdir deep
         qemu-img create -q -f qcow2 -b ../base.img -F raw deep/one.qcow2 6M
         qemu-io -c 'write -P 1 1M 100K' -c 'write -z 3M 1M' deep/one.qcow2
         qemu-img create -q -f qcow2 -o compat=0.10 -b deep/one.qcow2 -F qcow2 two.qcow2 9M
         qemu-io -c 'write -P 2 1050K 10K' -c 'write -P 2 7M 64K' two.qcow2
         qemu-img create -q -f qcow2 -b two.qcow2 -F qcow2 three.qcow2 10M
         qemu-io -c 'write -z 64K 64K' -c 'write -P 3 8M 1' three.qcow2");
    same_as_qemu(&lab, &["three"]);
    // The same through an overlay that is mounted repeatedly.
    let before =
        lab.sh("qemu-img convert -f qcow2 -O raw three.qcow2 three.raw; cat three.raw | md5sum");
    lab.mount("d=three.qcow2,format=qcow2,overlay=ov");
    assert_eq!(lab.sh("cat m/d | md5sum"), before);
    lab.open("m/d").write_all_at(b"written", 3 * MIB - 3).unwrap();
    let changed = lab.sh("cat m/d | md5sum");
    lab.umount();
    // With another format it is another base.
    let line = lab.refused(1, "mount m d=three.qcow2,format=raw,overlay=ov");
    assert!(line.contains("as qcow2, not of") && line.contains("as raw"), "{line}");
    lab.mount("d=three.qcow2,format=qcow2,overlay=ov");
    assert_eq!(lab.sh("cat m/d | md5sum"), changed);
    lab.umount();
    assert!(lab.ok("check ov").contains("three.qcow2, qcow2, "));
}

#[test]
fn changed_backing_file_of_a_base_is_detected() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("qemu-img create -q -f qcow2 -b base.img -F raw top.qcow2");
    lab.mount("d=top.qcow2,format=qcow2,overlay=ov");
    lab.open("m/d").write_all_at(b"x", 0).unwrap();
    lab.umount();
    assert!(lab.ok("check ov").contains("base.img, 4 MiB, unchanged"));
    // All files move, with the same content.
    lab.sh("mkdir new; cp -p base.img top.qcow2 new; mv top.qcow2 old.qcow2");
    lab.ok("rebase ov --base new/top.qcow2");
    lab.mount("d=new/top.qcow2,format=qcow2,overlay=ov");
    lab.umount();
    lab.sh("printf y | dd of=new/base.img bs=1 seek=1000 conv=notrunc status=none");
    let line = lab.refused(1, "mount m d=new/top.qcow2,format=qcow2,overlay=ov");
    assert!(line.contains("its backing file '") && line.contains("/new/base.img'"), "{line}");
    let checked = lab.cowslip("check ov");
    let said = String::from_utf8_lossy(&checked.stdout);
    assert!(
        checked.status.code() == Some(3)
            && said.contains("base.img', which the base needs, has changed"),
        "{said}"
    );
    let line = lab.refused(1, "rebase ov --base new/top.qcow2");
    assert!(line.contains("is not the base of overlay") && line.contains("base.img"), "{line}");
    lab.ok("rebase ov --base new/top.qcow2 --force");
    lab.mount("d=new/top.qcow2,format=qcow2,overlay=ov");
}

#[test]
fn disk_of_a_store_records_the_format_of_its_base() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.sh("qemu-img convert -f raw -O qcow2 base.img vm.qcow2");
    lab.mount("--store st d=vm.qcow2,format=qcow2,overlay=st bytes=vm.qcow2,format=raw,overlay=st");
    lab.sh("cmp m/d base.img; cmp m/bytes vm.qcow2");
    lab.ok("clone m/d e");
    lab.ok("clone m/bytes f");
    lab.umount();
    lab.mount("--store st");
    lab.sh("cmp m/d base.img; cmp m/e base.img; cmp m/bytes vm.qcow2; cmp m/f vm.qcow2");
}

#[test]
fn raw_base_stays_raw_even_if_a_guest_writes_a_qcow2_header() {
    let lab = Lab::new();
    lab.sh("truncate -s 4M base.img; qemu-img create -q -f qcow2 -b /etc/shadow -F raw evil.qcow2");
    lab.mount("d=base.img,overlay=ov");
    lab.sh("dd if=evil.qcow2 of=m/d conv=notrunc status=none");
    let bytes = fs::read(lab.path("m/d")).unwrap();
    lab.ok("commit m/d");
    lab.umount();
    // The base looks like a qcow2 image now, so the user must name the format; the overlay has
    // recorded it as raw.
    let line = lab.refused(1, "mount m d=base.img,overlay=ov");
    assert!(line.contains("add ,format=qcow2 (or ,format=raw for the bytes)"), "{line}");
    lab.mount("d=base.img,format=raw,overlay=ov");
    assert!(fs::read(lab.path("m/d")).unwrap() == bytes);
    lab.umount();
    // A backing file with a recorded format stays raw as well.
    lab.sh("qemu-img create -q -f qcow2 -b base.img -F raw top.qcow2");
    same_as_qemu(&lab, &["top"]);
}

#[test]
fn qcow2_base_is_read_only() {
    let lab = Lab::new();
    lab.sh("qemu-img create -q -f qcow2 vm.qcow2 4M");
    let line = lab.refused(1, "mount m d=vm.qcow2,format=qcow2,mode=rw");
    assert!(line.contains("only read") && line.contains("qemu-img commit"), "{line}");
    lab.mount("d=vm.qcow2,format=qcow2,overlay=ov");
    lab.open("m/d").write_all_at(b"x", 0).unwrap();
    let line = lab.refused(1, "commit m/d");
    assert!(line.contains("qemu-img commit"), "{line}");
    lab.umount();
    assert!(lab.refused(1, "commit ov").contains("qemu-img commit"));
}

/// Checks that mounting `image` fails quickly, with a line that contains all of `words`.
fn hostile(lab: &Lab, image: &str, words: &[&str]) {
    let start = Instant::now();
    let line = lab.refused(1, &format!("mount m d={image},format=qcow2"));
    assert!(start.elapsed() < Duration::from_secs(10), "it took {:?}", start.elapsed());
    for word in words {
        assert!(line.contains(word), "{image}: {line}");
    }
}

#[test]
fn backing_files_outside_allowed_directories_are_not_opened() {
    let lab = Lab::new();
    lab.sh("mkdir in out
         qemu-img create -q -f raw out/base.img 4M
         qemu-img create -q -f qcow2 -b /etc/shadow -F raw in/shadow.qcow2 4M
         qemu-img create -q -f qcow2 -b ../out/base.img -F raw in/out.qcow2
         ln -s ../out/base.img in/link
         qemu-img create -q -f qcow2 -b link -F raw in/link.qcow2
         qemu-img create -q -f qcow2 -b out.qcow2 -F qcow2 in/two.qcow2
         (cd in; qemu-img create -q -f qcow2 -o data_file=data.raw data.qcow2 4M)
         for name in json:{} nbd:localhost:10809 http://localhost/x fat:/etc; do
             qemu-img create -q -f qcow2 -u -b \"$name\" -F raw in/${name%%:*}.qcow2 4M
         done");
    hostile(&lab, "in/shadow.qcow2", &["'/etc/shadow'", "--allow-backing /etc "]);
    for image in ["in/out.qcow2", "in/link.qcow2", "in/two.qcow2"] {
        hostile(&lab, image, &["/out/base.img'", "not below a directory that is allowed"]);
    }
    hostile(&lab, "in/data.qcow2", &["in/data.raw'", "not below a directory that is allowed"]);
    for name in ["json", "nbd", "http", "fat"] {
        hostile(&lab, &format!("in/{name}.qcow2"), &[&format!("'{name}:"), "only names of files"]);
    }
    lab.mount("--allow-backing out d=in/two.qcow2,format=qcow2,mode=ro");
    assert_eq!(fs::metadata(lab.path("m/d")).unwrap().len(), 4 * MIB);
    lab.ok("add --allow-backing in m e=in/data.qcow2,format=qcow2,mode=ro");
    lab.umount();
    fs::write(
        lab.path("a.toml"),
        "allow-backing = ['out']\n[[disk]]\nsource = 'in/out.qcow2'\nformat = 'qcow2'\n",
    )
    .unwrap();
    lab.mount("--config a.toml");
}

/// Opens `image` as a mount would, with no other directory allowed than its own.
fn open(image: &Path) -> Result<cowslip::base::Base, cowslip::base::BaseError> {
    let how = BaseOptions {
        format: Some(Format::Qcow2),
        part: SourcePart::Whole,
        access: BaseAccess::Read,
        locking: Locking::Off,
        passthrough: Passthrough::Off,
        direct: DirectIo::Off,
        allow_backing: &[],
    };
    cowslip::base::open(&DiskSource::File(image.to_owned()), how)
}

#[test]
fn directory_replaced_by_a_link_during_an_open_is_not_followed() {
    let lab = Lab::new();
    lab.sh("mkdir -p own/sub out
         truncate -s 1M own/sub/base; truncate -s 1M out/base
         ln -s ../out own/link
         qemu-img create -q -f qcow2 -b sub/base -F raw own/top.qcow2
         qemu-img create -q -f qcow2 -u -b $PWD/out/base -F raw own/sub/low.qcow2 1M
         qemu-img create -q -f qcow2 out/low.qcow2 1M");
    let forbidden = fs::metadata(lab.path("out/base")).unwrap().ino();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (sub, link) = (lab.path("own/sub"), lab.path("own/link"));
            while !is_over.load(Ordering::Relaxed) {
                rustix::fs::renameat_with(CWD, &sub, CWD, &link, RenameFlags::EXCHANGE).unwrap();
            }
        });
        // Through the backing file's name, and through the path of the image itself.
        let images = ["own/top.qcow2", "own/sub/low.qcow2"].map(|image| lab.path(image));
        let needs = |image: &PathBuf| open(image).map_or_else(|_| Vec::new(), |base| base.needs);
        let opened = (0..5000).flat_map(|_| &images).flat_map(needs);
        let mut found = opened.map(|(_, file)| file.metadata().unwrap().ino());
        let is_any_forbidden = found.any(|inode| inode == forbidden);
        is_over.store(true, Ordering::Relaxed);
        assert!(!is_any_forbidden, "a file outside was opened");
    });
}

#[test]
fn work_on_a_huge_image_follows_its_data_and_not_its_size() {
    let lab = Lab::new();
    // As large as disks get, with data in three places, and the same over another image.
    lab.sh("qemu-img create -q -f qcow2 -o cluster_size=2M low.qcow2 1E
         qemu-io -c 'write -P 7 512P 64K' low.qcow2
         qemu-img create -q -f qcow2 -o cluster_size=2M -b low.qcow2 -F qcow2 top.qcow2
         qemu-io -c 'write -P 8 4M 64K' -c 'write -P 9 700P 64K' top.qcow2");
    let size = 1 << 60;
    let disk = open(&lab.path("top.qcow2")).unwrap().layer.reader();
    // Without waiting, too, where there is no table.
    let hole = disk.extent_at(800 << 50..size, Wait::No).unwrap();
    assert_eq!(hole, Extent::new(800 << 50..size, ExtentKind::Hole));
    let (mut at, mut lookups, mut data) = (0, 0, Vec::new());
    while at < size {
        let found = disk.extent_at(at..size, Wait::Yes).unwrap();
        if found.kind == ExtentKind::Data {
            data.push(found.range.start);
        }
        at = found.range.end;
        lookups += 1;
    }
    assert_eq!(data, [4 << 20, 512 << 50, 700 << 50]);
    // Those of the stretches that three tables map, each of half a TiB.
    assert!(lookups < 1000, "{lookups} look-ups");
    drop(disk);
    lab.mount("d=top.qcow2,format=qcow2,overlay=ov");
    assert!(fs::metadata(lab.path("m/d")).unwrap().blocks() * 512 < 16 * MIB);
    lab.open("m/d").write_all_at(b"x", size - 1).unwrap();
    let map = lab.ok("map m/d --json");
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert_eq!(map.as_array().unwrap().last().unwrap()["depth"], 0);
    for words in ["prefetch m/d", "diff m/d -O rbd -o x.rbd", "diff m/d --full -O rbd -o f.rbd"] {
        lab.ok(words);
    }
    lab.umount();
    lab.ok("check ov");
    lab.ok("import top.qcow2 --overlay new");
    lab.mount("d=low.qcow2,format=qcow2,overlay=new");
    lab.ok("hydrate m/d");
    let mut byte = [0];
    for (at, expected) in [(4 << 20, 8), (512 << 50, 7), (700 << 50, 9), (size - 1, 0)] {
        lab.open_ro("m/d").read_exact_at(&mut byte, at).unwrap();
        assert_eq!(byte, [expected], "at {at}");
    }
}

#[test]
fn chain_with_too_large_tables_is_rejected() {
    let lab = Lab::new();
    // Each image takes a few KiB and has an L1 table of 32 MiB, the maximum.
    lab.sh("qemu-img create -q -f qcow2 -o cluster_size=512 0.qcow2 1M
         for i in 1 2 3 4; do
             qemu-img create -q -f qcow2 -u -o cluster_size=512 -b $((i - 1)).qcow2 -F qcow2 $i.qcow2 1M
         done");
    for number in 0..5 {
        let path = lab.path(&format!("{number}.qcow2"));
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(40 << 20).unwrap();
        file.write_all_at(&(4_u32 << 20).to_be_bytes(), 36).unwrap();
        file.write_all_at(&(1_u64 << 20).to_be_bytes(), 40).unwrap();
    }
    lab.mount("d=2.qcow2,format=qcow2,mode=ro");
    lab.umount();
    // The fourth image exceeds the limit.
    hostile(&lab, "3.qcow2", &["0.qcow2'", "to more than 128 MiB"]);
    hostile(&lab, "4.qcow2", &["1.qcow2'", "to more than 128 MiB"]);
}

#[test]
fn external_data_file_is_read_if_allowed() {
    let lab = Lab::new();
    lab.sh("qemu-img create -q -f qcow2 -o data_file=data.raw d.qcow2 4M
         qemu-io -c 'write -P 7 1M 1M' -c 'write -z 2M 64K' d.qcow2
         qemu-img convert -f qcow2 -O raw d.qcow2 want.raw");
    lab.mount("--allow-backing . d=d.qcow2,format=qcow2,mode=ro");
    lab.sh("cmp m/d want.raw");
}

#[test]
fn endless_chains_and_chains_without_a_format_are_rejected() {
    let lab = Lab::new();
    lab.sh(
        "qemu-img create -q -f qcow2 -u -b pelf.qcow2 -F qcow2 other.qcow2 4M
         sed s/pelf.qcow2/self.qcow2/ other.qcow2 >self.qcow2
         qemu-img create -q -f qcow2 -u -b pong.qcow2 -F qcow2 ping.qcow2 4M
         qemu-img create -q -f qcow2 -u -b ping.qcow2 -F qcow2 pong.qcow2 4M
         qemu-img create -q -f qcow2 -u -b none.img -F raw gone.qcow2 4M
         qemu-img create -q -f qcow2 -u -b gone.qcow2 -F vmdk vmdk.qcow2 4M
         qemu-img create -q -f qcow2 -u -b 0300.qcow2 -F qcow2 0301.qcow2 4M
         for i in $(seq 0 300); do sed s/0300.qcow2/$(printf %04d $((i + 1))).qcow2/ 0301.qcow2 >$(printf %04d $i).qcow2; done
         truncate -s 4M none
         qemu-img create -q -f qcow2 -u -b none -F raw -o compat=0.10 probed.qcow2 4M
         printf '\\0\\0\\0\\0' | dd of=probed.qcow2 bs=1 seek=72 conv=notrunc status=none",
    );
    hostile(&lab, "self.qcow2", &["its own backing file"]);
    hostile(&lab, "ping.qcow2", &["its own backing file"]);
    hostile(&lab, "gone.qcow2", &["needs another file", "none.img' does not exist"]);
    hostile(&lab, "vmdk.qcow2", &["in the format vmdk"]);
    hostile(&lab, "0000.qcow2", &["more than 256 backing files"]);
    hostile(&lab, "probed.qcow2", &["does not say which format", "qemu-img rebase -u -F FORMAT"]);
}

#[test]
fn damaged_headers_and_tables_are_rejected() {
    let lab = Lab::new();
    lab.sh(
        "qemu-img create -q -f qcow2 good.qcow2 64M
         qemu-io -c 'write -P 1 0 4M' good.qcow2
         qemu-img create -q -f qcow2 --object secret,id=s,data=x -o encrypt.format=luks,encrypt.key-secret=s luks.qcow2 4M
         qemu-img create -q -f qcow2 -o compression_type=zstd zstd.qcow2 4M
         qemu-img create -q -f qcow2 -o extended_l2=on,cluster_size=64K wide.qcow2 4M",
    );
    hostile(&lab, "luks.qcow2", &["is encrypted", "qemu-img convert"]);
    hostile(&lab, "zstd.qcow2", &["zstd", "qemu-img convert"]);
    hostile(&lab, "wide.qcow2", &["extended L2", "qemu-img convert"]);
    let good = fs::read(lab.path("good.qcow2")).unwrap();
    let l1 = u64::from_be_bytes(good[40..48].try_into().unwrap());
    let damage: [(u64, &[u8], &str); 13] = [
        (0, b"QFX", "it has no header"),
        (4, &9_u32.to_be_bytes(), "version 9"),
        (20, &0_u32.to_be_bytes(), "clusters of 2^0"),
        (20, &63_u32.to_be_bytes(), "clusters of 2^63"),
        (24, &u64::MAX.to_be_bytes(), "an L1 table of"),
        (36, &(1_u32 << 31).to_be_bytes(), "an L1 table of 2147483648 entries"),
        (36, &0_u32.to_be_bytes(), "an L1 table of 0 entries, and 1 are needed"),
        (40, &(1_u64 << 40).to_be_bytes(), "outside the file"),
        (40, &0_u64.to_be_bytes(), "over its header"),
        (72, &(1_u64 << 40).to_be_bytes(), "unknown incompatible features 0x10000000000"),
        (72, &2_u64.to_be_bytes(), "marked as corrupt"),
        (l1, &(1_u64 << 63 | 1 << 40).to_be_bytes(), "an L2 table at 1099511627776"),
        (l1, &(1_u64 << 63 | l1).to_be_bytes(), "an L2 table at"),
    ];
    for (at, bytes, why) in damage {
        let mut image = good.clone();
        image[at as usize..][..bytes.len()].copy_from_slice(bytes);
        fs::write(lab.path("bad.qcow2"), image).unwrap();
        hostile(&lab, "bad.qcow2", &["bad.qcow2'", why]);
    }
    fs::write(lab.path("bad.qcow2"), &good[..60]).unwrap();
    hostile(&lab, "bad.qcow2", &["it has no header"]);
    fs::write(lab.path("bad.qcow2"), &good[..l1 as usize]).unwrap();
    hostile(&lab, "bad.qcow2", &["outside the file"]);
}

#[test]
fn entries_that_an_image_of_its_kind_cannot_have_are_errors_as_in_qemu() {
    let lab = Lab::new();
    lab.sh("qemu-img create -q -f qcow2 -o compat=0.10 old.q 4M
         qemu-img create -q -f qcow2 -o data_file=moved.raw moved.q 4M
         qemu-img create -q -f qcow2 -o data_file=packed.raw packed.q 4M
         for i in old moved packed; do qemu-io -c 'write -P 7 0 256K' $i.q; done");
    // The second of four clusters: zeros in version 2, bytes of another place, compressed ones.
    for (name, change) in [
        ("old", (|entry| entry | 1) as fn(u64) -> u64),
        ("moved", |entry| entry + 65_536),
        ("packed", |entry| entry & !(1 << 63) | 1 << 62),
    ] {
        let image = lab.open(&format!("{name}.q"));
        let number = |at: u64| {
            let mut bytes = [0; 8];
            image.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        let l2 = number(number(40)) & 0x00ff_ffff_ffff_fe00;
        image.write_all_at(&change(number(l2 + 8)).to_be_bytes(), l2 + 8).unwrap();
    }
    let words = ["old", "moved", "packed"].map(|name| format!("{name}={name}.q,format=qcow2"));
    lab.mount(&format!("--allow-backing . {}", words.join(" ")));
    for name in ["old", "moved", "packed"] {
        let disk = lab.open_ro(&format!("m/{name}"));
        let mut buf = [0; 4096];
        for at in [0, 128 << 10] {
            disk.read_exact_at(&mut buf, at).unwrap();
            assert_eq!(buf, [7; 4096], "{name}: {at}");
        }
        let error = disk.read_exact_at(&mut buf, 64 << 10).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO), "{name}");
        let qemu = format!("qemu-io -r -f qcow2 -c 'read 64K 4K' {name}.q 2>&1 || true");
        let qemu = lab.sh(&qemu);
        assert!(qemu.contains("Input/output error"), "{name}: {qemu}");
    }
}

#[test]
fn damaged_clusters_give_errors_instead_of_wrong_bytes() {
    let lab = Lab::new();
    lab.sh("seq 700000 | head -c 4M >base.img; qemu-img convert -c -f raw -O qcow2 base.img packed.qcow2; qemu-img convert -f raw -O qcow2 base.img cut.qcow2");
    // The second half of the file, which is compressed data, is overwritten and does not inflate
    // any more.
    let file = OpenOptions::new().write(true).open(lab.path("packed.qcow2")).unwrap();
    let len = file.metadata().unwrap().len();
    file.write_all_at(&vec![0xff; (len / 2) as usize], len / 2).unwrap();
    lab.sh("truncate -s 1M cut.qcow2");
    lab.mount("packed=packed.qcow2,format=qcow2,mode=ro cut=cut.qcow2,format=qcow2,mode=ro");
    let base = fs::read(lab.path("base.img")).unwrap();
    for name in ["packed", "cut"] {
        let file = lab.open_ro(&format!("m/{name}"));
        let (mut failed, mut other) = (0, 0);
        for at in (0..4 * MIB).step_by(65536) {
            let mut buf = vec![0; 65536];
            match file.read_exact_at(&mut buf, at) {
                // Without checksums, a cluster that was cut in the middle may inflate to wrong
                // bytes.
                Ok(()) => other += u32::from(buf != base[at as usize..][..65536]),
                Err(error) => {
                    assert_eq!(error.raw_os_error(), Some(libc::EIO));
                    failed += 1;
                }
            }
        }
        assert!(failed > 0 && failed < 64, "{name}: {failed} clusters failed");
        assert!(other <= u32::from(name == "packed"), "{name}: {other} clusters are others");
    }
}
