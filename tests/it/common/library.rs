//! Overlays over bases in memory, as a [`Target`]: the library without files and without FUSE.

// Disks are small and live in memory, and a test may panic.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::expect_used)]

use std::io;
use std::ops::Range;
use std::sync::Arc;

use cowslip::extents::{Extent, ExtentKind};
use cowslip::host::os_error;
use cowslip::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};
use cowslip::overlay::Overlay;
use cowslip::overlay::error::LogError;
use cowslip::overlay::record::{BootTag, LayerMap, MtimeOrigin};
use cowslip::overlay::record_log::{Log, LogDir};
use cowslip::overlay::recover::Recovered;
use cowslip::overlay::state::{BlockIndex, BlockState};
use cowslip::overlay::storage::Storage;

use super::model::{End, Model, Target};
use super::sim::{SECTOR, SimLayer};

/// A base in memory, with holes in units of a sector.
#[derive(Debug)]
pub(crate) struct TestBase {
    bytes: Vec<u8>,
    is_data: Vec<bool>,
}

impl TestBase {
    /// Creates a base of `size` bytes that repeats `runs`; each run is a number of data sectors and
    /// a number of hole sectors.
    #[must_use]
    pub(crate) fn new(size: u64, runs: &[(usize, usize)]) -> Self {
        let sectors = size.div_ceil(SECTOR) as usize;
        let kinds = runs.iter().cycle().flat_map(|(data, hole)| {
            std::iter::repeat_n(true, *data).chain(std::iter::repeat_n(false, *hole))
        });
        let is_data: Vec<bool> = kinds.take(sectors).collect();
        let byte = |at: u64| match is_data[(at / SECTOR) as usize] {
            // Data is never zero, so that a lost byte is noticed.
            true => (at / SECTOR % 127) as u8 * 2 + 1,
            false => 0,
        };
        Self { bytes: (0..size).map(byte).collect(), is_data }
    }

    /// Creates a base without holes.
    #[must_use]
    pub(crate) fn solid(size: u64) -> Self {
        Self::new(size, &[(1, 0)])
    }

    /// Returns the bytes of a disk of `size` bytes over this base, before any write.
    #[must_use]
    pub(crate) fn shown(&self, size: u64) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        bytes.resize(size as usize, 0);
        bytes
    }
}

impl Layer for TestBase {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        if range.start >= self.size() {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let first = (range.start / SECTOR) as usize;
        let same =
            self.is_data[first..].iter().take_while(|is| **is == self.is_data[first]).count();
        let end = ((first + same) as u64 * SECTOR).min(self.size()).min(range.end);
        let kind = if self.is_data[first] { ExtentKind::Data } else { ExtentKind::Hole };
        Ok(Extent::new(range.start..end, kind))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let extent = self.extent_at(offset..offset + buf.len() as u64, wait)?;
        if extent.kind == ExtentKind::Data {
            let from = &self.bytes[extent.range.start as usize..extent.range.end as usize];
            buf[..from.len()].copy_from_slice(from);
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

impl ReadBelow for TestBase {
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        read_through(&[self], buf, offset, wait)
    }

    fn is_zero_below(&self, range: Range<u64>, wait: Wait) -> io::Result<bool> {
        let mut at = range.start;
        while at < range.end {
            let extent = self.extent_at(at..range.end, wait)?;
            if extent.kind == ExtentKind::Data {
                return Ok(false);
            }
            at = extent.range.end;
        }
        Ok(true)
    }
}

/// Reads through `layers`, ordered from top to bottom.
pub(crate) fn read_through(
    layers: &[&dyn Layer],
    buf: &mut [u8],
    offset: u64,
    wait: Wait,
) -> io::Result<()> {
    let Some((layer, below)) = layers.split_first() else {
        buf.fill(0);
        return Ok(());
    };
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let extent = layer.read_at(&mut buf[done..], at, wait)?;
        assert!(extent.range.start == at && !extent.is_empty(), "{extent:?} at {at}");
        let len = extent.len() as usize;
        let piece = &mut buf[done..done + len];
        match extent.kind {
            ExtentKind::Data => {}
            ExtentKind::Zero | ExtentKind::Hole => piece.fill(0),
            ExtentKind::Lower => read_through(below, piece, at, wait)?,
        }
        done += len;
    }
    Ok(())
}

/// Writes to `overlay`, and grows the disk first where necessary, as a real disk does.
pub(crate) fn write_through(
    overlay: &Overlay,
    base: &dyn ReadBelow,
    buf: &[u8],
    offset: u64,
) -> io::Result<()> {
    let (old, end) = (overlay.size(), offset + buf.len() as u64);
    if end > old {
        overlay.set_size(end)?;
    }
    let written = overlay.write_at(buf, offset, base, Wait::Yes);
    if written.is_err() && end > old {
        overlay.set_size(old)?;
    }
    written
}

/// The expected state of every block, derived from the rules alone.
#[derive(Clone, Debug)]
pub(crate) struct Shape {
    block: u64,
    size: u64,
    lower_limit: u64,
    states: Vec<BlockState>,
}

impl Shape {
    fn new(block: u64, size: u64, lower_limit: u64) -> Self {
        let states = vec![BlockState::Lower; size.div_ceil(block) as usize];
        Self { block, size, lower_limit, states }
    }

    /// Starts from the present states of `overlay`.
    fn of(overlay: &Overlay) -> Self {
        let (image, block) = (overlay.clone_map(), overlay.block_size());
        let mut shape = Self::new(block, image.size, image.lower_limit);
        for (at, state) in shape.states.iter_mut().enumerate() {
            *state = image.blocks.state(BlockIndex(at as u64));
        }
        shape
    }

    fn resize(&mut self, size: u64) {
        let kept = self.size.min(size).div_ceil(self.block) as usize;
        self.states.truncate(kept);
        self.states.resize(size.div_ceil(self.block) as usize, BlockState::Lower);
        self.lower_limit = self.lower_limit.min(size);
        self.size = size;
    }

    fn write(&mut self, range: &Range<u64>) {
        if range.end > self.size {
            self.resize(range.end);
        }
        for at in range.start / self.block..range.end.div_ceil(self.block) {
            self.states[at as usize] = BlockState::Data;
        }
    }

    fn zero(&mut self, range: &Range<u64>, base: &TestBase) {
        for at in range.start / self.block..range.end.div_ceil(self.block) {
            let whole = at * self.block..((at + 1) * self.block).min(self.size);
            let part = range.start.max(whole.start)..range.end.min(whole.end);
            let state = &mut self.states[at as usize];
            if part == whole {
                *state = BlockState::Zero;
            } else if *state == BlockState::Lower {
                let lower = part.start..part.end.min(self.lower_limit);
                if !lower.is_empty() && !base.is_zero_below(lower, Wait::Yes).unwrap() {
                    *state = BlockState::Data;
                }
            }
        }
    }

    /// Returns the extents that an overlay must report, with equal neighbours joined.
    fn extents(&self) -> Vec<Extent> {
        let mut all: Vec<Extent> = Vec::new();
        let mut push = |range: Range<u64>, kind| match all.last_mut() {
            _ if range.is_empty() => {}
            Some(last) if last.kind == kind => last.range.end = range.end,
            _ => all.push(Extent::new(range, kind)),
        };
        for (at, state) in self.states.iter().enumerate() {
            let range = at as u64 * self.block..((at as u64 + 1) * self.block).min(self.size);
            match state {
                BlockState::Data => push(range, ExtentKind::Data),
                BlockState::Zero => push(range, ExtentKind::Hole),
                BlockState::Lower => {
                    let cut = self.lower_limit.clamp(range.start, range.end);
                    push(range.start..cut, ExtentKind::Lower);
                    push(cut..range.end, ExtentKind::Hole);
                }
            }
        }
        all
    }
}

/// One overlay over one base, on files in memory.
pub(crate) struct SimDisk {
    pub layer: SimLayer,
    pub base: Arc<TestBase>,
    /// Is `None` only during a restart.
    overlay: Option<Overlay>,
    /// Number of the host's boot, used as its boot tag.
    life: u64,
    limit: Option<u64>,
    shape: Shape,
}

impl SimDisk {
    /// Creates a disk with a new persistent overlay of `size` bytes.
    #[must_use]
    pub(crate) fn persistent(
        base: &Arc<TestBase>,
        size: u64,
        block: u32,
        limit: Option<u64>,
    ) -> Self {
        let layer = SimLayer::new(block);
        let image = LayerMap::new(size, size.min(base.size()));
        let home = Arc::clone(&layer.home) as Arc<dyn LogDir>;
        let log =
            Log::create(home, layer.uuid, u64::from(block), &image, BootTag([1; 2]), 1).unwrap();
        Self::of(layer, base, image, Some(log), limit)
    }

    /// Creates a disk with a new temporary overlay of `size` bytes.
    #[must_use]
    pub(crate) fn temporary(
        base: &Arc<TestBase>,
        size: u64,
        block: u32,
        limit: Option<u64>,
    ) -> Self {
        let image = LayerMap::new(size, size.min(base.size()));
        Self::of(SimLayer::new(block), base, image, None, limit)
    }

    fn of(
        layer: SimLayer,
        base: &Arc<TestBase>,
        image: LayerMap,
        log: Option<Log>,
        limit: Option<u64>,
    ) -> Self {
        let data = Arc::clone(&layer.data) as Arc<dyn Storage>;
        let overlay = Overlay::new(layer.block, data, image, log, BootTag([1; 2]), limit);
        let shape = Shape::of(&overlay);
        Self { layer, base: Arc::clone(base), overlay: Some(overlay), life: 1, limit, shape }
    }

    /// Makes small syncs until the overlay writes them to its journal.
    pub(crate) fn accustom(&mut self) {
        // The journal begins after nine small syncs; one more comes first, for the space that a
        // recovery has freed.
        for turn in 0..10 {
            if !self.layer.home.has_journal() {
                self.overlay().record_mtime(turn, MtimeOrigin::Written).unwrap();
                self.overlay().sync().unwrap();
            }
        }
        assert!(self.layer.home.has_journal());
    }

    #[must_use]
    pub(crate) fn overlay(&self) -> &Overlay {
        self.overlay.as_ref().unwrap()
    }

    /// Returns a model of the disk's present content, all durable.
    #[must_use]
    pub(crate) fn model(&self) -> Model {
        Model::new(self.read_all())
    }

    #[must_use]
    pub(crate) fn read_all(&self) -> Vec<u8> {
        let mut bytes = vec![0xEE; self.overlay().size() as usize];
        read_through(&[self.overlay(), &*self.base], &mut bytes, 0, Wait::Yes).unwrap();
        bytes
    }

    /// Opens the overlay in `layer`, with `life` as the number of the host's boot.
    ///
    /// # Errors
    /// Those of [`Overlay::open`].
    pub(crate) fn open(
        layer: SimLayer,
        base: &Arc<TestBase>,
        life: u64,
        limit: Option<u64>,
    ) -> Result<(Self, Recovered), LogError> {
        let (overlay, recovered) = Overlay::open(&layer.files(), BootTag([life; 2]), limit, &[])?;
        let shape = Shape::of(&overlay);
        let base = Arc::clone(base);
        Ok((Self { layer, base, overlay: Some(overlay), life, limit, shape }, recovered))
    }

    /// Opens a copy of the disk as a daemon killed now would leave it.
    ///
    /// # Errors
    /// Those of [`Overlay::open`].
    pub(crate) fn after_kill(&self) -> Result<(Self, Recovered), LogError> {
        Self::open(self.layer.kill(), &self.base, self.life, self.limit)
    }

    /// Opens a copy of the disk as a power cut now may leave it, chosen by `seed`.
    ///
    /// # Errors
    /// Those of [`Overlay::open`].
    pub(crate) fn after_power_cut(&self, seed: u64) -> Result<(Self, Recovered), LogError> {
        Self::open(self.layer.power_cut(seed), &self.base, self.life + 1, self.limit)
    }

    /// Checks that the overlay's extents equal the expected ones, block by block.
    pub(crate) fn check_shape(&self) {
        let overlay = self.overlay();
        let mut found: Vec<Extent> = Vec::new();
        let size = overlay.size();
        let mut at = 0;
        while at < size {
            let extent = overlay.extent_at(at..size, Wait::No).unwrap();
            assert!(extent.range.start == at && !extent.is_empty(), "{extent:?} at {at}");
            at = extent.range.end;
            match found.last_mut() {
                Some(last) if last.kind == extent.kind => last.range.end = extent.range.end,
                _ => found.push(extent),
            }
        }
        assert_eq!(found, self.shape.extents());
        let data =
            self.shape.states.iter().filter(|state| **state == BlockState::Data).count() as u64;
        assert_eq!(overlay.usage().data, data * overlay.block_size());
    }

    /// Checks that only Data blocks take space, once all freed space was given back.
    pub(crate) fn check_given_back(&self) {
        let block = self.shape.block;
        for (at, state) in self.shape.states.iter().enumerate() {
            let range = at as u64 * block..(at as u64 + 1) * block;
            let holds = self.layer.data.is_allocated(&range);
            assert!(
                *state == BlockState::Data || !holds,
                "block {at} is {state:?} and takes space"
            );
        }
    }

    /// Checks that every Data block of `found`, a state of this disk after a power cut, still has
    /// its space here: a freed block is punched only after the record that freed it is durable.
    pub(crate) fn check_not_punched(&self, found: &Self) {
        let block = self.shape.block;
        for (at, state) in found.shape.states.iter().enumerate() {
            let range = at as u64 * block..(at as u64 + 1) * block;
            let holds = self.layer.data.is_allocated(&range);
            assert!(*state != BlockState::Data || holds, "block {at} is punched, and durable Data");
        }
    }

    pub(crate) fn write(&mut self, buf: &[u8], offset: u64) -> io::Result<()> {
        write_through(self.overlay(), &*self.base, buf, offset)?;
        self.shape.write(&(offset..offset + buf.len() as u64));
        Ok(())
    }

    pub(crate) fn zero(&mut self, range: Range<u64>) -> io::Result<()> {
        self.overlay().zero(range.clone(), &*self.base, Wait::Yes)?;
        self.shape.zero(&range, &self.base);
        Ok(())
    }

    pub(crate) fn truncate(&mut self, size: u64) -> io::Result<()> {
        self.overlay().set_size(size)?;
        self.shape.resize(size);
        Ok(())
    }

    fn restart(&mut self, end: End) -> io::Result<()> {
        let overlay = self.overlay.take().ok_or_else(|| os_error(libc::EIO))?;
        let (layer, life, expected) = match end {
            End::Clean => {
                overlay.close()?;
                (self.layer.clone(), self.life, Some(Recovered::Clean))
            }
            End::Kill => (self.layer.clone(), self.life, Some(Recovered::All)),
            End::PowerCut(seed) => (self.layer.power_cut(seed), self.life + 1, None),
        };
        drop(overlay);
        let (disk, recovered) =
            Self::open(layer, &self.base, life, self.limit).map_err(io::Error::other)?;
        assert!(expected.is_none_or(|expected| expected == recovered), "{end:?}: {recovered:?}");
        let shape = self.shape.clone();
        *self = disk;
        if !matches!(end, End::PowerCut(_)) {
            // The expected states stay, since nothing may have changed.
            self.shape = shape;
        }
        Ok(())
    }
}

/// Two disks as a [`Target`].
pub(crate) struct SimDisks(pub [SimDisk; 2]);

impl Target for SimDisks {
    fn size(&mut self, disk: usize) -> io::Result<u64> {
        Ok(self.0[disk].overlay().size())
    }

    fn read_at(&mut self, disk: usize, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let disk = &self.0[disk];
        read_through(&[disk.overlay(), &*disk.base], buf, offset, Wait::Yes)
    }

    fn write_at(&mut self, disk: usize, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0[disk].write(buf, offset)
    }

    fn zero(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].zero(range)
    }

    fn punch(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].zero(range)
    }

    fn truncate(&mut self, disk: usize, size: u64) -> io::Result<()> {
        self.0[disk].truncate(size)
    }

    fn allocate(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        self.0[disk].overlay().allocate(range, Wait::Yes)
    }

    fn copy(&mut self, from: (usize, Range<u64>), to: (usize, u64)) -> io::Result<()> {
        let mut buf = vec![0; (from.1.end - from.1.start) as usize];
        self.read_at(from.0, &mut buf, from.1.start)?;
        self.write_at(to.0, &buf, to.1)
    }

    fn sync(&mut self, disk: usize) -> io::Result<()> {
        self.0[disk].overlay().sync()
    }

    fn extents(&mut self, disk: usize) -> io::Result<Vec<Extent>> {
        let disk = &self.0[disk];
        let mut all: Vec<Extent> = Vec::new();
        let mut at = 0;
        while at < disk.overlay().size() {
            let mut extent = disk.overlay().extent_at(at..disk.overlay().size(), Wait::No)?;
            if extent.kind == ExtentKind::Lower {
                extent = disk.base.extent_at(extent.range, Wait::No)?;
            }
            at = extent.range.end;
            all.push(extent);
        }
        Ok(all)
    }

    fn restart(&mut self, end: End) -> io::Result<()> {
        self.0.iter_mut().try_for_each(|disk| disk.restart(end))
    }
}
