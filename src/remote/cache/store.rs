//! Storing and evicting.

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::overflow::Urgency;
use super::units::{UNIT_SIZE, mask_of, pieces, runs};
use super::{Cache, MIN_CAP, byte_len};
use crate::host;
use crate::remote::BLOCK_SIZE;

/// The number of units that are chosen at a time to be evicted next: all units are looked at for it.
const VICTIMS: usize = 4096;

impl Cache {
    /// Keeps `bytes`, those of the image from `offset` on. Only whole blocks count, and the rest of the
    /// image at its end. Waits for the host, but for no reader for long.
    ///
    /// Never fails: what the host does not take stays in memory until newer bytes need the room, so
    /// that those who wait for it can read it.
    pub(crate) fn store(&self, offset: u64, bytes: Vec<u8>, urgency: Urgency) {
        let end = offset.saturating_add(bytes.len() as u64).min(self.size);
        let start = offset.next_multiple_of(BLOCK_SIZE);
        let end = if end == self.size { end } else { end - end % BLOCK_SIZE };
        self.counters.stored_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        let is_stored = !self.is_broken.load(Ordering::Relaxed)
            && pieces(start..end).all(|(unit, piece)| {
                let skip = byte_len(&(offset..piece.start));
                let part = &bytes[skip..skip + byte_len(&piece)];
                self.store_in_unit(unit, &piece, part)
            });
        if is_stored {
            self.overflow.shrink();
        } else {
            self.counters.overflowed_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            self.overflow.keep(offset, bytes, urgency);
        }
        self.evict_to_limits();
    }

    /// Stores the blocks of `piece`; on a full host, once more after others made room. Returns whether
    /// the file has them now.
    fn store_in_unit(&self, unit: u64, piece: &Range<u64>, bytes: &[u8]) -> bool {
        let mut stored = self.try_store(unit, piece, bytes);
        // A file that cannot be so large has no more room after an eviction.
        let is_full = |error: &io::Error| {
            host::is_out_of_space(error) && error.raw_os_error() != Some(libc::EFBIG)
        };
        if stored.as_ref().is_err_and(is_full) {
            // Room for this unit twice: the host needs some for its own tables too. A cache that is small
            // already keeps what it has, which is what others wait for.
            let is_small = self.units.blocks() * BLOCK_SIZE <= MIN_CAP;
            if !is_small && self.evict(2 * UNIT_SIZE) {
                stored = self.try_store(unit, piece, bytes);
            }
        }
        if let Err(error) = &stored {
            log::debug!("bytes at {} are not in the read cache: {error}", piece.start);
        }
        stored.is_ok()
    }

    fn try_store(&self, unit: u64, piece: &Range<u64>, bytes: &[u8]) -> io::Result<()> {
        let _writing = self.units.lock_writes(unit);
        let present = self.units.present(unit);
        for run in runs(mask_of(piece) & !present) {
            let base = unit * UNIT_SIZE;
            let start = base + run.start * BLOCK_SIZE;
            let range = start..(base + run.end * BLOCK_SIZE).min(piece.end);
            let skip = byte_len(&(piece.start..start));
            let part = &bytes[skip..skip + byte_len(&range)];
            let written = host::write_all_at(&self.file, &[IoSlice::new(part)], start);
            if let Err(error) = written {
                // A part may have been written, and nobody would ever evict it.
                let _ = host::punch_hole(&self.file, range);
                return Err(error);
            }
            if let Some(persistent) = &self.persistent {
                persistent.note_stored(start, part, &self.units);
            }
            self.units.insert(unit, mask_of(&range), 0);
        }
        Ok(())
    }

    /// Evicts until the cache is within its limits.
    pub(super) fn evict_to_limits(&self) {
        loop {
            let used = self.units.blocks() * BLOCK_SIZE;
            let above = used.saturating_sub(self.cap.load(Ordering::Relaxed));
            let needed = match self.units.count() > self.max_units {
                true => above.max(1),
                false => above,
            };
            if needed == 0 {
                return;
            }
            let has_room = above > 0 && self.remove_idle_images(above);
            if !has_room && !self.evict(needed) {
                return;
            }
        }
    }

    /// Evicts units until at least `needed` bytes are free. Returns whether any were freed.
    fn evict(&self, needed: u64) -> bool {
        let mut freed = 0;
        while freed < needed {
            let Some((age, unit)) = self.next_victim() else { break };
            freed += self.evict_unit(unit, age);
        }
        freed > 0
    }

    /// Returns the next unit to evict, after the age at which it was chosen.
    fn next_victim(&self) -> Option<(u64, u64)> {
        let mut victims = self.victims.lock();
        if victims.is_empty() {
            // Of a small cache a small part, so that the choice is never old.
            victims.extend(self.units.oldest((self.units.count() / 8).clamp(1, VICTIMS)));
        }
        victims.pop_front()
    }

    /// Punches `unit` out unless it was used since `age`. Returns the number of bytes.
    fn evict_unit(&self, unit: u64, age: u64) -> u64 {
        // A store of the same unit must not be punched between its write and its mark.
        let _writing = self.units.lock_writes(unit);
        let Some(present) = self.units.take_unused(unit, age) else { return 0 };
        self.punch_unit(unit);
        let freed = u64::from(present.count_ones()) * BLOCK_SIZE;
        self.counters.evicted_bytes.fetch_add(freed, Ordering::Relaxed);
        freed
    }

    /// Punches `unit`, which the map does not have any more, out of the file.
    fn punch_unit(&self, unit: u64) {
        let start = unit * UNIT_SIZE;
        if let Err(error) = host::punch_hole(&self.file, start..start + UNIT_SIZE) {
            log::debug!("a unit of the read cache keeps its room: {error}");
        }
        if let Some(persistent) = &self.persistent {
            persistent.note_evicted(unit, &self.units);
        }
    }

    /// Drops all units that `range` (bytes) touches, so that they are fetched anew, also by a later process.
    /// Waits for their readers.
    pub(crate) fn forget(&self, range: &Range<u64>) {
        self.overflow.forget(range);
        for (unit, _) in pieces(range.start..range.end.min(self.size)) {
            let _writing = self.units.lock_writes(unit);
            let dropped = u64::from(self.units.present(unit).count_ones()) * BLOCK_SIZE;
            if dropped > 0 {
                self.units.remove(unit, u64::MAX);
                self.punch_unit(unit);
                self.counters.dropped_bytes.fetch_add(dropped, Ordering::Relaxed);
            }
        }
    }
}
