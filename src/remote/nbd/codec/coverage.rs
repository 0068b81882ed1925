//! Which bytes of a read have come.
//!
//! Structured replies bring the pieces of a read in any order. A piece that brings a byte twice is
//! refused, and the read is complete only when every byte came.

use std::ops::Range;

/// The most pieces that do not touch. Servers answer in order, or in a few threads; one that leaves
/// thousands of gaps only wastes our memory.
const MAX_PIECES: usize = 4096;

/// The reason why a piece is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CoverageError {
    /// Bytes of the piece have come before.
    Overlap,
    /// The pieces leave too many gaps.
    TooManyPieces,
}

/// Ranges that do not touch, in ascending order.
#[derive(Debug, Default)]
pub(super) struct Coverage(Vec<Range<usize>>);

impl Coverage {
    /// Adds `piece`, which is not empty.
    pub(super) fn add(&mut self, piece: Range<usize>) -> Result<(), CoverageError> {
        // The first range that ends at or after the start of the piece.
        let at = self.0.partition_point(|range| range.end < piece.start);
        let touches_left = self.0.get(at).is_some_and(|range| range.end == piece.start);
        let right = at + usize::from(touches_left);
        if self.0.get(right).is_some_and(|range| range.start < piece.end) {
            return Err(CoverageError::Overlap);
        }
        let touches_right = self.0.get(right).is_some_and(|range| range.start == piece.end);
        match (touches_left, touches_right) {
            (true, true) => {
                let joined = self.0.remove(right);
                self.extend_to(at, joined.end);
            }
            (true, false) => self.extend_to(at, piece.end),
            (false, true) => {
                if let Some(range) = self.0.get_mut(right) {
                    range.start = piece.start;
                }
            }
            (false, false) if self.0.len() == MAX_PIECES => {
                return Err(CoverageError::TooManyPieces);
            }
            (false, false) => self.0.insert(at, piece),
        }
        Ok(())
    }

    fn extend_to(&mut self, at: usize, end: usize) {
        if let Some(range) = self.0.get_mut(at) {
            range.end = end;
        }
    }

    /// Returns the length of what has come from the start on without a gap.
    pub(super) fn prefix(&self) -> usize {
        self.0.first().filter(|range| range.start == 0).map_or(0, |range| range.end)
    }

    /// Returns whether all of `0..len` has come.
    pub(super) fn is_complete(&self, len: usize) -> bool {
        matches!(self.0.as_slice(), [range] if *range == (0..len))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn thousands_of_gaps_are_refused() {
        let mut coverage = Coverage::default();
        for at in 0..MAX_PIECES {
            coverage.add(at * 2..at * 2 + 1).unwrap();
        }
        let end = MAX_PIECES * 2;
        assert_eq!(coverage.add(end..end + 1), Err(CoverageError::TooManyPieces));
        coverage.add(1..2).unwrap();
        coverage.add(end..end + 1).unwrap();
    }

    proptest! {
        #[test]
        fn coverage_is_that_of_a_table_of_bytes(pieces in prop::collection::vec((0usize..40, 1usize..9), 0..40)) {
            let mut coverage = Coverage::default();
            let mut came = [false; 48];
            for (start, len) in pieces {
                let piece = start..start + len;
                let overlaps = came[piece.clone()].iter().any(|came| *came);
                let added = coverage.add(piece.clone());
                prop_assert_eq!(added, if overlaps { Err(CoverageError::Overlap) } else { Ok(()) });
                if !overlaps {
                    came[piece].fill(true);
                }
                let prefix = came.iter().take_while(|came| **came).count();
                prop_assert_eq!(coverage.prefix(), prefix);
                for len in 1..48 {
                    let is_complete = came[..len].iter().all(|came| *came) && !came[len..].iter().any(|came| *came);
                    prop_assert_eq!(coverage.is_complete(len), is_complete);
                }
            }
        }
    }
}
