//! Copies between overlay and base: commit, prefetch, cow-on-read and hydrate; and disks that are
//! kept in a store.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use crate::common::mount::*;
use crate::common::strace::{Call, Seen, Strace, kill_at};
use rustix::process::Signal;

/// Creates a lab with a writable base of `size` bytes.
fn lab(size: u64) -> Lab {
    let lab = Lab::new();
    fs::write(lab.path("base.img"), noise(size, 1)).unwrap();
    lab
}

fn changed(lab: &Lab) -> u64 {
    let overlay = &lab.disk("d")["overlay"];
    overlay["changed"].as_u64().unwrap() + overlay["zeroed"].as_u64().unwrap()
}

#[test]
fn commit_makes_the_base_equal_to_the_disk() {
    let lab = lab(8 * MIB);
    lab.mount("d=base.img,overlay=o");
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 2), MIB + 100).unwrap();
    lab.sh("fallocate -p -o 4M -l 1M m/d");
    // A range that was once truncated is zeros in the base as well.
    file.set_len(6 * MIB + 10).unwrap();
    file.set_len(8 * MIB).unwrap();
    drop(file);
    // Not the checksum, which includes holes: at the truncation a hole began inside a block.
    let before = fs::read(lab.path("m/d")).unwrap();
    let said = lab.ok("commit m/d");
    assert!(said.contains("\nd: 1 MiB (and 1 MiB zeroed) are in its base now"), "{said}");
    assert!(fs::read(lab.path("m/d")).unwrap() == before);
    lab.sh("cmp m/d base.img");
    assert_eq!(changed(&lab), 0);
    assert!(lab.ok("commit m/d").ends_with("\nd: 0 bytes are in its base now\n"));
    lab.umount();
    // The overlay matches the changed base.
    lab.mount("d=base.img,overlay=o");
    assert!(fs::read(lab.path("m/d")).unwrap() == before);
}

#[test]
fn unmounted_overlay_can_be_committed() {
    let lab = lab(4 * MIB);
    lab.mount("d=base.img,overlay=o");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 777).unwrap();
    let before = checksum(&lab.path("m/d"));
    assert!(lab.refused(1, "commit o").contains("is in use by the cowslip mount at"));
    lab.umount();
    assert!(lab.ok("commit o").ends_with("are in its base now\n"));
    assert_eq!(checksum(&lab.path("base.img")), before);
    lab.mount("d=base.img,overlay=o");
    assert_eq!((checksum(&lab.path("m/d")), changed(&lab)), (before, 0));
}

#[test]
fn commit_of_a_truncated_disk_truncates_the_base() {
    let lab = lab(4 * MIB);
    lab.mount("d=base.img,overlay=o");
    lab.open("m/d").set_len(MIB + 1).unwrap();
    lab.ok("commit m/d");
    assert_eq!(fs::metadata(lab.path("base.img")).unwrap().len(), MIB + 1);
    lab.sh("cmp m/d base.img");
    lab.ok("reset m/d");
    assert_eq!(fs::metadata(lab.path("m/d")).unwrap().len(), MIB + 1);
}

#[test]
fn impossible_commit_is_rejected_without_changes() {
    let lab = lab(4 * MIB);
    lab.mount("d=base.img,overlay=o t=base.img b=blank:1M,overlay=ob r=base.img,mode=ro");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 0).unwrap();
    let base = checksum(&lab.path("base.img"));
    let line = |words: &str, wanted: &str| {
        let line = lab.refused(1, words);
        assert!(line.contains(wanted), "{words}: {line}");
    };
    line("commit m/t", "its overlay is temporary");
    line("commit m/b", "its base is blank");
    line("commit m/r", "it has no overlay");
    line("commit m/d", "cannot be written while another");
    lab.ok("remove m/t");
    lab.ok("remove m/r");
    let writer = lab.open("m/d");
    line("commit m/d", "it is open for writing");
    drop(writer);
    lab.ok("snapshot m/d one");
    line("commit m/d", "it has snapshots");
    // The layers are merged in the background, and a commit waits for the merge.
    lab.ok("snapshot m/d --delete one");
    line("commit m/nothing", "there is no disk 'nothing'");
    fs::File::options().write(true).open(lab.path("m/d")).unwrap().set_len(5 * MIB).unwrap();
    line("commit m/d", "it is larger (5 MiB) than its base");
    fs::File::options().write(true).open(lab.path("m/d")).unwrap().set_len(4 * MIB).unwrap();
    assert_eq!(checksum(&lab.path("base.img")), base);
    // The base is modified by somebody else.
    fs::File::options()
        .write(true)
        .open(lab.path("base.img"))
        .unwrap()
        .write_all_at(b"x", 99)
        .unwrap();
    line("commit m/d", "has changed under it");
    line("commit nothing", "is no overlay and no mounted disk");
    lab.umount();
    // No --force of commit helps, so the message names only that of rebase.
    line("commit o", "or take this one with cowslip rebase --force");
    line("commit o --force", "has changed under it");
}

#[test]
fn commit_is_rejected_before_copying_if_the_base_lacks_space() {
    let lab = Lab::new();
    lab.host("small", "ext4", 16 * MIB);
    lab.sh("truncate -s 64M small/base.img");
    lab.mount("d=small/base.img,overlay=o");
    lab.open("m/d").write_all_at(&noise(32 * MIB, 2), 0).unwrap();
    let line = lab.refused(1, "commit m/d");
    assert!(line.contains("not enough space where its base is: 32 MiB are needed"), "{line}");
    assert_eq!(allocated(&lab.path("small/base.img")), 0);
    lab.open("m/d").write_all_at(b"still", 0).unwrap();
}

/// Commits `m/d` under strace, which kills the daemon as `kills` say.
fn commit_under_strace(lab: &Lab, kills: &[String]) -> Seen {
    let pid = lab.pid();
    let strace = Strace::attach(lab, pid, kills);
    let output = lab.cowslip("commit m/d");
    let seen = strace.end(lab, || output.status.success());
    assert_ne!(output.status.success(), seen.killed, "{}", show(&output));
    if seen.killed {
        wait_until("the killed daemon ends", || !is_alive(pid));
    }
    seen
}

#[test]
fn killed_commit_is_finished_by_the_next_with_correct_reads_in_between() {
    let lab = lab(48 * MIB);
    lab.mount("d=base.img,overlay=o");
    let change = |seed| {
        lab.open("m/d").write_all_at(&noise(40 * MIB, seed), 4 * MIB).unwrap();
        lab.sh("sync m/d");
        checksum(&lab.path("m/d"))
    };
    change(2);
    let plain = commit_under_strace(&lab, &[]);
    // The calls that write to the base and sync it.
    let is_of_base = |call: &&Call| call.shown.contains("/base.img>");
    let calls: Vec<&Call> = plain.calls.iter().filter(is_of_base).collect();
    assert!(calls.len() > 3, "{calls:#?}");
    let places = [0, 1, calls.len() / 2, calls.len() - 1];
    for (seed, place) in (3..).zip(places) {
        let before = change(seed);
        let Call { name, nth, shown, .. } = calls[place];
        let seen = commit_under_strace(&lab, &[kill_at(name, *nth)]);
        assert!(seen.killed, "not killed at {shown}");
        // The overlay is not damaged, in any state of the base.
        let checked = lab.ok("check o");
        let fact = "a commit into it was cut short: cowslip commit finishes it\n";
        assert!(checked.contains(fact), "killed at {shown}: {checked}");
        let said = lab.mount("d=base.img,overlay=o");
        assert!(said.contains("a commit into the base was cut short"), "killed at {shown}: {said}");
        assert_eq!(checksum(&lab.path("m/d")), before, "killed at {shown}");
        let line = lab.refused(1, "snapshot m/d");
        assert!(line.contains("a commit of it was cut short"), "{line}");
        lab.refused(1, "reset m/d");
        let said = lab.ok("status m");
        assert!(said.contains("cowslip commit finishes it"), "{said}");
        lab.ok("commit m/d");
        assert_eq!(checksum(&lab.path("m/d")), before, "killed at {shown}");
        lab.sh("cmp m/d base.img");
    }
}

#[test]
fn writes_continue_during_a_commit() {
    let lab = lab(64 * MIB);
    lab.mount("d=base.img,overlay=o");
    let mut expected = noise(64 * MIB, 1);
    let file = lab.open("m/d");
    for at in 0..16 {
        let bytes = noise(MIB, 50 + at);
        file.write_all_at(&bytes, at * 4 * MIB + 1000).unwrap();
        expected[(at * 4 * MIB + 1000) as usize..][..MIB as usize].copy_from_slice(&bytes);
    }
    let (done, rounds) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut commits = 0;
            while commits < 3 || rounds.load(Ordering::SeqCst) < 6 {
                lab.ok("commit --force m/d");
                commits += 1;
            }
            done.store(true, Ordering::SeqCst);
        });
        let mut round = 0;
        while !done.load(Ordering::SeqCst) {
            let at = round * 7919 % 60 * MIB + round * 123 % 5000;
            let bytes = noise(6000, 1000 + round);
            file.write_all_at(&bytes, at).unwrap();
            expected[at as usize..][..6000].copy_from_slice(&bytes);
            assert_eq!(read(&file, at, 6000), bytes);
            round += 1;
            rounds.store(round, Ordering::SeqCst);
        }
    });
    drop(file);
    assert!(fs::read(lab.path("m/d")).unwrap() == expected);
    lab.ok("commit m/d");
    assert!(fs::read(lab.path("base.img")).unwrap() == expected);
}

#[test]
fn prefetch_skips_petabytes_of_holes() {
    let lab = Lab::new();
    lab.mount("--store st");
    lab.sh("truncate -s 7E m/f; echo x | dd of=m/f bs=1 seek=3P conv=notrunc");
    lab.ok("prefetch m/f");
    lab.ok("snapshot m/f a");
    assert!(lab.ok("prefetch m/f --copy").contains("4 KiB"));
}

#[test]
fn prefetch_reads_and_with_copy_fills_the_overlay() {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img c=base.img,cow-on-cache r=base.img,mode=ro");
    assert!(lab.ok("prefetch m/d").ends_with("read into the host's cache\n"));
    assert_eq!(changed(&lab), 0);
    lab.ok("prefetch m/d 0..1M --copy");
    let data = data_runs(&lab.open_ro("m/d"));
    let overlay = lab.ok("map m/d --json");
    let first = overlay.lines().next().unwrap();
    assert!(first.contains("\"depth\": 0") && first.contains("\"data\""), "{first}");
    assert_eq!(data_runs(&lab.open_ro("base.img")), data, "holes became data");
    lab.ok("prefetch m/c");
    let map = lab.ok("map m/c --json");
    assert!(
        !map.lines().any(|line| line.contains("\"depth\": 1") && line.contains("\"data\": true"))
    );
    lab.sh("cmp m/c base.img");
    let line = lab.refused(1, "prefetch m/r --copy");
    assert!(line.contains("no overlay to copy into"), "{line}");
    lab.refused(2, "prefetch m/d 5M..1M");
    assert!(lab.refused(1, "prefetch m/d 20M..21M").contains("past its end"));
}

#[test]
fn cow_on_read_copies_reads_up_and_never_overwrites_a_write() {
    let lab = lab(16 * MIB);
    lab.mount("d=base.img,overlay=o,cow-on-read");
    let file = lab.open("m/d");
    let wanted = noise(16 * MIB, 1);
    assert!(read(&file, MIB + 5, 5000) == wanted[(MIB + 5) as usize..][..5000]);
    assert_eq!(changed(&lab), 8192);
    // Concurrent readers and writers of the same blocks.
    thread::scope(|scope| {
        for reader in 0..2 {
            let file = lab.open("m/d");
            scope.spawn(move || {
                for at in 0..512 {
                    read(&file, 4 * MIB + (at * 8192 + reader * 4096) % (4 * MIB), 4096);
                }
            });
        }
        for at in 0..512 {
            file.write_all_at(&[at as u8; 512], 4 * MIB + at * 8192 + 512).unwrap();
        }
    });
    for at in 0..512 {
        assert_eq!(read(&file, 4 * MIB + at * 8192 + 512, 512), [at as u8; 512], "write {at}");
        let before = (4 * MIB + at * 8192) as usize;
        assert!(read(&file, before as u64, 512) == wanted[before..before + 512]);
    }
    drop(file);
}

#[test]
fn hydrated_disk_is_independent_of_its_base() {
    let lab = lab(16 * MIB);
    lab.mount("d=base.img,overlay=o");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 5 * MIB + 3).unwrap();
    let before = checksum(&lab.path("m/d"));
    // Slow at first, so that the hydration can be paused, shown and cancelled.
    lab.ok("hydrate m/d --rate 1M --background");
    wait_until("it is under way", || lab.disk("d")["overlay"]["hydration"] == "running");
    assert!(lab.refused(1, "snapshot m/d").contains("a hydration is going on"));
    lab.ok("hydrate m/d --pause");
    assert_eq!(lab.disk("d")["overlay"]["hydration"], "paused");
    let said = lab.ok("status m");
    assert!(said.contains("d: a hydration is going on") && said.contains(", paused"), "{said}");
    lab.ok("hydrate m/d --cancel");
    wait_until("it has ended", || lab.disk("d")["overlay"]["hydration"].is_null());
    assert!(lab.refused(1, "hydrate m/d --pause").contains("not being hydrated"));
    assert!(lab.ok("hydrate m/d").contains("detached from its base"));
    fs::remove_file(lab.path("base.img")).unwrap();
    assert_eq!(checksum(&lab.path("m/d")), before);
    assert!(lab.refused(1, "reset m/d").contains("it was detached from its base by hydrate"));
    assert_eq!(checksum(&lab.path("m/d")), before);
    lab.umount();
    lab.mount("d=blank:16M,overlay=o");
    assert_eq!(checksum(&lab.path("m/d")), before);
}

#[test]
fn hydrate_rejects_a_disk_with_snapshots() {
    let lab = lab(4 * MIB);
    lab.mount("d=base.img,overlay=o");
    lab.ok("snapshot m/d one");
    for words in ["hydrate m/d", "hydrate m/d --background"] {
        assert!(lab.refused(1, words).contains("it has snapshots"));
    }
}

#[test]
fn hydrated_clone_needs_neither_its_origin_nor_its_base() {
    let lab = lab(8 * MIB);
    lab.mount("--store st d=base.img,overlay=st");
    lab.open("m/d").write_all_at(&noise(MIB, 2), MIB).unwrap();
    lab.ok("clone m/d c");
    let before = checksum(&lab.path("m/c"));
    lab.ok("hydrate m/c");
    fs::remove_file(lab.path("m/d")).unwrap();
    fs::remove_file(lab.path("base.img")).unwrap();
    assert_eq!(checksum(&lab.path("m/c")), before);
    lab.umount();
    lab.mount("--store st");
    assert_eq!(checksum(&lab.path("m/c")), before);
    assert_eq!(fs::read_dir(lab.path("st/layers")).unwrap().count(), 1);
}

#[test]
fn temporary_disk_can_be_kept_in_the_store_and_cloned() {
    let lab = lab(4 * MIB);
    lab.mount("--store st d=base.img");
    lab.open("m/d").write_all_at(&noise(MIB, 2), 0).unwrap();
    let line = lab.refused(1, "clone m/d c");
    assert!(line.contains("its changes are temporary: 'cowslip keep FILE "), "{line}");
    lab.ok("snapshot m/d one");
    // The next mount would sweep an overlay in these places.
    for inside in ["st/disks/own", "st/names/own", "st/own"] {
        for words in ["keep m/d ", "add m e=base.img,overlay=", "add m e=blank:1M,overlay="] {
            let line = lab.refused(1, &format!("{words}{inside}"));
            assert!(line.contains("which sweeps what it does not know: name the store"), "{line}");
        }
    }
    lab.ok("add m e=blank:1M,overlay=st");
    assert_eq!(lab.sh("ls st/names"), "e\n");
    lab.ok("keep m/d st");
    lab.ok("clone m/d c");
    let line = lab.refused(1, "clone m/d c");
    assert!(line.contains("there is a disk 'c' already"), "{line}");
    let before = checksum(&lab.path("m/d"));
    lab.open("m/c").write_all_at(b"other", 0).unwrap();
    assert_eq!(checksum(&lab.path("m/d")), before);
    lab.umount();
    lab.mount("--store st d=base.img,overlay=st");
    assert_eq!(checksum(&lab.path("m/d")), before);
    assert_eq!(checksum(&lab.path("m/.cowslip/d/snapshots/one")), before);
    assert_eq!(read(&lab.open_ro("m/c"), 0, 5), b"other");
    lab.umount();
    // The layers of these disks belong to the store.
    for (target, says) in [("st", "is a store"), ("st/names/c", "is a disk of a store")] {
        let line = lab.refused(1, &format!("commit {target}"));
        assert!(line.contains(&format!("'{target}' {says}: mount")), "{line}");
    }
}

#[test]
fn limit_includes_all_layers() {
    let lab = lab(4 * MIB);
    lab.mount("d=base.img,overlay=o,limit=1M");
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB / 2, 2), 0).unwrap();
    lab.ok("snapshot m/d one");
    file.write_all_at(&noise(MIB / 2, 3), MIB).unwrap();
    let error = file.write_all_at(&noise(4096, 4), 2 * MIB).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    // Blocks of the top layer can be overwritten.
    file.write_all_at(&noise(MIB / 2, 5), MIB).unwrap();
    drop(file);
}

/// Runs `cowslip WORDS`, interrupts it with SIGINT once `is_on` returns true, and returns its last
/// line.
fn interrupted(lab: &Lab, words: &str, is_on: impl FnMut() -> bool) -> String {
    let words: Vec<&str> = words.split_whitespace().collect();
    let mut command = lab.command(COWSLIP);
    command.args(words).stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    wait_until("it has begun", is_on);
    signal(child.id(), Signal::INT).unwrap();
    let output = child.wait_with_output().unwrap();
    one_line(130, &output, "interrupted")
}

#[test]
fn interrupted_hydrate_continues_in_the_background_and_reports_it() {
    let lab = lab(16 * MIB);
    lab.mount("d=base.img,overlay=o");
    let doing = || lab.disk("d")["overlay"]["doing"].is_string();
    let line = interrupted(&lab, "hydrate m/d --rate 64K", doing);
    assert!(line.contains("goes on in the background: cowslip status"), "{line}");
    assert!(line.contains("hydrate --cancel"), "{line}");
    assert!(doing());
    lab.ok("hydrate m/d --cancel");
}

#[test]
fn interrupted_commit_reports_its_outcome() {
    let lab = lab(192 * MIB);
    lab.mount("d=base.img,overlay=o");
    lab.open("m/d").write_all_at(&noise(160 * MIB, 2), 4 * MIB).unwrap();
    let before = checksum(&lab.path("m/d"));
    let mut is_first = true;
    // The condition holds once a commit is in progress, or when all is committed.
    let line = interrupted(&lab, "commit m/d", || {
        !std::mem::take(&mut is_first) && lab.disk("d")["overlay"]["doing"].is_string()
            || lab.disk("d")["overlay"]["changed"] == 0
    });
    let overlay = lab.disk("d")["overlay"].clone();
    let truth = match (&overlay["committing"], &overlay["changed"]) {
        (committing, _) if *committing == true => "stopped: its base holds a part",
        (_, changed) if *changed == 0 => "all changes are in the base",
        _ => "stopped before anything",
    };
    assert!(line.contains(truth), "{line}: {overlay}");
    assert_eq!(checksum(&lab.path("m/d")), before);
}
