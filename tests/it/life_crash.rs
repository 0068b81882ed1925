//! Daemons killed during snapshots, deletions, reverts, resets, clones and merges: on real mounts,
//! with the real program.
//!
//! Acknowledged operations are present after the next mount. An operation in progress has happened
//! or has not.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::common::mount::*;
use crate::common::state::*;
use rustix::fs::FlockOperation;
use rustix::process::Signal;

const SIZE: u64 = 2 * MIB;
const SECTOR: usize = 512;

/// A random number generator whose seed is printed: `COWSLIP_SEED=N` repeats a run, as far as
/// timing allows.
struct Dice(u64);

impl Dice {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64;
        let given = std::env::var("COWSLIP_SEED").ok();
        let seed = given.map_or(now, |seed| seed.parse().unwrap());
        eprintln!("COWSLIP_SEED={seed}");
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    /// Returns a number below `end`.
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) % end
    }
}

/// An operation on a disk.
#[derive(Clone, Debug)]
enum Deed {
    Write(u64, u64, u64),
    Truncate(u64),
    Snapshot(String),
    Delete(String),
    Revert(String),
    Reset,
    Clone(String),
}

struct World {
    lab: Lab,
    words: &'static str,
    base: Vec<u8>,
    disks: States,
    pid: u32,
    named: u64,
}

/// The disk `d` and its clones are in the store, `o` has its own overlay.
const WORDS: &str = "--store st d=base.img,overlay=st o=base.img,overlay=ov";

impl World {
    fn new() -> Self {
        let mut lab = Lab::new();
        lab.base("base.img", SIZE);
        let base = fs::read(lab.path("base.img")).unwrap();
        lab.mount(WORDS);
        let fresh = State { bytes: base.clone(), snapshots: BTreeMap::new() };
        let disks = ["d", "o"].map(|name| (name.to_owned(), fresh.clone()));
        let pid = lab.pid();
        Self { lab, words: WORDS, base, disks: disks.into(), pid, named: 0 }
    }

    /// Chooses a possible operation and its disk.
    fn choose(&mut self, dice: &mut Dice) -> (String, Deed) {
        let names: Vec<&String> = self.disks.keys().collect();
        let name = names[dice.below(names.len() as u64) as usize].clone();
        let state = &self.disks[&name];
        let held = state.snapshots.len() as u64;
        let nth = |at: u64| state.snapshots.keys().nth(at as usize).unwrap().clone();
        self.named += 1;
        let deed = match dice.below(16) {
            0..=4 => {
                let at = dice.below(SIZE);
                Deed::Write(at, 1 + dice.below(100_000), dice.below(u64::MAX))
            }
            5 => Deed::Truncate(SIZE / 2 + dice.below(SIZE)),
            6..=9 if held < 4 => Deed::Snapshot(format!("s{}", self.named)),
            6..=11 if held > 0 => Deed::Delete(nth(dice.below(held))),
            12 | 13 if held > 0 => Deed::Revert(nth(dice.below(held))),
            14 => Deed::Reset,
            15 if name != "o" && names.len() < 5 => Deed::Clone(format!("c{}", self.named)),
            _ => Deed::Write(0, 5000, dice.below(u64::MAX)),
        };
        (name, deed)
    }

    /// Performs the operation and returns whether it was acknowledged.
    fn perform(&self, disk: &str, deed: &Deed) -> bool {
        let path = self.lab.path("m").join(disk);
        let command = |words: &str| self.lab.cowslip(words).status.success();
        match deed {
            Deed::Write(at, len, seed) => {
                let file = fs::OpenOptions::new().write(true).open(path);
                file.and_then(|file| file.write_all_at(&noise(*len, *seed), *at)).is_ok()
            }
            Deed::Truncate(size) => {
                let file = fs::OpenOptions::new().write(true).open(path);
                file.and_then(|file| file.set_len(*size)).is_ok()
            }
            Deed::Snapshot(name) => command(&format!("snapshot m/{disk} {name}")),
            Deed::Delete(name) => command(&format!("snapshot m/{disk} --delete {name}")),
            Deed::Revert(name) => command(&format!("revert m/{disk} {name} --force")),
            Deed::Reset => command(&format!("reset m/{disk} --force")),
            Deed::Clone(name) => command(&format!("clone m/{disk} {name}")),
        }
    }

    /// Returns the disks as they are after the operation.
    fn after(&self, disk: &str, deed: &Deed) -> States {
        let mut disks = self.disks.clone();
        let state = disks.get_mut(disk).unwrap();
        match deed {
            Deed::Write(at, len, seed) => {
                let (at, end) = (*at as usize, (at + len) as usize);
                state.bytes.resize(state.bytes.len().max(end), 0);
                state.bytes[at..end].copy_from_slice(&noise(*len, *seed));
            }
            Deed::Truncate(size) => state.bytes.resize(*size as usize, 0),
            Deed::Snapshot(name) => {
                state.snapshots.insert(name.clone(), state.bytes.clone());
            }
            Deed::Delete(name) => {
                state.snapshots.remove(name);
            }
            Deed::Revert(name) => state.bytes = state.snapshots[name].clone(),
            Deed::Reset => state.bytes.clone_from(&self.base),
            Deed::Clone(name) => {
                let clone = State { bytes: state.bytes.clone(), snapshots: BTreeMap::new() };
                disks.insert(name.clone(), clone);
            }
        }
        disks
    }

    fn remount(&mut self) {
        wait_until("the killed daemon ends", || !is_alive(self.pid));
        self.lab.mount(self.words);
        self.pid = self.lab.pid();
    }

    /// Checks that some disk names every layer.
    fn check_layers(&self) {
        let text = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let store = || {
            let disks = fs::read_dir(self.lab.path("st/disks")).unwrap();
            disks.map(|disk| text(&disk.unwrap().path().join("stack"))).collect::<String>()
        };
        // In an overlay outside the store, merging starts right after the mount.
        let own = || text(&self.lab.path("ov/stack"));
        wait_until("no layer is left that nothing names", || {
            unnamed(&self.lab.path("st"), &store()).is_empty()
                && unnamed(&self.lab.path("ov"), &own()).is_empty()
        });
    }
}

/// Checks that `found` is `old` or `new`. After a write each sector may be either of the two. The
/// error describes the differences.
fn check_between(found: &States, old: &States, new: &States, deed: &Deed) -> Result<(), String> {
    if found == old || found == new {
        return Ok(());
    }
    if let Deed::Write(..) = deed {
        let is_fine = |name: &String| {
            let (found, old, new) = (&found[name], &old[name], &new[name]);
            let mut short = old.bytes.clone();
            short.resize(found.bytes.len().max(short.len()), 0);
            let has_size = [old, new].iter().any(|state| state.bytes.len() == found.bytes.len());
            let pieces = found.bytes.chunks(SECTOR).enumerate();
            let mut of_one = pieces.map(|(at, piece)| {
                let of =
                    |bytes: &[u8]| bytes.get(at * SECTOR..).is_some_and(|b| b.starts_with(piece));
                of(&short) || of(&new.bytes)
            });
            found.snapshots == old.snapshots && has_size && of_one.all(|is| is)
        };
        if found.len() == old.len()
            && found.keys().all(|name| old.contains_key(name) && is_fine(name))
        {
            return Ok(());
        }
    }
    Err(differences(found, old, new))
}

#[test]
fn kill_at_any_time_keeps_acknowledged_operations_and_no_partial_ones() {
    let mut dice = Dice::new();
    let mut world = World::new();
    for round in 0..24 {
        let delay = Duration::from_micros(dice.below(60_000));
        let pid = world.pid;
        let mut last = None;
        let mut told = Vec::new();
        thread::scope(|scope| {
            scope.spawn(move || {
                thread::sleep(delay);
                signal(pid, Signal::KILL).unwrap();
            });
            while last.is_none() {
                let (disk, deed) = world.choose(&mut dice);
                if world.perform(&disk, &deed) {
                    world.disks = world.after(&disk, &deed);
                    told.push((disk, deed));
                } else {
                    last = Some((disk, deed));
                }
            }
        });
        let (disk, deed) = last.unwrap();
        world.remount();
        let found = found(&world.lab);
        check_between(&found, &world.disks, &world.after(&disk, &deed), &deed).unwrap_or_else(
            |wrong| panic!("round {round}, {told:?}, then {deed:?} of {disk} cut short:\n{wrong}"),
        );
        world.check_layers();
        world.disks = found;
    }
    // Checks again without any cached state.
    world.lab.umount();
    world.lab.mount(WORDS);
    assert!(found(&world.lab) == world.disks);
    world.lab.umount();
    assert!(world.lab.ok("check ov").contains("clean"));
}

/// Number of kills per operation.
const STEPS: u32 = 40;

fn layers(lab: &Lab) -> usize {
    fs::read_dir(lab.path("ov/layers")).unwrap().count()
}

/// The threads of a killed daemon end one after another, and a child that was just forked has its
/// parent's files: a lock can outlive its owner for a moment.
#[test]
fn sealed_layer_that_a_killed_daemon_still_locks_is_awaited() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    lab.mount("d=base.img,overlay=ov");
    let file = lab.open("m/d");
    file.write_all_at(&noise(8192, 1), 4096).unwrap();
    lab.ok("snapshot m/d one");
    lab.sh("cp m/d expected");
    drop(file);
    lab.kill();
    lab.ok("umount m");
    let stack = fs::read_to_string(lab.path("ov/stack")).unwrap();
    let lowest = stack.split_once("[[layers]]\nuuid = \"").unwrap().1.split('"').next().unwrap();
    let held = fs::File::open(lab.path(&format!("ov/layers/{lowest}/data"))).unwrap();
    rustix::fs::flock(&held, FlockOperation::NonBlockingLockExclusive).unwrap();
    thread::scope(|scope| {
        let mount = scope.spawn(|| lab.mount("d=base.img,overlay=ov"));
        thread::sleep(Duration::from_millis(300));
        drop(held);
        mount.join().unwrap();
    });
    lab.sh("cmp m/d expected; cmp m/.cowslip/d/snapshots/one expected");
    lab.umount();
}

/// Sends a request to the daemon without waiting for the reply.
fn ask(lab: &Lab, request: &str) -> Option<fs::File> {
    let path = lab.path("m/.cowslip/d/ctl");
    let control = fs::OpenOptions::new().read(true).write(true).open(path).ok()?;
    control.write_all_at(request.as_bytes(), 0).ok()?;
    Some(control)
}

/// Kills the daemon at increasing delays after `request` to a disk with three snapshots, `a` to
/// `c`, of a MiB each. The disk must then equal one of the results of `legal`. The clock decides
/// which change a kill hits; `life_kill.rs` hits every change.
fn killed_later_and_later(
    request: &str,
    is_deleted: &str,
    legal: fn(&[Vec<u8>; 4]) -> Vec<&Vec<u8>>,
) {
    let lab = Lab::new();
    let words = "d=blank:4M,overlay=ov";
    let mut whole = Duration::ZERO;
    for step in 0..=STEPS {
        lab.mount(words);
        let pid = lab.pid();
        let file = lab.open("m/d");
        let mut models: [Vec<u8>; 4] = Default::default();
        for (at, model) in (0u64..).zip(&mut models) {
            let seed = u64::from(step) * 10 + at + 1;
            file.write_all_at(&noise(MIB, seed), at * 512 * KIB + 100).unwrap();
            fallocate(&file, PUNCH, at * 300 * KIB..at * 300 * KIB + 70_000).unwrap();
            if at < 3 {
                lab.ok(&format!("snapshot m/d {}", ["a", "b", "c"][at as usize]));
            }
            *model = read(&file, 0, 4 * MIB);
        }
        drop(file);
        if step == 0 {
            // Measures the duration of the complete operation, and checks its result.
            let begun = Instant::now();
            let control = ask(&lab, request).unwrap();
            assert!(control.read_at(&mut [0; 4096], 0).unwrap() > 0);
            let count = if is_deleted.is_empty() { 4 } else { 3 };
            wait_until("layers are merged", || layers(&lab) == count);
            whole = begun.elapsed().max(Duration::from_millis(5));
            signal(pid, Signal::KILL).unwrap();
        } else {
            thread::scope(|scope| {
                scope.spawn(|| {
                    // The first kills come before the operation begins, the last ones after its
                    // end.
                    thread::sleep(whole.mul_f64(f64::from(step - 1) * 1.3 / f64::from(STEPS)));
                    signal(pid, Signal::KILL).unwrap();
                });
                drop(ask(&lab, request));
            });
        }
        wait_until("the killed daemon ends", || !is_alive(pid));
        lab.mount(words);
        let found = fs::read(lab.path("m/d")).unwrap();
        assert!(legal(&models).contains(&&found), "step {step}: the disk has other bytes");
        let mut kept = 0;
        for (name, model) in ["a", "b", "c"].into_iter().zip(&models) {
            let path = lab.path("m/.cowslip/d/snapshots").join(name);
            assert!(name == is_deleted || path.exists(), "step {step}: {name} is gone");
            if path.exists() {
                kept += 1;
                assert!(fs::read(path).unwrap() == *model, "step {step}: {name} has other bytes");
            }
        }
        // A merge is resumed only after a few seconds, so a single step waits for it. Then only the
        // snapshots and the top are left.
        if step == 23 {
            wait_until("layers are merged", || layers(&lab) <= kept + 1);
            let merged = fs::read(lab.path("m/d")).unwrap();
            assert!(merged == found, "step {step}: merged to other bytes");
        }
        lab.umount();
        lab.sh("rm -r ov");
    }
}

fn as_it_is(models: &[Vec<u8>; 4]) -> Vec<&Vec<u8>> {
    vec![&models[3]]
}

#[test]
fn deletion_killed_at_any_time_changes_no_byte() {
    killed_later_and_later("{\"op\":\"unsnapshot\",\"name\":\"b\"}\n", "b", as_it_is);
}

#[test]
fn merge_into_the_top_killed_at_any_time_changes_no_byte() {
    killed_later_and_later("{\"op\":\"unsnapshot\",\"name\":\"c\"}\n", "c", as_it_is);
}

#[test]
fn revert_killed_at_any_time_has_happened_or_not() {
    killed_later_and_later("{\"op\":\"revert\",\"name\":\"a\",\"force\":true}\n", "", |models| {
        vec![&models[3], &models[0]]
    });
}
