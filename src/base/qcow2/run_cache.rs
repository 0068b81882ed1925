//! Cache of a qcow2 image's mapping: the tables are read a stretch at a time, and the result is
//! kept as runs.
//!
//! ```text
//!   guest:  |----------- stretch (1024 clusters) ----------|------- not read yet -------|
//!   runs:   |- Data at H -|- Lower -|- Zero -| Compressed -|
//! ```
//!
//! A lookup takes no lock that is held over I/O, so a caller that must not wait uses this cache
//! alone. The number of runs is bounded for any image: the oldest stretches are evicted first.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use parking_lot::RwLock;

/// Number of clusters whose mapping is read at once.
const STRETCH_CLUSTERS: u64 = 1024;
/// The most runs cached for an image: 12 MiB.
const MAX_RUNS: usize = 512 << 10;
/// The most runs cached for all images of a chain together: 96 MiB.
const MAX_CHAIN_RUNS: usize = 4 << 20;

/// The mapping of a run of the disk in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RunMapping {
    /// The run is not in this image.
    Lower,
    /// Zeros by the image's tables.
    Zero,
    /// Bytes of the data file, from this offset on.
    Data(u64),
    /// Compressed, each cluster separately.
    Compressed,
    /// What the image's tables say cannot be.
    Damaged,
}

/// A run of the disk with one mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedRun {
    /// The range in bytes of the disk.
    pub(super) range: Range<u64>,
    /// The mapping of the range.
    pub(super) mapping: RunMapping,
}

impl MappedRun {
    /// Returns the part of the run from `offset`, which must be in it, to `end`.
    fn slice(&self, offset: u64, end: u64) -> Self {
        let mapping = match self.mapping {
            RunMapping::Data(at) => RunMapping::Data(at + (offset - self.range.start)),
            mapping => mapping,
        };
        Self { range: offset..self.range.end.min(end), mapping }
    }
}

/// The cached runs of an image.
pub(super) struct RunCache {
    cluster_size: u64,
    size: u64,
    max_runs: usize,
    state: RwLock<RunCacheState>,
}

#[derive(Default)]
struct RunCacheState {
    stretches: HashMap<u64, Arc<[MappedRun]>>,
    /// Oldest first.
    order: VecDeque<u64>,
    run_count: usize,
}

impl RunCache {
    /// Creates the cache for a disk of `size` bytes in clusters of `cluster` bytes. `images` is the
    /// number of images in the chain.
    pub(super) fn new(size: u64, cluster: u64, images: u64) -> Self {
        let share = MAX_CHAIN_RUNS / usize::try_from(images).unwrap_or(usize::MAX).max(1);
        Self {
            cluster_size: cluster,
            size,
            max_runs: share.min(MAX_RUNS),
            state: RwLock::default(),
        }
    }

    /// The stretch of the disk that contains `offset`.
    pub(super) fn stretch_at(&self, offset: u64) -> Range<u64> {
        let len = STRETCH_CLUSTERS * self.cluster_size;
        let start = offset - offset % len;
        start..self.size.min(start.saturating_add(len))
    }

    /// Returns the run at `range.start`, up to `range.end`, if it is cached.
    pub(super) fn get(&self, range: &Range<u64>) -> Option<MappedRun> {
        let start = self.stretch_at(range.start).start;
        let known = self.state.read();
        find_run(known.stretches.get(&start)?, range)
    }

    /// Caches the runs of a whole stretch, and returns the run at `range.start`.
    pub(super) fn insert(&self, runs: Vec<MappedRun>, range: &Range<u64>) -> Option<MappedRun> {
        let found = find_run(&runs, range);
        let start = self.stretch_at(range.start).start;
        let mut known = self.state.write();
        known.run_count += runs.len();
        match known.stretches.insert(start, runs.into()) {
            Some(old) => known.run_count -= old.len(),
            None => known.order.push_back(start),
        }
        while known.run_count > self.max_runs && known.order.len() > 1 {
            let Some(oldest) = known.order.pop_front() else { break };
            let gone = known.stretches.remove(&oldest);
            known.run_count -= gone.map_or(0, |gone| gone.len());
        }
        found
    }
}

fn find_run(runs: &[MappedRun], range: &Range<u64>) -> Option<MappedRun> {
    let at = runs.partition_point(|run| run.range.end <= range.start);
    let run = runs.get(at).filter(|run| run.range.start <= range.start)?;
    Some(run.slice(range.start, range.end))
}

/// Appends `run`, merged with the last one if it continues that.
pub(super) fn push_merged(runs: &mut Vec<MappedRun>, run: MappedRun) {
    if let Some(last) = runs.last_mut()
        && last.range.end == run.range.start
    {
        let goes_on = match (last.mapping, run.mapping) {
            (RunMapping::Data(at), RunMapping::Data(next)) => {
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

    fn run(range: Range<u64>, mapping: RunMapping) -> MappedRun {
        MappedRun { range, mapping }
    }

    #[test]
    fn contiguous_runs_are_merged() {
        let mut runs = Vec::new();
        push_merged(&mut runs, run(0..512, RunMapping::Data(4096)));
        push_merged(&mut runs, run(512..1024, RunMapping::Data(4608)));
        push_merged(&mut runs, run(1024..1536, RunMapping::Data(4608)));
        push_merged(&mut runs, run(1536..2048, RunMapping::Zero));
        push_merged(&mut runs, run(2048..4096, RunMapping::Zero));
        let expected = [
            run(0..1024, RunMapping::Data(4096)),
            run(1024..1536, RunMapping::Data(4608)),
            run(1536..4096, RunMapping::Zero),
        ];
        assert_eq!(runs, expected);
    }

    #[test]
    fn a_cached_run_is_found_in_part_and_an_uncached_one_is_not() {
        let runs = RunCache::new(1 << 30, 512, 1);
        let all =
            vec![run(0..1000, RunMapping::Data(1 << 20)), run(1000..512 * 1024, RunMapping::Lower)];
        let found = runs.insert(all, &(10..20));
        assert_eq!(found, Some(run(10..20, RunMapping::Data((1 << 20) + 10))));
        assert_eq!(runs.get(&(999..5000)), Some(run(999..1000, RunMapping::Data((1 << 20) + 999))));
        assert_eq!(runs.get(&(1000..5000)), Some(run(1000..5000, RunMapping::Lower)));
        assert_eq!(runs.get(&(512 * 1024..600 * 1024)), None);
    }

    #[test]
    fn the_oldest_stretches_are_evicted_when_there_are_too_many_runs() {
        let runs = RunCache::new(1 << 40, 512, 1);
        let stretch = |i: u64| {
            let start = i * STRETCH_CLUSTERS * 512;
            let cluster =
                |c| run(start + c * 512..start + (c + 1) * 512, RunMapping::Data(c * 1024));
            (start, (0..STRETCH_CLUSTERS).map(cluster).collect::<Vec<_>>())
        };
        for i in 0..2 * MAX_RUNS as u64 / STRETCH_CLUSTERS {
            let (start, all) = stretch(i);
            assert!(runs.insert(all, &(start..start + 1)).is_some());
        }
        let known = runs.state.read();
        assert_eq!(known.run_count, MAX_RUNS);
        assert_eq!(known.stretches.len(), known.order.len());
        drop(known);
        assert_eq!(runs.get(&(0..1)), None);
    }
}
