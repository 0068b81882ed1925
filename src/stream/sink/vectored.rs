//! Writing in large pieces: the loops that sequential and random access writers share.

use std::io::{self, IoSlice};

/// The piece that written zeros consist of: 64 KiB, so that it stays in the cache of the processor,
/// unlike the zeros of `crate::zeros`.
pub(super) static ZERO_PIECE: [u8; 64 << 10] = [0; 64 << 10];

/// The most pieces in one call (`IOV_MAX`).
pub(super) const MAX_IOVECS: usize = 1024;

/// The most bytes in one write to a file: 1 MiB, which takes only a moment; the stop signal is
/// checked between two calls.
pub(super) const MAX_WRITE: usize = 1 << 20;

/// The number of pieces in 1 MiB of zeros, as much as a pipe holds.
pub(super) const ZERO_IOVECS: usize = MAX_WRITE / ZERO_PIECE.len();

/// Writes all of `parts` with `write_some`, which writes a prefix of its parts, the first of which
/// is not empty, and returns its length in bytes.
pub(super) fn write_parts(
    parts: &[IoSlice<'_>],
    mut write_some: impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<()> {
    let mut parts = parts.to_vec();
    let mut left = &mut parts[..];
    IoSlice::advance_slices(&mut left, 0);
    while !left.is_empty() {
        let len = write_some(left)?;
        IoSlice::advance_slices(&mut left, len);
    }
    Ok(())
}

/// Writes at most `left` zeros with one call of `write_some`; returns their number.
pub(super) fn write_some_zeros(
    left: u64,
    write_some: impl FnOnce(&[IoSlice<'_>]) -> io::Result<usize>,
) -> io::Result<u64> {
    let pieces = [IoSlice::new(&ZERO_PIECE); ZERO_IOVECS];
    let written = match usize::try_from(left) {
        Ok(last) if last < ZERO_PIECE.len() => write_some(&[IoSlice::new(&ZERO_PIECE[..last])]),
        Ok(some) => write_some(&pieces[..ZERO_IOVECS.min(some / ZERO_PIECE.len())]),
        Err(_) => write_some(&pieces),
    }?;
    Ok(written as u64)
}

/// Returns how many of `parts` fit into one call; 0 if the first alone is too large.
pub(super) fn fitting_count(parts: &[IoSlice<'_>]) -> usize {
    let mut total = 0;
    let fits = |part: &&IoSlice<'_>| {
        total += part.len();
        total <= MAX_WRITE
    };
    parts.iter().take(MAX_IOVECS).take_while(fits).count()
}
