//! The operations and the reference model of a disk, shared by the tests of the library and of real
//! mounts.
//!
//! The model of a disk is a `Vec<u8>`. For every 512-byte sector the model also records all values
//! since the last sync: after a power cut each sector holds one of these values, independently of
//! the others, and the size is one of the sizes since then.

// Disks are small and live in memory, and a test may panic.
#![allow(clippy::cast_possible_truncation, clippy::unwrap_used, clippy::expect_used)]

use std::io;
use std::ops::Range;

use cowslip::extents::{Extent, ExtentKind};
use proptest::prelude::*;

use super::sim::SECTOR;

const LEN: usize = 512;

/// A pair of disks with the operations that a client of the mount has.
///
/// `disk` is 0 or 1. Ranges and offsets are in bytes; ranges lie inside the size, but a write or a
/// copy may end past the size and then grows the disk.
pub(crate) trait Target {
    fn size(&mut self, disk: usize) -> io::Result<u64>;
    /// Fills all of `buf`, which lies inside the size.
    fn read_at(&mut self, disk: usize, buf: &mut [u8], offset: u64) -> io::Result<()>;
    fn write_at(&mut self, disk: usize, buf: &[u8], offset: u64) -> io::Result<()>;
    /// Zeroes `range` as `FALLOC_FL_ZERO_RANGE` does.
    fn zero(&mut self, disk: usize, range: Range<u64>) -> io::Result<()>;
    /// Zeroes `range` as `FALLOC_FL_PUNCH_HOLE` does.
    fn punch(&mut self, disk: usize, range: Range<u64>) -> io::Result<()>;
    fn truncate(&mut self, disk: usize, size: u64) -> io::Result<()>;
    fn allocate(&mut self, disk: usize, range: Range<u64>) -> io::Result<()>;
    /// Copies all of `from` as copy_file_range does; source and target do not overlap.
    fn copy(&mut self, from: (usize, Range<u64>), to: (usize, u64)) -> io::Result<()>;
    fn sync(&mut self, disk: usize) -> io::Result<()>;
    /// Returns the Data and Hole extents of the whole disk.
    fn extents(&mut self, disk: usize) -> io::Result<Vec<Extent>>;
    /// Ends both disks as `end` says and opens them again.
    fn restart(&mut self, end: End) -> io::Result<()>;
}

/// The way a disk ends before it is opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// The disk is closed.
    Clean,
    /// The daemon is killed.
    Kill,
    /// The host loses power; the seed selects the surviving state.
    PowerCut(u64),
}

/// An operation on the disks. Positions are clamped to the disk's limits by [`Op::fit`].
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Read { disk: usize, range: Range<u64> },
    Write { disk: usize, offset: u64, len: u64, fill: u8 },
    Zero { disk: usize, range: Range<u64> },
    Punch { disk: usize, range: Range<u64> },
    Truncate { disk: usize, size: u64 },
    Allocate { disk: usize, range: Range<u64> },
    Copy { from: usize, range: Range<u64>, to: usize, offset: u64 },
    Sync { disk: usize },
    Restart { end: End },
}

/// Limits and choices for generated operations.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Menu {
    /// Block size in bytes; generated offsets prefer block boundaries.
    pub block: u64,
    /// Maximum size in bytes.
    pub most: u64,
    /// Whether operations may change the size.
    pub resize: bool,
    /// Whether kills and power cuts are generated.
    pub crash: bool,
}

/// Generates a position up to `most`: at a block boundary, near one, near the end of the disk
/// (`u64::MAX - n`), or anywhere.
fn position(menu: Menu) -> BoxedStrategy<u64> {
    let block = menu.block;
    let borders = 0..=menu.most / block;
    let near = (borders.clone(), prop_oneof![-3i64..=3, Just(512), Just(-512), Just(100)]);
    prop_oneof![
        4 => borders.prop_map(move |border| border * block),
        3 => near.prop_map(move |(border, by)| (border * block).saturating_add_signed(by)),
        2 => (0u64..600).prop_map(|back| u64::MAX - back),
        2 => 0..=menu.most,
    ]
    .boxed()
}

fn length(menu: Menu) -> BoxedStrategy<u64> {
    let block = menu.block;
    prop_oneof![
        3 => 1u64..40,
        3 => (1u64..5).prop_map(move |blocks| blocks * block),
        2 => 1..4 * block,
        1 => Just(menu.most),
    ]
    .boxed()
}

/// Generates any operation that `menu` allows.
pub(crate) fn op(menu: Menu) -> BoxedStrategy<Op> {
    let disk = || 0usize..2;
    let range = || (position(menu), length(menu)).prop_map(|(at, len)| at..at.saturating_add(len));
    let end = if menu.crash {
        prop_oneof![Just(End::Clean), Just(End::Kill), any::<u64>().prop_map(End::PowerCut)].boxed()
    } else {
        Just(End::Clean).boxed()
    };
    let resizes = u32::from(menu.resize) * 2;
    let write = (disk(), position(menu), length(menu), 1u8..=255)
        .prop_map(|(disk, offset, len, fill)| Op::Write { disk, offset, len, fill });
    let copy = (disk(), range(), disk(), position(menu))
        .prop_map(|(from, range, to, offset)| Op::Copy { from, range, to, offset });
    // Without resizing these cases become syncs, since a weight must be above zero.
    let resize = (disk(), position(menu), any::<bool>()).prop_map(move |(disk, size, same)| {
        if menu.resize && !same { Op::Truncate { disk, size } } else { Op::Sync { disk } }
    });
    prop_oneof![
        2 => (disk(), range()).prop_map(|(disk, range)| Op::Read { disk, range }),
        8 => write,
        3 => (disk(), range()).prop_map(|(disk, range)| Op::Zero { disk, range }),
        4 => (disk(), range()).prop_map(|(disk, range)| Op::Punch { disk, range }),
        1 => (disk(), range()).prop_map(|(disk, range)| Op::Allocate { disk, range }),
        2 => copy,
        1 + resizes => resize,
        2 => disk().prop_map(|disk| Op::Sync { disk }),
        2 => end.prop_map(|end| Op::Restart { end }),
    ]
    .boxed()
}

/// Clamps `range` to `size`; a start near `u64::MAX` counts back from the end.
fn fit(range: &Range<u64>, size: u64) -> Range<u64> {
    let len = range.end.saturating_sub(range.start).max(1);
    let start = fit_offset(range.start, size);
    start..start.saturating_add(len).min(size)
}

fn fit_offset(offset: u64, size: u64) -> u64 {
    let back = u64::MAX - offset;
    if back < 1000 { size.saturating_sub(back) } else { offset.min(size) }
}

impl Op {
    /// Returns the operation with its positions clamped to the sizes of `models` and the limits of
    /// `menu`.
    #[must_use]
    pub(crate) fn fit(&self, models: &[Model; 2], menu: Menu) -> Self {
        let size = |disk: usize| models[disk].size();
        let most = |disk: usize| if menu.resize { menu.most } else { size(disk) };
        match self.clone() {
            Self::Read { disk, range } => Self::Read { disk, range: fit(&range, size(disk)) },
            Self::Zero { disk, range } => Self::Zero { disk, range: fit(&range, size(disk)) },
            Self::Punch { disk, range } => Self::Punch { disk, range: fit(&range, size(disk)) },
            Self::Allocate { disk, range } => {
                Self::Allocate { disk, range: fit(&range, size(disk)) }
            }
            Self::Write { disk, offset, len, fill } => {
                let offset = if u64::MAX - offset < 1000 {
                    fit_offset(offset, size(disk))
                } else {
                    offset.min(most(disk))
                };
                Self::Write { disk, offset, len: len.min(most(disk) - offset), fill }
            }
            Self::Truncate { disk, size: to } => {
                let to = if u64::MAX - to < 1000 { fit_offset(to, size(disk)) } else { to };
                Self::Truncate { disk, size: to.min(menu.most) }
            }
            Self::Copy { from, range, to, offset } => {
                let mut range = fit(&range, size(from));
                let offset = fit_offset(offset, size(to)).min(most(to));
                let room = (most(to) - offset).min(range.end - range.start);
                range.end = range.start + room;
                if from == to && offset < range.end && range.start < offset + room {
                    range.end = range.start; // Overlapping: undefined, so nothing.
                }
                Self::Copy { from, range, to, offset }
            }
            other => other,
        }
    }
}

/// Returns the bytes of a write of `fill` at `offset`; neighbouring bytes differ.
#[must_use]
pub(crate) fn pattern(offset: u64, len: u64, fill: u8) -> Vec<u8> {
    (offset..offset + len).map(|at| fill ^ (at % 251) as u8 | 1).collect()
}

/// The expected state of one disk.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// The bytes that a read returns.
    pub bytes: Vec<u8>,
    /// For every sector, its values since the last sync.
    versions: Vec<Vec<[u8; LEN]>>,
    sizes: Vec<u64>,
}

impl Model {
    /// Creates the model of a disk that holds `bytes`, all durable.
    #[must_use]
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let mut model = Self { bytes, versions: Vec::new(), sizes: Vec::new() };
        model.synced();
        model
    }

    #[must_use]
    pub(crate) fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn sector(bytes: &[u8], sector: usize) -> [u8; LEN] {
        let mut value = [0; LEN];
        let from = (sector * LEN).min(bytes.len());
        let part = &bytes[from..bytes.len().min(from + LEN)];
        value[..part.len()].copy_from_slice(part);
        value
    }

    /// Marks the present content and size as durable.
    pub(crate) fn synced(&mut self) {
        let sectors = self.bytes.len().div_ceil(LEN);
        self.versions = (0..sectors).map(|at| vec![Self::sector(&self.bytes, at)]).collect();
        self.sizes = vec![self.size()];
    }

    fn note(&mut self, range: Range<u64>) {
        for at in (range.start / SECTOR) as usize..range.end.div_ceil(SECTOR) as usize {
            if self.versions.len() <= at {
                self.versions.resize(at + 1, Vec::new());
            }
            let value = Self::sector(&self.bytes, at);
            if !self.versions[at].contains(&value) {
                self.versions[at].push(value);
            }
        }
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let end = offset + bytes.len() as u64;
        if end > self.size() {
            self.resize(end);
        }
        self.bytes[offset as usize..end as usize].copy_from_slice(bytes);
        self.note(offset..end);
    }

    pub(crate) fn zero(&mut self, range: Range<u64>) {
        self.bytes[range.start as usize..range.end as usize].fill(0);
        self.note(range);
    }

    pub(crate) fn resize(&mut self, size: u64) {
        let changed = self.size().min(size)..self.size().max(size);
        self.bytes.resize(size as usize, 0);
        self.note(changed);
        if !self.sizes.contains(&size) {
            self.sizes.push(size);
        }
    }

    /// Checks that `found` is a possible state after a power cut; the error names the first
    /// difference.
    pub(crate) fn check_legal(&self, found: &[u8]) -> Result<(), String> {
        if !self.sizes.contains(&(found.len() as u64)) {
            return Err(format!("size {} is none of {:?}", found.len(), self.sizes));
        }
        for (at, piece) in found.chunks(LEN).enumerate() {
            let legal = self.versions.get(at).map(Vec::as_slice).unwrap_or_default();
            if !legal.iter().any(|value| &value[..piece.len()] == piece) {
                let heads: Vec<_> = legal.iter().map(|value| &value[..8]).collect();
                let wrong = piece.iter().zip(&legal[0]).position(|(one, two)| one != two);
                return Err(format!(
                    "sector {at} (byte {}) begins {:?}, none of {heads:?}; first differs at {wrong:?}",
                    at * LEN,
                    &piece[..piece.len().min(8)],
                ));
            }
        }
        Ok(())
    }

    /// Checks that `found` equals the model exactly.
    pub(crate) fn check_same(&self, found: &[u8]) -> Result<(), String> {
        if self.bytes.len() != found.len() {
            return Err(format!("size {} instead of {}", found.len(), self.bytes.len()));
        }
        match self.bytes.iter().zip(found).position(|(one, two)| one != two) {
            None => Ok(()),
            Some(at) => Err(format!("byte {at} is {} instead of {}", found[at], self.bytes[at])),
        }
    }

    /// Checks that `extents` cover the disk in order and that no hole contains data.
    pub(crate) fn check_extents(&self, extents: &[Extent]) -> Result<(), String> {
        let mut at = 0;
        for extent in extents {
            if extent.range.start != at || extent.is_empty() {
                return Err(format!("{extent:?} follows {at}"));
            }
            at = extent.range.end;
            let bytes = &self.bytes[extent.range.start as usize..extent.range.end as usize];
            if extent.kind != ExtentKind::Data && bytes.iter().any(|byte| *byte != 0) {
                return Err(format!("{extent:?} hides data"));
            }
        }
        if at == self.size() { Ok(()) } else { Err(format!("extents end at {at}")) }
    }
}

/// Applies `op` (fitted) to the models. Restarts are handled by the caller.
pub(crate) fn apply(models: &mut [Model; 2], op: &Op) {
    match op {
        Op::Write { disk, offset, len, fill } if *len > 0 => {
            models[*disk].write(*offset, &pattern(*offset, *len, *fill));
        }
        Op::Zero { disk, range } | Op::Punch { disk, range } => models[*disk].zero(range.clone()),
        Op::Truncate { disk, size } if *size != models[*disk].size() => models[*disk].resize(*size),
        Op::Copy { from, range, to, offset } if !range.is_empty() => {
            let bytes = models[*from].bytes[range.start as usize..range.end as usize].to_vec();
            models[*to].write(*offset, &bytes);
        }
        _ => {}
    }
}

/// Applies `op` (fitted) to the disks. Bytes that a read returns are compared with `models`.
pub(crate) fn perform(target: &mut dyn Target, op: &Op, models: &[Model; 2]) -> io::Result<()> {
    match op.clone() {
        Op::Read { disk, range } => {
            let mut buf = vec![0xEE; (range.end - range.start) as usize];
            target.read_at(disk, &mut buf, range.start)?;
            let expected = &models[disk].bytes[range.start as usize..range.end as usize];
            assert!(buf == expected, "{op:?} saw other bytes");
            Ok(())
        }
        Op::Write { len: 0, .. } => Ok(()),
        Op::Write { disk, offset, len, fill } => {
            target.write_at(disk, &pattern(offset, len, fill), offset)
        }
        Op::Zero { disk, range } => target.zero(disk, range),
        Op::Punch { disk, range } => target.punch(disk, range),
        Op::Truncate { disk, size } => target.truncate(disk, size),
        Op::Allocate { disk, range } => target.allocate(disk, range),
        Op::Copy { range, .. } if range.is_empty() => Ok(()),
        Op::Copy { from, range, to, offset } => target.copy((from, range), (to, offset)),
        Op::Sync { disk } => target.sync(disk),
        Op::Restart { end } => target.restart(end),
    }
}

/// Reads all bytes of a disk.
pub(crate) fn read_all(target: &mut dyn Target, disk: usize) -> Vec<u8> {
    let mut bytes = vec![0xEE; target.size(disk).unwrap() as usize];
    target.read_at(disk, &mut bytes, 0).unwrap();
    bytes
}

/// Runs `ops` on disks that start as `models`, compares after every restart and read, and compares
/// all bytes at the end. `look` is called after each step for further checks.
pub(crate) fn run(
    target: &mut dyn Target,
    models: &mut [Model; 2],
    menu: Menu,
    ops: &[Op],
    mut look: impl FnMut(&mut dyn Target, &Op, &[Model; 2]),
) {
    for (step, op) in ops.iter().enumerate() {
        let op = op.fit(models, menu);
        perform(target, &op, models).unwrap_or_else(|error| panic!("step {step}, {op:?}: {error}"));
        match op {
            Op::Sync { disk } => models[disk].synced(),
            Op::Restart { end } => settle(target, models, end, step),
            _ => apply(models, &op),
        }
        look(target, &op, models);
    }
    for (disk, model) in models.iter().enumerate() {
        let found = read_all(target, disk);
        model.check_same(&found).unwrap_or_else(|wrong| panic!("disk {disk} at the end: {wrong}"));
    }
}

/// Compares the disks after a restart: the content must be unchanged, or after a power cut be a
/// legal state, which the models then adopt.
fn settle(target: &mut dyn Target, models: &mut [Model; 2], end: End, step: usize) {
    for (disk, model) in models.iter_mut().enumerate() {
        let found = read_all(target, disk);
        let checked = match end {
            End::Clean | End::Kill => model.check_same(&found),
            End::PowerCut(_) => model.check_legal(&found),
        };
        checked.unwrap_or_else(|wrong| panic!("step {step}, disk {disk} after {end:?}: {wrong}"));
        *model = Model::new(found);
    }
}
