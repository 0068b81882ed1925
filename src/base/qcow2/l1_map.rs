//! Which entries of an L1 table lead to an L2 table: a bit for each.
//!
//! The largest image has four million entries, each for up to half a terabyte of disk, and
//! most of them empty. What lies between two tables is one run, whatever its size: it is found here, without
//! asking the library for table after table.

use std::ops::Range;

/// The L2 tables of an image, as bits by index: at most 512 KiB.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct L1Map {
    words: Vec<u64>,
    /// Bytes of the disk that one table maps.
    bytes_per_table: u64,
}

impl L1Map {
    /// Creates the map of an image without tables, each of which would map `bytes_per_table` bytes
    /// of the disk.
    pub(super) fn new(bytes_per_table: u64) -> Self {
        Self { words: Vec::new(), bytes_per_table: bytes_per_table.max(1) }
    }

    /// Notes that there is a table at `index`, which must not be before those noted already.
    pub(super) fn add(&mut self, index: u64) {
        let (word, bit) = (usize::try_from(index / 64).unwrap_or(usize::MAX), index % 64);
        if word >= self.words.len() {
            self.words.resize(word + 1, 0);
        }
        self.words[word] |= 1 << bit;
    }

    /// Returns the end of the part of `range` (bytes of the disk) that begins it and that no table
    /// maps: `range.start` when there is a table for its first byte.
    pub(super) fn unmapped_end(&self, range: &Range<u64>) -> u64 {
        let first = range.start / self.bytes_per_table;
        let past = range.end.div_ceil(self.bytes_per_table);
        match self.next_table(first..past) {
            Some(table) if table == first => range.start,
            Some(table) => range.end.min(table.saturating_mul(self.bytes_per_table)),
            None => range.end,
        }
    }

    /// Returns the first of the indices that has a table.
    fn next_table(&self, indices: Range<u64>) -> Option<u64> {
        let start = usize::try_from(indices.start / 64).ok()?;
        let end = usize::try_from(indices.end.div_ceil(64)).unwrap_or(usize::MAX);
        let words = self.words.get(start..end.min(self.words.len()))?;
        // Those before the first index count as empty.
        let before = !(u64::MAX << (indices.start % 64));
        let hidden = |at: usize| if at == 0 { before } else { 0 };
        let mut words = words.iter().enumerate().map(|(at, word)| (at, word & !hidden(at)));
        let (at, word) = words.find(|(_, word)| *word != 0)?;
        let index = (start + at) as u64 * 64 + u64::from(word.trailing_zeros());
        indices.contains(&index).then_some(index)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_end_of_what_no_table_maps_is_found(
            tables in proptest::collection::btree_set(0..300_u64, 0..8),
            start in 0..4000_u64, len in 1..4000_u64,
        ) {
            let mut map = L1Map::new(10);
            tables.iter().for_each(|table| map.add(*table));
            let range = start..start + len;
            let mapped = |at: &u64| tables.contains(&(at / 10));
            let expected = range.clone().find(mapped).unwrap_or(range.end);
            prop_assert_eq!(map.unmapped_end(&range), expected);
        }
    }

    #[test]
    fn a_map_without_tables_is_one_run() {
        let map = L1Map::new(1 << 39);
        assert_eq!(map.unmapped_end(&(5..u64::MAX)), u64::MAX);
        assert_eq!(map.words.len(), 0);
    }
}
