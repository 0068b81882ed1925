//! The extents that a server has told, so that it is asked once about each part of an image.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::extents::{Extent, ExtentKind};

/// The most extents that are remembered: some 16 MiB. Beyond that all are forgotten, and asked for
/// again.
const MAX_EXTENTS: usize = 1 << 18;

/// The known extents of an image: disjoint, with gaps where nothing is known.
#[derive(Debug, Default)]
pub(super) struct ExtentCache {
    /// By start: the end, and the kind.
    known: BTreeMap<u64, (u64, ExtentKind)>,
}

impl ExtentCache {
    /// Returns the known extent from `range.start` on, cut to `range`; `None` when nothing is known
    /// of its first byte.
    pub(super) fn get(&self, range: &Range<u64>) -> Option<Extent> {
        let (_, (end, kind)) = self.known.range(..=range.start).next_back()?;
        (*end > range.start).then(|| Extent::new(range.start..range.end.min(*end), *kind))
    }

    /// Returns the end of the prefix of `range` of which nothing is known: at most `range.end`.
    pub(super) fn unknown_end(&self, range: &Range<u64>) -> u64 {
        self.known.range(range.start..).next().map_or(range.end, |(start, _)| range.end.min(*start))
    }

    /// Remembers `extents`, which are in ascending order; where something is known already, it stays.
    pub(super) fn insert(&mut self, extents: &[Extent]) {
        for Extent { range, kind } in extents {
            let mut at = range.start;
            while at < range.end {
                match self.get(&(at..range.end)) {
                    Some(known) => at = known.range.end,
                    None => {
                        let end = self.unknown_end(&(at..range.end));
                        self.insert_unknown(at..end, *kind);
                        at = end;
                    }
                }
            }
        }
        if self.known.len() > MAX_EXTENTS {
            self.known.clear();
            if let Some(last) = extents.last() {
                self.insert_unknown(last.range.clone(), last.kind);
            }
        }
    }

    /// Remembers an extent of which nothing was known, joined with its neighbours of the same kind.
    fn insert_unknown(&mut self, mut range: Range<u64>, kind: ExtentKind) {
        if let Some((start, (end, before))) = self.known.range(..range.start).next_back()
            && (*end, *before) == (range.start, kind)
        {
            range.start = *start;
        }
        if let Some((end, after)) = self.known.get(&range.end).copied()
            && after == kind
        {
            self.known.remove(&range.end);
            range.end = end;
        }
        self.known.insert(range.start, (range.end, kind));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const KINDS: [ExtentKind; 3] = [ExtentKind::Data, ExtentKind::Zero, ExtentKind::Hole];

    proptest! {
        #[test]
        fn what_was_told_first_is_known(
            told in prop::collection::vec((0_u64..64, prop::collection::vec((1_u64..9, 0_usize..3), 1..4)), 0..24),
        ) {
            let mut cache = ExtentCache::default();
            let mut model = [None; 128];
            for (start, runs) in told {
                let mut at = start;
                let mut extents = Vec::new();
                for (len, kind) in runs {
                    extents.push(Extent::new(at..at + len, KINDS[kind]));
                    for byte in at..at + len {
                        let known = &mut model[usize::try_from(byte).unwrap()];
                        *known = known.or(Some(KINDS[kind]));
                    }
                    at += len;
                }
                cache.insert(&extents);
            }
            for at in 0..128_u64 {
                let kind = model[usize::try_from(at).unwrap()];
                let same = model[usize::try_from(at).unwrap()..].iter().take_while(|k| **k == kind).count() as u64;
                let found = cache.get(&(at..128));
                prop_assert_eq!(found.as_ref().map(|extent| extent.kind), kind);
                match found {
                    Some(extent) => prop_assert_eq!(extent.range, at..at + same),
                    None => prop_assert_eq!(cache.unknown_end(&(at..128)), at + same),
                }
            }
        }
    }

    #[test]
    fn too_many_extents_are_forgotten() {
        let mut cache = ExtentCache::default();
        let kind = |at: u64| KINDS[usize::from(at % 2 == 1)];
        let count = MAX_EXTENTS as u64 + 1;
        let extents: Vec<_> = (0..count).map(|at| Extent::new(at..at + 1, kind(at))).collect();
        cache.insert(&extents);
        assert_eq!(cache.known.len(), 1);
        assert_eq!(cache.get(&(count - 1..count)).unwrap().kind, kind(count - 1));
        assert!(cache.get(&(0..1)).is_none());
    }
}
