//! Operations on disks, killed at every change that they make to files: strace kills the real
//! program at the entry of the system call.
//!
//! A first run under strace records the list of changes of an operation. Then the operation is
//! repeated from the same state and killed at the first change, at the second, and so on; each time
//! strace must have seen exactly the changes up to that point. A last run, with kills set just past
//! the counts of the list, must complete with no change that the list does not have.
//!
//! Changes of files without a name (`O_TMPFILE`, used to probe a file system) are not counted: a
//! kill leaves nothing of these files. A kill *within* a call, which would execute half of it, is
//! left to chance and to `life_crash`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use crate::common::mount::*;
use crate::common::state::*;
use crate::common::strace::{self, Call, Seen, Strace, kill_at};
use rustix::process::Signal;

const SIZE: u64 = MIB;
/// Size in bytes of a block of an overlay.
const BLOCK: usize = 4096;
/// A daemon makes the first changes of its background sync five seconds after its start; runs are
/// shorter than this.
const BACKGROUND: Duration = Duration::from_secs(4);

/// Runs `act` once for each change that it makes, limited to those of `part`, with a kill at this
/// change, and returns the results of `look` after each. `act` must start from the same state every
/// time.
#[track_caller]
fn kill_at_every_change<T>(
    part: Part,
    act: impl Fn(&[String]) -> (Answer, Seen),
    look: impl Fn(Answer, &str) -> T,
) -> Vec<T> {
    let act = |kills: &[String]| in_time(|| act(kills));
    let (answer, plain) = act(&[]);
    assert!(answer == Answer::Done && !plain.killed);
    look(answer, "not killed");
    let calls = match part {
        Part::All | Part::Merging => &plain.calls[..],
        Part::Request => plain.calls.chunk_by(|one, two| one.thread == two.thread).next().unwrap(),
    };
    assert!(calls.iter().all(|call| call.thread == calls[0].thread), "{calls:#?}");
    let mut found = Vec::new();
    for (index, call) in calls.iter().enumerate() {
        let at = format!("killed at {} of {}: {}", index + 1, calls.len(), call.shown);
        let (answer, seen) = act(&[kill_at(&call.name, call.nth)]);
        assert!(seen.killed, "{at}: nothing was killed");
        assert_eq!(names(&seen.calls), names(&calls[..=index]), "{at}\n{}", seen.text);
        found.push(look(answer, &at));
    }
    if part != Part::Request {
        let (answer, seen) = act(&plain.past());
        assert!(answer == Answer::Done && !seen.killed);
        assert_eq!(names(&seen.calls), names(&plain.calls), "not killed");
        look(answer, "not killed");
    }
    println!("{} kills", found.len());
    found
}

/// Repeats `act` if it took so long that a daemon may have started a background sync.
fn in_time<T>(mut act: impl FnMut() -> T) -> T {
    loop {
        let begun = Instant::now();
        let done = act();
        if begun.elapsed() < BACKGROUND {
            return done;
        }
    }
}

fn names(calls: &[Call]) -> Vec<(&str, u32)> {
    calls.iter().map(|call| (call.name.as_str(), call.nth)).collect()
}

/// Whether the command reported success.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Done,
    Failed,
}

/// The changes that are killed at. Changes of two threads in one run would not have a fixed order,
/// so only those of one thread count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// All changes, which one thread makes.
    All,
    /// The changes of the request, without those of the merge that another thread then starts.
    Request,
    /// The changes of the merge alone, after the request has completed.
    Merging,
}

/// A request to the daemon.
struct Deed {
    /// Words for `cowslip mount`: the disks.
    disks: &'static str,
    /// The overlay or store that is checked.
    dir: &'static str,
    /// Words for `cowslip`: the command.
    command: &'static str,
    part: Part,
    /// Number of layers after the operation has completed.
    layers: usize,
    /// The effect of the operation on the disks; the second argument is the bytes of the base.
    apply: fn(&mut States, &[u8]),
}

impl Deed {
    /// A request for the disk `d` with the overlay `ov`.
    fn new(
        command: &'static str,
        part: Part,
        layers: usize,
        apply: fn(&mut States, &[u8]),
    ) -> Self {
        Self { disks: "d=base.img,overlay=ov", dir: "ov", command, part, layers, apply }
    }
}

/// A lab in which one operation is repeated from the same state.
struct Stage {
    lab: Lab,
    deed: Deed,
    old: States,
    new: States,
}

impl Stage {
    /// Creates a disk `d` with the snapshots `a`, `b` and `c`.
    fn new(deed: Deed) -> Self {
        let mut lab = Lab::new();
        lab.base("base.img", SIZE);
        mount(&lab, deed.disks);
        for (at, name) in (0..).zip(["a", "b", "c"]) {
            change(&lab, at);
            lab.ok(&format!("snapshot m/d {name}"));
        }
        lab.umount();
        lab.sh(&format!("mv {} kept", deed.dir));
        let mut stage = Self { lab, deed, old: BTreeMap::new(), new: BTreeMap::new() };
        stage.set();
        stage.old = found(&stage.lab);
        stage.new = stage.old.clone();
        (stage.deed.apply)(&mut stage.new, &fs::read(stage.lab.path("base.img")).unwrap());
        stage.lab.umount();
        stage
    }

    /// Restores and mounts the saved state, and makes a change to the disk that is not synced.
    fn set(&self) {
        let dir = self.deed.dir;
        self.lab.sh(&format!("rm -rf {dir}; cp -a kept {dir}"));
        mount(&self.lab, self.deed.disks);
        change(&self.lab, 3);
    }

    fn layers(&self) -> usize {
        fs::read_dir(self.lab.path(self.deed.dir).join("layers")).unwrap().count()
    }

    /// Restores the state and runs the operation.
    fn act(&self, kills: &[String]) -> (Answer, Seen) {
        self.set();
        let lab = &self.lab;
        let pid = lab.pid();
        let words: Vec<&str> = self.deed.command.split_whitespace().collect();
        let mut asking = lab.command(COWSLIP);
        asking.args(words).stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
        let mut ask = || Running(asking.spawn().unwrap());
        let (mut asking, strace) = match self.deed.part {
            Part::All | Part::Request => {
                let strace = Strace::attach(lab, pid, kills);
                (ask(), strace)
            }
            Part::Merging => {
                let stacks = || stacks(&lab.path(self.deed.dir));
                let before = stacks();
                // The sync of the directory of the new stack is the last change of the request's
                // thread.
                let asking = strace::stop_after(lab, pid, "fsync", 2, ask);
                assert_ne!(stacks(), before, "the name is gone");
                let strace = Strace::attach(lab, pid, kills);
                signal(pid, Signal::CONT).unwrap();
                (asking, strace)
            }
        };
        let mut status = None;
        let seen = strace.end(lab, || {
            status = asking.0.try_wait().unwrap();
            status.is_some_and(|status| status.success()) && self.layers() == self.deed.layers
        });
        let status = status.unwrap_or_else(|| asking.0.wait().unwrap());
        end(lab, pid, &seen);
        (if status.success() { Answer::Done } else { Answer::Failed }, seen)
    }

    /// Mounts after a kill, checks the disks, and returns whether the operation has happened.
    #[track_caller]
    fn look(&self, answer: Answer, at: &str) -> bool {
        let (lab, dir) = (&self.lab, self.deed.dir);
        // Before recovery there may be unused layers, but no damage.
        let said = lab.cowslip(&format!("check {dir}"));
        assert!(said.status.success(), "{at}: {}", show(&said));
        mount(lab, self.deed.disks);
        let found = found(lab);
        let has_happened = found == self.new;
        let wrong = || differences(&found, &self.old, &self.new);
        assert!(has_happened || found == self.old, "{at}: {}", wrong());
        assert!(has_happened || answer == Answer::Failed, "{at}: it was answered");
        lab.umount();
        check_tidy(lab, dir, at);
        has_happened
    }

    /// Kills the operation at each of its changes and checks the results.
    fn kill_at_every_change(self) {
        let part = self.deed.part;
        let look = |answer, at: &str| self.look(answer, at);
        let happened = kill_at_every_change(part, |kills| self.act(kills), look);
        // A single change makes the operation happen, and none undoes it.
        assert!(happened.is_sorted(), "{happened:?}");
        assert_eq!(happened.first(), Some(&(part == Part::Merging)), "{happened:?}");
        assert_eq!(happened.last(), Some(&true), "{happened:?}");
    }
}

/// Mounts without a log file, whose writes would count as changes.
#[track_caller]
fn mount(lab: &Lab, disks: &str) -> String {
    lab.sh(&format!("$COWSLIP mount m {disks}"))
}

/// Waits for the exit of a killed daemon, or unmounts.
#[track_caller]
fn end(lab: &Lab, pid: u32, seen: &Seen) {
    if seen.killed {
        wait_until("the killed daemon ends", || !is_alive(pid));
    } else {
        lab.umount();
    }
}

/// Changes the disk, differently for each `seed`: writes data, partly over that of the previous
/// `seed`, and zeros.
fn change(lab: &Lab, seed: u64) {
    let file = lab.open("m/d");
    file.write_all_at(&noise(40_000, 50 + seed), seed * 30_000 + 100).unwrap();
    fallocate(&file, PUNCH, seed * 40_000 + 9000..seed * 40_000 + 30_000).unwrap();
}

/// Returns the text of all stacks below `dir`: of an overlay, or of all disks of a store.
fn stacks(dir: &Path) -> String {
    let mut found = fs::read_to_string(dir.join("stack")).unwrap_or_default();
    for disk in fs::read_dir(dir.join("disks")).into_iter().flatten() {
        found += &fs::read_to_string(disk.unwrap().path().join("stack")).unwrap_or_default();
    }
    found
}

/// Checks that the overlay or store is clean and holds no unknown files, except for temporary ones
/// that the next operation overwrites and a repair removes.
#[track_caller]
fn check_tidy(lab: &Lab, dir: &str, at: &str) {
    let said = lab.ok(&format!("check {dir}"));
    let states = said.lines().filter_map(|line| line.strip_prefix("state "));
    let states: BTreeSet<&str> = states.map(str::trim).collect();
    assert_eq!(states, BTreeSet::from(["clean"]), "{at}:\n{said}");
    assert!(!said.contains("unused"), "{at}:\n{said}");
    let path = lab.path(dir);
    assert_eq!(unnamed(&path, &stacks(&path)), BTreeSet::new(), "{at}");
    lab.ok(&format!("check {dir} --repair"));
    let known = ["data", "log", "stack", "layers", "disks", "names", "store"];
    let files = lab.sh(&format!("find {dir} -mindepth 1 -printf '%f %l\\n'"));
    for line in files.lines() {
        let (name, link) = line.split_once(' ').unwrap();
        let is_known = known.contains(&name) || uuid::Uuid::parse_str(name).is_ok();
        assert!(is_known || link.starts_with("../disks/"), "{at}: '{name}' is left:\n{files}");
    }
}

#[test]
fn snapshot_killed_at_any_change_is_taken_or_not() {
    let deed = Deed::new("snapshot m/d new", Part::All, 5, |disks, _| {
        let disk = disks.get_mut("d").unwrap();
        disk.snapshots.insert("new".to_owned(), disk.bytes.clone());
    });
    Stage::new(deed).kill_at_every_change();
}

/// Kills the deletion `command` at the changes of `part`.
fn deletion(part: Part, command: &'static str, apply: fn(&mut States, &[u8])) {
    Stage::new(Deed::new(command, part, 3, apply)).kill_at_every_change();
}

fn without_b(disks: &mut States, _: &[u8]) {
    disks.get_mut("d").unwrap().snapshots.remove("b");
}

fn without_c(disks: &mut States, _: &[u8]) {
    disks.get_mut("d").unwrap().snapshots.remove("c");
}

#[test]
fn deletion_killed_at_any_change_removes_the_name_or_nothing() {
    deletion(Part::Request, "snapshot m/d --delete b", without_b);
}

#[test]
fn merge_of_inner_layers_killed_at_any_change_changes_no_byte() {
    deletion(Part::Merging, "snapshot m/d --delete b", without_b);
}

#[test]
fn merge_into_the_top_killed_at_any_change_changes_no_byte() {
    deletion(Part::Merging, "snapshot m/d --delete c", without_c);
}

#[test]
fn revert_killed_at_any_change_has_happened_or_not() {
    let deed = Deed::new("revert m/d a", Part::All, 4, |disks, _| {
        let disk = disks.get_mut("d").unwrap();
        disk.bytes = disk.snapshots["a"].clone();
    });
    Stage::new(deed).kill_at_every_change();
}

#[test]
fn reset_killed_at_any_change_has_happened_or_not() {
    let deed = Deed::new("reset m/d", Part::All, 4, |disks, base| {
        disks.get_mut("d").unwrap().bytes = base.to_vec();
    });
    Stage::new(deed).kill_at_every_change();
}

#[test]
fn clone_killed_at_any_change_exists_or_not() {
    let deed = Deed {
        disks: "--store st d=base.img,overlay=st",
        dir: "st",
        command: "clone m/d e",
        part: Part::All,
        layers: 6,
        apply: |disks, _| {
            let bytes = disks["d"].bytes.clone();
            disks.insert("e".to_owned(), State { bytes, snapshots: BTreeMap::new() });
        },
    };
    Stage::new(deed).kill_at_every_change();
}

/// A lab in which one commit is repeated from the same state.
struct Commit {
    lab: Lab,
    base: (Vec<u8>, SystemTime),
    disk: Vec<u8>,
}

const COMMITTED: &str = "d=base.img,overlay=ov";

impl Commit {
    /// Creates an overlay with data and zeros, of a disk that was truncated and extended again, so
    /// that its end is zeros.
    fn new() -> Self {
        let lab = Lab::new();
        fs::write(lab.path("base.img"), noise(SIZE, 1)).unwrap();
        mount(&lab, COMMITTED);
        change(&lab, 0);
        lab.open("m/d").set_len(SIZE - 100_000).unwrap();
        lab.open("m/d").set_len(SIZE).unwrap();
        change(&lab, 5);
        let disk = fs::read(lab.path("m/d")).unwrap();
        lab.umount();
        let mut stage = Self { lab, base: (Vec::new(), SystemTime::UNIX_EPOCH), disk };
        stage.keep();
        stage
    }

    /// Saves the present state as the one to start from.
    fn keep(&mut self) {
        self.lab.sh("rm -rf kept; mv ov kept");
        let base = self.lab.path("base.img");
        let mtime = fs::metadata(&base).unwrap().modified().unwrap();
        self.base = (fs::read(base).unwrap(), mtime);
    }

    fn set(&self) {
        self.lab.sh("rm -rf ov; cp -a kept ov");
        // Written in place: the overlay identifies its base by the inode, among others.
        let base = self.lab.open("base.img");
        base.write_all_at(&self.base.0, 0).unwrap();
        base.set_modified(self.base.1).unwrap();
    }

    /// Checks the base during a commit: each block is the old one or the disk's.
    #[track_caller]
    fn check_base(&self, at: &str) {
        let base = fs::read(self.lab.path("base.img")).unwrap();
        assert_eq!(base.len() as u64, SIZE, "{at}");
        let blocks = base.chunks(BLOCK).zip(self.base.0.chunks(BLOCK).zip(self.disk.chunks(BLOCK)));
        for (index, (block, (old, new))) in blocks.enumerate() {
            // The truncated part begins inside a block.
            let is_mixed =
                || block.iter().zip(old.iter().zip(new)).all(|(b, (o, n))| b == o || b == n);
            assert!(block == old || block == new || is_mixed(), "{at}: block {index}");
        }
    }

    /// Mounts after a kill, checks and finishes the commit, and returns whether mount reported an
    /// interrupted commit.
    #[track_caller]
    fn look(&self, at: &str, finish: impl Fn(&Lab)) -> bool {
        let lab = &self.lab;
        self.check_base(at);
        let checked = lab.cowslip("check ov");
        assert!(checked.status.success(), "{at}: {}", show(&checked));
        let said = mount(lab, COMMITTED);
        let is_cut_short = said.contains("a commit into the base was cut short");
        let is_told = show(&checked).contains("a commit into it was cut short");
        assert_eq!(is_told, is_cut_short, "{at}:\n{}{said}", show(&checked));
        assert!(fs::read(lab.path("m/d")).unwrap() == self.disk, "{at}: the disk has other bytes");
        finish(lab);
        assert!(fs::read(lab.path("base.img")).unwrap() == self.disk, "{at}: the base differs");
        mount_if_not(lab);
        assert!(fs::read(lab.path("m/d")).unwrap() == self.disk, "{at}: the disk has other bytes");
        let overlay = &lab.disk("d")["overlay"];
        assert_eq!((&overlay["changed"], &overlay["zeroed"]), (&0.into(), &0.into()), "{at}");
        lab.umount();
        check_tidy(lab, "ov", at);
        is_cut_short
    }

    /// Kills the commit at each of its changes, and returns after which of them it was reported as
    /// interrupted.
    #[track_caller]
    fn kill_at_every_change(
        self,
        act: impl Fn(&Lab, &[String]) -> (Answer, Seen),
        finish: fn(&Lab),
    ) -> Vec<bool> {
        let act = |kills: &[String]| {
            self.set();
            act(&self.lab, kills)
        };
        let look = |_, at: &str| self.look(at, finish);
        kill_at_every_change(Part::All, act, look)
    }
}

/// Whether mount reports an interrupted commit, from the first change of a commit to its last.
const COURSE: &[bool] = &[false, true, false];

#[track_caller]
fn check_course(cut_short: &[bool], course: &[bool]) {
    let runs = cut_short.chunk_by(|one, two| one == two);
    assert!(runs.map(|run| run[0]).eq(course.iter().copied()), "{cut_short:?}");
}

/// Runs `cowslip commit` on an overlay that is not mounted.
fn commit_offline(lab: &Lab, kills: &[String]) -> (Answer, Seen) {
    let (output, seen) = strace::run(lab, "commit ov", kills);
    (if output.status.success() { Answer::Done } else { Answer::Failed }, seen)
}

fn finish_offline(lab: &Lab) {
    lab.umount();
    lab.ok("commit ov");
}

fn mount_if_not(lab: &Lab) {
    if mounts_below(&lab.path("m")).is_empty() {
        mount(lab, COMMITTED);
    }
}

/// Commits `m/d` by the request alone: the command asks for the status first, which another thread may
/// answer, or the same one, and whose calls would be counted.
fn commit_alone(lab: &Lab) -> bool {
    let mut ctl = lab.open("m/.cowslip/d/ctl");
    let mut answer = String::new();
    ctl.write_all(b"{\"op\":\"commit\"}").is_ok()
        && ctl.read_to_string(&mut answer).is_ok()
        && answer.contains("{\"ok\":")
}

#[test]
fn commit_killed_at_any_change_changes_no_byte_and_is_finished_by_another() {
    let act = |lab: &Lab, kills: &[String]| {
        mount(lab, COMMITTED);
        let pid = lab.pid();
        let strace = Strace::attach(lab, pid, kills);
        let is_done = commit_alone(lab);
        let seen = strace.end(lab, || is_done);
        end(lab, pid, &seen);
        (if is_done { Answer::Done } else { Answer::Failed }, seen)
    };
    let cut_short = Commit::new().kill_at_every_change(act, |lab| {
        lab.ok("commit m/d");
    });
    check_course(&cut_short, COURSE);
}

#[test]
fn offline_commit_killed_at_any_change_is_finished_by_another() {
    check_course(&Commit::new().kill_at_every_change(commit_offline, finish_offline), COURSE);
}

#[test]
fn resumed_commit_killed_at_any_change_is_finished_by_a_third() {
    let mut stage = Commit::new();
    stage.set();
    // A part of the overlay is in the base.
    let (_, seen) = commit_offline(&stage.lab, &[kill_at("copy_file_range", 2)]);
    assert!(seen.killed);
    stage.keep();
    let cut_short = stage.kill_at_every_change(commit_offline, finish_offline);
    check_course(&cut_short, &COURSE[1..]);
}
