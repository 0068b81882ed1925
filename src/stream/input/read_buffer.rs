//! A memory buffer for the latest bytes of a source.
//!
//! Bytes are appended at the end and dropped at the beginning. They are kept in chunks of equal
//! size, so nothing is ever moved, and dropped chunks are reused:
//!
//! ```text
//!        start        kept bytes               end
//!          v                                    v
//!   .......|- chunk -|- chunk -|- chunk -|- chu.|
//! ```
//!
//! Pure: no files, no locks, no I/O.

use std::collections::VecDeque;
use std::ops::Range;

/// Bytes in a chunk: 128 KiB, twice the default size of a pipe, and small compared to the
/// read-ahead.
pub(super) const CHUNK_SIZE: usize = 128 << 10;
/// The number of dropped chunks kept for reuse: as many as one request of the kernel (1 MiB) frees.
const MAX_SPARE_CHUNKS: usize = 8;

/// A run of bytes that grows at its end and shrinks at its beginning. Offsets are those of the
/// disk.
#[derive(Default)]
pub(super) struct ReadBuffer {
    /// The offset of the first chunk: a multiple of [`CHUNK_SIZE`].
    start: u64,
    /// The offset of the next byte to append.
    end: u64,
    chunks: VecDeque<Box<[u8]>>,
    spare: Vec<Box<[u8]>>,
}

impl ReadBuffer {
    /// Appends the next bytes.
    pub(super) fn append(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let within = index(self.end - self.start) % CHUNK_SIZE;
            if within == 0 {
                let chunk = self.spare.pop();
                self.chunks.push_back(chunk.unwrap_or_else(|| vec![0; CHUNK_SIZE].into()));
            }
            let Some(chunk) = self.chunks.back_mut() else { return };
            let (piece, rest) = bytes.split_at(bytes.len().min(CHUNK_SIZE - within));
            chunk[within..within + piece.len()].copy_from_slice(piece);
            self.end += piece.len() as u64;
            bytes = rest;
        }
    }

    /// Copies `range`; returns `None` unless all of it is in the buffer.
    pub(super) fn copy_range(&self, range: &Range<u64>) -> Option<Vec<u8>> {
        if range.start < self.start || range.end > self.end || range.end < range.start {
            return None;
        }
        let mut left = index(range.end - range.start);
        let mut copy = Vec::with_capacity(left);
        let at = index(range.start - self.start);
        let mut within = at % CHUNK_SIZE;
        for chunk in self.chunks.range((at / CHUNK_SIZE).min(self.chunks.len())..) {
            let len = left.min(CHUNK_SIZE - within);
            copy.extend_from_slice(&chunk[within..within + len]);
            left -= len;
            within = 0;
            if left == 0 {
                break;
            }
        }
        Some(copy)
    }

    /// Drops the chunks that end at or before `offset`.
    pub(super) fn drop_before(&mut self, offset: u64) {
        let offset = offset.min(self.end);
        while offset - self.start >= CHUNK_SIZE as u64 {
            let Some(chunk) = self.chunks.pop_front() else { return };
            self.start += CHUNK_SIZE as u64;
            if self.spare.len() < MAX_SPARE_CHUNKS {
                self.spare.push(chunk);
            }
        }
    }

    /// Returns the memory in use, in bytes.
    pub(super) fn memory_used(&self) -> u64 {
        ((self.chunks.len() + self.spare.len()) * CHUNK_SIZE) as u64
    }
}

/// Converts a distance within the buffer, which fits because the buffer is in memory.
fn index(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)] // All of it is small.
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn dropped_chunks_are_reused() {
        let mut kept = ReadBuffer::default();
        kept.append(&vec![1; 3 * CHUNK_SIZE]);
        let held = kept.memory_used();
        assert_eq!(held, 3 * CHUNK_SIZE as u64);
        kept.drop_before(2 * CHUNK_SIZE as u64 + 5);
        kept.append(&vec![2; 2 * CHUNK_SIZE]);
        assert_eq!(kept.memory_used(), held);
        let edge = 3 * CHUNK_SIZE as u64;
        assert_eq!(kept.copy_range(&(edge - 1..edge + 1)), Some(vec![1, 2]));
        assert_eq!(kept.copy_range(&(0..1)), None);
        assert_eq!(kept.copy_range(&(edge..edge + 3 * CHUNK_SIZE as u64)), None);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn kept_bytes_equal_the_appended_bytes(
            steps in prop::collection::vec((1..3 * CHUNK_SIZE, 0.0..1.0_f64, 0.0..1.0_f64), 1..12)
        ) {
            let mut kept = ReadBuffer::default();
            let mut all: Vec<u8> = Vec::new();
            let mut low = 0;
            for (len, back, part) in steps {
                let piece: Vec<u8> =
                    (all.len()..all.len() + len).map(|at| ((at * 7) >> 3) as u8).collect();
                kept.append(&piece);
                all.extend(&piece);
                low += ((all.len() - low) as f64 * back) as usize;
                kept.drop_before(low as u64);
                let from = low + ((all.len() - low) as f64 * part) as usize;
                let copy = kept.copy_range(&(from as u64..all.len() as u64));
                prop_assert!(copy.as_deref() == Some(&all[from..]));
                prop_assert!(kept.memory_used() <= (all.len() + (MAX_SPARE_CHUNKS + 2) * CHUNK_SIZE) as u64);
                let chunks = kept.chunks.len() * CHUNK_SIZE;
                prop_assert!(chunks <= all.len() - low + 2 * CHUNK_SIZE);
            }
        }
    }
}
