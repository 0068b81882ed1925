//! The differences from the base, derived from the host's extents.
//!
//! ```text
//!   base    |==A==|==B==|     |==C==|        letters: places on the host's device
//!   data    |==A==|==X==|=Y===|     |
//!   changed       |-----------|-----|
//! ```
//!
//! Bytes at the same place of the device in both files are shared and therefore equal; where both
//! files have a hole they are equal, too. Everything else counts as changed, including bytes whose
//! place the host does not report (not written yet, compressed, reserved). Changed bytes are never
//! reported as unchanged.

use std::io;
use std::ops::Range;

use super::Reflink;
use crate::layer::Layer;
use crate::overlay::fiemap::{Fiemap, Flush, MappedExtent};

/// The differences from the base.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ChangedRanges {
    /// The changed bytes of the disk, ascending and apart.
    pub ranges: Vec<Range<u64>>,
    /// The total number of changed bytes.
    pub bytes: u64,
}

impl ChangedRanges {
    fn add(&mut self, range: Range<u64>) {
        self.bytes += range.end - range.start;
        match self.ranges.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.ranges.push(range),
        }
    }
}

/// The place of a byte of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PhysicalPlace {
    Hole,
    Device(u64),
    Unknown,
}

/// A cursor over a file's extents, queried at ascending offsets.
struct ExtentCursor<N> {
    next: N,
    current: Option<MappedExtent>,
}

impl<N: FnMut() -> io::Result<Option<MappedExtent>>> ExtentCursor<N> {
    fn new(mut next: N) -> io::Result<Self> {
        let current = next()?;
        Ok(Self { next, current })
    }

    /// Returns the place of the byte at `offset`, and the end of the run that begins there.
    fn place_at(&mut self, offset: u64) -> io::Result<(PhysicalPlace, u64)> {
        while self.current.as_ref().is_some_and(|mapped| mapped.range.end <= offset) {
            self.current = (self.next)()?;
        }
        Ok(match &self.current {
            None => (PhysicalPlace::Hole, u64::MAX),
            Some(mapped) if mapped.range.start > offset => {
                (PhysicalPlace::Hole, mapped.range.start)
            }
            Some(MappedExtent { range, physical: Some(place) }) => {
                (PhysicalPlace::Device(place + (offset - range.start)), range.end)
            }
            Some(mapped) => (PhysicalPlace::Unknown, mapped.range.end),
        })
    }
}

/// Compares two files side by side up to `size`; after `limit` steps the rest counts as changed.
fn compare<A, B>(data: A, base: B, size: u64, limit: u64) -> io::Result<ChangedRanges>
where
    A: FnMut() -> io::Result<Option<MappedExtent>>,
    B: FnMut() -> io::Result<Option<MappedExtent>>,
{
    let (mut data, mut base) = (ExtentCursor::new(data)?, ExtentCursor::new(base)?);
    let mut found = ChangedRanges::default();
    let (mut at, mut steps) = (0, 0);
    while at < size {
        if steps == limit {
            found.add(at..size);
            break;
        }
        steps += 1;
        let ((ours, our_end), (theirs, their_end)) = (data.place_at(at)?, base.place_at(at)?);
        let end = our_end.min(their_end).min(size);
        if ours != theirs || ours == PhysicalPlace::Unknown {
            found.add(at..end);
        }
        at = end;
    }
    Ok(found)
}

/// The most steps of [`Reflink::estimate_changed`]: about 20 ms.
const MAX_ESTIMATE_STEPS: u64 = 64 << 10;

impl Reflink {
    /// Returns the differences from the base. Flushes the file first.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where the host has no FIEMAP.
    pub fn changed(&self) -> io::Result<ChangedRanges> {
        self.compare(Flush::First, u64::MAX)
    }

    /// Estimates the number of bytes that differ from the base. Covers only data that was already
    /// written back; in a heavily fragmented file, the part that was not examined counts as
    /// changed.
    ///
    /// # Errors
    /// The errors of [`changed`](Self::changed).
    pub fn estimate_changed(&self) -> io::Result<u64> {
        Ok(self.compare(Flush::No, MAX_ESTIMATE_STEPS)?.bytes)
    }

    fn compare(&self, flush: Flush, limit: u64) -> io::Result<ChangedRanges> {
        let (mut data, mut base) = (Fiemap::new(&self.data, flush), Fiemap::new(&self.base, flush));
        compare(|| data.next(), || base.next(), self.size(), limit)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init)] // One range is what is expected.
mod tests {
    use super::*;

    fn mapped(start: u64, len: u64, physical: u64) -> MappedExtent {
        MappedExtent { range: start..start + len, physical: Some(physical) }
    }

    fn unknown(start: u64, len: u64) -> MappedExtent {
        MappedExtent { range: start..start + len, physical: None }
    }

    fn differ(data: &[MappedExtent], base: &[MappedExtent], size: u64) -> Vec<Range<u64>> {
        let (mut data, mut base) = (data.iter().cloned(), base.iter().cloned());
        let found = compare(|| Ok(data.next()), || Ok(base.next()), size, u64::MAX).unwrap();
        let bytes: u64 = found.ranges.iter().map(|range| range.end - range.start).sum();
        assert_eq!(found.bytes, bytes);
        found.ranges
    }

    #[test]
    fn shared_places_are_unchanged_however_their_extents_are_split() {
        let whole = [mapped(0, 100, 1000), mapped(200, 50, 5000)];
        let cut = [mapped(0, 30, 1000), mapped(30, 70, 1030), mapped(200, 50, 5000)];
        assert_eq!(differ(&cut, &whole, 300), []);
        assert_eq!(differ(&whole, &cut, 300), []);
    }

    #[test]
    fn moved_bytes_new_data_and_new_holes_are_changed() {
        let base = [mapped(0, 100, 1000), mapped(200, 50, 5000)];
        let data = [mapped(0, 40, 1000), mapped(40, 20, 7000), mapped(60, 40, 1060)];
        assert_eq!(differ(&data, &base, 300), [40..60, 200..250]);
        assert_eq!(differ(&base, &data, 300), [40..60, 200..250]);
        // The same place of the device at another offset of the file is a difference.
        assert_eq!(differ(&[mapped(10, 100, 1000)], &[mapped(0, 100, 1000)], 110), [0..110]);
    }

    #[test]
    fn bytes_at_unknown_places_are_changed_even_on_both_sides() {
        assert_eq!(differ(&[unknown(0, 10)], &[unknown(0, 10)], 20), [0..10]);
        assert_eq!(differ(&[unknown(5, 10)], &[mapped(0, 20, 40)], 20), [0..20]);
        assert_eq!(differ(&[unknown(0, 10)], &[], 20), [0..10]);
    }

    #[test]
    fn changes_past_the_size_are_not_reported() {
        assert_eq!(differ(&[mapped(0, 100, 0)], &[], 60), [0..60]);
        assert_eq!(differ(&[], &[mapped(0, 100, 0)], 60), [0..60]);
        assert_eq!(differ(&[], &[], 60), []);
    }

    #[test]
    fn the_rest_is_changed_once_the_step_limit_is_reached() {
        let data = [mapped(0, 10, 0), mapped(20, 10, 50)];
        let (mut ours, mut theirs) = (data.iter().cloned(), data.iter().cloned());
        let found = compare(|| Ok(ours.next()), || Ok(theirs.next()), 100, 2).unwrap();
        assert_eq!(found.ranges, [20..100]);
    }
}
