//! Holes of a host file: where data is, how space is given back, how a range becomes zeros.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use crate::extents::{Extent, ExtentKind};

/// How often an interrupted lseek(2) is retried. A host that is interrupted again and again counts
/// as one that does not answer.
const MAX_EINTR_RETRIES: usize = 8;

/// Alignment in bytes of ranges that a block device discards or zeroes by itself: a multiple of its
/// sector size. 4 KiB is the largest in use; with the rare larger one the call fails and plain
/// writes follow.
const DEVICE_ALIGNMENT: u64 = 4096;

/// Returns the first offset from `offset` on that holds data (`SEEK_DATA`); `None` when only a hole,
/// or nothing, follows up to the end of the file.
///
/// # Errors
/// `EINVAL`, `EOPNOTSUPP` or `ENOSYS` where the host cannot tell holes from data; else its errno.
pub fn next_data(file: impl AsFd, offset: u64) -> Result<Option<u64>, Errno> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(start) => Ok(Some(start)),
        Err(Errno::NXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns the end of the data at `range.start`, at most `range.end` (`SEEK_HOLE`). Where the file was
/// punched or cut since its data was found, that is `range.end`: Data is always safe.
///
/// # Errors
/// The errors of [`next_data`].
pub fn data_end(file: impl AsFd, range: &Range<u64>) -> Result<u64, Errno> {
    match seek(file, SeekFrom::Hole(range.start)) {
        Ok(end) if end > range.start => Ok(end.min(range.end)),
        Ok(_) | Err(Errno::NXIO) => Ok(range.end),
        Err(error) => Err(error),
    }
}

/// Describes a prefix of `range`, which must not be empty: Data or Hole. `None` when no data follows
/// up to the end of the file, which may be before `range.start`.
///
/// # Errors
/// The errors of [`next_data`].
pub fn extent_at(file: impl AsFd, range: Range<u64>) -> Result<Option<Extent>, Errno> {
    let Some(data) = next_data(&file, range.start)? else { return Ok(None) };
    if data > range.start {
        let hole = range.start..data.min(range.end);
        return Ok(Some(Extent::new(hole, ExtentKind::Hole)));
    }
    let end = data_end(file, &range)?;
    Ok(Some(Extent::new(range.start..end, ExtentKind::Data)))
}

fn seek(file: impl AsFd, from: SeekFrom) -> Result<u64, Errno> {
    let mut tries = (0..MAX_EINTR_RETRIES).map(|_| rustix::fs::seek(&file, from));
    tries.find(|found| *found != Err(Errno::INTR)).unwrap_or(Err(Errno::IO))
}

/// Punches a hole: returns the space of `range` to the host. The file keeps its length.
///
/// # Errors
/// `EOPNOTSUPP` where the file system cannot punch holes; else the host's errno.
pub fn punch_hole(file: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
}

/// Reserves space for `range`, which lies inside the file: past its end, on ext4 only a truncation
/// gives space back. The file keeps its length.
///
/// # Errors
/// `ENOSPC`; `EOPNOTSUPP` where the file system cannot reserve space; else the host's errno.
pub fn allocate(file: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(file, FallocateFlags::KEEP_SIZE, range)
}

/// Calls fallocate(2) with `flags`, and retries when interrupted.
///
/// # Errors
/// The host's errno.
pub fn fallocate(file: impl AsFd, flags: FallocateFlags, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    rustix::io::retry_on_intr(|| {
        rustix::fs::fallocate(&file, flags, range.start, range.end - range.start)
    })
    .map_err(io::Error::from)
}

/// Ways to make a range of a file read as zeros without writing them, the best first: give the space
/// back, or record zeros. The kernel punches a block device only if it reads as zeros afterwards
/// (`blkdev_fallocate`).
pub const PUNCH_OR_ZERO: &[FallocateFlags] =
    &[FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];

/// Makes `range` read as zeros by the first of `methods` that the host supports, and returns the
/// number of methods that it does not support; all of them when `range` is unchanged, so that zeros
/// have to be written. The file keeps its length.
///
/// # Errors
/// The host's errno, unless `is_unsupported` takes it for a missing method.
pub fn zero_by_host(
    file: impl AsFd,
    methods: &[FallocateFlags],
    range: &Range<u64>,
    is_unsupported: fn(&io::Error) -> bool,
) -> io::Result<usize> {
    for (tried, &method) in methods.iter().enumerate() {
        match fallocate(&file, method | FallocateFlags::KEEP_SIZE, range.clone()) {
            Ok(()) => return Ok(tried),
            Err(error) if is_unsupported(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(methods.len())
}

/// Whether fallocate(2) failed because the host has no such operation, or for no such range.
#[must_use]
pub fn is_fallocate_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
}

/// Returns the whole blocks inside `range` that a block device can zero by itself; empty, and inside
/// `range`, when there are none.
#[must_use]
pub fn whole_device_blocks(range: &Range<u64>) -> Range<u64> {
    let start = range.start.next_multiple_of(DEVICE_ALIGNMENT).min(range.end);
    start..(range.end - range.end % DEVICE_ALIGNMENT).max(start)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn extents_follow_the_holes_of_a_file() {
        const LEN: usize = 64 << 10;
        const K64: u64 = LEN as u64;
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(4 * K64).unwrap();
        file.write_all_at(&[1; LEN], K64).unwrap();
        let hole = |range| Ok(Some(Extent::new(range, ExtentKind::Hole)));
        let data = |range| Ok(Some(Extent::new(range, ExtentKind::Data)));
        assert_eq!(extent_at(&file, 0..4 * K64), hole(0..K64));
        assert_eq!(extent_at(&file, 0..5), hole(0..5));
        assert_eq!(extent_at(&file, K64..4 * K64), data(K64..2 * K64));
        assert_eq!(extent_at(&file, K64 + 1..K64 + 2), data(K64 + 1..K64 + 2));
        assert_eq!(extent_at(&file, 2 * K64..4 * K64), Ok(None));
        assert_eq!(extent_at(&file, 9 * K64..10 * K64), Ok(None));
        assert_eq!(data_end(&file, &(9 * K64..10 * K64)), Ok(10 * K64));
    }

    #[test]
    fn whole_device_blocks_returns_the_aligned_inner_range() {
        for (range, blocks) in [
            (0..8192, 0..8192),
            (1..8193, 4096..8192),
            (0..4096, 0..4096),
            (1..4096, 4096..4096),
            (1..5, 5..5),
            (4097..8191, 8191..8191),
        ] {
            assert_eq!(whole_device_blocks(&range), blocks);
        }
    }
}
