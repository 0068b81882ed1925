//! The written ranges of a stream, as a map of runs. No data, no I/O.
//!
//! ```text
//!   |-- Data --|      |--- Zeros ---|-- Data --|
//!   0          4K     64K           1M         2M       everything between: never written
//! ```
//!
//! Runs are half-open, do not overlap, and equal neighbours are joined.

use std::collections::BTreeMap;
use std::ops::Range;

/// The content written to a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// Data that must be kept; some of the bytes are not zero.
    Data,
    /// Only zeros, which need not be kept.
    Zeros,
}

/// The runs, ordered by their start.
#[derive(Clone, Debug, Default)]
pub struct WrittenRuns {
    map: BTreeMap<u64, (u64, Written)>,
}

impl WrittenRuns {
    /// Returns the number of runs.
    #[must_use]
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Returns whether nothing was written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.map.is_empty()
    }

    /// Returns the runs that overlap `range`, clipped to it, in order.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = (Range<u64>, Written)> + '_ {
        let first = self.map.range(..=range.start).next_back().map_or(range.start, |(at, _)| *at);
        let Range { start, end } = range;
        self.map.range(first..end.max(first)).filter_map(move |(at, (stop, written))| {
            let clipped = (*at).max(start)..(*stop).min(end);
            (!clipped.is_empty()).then_some((clipped, *written))
        })
    }

    /// Returns the parts of `range` that contain data, in order.
    pub fn data_within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        self.within(range).filter(|(_, written)| *written == Written::Data).map(|(part, _)| part)
    }

    /// Returns the number of bytes of data in `range`.
    #[must_use]
    pub fn data_bytes(&self, range: Range<u64>) -> u64 {
        self.data_within(range).map(|part| part.end - part.start).sum()
    }

    /// Returns the end and the content of the run at `offset`, or of the gap up to the next run
    /// (`u64::MAX` if there is none).
    #[must_use]
    pub fn at(&self, offset: u64) -> (u64, Option<Written>) {
        if let Some((_, (end, written))) = self.map.range(..=offset).next_back()
            && *end > offset
        {
            return (*end, Some(*written));
        }
        let next = self.map.range(offset..).next();
        (next.map_or(u64::MAX, |(start, _)| *start), None)
    }

    /// Sets the content of `range` to `written`; `None` means never written.
    ///
    /// ```text
    ///   |---- a ----|     |---- b ----|
    ///          |---- range ----|
    ///   |-- a -|-- written ----|- b --|
    /// ```
    pub fn set(&mut self, range: Range<u64>, written: Option<Written>) {
        if range.is_empty() {
            return;
        }
        let Range { mut start, mut end } = range;
        // A run that reaches into the range is cut, and may continue behind it.
        if let Some((&at, &(stop, before))) = self.map.range(..start).next_back()
            && stop >= start
        {
            if Some(before) == written {
                self.map.remove(&at);
                start = at;
                end = end.max(stop);
            } else if stop > start {
                self.map.insert(at, (start, before));
                if stop > end {
                    self.map.insert(end, (stop, before));
                }
            }
        }
        while let Some((&at, &(stop, inside))) = self.map.range(start..=end).next() {
            if at == end && Some(inside) != written {
                break;
            }
            self.map.remove(&at);
            if stop > end {
                if Some(inside) == written {
                    end = stop;
                } else {
                    self.map.insert(end, (stop, inside));
                    break;
                }
            }
        }
        if let Some(written) = written {
            self.map.insert(start, (end, written));
        }
    }

    /// Drops detail before `limit`: runs that end there and are less than `gap` bytes apart are
    /// joined into one run of data. Data remains data.
    pub fn coarsen(&mut self, limit: u64, gap: u64) {
        // A run that extends past the limit is not joined: its part past the limit must stay exact.
        let across = self.map.range(..limit).next_back().filter(|(_, (end, _))| *end > limit);
        let limit = across.map_or(limit, |(start, _)| *start);
        let rest = self.map.split_off(&limit);
        let fine = std::mem::replace(&mut self.map, rest);
        let mut open: Option<(u64, u64, Written)> = None;
        for (start, (end, written)) in fine {
            match &mut open {
                Some((_, last, kind)) if start - *last < gap => {
                    *last = end;
                    *kind = Written::Data;
                }
                _ => {
                    self.insert_run(open.replace((start, end, written)));
                }
            }
        }
        self.insert_run(open);
    }

    fn insert_run(&mut self, run: Option<(u64, u64, Written)>) {
        if let Some((start, end, written)) = run {
            self.map.insert(start, (end, written));
        }
    }
}

#[cfg(test)]
impl WrittenRuns {
    /// Checks that the runs are ordered, disjoint and joined.
    pub(super) fn check(&self) {
        let mut last: Option<(u64, Written)> = None;
        for (start, (end, written)) in &self.map {
            assert!(start < end, "an empty run at {start}");
            if let Some((stop, before)) = last {
                assert!(stop <= *start, "an overlap at {start}");
                assert!(stop < *start || before != *written, "not joined at {start}");
            }
            last = Some((*end, *written));
        }
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SIZE: usize = 64;

    fn bytes_of(runs: &WrittenRuns) -> Vec<Option<Written>> {
        let mut bytes = vec![None; SIZE];
        for (range, written) in runs.within(0..SIZE as u64) {
            bytes[range.start as usize..range.end as usize].fill(Some(written));
        }
        bytes
    }

    proptest! {
        #[test]
        fn runs_agree_with_an_array_of_bytes(
            ops in prop::collection::vec((0..SIZE, 0..SIZE, 0..3u8), 1..60),
            (from, to) in (0..SIZE, 0..SIZE),
        ) {
            let mut runs = WrittenRuns::default();
            let mut model = vec![None; SIZE];
            for (a, b, kind) in ops {
                let (start, end) = (a.min(b), a.max(b));
                let written = [None, Some(Written::Data), Some(Written::Zeros)][kind as usize];
                runs.set(start as u64..end as u64, written);
                model[start..end].fill(written);
                runs.check();
                prop_assert_eq!(&bytes_of(&runs), &model);
            }
            let (start, end) = (from.min(to), from.max(to));
            let data = model[start..end].iter().filter(|w| **w == Some(Written::Data)).count();
            prop_assert_eq!(runs.data_bytes(start as u64..end as u64), data as u64);
            for at in 0..SIZE {
                let (stop, written) = runs.at(at as u64);
                prop_assert_eq!(written, model[at]);
                let stop = (stop as usize).min(SIZE);
                prop_assert!(model[at..stop].iter().all(|w| *w == written));
                prop_assert!(stop == SIZE || model[stop] != written);
            }
        }

        #[test]
        fn coarsened_runs_still_contain_all_data(
            ops in prop::collection::vec((0..SIZE, 1..8usize, any::<bool>()), 1..30),
            limit in 0..SIZE as u64,
            gap in 1..20u64,
        ) {
            let mut runs = WrittenRuns::default();
            for (start, len, data) in ops {
                let written = if data { Written::Data } else { Written::Zeros };
                runs.set(start as u64..(start + len).min(SIZE) as u64, Some(written));
            }
            let before = bytes_of(&runs);
            runs.coarsen(limit, gap);
            for (was, is) in before.iter().zip(bytes_of(&runs)) {
                prop_assert!(*was != Some(Written::Data) || is == Some(Written::Data));
                prop_assert!(was.is_none() || is.is_some());
            }
            let (from, is) = (limit as usize, bytes_of(&runs));
            prop_assert_eq!(&before[from..], &is[from..]);
        }
    }
}
