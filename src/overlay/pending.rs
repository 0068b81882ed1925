//! Space that was freed in the map but not returned to the host yet. No I/O.
//!
//! A freed range waits until the record that freed it is vouched. A later record that frees the
//! same bytes replaces the earlier one with its own sequence:
//!
//! ```text
//!   |------ 7 ------|              freed by record 7
//!         |--- 9 ------|           freed again by record 9
//!   |- 7 -|---- 9 -----|           the waiting ranges
//! ```

use std::collections::BTreeMap;
use std::ops::Range;

/// Freed ranges in bytes, each with the sequence of the record that freed it; never overlapping.
#[derive(Debug, Default)]
pub struct PendingFrees {
    /// The end and the sequence of each range, by its start.
    ranges: BTreeMap<u64, (u64, u64)>,
}

impl PendingFrees {
    /// Adds `range` (bytes), freed by record `sequence`, which is later than all sequences before.
    pub fn add(&mut self, range: Range<u64>, sequence: u64) {
        if range.is_empty() {
            return;
        }
        self.remove(&range);
        self.ranges.insert(range.start, (range.end, sequence));
    }

    /// Removes `range` from the waiting ranges.
    pub fn remove(&mut self, range: &Range<u64>) {
        if let Some((&start, &(end, sequence))) = self.ranges.range(..range.start).next_back()
            && end > range.start
        {
            self.ranges.insert(start, (range.start, sequence));
            if end > range.end {
                self.ranges.insert(range.end, (end, sequence));
            }
        }
        while let Some((&start, &(end, sequence))) = self.ranges.range(range.clone()).next() {
            self.ranges.remove(&start);
            if end > range.end {
                self.ranges.insert(range.end, (end, sequence));
            }
        }
    }

    /// Returns the first part of `range` that was freed by a record up to `durable`.
    #[must_use]
    pub fn first(&self, range: &Range<u64>, durable: u64) -> Option<Range<u64>> {
        if range.is_empty() {
            return None;
        }
        let before = self.ranges.range(..range.start).next_back();
        let after = self.ranges.range(range.clone());
        before.into_iter().chain(after).find_map(|(&start, &(end, sequence))| {
            let start = start.max(range.start);
            (sequence <= durable && start < end).then(|| start..end.min(range.end))
        })
    }

    /// Returns the parts of `range` that were freed by a record up to `durable`.
    #[must_use]
    pub fn within(&self, range: &Range<u64>, durable: u64) -> Vec<Range<u64>> {
        let mut parts = Vec::new();
        let mut from = range.start;
        while let Some(part) = self.first(&(from..range.end), durable) {
            from = part.end;
            parts.push(part);
        }
        parts
    }

    /// Returns whether no range is waiting.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)] // Small numbers, chosen below.
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pending_frees_match_an_array_of_sequences(
            ops in proptest::collection::vec((0u64..64, 1u64..24, any::<bool>()), 1..60),
            durable in 0u64..60,
        ) {
            let mut pending = PendingFrees::default();
            let mut model = [None::<u64>; 96];
            for (sequence, (start, len, add)) in ops.into_iter().enumerate() {
                let (sequence, range) = (sequence as u64, start..start + len);
                for slot in &mut model[start as usize..(start + len) as usize] {
                    *slot = add.then_some(sequence);
                }
                if add {
                    pending.add(range, sequence);
                } else {
                    pending.remove(&range);
                }
            }
            let mut found = [false; 96];
            for part in pending.within(&(0..96), durable) {
                for at in part {
                    prop_assert!(!std::mem::replace(&mut found[at as usize], true));
                }
            }
            for (at, sequence) in model.into_iter().enumerate() {
                prop_assert_eq!(found[at], sequence.is_some_and(|sequence| sequence <= durable));
            }
            prop_assert_eq!(pending.is_empty(), model.iter().all(Option::is_none));
        }
    }

    #[test]
    fn a_range_is_cut_to_the_range_asked_for() {
        let mut pending = PendingFrees::default();
        pending.add(10..100, 1);
        assert_eq!(pending.first(&(0..26), 1), Some(10..26));
        assert_eq!(pending.first(&(50..66), 1), Some(50..66));
        assert_eq!(pending.first(&(100..u64::MAX), 1), None);
        assert_eq!(pending.first(&(0..26), 0), None);
    }
}
