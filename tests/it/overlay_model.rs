//! Overlays compared with a byte array: random operations in any order, with closes, kills and
//! power cuts, for every block size and for unaligned sizes.

use std::sync::Arc;
use std::{io, thread};

use crate::common::library::{SimDisk, SimDisks, TestBase, read_through};
use crate::common::model::{Menu, Model, Op, op, run};
use crate::common::sim::{Deed, Role};
use cowslip::config::OverlayKind;
use cowslip::extents::ExtentKind;
use cowslip::layer::{Layer, Wait, WritableLayer};
use cowslip::overlay::FORMAT_VERSION;
use cowslip::overlay::layer_cache::LayerCache;
use cowslip::overlay::persist::{self, NewOverlay, OpenedOverlay, OverlayPath};
use cowslip::overlay::record::LayerMap;
use cowslip::overlay::stack::{BaseRecord, LayerRecord, Stack};
use cowslip::overlay::{MAX_DISK_SIZE, Overlay};
use proptest::collection::vec;
use proptest::prelude::*;
use uuid::Uuid;

/// The properties of a pair of disks, and the operations on them.
#[derive(Clone, Debug)]
struct Case {
    block: u32,
    base: u64,
    runs: Vec<(usize, usize)>,
    sizes: [u64; 2],
    menu: Menu,
    ops: Vec<Op>,
}

/// Generates sizes around block boundaries: zero, less than a block, unaligned ones, larger and
/// smaller than the base.
fn size(block: u64) -> BoxedStrategy<u64> {
    let blocks = if block > 4096 { 4 } else { 24 };
    prop_oneof![
        1 => Just(0),
        2 => 1..block,
        3 => (1..=blocks).prop_map(move |count| count * block),
        4 => 1..=blocks * block,
    ]
    .boxed()
}

fn case(crash: bool, resize: bool) -> impl Strategy<Value = Case> {
    prop_oneof![1 => Just(512u32), 4 => Just(4096), 1 => Just(65_536)].prop_flat_map(move |block| {
        let bytes = u64::from(block);
        let most = bytes * if bytes > 4096 { 5 } else { 30 };
        let menu = Menu { block: bytes, most, resize, crash };
        let runs = vec((0usize..20, 1usize..20), 1..4);
        (size(bytes), runs, size(bytes), size(bytes), vec(op(menu), 1..40)).prop_map(
            move |(base, runs, one, two, ops)| Case {
                block,
                base,
                runs,
                sizes: [one, two],
                menu,
                ops,
            },
        )
    })
}

fn check(case: &Case, make: impl Fn(&Arc<TestBase>, u64, u32) -> SimDisk) {
    let base = Arc::new(TestBase::new(case.base, &case.runs));
    let disks = case.sizes.map(|size| make(&base, size, case.block));
    let mut models = case.sizes.map(|size| Model::new(base.shown(size)));
    let mut target = SimDisks(disks);
    run(&mut target, &mut models, case.menu, &case.ops, |target, op, models| {
        for (disk, model) in models.iter().enumerate() {
            let extents = target.extents(disk).unwrap();
            model.check_extents(&extents).unwrap_or_else(|wrong| panic!("{op:?}: {wrong}"));
        }
    });
    for disk in &target.0 {
        disk.check_shape();
        disk.overlay().sync().unwrap();
        if !case.ops.iter().any(|op| matches!(op, Op::Allocate { .. })) {
            disk.check_given_back();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 4000, ..ProptestConfig::default() })]

    #[test]
    fn persistent_overlay_behaves_like_a_byte_array(case in case(false, true)) {
        check(&case, |base, size, block| SimDisk::persistent(base, size, block, None));
    }

    #[test]
    fn temporary_overlay_behaves_like_a_byte_array(mut case in case(false, true)) {
        case.ops.retain(|op| !matches!(op, Op::Restart { .. }));
        check(&case, |base, size, block| SimDisk::temporary(base, size, block, None));
    }

    #[test]
    fn disk_of_fixed_size_behaves_like_a_byte_array(case in case(true, false)) {
        check(&case, |base, size, block| SimDisk::persistent(base, size, block, None));
    }

    #[test]
    fn kills_lose_nothing_and_power_cuts_only_unsynced_data(case in case(true, true)) {
        check(&case, |base, size, block| SimDisk::persistent(base, size, block, None));
    }
}

#[test]
fn limit_rejects_only_blocks_beyond_it() {
    let base = Arc::new(TestBase::solid(64 << 10));
    let mut disk = SimDisk::persistent(&base, 64 << 10, 4096, Some(8192));
    disk.write(&[1; 10], 0).unwrap();
    disk.write(&[2; 4096], 8192).unwrap();
    let before = disk.read_all();
    for (offset, len) in [(4096, 1), (4000, 200), (40_000, 9000)] {
        let error = disk.write(&vec![3; len], offset).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{len} bytes at {offset}");
    }
    // A failed write past the end must not grow the disk either.
    assert!(disk.write(&[3; 10], 100 << 10).is_err());
    assert!(disk.read_all() == before);
    disk.write(&[4; 4096], 0).unwrap();
    disk.zero(0..4096).unwrap();
    disk.write(&[5; 1], 60_000).unwrap();
    disk.check_shape();
    assert!(!disk.overlay().is_latched());
}

#[test]
fn shrinking_and_growing_never_shows_the_base_again() {
    let base = Arc::new(TestBase::solid(40_000));
    for block in [512, 4096, 65_536] {
        let mut disk = SimDisk::persistent(&base, 40_000, block, None);
        disk.truncate(5000).unwrap();
        disk.truncate(39_000).unwrap();
        let mut expected = base.shown(5000);
        expected.resize(39_000, 0);
        assert!(disk.read_all() == expected, "block {block}");
        // The first write past the old end must not read the base either.
        disk.write(&[9], 5001).unwrap();
        expected[5001] = 9;
        assert!(disk.read_all() == expected, "block {block}");
        disk.check_shape();
    }
}

#[test]
fn truncated_bytes_do_not_come_back() {
    let base = Arc::new(TestBase::solid(0));
    let mut disk = SimDisk::persistent(&base, 4096, 4096, None);
    disk.write(&[7; 4096], 0).unwrap();
    for size in [1000, 2000, 2500, 4096, 9000] {
        disk.truncate(size).unwrap();
    }
    let mut expected = vec![7; 1000];
    expected.resize(9000, 0);
    assert!(disk.read_all() == expected);
}

#[test]
fn zeroed_range_hides_the_base_and_is_a_hole() {
    let base = Arc::new(TestBase::solid(64 << 10));
    let mut disk = SimDisk::persistent(&base, 64 << 10, 4096, None);
    disk.zero(4096..12_288).unwrap();
    let layer = disk.overlay();
    let extent = layer.extent_at(4096..65_536, Wait::No).unwrap();
    assert_eq!((extent.range, extent.kind), (4096..12_288, ExtentKind::Hole));
    assert!(disk.read_all()[4096..12_288].iter().all(|byte| *byte == 0));
    disk.check_shape();
}

/// Sizes in bytes at which one step per block would take hours.
const HUGE: [u64; 4] = [16 << 40, 8 << 50, 7 << 60, MAX_DISK_SIZE];

#[test]
fn freeing_space_takes_steps_for_allocated_ranges_only() {
    let base = Arc::new(TestBase::solid(0));
    for size in HUGE {
        let disk = SimDisk::persistent(&base, 0, 4096, None);
        let overlay = disk.overlay();
        for change in [&|_: &Overlay| Ok(()), &zero_all as &dyn Fn(&Overlay) -> io::Result<()>] {
            overlay.set_size(size).unwrap();
            for at in [0, size / 3, size - 10] {
                overlay.write_at(&[7; 10], at, &*base, Wait::Yes).unwrap();
            }
            overlay.sync().unwrap();
            change(overlay).unwrap();
            overlay.set_size(0).unwrap();
            let before = disk.layer.host.steps();
            overlay.sync().unwrap();
            let steps = disk.layer.host.steps() - before;
            assert!(steps < 20, "{steps} steps for {size} bytes");
            assert!(!disk.layer.data.is_allocated(&(0..size)));
            assert!(!overlay.needs_maintenance());
        }
    }
}

#[test]
fn reserved_space_of_zeroed_blocks_is_given_back() {
    let base = Arc::new(TestBase::solid(64 << 10));
    for make in [SimDisk::persistent, SimDisk::temporary] {
        let disk = make(&base, 64 << 10, 4096, None);
        let overlay = disk.overlay();
        zero_all(overlay).unwrap();
        for is_synced in [true, false] {
            if is_synced {
                overlay.sync().unwrap();
            }
            overlay.allocate(0..64 << 10, Wait::Yes).unwrap();
            assert!(disk.layer.data.is_allocated(&(0..64 << 10)));
            zero_all(overlay).unwrap();
            overlay.sync().unwrap();
            assert!(!disk.layer.data.is_allocated(&(0..64 << 10)));
        }
    }
}

#[test]
fn limit_rejects_writes_beside_reserved_blocks_beyond_it() {
    let base = Arc::new(TestBase::solid(0));
    for make in [SimDisk::persistent, SimDisk::temporary] {
        let disk = make(&base, 1 << 20, 4096, Some(8 * 4096));
        let overlay = disk.overlay();
        let write = |block: u64, blocks: usize| {
            overlay.write_at(&vec![1; blocks * 4096], block * 4096, &*base, Wait::Yes)
        };
        let is_full = |done: io::Result<()>| done.unwrap_err().raw_os_error() == Some(libc::ENOSPC);
        overlay.allocate(0..5 * 4096, Wait::Yes).unwrap();
        write(100, 3).unwrap();
        assert!(is_full(write(200, 1)), "three written and five reserved");
        // Reserved blocks can be written, and are then counted once.
        write(0, 3).unwrap();
        write(100, 3).unwrap();
        assert!(is_full(write(200, 1)));
        // Space that is given back can be used elsewhere.
        overlay.zero(4 * 4096..5 * 4096, &*base, Wait::Yes).unwrap();
        write(200, 1).unwrap();
        assert!(is_full(write(201, 1)));
        // Also of blocks that are Zero.
        overlay.zero(0..1 << 20, &*base, Wait::Yes).unwrap();
        overlay.allocate(0..8 * 4096, Wait::Yes).unwrap();
        assert!(is_full(write(200, 1)));
        overlay.zero(0..1 << 20, &*base, Wait::Yes).unwrap();
        write(200, 8).unwrap();
        overlay.set_size(0).unwrap();
        overlay.set_size(1 << 20).unwrap();
        overlay.allocate(0..8 * 4096, Wait::Yes).unwrap();
        overlay.set_size(0).unwrap();
        overlay.set_size(1 << 20).unwrap();
        write(0, 8).unwrap();
        assert!(is_full(write(8, 1)));
    }
}

fn zero_all(overlay: &Overlay) -> io::Result<()> {
    overlay.zero(0..overlay.size(), &TestBase::solid(0), Wait::Yes)
}

#[test]
fn sync_next_to_a_hung_write_frees_the_rest_without_waiting() {
    let base = Arc::new(TestBase::solid(0));
    for size in HUGE {
        let disk = SimDisk::persistent(&base, 0, 4096, None);
        let (overlay, host) = (disk.overlay(), &disk.layer.host);
        overlay.set_size(size).unwrap();
        for at in [size / 3, size / 2 + (3 << 20)] {
            overlay.write_at(&[7; 4096], at / 4096 * 4096, &*base, Wait::Yes).unwrap();
        }
        zero_all(overlay).unwrap();
        host.hold(Role::Data, Deed::Write);
        thread::scope(|scope| {
            let writer = scope.spawn(|| overlay.write_at(&[8; 4096], 0, &*base, Wait::Yes));
            host.wait_held(1);
            // The range of the write is locked: space far from it is given back, and the sync does
            // not wait.
            overlay.sync().unwrap();
            assert!(!disk.layer.data.is_allocated(&(4096..size)), "of {size} bytes");
            host.release();
            writer.join().unwrap().unwrap();
        });
        overlay.sync().unwrap();
        assert!(!overlay.needs_maintenance());
        assert!(disk.layer.data.is_allocated(&(0..4096)));
    }
}

/// Offsets in bytes where errors are likely: boundaries of segments, and limits of offsets.
const ANCHORS: [u64; 7] = [0, 8 << 40, 16 << 40, 8 << 50, 1 << 62, 7 << 60, MAX_DISK_SIZE];
/// Distance in bytes before and after the anchors.
const AROUND: u64 = 40_000;

/// A change near the anchors.
#[derive(Clone, Debug)]
enum Far {
    Write(u64, u64, u8),
    Zero(u64, u64),
    Resize(u64),
    Sync,
    Reopen,
}

fn far() -> impl Strategy<Value = Far> {
    let place = || {
        (0..ANCHORS.len(), 0..=2 * AROUND).prop_map(|(anchor, by)| {
            (ANCHORS[anchor] + by).saturating_sub(AROUND).min(MAX_DISK_SIZE)
        })
    };
    prop_oneof![
        6 => (place(), 1u64..9000, 1u8..).prop_map(|(at, len, fill)| Far::Write(at, len, fill)),
        3 => (place(), place()).prop_map(|(one, other)| Far::Zero(one.min(other), one.max(other))),
        2 => place().prop_map(Far::Resize),
        1 => Just(Far::Sync),
        1 => Just(Far::Reopen),
    ]
}

/// A persistent overlay over an empty base, in files of the host.
struct FarDisk {
    dir: tempfile::TempDir,
    disk: Option<OpenedOverlay>,
}

impl FarDisk {
    fn new(block: u32) -> Self {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let stack = Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::new_v4(),
            uid: 0,
            gid: 0,
            perm: 0o600,
            kind: OverlayKind::Blocks,
            base: BaseRecord::Blank { size: 0 },
            layers: vec![LayerRecord { uuid: Uuid::new_v4(), block, parent: None }],
            snapshots: Vec::new(),
        };
        let new = NewOverlay { stack, map: &LayerMap::new(MAX_DISK_SIZE, 0), limit: None };
        let path = dir.path().join("ov");
        let disk = persist::create(OverlayPath { dir: &path, layers: None }, new).unwrap();
        Self { dir, disk: Some(disk) }
    }

    fn overlay(&self) -> &Overlay {
        &self.disk.as_ref().unwrap().overlay
    }

    fn perform(&mut self, change: &Far) {
        let overlay = self.overlay();
        let (size, base) = (overlay.size(), TestBase::solid(0));
        match *change {
            Far::Write(at, len, fill) => {
                let bytes = vec![fill; len.min(size.saturating_sub(at)) as usize];
                if !bytes.is_empty() {
                    overlay.write_at(&bytes, at, &base, Wait::Yes).unwrap();
                }
            }
            Far::Zero(start, end) => {
                overlay.zero(start.min(size)..end.min(size), &base, Wait::Yes).unwrap();
            }
            Far::Resize(size) => overlay.set_size(size).unwrap(),
            Far::Sync => overlay.sync().unwrap(),
            Far::Reopen => {
                overlay.close().unwrap();
                drop(self.disk.take());
                let path = self.dir.path().join("ov");
                let found =
                    persist::lock_overlay(OverlayPath { dir: &path, layers: None }).unwrap();
                self.disk = Some(found.open(None, &LayerCache::default()).unwrap());
            }
        }
    }
}

/// Returns the bytes of `window` after `changes`, and the disk's size.
fn shown_after(changes: &[Far], window: &std::ops::Range<u64>) -> (Vec<u8>, u64) {
    let mut bytes = vec![0; (window.end - window.start) as usize];
    let mut fill = |start: u64, end: u64, fill: u8| {
        let (start, end) = (start.max(window.start), end.min(window.end));
        if start < end {
            bytes[(start - window.start) as usize..(end - window.start) as usize].fill(fill);
        }
    };
    let mut size = MAX_DISK_SIZE;
    for change in changes {
        match *change {
            Far::Write(at, len, byte) => fill(at, (at + len).min(size), byte),
            Far::Zero(start, end) => fill(start, end.min(size), 0),
            Far::Resize(new) => {
                fill(new, u64::MAX, 0);
                size = new;
            }
            Far::Sync | Far::Reopen => {}
        }
    }
    (bytes, size)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn overlay_behaves_like_a_byte_array_up_to_the_largest_offset(
        changes in vec(far(), 1..30), block in prop_oneof![Just(512u32), Just(4096), Just(2 << 20)],
    ) {
        let mut disk = FarDisk::new(block);
        changes.iter().for_each(|change| disk.perform(change));
        disk.perform(&Far::Reopen);
        let overlay = disk.overlay();
        for anchor in ANCHORS {
            let window = anchor.saturating_sub(2 * AROUND)..(anchor + 2 * AROUND).min(MAX_DISK_SIZE);
            let (expected, size) = shown_after(&changes, &window);
            prop_assert_eq!(overlay.size(), size);
            let seen = size.clamp(window.start, window.end) - window.start;
            let mut found = vec![0xEE; seen as usize];
            if seen > 0 {
                read_through(&[overlay], &mut found, window.start, Wait::Yes).unwrap();
            }
            prop_assert!(found == expected[..seen as usize], "around {anchor}");
        }
        let (mut at, mut extents) = (0, 0);
        while at < overlay.size() {
            at = overlay.extent_at(at..overlay.size(), Wait::No).unwrap().range.end;
            extents += 1;
        }
        prop_assert!(extents <= 4 * changes.len() + 2, "{extents} extents");
        overlay.sync().unwrap();
        prop_assert!(!overlay.needs_maintenance());
    }
}
