//! Striped locks over byte ranges of a layer.
//!
//! A layer's bytes are divided into units; every unit belongs to one of 64 stripes, each a lock
//! that is held shared (writes of whole blocks, or of blocks that are Data already) or exclusive
//! (partial first touches, zeroing, punching). A request names all stripes it needs at once and
//! takes them in ascending order, so requests never deadlock. The locks are held across I/O.

use std::io;
use std::ops::Range;

use parking_lot::RawRwLock;
use parking_lot::lock_api::RawRwLock as _;

use crate::host::os_error;
use crate::layer::Wait;

/// The number of stripes: few enough for one word of bits, many enough that two writers rarely
/// meet.
const STRIPES: u64 = 64;

/// The strength of a lock on a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// Held together with other shared holders.
    Shared,
    /// Held alone.
    Exclusive,
}

/// The stripes that a request needs, each in one mode.
#[derive(Clone, Copy, Debug, Default)]
pub struct StripeSet {
    shared: u64,
    exclusive: u64,
}

/// The locks of one layer.
pub struct RangeLocks {
    stripes: [RawRwLock; 64],
    unit: u64,
}

impl RangeLocks {
    /// Creates locks for units of `unit` bytes, a multiple of the block size, so that no block is
    /// in two units.
    #[must_use]
    pub fn new(unit: u64) -> Self {
        Self { stripes: [const { RawRwLock::INIT }; 64], unit }
    }

    /// Adds the stripes of `range` (bytes) to `need`. An exclusive need of a stripe outweighs a
    /// shared one.
    #[must_use]
    pub fn include(&self, mut need: StripeSet, range: &Range<u64>, mode: LockMode) -> StripeSet {
        if range.is_empty() {
            return need;
        }
        let first = range.start / self.unit;
        let last = (range.end - 1) / self.unit;
        let bits = if last - first >= STRIPES - 1 {
            u64::MAX
        } else {
            (first..=last).fold(0, |bits, unit| bits | 1 << (unit % STRIPES))
        };
        match mode {
            LockMode::Shared => need.shared |= bits & !need.exclusive,
            LockMode::Exclusive => {
                need.exclusive |= bits;
                need.shared &= !bits;
            }
        }
        need
    }

    /// Locks `range` (bytes) in one mode.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when a part of the range is taken.
    pub fn lock_range(
        &self,
        range: &Range<u64>,
        mode: LockMode,
        wait: Wait,
    ) -> io::Result<StripeGuard<'_>> {
        let need = self.include(StripeSet::default(), range, mode);
        self.lock(need, wait).ok_or_else(|| os_error(libc::EAGAIN))
    }

    /// Locks all stripes in `need`, in ascending order. Returns `None` under [`Wait::No`] when one
    /// of them is taken.
    #[must_use]
    pub fn lock(&self, need: StripeSet, wait: Wait) -> Option<StripeGuard<'_>> {
        let mut held = StripeGuard { locks: self, taken: StripeSet::default() };
        let mut left = need.shared | need.exclusive;
        while left != 0 {
            let stripe = left.trailing_zeros() as usize;
            let bit = left & left.wrapping_neg();
            left ^= bit;
            let lock = &self.stripes[stripe];
            let exclusive = need.exclusive & bit != 0;
            let got = match (wait, exclusive) {
                (Wait::No, true) => lock.try_lock_exclusive(),
                (Wait::No, false) => lock.try_lock_shared(),
                (Wait::Yes, true) => {
                    lock.lock_exclusive();
                    true
                }
                (Wait::Yes, false) => {
                    lock.lock_shared();
                    true
                }
            };
            if !got {
                return None; // Dropping `held` unlocks the stripes taken so far.
            }
            if exclusive {
                held.taken.exclusive |= bit;
            } else {
                held.taken.shared |= bit;
            }
        }
        Some(held)
    }
}

/// Locked ranges, unlocked when dropped.
#[must_use]
pub struct StripeGuard<'a> {
    locks: &'a RangeLocks,
    taken: StripeSet,
}

impl Drop for StripeGuard<'_> {
    fn drop(&mut self) {
        let mut left = self.taken.shared | self.taken.exclusive;
        while left != 0 {
            let stripe = &self.locks.stripes[left.trailing_zeros() as usize];
            let bit = left & left.wrapping_neg();
            left ^= bit;
            // SAFETY: `taken` holds exactly the bits that `lock` locked, each once and in this
            // mode.
            unsafe {
                if self.taken.exclusive & bit != 0 {
                    stripe.unlock_exclusive();
                } else {
                    stripe.unlock_shared();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_exclusive_lock_excludes_its_own_unit_but_not_its_neighbour() {
        let locks = RangeLocks::new(4096);
        let one = locks.include(StripeSet::default(), &(0..4096), LockMode::Exclusive);
        let same = locks.include(StripeSet::default(), &(4095..4096), LockMode::Shared);
        let next = locks.include(StripeSet::default(), &(4096..8192), LockMode::Exclusive);
        let held = locks.lock(one, Wait::Yes).unwrap();
        assert!(locks.lock(same, Wait::No).is_none());
        assert!(locks.lock(next, Wait::No).is_some());
        drop(held);
        assert!(locks.lock(same, Wait::No).is_some());
    }

    #[test]
    fn shared_locks_exclude_only_exclusive_ones() {
        let locks = RangeLocks::new(4096);
        let all = locks.include(StripeSet::default(), &(0..u64::MAX), LockMode::Shared);
        let first = locks.lock(all, Wait::No).unwrap();
        let second = locks.lock(all, Wait::No).unwrap();
        let one = locks.include(StripeSet::default(), &(9..10), LockMode::Exclusive);
        assert!(locks.lock(one, Wait::No).is_none());
        drop((first, second));
        assert!(locks.lock(one, Wait::No).is_some());
    }

    #[test]
    fn a_refused_lock_releases_the_stripes_it_had_taken() {
        let locks = RangeLocks::new(1);
        let last = locks.include(StripeSet::default(), &(5..6), LockMode::Exclusive);
        let held = locks.lock(last, Wait::Yes).unwrap();
        let all = locks.include(StripeSet::default(), &(0..6), LockMode::Exclusive);
        assert!(locks.lock(all, Wait::No).is_none());
        let others = locks.include(StripeSet::default(), &(0..5), LockMode::Exclusive);
        assert!(locks.lock(others, Wait::No).is_some());
        drop(held);
    }

    #[test]
    fn the_exclusive_mode_wins_in_either_order() {
        let locks = RangeLocks::new(1);
        let need = locks.include(StripeSet::default(), &(0..4), LockMode::Shared);
        let need = locks.include(need, &(1..2), LockMode::Exclusive);
        let need = locks.include(need, &(0..4), LockMode::Shared);
        assert_eq!((need.shared, need.exclusive), (0b1101, 0b0010));
    }
}
