//! Extents: which parts of a disk hold data, zeros or holes, as a short list of runs.
//!
//! A layer describes one prefix at a time; [`describe`] asks for prefix after prefix, and
//! [`Extents`] joins the answers into the list that a seek, `map` or a copy walks. The list may be
//! limited, because a disk can have more extents than a reply has room for; a limited list says
//! exactly how far it got, so that the caller can continue from there:
//!
//! ```text
//!            asked.start                described_to()           asked.end
//!                v                            v                      v
//!   pushed       |- Data -|- Data -|-- Hole --|- Data -|----- ? -----|
//!   kept (2)     |----- Data ------|-- Hole --|
//!                                             ^ a third kind of run: Full, not taken
//! ```
//!
//! Pure: no files, no locks, no I/O.

use std::num::NonZeroUsize;
use std::ops::Range;

/// The kind of a run of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ExtentKind {
    /// Bytes that must be read.
    Data,
    /// Bytes that read as zero, with space allocated for them.
    Zero,
    /// Bytes that read as zero, without allocated space.
    Hole,
    /// Bytes that are not in this layer: ask the layer below. Never part of a finished description
    /// of a disk.
    Lower,
}

/// A run of bytes of one kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The bytes covered, half-open.
    pub range: Range<u64>,
    /// The kind of all these bytes.
    pub kind: ExtentKind,
}

impl Extent {
    /// Creates the extent of the bytes in `range`, all of one `kind`.
    #[must_use]
    pub fn new(range: Range<u64>, kind: ExtentKind) -> Self {
        Self { range, kind }
    }

    /// Returns the number of bytes covered.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.range.end.saturating_sub(self.range.start)
    }

    /// Returns whether the extent covers no byte at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Returns the part of the extent inside `to`, or `None` when they share no byte.
    ///
    /// ```text
    ///   |------ extent ------|
    ///            |--------- to ---------|
    ///            |-- kept ---|
    /// ```
    #[must_use]
    pub fn clip(&self, to: &Range<u64>) -> Option<Self> {
        let range = self.range.start.max(to.start)..self.range.end.min(to.end);
        (!range.is_empty()).then_some(Self::new(range, self.kind))
    }
}

/// The outcome of a [`push`](Extents::push), which says whether to push another extent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PushOutcome {
    /// The extent was taken; more of the asked range remains.
    More,
    /// All of the asked range is described; nothing remains to be pushed.
    Complete,
    /// The extent was not taken: the list already holds as many extents as the limit allows.
    Full,
}

/// The description of a range: ascending, gapless from its start, adjacent equal kinds joined,
/// inside the asked range, and at most as many extents as the limit allows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extents {
    asked: Range<u64>,
    limit: NonZeroUsize,
    list: Vec<Extent>,
}

impl Extents {
    /// Creates an empty description of `asked` (bytes) that will hold at most `limit` extents.
    ///
    /// An empty `asked` is complete at once.
    #[must_use]
    pub fn new(asked: Range<u64>, limit: NonZeroUsize) -> Self {
        let asked = asked.start..asked.end.max(asked.start);
        Self { asked, limit, list: Vec::new() }
    }

    /// Appends the next extent, which must start at [`described_to`](Self::described_to).
    ///
    /// The extent is clipped to the asked range and joined with the last one when both are of one
    /// kind:
    ///
    /// ```text
    ///   |- Data -|- Hole -|                     asked.end
    ///                     |- Hole ------------------|---|
    ///   |- Data -|------------- Hole ---------------|
    /// ```
    ///
    /// A joined extent needs no room, so the last extent may keep growing at the limit; only a
    /// different kind is [`PushOutcome::Full`]. Therefore `described_to` is the exact end of the
    /// last run or of the range, never the middle of a run.
    pub fn push(&mut self, mut extent: Extent) -> PushOutcome {
        debug_assert_eq!(extent.range.start, self.described_to(), "a gap or an overlap");
        extent.range.end = extent.range.end.min(self.asked.end);
        if !extent.is_empty() {
            let has_room = self.list.len() < self.limit.get();
            match self.list.last_mut() {
                Some(last) if last.kind == extent.kind => last.range.end = extent.range.end,
                _ if has_room => self.list.push(extent),
                _ => return PushOutcome::Full,
            }
        }
        if self.is_complete() { PushOutcome::Complete } else { PushOutcome::More }
    }

    /// Returns the end of the description: everything in `asked.start..described_to()` is in the
    /// list (bytes).
    #[must_use]
    pub fn described_to(&self) -> u64 {
        self.list.last().map_or(self.asked.start, |last| last.range.end)
    }

    /// Returns whether all of the asked range is described.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.described_to() == self.asked.end
    }

    /// Returns the range that was asked for (bytes).
    #[must_use]
    pub fn asked(&self) -> Range<u64> {
        self.asked.clone()
    }

    /// Returns the part of the asked range that is not described yet (bytes); empty when complete.
    #[must_use]
    pub fn remaining(&self) -> Range<u64> {
        self.described_to()..self.asked.end
    }

    /// Iterates over the extents in ascending order.
    pub fn iter(&self) -> std::slice::Iter<'_, Extent> {
        self.list.iter()
    }

    /// Returns the extents in ascending order.
    #[must_use]
    pub fn as_slice(&self) -> &[Extent] {
        &self.list
    }
}

impl<'a> IntoIterator for &'a Extents {
    type Item = &'a Extent;
    type IntoIter = std::slice::Iter<'a, Extent>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// Calls `ask` for prefix after prefix of `asked` until all of it is described or `limit` extents
/// are kept.
///
/// `ask` receives the range that is still to be described, never empty, and returns an extent that
/// starts where that range starts and is not empty. An answer that breaks this rule is a bug in a
/// layer; the remaining range is then reported as [`ExtentKind::Data`], which is always safe,
/// instead of being asked for forever.
///
/// # Errors
/// The first error of `ask`, unchanged.
pub fn describe<E>(
    asked: Range<u64>,
    limit: NonZeroUsize,
    mut ask: impl FnMut(Range<u64>) -> Result<Extent, E>,
) -> Result<Extents, E> {
    let mut extents = Extents::new(asked, limit);
    while !extents.is_complete() {
        let rest = extents.remaining();
        let answer = ask(rest.clone())?.clip(&rest);
        let extent = answer
            .filter(|extent| extent.range.start == rest.start)
            .unwrap_or(Extent::new(rest, ExtentKind::Data));
        if extents.push(extent) == PushOutcome::Full {
            break;
        }
    }
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;

    use super::ExtentKind::{Data, Hole, Lower, Zero};
    use super::*;

    impl Extents {
        /// Asserts the invariants of the list, which hold after any sequence of pushes.
        fn check(&self) {
            assert!(self.list.len() <= self.limit.get(), "more than the limit");
            let mut at = self.asked.start;
            for extent in &self.list {
                assert_eq!(extent.range.start, at, "a gap or an overlap in {self:?}");
                assert!(!extent.is_empty(), "an empty extent in {self:?}");
                at = extent.range.end;
            }
            assert!(at <= self.asked.end, "beyond what was asked");
            assert_eq!(at, self.described_to());
            assert!(self.list.windows(2).all(|pair| pair[0].kind != pair[1].kind), "not joined");
        }
    }

    fn at_most(limit: usize) -> NonZeroUsize {
        NonZeroUsize::new(limit).unwrap()
    }

    /// Describes `asked` one byte at a time; `disk` gives the kind of each byte.
    fn bytewise(disk: &[ExtentKind], asked: Range<u64>, limit: usize) -> Extents {
        describe(asked, at_most(limit), |rest| {
            let at = usize::try_from(rest.start).unwrap();
            Ok::<_, Infallible>(Extent::new(rest.start..rest.start + 1, disk[at]))
        })
        .unwrap()
    }

    #[test]
    fn adjacent_equal_kinds_are_joined() {
        let extents = bytewise(&[Data, Data, Hole, Hole, Hole, Zero], 0..6, 9);
        let expected = [Extent::new(0..2, Data), Extent::new(2..5, Hole), Extent::new(5..6, Zero)];
        assert_eq!(extents.as_slice(), expected);
        assert!(extents.is_complete());
    }

    #[test]
    fn an_empty_range_is_complete_without_asking() {
        let never = |_| -> Result<Extent, Infallible> { panic!("asked") };
        let extents = describe(7..7, at_most(1), never).unwrap();
        assert!(extents.is_complete());
        assert_eq!((extents.described_to(), extents.as_slice().len()), (7, 0));
    }

    #[test]
    #[expect(clippy::reversed_empty_ranges, reason = "that is the case tested")]
    fn a_reversed_range_is_treated_as_empty() {
        let extents = Extents::new(9..3, at_most(1));
        assert!(extents.is_complete());
        assert_eq!(extents.asked(), 9..9);
    }

    #[test]
    fn the_last_extent_grows_at_the_limit_until_another_kind_comes() {
        let mut extents = Extents::new(0..100, at_most(2));
        assert_eq!(extents.push(Extent::new(0..10, Data)), PushOutcome::More);
        assert_eq!(extents.push(Extent::new(10..20, Hole)), PushOutcome::More);
        assert_eq!(extents.push(Extent::new(20..30, Hole)), PushOutcome::More);
        assert_eq!(extents.push(Extent::new(30..40, Data)), PushOutcome::Full);
        assert_eq!(extents.described_to(), 30);
        assert_eq!(extents.remaining(), 30..100);
        extents.check();
    }

    #[test]
    fn a_list_exactly_at_its_limit_is_complete_and_not_full() {
        let extents = bytewise(&[Data, Hole, Hole], 0..3, 2);
        assert!(extents.is_complete());
    }

    #[test]
    fn an_extent_beyond_the_asked_range_is_clipped() {
        let mut extents = Extents::new(5..20, at_most(4));
        assert_eq!(extents.push(Extent::new(5..10, Zero)), PushOutcome::More);
        assert_eq!(extents.push(Extent::new(10..u64::MAX, Zero)), PushOutcome::Complete);
        assert_eq!(extents.as_slice(), [Extent::new(5..20, Zero)]);
        // Pushing more changes nothing, even with no room for another extent.
        assert_eq!(extents.push(Extent::new(20..30, Data)), PushOutcome::Complete);
        assert_eq!(extents.as_slice(), [Extent::new(5..20, Zero)]);
    }

    #[test]
    fn clip_keeps_the_common_part_or_nothing() {
        let extent = Extent::new(10..20, Data);
        assert_eq!(extent.clip(&(0..15)), Some(Extent::new(10..15, Data)));
        assert_eq!(extent.clip(&(12..15)), Some(Extent::new(12..15, Data)));
        assert_eq!(extent.clip(&(15..u64::MAX)), Some(Extent::new(15..20, Data)));
        assert_eq!(extent.clip(&(20..30)), None);
        assert_eq!(extent.clip(&(0..10)), None);
        assert_eq!(extent.clip(&(15..15)), None);
    }

    #[test]
    fn an_answer_that_does_not_advance_is_reported_as_data() {
        for answer in [Extent::new(0..0, Hole), Extent::new(4..8, Hole), Extent::new(50..60, Hole)]
        {
            let extents =
                describe(0..40, at_most(4), |_| Ok::<_, Infallible>(answer.clone())).unwrap();
            assert_eq!(extents.as_slice(), [Extent::new(0..40, Data)]);
        }
    }

    #[test]
    fn an_error_of_ask_is_returned_unchanged() {
        let result = describe(0..40, at_most(4), |rest| match rest.start {
            0 => Ok(Extent::new(0..10, Data)),
            start => Err(start),
        });
        assert_eq!(result, Err(10));
    }

    /// Generates the kinds of a small disk, byte by byte, in runs.
    fn disk() -> impl Strategy<Value = Vec<ExtentKind>> {
        let kind = prop_oneof![Just(Data), Just(Zero), Just(Hole), Just(Lower)];
        prop::collection::vec((kind, 1_usize..6), 1..20).prop_map(|runs| {
            runs.into_iter().flat_map(|(kind, len)| std::iter::repeat_n(kind, len)).collect()
        })
    }

    proptest! {
        #[test]
        fn a_description_matches_a_byte_array(
            disk in disk(),
            cut in any::<(prop::sample::Index, prop::sample::Index)>(),
            steps in prop::collection::vec(1_u64..9, 1..20),
            limit in 1_usize..12,
        ) {
            let (one, two) = (cut.0.index(disk.len() + 1), cut.1.index(disk.len() + 1));
            let (start, end) = (one.min(two), one.max(two));
            let mut steps = steps.iter().cycle();
            // The answers have any length and sometimes reach beyond the asked range.
            let extents = describe(start as u64..end as u64, at_most(limit), |rest| {
                let at = usize::try_from(rest.start).unwrap();
                let same = disk[at..].iter().take_while(|kind| **kind == disk[at]).count() as u64;
                let len = same.min(*steps.next().unwrap());
                Ok::<_, Infallible>(Extent::new(rest.start..rest.start + len, disk[at]))
            })
            .unwrap();
            extents.check();

            let described: Vec<ExtentKind> = extents
                .iter()
                .flat_map(|extent| extent.range.clone().map(|_| extent.kind))
                .collect();
            prop_assert_eq!(&described[..], &disk[start..start + described.len()]);

            // The description stops at the end or where one more run would begin, nowhere else.
            let to = start + described.len();
            if to < end {
                prop_assert!(!extents.is_complete());
                prop_assert_eq!(extents.as_slice().len(), limit);
                prop_assert_ne!(disk[to - 1], disk[to]);
            } else {
                prop_assert!(extents.is_complete());
            }
            prop_assert_eq!(extents, bytewise(&disk, start as u64..end as u64, limit));
        }
    }
}
