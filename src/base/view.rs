//! A range of a base as a base of its own (`offset=`, `len=`, `partition=`).
//!
//! ```text
//!   base:  |------|===============|----------|
//!                 start           end
//!   view:         |===============|
//!                 0               size
//! ```
//!
//! Nothing reaches past the ends: a read there is a hole, a write is refused. The size is fixed,
//! like that of a block device.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::partitions::{self, PartitionRole, PartitionTableError};
use crate::config::{SourcePart, format_size};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};

/// The reason why a part of a base cannot be served; one line, to follow the base's name.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// The base ends before the requested range does.
    #[error(
        "has no bytes {start}..{end}, it ends at {size}: take less, or look whether it is the right base"
    )]
    Outside {
        /// The first requested byte.
        start: u64,
        /// The end of the range, exclusive.
        end: u64,
        /// The size of the base in bytes.
        size: u64,
    },
    /// The base ends before the requested offset.
    #[error("ends at {size}, and offset={offset} is not before that: take a smaller one")]
    PastEnd {
        /// The first requested byte.
        offset: u64,
        /// The size of the base in bytes.
        size: u64,
    },
    /// The partition table cannot be used.
    #[error(transparent)]
    Table(#[from] PartitionTableError),
    /// The table has no such partition.
    #[error("has no partition {number}: there are {has}")]
    NoPartition {
        /// The requested partition.
        number: u32,
        /// The existing partitions.
        has: String,
    },
    /// The partition is an extended one, which only contains others.
    #[error("has an extended partition {number}, which holds others: name one of those, of {has}")]
    Extended {
        /// The requested partition.
        number: u32,
        /// The existing partitions.
        has: String,
    },
    /// The partition ends after the base does.
    #[error(
        "is cut off: partition {number} ({len}) ends at {end}, and the base at {size}: get all of it, or add ,offset={start} instead for what is there",
        len = format_size(end - start)
    )]
    CutOff {
        /// The requested partition.
        number: u32,
        /// The first byte of the partition.
        start: u64,
        /// The end of the partition, exclusive.
        end: u64,
        /// The size of the base in bytes.
        size: u64,
    },
}

/// Finds the byte range of `part` in `base`; `None` means all of it. `sector` is the sector size in
/// bytes, if known.
///
/// # Errors
/// [`ViewError`] when the base has no such part.
pub fn resolve_part(
    part: SourcePart,
    base: &dyn Layer,
    sector: Option<u64>,
) -> Result<Option<Range<u64>>, ViewError> {
    let size = base.size();
    match part {
        SourcePart::Whole => Ok(None),
        SourcePart::Bytes { offset, .. } if offset >= size => {
            Err(ViewError::PastEnd { offset, size })
        }
        SourcePart::Bytes { offset, len: None } => Ok(Some(offset..size)),
        SourcePart::Bytes { offset, len: Some(len) } => {
            let range = offset..offset.saturating_add(len);
            check_inside(&range, size)?;
            Ok(Some(range))
        }
        SourcePart::Partition(number) => {
            let all = partitions::read(&base, sector)?;
            let found = all.iter().find(|one| one.number == number);
            let has = || partitions::list_partitions(&all);
            match found {
                None => Err(ViewError::NoPartition { number, has: has() }),
                Some(one) if one.role == PartitionRole::Extended => {
                    Err(ViewError::Extended { number, has: has() })
                }
                Some(one) if one.range.end > size => {
                    let Range { start, end } = one.range;
                    Err(ViewError::CutOff { number, start, end, size })
                }
                Some(one) => Ok(Some(one.range.clone())),
            }
        }
    }
}

/// Checks that all of `range` is inside a base of `size` bytes.
///
/// # Errors
/// [`ViewError::Outside`] when it is not.
pub fn check_inside(range: &Range<u64>, size: u64) -> Result<(), ViewError> {
    let Range { start, end } = *range;
    if end <= size { Ok(()) } else { Err(ViewError::Outside { start, end, size }) }
}

/// A view of the bytes `range` of a base.
#[derive(Debug)]
pub struct RangeView<L: ?Sized> {
    base: Arc<L>,
    range: Range<u64>,
}

impl<L: ?Sized> RangeView<L> {
    /// Creates a view of `range` of `base`, which must contain all of it.
    #[must_use]
    pub fn new(base: Arc<L>, range: Range<u64>) -> Self {
        Self { base, range }
    }

    fn len(&self) -> u64 {
        self.range.end - self.range.start
    }

    /// Converts `range` of the view to one of the base, cut at the view's end; `None` past the end.
    fn clip_to_base(&self, range: &Range<u64>) -> Option<Range<u64>> {
        let end = range.end.min(self.len());
        (range.start < end).then(|| self.range.start + range.start..self.range.start + end)
    }

    /// Converts an extent of the base to one of the view.
    fn to_view(&self, found: &Extent) -> Extent {
        let start = self.range.start;
        Extent::new(found.range.start - start..found.range.end - start, found.kind)
    }

    /// Converts `range` of the view to one of the base; `ENOSPC` unless all of it is inside.
    fn to_base(&self, range: &Range<u64>) -> io::Result<Range<u64>> {
        if range.end > self.len() {
            // The errno of a block device.
            return Err(os_error(libc::ENOSPC));
        }
        Ok(self.range.start + range.start..self.range.start + range.end)
    }
}

impl<L: Layer + ?Sized> Layer for RangeView<L> {
    fn size(&self) -> u64 {
        self.len()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        match self.clip_to_base(&range) {
            None => Ok(Extent::new(range, ExtentKind::Hole)),
            Some(below) => Ok(self.to_view(&self.base.extent_at(below, wait)?)),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        let Some(below) = self.clip_to_base(&asked) else {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        };
        let len = usize::try_from(below.end - below.start).unwrap_or(usize::MAX).min(buf.len());
        Ok(self.to_view(&self.base.read_at(&mut buf[..len], below.start, wait)?))
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let Some(below) = self.clip_to_base(&range) else {
            return Ok((Extent::new(range, ExtentKind::Hole), None));
        };
        // The lent file is the host's, and so are the offsets in it.
        let (found, copied) = self.base.lend_at(below, wait, copy)?;
        Ok((self.to_view(&found), copied))
    }
}

/// Only for a raw base, which never reads the layers below: those would be at other offsets.
impl<L: WritableLayer + ?Sized> WritableLayer for RangeView<L> {
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        let range = self.to_base(&(offset..offset.saturating_add(buf.len() as u64)))?;
        self.base.write_at(buf, range.start, below, wait)
    }

    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.base.zero(self.to_base(&range)?, below, wait)
    }

    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.base.punch_hole(self.to_base(&range)?, below, wait)
    }

    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()> {
        self.base.allocate(self.to_base(&range)?, wait)
    }

    /// Returns `EINVAL` for another size.
    fn set_size(&self, size: u64) -> io::Result<()> {
        if size == self.len() { Ok(()) } else { Err(os_error(libc::EINVAL)) }
    }

    fn sync(&self) -> io::Result<()> {
        self.base.sync()
    }

    fn is_latched(&self) -> bool {
        self.base.is_latched()
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::BorrowedFd;
    use std::os::unix::fs::FileExt;

    use proptest::prelude::*;

    use super::super::blank::Blank;
    use super::super::raw::HostKind;
    use super::super::raw::RawBase;
    use super::*;
    use crate::base::testing::UnreachableBelow;

    /// Creates a file with `bytes`, and a view of `range` of it.
    fn view(bytes: &[u8], range: Range<u64>) -> (Arc<File>, RangeView<RawBase>) {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.write_all_at(bytes, 0).unwrap();
        let file = Arc::new(file);
        let raw = RawBase::new(Arc::clone(&file), HostKind::File, bytes.len() as u64).unwrap();
        (file, RangeView::new(Arc::new(raw), range))
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn a_view_ends_with_its_range_and_its_size_is_fixed() {
        let (file, view) = view(&[7; 8192], 512..4096);
        assert_eq!(view.size(), 3584);
        let mut buf = [1; 1024];
        let found = view.read_at(&mut buf, 3072, Wait::Yes).unwrap();
        assert_eq!(found, Extent::new(3072..3584, ExtentKind::Data));
        assert_eq!((&buf[..512], &buf[512..]), (&[7; 512][..], &[1; 512][..]));
        for start in [3584, 8192, u64::MAX - 1] {
            let hole = Extent::new(start..u64::MAX, ExtentKind::Hole);
            assert_eq!(view.extent_at(start..u64::MAX, Wait::Yes).unwrap(), hole);
        }
        let found = view.extent_at(0..u64::MAX, Wait::Yes).unwrap();
        assert_eq!(found, Extent::new(0..3584, ExtentKind::Data));

        let code = |result: io::Result<()>| result.unwrap_err().raw_os_error();
        let full = Some(libc::ENOSPC);
        assert_eq!(code(view.write_at(&[9; 2], 3583, &UnreachableBelow, Wait::Yes)), full);
        assert_eq!(code(view.write_at(&[9; 2], u64::MAX, &UnreachableBelow, Wait::Yes)), full);
        assert_eq!(code(view.zero(0..3585, &UnreachableBelow, Wait::Yes)), full);
        assert_eq!(code(view.punch_hole(0..8192, &UnreachableBelow, Wait::Yes)), full);
        assert_eq!(code(view.allocate(0..1 << 40, Wait::Yes)), full);
        assert_eq!(code(view.set_size(0)), Some(libc::EINVAL));
        assert_eq!(code(view.set_size(1 << 20)), Some(libc::EINVAL));
        view.set_size(3584).unwrap();
        view.sync().unwrap();
        assert_eq!(contents(&file), [7; 8192]);
    }

    #[test]
    fn a_view_passes_wait_on_to_its_base() {
        let (file, view) = view(&[7; 65536], 4096..65536);
        file.sync_all().unwrap();
        rustix::fs::fadvise(&*file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        let mut buf = [0; 4096];
        let error = view.read_at(&mut buf, 0, Wait::No).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        view.read_at(&mut buf, 0, Wait::Yes).unwrap();
        view.read_at(&mut buf, 0, Wait::No).unwrap();
    }

    #[test]
    fn a_lent_range_is_in_offsets_of_the_file() {
        let (_file, view) = view(&[7; 8192], 512..4096);
        let mut lent = None;
        let mut copy = |_: BorrowedFd<'_>, range: Range<u64>| {
            lent = Some(range);
            Ok(5)
        };
        let (found, copied) = view.lend_at(100..9000, Wait::Yes, &mut copy).unwrap();
        assert_eq!((found, copied), (Extent::new(100..3584, ExtentKind::Data), Some(5)));
        assert_eq!(lent, Some(612..4096));
    }

    #[test]
    fn a_missing_part_is_refused() {
        let blank = Blank::new(1 << 20);
        let why = |part| resolve_part(part, &blank, None).unwrap_err().to_string();
        let bytes = |offset, len| SourcePart::Bytes { offset, len };
        assert!(why(bytes(1 << 20, None)).starts_with("ends at 1048576, and offset=1048576"));
        assert!(why(bytes(512, Some(1 << 20))).starts_with("has no bytes 512..1049088, it ends"));
        assert!(why(bytes(512, Some(u64::MAX))).starts_with("has no bytes 512.."));
        assert!(why(SourcePart::Partition(1)).starts_with("has no partition table"));
        let found = |part| resolve_part(part, &blank, None).unwrap();
        assert_eq!(found(SourcePart::Whole), None);
        assert_eq!(found(bytes(512, None)), Some(512..1 << 20));
        assert_eq!(found(bytes(0, Some(1 << 20))), Some(0..1 << 20));
    }

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, Vec<u8>),
        Zero(Range<u64>),
        Punch(Range<u64>),
        Read(u64, usize),
        Extent(Range<u64>),
    }

    const SIZE: u64 = 40_000;

    fn ops() -> impl Strategy<Value = Op> {
        let range = || (0..SIZE, 1..SIZE).prop_map(|(start, len)| start..start + len);
        prop_oneof![
            (0..SIZE, proptest::collection::vec(1_u8.., 1..9000))
                .prop_map(|(at, b)| Op::Write(at, b)),
            range().prop_map(Op::Zero),
            range().prop_map(Op::Punch),
            (0..SIZE, 1..9000_usize).prop_map(|(at, len)| Op::Read(at, len)),
            range().prop_map(Op::Extent),
        ]
    }

    /// Applies `op` to the view and to the bytes it shows.
    fn step(view: &RangeView<RawBase>, model: &mut [u8], op: &Op) -> Result<(), TestCaseError> {
        let at = |at: u64| usize::try_from(at).unwrap();
        let fits = |range: &Range<u64>| range.end <= model.len() as u64;
        match op {
            Op::Write(start, bytes) => {
                let range = *start..start + bytes.len() as u64;
                let done = view.write_at(bytes, *start, &UnreachableBelow, Wait::Yes);
                prop_assert_eq!(done.is_ok(), fits(&range));
                if done.is_ok() {
                    model[at(range.start)..at(range.end)].copy_from_slice(bytes);
                }
            }
            Op::Zero(range) | Op::Punch(range) => {
                let done = match op {
                    Op::Zero(_) => view.zero(range.clone(), &UnreachableBelow, Wait::Yes),
                    _ => view.punch_hole(range.clone(), &UnreachableBelow, Wait::Yes),
                };
                prop_assert_eq!(done.is_ok(), fits(range));
                if done.is_ok() {
                    model[at(range.start)..at(range.end)].fill(0);
                }
            }
            Op::Read(start, len) => {
                let mut buf = vec![0; *len];
                let found = view.read_at(&mut buf, *start, Wait::Yes).unwrap();
                prop_assert_eq!(found.range.start, *start);
                let len = at(found.len());
                prop_assert!(len > 0 && len <= buf.len());
                let want = model.iter().skip(at(*start)).take(len).copied();
                prop_assert!(
                    want.eq(buf
                        .iter()
                        .copied()
                        .take(model.len().saturating_sub(at(*start)).min(len)))
                );
                prop_assert_eq!(found.kind == ExtentKind::Data, at(*start) < model.len());
            }
            Op::Extent(range) => {
                let found = view.extent_at(range.clone(), Wait::Yes).unwrap();
                prop_assert_eq!(found.range.start, range.start);
                prop_assert!(found.range.end > range.start && found.range.end <= range.end);
                if found.kind != ExtentKind::Data {
                    let shown = model.iter().skip(at(range.start)).take(at(found.len()));
                    prop_assert!(shown.copied().all(|byte| byte == 0));
                }
            }
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_view_reads_and_writes_its_own_bytes_only(
            start in 0..30_u64,
            len in 1..20_000_u64,
            ops in proptest::collection::vec(ops(), 1..20),
        ) {
            let range = start * 512..start * 512 + len;
            let mut want = vec![5; usize::try_from(SIZE).unwrap()];
            let (file, view) = view(&want, range.clone());
            let inside = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
            for op in ops {
                step(&view, &mut want[inside.clone()], &op)?;
            }
            prop_assert!(contents(&file) == want);
        }
    }
}
