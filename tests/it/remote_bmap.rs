//! Raw images behind HTTP with a bmap (`bmap=`): holes and checksums as `bmaptool create` writes them.

use std::fs;
use std::os::unix::fs::FileExt;
use std::thread;
use std::time::Duration;

use crate::common::mount::*;
use crate::remote_http::{Nginx, requests, secret};

/// Makes an image of 16 MiB with short and long ranges of data, and its bmap.
fn image(lab: &Lab) {
    lab.sh("truncate -s 16M base.img
         head -c 64K /dev/urandom | dd of=base.img bs=64K seek=1 conv=notrunc
         head -c 40K /dev/urandom | dd of=base.img bs=4K seek=301 conv=notrunc
         head -c 3M /dev/urandom | dd of=base.img bs=1M seek=4 conv=notrunc
         head -c 5000 /dev/urandom | dd of=base.img bs=1M seek=15 conv=notrunc
         bmaptool create -o base.bmap base.img");
}

/// The bytes of base.img that were asked for.
fn bytes_asked(lab: &Lab) -> u64 {
    let asked = requests(lab).into_iter().filter(|line| line.contains("base.img"));
    let lens = asked.map(|line| {
        let range = line.split("bytes=").nth(1).unwrap().split(' ').next().unwrap().to_owned();
        let (first, last) = range.split_once('-').unwrap();
        last.parse::<u64>().unwrap() + 1 - first.parse::<u64>().unwrap()
    });
    lens.sum()
}

#[test]
fn a_bmap_tells_holes_exactly_and_they_cost_no_request() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    let image_url = nginx.url("/base.img");
    for bmap in ["base.bmap".to_owned(), nginx.url("/base.bmap")] {
        lab.mount(&format!("vm={image_url},mode=ro,ahead=0,bmap={bmap}"));
        let (file, base) = (lab.open_ro("m/vm"), lab.open_ro("base.img"));
        assert_eq!(data_runs(&file), data_runs(&base));
        assert_eq!(lab.sh("stat -c %b m/vm"), lab.sh("stat -c %b base.img"));
        let before = requests(&lab).len();
        // 7 MiB to 15 MiB is one hole; the kernel reads ahead.
        assert_eq!(lab.sh("dd if=m/vm bs=1M skip=7 count=6 | tr -d '\\0' | wc -c").trim(), "0");
        assert_eq!(requests(&lab).len(), before);
        let asked = bytes_asked(&lab);
        lab.sh("cmp base.img m/vm");
        // All data once, in whole blocks.
        let data = (64 + 40 + 3 * 1024 + 8) * 1024;
        assert!(bytes_asked(&lab) - asked <= data, "{}", bytes_asked(&lab) - asked);
        wait_until("all is compared", || lab.disk("vm")["remote"]["bmap"]["verified"] == 4);
        let bmap = &lab.disk("vm")["remote"]["bmap"];
        assert_eq!(bmap.to_string(), r#"{"ranges":4,"verified":4,"mismatch":null}"#);
        assert!(lab.ok("status m").contains("kept here, 4 of 4 ranges verified"));
        drop(file);
        lab.umount();
    }
    // An overlay over it is one over the image, with or without a bmap.
    let disk = format!("vm={image_url},overlay=vm.cow");
    lab.mount(&format!("{disk},bmap=base.bmap"));
    lab.open("m/vm").write_all_at(b"changed", 9 * MIB).unwrap();
    let shown = lab.sh("cat m/vm | md5sum");
    lab.umount();
    lab.mount(&disk);
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    assert!(lab.disk("vm")["remote"]["bmap"].is_null());
    lab.umount();
}

#[test]
fn a_range_that_does_not_match_its_bmap_is_never_answered() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    lab.open("base.img").write_all_at(b"another byte", 301 * 4096 + 20_000).unwrap();
    let disk = format!("vm={},overlay=vm.cow,ahead=0,bmap=base.bmap", nginx.url("/base.img"));
    lab.mount(&disk);
    lab.sh("cmp -n 65536 -i 65536 base.img m/vm");
    lab.open("m/vm").write_all_at(&[7; 4096], 8 * MIB).unwrap();
    // The first block of the range is right itself.
    for at in [301 * 4096, 301 * 4096 + 20_000, 5 * MIB, 65_536] {
        lab.sh(&format!(
            "! dd if=m/vm bs=4096 count=1 iflag=skip_bytes skip={at} of=read; ! test -s read"
        ));
    }
    let last = 301 * 4096 + 40 * 1024 - 1;
    let line = format!("bytes {} to {last} do not match what its bmap says", 301 * 4096);
    assert_eq!(lab.log().matches(&line).count(), 1, "{}", lab.log());
    let status = lab.disk("vm");
    assert_eq!(status["state"], "failed");
    assert!(status["error"].as_str().unwrap().contains("do not match"), "{status}");
    assert_eq!(status["remote"]["bmap"]["mismatch"], format!("{}-{last}", 301 * 4096));
    // What the overlay has is still there.
    let mut own = [0; 4096];
    lab.open("m/vm").read_exact_at(&mut own, 8 * MIB).unwrap();
    assert_eq!(own, [7; 4096]);
    lab.umount();
    // The first bytes are compared when the image is opened.
    lab.sh("printf x | dd of=base.img conv=notrunc; bmaptool create -o base.bmap base.img
            printf y | dd of=base.img conv=notrunc");
    let disk = disk.replace("overlay=vm.cow", "mode=ro");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("its first bytes do not match what its bmap says"), "{line}");
}

#[test]
fn a_long_range_that_does_not_match_latches_and_is_fetched_anew_by_the_next_mount() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    let (right, place) = (fs::read(lab.path("base.img")).unwrap(), 6 * MIB + 5);
    let time = fs::metadata(lab.path("base.img")).unwrap().modified().unwrap();
    let set = |bytes: &[u8]| {
        let file = lab.open("base.img");
        file.write_all_at(bytes, place).unwrap();
        // With the same ETag, as a server that sends wrong bytes has.
        file.set_modified(time).unwrap();
    };
    let was = &right[place as usize..][..4];
    let wrong: Vec<u8> = was.iter().map(|byte| byte ^ 0xff).collect();
    set(&wrong);
    let url = nginx.url("/base.img");
    let disk = format!("vm={url},mode=ro,ahead=0,bmap=base.bmap,read-cache=kept");
    lab.mount(&disk);
    // Of a part nobody can say, and the kernel keeps its pages.
    lab.sh("dd if=m/vm bs=1M skip=4 count=1 of=part; cmp -n 1048576 -i 0:4194304 part base.img");
    lab.sh("cat m/vm >all || true");
    wait_until("it is found", || !lab.disk("vm")["remote"]["bmap"]["mismatch"].is_null());
    assert_eq!(
        lab.disk("vm")["remote"]["bmap"]["mismatch"],
        format!("{}-{}", 4 * MIB, 7 * MIB - 1)
    );
    wait_until("the kernel's pages are gone", || {
        let mut buf = [0; 4096];
        let read =
            |at| lab.open_ro("m/vm").read_at(&mut buf, at).map_err(|error| error.raw_os_error());
        [4 * MIB, 6 * MIB, 65_536].map(read).iter().all(|read| *read == Err(Some(libc::EIO)))
    });
    lab.umount();
    assert_eq!(lab.log().matches("do not match what its bmap says").count(), 1, "{}", lab.log());
    // The server has mended it.
    set(was);
    lab.mount(&disk);
    let before = bytes_asked(&lab);
    lab.sh("cmp base.img m/vm");
    assert!(bytes_asked(&lab) - before >= 3 * MIB);
    wait_until("all is compared", || lab.disk("vm")["remote"]["bmap"]["verified"] == 4);
    lab.umount();
    // What was right stays, and is compared again.
    lab.mount(&disk);
    wait_until("all is compared", || lab.disk("vm")["remote"]["bmap"]["verified"] == 4);
    let before = bytes_asked(&lab);
    lab.sh("cmp base.img m/vm");
    assert_eq!(bytes_asked(&lab), before);
    lab.umount();
}

#[test]
fn what_was_kept_without_a_bmap_or_with_another_one_is_not_used() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    lab.sh("bmaptool create --no-checksum -o plain.bmap base.img");
    let disk = format!("vm={},mode=ro,ahead=0,read-cache=kept", nginx.url("/base.img"));
    for (keys, is_kept) in [
        ("", false),
        ("", true),
        (",bmap=plain.bmap", false),
        (",bmap=base.bmap", false),
        (",bmap=base.bmap", true),
        ("", true),
    ] {
        lab.mount(&format!("{disk}{keys}"));
        let before = bytes_asked(&lab);
        lab.sh("cmp base.img m/vm");
        assert_eq!(bytes_asked(&lab) == before, is_kept, "{keys}");
        lab.umount();
    }
}

#[test]
fn a_bmap_that_does_not_fit_is_refused_with_one_line() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    lab.sh("truncate -s 15M other.img; bmaptool create -o other.bmap other.img
         sed 's/4-6/4-7/; s/16-31/16-32/' base.bmap >damaged.bmap
         sed 's/sha256/md5/' base.bmap >md5.bmap
         echo '<!DOCTYPE a [<!ENTITY b \"c\">]><bmap version=\"2.0\">&b;</bmap>' >entity.bmap
         echo hello >text.bmap; : >empty.bmap; truncate -s 17M long.bmap; mkfifo fifo.bmap
         mkdir own; cp base.bmap own; chown -R 12345 own");
    let url = nginx.url("/base.img");
    let at = |path: &str| nginx.url(path);
    for (bmap, hint) in [
        (
            "other.bmap".to_owned(),
            "is of another image: of 15728640 bytes, and this one has 16777216",
        ),
        ("damaged.bmap".to_owned(), "does not have the checksum that it names for itself"),
        ("md5.bmap".to_owned(), "its checksums are 'md5'"),
        ("entity.bmap".to_owned(), "a document type"),
        ("text.bmap".to_owned(), "it is no bmap"),
        ("empty.bmap".to_owned(), "it ends too early"),
        ("long.bmap".to_owned(), "it has more than 16 MiB"),
        ("base.img".to_owned(), "it is no"),
        ("nowhere".to_owned(), "No such file"),
        ("own".to_owned(), "own': it is a directory"),
        ("fifo.bmap".to_owned(), "it is a named pipe"),
        ("/dev/zero".to_owned(), "it is a character device"),
        ("own/base.bmap".to_owned(), "belongs to another user"),
        (at("/nowhere?s3cret"), "nowhere': the server answered '404 Not Found'"),
        (at("/closed/base.bmap?s3cret"), "403 Forbidden"),
        (at("/whole/base.bmap"), "serves no ranges"),
        (at("/around/?s3cret"), "more than 10 redirects"),
        (at("/long.bmap"), "at most 16777216 are read"),
        (at("/other.bmap?s3cret"), "is of another image"),
        (at("/token/base.bmap"), "401 Unauthorized"),
    ] {
        let line = lab.refused(1, &format!("mount m vm={url},mode=ro,bmap={bmap}"));
        assert!(line.contains(hint) && line.contains("bmap '"), "{bmap}: {line}");
        assert!(line.trim_end().lines().count() == 1 && !line.contains("s3cret"), "{bmap}: {line}");
    }
    for (disk, hint) in [
        ("vm=nbd://127.0.0.1:1/,mode=ro", "an NBD server tells holes itself"),
        ("base.img,mode=ro", "is only for images on servers"),
    ] {
        let line = lab.refused(2, &format!("mount m {disk},bmap=base.bmap"));
        assert!(line.contains(hint), "{line}");
    }
    lab.mount(&format!("vm={url},mode=ro,bmap=own/base.bmap --trust own"));
    lab.sh("cmp base.img m/vm");
    lab.umount();
}

#[test]
fn a_bmap_is_asked_for_as_the_image_is_and_another_host_learns_nothing() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    secret(&lab.path("token"), "Authorization: Bearer s3cret\n");
    let disk = format!("vm={},mode=ro,auth=token", nginx.url("/token/base.img"));
    let mounts = |bmap: &str| {
        lab.mount(&format!("{disk},bmap={bmap}"));
        lab.sh("cmp base.img m/vm");
        lab.umount();
    };
    mounts(&nginx.url("/token/base.bmap"));
    mounts(&nginx.url("/moved/base.bmap"));
    mounts(&nginx.url("/signed/base.bmap?sig=s3cret"));
    // The same server under another name is another host.
    let elsewhere = nginx.url("/token/base.bmap").replace("127.0.0.1", "localhost");
    let line = lab.refused(1, &format!("mount m {disk},bmap={elsewhere}"));
    assert!(line.contains("401 Unauthorized"), "{line}");
    // Unless its own keys say so.
    let server = elsewhere.replace("/token/base.bmap", "/");
    lab.mount(&format!("--server {server},auth=token {disk},bmap={elsewhere}"));
    lab.sh("cmp base.img m/vm");
    assert!(!lab.log().contains("s3cret"), "{}", lab.log());
    lab.umount();
}

#[test]
fn the_thread_of_a_bmap_ends_with_its_image() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    let threads = |name: &str| {
        let pid = lab.sh("$COWSLIP status --json m | tr ',' '\\n' | sed -n 's/.*\"pid\": *//p'");
        let line = format!("cat /proc/{}/task/*/comm | grep -c {name} || true", pid.trim());
        lab.sh(&line).trim().to_owned()
    };
    lab.mount("b=blank:1M");
    assert_eq!(threads("cowslip-bmap"), "0");
    lab.ok(&format!("add m vm={},mode=ro,bmap=base.bmap", nginx.url("/base.img")));
    assert_eq!(threads("cowslip-bmap"), "1");
    lab.ok("remove m/vm");
    wait_until("it has ended", || threads("cowslip-bmap") == "0");
    thread::sleep(Duration::from_millis(10));
    lab.umount();
}

#[test]
fn a_disk_does_without_its_base_only_when_all_of_it_matches_the_bmap() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    let words = format!("vm={},overlay=vm.cow,ahead=0,bmap=base.bmap", nginx.url("/base.img"));
    // In the middle of the range of 3 MiB, part of which the disk never reads.
    lab.sh("cp base.img right.img");
    lab.open("base.img").write_all_at(b"another byte", 6 * MIB).unwrap();
    lab.mount(&words);
    lab.open("m/vm").write_all_at(&noise(MIB, 5), 5 * MIB).unwrap();
    let line = lab.refused(1, "hydrate m/vm");
    assert!(line.contains("bytes 4194304 to 7340031 of its base do not match"), "{line}");
    assert_eq!(lab.disk("vm")["remote"]["bmap"]["mismatch"], "4194304-7340031");
    lab.umount();
    // What came of it is in the overlay: another one, over the right bytes.
    lab.sh("rm -r vm.cow; cat right.img > base.img");
    lab.mount(&words);
    lab.open("m/vm").write_all_at(&noise(MIB, 5), 5 * MIB).unwrap();
    lab.ok("hydrate m/vm");
    assert!(lab.disk("vm")["remote"].is_null());
    lab.umount();
    lab.mount("vm=blank:16M,overlay=vm.cow");
    lab.open("right.img").write_all_at(&noise(MIB, 5), 5 * MIB).unwrap();
    lab.sh("cmp right.img m/vm");
    lab.umount();
}

#[test]
fn wrong_bytes_of_a_snapshot_do_not_stay_in_the_page_cache() {
    let lab = Lab::new();
    image(&lab);
    let nginx = Nginx::start(&lab);
    lab.open("base.img").write_all_at(b"another byte", 6 * MIB).unwrap();
    let url = nginx.url("/base.img");
    lab.mount(&format!("vm={url},overlay=vm.cow,ahead=0,bmap=base.bmap"));
    lab.ok("snapshot m/vm one");
    let snapshot = lab.open_ro("m/.cowslip/vm/snapshots/one");
    let first = |at| snapshot.read_at(&mut [0; 4096], at).map_err(|error| error.raw_os_error());
    assert_eq!(first(4 * MIB), Ok(4096));
    // Nothing of the range is read that is wrong, but all of it comes.
    lab.sh("cat m/vm >all || true");
    wait_until("it is found", || !lab.disk("vm")["remote"]["bmap"]["mismatch"].is_null());
    wait_until("the kernel's pages are gone", || first(4 * MIB) == Err(Some(libc::EIO)));
    drop(snapshot);
    lab.umount();
}
