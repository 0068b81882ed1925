//! The extents that a server has told, so that it is asked once about each part of an image, and what
//! it is asked next.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::extents::{Extent, ExtentKind};

/// The most extents that are remembered: some 16 MiB. Beyond that all are forgotten, and asked for
/// again.
const MAX_EXTENTS: usize = 1 << 18;

/// The bytes that one question is about: 1 GiB. A server may have to walk all of them before it
/// answers, and may answer for less.
const STRETCH: u64 = 1 << 30;

/// The most questions that are asked at a time by who walks over an image from one end to the other,
/// as the count of its data does: 1 TiB at a round trip of 20 ms takes 0.8 s.
const MAX_QUESTIONS: u32 = 32;

/// The questions so far: as long as each begins where the last one ended, more are asked at a time.
#[derive(Debug, Default)]
pub(super) struct ExtentWalk {
    /// What the last questions in a row were about.
    run: Range<u64>,
    /// Number of questions asked the last time.
    count: u32,
}

impl ExtentWalk {
    /// Returns the ranges to ask for when nothing is known of byte `at` of an image of `size` bytes:
    /// ascending, disjoint, unknown in `cache`, and the first begins at `at`.
    pub(super) fn questions(&mut self, at: u64, size: u64, cache: &ExtentCache) -> Vec<Range<u64>> {
        let stretch = |start: u64| start..start.saturating_add(STRETCH).min(size);
        if self.run.contains(&at) {
            // The server has answered for less than it was asked.
            self.count = 1;
            let rest = at..stretch(at).end.min(self.run.end);
            let end = cache.unknown_end(&rest);
            return std::iter::once(at..end).collect();
        }
        if at != self.run.end {
            (self.run, self.count) = (at..at, 0);
        }
        self.count = (self.count * 2).clamp(1, MAX_QUESTIONS);
        let mut questions = Vec::new();
        for _ in 0..self.count {
            let wanted = stretch(self.run.end);
            let end = cache.unknown_end(&wanted);
            if wanted.start >= end || cache.get(&wanted).is_some() {
                break;
            }
            questions.push(wanted.start..end);
            self.run.end = end;
        }
        questions
    }
}

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
    fn a_walk_over_an_image_asks_more_and_more_at_a_time() {
        let (mut walk, mut cache, size) = (ExtentWalk::default(), ExtentCache::default(), 1 << 40);
        let (mut at, mut rounds) = (0, 0);
        while at < size {
            let questions = walk.questions(at, size, &cache);
            assert!(questions.len() <= MAX_QUESTIONS as usize);
            for question in questions {
                assert_eq!(question.start, at);
                at = question.end;
                cache.insert(&[Extent::new(question, ExtentKind::Data)]);
            }
            rounds += 1;
        }
        assert_eq!((at, rounds), (size, 37));
    }

    proptest! {
        #[test]
        fn questions_are_about_what_is_unknown(
            places in prop::collection::vec((0..40 * STRETCH, 1..3 * STRETCH), 1..40),
        ) {
            let (mut walk, mut cache, size) = (ExtentWalk::default(), ExtentCache::default(), 40 * STRETCH);
            for (at, answered) in places {
                if cache.get(&(at..size)).is_some() {
                    continue;
                }
                let questions = walk.questions(at, size, &cache);
                prop_assert_eq!(questions[0].start, at);
                let mut before = at;
                for question in questions {
                    prop_assert!(question.start >= before && question.start < question.end);
                    prop_assert!(question.end <= size && question.end - question.start <= STRETCH);
                    prop_assert!(cache.get(&question).is_none());
                    prop_assert_eq!(cache.unknown_end(&question), question.end);
                    before = question.end;
                    // Servers may answer for a prefix.
                    let end = question.end.min(question.start + answered);
                    cache.insert(&[Extent::new(question.start..end, ExtentKind::Data)]);
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
