//! Adding and removing disks of a live mount: `cowslip add` and `cowslip remove`.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::common::mount::*;
use rustix::process::Signal;

/// Mounts one disk, and creates a base that is not mounted.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("e=blank:1M");
    lab
}

/// Returns the names of the disks in the mount.
fn names(lab: &Lab) -> Vec<String> {
    lab.sh("ls m").lines().map(str::to_owned).collect()
}

fn is_missing(lab: &Lab, name: &str) -> bool {
    fs::symlink_metadata(lab.path(name)).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
}

#[test]
fn added_disk_can_be_read_and_written() {
    let lab = lab();
    let said = lab.ok("add m d=base.img");
    let keep = "temporary overlay: changes end at umount ('cowslip keep' saves them)";
    assert_eq!(said, format!("d: 16 MiB, {keep}\n"));
    assert_eq!(names(&lab), ["d", "e"]);
    lab.sh("cmp m/d base.img");
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 7), 3 * MIB + 1).unwrap();
    assert_eq!(read(&file, 3 * MIB + 1, MIB), noise(MIB, 7));
    drop(file);
    assert_eq!(lab.disk("d")["base"], lab.path("base.img").to_str().unwrap());
    let said = lab.umount();
    assert!(said.contains("d: 1 MiB of changes discarded (temporary overlay)"), "{said}");
}

#[test]
fn relative_paths_of_an_added_disk_are_relative_to_the_caller() {
    let lab = lab();
    lab.sh("mkdir sub; cp base.img sub/here.img; cd sub; $COWSLIP add ../m here.img,overlay=ov");
    lab.sh("cmp m/here.img base.img; test -f sub/ov/stack");
}

#[test]
fn added_disk_is_visible_at_once_even_after_a_failed_lookup() {
    let lab = lab();
    for _ in 0..20 {
        assert!(is_missing(&lab, "m/d") && is_missing(&lab, "m/.cowslip/d"));
        lab.ok("add m d=base.img");
        assert_eq!(fs::metadata(lab.path("m/d")).unwrap().len(), 16 * MIB);
        assert_eq!(fs::metadata(lab.path("m/.cowslip/d/status")).unwrap().len(), 0);
        lab.ok("remove m/d");
    }
}

#[test]
fn removed_disk_disappears_at_once() {
    let lab = lab();
    lab.ok("add m d=base.img");
    for _ in 0..20 {
        // The kernel caches entries and attributes for up to a second.
        lab.sh(
            "stat m/d m/.cowslip/d/ctl >/dev/null; head -c 100 m/d >/dev/null; ls -l m >/dev/null",
        );
        lab.ok("remove m/d");
        assert!(is_missing(&lab, "m/d"));
        for file in ["status", "map", "ctl"] {
            assert!(is_missing(&lab, &format!("m/.cowslip/d/{file}")), "{file}");
        }
        assert_eq!(names(&lab), ["e"]);
        lab.ok("add m d=base.img");
    }
}

#[test]
fn remove_reports_discarded_changes_and_keeps_other_disks() {
    let lab = lab();
    lab.open("m/e").write_all_at(b"stays", 0).unwrap();
    lab.ok("add m d=base.img");
    assert_eq!(lab.ok("remove m/d"), "", "nothing has changed");
    lab.ok("add m d=base.img");
    lab.open("m/d").write_all_at(&[1; 4096], 0).unwrap();
    assert_eq!(lab.ok("remove m/d"), "d: 4 KiB of changes discarded (temporary overlay)\n");
    // A disk added under the same name starts from the base.
    lab.ok("add m d=base.img");
    lab.sh("cmp m/d base.img");
    assert_eq!(read(&lab.open("m/e"), 0, 5), b"stays");
}

#[test]
fn disk_of_the_mount_command_can_be_removed() {
    let lab = lab();
    lab.open("m/e").write_all_at(&[1; 8192], 0).unwrap();
    assert_eq!(lab.ok("remove m/e"), "e: 8 KiB of changes discarded (temporary overlay)\n");
    assert_eq!(names(&lab), Vec::<String>::new());
    // Disks can be added to an empty mount.
    lab.ok("add m d=base.img");
    lab.sh("cmp m/d base.img");
}

#[test]
fn overlay_of_a_removed_disk_can_be_mounted_elsewhere_at_once() {
    let lab = lab();
    lab.sh("mkdir other; cp base.img other/copy");
    for round in 0..10 {
        let said = lab.ok("add m d=base.img,overlay=ov");
        assert!(said.starts_with("d: 16 MiB, overlay '"), "{said}");
        assert!(!said.contains("recovered"), "{said}");
        lab.sh("cmp m/d other/copy");
        let bytes = noise(MIB, round + 1);
        // Also through the page cache, whose pages must not be seen again.
        lab.open("m/d").write_all_at(&bytes, round * 4097).unwrap();
        lab.open("other/copy").write_all_at(&bytes, round * 4097).unwrap();
        lab.sh("cmp m/d other/copy");
        let said = lab.ok("remove m/d");
        let kept = format!("changes kept in '{}'", lab.path("ov").display());
        assert!(said.contains(&kept), "{said}");
        let said = lab.ok("check ov");
        assert!(said.contains("clean"), "{said}");
        lab.sh("mkdir n; $COWSLIP mount n d=base.img,overlay=ov; cmp n/d other/copy");
        lab.open("n/d").write_all_at(b"elsewhere", 9 * MIB + round).unwrap();
        lab.open("other/copy").write_all_at(b"elsewhere", 9 * MIB + round).unwrap();
        lab.sh("$COWSLIP umount n; rmdir n");
    }
}

#[test]
fn remove_flushes_dirty_pages_of_the_kernel() {
    let lab = Lab::new();
    lab.mount("e=blank:1M --cache writeback");
    for round in 0..5 {
        lab.ok("add m d=blank:16M,overlay=ov");
        let file = lab.open("m/d");
        file.write_all_at(&noise(MIB, round + 1), round * 4097).unwrap();
        lab.sh("cp m/d copy");
        drop(file);
        lab.ok("remove m/d");
        lab.sh("mkdir n; $COWSLIP mount n d=blank:16M,overlay=ov; cmp n/d copy; $COWSLIP umount n");
        lab.sh("rmdir n");
    }
}

#[test]
fn a_disk_that_returns_with_another_size_has_it_with_cache_writeback() {
    let lab = Lab::new();
    lab.mount("e=blank:1M --cache writeback");
    lab.ok("add m d=blank:1M,overlay=ov");
    // Who refers to the file without having it open keeps the kernel's inode of it.
    let held = lab.open_with("m/d", libc::O_PATH);
    lab.ok("remove m/d");
    lab.sh("mkdir n; $COWSLIP mount n d=blank:1M,overlay=ov");
    lab.sh("truncate -s 4M n/d; tr '\\0' x < n/d > copy; cp copy n/d; $COWSLIP umount n");
    lab.ok("add m d=blank:1M,overlay=ov");
    lab.sh("test $(stat -c %s m/d) = 4194304; cmp m/d copy");
    let file = lab.open("m/d");
    file.write_all_at(b"y", 2 * MIB + 5).unwrap();
    file.sync_all().unwrap();
    lab.sh("printf y | dd of=copy bs=1 seek=2097157 conv=notrunc status=none; cmp m/d copy");
    drop((file, held));
    lab.ok("remove m/d");
    lab.sh("$COWSLIP mount n d=blank:1M,overlay=ov; cmp n/d copy");
    // A copy of an overlay is known whatever the number of the first one.
    lab.ok("add m d=blank:1M,overlay=ov2");
    lab.sh("$COWSLIP umount n; cp -a ov ov3");
    lab.ok("add m f=blank:1M,overlay=ov");
    assert!(lab.refused(1, "add m g=blank:1M,overlay=ov3").contains("is a copy of that of 'f'"));
}

#[test]
fn base_of_a_removed_disk_can_be_written_at_once() {
    let lab = lab();
    for _ in 0..10 {
        lab.ok("add m d=base.img");
        // The daemon may still know of a stat that it has answered.
        lab.sh("cmp m/d base.img; stat m/d >/dev/null");
        assert!(lab.refused(1, "add m w=base.img,mode=rw").contains("while another"));
        lab.ok("remove m/d");
        lab.ok("add m w=base.img,mode=rw");
        assert!(lab.refused(1, "add m d=base.img").contains("is being written"));
        lab.ok("remove m/w");
    }
}

#[test]
fn map_reader_of_a_removed_disk_gets_an_error() {
    use std::io::Read;
    let lab = lab();
    lab.ok("add m d=blank:1G,overlay=ov");
    let file = lab.open("m/d");
    for index in 0..20_000 {
        file.write_all_at(&[1; 100], index * 8192).unwrap();
    }
    drop(file);
    let mut map = lab.open_ro("m/.cowslip/d/map");
    let mut piece = vec![0; 4096];
    map.read_exact(&mut piece).unwrap();
    lab.ok("remove m/d");
    // The open map does not keep the disk's files open either.
    lab.ok("check ov");
    let error = map.read_to_end(&mut piece).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ESTALE));
    drop(map);
}

#[test]
fn invalid_disk_is_a_usage_error() {
    let lab = lab();
    let line = lab.refused(2, "add m d=base.img,colour=red");
    assert!(line.contains("disk 'd=base.img,colour=red': unknown key 'colour'"), "{line}");
    assert!(lab.refused(2, "add m blank:1G").contains("needs a name"));
    assert!(lab.refused(2, "add m o=stream:1M,to=stdout").contains("to=stdout cannot be added"));
    assert!(lab.refused(2, "add base.img m").contains("cowslip add m base.img"));
    lab.sh("cp base.img a,b.img");
    assert!(lab.refused(2, "add m a,b.img").contains("write a,,b.img"));
    assert_eq!(names(&lab), ["e"]);
}

#[test]
fn failed_add_leaves_nothing_behind() {
    let lab = lab();
    let before = lab.sh("ls -A");
    let line = lab.refused(1, "add m d=missing.img,overlay=ov");
    assert!(line.contains("d: base '") && line.contains("does not exist"), "{line}");
    assert!(lab.refused(1, "add m d=m/e,overlay=ov").contains("lies in the mount"));
    assert!(lab.refused(1, "add m d=base.img,overlay=m/ov").contains("lies in the mount"));
    assert!(lab.refused(1, "add m o=stream:1M,to=file:m/x").contains("lies in the mount"));
    lab.refused(1, "add m o=stream:1M,to=cmd:/no/such/program");
    lab.refused(1, "add nowhere d=base.img");
    lab.refused(1, "add m/e d=base.img");
    assert_eq!(lab.sh("ls -A"), before);
    assert_eq!(names(&lab), ["e"]);
    // The locks are free again.
    lab.ok("add m d=base.img,mode=rw");
}

#[test]
fn duplicate_name_is_rejected_and_creates_nothing() {
    let lab = lab();
    let before = lab.sh("ls -A");
    let line = lab.refused(1, "add m e=base.img,overlay=ov");
    assert!(line.contains("there is a disk 'e' in the mount already"), "{line}");
    assert_eq!(lab.sh("ls -A"), before);
    assert_eq!(lab.disk("e")["size"], MIB);
}

#[test]
fn one_of_many_concurrent_adds_of_a_name_succeeds_and_the_others_leave_nothing() {
    let lab = lab();
    let won = AtomicBool::new(false);
    thread::scope(|scope| {
        for number in 0..8 {
            let (lab, won) = (&lab, &won);
            scope.spawn(move || {
                let output = lab.cowslip(&format!("add m d=base.img,overlay=ov{number}"));
                match output.status.code() {
                    Some(0) => assert!(!won.swap(true, Ordering::SeqCst)),
                    _ => assert!(one_line(1, &output, "add").contains("already")),
                }
            });
        }
    });
    assert!(won.load(Ordering::SeqCst));
    assert_eq!(lab.sh("ls -d ov*; ls -Ad .cowslip-* 2>/dev/null || true").lines().count(), 1);
    lab.sh("cmp m/d base.img");
}

#[test]
fn remove_rejects_an_open_disk_and_names_its_users() {
    let lab = lab();
    lab.ok("add m d=base.img");
    let mut command = lab.command("sh");
    let sleeper = Running(command.args(["-c", "exec sleep 100 <m/d"]).spawn().unwrap());
    wait_until("it has the disk", || lab.disk("d")["openers"] == 1);
    let line = lab.refused(1, "remove --timeout 300ms m/d");
    assert!(line.contains(&format!("d is in use: sleep (pid {}) has d", sleeper.pid())), "{line}");
    lab.sh("cmp m/d base.img");
    // A disk that is closed within the timeout is removed.
    let pid = sleeper.pid();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(Duration::from_millis(500));
            signal(pid, Signal::KILL).unwrap();
        });
        lab.ok("remove --timeout 1m m/d");
    });
    assert_eq!(names(&lab), ["e"]);
}

#[test]
fn remove_names_users_although_a_process_has_another_root() {
    let lab = lab();
    lab.ok("add m d=base.img");
    // The first process of the namespace is in a chroot, from which the mount is not visible.
    lab.sh("unshare -m sh -euc '
        mkdir root; mount --bind / root
        (
            until [ $(readlink /proc/$$/root) != / ]; do sleep 0.01; done
            exec 3<m/d
            $COWSLIP remove --timeout 100ms m/d 2>said || true
            exec 3<&-
            kill $$
        ) &
        exec chroot root sleep 60' || true");
    let said = fs::read_to_string(lab.path("said")).unwrap();
    assert!(said.contains("d is in use: sh (pid "), "{said}");
}

#[test]
fn disk_is_in_use_until_its_loop_device_is_detached() {
    let lab = lab();
    lab.ok("add m d=blank:16M");
    let device = lab.loop_device("m/d", "");
    let line = lab.refused(1, "remove --timeout 200ms m/d");
    assert!(line.contains(&format!("{device} is attached to d")), "{line}");
    lab.sh(&format!("losetup -d {device}; $COWSLIP remove m/d"));
}

#[test]
fn remove_rejects_missing_disks_and_other_paths() {
    let lab = lab();
    lab.ok("remove m/e");
    let line = lab.refused(1, "remove m/e");
    assert!(line.contains("there is no disk 'e' in the mount"), "{line}");
    lab.refused(1, "remove m");
    lab.refused(1, "remove m/.cowslip");
    lab.refused(1, "remove base.img");
}

#[test]
fn disk_of_a_store_is_removed_by_rm_only() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("echo x >m/a");
    let line = lab.refused(1, "remove m/a");
    let rm = format!("rm '{}' removes it with its data", lab.path("m/a").display());
    assert!(line.contains(&rm), "{line}");
    assert_eq!(lab.sh("cat m/a"), "x\n");
    // `add` cannot take the name of a disk in the store, nor a new file that of an added disk.
    assert!(lab.refused(1, "add m a=blank:1M").contains("already"));
    lab.ok("add m b=blank:1M");
    lab.sh("! mv m/a m/b 2>/dev/null; ! rm m/b 2>/dev/null; rm m/a");
    lab.ok("remove m/b");
    lab.sh("echo y >m/b; test $(cat m/b) = y");
}

#[test]
fn added_output_stream_can_be_removed_after_finish_or_abort() {
    let lab = lab();
    let said = lab.ok("add m o=stream:1M,to=file:out.img");
    assert!(said.contains("o: 1 MiB, stream to file:"), "{said}");
    lab.open("m/o").write_all_at(&noise(MIB, 1), 0).unwrap();
    let line = lab.refused(1, "remove m/o");
    assert!(line.contains("cowslip finish '") && line.contains("cowslip abort '"), "{line}");
    assert!(is_missing(&lab, "out.img"));
    lab.ok("finish m/o");
    lab.ok("remove m/o");
    assert_eq!(fs::read(lab.path("out.img")).unwrap(), noise(MIB, 1));
    lab.ok("add m o=stream:1M,to=file:never.img");
    lab.ok("abort m/o");
    lab.ok("remove m/o");
    assert!(is_missing(&lab, "never.img"));
    assert_eq!(names(&lab), ["e"]);
}

#[test]
fn removing_an_input_stream_ends_its_command() {
    let lab = lab();
    let disk = "i=stream:1G,from=cmd:sh -c 'echo $$ >pid; exec cat /dev/zero'";
    let added = lab.output(COWSLIP, &["add", "m", disk]);
    assert!(added.status.success(), "{}", show(&added));
    assert_eq!(read(&lab.open_ro("m/i"), 0, 10), [0; 10]);
    let pid: u32 = lab.sh("cat pid").trim().parse().unwrap();
    assert!(is_alive(pid));
    lab.ok("remove m/i");
    assert!(!is_alive(pid));
    assert_eq!(names(&lab), ["e"]);
}

#[test]
fn concurrent_open_and_remove_lose_no_write() {
    let lab = lab();
    lab.ok("add m d=blank:1M,overlay=ov");
    let (mut written, mut removed) = (0, 0);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut last = 0_u64;
            while !done.load(Ordering::SeqCst) {
                match fs::OpenOptions::new().write(true).open(lab.path("m/d")) {
                    Ok(file) => {
                        // A successful open permits the write, although a remove is in progress.
                        file.write_all_at(&(last + 1).to_le_bytes(), 0).unwrap();
                        last += 1;
                    }
                    Err(error) => {
                        let known = [Some(libc::ENOENT), Some(libc::ESTALE)];
                        assert!(known.contains(&error.raw_os_error()), "{error}");
                    }
                }
                // A varying delay, so that sometimes the open wins and sometimes the remove.
                thread::sleep(Duration::from_micros(last % 8 * 50));
            }
            last
        });
        // Longer if necessary, until a remove has succeeded.
        let start = Instant::now();
        for turn in 0.. {
            if turn >= 60 && (removed > 0 || start.elapsed() > WAIT_TIMEOUT) {
                break;
            }
            let output = lab.cowslip("remove --timeout 50ms m/d");
            if output.status.success() {
                removed += 1;
                let said = lab.ok("add m d=blank:1M,overlay=ov");
                assert!(!said.contains("recovered"), "{said}");
            } else {
                assert!(one_line(1, &output, "remove").contains("d is in use"));
            }
        }
        done.store(true, Ordering::SeqCst);
        written = writer.join().unwrap();
    });
    assert!(written > 0 && removed > 0, "{written} written, {removed} removed");
    assert_eq!(read(&lab.open("m/d"), 0, 8), written.to_le_bytes());
}

#[test]
fn repeated_add_and_remove_leak_no_files_and_threads() {
    let lab = lab();
    let pid = lab.pid();
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let cycle = |round: u64| {
        lab.ok("add m d=base.img,overlay=ov");
        lab.open("m/d").write_all_at(&noise(4096, round + 1), round * 4096).unwrap();
        lab.sh("head -c 1M m/d >/dev/null");
        lab.ok("remove m/d");
    };
    (0..3).for_each(cycle);
    let (files, threads) = (count("fd"), count("task"));
    (3..200).for_each(cycle);
    // The daemon drops an answered request within a second, and an idle thread exits after five.
    wait_until("all files are closed", || count("fd") <= files);
    wait_until("all threads have left", || count("task") <= threads);
    assert_eq!(lab.status()["disks"].as_array().unwrap().len(), 1);
}

#[test]
fn killed_daemon_loses_nothing_of_an_added_disk() {
    let lab = lab();
    lab.ok("add m d=base.img,overlay=ov");
    lab.open("m/d").write_all_at(&noise(MIB, 3), 5).unwrap();
    lab.sh("cp m/d copy");
    lab.kill();
    lab.mount("e=blank:1M");
    let said = lab.ok("add m d=base.img,overlay=ov");
    assert!(said.contains("d: recovered: the daemon had died, nothing is lost"), "{said}");
    lab.sh("cmp m/d copy");
}

#[test]
fn add_force_accepts_a_changed_base() {
    let lab = Lab::new();
    lab.mount("e=blank:1M");
    lab.sh("truncate -s 1M b.img; $COWSLIP add m d=b.img,overlay=ov; $COWSLIP remove m/d; echo x >b.img; truncate -s 1M b.img");
    assert!(lab.refused(1, "add m d=b.img,overlay=ov").contains("use --force"));
    lab.ok("add --force m d=b.img,overlay=ov");
}

#[test]
fn remove_names_users_but_not_bind_mounts_of_the_mount() {
    let mut lab = Lab::new();
    lab.base("base", MIB);
    lab.mount("d=base e=base");
    lab.sh("mkdir other; mount --bind m other");
    let file = lab.open_ro("m/d");
    let line = lab.refused(1, "remove m/d --timeout 100ms");
    assert!(line.contains("(pid ") && !line.contains("the mount at"), "{line}");
    drop(file);
    // The bind mount does not keep the disk in use.
    lab.ok("remove m/d");
    lab.sh("umount other");
}
