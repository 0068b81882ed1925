//! An unnamed sparse file that may be longer than the host allows for one file: for the spill and
//! the spool, which keep every byte at its own offset.
//!
//! ```text
//!   offset    0 .. 8 TiB     8 .. 16 TiB     16 .. 24 TiB     24 .. 32 TiB
//!   file      first          (none yet)      more[2]          (none yet)
//! ```
//!
//! ext4 limits a file to 16 TiB less a block. A file is created by the first write to it. There are
//! few, since each takes a descriptor: segments 256 and up share those of the first ones, one after
//! the other, so that on ext4 the first 4 PiB can be stored, and wherever files may be longer all.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::RwLock;

use crate::extents::{Extent, ExtentKind};
use crate::host::{self, os_error};
use crate::layer::Wait;

/// The length of a segment in bytes: 8 TiB, safely below the largest file of ext4.
const SEGMENT_LEN: u64 = 8 << 40;
/// The most files.
const MAX_FILES: u64 = 256;

/// The file. Reads and writes may happen at the same time.
pub(super) struct SegmentedFile {
    dir: PathBuf,
    segment_len: u64,
    first: File,
    /// The files after the first, by the number of their first segment; only those that were written
    /// to.
    more: RwLock<BTreeMap<u64, Arc<File>>>,
}

impl SegmentedFile {
    /// Creates an empty file in `dir`.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn create(dir: &Path) -> io::Result<Self> {
        Self::create_with(dir, SEGMENT_LEN)
    }

    fn create_with(dir: &Path, segment_len: u64) -> io::Result<Self> {
        Ok(Self::of(tempfile::tempfile_in(dir)?, dir, segment_len))
    }

    fn of(first: File, dir: &Path, segment_len: u64) -> Self {
        Self { dir: dir.to_owned(), segment_len, first, more: RwLock::default() }
    }

    /// Returns the directory of the file.
    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes all `parts`, one after the other, at `offset`.
    ///
    /// # Errors
    /// The host's errno; some of the bytes may have been written then.
    pub(super) fn write_all_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset.checked_add(total as u64).ok_or_else(|| os_error(libc::EFBIG))?;
        let segment_end = (offset / self.segment_len + 1).saturating_mul(self.segment_len);
        if end <= segment_end {
            return self.write_in_segment(parts, offset);
        }
        // Rare: bytes are copied only at the border of two segments.
        let whole: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        for piece in self.pieces(offset..end) {
            let bytes = &whole[within(&piece, offset)];
            self.write_in_segment(&[IoSlice::new(bytes)], piece.start)?;
        }
        Ok(())
    }

    fn write_in_segment(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let (number, at) = self.place_of(offset);
        if number == 0 {
            return host::write_all_at(&self.first, parts, at);
        }
        let there = self.more.read().get(&number).cloned();
        let file = match there {
            Some(file) => file,
            None => self.create_file(number)?,
        };
        host::write_all_at(&file, parts, at)
    }

    fn create_file(&self, number: u64) -> io::Result<Arc<File>> {
        let mut more = self.more.write();
        if let Some(file) = more.get(&number) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(tempfile::tempfile_in(&self.dir)?);
        more.insert(number, Arc::clone(&file));
        Ok(file)
    }

    /// Fills `buf` from `offset` on, with zeros where nothing was written. Returns the number of
    /// bytes that do not lie past the end of a segment.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut total = 0;
        for piece in self.pieces(offset..offset.saturating_add(buf.len() as u64)) {
            let bytes = &mut buf[within(&piece, offset)];
            let (number, at) = self.place_of(piece.start);
            let read = |file: &File| host::read_at(file, bytes, at, Wait::Yes);
            let got = self.with(number, read).transpose()?.unwrap_or(0);
            buf[within(&piece, offset)][got..].fill(0);
            total += got;
        }
        Ok(total)
    }

    /// Frees the space of `range`, in one step for each file. An error only wastes space.
    pub(super) fn discard(&self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let len = self.segment_len;
        let (first, last) = (range.start / len, (range.end - 1) / len);
        let discard = |number: u64, file: &File| {
            // The segments of the range that this file has lie in it one after the other.
            let from = first + (number + MAX_FILES - first % MAX_FILES) % MAX_FILES;
            let past = (last % MAX_FILES + MAX_FILES - number) % MAX_FILES;
            let Some(to) = last.checked_sub(past).filter(|to| *to >= from) else { return };
            let start = if from == first { range.start } else { from * len };
            let end = if to == last { range.end - 1 } else { to * len + (len - 1) };
            let _ = host::punch_hole(file, self.place_of(start).1..self.place_of(end).1 + 1);
        };
        discard(0, &self.first);
        self.more.read().iter().for_each(|(number, file)| discard(*number, file));
    }

    /// Describes a prefix of `range`, which must not be empty: data or a hole.
    pub(super) fn extent_at(&self, range: Range<u64>) -> Extent {
        let segment_end = (range.start / self.segment_len + 1).saturating_mul(self.segment_len);
        let range = range.start..range.end.min(segment_end);
        let (number, at) = self.place_of(range.start);
        let inside = at..at + (range.end - range.start);
        match self.with(number, |file| host::extent_at(file, inside)) {
            Some(Ok(Some(found))) => {
                let end = range.start + (found.range.end - at);
                Extent::new(range.start..end, found.kind)
            }
            // Nothing was written from here to the end of the segment.
            Some(Ok(None)) | None => Extent::new(range, ExtentKind::Hole),
            // The host cannot tell: data is always a correct answer.
            Some(Err(_)) => Extent::new(range, ExtentKind::Data),
        }
    }

    /// Returns the space used on the host, in bytes.
    pub(super) fn allocated(&self) -> u64 {
        let blocks = |file: &File| file.metadata().map_or(0, |meta| meta.blocks() * 512);
        blocks(&self.first) + self.more.read().values().map(|file| blocks(file)).sum::<u64>()
    }

    /// Returns the number of the file that has byte `offset`, and the place in it.
    fn place_of(&self, offset: u64) -> (u64, u64) {
        let segment = offset / self.segment_len;
        (segment % MAX_FILES, segment / MAX_FILES * self.segment_len + offset % self.segment_len)
    }

    /// Calls `work` with a file, if it exists.
    fn with<T>(&self, number: u64, work: impl FnOnce(&File) -> T) -> Option<T> {
        if number == 0 {
            return Some(work(&self.first));
        }
        let file = self.more.read().get(&number).cloned()?;
        Some(work(&file))
    }

    /// Cuts `range` at the borders of segments.
    fn pieces(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
        let Range { start: mut at, end } = range;
        let segment_len = self.segment_len;
        std::iter::from_fn(move || {
            let stop = (at / segment_len + 1).saturating_mul(segment_len).min(end);
            let piece = at..stop;
            at = stop;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

/// Returns the indexes of `piece` in a buffer that begins at `offset`.
fn within(piece: &Range<u64>, offset: u64) -> Range<usize> {
    let index = |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX);
    index(piece.start)..index(piece.end)
}

#[cfg(test)]
impl SegmentedFile {
    /// Returns a file whose first segment is given by a test.
    pub(super) fn of_file(first: File, dir: &Path) -> Self {
        Self::of(first, dir, SEGMENT_LEN)
    }

    /// Makes every later write fail, as on a full host. Only the first segment may exist.
    pub(super) fn make_read_only(&mut self) {
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.first));
        self.first = File::open(path).unwrap();
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // All of it is small.
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SEGMENT: u64 = 1 << 20;
    const SIZE: u64 = 4 * SEGMENT;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_file_in_segments_reads_like_one_file(
            writes in prop::collection::vec((0..SIZE, 1..300_000_usize, 1..255_u8, any::<bool>()), 1..10),
        ) {
            let file = SegmentedFile::create_with(Path::new("/var/tmp"), SEGMENT).unwrap();
            let mut model = vec![0_u8; SIZE as usize];
            for (at, len, value, discard) in writes {
                let end = (at + len as u64).min(SIZE);
                let range = at as usize..end as usize;
                if discard {
                    file.discard(at..end);
                    model[range].fill(0);
                } else {
                    let bytes = vec![value; range.len()];
                    let (head, tail) = bytes.split_at(bytes.len() / 3);
                    file.write_all_at(&[IoSlice::new(head), IoSlice::new(tail)], at).unwrap();
                    model[range].fill(value);
                }
            }
            let mut bytes = vec![9; SIZE as usize];
            file.read_at(&mut bytes, 0).unwrap();
            prop_assert!(bytes == model);
            let mut at = 0;
            while at < SIZE {
                let found = file.extent_at(at..SIZE);
                prop_assert!(found.range.start == at && !found.is_empty());
                if found.kind == ExtentKind::Hole {
                    let hole = found.range.start as usize..found.range.end as usize;
                    prop_assert!(model[hole].iter().all(|byte| *byte == 0));
                }
                at = found.range.end;
            }
        }
    }

    #[test]
    fn files_are_few_however_many_segments_are_written_to() {
        let file = SegmentedFile::create_with(Path::new("/var/tmp"), 4096).unwrap();
        let segments = 0..2 * MAX_FILES + 9;
        for number in segments.clone() {
            let bytes = vec![number as u8 | 1; 4096];
            file.write_all_at(&[IoSlice::new(&bytes)], number * 4096).unwrap();
        }
        assert_eq!(file.more.read().len() as u64, MAX_FILES - 1);
        file.discard(200 * 4096 + 96..302 * 4096);
        for number in segments {
            let mut bytes = [0; 4096];
            file.read_at(&mut bytes, number * 4096).unwrap();
            let mut expected = [number as u8 | 1; 4096];
            match number {
                200 => expected[96..].fill(0),
                201..302 => expected.fill(0),
                _ => {}
            }
            assert_eq!(bytes, expected, "{number}");
        }
    }
}
