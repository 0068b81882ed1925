//! Which blocks are in the file: a mask for every unit that holds any, in shards with a lock each.
//!
//! ```text
//!   unit (256 KiB)   |block 0|block 1|block 2|  ...  |block 63|      64 blocks of 4 KiB
//!   present            1       1       0                0            one bit a block
//! ```
//!
//! A reader holds the shard of a unit shared while it reads the host file, so a unit that is about to
//! be punched out is first taken from the map, which waits for those readers. Writers and evictions of
//! the units of one shard come one after the other ([`Units::lock_writes`]) and hold the map itself
//! only for moments.

use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard, RwLock, RwLockReadGuard};

use crate::host::os_error;
use crate::layer::Wait;
use crate::remote::BLOCK_SIZE;

/// Blocks in a unit: the bits of its mask.
pub(super) const UNIT_BLOCKS: u64 = 64;
/// Bytes in a unit: what is evicted at once.
pub(super) const UNIT_SIZE: u64 = UNIT_BLOCKS * BLOCK_SIZE;
const SHARDS: usize = 64;

/// The blocks of one unit.
#[derive(Debug, Default)]
pub(super) struct Unit {
    /// The blocks that can be read, one bit each.
    pub(super) present: u64,
    /// Those of them that must be compared with their checksum first.
    pub(super) unverified: u64,
    /// The value of [`Units::clock`] at the last use.
    last_used: AtomicU64,
}

/// The units of one shard.
pub(super) type Shard = HashMap<u64, Unit>;

/// All units that hold any blocks.
pub(super) struct Units {
    shards: Vec<RwLock<Shard>>,
    writes: Vec<Mutex<()>>,
    blocks: AtomicU64,
    count: AtomicUsize,
    /// Counts changes: uses between two changes are of one age.
    clock: AtomicU64,
}

impl Units {
    pub(super) fn new() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| RwLock::default()).collect(),
            writes: (0..SHARDS).map(|_| Mutex::default()).collect(),
            blocks: AtomicU64::new(0),
            count: AtomicUsize::new(0),
            clock: AtomicU64::new(1),
        }
    }

    /// Returns the number of blocks that are present.
    pub(super) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Relaxed)
    }

    /// Returns the number of units that hold any blocks.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Locks the map of the shard of `unit`, shared.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] while the map is changed.
    pub(super) fn read(&self, unit: u64, wait: Wait) -> io::Result<RwLockReadGuard<'_, Shard>> {
        let shard = &self.shards[shard_of(unit)];
        match wait {
            Wait::Yes => Ok(shard.read()),
            // Past a writer that waits for a slow reader: a reader that may not wait needs no turn.
            Wait::No => shard.try_read_recursive().ok_or_else(|| os_error(libc::EAGAIN)),
        }
    }

    /// Returns the blocks of `unit` that are present. Waits for changes of the map alone, not for slow
    /// readers for whom a change waits.
    pub(super) fn present(&self, unit: u64) -> u64 {
        self.shards[shard_of(unit)].read_recursive().get(&unit).map_or(0, |found| found.present)
    }

    /// Returns the blocks of `unit` that must be compared first.
    pub(super) fn unverified(&self, unit: u64) -> u64 {
        self.shards[shard_of(unit)].read_recursive().get(&unit).map_or(0, |found| found.unverified)
    }

    /// Does the same as [`lock_writes`](Self::lock_writes), but never waits under [`Wait::No`].
    pub(super) fn try_lock_writes(&self, unit: u64, wait: Wait) -> Option<MutexGuard<'_, ()>> {
        match wait {
            Wait::Yes => Some(self.lock_writes(unit)),
            Wait::No => self.writes[shard_of(unit)].try_lock(),
        }
    }

    /// Makes the caller the only one who writes or punches units of the shard of `unit`.
    pub(super) fn lock_writes(&self, unit: u64) -> MutexGuard<'_, ()> {
        self.writes[shard_of(unit)].lock()
    }

    /// Notes a use of `found`.
    pub(super) fn touch(&self, found: &Unit) {
        found.last_used.store(self.clock.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Adds `blocks` to `unit`. Those in `unverified` are to be compared before their first use; the
    /// others never again.
    pub(super) fn insert(&self, unit: u64, blocks: u64, unverified: u64) {
        let now = self.clock.fetch_add(1, Ordering::Relaxed) + 1;
        let mut shard = self.shards[shard_of(unit)].write();
        let found = shard.entry(unit).or_insert_with(|| {
            self.count.fetch_add(1, Ordering::Relaxed);
            Unit::default()
        });
        let added = (blocks & !found.present).count_ones();
        found.present |= blocks;
        found.unverified = (found.unverified & !blocks) | (blocks & unverified);
        found.last_used.store(now, Ordering::Relaxed);
        self.blocks.fetch_add(added.into(), Ordering::Relaxed);
    }

    /// Removes `blocks` from `unit`, and the unit when it is empty then. Waits for their readers.
    pub(super) fn remove(&self, unit: u64, blocks: u64) {
        let mut shard = self.shards[shard_of(unit)].write();
        let Some(found) = shard.get_mut(&unit) else { return };
        let removed = (blocks & found.present).count_ones();
        found.present &= !blocks;
        found.unverified &= found.present;
        if found.present == 0 {
            shard.remove(&unit);
            self.count.fetch_sub(1, Ordering::Relaxed);
        }
        self.blocks.fetch_sub(removed.into(), Ordering::Relaxed);
    }

    /// Takes `unit` out of the map if nobody has used it since `age`. Returns its blocks once no reader
    /// is in it.
    pub(super) fn take_unused(&self, unit: u64, age: u64) -> Option<u64> {
        let mut shard = self.shards[shard_of(unit)].write();
        let is_old = |found: &Unit| found.last_used.load(Ordering::Relaxed) <= age;
        let present = shard.get(&unit).filter(|found| is_old(found))?.present;
        shard.remove(&unit);
        self.count.fetch_sub(1, Ordering::Relaxed);
        self.blocks.fetch_sub(present.count_ones().into(), Ordering::Relaxed);
        Some(present)
    }

    /// Returns the `count` units that were not used for the longest time, each after its age, the oldest
    /// first.
    pub(super) fn oldest(&self, count: usize) -> Vec<(u64, u64)> {
        let mut oldest = BinaryHeap::with_capacity(count + 1);
        for shard in &self.shards {
            for (unit, found) in shard.read().iter() {
                let age = (found.last_used.load(Ordering::Relaxed), *unit);
                if oldest.len() < count {
                    oldest.push(age);
                } else if oldest.peek().is_some_and(|newest| age < *newest) {
                    oldest.pop();
                    oldest.push(age);
                }
            }
        }
        oldest.into_sorted_vec()
    }

    /// Calls `each` with every unit and its blocks, those of one shard under its lock.
    pub(super) fn for_each(&self, mut each: impl FnMut(u64, &Unit)) {
        for shard in &self.shards {
            shard.read().iter().for_each(|(unit, found)| each(*unit, found));
        }
    }
}

fn shard_of(unit: u64) -> usize {
    usize::try_from(unit % SHARDS as u64).unwrap_or(0)
}

/// Returns the mask of the blocks that `range` (bytes, of one unit, not empty) touches.
pub(super) fn mask_of(range: &Range<u64>) -> u64 {
    let start = range.start % UNIT_SIZE / BLOCK_SIZE;
    let count = range.end.div_ceil(BLOCK_SIZE) - range.start / BLOCK_SIZE;
    let ones = if count >= UNIT_BLOCKS { u64::MAX } else { (1 << count) - 1 };
    ones << start
}

/// Cuts `range` (bytes) at the ends of units.
pub(super) fn pieces(range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let unit = at / UNIT_SIZE;
        let piece = at..range.end.min((unit + 1).saturating_mul(UNIT_SIZE));
        at = piece.end.max(at);
        (!piece.is_empty()).then_some((unit, piece))
    })
}

/// Returns the runs of ones in `mask`, as numbers of blocks in the unit.
pub(super) fn runs(mask: u64) -> impl Iterator<Item = Range<u64>> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        if rest == 0 {
            return None;
        }
        let start = rest.trailing_zeros();
        let len = (rest >> start).trailing_ones();
        let end = start + len;
        rest = if end >= 64 { 0 } else { rest & (u64::MAX << end) };
        Some(start.into()..end.into())
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn runs_are_the_ones_of_a_mask(mask: u64) {
            let mut found = 0;
            let mut last = None;
            for run in runs(mask) {
                prop_assert!(last.is_none_or(|last| run.start > last) && !run.is_empty());
                last = Some(run.end);
                found |= mask_of(&(run.start * BLOCK_SIZE..run.end * BLOCK_SIZE));
            }
            prop_assert_eq!(found, mask);
        }

        #[test]
        fn pieces_are_the_range_cut_at_units(start in 0..4 * UNIT_SIZE, len in 0..3 * UNIT_SIZE) {
            let mut at = start;
            for (unit, piece) in pieces(start..start + len) {
                prop_assert_eq!(piece.start, at);
                prop_assert!(unit * UNIT_SIZE <= at && piece.end <= (unit + 1) * UNIT_SIZE);
                prop_assert!(!piece.is_empty());
                at = piece.end;
            }
            prop_assert_eq!(at, start + len);
        }
    }

    #[test]
    fn the_oldest_come_first_and_used_ones_stay() {
        let units = Units::new();
        for unit in [5, 900, 3, 77] {
            units.insert(unit, 0b11, 0);
        }
        units.touch(units.read(5, Wait::Yes).unwrap().get(&5).unwrap());
        let oldest = units.oldest(2);
        assert_eq!(oldest.iter().map(|(_, unit)| *unit).collect::<Vec<_>>(), [900, 3]);
        units.touch(units.read(900, Wait::Yes).unwrap().get(&900).unwrap());
        let taken = oldest.iter().map(|(age, unit)| units.take_unused(*unit, *age));
        assert_eq!(taken.collect::<Vec<_>>(), [None, Some(0b11)]);
        assert_eq!((units.count(), units.blocks()), (3, 6));
        units.remove(77, 0b01);
        units.remove(77, 0b110);
        assert_eq!((units.count(), units.blocks()), (2, 4));
    }
}
