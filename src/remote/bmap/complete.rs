//! The comparison of all of an image with its bmap: before a disk does without the image for good.

use std::io;
use std::ops::Range;
use std::thread;
use std::time::Duration;

use super::RangeSums;
use crate::host::os_error;
use crate::layer::{Layer, Wait};
use crate::remote::RemoteBase;

/// How often a range is looked at while it is compared.
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// The bytes that are read at a time to be kept.
const PIECE: u64 = 1 << 20;

/// Why not all ranges of an image match its bmap, as far as that is known.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// Some bytes do not match.
    #[error("bytes {} to {} of its base do not match what the bmap says", .0.start, .0.end - 1)]
    Mismatch(Range<u64>),
    /// The bytes of a range were thrown out of the cache before all of them were there.
    #[error(
        "bytes {} to {} of its base cannot be compared with the bmap, since the read cache does not hold them all: a larger read-cache-size= does",
        .0.start, .0.end - 1
    )]
    TooLong(Range<u64>),
    /// The caller wanted to stop.
    #[error("interrupted")]
    Interrupted,
    /// The base could not be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

impl RemoteBase {
    /// Fetches what is not kept of the ranges of `sums` that are not compared yet, and waits until all of
    /// them match.
    ///
    /// # Errors
    /// [`CompareError`].
    pub(in crate::remote) fn compare_all(
        &self,
        sums: &RangeSums,
        must_stop: &dyn Fn() -> bool,
    ) -> Result<(), CompareError> {
        while let Some((index, range)) = sums.first_unverified() {
            // Twice its length: some of it may make room for the rest, and come again.
            let mut budget = 2 * (range.end - range.start) + PIECE;
            while !sums.is_verified(index) {
                if must_stop() {
                    return Err(CompareError::Interrupted);
                }
                let read = match self.cache().first_missing(&range) {
                    None => {
                        thread::sleep(POLL_INTERVAL);
                        Ok(0)
                    }
                    Some(_) if budget == 0 => return Err(CompareError::TooLong(range)),
                    Some(at) => self.keep_from(at.max(range.start)..range.end),
                };
                match (sums.mismatch(), read) {
                    (Some(bytes), _) => return Err(CompareError::Mismatch(bytes.clone())),
                    (None, read) => budget = budget.saturating_sub(read?),
                }
            }
        }
        sums.mismatch().map_or(Ok(()), |bytes| Err(CompareError::Mismatch(bytes.clone())))
    }

    /// Reads the first bytes of `range`, so that they are kept. Returns how many these are.
    fn keep_from(&self, range: Range<u64>) -> io::Result<u64> {
        let len = usize::try_from((range.end - range.start).min(PIECE)).unwrap_or(0);
        let found = self.read_at(&mut vec![0; len], range.start, Wait::Yes)?;
        match found.range.end.saturating_sub(range.start) {
            0 => Err(os_error(libc::EIO)),
            read => Ok(read),
        }
    }
}
