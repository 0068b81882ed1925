//! The history of an overlay compared with byte arrays: snapshots, reverts, resets, deletions,
//! merges, keep and reopening, mixed with all other operations; the library alone, over real files.
//!
//! After every step the disk and the files of all its snapshots are compared with the model.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::common::model::{End, Menu, Model, Op, Target, apply, op, perform, read_all};
use crate::common::mount::noise;
use cowslip::config::{DiskSource, DiskSpec};
use cowslip::disk::{
    Disk, FallocateMode, Force, OpenContext, OperationError, SizeChange, SizeMode, Whence, open,
};
use cowslip::extents::{Extent, ExtentKind};
use cowslip::host::os_error;
use cowslip::layer::Wait;
use cowslip::overlay::persist::OverlayPath;
use cowslip::overlay::recover::Recovered;
use cowslip::stream::context::StdioMode;
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Longer than any close takes.
const WAIT_TIMEOUT: Duration = Duration::from_secs(60);

/// A step on one of two disks, which is the first field.
#[derive(Clone, Debug)]
enum Step {
    /// An operation that every disk has.
    Do(Op),
    /// Takes a snapshot named after the number.
    Snapshot(usize, u8),
    /// Deletes the snapshot at this index, modulo their number.
    Delete(usize, usize),
    /// Reverts to the snapshot at this index, modulo their number.
    Revert(usize, usize),
    /// Resets to the base.
    Reset(usize),
    /// Merges all layers that can be merged.
    Tidy(usize),
    /// Merges in a background thread, while further steps run.
    TidyBehind(usize),
    /// Makes a temporary overlay persistent.
    Keep(usize),
}

/// A disk that is reopened repeatedly, with the expected snapshots.
struct Held {
    spec: DiskSpec,
    disk: Option<Arc<Disk>>,
    /// The bytes that a reset restores.
    fresh: Vec<u8>,
    snapshots: BTreeMap<String, Vec<u8>>,
    behind: Vec<JoinHandle<Result<(), OperationError>>>,
}

fn setting(mountpoint: &Path) -> OpenContext<'_> {
    OpenContext {
        mountpoint,
        mount_dev: None,
        uid: 0,
        gid: 0,
        force: false,
        allow_backing: Vec::new(),
        stdio: StdioMode::Unavailable,
        probed_dirs: parking_lot::Mutex::default(),
    }
}

fn open_disk(spec: &DiskSpec) -> (Arc<Disk>, Recovered) {
    let opened = open(spec, &setting(Path::new("/nowhere"))).unwrap();
    let recovered = opened.disk.recovered();
    (Arc::new(opened.disk), recovered)
}

impl Held {
    fn new(spec: DiskSpec, shown: Vec<u8>) -> Self {
        let disk = Some(open_disk(&spec).0);
        Self { spec, disk, fresh: shown, snapshots: BTreeMap::new(), behind: Vec::new() }
    }

    fn disk(&self) -> &Arc<Disk> {
        self.disk.as_ref().unwrap()
    }

    fn wait_for_work_behind(&mut self) {
        for work in self.behind.drain(..) {
            work.join().unwrap().unwrap();
        }
    }

    fn restart(&mut self, end: End) {
        if self.spec.overlay.is_none() {
            return;
        }
        self.wait_for_work_behind();
        let disk = self.disk.take().unwrap();
        let expected = match end {
            End::Clean => {
                disk.close(WAIT_TIMEOUT).unwrap();
                Recovered::Clean
            }
            End::Kill | End::PowerCut(_) => Recovered::All,
        };
        drop(Arc::into_inner(disk).expect("somebody still holds the disk"));
        let (disk, recovered) = open_disk(&self.spec);
        assert_eq!(recovered, expected);
        self.disk = Some(disk);
    }

    /// Checks the snapshots: names, sizes, bytes, holes, and that they are read-only. The disk's
    /// own bytes are compared by the caller.
    fn check_snapshots(&self) {
        let disk = self.disk();
        let names: HashSet<String> = disk.snapshot_names().into_iter().collect();
        assert_eq!(names, self.snapshots.keys().cloned().collect());
        for (name, bytes) in &self.snapshots {
            let file = disk.snapshot_file(name).unwrap();
            let found = bytes_of(&file);
            let model = Model::new(bytes.clone());
            model.check_same(&found).unwrap_or_else(|wrong| panic!("snapshot {name}: {wrong}"));
            model.check_extents(&extents_of(&file)).unwrap();
            assert!(file.write(b"x", 0, Wait::Yes).is_err());
        }
        let sizes = disk.snapshots().unwrap().into_iter().map(|found| (found.name, found.size));
        let expected =
            self.snapshots.iter().map(|(name, bytes)| (name.clone(), bytes.len() as u64));
        assert_eq!(sizes.collect::<BTreeMap<_, _>>(), expected.collect());
    }

    /// Checks that nothing is left to merge and that every layer is named by the stack.
    fn check_tidied(&self) {
        assert!(!self.disk().needs_merge());
        // Besides the top and the snapshots there are only layers where two of these branch.
        assert!(self.disk().layer_usages().len() <= 2 * self.snapshots.len() + 1);
        let Some(dir) = &self.spec.overlay else { return };
        let stack = fs::read_to_string(dir.join("stack")).unwrap();
        let mut count = 0;
        for entry in fs::read_dir(dir.join("layers")).unwrap() {
            let name = entry.unwrap().file_name().into_string().unwrap();
            assert!(stack.contains(&name), "layer {name} is left behind");
            count += 1;
        }
        assert!(count <= 2 * self.snapshots.len() + 1, "{count} layers");
    }
}

fn bytes_of(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0xEE; disk.size() as usize];
    assert_eq!(disk.read(&mut bytes, 0, Wait::Yes).unwrap(), bytes.len());
    bytes
}

fn extents_of(disk: &Disk) -> Vec<Extent> {
    let (mut all, mut at, size) = (Vec::new(), 0, disk.size());
    while at < size {
        let data = match disk.seek(at, Whence::Data, Wait::Yes) {
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => size,
            data => data.unwrap(),
        };
        if at < data {
            all.push(Extent::new(at..data, ExtentKind::Hole));
        }
        if data < size {
            let hole = disk.seek(data, Whence::Hole, Wait::Yes).unwrap();
            all.push(Extent::new(data..hole, ExtentKind::Data));
            at = hole;
        } else {
            at = size;
        }
    }
    all
}

/// Two disks as a [`Target`].
struct Pair([Held; 2]);

impl Target for Pair {
    fn size(&mut self, disk: usize) -> io::Result<u64> {
        Ok(self.0[disk].disk().size())
    }

    fn read_at(&mut self, disk: usize, buf: &mut [u8], offset: u64) -> io::Result<()> {
        assert_eq!(self.0[disk].disk().read(buf, offset, Wait::Yes)?, buf.len());
        Ok(())
    }

    fn write_at(&mut self, disk: usize, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0[disk].disk().write(buf, offset, Wait::Yes)
    }

    fn zero(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].disk().fallocate(range, FallocateMode::Zero, SizeMode::Keep, Wait::Yes)
    }

    fn punch(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].disk().fallocate(range, FallocateMode::Punch, SizeMode::Keep, Wait::Yes)
    }

    fn truncate(&mut self, disk: usize, size: u64) -> io::Result<()> {
        self.0[disk].disk().set_size(size, Wait::Yes)
    }

    fn allocate(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].disk().fallocate(range, FallocateMode::Allocate, SizeMode::Keep, Wait::Yes)
    }

    fn copy(&mut self, from: (usize, Range<u64>), to: (usize, u64)) -> io::Result<()> {
        let (source, target) = (self.0[from.0].disk(), self.0[to.0].disk());
        let (mut range, mut offset) = (from.1, to.1);
        while !range.is_empty() {
            let copied = target.copy_from(source, range.clone(), offset)?;
            if copied == 0 {
                return Err(os_error(libc::EIO));
            }
            range.start += copied;
            offset += copied;
        }
        Ok(())
    }

    fn sync(&mut self, disk: usize) -> io::Result<()> {
        self.0[disk].disk().sync()
    }

    fn extents(&mut self, disk: usize) -> io::Result<Vec<Extent>> {
        Ok(extents_of(self.0[disk].disk()))
    }

    fn restart(&mut self, end: End) -> io::Result<()> {
        self.0.iter_mut().for_each(|held| held.restart(end));
        Ok(())
    }
}

impl Pair {
    fn nth(&self, disk: usize, rank: usize) -> Option<String> {
        let names: Vec<&String> = self.0[disk].snapshots.keys().collect();
        names.get(rank.checked_rem(names.len())?).map(|name| (*name).clone())
    }

    /// Applies a step other than [`Step::Do`] to the disk and to the model.
    fn live(&mut self, step: &Step, models: &mut [Model; 2], room: &Path) {
        match *step {
            Step::Do(_) => unreachable!("done by the caller"),
            Step::Snapshot(at, number) => {
                let (held, name) = (&mut self.0[at], format!("s{number}"));
                match held.disk().snapshot(Some(&name)) {
                    Err(OperationError::SnapshotExists(_)) => {
                        assert!(held.snapshots.contains_key(&name));
                    }
                    taken => {
                        assert_eq!(taken.unwrap(), name);
                        let old = held.snapshots.insert(name, models[at].bytes.clone());
                        assert!(old.is_none());
                    }
                }
            }
            Step::Delete(at, rank) => match self.nth(at, rank) {
                None => {
                    let refused = self.0[at].disk().delete_snapshot("s1").unwrap_err();
                    assert!(matches!(refused, OperationError::NoSnapshot(_)), "{refused}");
                }
                Some(name) => {
                    self.0[at].disk().delete_snapshot(&name).unwrap();
                    self.0[at].snapshots.remove(&name);
                }
            },
            Step::Revert(at, rank) => {
                if let Some(name) = self.nth(at, rank) {
                    self.0[at].disk().revert(&name, Force::No, SizeChange::Seen).unwrap();
                    models[at] = Model::new(self.0[at].snapshots[&name].clone());
                }
            }
            Step::Reset(at) => {
                self.0[at].disk().reset(Force::No, SizeChange::Seen).unwrap();
                models[at] = Model::new(self.0[at].fresh.clone());
            }
            Step::Tidy(at) => {
                self.0[at].wait_for_work_behind();
                self.0[at].disk().merge_layers().unwrap();
                self.0[at].check_tidied();
            }
            Step::TidyBehind(at) => {
                let disk = Arc::clone(self.0[at].disk());
                self.0[at].behind.push(std::thread::spawn(move || disk.merge_layers()));
            }
            Step::Keep(at) => {
                let dir = room.join(format!("kept{at}"));
                let kept = self.0[at].disk().keep(OverlayPath { dir: &dir, layers: None });
                if self.0[at].spec.overlay.is_some() {
                    assert!(kept.is_err());
                } else {
                    kept.unwrap();
                    self.0[at].spec.overlay = Some(dir);
                    // From now on the overlay records the disk's size.
                    let size = self.0[at].spec.size.take();
                    assert!(size.is_none_or(|size| size == self.0[at].fresh.len() as u64));
                }
            }
        }
    }
}

/// The properties of the two disks, and the steps.
#[derive(Clone, Debug)]
struct Case {
    block: u32,
    base: u64,
    blank: u64,
    persistent: [bool; 2],
    menu: Menu,
    steps: Vec<Step>,
}

fn step(menu: Menu) -> BoxedStrategy<Step> {
    let (disk, rank) = (|| 0usize..2, || 0usize..8);
    prop_oneof![
        16 => op(menu).prop_map(Step::Do),
        5 => (disk(), 0u8..9).prop_map(|(disk, name)| Step::Snapshot(disk, name)),
        3 => (disk(), rank()).prop_map(|(disk, rank)| Step::Delete(disk, rank)),
        2 => (disk(), rank()).prop_map(|(disk, rank)| Step::Revert(disk, rank)),
        1 => disk().prop_map(Step::Reset),
        2 => disk().prop_map(Step::Tidy),
        2 => disk().prop_map(Step::TidyBehind),
        1 => disk().prop_map(Step::Keep),
    ]
    .boxed()
}

fn case() -> impl Strategy<Value = Case> {
    let block = prop_oneof![Just(512u32), Just(4096)];
    (block, any::<[bool; 2]>()).prop_flat_map(|(block, persistent)| {
        let bytes = u64::from(block);
        let menu = Menu { block: bytes, most: 30 * bytes, resize: true, crash: true };
        (1..=24 * bytes, 1..=24 * bytes, vec(step(menu), 1..60)).prop_map(
            move |(base, blank, steps)| Case { block, base, blank, persistent, menu, steps },
        )
    })
}

/// Creates a base with data, a hole, and data again.
fn make_base(path: &PathBuf, size: u64) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let file = fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut bytes = vec![0; size as usize];
    for start in [0, size / 2] {
        let len = size / 5;
        let data = noise(len, start + 1);
        file.write_all_at(&data, start).unwrap();
        bytes[start as usize..(start + len) as usize].copy_from_slice(&data);
    }
    bytes
}

fn check(case: &Case) {
    // On tmpfs: thousands of replacements of a `stack` would each wait for a device.
    let room = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = room.path().join("base.img");
    let shown = [make_base(&path, case.base), vec![0; case.blank as usize]];
    let mut models = shown.clone().map(Model::new);
    let sources = [DiskSource::File(path), DiskSource::Blank(case.blank)];
    let mut number = 0;
    let held = sources.map(|source| {
        let mut spec = DiskSpec::new(format!("d{number}"), source);
        spec.block = Some(case.block);
        if case.persistent[number] {
            spec.overlay = Some(room.path().join(format!("overlay{number}")));
        }
        number += 1;
        Held::new(spec, shown[number - 1].clone())
    });
    let mut pair = Pair(held);
    for (count, step) in case.steps.iter().enumerate() {
        if let Step::Do(op) = step {
            let op = match op.fit(&models, case.menu) {
                Op::Restart { end: End::PowerCut(_) } => Op::Restart { end: End::Kill },
                op => op,
            };
            perform(&mut pair, &op, &models)
                .unwrap_or_else(|error| panic!("step {count}, {op:?}: {error}"));
            apply(&mut models, &op);
        } else {
            pair.live(step, &mut models, room.path());
        }
        for (disk, model) in models.iter().enumerate() {
            let found = read_all(&mut pair, disk);
            let wrong = |wrong| panic!("step {count}, {step:?}, disk {disk}: {wrong}");
            model.check_same(&found).unwrap_or_else(wrong);
            model.check_extents(&pair.extents(disk).unwrap()).unwrap_or_else(wrong);
            pair.0[disk].check_snapshots();
        }
    }
    for held in &mut pair.0 {
        held.wait_for_work_behind();
        held.disk().merge_layers().unwrap();
        held.check_tidied();
        held.disk().close(WAIT_TIMEOUT).unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        max_shrink_iters: 2000,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    })]

    #[test]
    fn disk_and_snapshots_behave_like_byte_arrays(case in case()) {
        check(&case);
    }
}

/// Returns a persistent disk of 64 KiB with blocks of 4 KiB and a limit of four blocks.
fn limited(room: &Path) -> DiskSpec {
    let mut spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(64 << 10));
    spec.overlay = Some(room.join("overlay"));
    spec.limit = Some(16 << 10);
    spec
}

fn is_full(result: io::Result<()>) -> bool {
    result.is_err_and(|error| error.raw_os_error() == Some(libc::ENOSPC))
}

#[test]
fn limit_includes_all_layers() {
    let room = tempfile::tempdir().unwrap();
    let disk = open_disk(&limited(room.path())).0;
    disk.write(&[1; 8192], 0, Wait::Yes).unwrap();
    disk.snapshot(Some("a")).unwrap();
    disk.write(&[2; 8192], 0, Wait::Yes).unwrap();
    assert!(is_full(disk.write(&[3; 4096], 16_384, Wait::Yes)));
    disk.close(WAIT_TIMEOUT).unwrap();
}

#[test]
fn limit_holds_after_a_merge() {
    let room = tempfile::tempdir().unwrap();
    let disk = open_disk(&limited(room.path())).0;
    disk.write(&[1; 4096], 0, Wait::Yes).unwrap();
    disk.snapshot(Some("a")).unwrap();
    disk.write(&[2; 4096], 4096, Wait::Yes).unwrap();
    disk.delete_snapshot("a").unwrap();
    disk.merge_layers().unwrap();
    assert_eq!(disk.layer_usages().len(), 1);
    disk.write(&[3; 8192], 8192, Wait::Yes).unwrap();
    assert!(is_full(disk.write(&[4; 4096], 32_768, Wait::Yes)));
    disk.close(WAIT_TIMEOUT).unwrap();
}
