//! What lies where in a qcow2 image, remembered: its tables are asked a stretch at a time, and what
//! they said is kept as runs.
//!
//! ```text
//!   guest:  |--------- stretch (1024 clusters) ---------|---- not asked for yet ----|
//!   runs:   |-- Data at H --|- Lower -|- Zero -| Packed |
//! ```
//!
//! A lookup takes no lock that is held over I/O, so who must not wait asks here and nowhere else.
//! How many runs are kept is bounded, whatever the image: the oldest stretches go first.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

/// How many clusters are asked for at once.
const CLUSTERS: u64 = 1024;
/// How many runs an image keeps: 12 MiB.
const MOST_RUNS: usize = 512 << 10;
/// And all images of a chain together: 96 MiB.
const MOST_OF_CHAIN: usize = 4 << 20;

/// What a run of the disk is in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Not in this image.
    Lower,
    /// Zeros by the image's word.
    Zero,
    /// Bytes of its data file, from this offset on.
    Data(u64),
    /// Compressed, each cluster for itself.
    Packed,
}

/// A run of the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// Bytes of the disk.
    pub(super) range: Range<u64>,
    /// Where they are.
    pub(super) place: Place,
}

impl Run {
    /// The part of it from `offset` to `end`; `offset` lies in it.
    fn from(&self, offset: u64, end: u64) -> Self {
        let place = match self.place {
            Place::Data(at) => Place::Data(at + (offset - self.range.start)),
            place => place,
        };
        Self { range: offset..self.range.end.min(end), place }
    }
}

/// The runs that are known.
pub(super) struct Runs {
    cluster: u64,
    size: u64,
    most: usize,
    known: RwLock<Known>,
}

#[derive(Default)]
struct Known {
    stretches: HashMap<u64, Arc<[Run]>>,
    /// Oldest first.
    order: VecDeque<u64>,
    runs: usize,
}

impl Runs {
    /// For a disk of `size` bytes in clusters of `cluster` bytes, one of `images` of a chain.
    pub(super) fn new(size: u64, cluster: u64, images: u64) -> Self {
        let share = MOST_OF_CHAIN / usize::try_from(images).unwrap_or(usize::MAX).max(1);
        Self { cluster, size, most: share.min(MOST_RUNS), known: RwLock::default() }
    }

    /// The stretch of the disk that `offset` is asked for with.
    pub(super) fn stretch(&self, offset: u64) -> Range<u64> {
        let len = CLUSTERS * self.cluster;
        let start = offset - offset % len;
        start..self.size.min(start.saturating_add(len))
    }

    /// The run at `range.start`, up to `range.end`, if it is known.
    pub(super) fn get(&self, range: &Range<u64>) -> Option<Run> {
        let start = self.stretch(range.start).start;
        let known = self.known.read();
        find(known.stretches.get(&start)?, range)
    }

    /// Keeps the runs of a whole stretch, and tells the one at `range.start`.
    pub(super) fn keep(&self, runs: Vec<Run>, range: &Range<u64>) -> Option<Run> {
        let found = find(&runs, range);
        let start = self.stretch(range.start).start;
        let mut known = self.known.write();
        known.runs += runs.len();
        match known.stretches.insert(start, runs.into()) {
            Some(old) => known.runs -= old.len(),
            None => known.order.push_back(start),
        }
        while known.runs > self.most && known.order.len() > 1 {
            let Some(oldest) = known.order.pop_front() else { break };
            let gone = known.stretches.remove(&oldest);
            known.runs -= gone.map_or(0, |gone| gone.len());
        }
        found
    }
}

fn find(runs: &[Run], range: &Range<u64>) -> Option<Run> {
    let at = runs.partition_point(|run| run.range.end <= range.start);
    let run = runs.get(at).filter(|run| run.range.start <= range.start)?;
    Some(run.from(range.start, range.end))
}

/// Appends `run`, as part of the last one where it goes on with it.
pub(super) fn push(runs: &mut Vec<Run>, run: Run) {
    if let Some(last) = runs.last_mut()
        && last.range.end == run.range.start
    {
        let goes_on = match (last.place, run.place) {
            (Place::Data(at), Place::Data(next)) => {
                at + (last.range.end - last.range.start) == next
            }
            (was, is) => was == is,
        };
        if goes_on {
            last.range.end = run.range.end;
            return;
        }
    }
    runs.push(run);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(range: Range<u64>, place: Place) -> Run {
        Run { range, place }
    }

    #[test]
    fn runs_that_go_on_are_one() {
        let mut runs = Vec::new();
        push(&mut runs, run(0..512, Place::Data(4096)));
        push(&mut runs, run(512..1024, Place::Data(4608)));
        push(&mut runs, run(1024..1536, Place::Data(4608)));
        push(&mut runs, run(1536..2048, Place::Zero));
        push(&mut runs, run(2048..4096, Place::Zero));
        let expected = [
            run(0..1024, Place::Data(4096)),
            run(1024..1536, Place::Data(4608)),
            run(1536..4096, Place::Zero),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn what_is_kept_is_found_in_part_and_what_is_not_is_unknown() {
        let runs = Runs::new(1 << 30, 512, 1);
        let all = vec![run(0..1000, Place::Data(1 << 20)), run(1000..512 * 1024, Place::Lower)];
        let found = runs.keep(all, &(10..20));
        assert_eq!(found, Some(run(10..20, Place::Data((1 << 20) + 10))));
        assert_eq!(runs.get(&(999..5000)), Some(run(999..1000, Place::Data((1 << 20) + 999))));
        assert_eq!(runs.get(&(1000..5000)), Some(run(1000..5000, Place::Lower)));
        assert_eq!(runs.get(&(512 * 1024..600 * 1024)), None);
    }

    #[test]
    fn the_oldest_stretches_go_when_there_are_too_many_runs() {
        let runs = Runs::new(1 << 40, 512, 1);
        let stretch = |i: u64| {
            let start = i * CLUSTERS * 512;
            let cluster = |c| run(start + c * 512..start + (c + 1) * 512, Place::Data(c * 1024));
            (start, (0..CLUSTERS).map(cluster).collect::<Vec<_>>())
        };
        for i in 0..2 * MOST_RUNS as u64 / CLUSTERS {
            let (start, all) = stretch(i);
            assert!(runs.keep(all, &(start..start + 1)).is_some());
        }
        let known = runs.known.read();
        assert_eq!(known.runs, MOST_RUNS);
        assert_eq!(known.stretches.len(), known.order.len());
        drop(known);
        assert_eq!(runs.get(&(0..1)), None);
    }
}
