//! Holes of a host file: where data is, how space is given back, how a range becomes zeros.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use rustix::fs::FallocateFlags;

/// Punches a hole: returns the space of `range` to the host. The file keeps its length.
///
/// # Errors
/// `EOPNOTSUPP` where the file system cannot punch holes; else the host's errno.
pub fn punch_hole(file: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
}

/// Reserves space for `range`. The file keeps its length.
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
