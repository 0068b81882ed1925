//! The spool: all bytes of a source, in a sparse unnamed file in segments.
//!
//! The file is new, so unwritten ranges read as zeros: a block that arrives as zeros is not written
//! and stays a hole, no matter into how many pieces it is split.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;

use crate::extents::Extent;
use crate::host::{os_error, temporary_dir};
use crate::stream::segments::SegmentedFile;
use crate::zeros::is_zero;

/// The granularity of holes in bytes: 4 KiB, the block size of common host file systems. A smaller
/// hole saves nothing.
const BLOCK_SIZE: u64 = 4 << 10;

/// The spool file. Its bytes are at the same offsets as on the disk.
pub(super) struct SpoolFile(SegmentedFile);

impl SpoolFile {
    /// Creates a spool in `$TMPDIR`, or in `/var/tmp` if that is not set.
    ///
    /// # Errors
    /// One line that names the directory.
    pub(super) fn create() -> io::Result<Self> {
        Self::create_in(&temporary_dir())
    }

    fn create_in(dir: &Path) -> io::Result<Self> {
        let file = SegmentedFile::create(dir).map_err(|error| {
            let line = format!("no spool in {}: {error}; set TMPDIR", dir.display());
            io::Error::new(error.kind(), line)
        })?;
        Ok(Self(file))
    }

    /// Stores `bytes` at `offset`, where nothing was stored before.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn store(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut data = 0..0;
        while data.end < bytes.len() {
            let piece = data.end..block_end(bytes.len(), data.end, offset);
            if is_zero(&bytes[piece.clone()]) {
                self.write(&bytes[data], offset, piece.start)?;
                data = piece.end..piece.end;
            } else {
                data.end = piece.end;
            }
        }
        self.write(&bytes[data], offset, bytes.len())
    }

    /// Writes `data`, which ends at index `end` of the bytes that belong at `offset`.
    fn write(&self, data: &[u8], offset: u64, end: usize) -> io::Result<()> {
        if data.is_empty() {
            return Ok(());
        }
        self.0.write_all_at(&[IoSlice::new(data)], offset + (end - data.len()) as u64)
    }

    /// Reads `range`, all of which must have been stored.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn read(&self, range: &Range<u64>) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start).map_err(|_| os_error(libc::EINVAL))?;
        let mut bytes = vec![0; len];
        // Zeros were not written, and are what is read past the end of the file.
        self.0.read_at(&mut bytes, range.start)?;
        Ok(bytes)
    }

    /// Describes a prefix of `range`, which must not be empty and must have been stored.
    pub(super) fn extent_at(&self, range: Range<u64>) -> Extent {
        self.0.extent_at(range)
    }

    /// Returns the space used on the host, in bytes.
    pub(super) fn used(&self) -> u64 {
        self.0.allocated()
    }

    /// Returns the directory of the spool, for messages.
    pub(super) fn dir(&self) -> &Path {
        self.0.dir()
    }

    /// Creates a spool in a file given by a test.
    #[cfg(test)]
    pub(super) fn of(file: std::fs::File, dir: &Path) -> Self {
        Self(SegmentedFile::of_file(file, dir))
    }
}

/// Returns the end of the block that contains index `at` of `len` bytes that belong at `offset`.
fn block_end(len: usize, at: usize, offset: u64) -> usize {
    let left = BLOCK_SIZE - (offset + at as u64) % BLOCK_SIZE;
    usize::try_from(left).map_or(len, |left| len.min(at + left))
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // All of it is small.
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::extents::ExtentKind;

    /// Stores runs of `(kind, blocks)` in pieces of `step` bytes.
    fn stored(runs: &[(u8, usize)], step: usize) -> (tempfile::TempDir, SpoolFile, Vec<u8>) {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let spool = SpoolFile::create_in(dir.path()).unwrap();
        let bytes: Vec<u8> = runs
            .iter()
            .flat_map(|(kind, blocks)| vec![*kind; blocks * BLOCK_SIZE as usize])
            .collect();
        for (number, piece) in bytes.chunks(step).enumerate() {
            spool.store(piece, (number * step) as u64).unwrap();
        }
        (dir, spool, bytes)
    }

    #[test]
    fn zeros_become_holes_regardless_of_how_they_are_split() {
        for step in [1000, 4096, 5000, 1 << 20] {
            let (_dir, spool, bytes) = stored(&[(0, 16), (5, 16), (0, 32)], step);
            let block = |number: u64| number * BLOCK_SIZE;
            assert_eq!(spool.extent_at(0..block(64)), Extent::new(0..block(16), ExtentKind::Hole));
            let data = spool.extent_at(block(16)..block(64));
            assert_eq!(data, Extent::new(block(16)..block(32), ExtentKind::Data));
            let tail = spool.extent_at(block(32)..block(64));
            assert_eq!(tail, Extent::new(block(32)..block(64), ExtentKind::Hole));
            assert!(spool.used() < block(64), "{}", spool.used());
            assert_eq!(spool.read(&(0..block(64))).unwrap(), bytes);
        }
    }

    #[test]
    fn the_error_for_a_missing_directory_names_it() {
        let error = SpoolFile::create_in(Path::new("/nowhere/at/all")).err().unwrap();
        assert!(error.to_string().starts_with("no spool in /nowhere/at/all: "), "{error}");
    }

    #[test]
    fn bytes_beyond_16_tib_can_be_spooled() {
        let spool = SpoolFile::create_in(Path::new("/var/tmp")).unwrap();
        let (start, end) = (17 << 40, 18 << 40);
        spool.store(&[5; 8192], start).unwrap();
        assert_eq!(spool.read(&(start - 1..start + 2)).unwrap(), [0, 5, 5]);
        let extents = [spool.extent_at(start - 4096..end), spool.extent_at(start..end)];
        let hole = Extent::new(start - 4096..start, ExtentKind::Hole);
        assert_eq!(extents, [hole, Extent::new(start..start + 8192, ExtentKind::Data)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn stored_bytes_are_read_back_and_no_hole_covers_data(
            runs in prop::collection::vec((0..3_u8, 1..6_usize), 1..8),
            step in 1..20_000_usize,
            at in 0.0..1.0_f64,
        ) {
            let (_dir, spool, bytes) = stored(&runs, step);
            let from = (bytes.len() as f64 * at) as u64;
            let read = spool.read(&(from..bytes.len() as u64)).unwrap();
            prop_assert!(read == bytes[from as usize..]);
            let mut offset = from;
            while offset < bytes.len() as u64 {
                let extent = spool.extent_at(offset..bytes.len() as u64);
                prop_assert!(extent.range.start == offset && !extent.is_empty());
                if extent.kind == ExtentKind::Hole {
                    let hole = extent.range.start as usize..extent.range.end as usize;
                    prop_assert!(is_zero(&bytes[hole]));
                }
                offset = extent.range.end;
            }
        }
    }
}
