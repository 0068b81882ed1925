//! The state of a disk after a commit into its base was interrupted at any storage operation: reads
//! return what was promised, and another commit finishes the work.

use std::cell::{Cell, RefCell};
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use crate::common::library::{read_through, write_through};
use crate::common::model::{Model, pattern};
use crate::common::sim::{Deed, Host, Role, SimFile, SimLayer};
use cowslip::extents::{Extent, ExtentKind};
use cowslip::host::os_error;
use cowslip::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};
use cowslip::overlay::record::{BootTag, LayerMap};
use cowslip::overlay::record_log::{Log, LogDir};
use cowslip::overlay::storage::Storage;
use cowslip::overlay::{CommitTarget, Overlay};
use proptest::collection::vec;
use proptest::prelude::*;

const SIZE: u64 = 40_000;
const BLOCK: u32 = 4096;

/// A base in a file of the same simulated host.
struct SimBase {
    file: Arc<SimFile>,
    size: u64,
}

impl Layer for SimBase {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        let kind = if range.start < self.size { ExtentKind::Data } else { ExtentKind::Hole };
        let end = if kind == ExtentKind::Data { range.end.min(self.size) } else { range.end };
        Ok(Extent::new(range.start..end, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let extent = self.extent_at(offset..offset + buf.len() as u64, wait)?;
        if extent.kind == ExtentKind::Data {
            self.file.read_at(&mut buf[..extent.len() as usize], offset, wait)?;
        }
        Ok(extent)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((self.extent_at(range, wait)?, None))
    }
}

impl ReadBelow for SimBase {
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        read_through(&[self], buf, offset, wait)
    }

    fn is_zero_below(&self, range: Range<u64>, _: Wait) -> io::Result<bool> {
        Ok(range.start >= self.size)
    }
}

impl WritableLayer for SimBase {
    fn write_at(&self, buf: &[u8], offset: u64, _: &dyn ReadBelow, _: Wait) -> io::Result<()> {
        assert!(offset + buf.len() as u64 <= self.size, "written past the end of the base");
        self.file.write_at(&[IoSlice::new(buf)], offset)
    }

    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.write_at(&vec![0; (range.end - range.start) as usize], range.start, below, wait)
    }

    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.zero(range, below, wait)
    }

    fn allocate(&self, _: Range<u64>, _: Wait) -> io::Result<()> {
        Err(os_error(libc::EOPNOTSUPP))
    }

    fn set_size(&self, _: u64) -> io::Result<()> {
        Err(os_error(libc::EOPNOTSUPP))
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
}

/// A disk whose base is written to.
struct Bed {
    layer: SimLayer,
    base: SimBase,
    overlay: Overlay,
    life: u64,
}

impl Bed {
    fn new() -> Self {
        let layer = SimLayer::new(BLOCK);
        let file = SimFile::new(&layer.host, Role::Base);
        file.write_at(&[IoSlice::new(&pattern(0, SIZE, 200))], 0).unwrap();
        file.sync().unwrap();
        let base = SimBase { file: Arc::new(file), size: SIZE };
        let image = LayerMap::new(SIZE, SIZE);
        let home = Arc::clone(&layer.home) as Arc<dyn LogDir>;
        let log =
            Log::create(home, layer.uuid, u64::from(BLOCK), &image, BootTag([1; 2]), 1).unwrap();
        let data = Arc::clone(&layer.data) as Arc<dyn Storage>;
        let overlay = Overlay::new(BLOCK, data, image, Some(log), BootTag([1; 2]), None);
        Self { layer, base, overlay, life: 1 }
    }

    /// Returns the disk as it is after the daemon (no `seed`) or the power was cut.
    fn after(&self, seed: Option<u64>) -> Self {
        let layer = match seed {
            None => self.layer.kill(),
            Some(seed) => self.layer.power_cut(seed),
        };
        let file = match seed {
            None => self.base.file.after_kill(&layer.host),
            Some(seed) => self.base.file.after_power_cut(&layer.host, seed.wrapping_mul(31)),
        };
        let life = self.life + u64::from(seed.is_some());
        let (overlay, _) = Overlay::open(&layer.files(), BootTag([life; 2]), None, &[]).unwrap();
        Self { layer, base: SimBase { file: Arc::new(file), size: SIZE }, overlay, life }
    }

    fn read_all(&self) -> Vec<u8> {
        let mut bytes = vec![0xEE; self.overlay.size() as usize];
        read_through(&[&self.overlay, &self.base], &mut bytes, 0, Wait::Yes).unwrap();
        bytes
    }

    fn host(&self) -> &Arc<Host> {
        &self.layer.host
    }

    fn change(&self, model: &mut Model, change: &Change) -> io::Result<()> {
        match change {
            Change::Write(range, fill) => {
                let bytes = pattern(range.start, range.end - range.start, *fill);
                let mut after = model.clone();
                after.write(range.start, &bytes);
                // If the write is interrupted, any part of it may be there.
                *model = after;
                write_through(&self.overlay, &self.base, &bytes, range.start)
            }
            Change::Zero(range) => {
                model.zero(range.clone());
                self.overlay.zero(range.clone(), &self.base, Wait::Yes)
            }
            Change::Resize(size) => {
                model.resize(*size);
                self.overlay.set_size(*size)
            }
            Change::Sync => {
                self.overlay.sync()?;
                model.synced();
                Ok(())
            }
        }
    }

    /// Commits the overlay into the base; `meanwhile` is called after each piece.
    fn commit(&self, meanwhile: &dyn Fn()) -> io::Result<()> {
        let to = CommitTarget {
            layer: &self.base,
            file: None,
            on_progress: &|_, _| meanwhile(),
            should_stop: &|| false,
        };
        self.overlay.begin_commit()?;
        let done = self
            .overlay
            .commit_truncation(&to)
            .and_then(|()| self.overlay.raise_lower_limit(self.base.size))
            .and_then(|()| self.overlay.commit_blocks(&to));
        self.overlay.pause_commit();
        done?;
        self.overlay.end_commit()
    }
}

#[derive(Clone, Debug)]
enum Change {
    Write(Range<u64>, u8),
    Zero(Range<u64>),
    Resize(u64),
    Sync,
}

/// Returns changes that give an overlay data, zeros and a truncated range.
fn before() -> Vec<Change> {
    vec![
        Change::Write(0..9000, 1),
        Change::Zero(12_288..20_480),
        Change::Resize(30_001),
        Change::Resize(SIZE),
        Change::Write(33_000..33_100, 2),
        Change::Sync,
        // Not durable when the commit begins.
        Change::Write(4000..5000, 3),
    ]
}

fn meanwhile() -> Vec<Change> {
    vec![
        Change::Write(100..600, 4),
        Change::Zero(4096..8192),
        Change::Write(20_480..24_576, 5),
        Change::Write(13_000..13_010, 6),
    ]
}

/// Performs all changes and the commit until the host's power is cut. Returns the model of the
/// possible states and the commit's result.
fn play(bed: &Bed, cut: u64, before: &[Change], meanwhile: &[Change]) -> (Model, io::Result<()>) {
    let mut model = Model::new(bed.read_all());
    bed.host().cut_at(bed.host().steps().saturating_add(cut));
    for change in before {
        if let Err(error) = bed.change(&mut model, change) {
            return (model, Err(error));
        }
    }
    let model = RefCell::new(model);
    let next = Cell::new(0);
    let done = bed.commit(&|| {
        if let Some(change) = meanwhile.get(next.get()) {
            next.set(next.get() + 1);
            // If the host is off, the commit reports the error itself.
            let _ = bed.change(&mut model.borrow_mut(), change);
        }
    });
    if done.is_ok() {
        model.borrow_mut().synced();
    }
    (model.into_inner(), done)
}

/// Checks the disk after a kill and after the power cuts `seeds`, and that another commit finishes
/// the work.
fn check_ends(bed: &Bed, model: &Model, seeds: Range<u64>, what: &str) {
    for seed in std::iter::once(None).chain(seeds.map(Some)) {
        let what = format!("{what}, seed {seed:?}");
        let found = bed.after(seed);
        let bytes = found.read_all();
        model.check_legal(&bytes).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
        // Another power cut, before anything is done.
        let again = found.after(Some(99));
        assert!(again.read_all() == bytes, "{what}: another cut changed it");
        finish(&found, &bytes, &what);
    }
}

/// Finishes an interrupted commit: the disk keeps its bytes, and the base equals the disk.
fn finish(bed: &Bed, bytes: &[u8], what: &str) {
    bed.commit(&|| {}).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(bed.read_all() == bytes, "{what}: finishing it changed the disk");
    let usage = bed.overlay.usage();
    assert_eq!((usage.data, usage.zero), (0, 0), "{what}: something is left in the overlay");
    assert!(!bed.overlay.is_committing());
    let mut base = vec![0; bytes.len()];
    bed.base.file.read_at(&mut base, 0, Wait::Yes).unwrap();
    assert!(base == bytes, "{what}: the base is not what the disk is");
    let cut = bed.after(Some(5));
    assert!(cut.read_all() == bytes, "{what}: a cut after the end changed it");
}

#[test]
fn commit_cut_at_every_storage_operation_is_finished_by_another() {
    let mut cut = 0;
    loop {
        let bed = Bed::new();
        let (model, done) = play(&bed, cut, &before(), &meanwhile());
        check_ends(&bed, &model, 0..6, &format!("cut {cut}"));
        if !bed.host().is_off() {
            done.unwrap();
            break;
        }
        cut += 1;
    }
    assert!(cut > 40, "there were only {cut} storage operations");
}

#[test]
fn failed_sync_of_the_base_keeps_everything_in_the_overlay() {
    for pass in 0..3 {
        let bed = Bed::new();
        bed.host().fail(Role::Base, Deed::Sync, pass, libc::EIO);
        let (model, done) = play(&bed, u64::MAX, &before(), &[]);
        if done.is_ok() {
            assert!(pass > 1, "a failed sync of the base went unnoticed");
            break;
        }
        model.check_same(&bed.read_all()).unwrap();
        check_ends(&bed, &model, 0..6, &format!("failed sync {pass}"));
    }
}

fn change() -> BoxedStrategy<Change> {
    let range = (0..SIZE, 1u64..9000).prop_map(|(start, len)| start..(start + len).min(SIZE));
    prop_oneof![
        4 => (range.clone(), 1u8..9).prop_map(|(range, fill)| Change::Write(range, fill)),
        2 => range.prop_map(Change::Zero),
        1 => Just(Change::Sync),
    ]
    .boxed()
}

proptest! {
    #[test]
    fn random_commit_cut_anywhere_is_finished_by_another(
        mut before in vec(change(), 0..8), shrunk in proptest::option::of(1..SIZE),
        after in vec(change(), 0..5), during in vec(change(), 0..6), cut in 0u64..90, seed: u64,
    ) {
        before.extend(shrunk.into_iter().flat_map(|to| [Change::Resize(to), Change::Resize(SIZE)]));
        before.extend(after);
        let bed = Bed::new();
        let (model, _) = play(&bed, cut, &before, &during);
        check_ends(&bed, &model, seed..seed.saturating_add(2), "cut");
    }
}
