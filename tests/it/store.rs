//! Creating, renaming and removing files in the mount, with and without `--store`.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::common::mount::*;
use crate::common::strace::Strace;

fn lab() -> Lab {
    let lab = Lab::new();
    lab.mount("--store st");
    lab
}

fn names(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.path("m")).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn again(lab: &Lab) {
    lab.umount();
    lab.mount("--store st");
}

fn count(lab: &Lab, what: &str) -> usize {
    fs::read_dir(lab.path("st").join(what)).unwrap().count()
}

#[test]
fn new_file_survives_a_remount() {
    let lab = lab();
    lab.sh("echo hello > m/new; truncate -s 10M m/sparse; chmod 640 m/new");
    let before = fs::metadata(lab.path("m/new")).unwrap();
    again(&lab);
    assert_eq!(names(&lab), ["new", "sparse"]);
    let after = fs::metadata(lab.path("m/new")).unwrap();
    assert_eq!((after.ino(), after.mode(), after.len()), (before.ino(), before.mode(), 6));
    assert_eq!(after.modified().unwrap(), before.modified().unwrap());
    assert_eq!(lab.sh("cat m/new"), "hello\n");
    assert_eq!(fs::metadata(lab.path("m/sparse")).unwrap().len(), 10 * MIB);
}

#[test]
fn file_survives_a_killed_daemon() {
    let lab = lab();
    let file = File::create(lab.path("m/new")).unwrap();
    file.write_all_at(&noise(MIB, 3), 12345).unwrap();
    drop(file);
    lab.sh("mv m/new m/other; touch m/gone; rm m/gone");
    lab.kill();
    assert!(lab.mount("--store st").contains("cleared a dead mount"));
    assert_eq!(names(&lab), ["other"]);
    assert!(read(&lab.open_ro("m/other"), 12345, MIB) == noise(MIB, 3));
    assert_eq!(count(&lab, "layers"), 1);
}

#[test]
fn truncating_a_huge_file_takes_time_for_its_data_only() {
    let lab = lab();
    for size in ["16T", "8P", "7E", &i64::MAX.to_string()] {
        lab.sh(&format!("truncate -s {size} m/f; echo x | dd of=m/f bs=1 seek=5G conv=notrunc"));
        lab.sh("sync m/f; truncate -s 0 m/f; sync m/f");
        lab.sh(&format!("truncate -s {size} m/f; fallocate -p -o 1G -l 6E m/f; sync m/f"));
    }
}

#[test]
fn o_excl_creates_a_file_only_once() {
    let lab = lab();
    let make = || OpenOptions::new().write(true).create_new(true).mode(0o604).open(lab.path("m/x"));
    drop(make().unwrap());
    assert_eq!(errno_of(make()), libc::EEXIST);
}

#[test]
fn renamed_file_keeps_its_inode_and_content() {
    let lab = lab();
    lab.sh("echo one > m/a; mv m/a m/b; [ ! -e m/a ]; cat m/b; mv -n m/b m/b");
    let ino = fs::metadata(lab.path("m/b")).unwrap().ino();
    again(&lab);
    assert_eq!(names(&lab), ["b"]);
    assert_eq!(fs::metadata(lab.path("m/b")).unwrap().ino(), ino);
}

#[test]
fn rename_over_another_file_removes_it() {
    let lab = lab();
    lab.sh("echo one > m/a; echo two > m/b");
    let old = lab.open_ro("m/b");
    lab.sh("mv m/a m/b; [ $(cat m/b) = one ]");
    // A handle opened before the rename still reads the old file.
    assert_eq!(read(&old, 0, 4), b"two\n");
    drop(old);
    wait_until("the replaced disk is removed", || count(&lab, "disks") == 1);
    again(&lab);
    assert_eq!(names(&lab), ["b"]);
    assert_eq!(lab.sh("cat m/b"), "one\n");
    assert_eq!(count(&lab, "layers"), 1);
}

#[test]
fn unlinked_file_exists_until_its_last_handle_is_closed() {
    let lab = lab();
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(lab.path("m/a"))
        .unwrap();
    file.write_all_at(b"still", 4095).unwrap();
    fs::remove_file(lab.path("m/a")).unwrap();
    assert_eq!(names(&lab), Vec::<String>::new());
    file.write_all_at(b"here", 8192).unwrap();
    file.sync_all().unwrap();
    assert_eq!(read(&file, 4095, 5), b"still");
    assert_eq!(read(&file, 8192, 4), b"here");
    assert_eq!(file.metadata().unwrap().len(), 8196);
    // The name can be reused at once.
    lab.sh("echo new > m/a; cat m/a");
    drop(file);
    wait_until("the removed disk's files go", || count(&lab, "disks") == 1);
    again(&lab);
    assert_eq!(lab.sh("cat m/a"), "new\n");
}

#[test]
fn file_stays_readable_while_it_is_replaced() {
    let lab = lab();
    lab.sh("echo version >m/a");
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..300 {
                fs::write(lab.path("m/new"), "version\n").unwrap();
                fs::rename(lab.path("m/new"), lab.path("m/a")).unwrap();
            }
            is_over.store(true, Ordering::Relaxed);
        });
        for listing in [false, true] {
            let (lab, is_over) = (&lab, &is_over);
            scope.spawn(move || {
                while !is_over.load(Ordering::Relaxed) {
                    let text = fs::read_to_string(lab.path("m/a"));
                    assert_eq!(text.expect("a file is there"), "version\n");
                    fs::metadata(lab.path("m/a")).expect("a file is there");
                    if listing {
                        names(lab);
                    }
                }
            });
        }
    });
    wait_until("the replaced disks' files go", || count(&lab, "disks") == 1);
    again(&lab);
    assert_eq!(lab.sh("cat m/a"), "version\n");
}

#[test]
fn path_handle_can_be_opened_after_the_file_was_removed() {
    let lab = lab();
    lab.sh("echo old >m/a; echo new >m/b; echo other >m/c");
    let found = |name: &str| -> File {
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        rustix::fs::open(lab.path(name), flags, rustix::fs::Mode::empty()).unwrap().into()
    };
    let (replaced, removed) = (found("m/a"), found("m/c"));
    lab.sh("mv m/b m/a; rm m/c");
    for (file, text) in [(&replaced, "old\n"), (&removed, "other\n")] {
        let open = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        assert_eq!(fs::read_to_string(open).unwrap(), text);
        assert_eq!(file.metadata().unwrap().nlink(), 0);
    }
    assert_eq!(count(&lab, "disks"), 3);
    drop((replaced, removed));
    wait_until("the files of what is gone go", || count(&lab, "disks") == 1);
    assert_eq!(lab.sh("cat m/a"), "new\n");
}

#[test]
fn lookups_listings_and_removals_in_any_order_leave_nothing() {
    let lab = lab();
    for round in 0..20 {
        lab.sh(&format!(
            "for i in 1 2 3; do echo $i >m/f$i; done; ls -l m >/dev/null; stat m/f1 >/dev/null
             mv m/f1 m/f2; ls -l m >/dev/null; cat m/f2 >m/g{round}; rm m/f2 m/g{round}
             find m -name 'f*' -exec rm {{}} +; ! cat m/f1 2>/dev/null; mknod m/n p 2>/dev/null || :"
        ));
    }
    wait_until("all of it goes", || count(&lab, "disks") == 0 && count(&lab, "layers") == 0);
}

#[test]
fn open_file_without_a_name_has_link_count_zero() {
    let lab = lab();
    lab.sh("echo one >m/a; echo two >m/b; echo three >m/c");
    let files = ["m/a", "m/b", "m/c"].map(|name| lab.open(name));
    let links = || files.iter().map(|file| file.metadata().unwrap().nlink()).collect::<Vec<_>>();
    assert_eq!(links(), [1, 1, 1]);
    lab.sh("rm m/a; mv m/c m/b");
    assert_eq!(links(), [0, 0, 1]);
    // Waits until the kernel's cached attributes have expired.
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(links(), [0, 0, 1]);
    lab.ok("snapshot m/b s");
    let snapshot = lab.open_ro("m/.cowslip/b/snapshots/s");
    assert_eq!(snapshot.metadata().unwrap().nlink(), 1);
    lab.ok("snapshot m/b --delete s");
    std::thread::sleep(Duration::from_millis(1100));
    assert_eq!(snapshot.metadata().unwrap().nlink(), 0);
    assert_eq!(read(&snapshot, 0, 6), b"three\n");
    drop((files, snapshot));
}

#[test]
fn mknod_creates_regular_files_only() {
    let lab = lab();
    lab.sh("python3 -c 'import os, stat
os.mknod(\"m/a\", 0o640 | stat.S_IFREG); os.mknod(\"m/b\", 0o600)'");
    let made = fs::metadata(lab.path("m/a")).unwrap();
    assert_eq!((made.len(), made.mode() & 0o7777, made.is_file()), (0, 0o640, true));
    lab.sh("! mknod m/p p; ! mknod m/c c 1 3; ! mknod m/a p; echo text >m/a");
    again(&lab);
    assert_eq!((names(&lab), lab.sh("cat m/a")), (vec!["a".into(), "b".into()], "text\n".into()));
}

#[test]
fn tar_restores_files_that_had_extended_attributes() {
    let lab = lab();
    lab.sh("
        mkdir from; echo text >from/a; chmod 640 from/a
        python3 -c 'import os; os.setxattr(\"from/a\", \"user.origin\", b\"here\")'
        touch -d 2001-02-03T04:05:06.5Z from/a; tar --xattrs -C from -cf a.tar a
        tar --xattrs -C m -xf a.tar; cmp from/a m/a
        test \"$(stat -c '%a %Y' from/a)\" = \"$(stat -c '%a %Y' m/a)\"
    ");
}

#[test]
fn unlinked_files_left_by_a_crash_are_swept() {
    let lab = lab();
    lab.sh("echo a > m/a; echo b > m/b");
    let open = lab.open_ro("m/a");
    fs::remove_file(lab.path("m/a")).unwrap();
    assert_eq!(count(&lab, "disks"), 2);
    lab.kill();
    drop(open);
    lab.mount("--store st");
    assert_eq!(names(&lab), ["b"]);
    assert_eq!((count(&lab, "disks"), count(&lab, "layers")), (1, 1));
}

#[test]
fn tools_that_write_a_temporary_file_and_rename_it_work() {
    let mut lab = Lab::new();
    lab.base("base.img", 20 * MIB);
    lab.mount("--store st");
    lab.sh("
        rsync -S base.img m/disk && cmp base.img m/disk
        cp base.img m/copy && cmp base.img m/copy
        sed -i s/x/y/ m/copy
        dd if=base.img of=m/dd bs=1M conv=sparse,fsync status=none && cmp -n 10000000 base.img m/dd
        qemu-img create -q -f raw m/raw 1G
        qemu-img convert -f raw -O qcow2 base.img m/vm.qcow2
        qemu-img check -q m/vm.qcow2
        qemu-img compare -q -f qcow2 -F raw m/vm.qcow2 base.img
        tar -S -cf m/all.tar base.img
    ");
    again(&lab);
    lab.sh("cmp base.img m/disk; qemu-img compare -q -f qcow2 -F raw m/vm.qcow2 base.img");
}

#[test]
fn without_a_store_files_cannot_be_created_and_the_log_says_why() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("d=base.img");
    assert_eq!(errno_of(File::create(lab.path("m/new"))), libc::EPERM);
    assert_eq!(errno_of(fs::rename(lab.path("m/d"), lab.path("m/e"))), libc::EPERM);
    assert_eq!(errno_of(fs::remove_file(lab.path("m/d"))), libc::EPERM);
    assert_eq!(errno_of(fs::create_dir(lab.path("m/dir"))), libc::EPERM);
    let log = lab.log();
    assert!(log.contains("--store") && log.contains("'new'"), "{log}");
    assert!(lab.ok("log m").contains("--store"));
}

#[test]
fn disk_of_the_command_line_cannot_be_renamed_beside_a_store() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    lab.mount("d=base.img --store st");
    lab.sh("echo x > m/new");
    assert_eq!(errno_of(fs::rename(lab.path("m/d"), lab.path("m/e"))), libc::EPERM);
    assert_eq!(errno_of(fs::remove_file(lab.path("m/d"))), libc::EPERM);
    assert_eq!(errno_of(fs::rename(lab.path("m/new"), lab.path("m/d"))), libc::EPERM);
    assert_eq!(names(&lab), ["d", "new"]);
}

#[test]
fn invalid_names_are_rejected_in_the_mount() {
    let lab = lab();
    let create = |name: &str| errno_of(File::create(lab.path("m").join(name)));
    assert_eq!(create("a\nb"), libc::EINVAL);
    assert_eq!(create(&"n".repeat(256)), libc::ENAMETOOLONG);
    assert!(File::create(lab.path("m/.cowslip")).is_err());
    lab.sh("echo x > m/a");
    assert!(fs::rename(lab.path("m/a"), lab.path("m/.cowslip")).is_err());
    assert_eq!(names(&lab), ["a"]);
}

#[test]
fn request_with_an_invalid_disk_name_is_rejected() {
    let lab = lab();
    lab.sh("echo text >m/a");
    let outside = lab.path("outside");
    for bad in [
        "",
        ".",
        "..",
        "/",
        "a/b",
        "../outside",
        "sub/",
        ".cowslip",
        "a\\nb",
        outside.to_str().unwrap(),
    ] {
        let mut ctl = lab.open("m/.cowslip/a/ctl");
        ctl.write_all(format!("{{\"op\":\"clone\",\"name\":\"{bad}\"}}").as_bytes()).unwrap();
        let mut said = String::new();
        ctl.read_to_string(&mut said).unwrap();
        assert!(said.contains("cannot be the name of a disk"), "{bad}: {said}");
    }
    assert_eq!((names(&lab), count(&lab, "names")), (vec!["a".to_owned()], 1));
    assert!(!outside.exists() && !lab.path("st/outside").exists());
    assert_eq!((count(&lab, "disks"), count(&lab, "layers")), (1, 1));
}

#[test]
fn store_with_an_invalid_name_is_rejected() {
    let lab = lab();
    lab.sh("echo text >m/a");
    lab.umount();
    for bad in [".cowslip", "a\nb"] {
        fs::rename(lab.path("st/names/a"), lab.path("st/names").join(bad)).unwrap();
        let line = lab.refused(1, "mount m --store st");
        assert!(line.contains("no file in a mount can be called"), "{line}");
        fs::rename(lab.path("st/names").join(bad), lab.path("st/names/a")).unwrap();
    }
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/a"), "text\n");
}

#[test]
fn store_can_be_mounted_only_once() {
    let lab = lab();
    lab.sh("mkdir other");
    assert!(lab.refused(1, "mount other --store st").contains("in use"));
}

#[test]
fn full_store_gives_enospc() {
    let lab = Lab::new();
    lab.host("host", "ext4", 32 * MIB);
    lab.mount("--store host/st");
    let file = File::create(lab.path("m/a")).unwrap();
    let mut at = 0;
    while file.write_all_at(&noise(256 * KIB, 1), at).is_ok() {
        at += 256 * KIB;
    }
    assert_eq!(errno_of(file.write_all_at(&noise(256 * KIB, 1), at)), libc::ENOSPC);
    lab.sh("head -c 100M /dev/zero > host/fill 2>/dev/null || true; sync -f host");
    let made: Vec<_> =
        (0..40).map(|index| File::create(lab.path(&format!("m/n{index}")))).collect();
    for error in made.into_iter().filter_map(Result::err) {
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
    drop(file);
    lab.sh("rm host/fill");
    lab.umount();
    lab.sh("umount host");
}

#[test]
fn disk_moved_out_of_its_store_is_rejected_with_the_place_of_its_layers() {
    let mut lab = Lab::new();
    lab.base("base", MIB);
    lab.mount("--store st d=base,overlay=st");
    lab.umount();
    lab.sh("cp -a st/disks/* out");
    let line = lab.refused(1, "mount m d=base,overlay=out");
    assert!(line.contains("a disk of a store has them in the store"), "{line}");
}

#[test]
fn a_host_without_a_free_inode_is_a_full_host() {
    let lab = Lab::new();
    lab.sh("mkdir t; mount -t tmpfs -o size=8m,nr_inodes=60,mode=755 t t");
    lab.mount("--store t/s");
    lab.sh("i=0; while touch t/f$i 2>/dev/null; do i=$((i+1)); done");
    let made = fs::File::create(lab.path("m/new"));
    assert_eq!(made.unwrap_err().raw_os_error(), Some(libc::ENOSPC));
    lab.umount();
    lab.sh("umount t");
}

#[test]
fn directory_stream_shows_changes_from_its_start_on() {
    let lab = lab();
    lab.sh("for n in $(seq 100); do touch m/there-$n; done");
    let names_in = |entries: &mut dyn Iterator<Item = rustix::io::Result<rustix::fs::DirEntry>>| {
        let mut names: Vec<String> =
            entries.map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned()).collect();
        names.sort();
        names
    };
    let mut stream = rustix::fs::Dir::read_from(File::open(lab.path("m")).unwrap()).unwrap();
    let mut seen = names_in(&mut (&mut stream).take(10));
    // What neither comes nor goes is seen once, whatever happens beside it.
    lab.sh("touch m/new; rm m/there-1 m/there-50; mv m/there-2 m/away");
    seen.extend(names_in(&mut stream));
    let is_stable = |name: &&String| {
        name.starts_with("there-") && !["there-1", "there-2", "there-50"].contains(&name.as_str())
    };
    let stable: Vec<_> = seen.iter().filter(is_stable).collect();
    let once: std::collections::BTreeSet<_> = stable.iter().collect();
    assert_eq!((stable.len(), once.len()), (97, 97));
    stream.rewind();
    let again: Vec<_> =
        names_in(&mut stream).into_iter().filter(|name| !name.starts_with('.')).collect();
    assert_eq!(again, names(&lab));
    assert!(again.contains(&"new".to_owned()) && !again.contains(&"there-1".to_owned()));
    drop(stream);
}

/// Has fsyncs of the daemon fail that `when` selects in each of its threads, while `change` runs.
#[track_caller]
fn with_failing_fsyncs(lab: &Lab, when: &str, change: impl FnOnce()) {
    let fail = format!("inject=fsync:error=EIO:when={when}");
    let strace = Strace::attach_with(lab, lab.pid(), "fsync", &[fail]);
    change();
    let seen = strace.end(lab, || true);
    assert!(seen.text.contains("(INJECTED)"), "{}", seen.text);
}

fn write_and_sync(lab: &Lab, name: &str, text: &str) {
    let mut file = File::create(lab.path(name)).unwrap();
    file.write_all(text.as_bytes()).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn disk_whose_rename_or_removal_is_not_durable_keeps_its_name_and_what_is_synced() {
    let lab = lab();
    for name in ["m/a", "m/b", "m/c"] {
        write_and_sync(&lab, name, "old");
    }
    with_failing_fsyncs(&lab, "1", || {
        let renamed = fs::rename(lab.path("m/a"), lab.path("m/b"));
        assert_eq!(renamed.unwrap_err().raw_os_error(), Some(libc::EIO));
    });
    with_failing_fsyncs(&lab, "1", || {
        let removed = fs::remove_file(lab.path("m/c"));
        assert_eq!(removed.unwrap_err().raw_os_error(), Some(libc::EIO));
    });
    with_failing_fsyncs(&lab, "1", || {
        assert!(fs::rename(lab.path("m/c"), lab.path("m/new")).is_err());
    });
    for (name, text) in [("m/b", "new b"), ("m/c", "new c")] {
        write_and_sync(&lab, name, text);
    }
    // The daemon is killed: nothing is put right at the end of the mount.
    lab.kill();
    lab.mount("--store st");
    assert_eq!(names(&lab), ["a", "b", "c"]);
    assert_eq!(lab.sh("cat m/a m/b m/c"), "oldnew bnew c");
    lab.sh("mv -f m/a m/b; rm m/c");
    again(&lab);
    assert_eq!(names(&lab), ["b"]);
    assert_eq!(lab.sh("cat m/b"), "old");
}

#[test]
fn disk_whose_name_may_be_lost_acknowledges_no_sync() {
    let lab = lab();
    for name in ["m/a", "m/b", "m/c"] {
        write_and_sync(&lab, name, "old");
    }
    let open = |name| OpenOptions::new().write(true).open(lab.path(name)).unwrap();
    let (a, b, c) = (open("m/a"), open("m/b"), open("m/c"));
    with_failing_fsyncs(&lab, "1+", || {
        assert!(fs::rename(lab.path("m/a"), lab.path("m/b")).is_err());
        assert!(fs::remove_file(lab.path("m/c")).is_err());
    });
    for file in [a, b, c] {
        let written = file.write_all_at(b"new", 0).and_then(|()| file.sync_all());
        assert_eq!(written.unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    let code = lab.output(COWSLIP, &["status", "m"]).status.code();
    assert_eq!(code, Some(3));
    lab.kill();
    lab.mount("--store st");
    assert_eq!(lab.sh("cat m/a m/b m/c"), "oldoldold");
}

fn stored_names(lab: &Lab) -> Vec<String> {
    let entries = fs::read_dir(lab.path("st/names")).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn clones_and_files_that_take_one_name_at_the_same_time_lose_nothing() {
    let lab = lab();
    lab.sh("truncate -s 1M m/src m/spare; echo precious | dd of=m/work conv=notrunc status=none");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let rename = scope.spawn(|| {
            let _end = Ends(&over);
            for _ in 0..300 {
                fs::rename(lab.path("m/work"), lab.path("m/t")).unwrap();
                fs::rename(lab.path("m/t"), lab.path("m/work")).unwrap();
            }
        });
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let mut ctl = lab.open("m/.cowslip/src/ctl");
                ctl.write_all(b"{\"op\":\"clone\",\"name\":\"t\"}").unwrap();
                ctl.read_to_string(&mut String::new()).unwrap();
            }
        });
        rename.join().unwrap();
    });
    // The clone may have been the last to take the name.
    assert_eq!(stored_names(&lab), names(&lab));
    assert_eq!(lab.sh("head -n1 m/work"), "precious\n");
    let before = names(&lab);
    again(&lab);
    assert_eq!(names(&lab), before);
    assert_eq!(lab.sh("head -n1 m/work"), "precious\n");
}

#[test]
fn mount_or_add_that_fails_leaves_no_disk_in_the_store() {
    let lab = lab();
    lab.sh("truncate -s 8M m/vm m/x.p1 base.img; echo ',4M' | sfdisk -q base.img; touch other.img");
    let left = || (stored_names(&lab), count(&lab, "disks"), count(&lab, "layers"));
    let before = left();
    assert_eq!(before, (vec!["vm".to_owned(), "x.p1".to_owned()], 2, 2));
    let line = lab.refused(1, "add m x=base.img,overlay=st,partitions");
    assert!(line.contains("partition 1"), "{line}");
    assert_eq!(left(), before);
    lab.umount();
    for second in [
        "b=missing.img",
        "b=other.img,overlay=missing/dir/ov",
        "x=base.img,overlay=st,partitions",
        "a.p1=other.img",
    ] {
        let first = if second.starts_with("a.p1") { ",partitions" } else { "" };
        let words = format!("mount m --store st a=base.img,overlay=st{first} {second}");
        lab.refused(1, &words);
        assert_eq!(left(), before, "{second}");
        lab.mount("--store st");
        assert_eq!(names(&lab), ["vm", "x.p1"]);
        lab.umount();
    }
    lab.mount("--store st a=base.img,overlay=st");
    assert_eq!(names(&lab), ["a", "vm", "x.p1"]);
    again(&lab);
    assert_eq!(names(&lab), ["a", "vm", "x.p1"]);
}
