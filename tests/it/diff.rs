//! `cowslip diff` and `import`: changes are exported to files that the tools of each format accept,
//! and imported again.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::mount::*;
use crate::common::strace;
use rustix::fs::FallocateFlags;
use rustix::process::{Pid, Signal};

const SIZE: u64 = 16 * MIB;

/// Mounts a disk `d` and writes data, holes and zeros over those of its base.
fn changed(lab: &mut Lab, words: &str) {
    lab.base("base.img", SIZE);
    lab.mount(words);
    scatter(lab, 1);
}

fn scatter(lab: &Lab, seed: u64) {
    let file = lab.open("m/d");
    for (at, len) in [(0, 5), (100_000, 10_000), (5 * MIB + 3, 70_000), (SIZE - 100, 100)] {
        file.write_all_at(&noise(len, seed + at), at).unwrap();
    }
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, punch, 8 * MIB + seed * 10_000..9 * MIB).unwrap();
    fallocate(&file, FallocateFlags::ZERO_RANGE, 3 * MIB + 17..3 * MIB + 5000).unwrap();
}

/// Checks that a qcow2 image is valid and reads like the disk.
fn is_the_disk(lab: &Lab, image: &str) {
    lab.sh(&format!("qemu-img check -q {image}; qemu-img compare -f raw -F qcow2 m/d {image}"));
}

#[test]
fn diff_is_an_image_that_qemu_reads_as_the_disk() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    let said = lab.ok("diff m/d -o out.qcow2");
    assert!(said.starts_with("out.qcow2: ") && said.ends_with(" zeroed) written\n"), "{said}");
    is_the_disk(&lab, "out.qcow2");
    let map = lab.sh("qemu-img map --output=json out.qcow2");
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let own = map.as_array().unwrap().iter().filter(|run| run["depth"] == 0);
    let own: u64 = own.map(|run| run["length"].as_u64().unwrap()).sum();
    // Four ranges of data, each in one to three clusters, one of zeros, and the hole's clusters.
    assert!(own > MIB * 9 / 10 && own < MIB + 12 * 65536, "{own} bytes");
    assert!(fs::metadata(lab.path("out.qcow2")).unwrap().len() < 20 * 65536);
    let line = lab.refused(1, "diff m/d -o out.qcow2");
    assert!(line.contains("'out.qcow2' is there already"), "{line}");
    lab.ok("diff m/d -o out.qcow2 --overwrite");
    // Committing the image makes the base equal to the disk.
    lab.sh("cp base.img base2.img; qemu-img rebase -u -b base2.img -F raw out.qcow2; qemu-img commit -q out.qcow2; cmp m/d base2.img");
}

#[test]
fn full_diff_has_no_backing_file() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img t=blank:3000000");
    lab.ok("diff m/d --full -o full.qcow2");
    is_the_disk(&lab, "full.qcow2");
    assert!(!lab.sh("qemu-img info full.qcow2").contains("backing file"));
    // A diff over a blank base has no backing file either. Sizes are rounded up to whole sectors.
    lab.open("m/t").write_all_at(&noise(1000, 5), 2_999_000).unwrap();
    lab.ok("diff m/t -o t.qcow2");
    lab.sh("qemu-img check -q t.qcow2; qemu-img compare -f raw -F qcow2 m/t t.qcow2");
}

#[test]
fn diff_of_a_resized_disk_has_its_size() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img");
    for sizes in [[SIZE + 3 * MIB, 0], [5 * MIB, 7 * MIB], [MIB + 512, SIZE + MIB], [512, 0]] {
        for size in sizes.into_iter().filter(|size| *size > 0) {
            lab.open("m/d").set_len(size).unwrap();
        }
        lab.ok("diff m/d -o out.qcow2 --overwrite");
        is_the_disk(&lab, "out.qcow2");
    }
}

#[test]
fn diff_of_a_disk_of_any_size_has_zeros_behind_its_end() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("d=base.img");
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    // The end lies in a cluster that is not changed, that is, in one that is zeroed, and before the
    // first byte of the next sector.
    for (round, size) in [100_100, 512 * 1024 + 1, 99_999, 65_537, 3].into_iter().enumerate() {
        let file = lab.open("m/d");
        file.set_len(size).unwrap();
        match round {
            1 => file.write_all_at(b"changed", size - 7).unwrap(),
            2 => fallocate(&file, punch, size / 65_536 * 65_536..size).unwrap(),
            _ => {}
        }
        drop(file);
        lab.ok("diff m/d -o out.qcow2 --overwrite");
        is_the_disk(&lab, "out.qcow2");
        // QEMU shows whole sectors, and so does an import.
        lab.sh("rm -rf new; truncate -s %512 m/d; $COWSLIP import out.qcow2 --overlay new
             mkdir -p m2; $COWSLIP mount m2 d=base.img,overlay=new; cmp m/d m2/d; $COWSLIP umount m2");
        lab.umount();
        lab.mount("d=base.img");
    }
    // Between two snapshots, with a backing file that was longer.
    lab.ok("snapshot m/d one");
    lab.ok("diff m/d --until one -o one.qcow2");
    lab.open("m/d").set_len(100_100).unwrap();
    lab.ok("diff m/d --since one -b one.qcow2 -F qcow2 -o two.qcow2");
    is_the_disk(&lab, "two.qcow2");
}

#[test]
fn diff_over_a_qcow2_base_names_it_as_backing_file() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.sh("qemu-img convert -f raw -O qcow2 base.img base.qcow2");
    lab.mount("d=base.qcow2,format=qcow2,overlay=ov");
    scatter(&lab, 3);
    lab.ok("diff m/d -o out.qcow2");
    is_the_disk(&lab, "out.qcow2");
    lab.sh("cp m/d want; $COWSLIP umount m; qemu-img commit -q out.qcow2; qemu-img compare -f raw -F qcow2 want base.qcow2");
}

#[test]
fn diff_shows_one_point_in_time_of_a_disk_in_use() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("d=base.img,overlay=ov");
    let done = AtomicBool::new(false);
    let file = lab.open("m/d");
    let write = |count: u64| {
        file.write_all_at(&count.to_le_bytes(), 0).unwrap();
        file.write_all_at(&noise(300_000, count), 4 * MIB).unwrap();
        file.write_all_at(&count.to_le_bytes(), SIZE - 8).unwrap();
    };
    write(1);
    thread::scope(|scope| {
        // Both ends hold the same number, except between the first and the last write of a round.
        let writer = scope.spawn(|| {
            let mut count = 2;
            while !done.load(Ordering::SeqCst) {
                write(count);
                count += 1;
            }
        });
        for round in 0..5 {
            lab.ok(&format!("diff m/d -o out{round}.qcow2"));
        }
        done.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
    for round in 0..5 {
        lab.sh(&format!("qemu-img check -q out{round}.qcow2; qemu-img convert -f qcow2 -O raw out{round}.qcow2 raw"));
        let raw = fs::read(lab.path("raw")).unwrap();
        let number = |at: u64| u64::from_le_bytes(raw[at as usize..][..8].try_into().unwrap());
        let (first, last) = (number(0), number(SIZE - 8));
        assert!(first == last || first == last + 1, "{first} and {last}");
        let middle = &raw[4 * MIB as usize..][..300_000];
        assert!(middle == noise(300_000, first) || middle == noise(300_000, last), "torn");
    }
    drop(file);
    // The layer frozen for the diff is merged into the top again.
    assert_eq!(lab.ok("snapshot m/d --list").lines().count(), 1);
    let limit = Instant::now() + WAIT_TIMEOUT;
    while lab.disk("d")["overlay"]["chain"].as_array().unwrap().len() > 1 {
        assert!(Instant::now() < limit, "it is never merged");
        thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn chain_of_increments_equals_the_disk() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    lab.ok("snapshot m/d one");
    scatter(&lab, 7);
    lab.ok("snapshot m/d two");
    scatter(&lab, 20);
    lab.ok("diff m/d --until one -o one.qcow2");
    lab.ok("diff m/d --since one --until two -o two.qcow2 -b one.qcow2 -F qcow2");
    lab.ok("diff m/d --since two -o three.qcow2 -b two.qcow2 -F qcow2");
    is_the_disk(&lab, "three.qcow2");
    for (image, name) in [("one", "one"), ("two", "two")] {
        lab.sh(&format!("qemu-img check -q {image}.qcow2; qemu-img compare -f raw -F qcow2 m/.cowslip/d/snapshots/{name} {image}.qcow2"));
    }
    // No changes since the snapshot.
    lab.ok("snapshot m/d three");
    assert!(
        lab.ok("diff m/d --since three -o none.qcow2 -b x -F raw").contains("0 bytes of changes")
    );
    let line = lab.refused(2, "diff m/d --since one -o x.qcow2");
    assert!(line.contains("name it with -b FILE -F FORMAT"), "{line}");
    let line = lab.refused(1, "diff m/d --since nope -o x.qcow2 -b y -F raw");
    assert!(line.contains("there is no snapshot 'nope'"), "{line}");
    lab.ok("revert m/d one");
    let line = lab.refused(1, "diff m/d --since two -o x.qcow2 -b y -F raw");
    assert!(line.contains("does not stand on snapshot 'two'"), "{line}");
    // The failed diff froze nothing: there are only the top and the snapshot's layer.
    assert_eq!(lab.disk("d")["overlay"]["chain"].as_array().unwrap().len(), 2);
    assert!(!lab.path("x.qcow2").exists());
}

#[test]
fn diff_image_can_be_imported_as_an_overlay() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    lab.open("m/d").set_len(SIZE + MIB).unwrap();
    let before = checksum(&lab.path("m/d"));
    lab.ok("diff m/d -o out.qcow2");
    lab.umount();
    let said = lab.ok("import out.qcow2 --overlay new");
    assert!(said.contains("mount it as NAME=") && said.contains("base.img,overlay=new"), "{said}");
    lab.mount("d=base.img,overlay=new");
    assert_eq!(checksum(&lab.path("m/d")), before);
    is_the_disk(&lab, "out.qcow2");
    lab.umount();
    let line = lab.refused(1, "import out.qcow2 --overlay new");
    assert!(line.contains("new' is there already"), "{line}");
    // Images made by QEMU: compressed, with zeros, over another image, and without a backing file.
    lab.sh("qemu-img convert -f raw -O qcow2 base.img base.qcow2
         qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
         qemu-io -c 'write -P 3 1M 100K' -c 'write -z 2M 1M' top.qcow2
         seq 400000 | head -c 2M >text; qemu-img convert -c -f raw -O qcow2 text text.qcow2");
    lab.ok("import top.qcow2 --overlay top");
    lab.mount("d=base.qcow2,format=qcow2,overlay=top");
    is_the_disk(&lab, "top.qcow2");
    lab.umount();
    lab.ok("import text.qcow2 --overlay text.cow");
    lab.mount("d=blank:2M,overlay=text.cow");
    lab.sh("cmp m/d text");
    lab.umount();
    // A failed import leaves nothing behind.
    lab.sh("truncate -s 300K text.qcow2");
    lab.refused(1, "import text.qcow2 --overlay cut");
    assert!(!lab.path("cut").exists());
    lab.sh("qemu-img create -q -f qcow2 -b /etc/shadow -F raw evil.qcow2 1M");
    let line = lab.refused(1, "import evil.qcow2 --overlay evil");
    assert!(
        line.contains("not below a directory that is allowed") && !lab.path("evil").exists(),
        "{line}"
    );
}

#[test]
fn import_that_fails_leaves_nothing_behind() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    lab.ok("diff m/d -o in.qcow2");
    lab.umount();
    let before = names(&lab);
    let mut failures = 0;
    for (call, errno) in [
        ("fdatasync", "EIO"),
        ("fdatasync", "ENOSPC"),
        ("fsync", "EIO"),
        ("fallocate", "EIO"),
        ("renameat2", "EIO"),
        ("renameat2", "EEXIST"),
    ] {
        for nth in 1.. {
            let inject = [format!("inject={call}:error={errno}:when={nth}")];
            let (output, seen) = strace::run(&lab, "import in.qcow2 --overlay new", &inject);
            // When only the last sync fails, that of its name, the overlay is whole.
            if output.status.success() || call == "fsync" && lab.path("new").exists() {
                lab.ok("check new");
                lab.sh("rm -r new");
            }
            if !seen.text.contains("(INJECTED)") {
                assert!(output.status.success(), "{}", show(&output));
                break;
            }
            if output.status.success() {
                continue;
            }
            failures += 1;
            assert_eq!(output.status.code(), Some(1), "{call} {nth}: {}", show(&output));
            assert_eq!(names(&lab), before, "{call} {nth}: {}", show(&output));
        }
    }
    assert!(failures > 8, "{failures}");
}

/// Returns the names of all files in the lab, except for those of strace.
fn names(lab: &Lab) -> BTreeSet<String> {
    let entries = fs::read_dir(lab.dir()).unwrap().flatten();
    let names = entries.map(|entry| entry.file_name().into_string().unwrap());
    names.filter(|name| !name.starts_with("strace")).collect()
}

#[test]
fn interrupted_diff_map_and_import_leave_nothing_behind() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    lab.sh("echo whole >old; mkdir m2");
    lab.ok("mount m2 --store pool");
    let before = names(&lab);
    // At the sync all data is written, but the file has no name yet.
    let at_sync = |signal: &str| [format!("inject=fsync:signal={signal}:when=1")];
    for words in [
        "diff m/d -o x",
        "diff m/d -O rbd -o x",
        "diff m/d -O bmap -o x",
        "diff m/d -O android-sparse -o x",
        "diff m/d -O rbd -o old --overwrite",
        "map m/d --svg x",
    ] {
        for signal in ["SIGINT", "SIGTERM", "SIGKILL"] {
            let (output, seen) = strace::run(&lab, words, &at_sync(signal));
            assert!(!output.status.success(), "{words}: {}", show(&output));
            assert!(seen.text.contains(&format!("killed by {signal}")), "{}", seen.text);
            assert_eq!(names(&lab), before, "{words}: {signal}");
            assert_eq!(fs::read(lab.path("old")).unwrap(), b"whole\n");
        }
    }
    // On a file system without `O_TMPFILE` the part is visible; it is removed except after SIGKILL.
    for (signal, is_left) in [("SIGINT", false), ("SIGTERM", false), ("SIGKILL", true)] {
        let (output, _) = strace::run(&lab, "diff m/d -O rbd -o m2/x", &at_sync(signal));
        let left: Vec<_> = fs::read_dir(lab.path("m2")).unwrap().flatten().collect();
        let left: Vec<_> =
            left.iter().map(|file| file.file_name().into_string().unwrap()).collect();
        // The signal may come too late: then the file is complete and has its name.
        let is_complete = !is_left && left == ["x"];
        assert!(is_complete || !output.status.success(), "{}", show(&output));
        let is_part = |name: &str| name.starts_with("x.") && name.ends_with(".part");
        match &left[..] {
            [part] if is_left => assert!(is_part(part), "{signal}: {left:?}"),
            left => assert!(!is_left && (is_complete || left.is_empty()), "{signal}: {left:?}"),
        }
        lab.sh("rm -f m2/*.part");
        lab.sh("rm -f m2/x");
    }
    lab.ok("diff m/d -O rbd -o m2/x");
    assert_eq!(lab.sh("ls m2"), "x\n");
    lab.ok("umount m2");
    // A partial overlay would be mounted as if it were complete.
    lab.ok("diff m/d -o in.qcow2");
    lab.umount();
    for (signal, is_left) in [("SIGINT", false), ("SIGTERM", false), ("SIGKILL", true)] {
        // Everything is written except for the name.
        let at_name = [format!("inject=renameat2:signal={signal}:when=1")];
        let (output, _) = strace::run(&lab, "import in.qcow2 --overlay new/", &at_name);
        // The signal may come too late: then the overlay is complete and has its name.
        let is_complete = !is_left && lab.path("new").exists();
        assert!(is_complete || !output.status.success(), "{}", show(&output));
        assert_eq!(lab.path("new.part").exists(), is_left, "{signal}");
        assert!(!is_left || !lab.path("new").exists());
        lab.sh("rm -rf new");
    }
    let line = lab.refused(1, "import in.qcow2 --overlay new");
    assert!(line.contains("new.part' is left of an import"), "{line}");
    lab.sh("rm -r new.part");
    lab.ok("import in.qcow2 --overlay new/");
    assert!(lab.path("new").exists() && !lab.path("new.part").exists());
}

#[test]
fn import_ended_by_a_signal_at_any_time_is_whole_or_not_there() {
    let lab = Lab::new();
    lab.sh("truncate -s 4M base.raw; qemu-img create -q -f qcow2 -b base.raw -F raw top.qcow2");
    lab.sh("for at in $(seq 0 20); do echo write -P 7 $((at * 128))k 64k; done | qemu-io top.qcow2 >/dev/null");
    let import = || {
        let mut command = lab.command(COWSLIP);
        command.args(["import", "top.qcow2", "--overlay", "new"]).stdout(Stdio::null());
        command.stderr(Stdio::null());
        Running(command.spawn().unwrap())
    };
    let start = Instant::now();
    assert!(import().0.wait().unwrap().success());
    let whole = start.elapsed();
    lab.sh("rm -r new; qemu-img convert -O raw top.qcow2 whole");
    let (mut done, mut ended) = (0, 0);
    // Later and later, until most are done: the last moments count, when the overlay gets its name.
    for round in 0..500 {
        if done == 30 {
            break;
        }
        let mut running = import();
        thread::sleep(whole.mul_f64(0.05 + 0.012 * f64::from(round)));
        let pid = Pid::from_child(&running.0);
        let _ = rustix::process::kill_process(pid, Signal::TERM);
        let status = running.0.wait().unwrap();
        assert!(!lab.path("new.part").exists(), "round {round}: {status}");
        // A signal that comes when all is done ends the command, too.
        let is_there = lab.path("new").exists();
        assert!(is_there || status.signal() == Some(libc::SIGTERM), "round {round}: {status}");
        if !is_there {
            ended += 1;
            continue;
        }
        done += 1;
        lab.ok("check new");
        lab.mount("d=base.raw,overlay=new");
        lab.sh("cmp m/d whole");
        lab.umount();
        lab.sh("rm -r new");
    }
    assert!(done > 0 && ended > 0, "{done} done, {ended} ended");
}

#[test]
fn diff_writes_only_to_regular_files() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,overlay=ov");
    lab.sh("mkfifo pipe; mkdir dir; mknod null c 1 3; ln -s nothing dangling
         echo old >real; chmod 640 real; ln -s real link");
    for (name, why) in [
        ("pipe", "is no file: name a file, or - for stdout"),
        ("dir", "is no file"),
        ("null", "is no file"),
        ("dangling", "is a link to nothing"),
        ("no/where", "its directory must exist"),
    ] {
        for overwrite in ["", " --overwrite"] {
            let line = lab.refused(1, &format!("diff m/d -O rbd -o {name}{overwrite}"));
            assert!(line.contains(name) && line.contains(why), "{line}");
        }
    }
    assert!(lab.refused(1, "map m/d --svg pipe").contains("cannot write 'pipe'"));
    lab.refused(1, "diff m/d -O rbd -o link");
    lab.ok("diff m/d -O rbd -o link --overwrite");
    assert!(lab.path("link").is_symlink());
    let made = fs::metadata(lab.path("real")).unwrap();
    assert_eq!((made.mode() & 0o777, made.len() > 4), (0o640, true));
}

#[test]
fn rbd_diff_holds_exactly_the_changes() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img");
    lab.ok("diff m/d -O rbd -o out.rbd");
    lab.sh("$COWSLIP diff m/d -O rbd -o - >piped.rbd; cmp out.rbd piped.rbd");
    // Applied to the base, the diff must give the disk.
    let mut image = fs::read(lab.path("base.img")).unwrap();
    let wire = fs::read(lab.path("out.rbd")).unwrap();
    let mut rest = wire.strip_prefix(b"rbd diff v1\n").unwrap();
    let number = |rest: &mut &[u8]| {
        let (first, after) = rest.split_first_chunk().unwrap();
        *rest = after;
        u64::from_le_bytes(*first) as usize
    };
    let (mut sent, mut end) = (0, 0);
    loop {
        let (tag, after) = rest.split_first().unwrap();
        rest = after;
        match tag {
            b's' => assert_eq!(number(&mut rest) as u64, SIZE),
            b'w' | b'z' => {
                let (at, len) = (number(&mut rest), number(&mut rest));
                assert!(len > 0 && at >= end, "{len} bytes at {at} after {end}");
                end = at + len;
                if *tag == b'z' {
                    image[at..end].fill(0);
                    continue;
                }
                image[at..end].copy_from_slice(&rest[..len]);
                rest = &rest[len..];
                sent += len;
            }
            b'e' => break,
            tag => panic!("tag {tag}"),
        }
    }
    assert!(rest.is_empty());
    assert!(image == fs::read(lab.path("m/d")).unwrap());
    assert!(sent < 40 * 4096, "{sent} bytes of data");
}

/// Creates a loop device over a copy of the base. The tools truncate a file, but keep the bytes of
/// a device that they do not write.
fn base_device(lab: &Lab) -> String {
    lab.sh("cp base.img target.img");
    lab.loop_device("target.img", "")
}

fn end_device(lab: &Lab, device: &str) {
    lab.sh(&format!("blockdev --flushbufs {device}; losetup -d {device}"));
}

#[test]
fn android_image_applied_to_the_base_gives_the_disk() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img,block=512");
    lab.ok("diff m/d -O android-sparse -o out.simg");
    lab.sh("$COWSLIP diff m/d -O android-sparse -o - >piped.simg; cmp out.simg piped.simg");
    assert!(fs::metadata(lab.path("out.simg")).unwrap().len() < 40 * 4096);
    let device = base_device(&lab);
    lab.sh(&format!("simg2img out.simg {device}; cmp m/d {device}"));
    end_device(&lab, &device);
    lab.ok("diff m/d --full -O android-sparse -o full.simg");
    lab.sh("simg2img full.simg full.img; cmp m/d full.img");
    let sent = fs::metadata(lab.path("full.simg")).unwrap().len();
    let data: u64 = data_runs(&lab.open_ro("m/d")).iter().map(|run| run.end - run.start).sum();
    assert!(sent < data + 100 * 4096, "{sent} bytes of {data} of data");
}

#[test]
fn android_image_requires_a_size_of_whole_blocks() {
    let lab = Lab::new();
    lab.sh("truncate -s 1000000 base.img");
    lab.mount("d=base.img");
    let line = lab.refused(1, "diff m/d -O android-sparse -o out");
    assert!(line.contains("size=1003520"), "{line}");
    assert!(!lab.path("out").exists());
}

#[test]
fn bmaptool_copies_a_disk_and_its_changes() {
    let mut lab = Lab::new();
    changed(&mut lab, "d=base.img");
    lab.ok("diff m/d --full -O bmap -o full.bmap");
    lab.sh("bmaptool -q copy --bmap full.bmap m/d full.img; cmp m/d full.img");
    lab.ok("diff m/d -O bmap -o changes.bmap");
    let map = lab.sh("$COWSLIP diff m/d -O bmap -o -; grep Mapped changes.bmap");
    assert!(map.contains("<ImageSize> 16777216 </ImageSize>"), "{map}");
    let device = base_device(&lab);
    // Punched and zeroed ranges are in the map as well, so they are written.
    lab.sh(&format!("bmaptool -q copy --bmap changes.bmap m/d {device}; cmp m/d {device}"));
    end_device(&lab, &device);
    // The disk has changed since, so the map does not match any more.
    scatter(&lab, 2);
    let output = lab.output("bmaptool", &["-q", "copy", "--bmap", "full.bmap", "m/d", "not.img"]);
    assert!(!output.status.success(), "{}", show(&output));
}

#[test]
fn diff_of_a_disk_over_a_part_of_a_file_needs_full() {
    let mut lab = Lab::new();
    lab.base("base.img", SIZE);
    lab.mount("d=base.img,offset=1M,len=8M");
    lab.open("m/d").write_all_at(&noise(10_000, 1), 77).unwrap();
    let line = lab.refused(1, "diff m/d -o out.qcow2");
    assert!(line.contains("is a part of a file") && line.contains("--full"), "{line}");
    assert!(!lab.path("out.qcow2").exists());
    lab.ok("diff m/d --full -o out.qcow2");
    is_the_disk(&lab, "out.qcow2");
}

#[test]
fn diff_of_a_disk_over_a_base_whose_path_is_not_utf8_needs_full() {
    let lab = Lab::new();
    lab.sh("head -c 1M /dev/urandom > \"$(printf 'base\\377.img')\"
        $COWSLIP mount m \"d=$(printf 'base\\377.img')\" --log log.txt
        printf changed | dd of=m/d conv=notrunc status=none");
    let line = lab.refused(1, "diff m/d -o out.qcow2");
    assert!(line.contains("is not UTF-8") && line.contains("--full"), "{line}");
    lab.ok("diff m/d --full -o out.qcow2");
    is_the_disk(&lab, "out.qcow2");
    lab.sh("$COWSLIP send m/d | $COWSLIP recv out; cmp m/d out");
}

#[test]
fn invalid_diffs_are_rejected() {
    let lab = Lab::new();
    lab.sh("truncate -s 1M base.img; mkdir dir");
    lab.mount("ro=base.img,mode=ro d=base.img");
    for (code, words, says) in [
        (1, "diff m/ro -o x", "it has no overlay"),
        (1, "diff m/nope -o x", "there is no disk 'nope'"),
        (1, "diff base.img -o x", "not in a cowslip mount"),
        (1, "diff m/d -o nodir/x", "cannot write 'nodir/x'"),
        (1, "diff m/d -o dir", "'dir' is no file"),
        (2, "diff m/d -O qcow2 -o -", "-o FILE"),
        (2, "diff m/d -O vmdk -o x", "vmdk"),
        (2, "diff m/d -o x -b y", "backing-format"),
        (2, "diff m/d -o x -b y -F vmdk", "raw or qcow2"),
        (2, "diff m/d", "-o"),
        (2, "diff m/d -O bmap -o x -b y -F raw", "only a qcow2 image"),
    ] {
        let line = lab.refused(code, words);
        assert!(line.contains(says), "{words}: {line}");
    }
    assert_eq!(lab.sh("ls -A"), "base.img\ndir\nlog.txt\nm\n");
}

#[test]
fn commit_is_rejected_while_a_diff_is_read() {
    let lab = Lab::new();
    lab.sh("truncate -s 16M base.img");
    lab.mount("d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(&noise(8 * MIB, 1), MIB).unwrap();
    let before = checksum(&lab.path("m/d"));
    // The pipe is full long before the end, and nobody reads on.
    let mut diff = lab.command(COWSLIP);
    diff.args(["diff", "m/d", "-O", "rbd", "-o", "-"]).stdout(Stdio::piped());
    let mut diff = Running(diff.spawn().unwrap());
    let mut stdout = diff.0.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 12]).unwrap();
    let line = lab.refused(1, "commit m/d");
    assert!(line.contains("a diff of it is being read"), "{line}");
    assert_eq!(lab.open_ro("base.img").metadata().unwrap().blocks(), 0, "the base is as it was");
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert!(diff.0.wait().unwrap().success());
    // The frozen layer is released a short time after the reader has closed it.
    let limit = Instant::now() + WAIT_TIMEOUT;
    while !lab.cowslip("commit m/d").status.success() {
        assert!(Instant::now() < limit, "it is held for ever");
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(checksum(&lab.path("base.img")), before);
    assert_eq!(checksum(&lab.path("m/d")), before);
}

#[test]
fn commit_right_after_a_diff_or_a_send_succeeds() {
    let lab = Lab::new();
    fs::write(lab.path("base.img"), noise(4 * MIB, 1)).unwrap();
    lab.mount("d=base.img,overlay=o");
    for (number, words) in ["diff m/d -o out.q --overwrite", "send m/d"].into_iter().enumerate() {
        lab.open("m/d").write_all_at(&noise(MIB, number as u64), MIB).unwrap();
        lab.sh(&format!("$COWSLIP {words} | cat >sent; $COWSLIP commit m/d"));
        lab.sh("cmp m/d base.img");
    }
}
