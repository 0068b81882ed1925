//! The descriptors of a block status, as extents (doc/proto.md, "`base:allocation` metadata context").
//!
//! Servers answer for less than was asked, or for more: the answer is cut at the end of what was
//! asked, and may describe only a prefix of it.

use std::ops::Range;

use super::wire::{STATE_HOLE, STATE_ZERO};
use crate::extents::{Extent, ExtentKind};

/// The most extents of one answer. What follows is asked again, so that a million descriptors of
/// eight bytes do not become a million extents in memory.
const MAX_EXTENTS: usize = 8192;

/// The extents of one answer, under construction.
#[derive(Debug)]
pub(super) struct StatusBuilder {
    end: u64,
    at: u64,
    extents: Vec<Extent>,
    is_full: bool,
}

impl StatusBuilder {
    /// Begins an answer for `asked`.
    pub(super) fn new(asked: &Range<u64>) -> Self {
        Self { end: asked.end, at: asked.start, extents: Vec::new(), is_full: false }
    }

    /// Adds the next descriptor; `Err` when it has no length.
    pub(super) fn push(&mut self, len: u64, flags: u64) -> Result<(), ()> {
        if len == 0 {
            return Err(());
        }
        let range = self.at..self.at.saturating_add(len).min(self.end);
        if self.is_full || range.is_empty() {
            return Ok(());
        }
        let kind = kind_of(flags);
        let end = range.end;
        let count = self.extents.len();
        match self.extents.last_mut() {
            Some(last) if last.kind == kind => last.range.end = end,
            _ if count == MAX_EXTENTS => {
                self.is_full = true;
                return Ok(());
            }
            _ => self.extents.push(Extent::new(range, kind)),
        }
        self.at = end;
        Ok(())
    }

    /// Returns the extents: a prefix of what was asked, without gaps.
    pub(super) fn finish(self) -> Vec<Extent> {
        self.extents
    }
}

/// Only ZERO promises zeros: a range that is not allocated may read as anything.
fn kind_of(flags: u64) -> ExtentKind {
    match (flags & STATE_ZERO != 0, flags & STATE_HOLE != 0) {
        (true, true) => ExtentKind::Hole,
        (true, false) => ExtentKind::Zero,
        (false, _) => ExtentKind::Data,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_zero_means_zeros() {
        assert_eq!([0, 1, 2, 3].map(kind_of), {
            use ExtentKind::{Data, Hole, Zero};
            [Data, Data, Zero, Hole]
        });
    }

    #[test]
    fn too_many_extents_become_a_prefix() {
        let mut builder = StatusBuilder::new(&(0..1 << 30));
        for number in 0..20_000_u64 {
            builder.push(1, (number % 2) * 3).unwrap();
        }
        let extents = builder.finish();
        assert_eq!(extents.len(), MAX_EXTENTS);
        assert_eq!(extents.last().unwrap().range.end, MAX_EXTENTS as u64);
    }

    proptest! {
        #[test]
        fn extents_are_those_of_a_table_of_bytes(
            start in 0u64..50, len in 1u64..80,
            descriptors in prop::collection::vec((1u64..30, 0u64..4), 1..20),
        ) {
            let asked = start..start + len;
            let mut builder = StatusBuilder::new(&asked);
            let mut kinds = Vec::new();
            for (len, flags) in descriptors {
                builder.push(len, flags).unwrap();
                kinds.extend(std::iter::repeat_n(kind_of(flags), usize::try_from(len).unwrap()));
            }
            kinds.truncate(usize::try_from(len).unwrap());
            let extents = builder.finish();
            let mut at = asked.start;
            let mut seen = Vec::new();
            for extent in &extents {
                prop_assert_eq!(extent.range.start, at);
                at = extent.range.end;
                seen.extend(std::iter::repeat_n(extent.kind, usize::try_from(extent.len()).unwrap()));
            }
            prop_assert!(extents.windows(2).all(|pair| pair[0].kind != pair[1].kind));
            prop_assert_eq!(seen, kinds);
        }
    }
}
