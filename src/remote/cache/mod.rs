//! The bytes of an image that were fetched, in a file on the host.
//!
//! ```text
//!   offset     0        256K      512K                          size
//!   data       |########|..######.|.........|..#......|..........|    a sparse file: every byte at
//!   units       present  in part   none      in part   none           its offset in the image
//! ```
//!
//! Which blocks of 4 KiB are there is kept in memory ([`units`]), never derived from the holes of the
//! file. Blocks are written first and then marked present; a unit is first taken from the map and then
//! punched out. What is there never changes, since an image on a server does not.
//!
//! The cache is never the reason for a failed read. Where the host has no room, the units that were not
//! used for the longest time go, and if that does not help, bytes stay in memory for those who wait for
//! them ([`overflow`]). A host file that cannot be read is given up in the same way.
//!
//! ```text
//!   Cache::read_at, lend_at, missing    mod.rs        who has the bytes
//!   Cache::store, eviction              store.rs
//!   Cache::temporary, open, maintain    open.rs
//!   DIR, its limit, its locks           dir.rs        the rest is for a cache that outlives its process
//!   map, comparison                     persist.rs, record.rs
//! ```
//!
//! Lock order: the writes of a shard ([`Units::lock_writes`]), the list of victims, the map on
//! disk, the map of a shard.

mod dir;
mod error;
mod open;
mod overflow;
mod persist;
mod place_lock;
mod record;
mod registry;
mod store;
mod units;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLockReadGuard};

pub(crate) use self::error::CacheError;
use self::overflow::Overflow;
pub(crate) use self::overflow::Urgency;
use self::persist::Persistent;
pub(crate) use self::place_lock::{PlaceLock, PlaceUse};
pub(crate) use self::registry::CacheRegistry;
use self::units::{Shard, UNIT_SIZE, Unit, Units, mask_of, pieces, runs};
use super::BLOCK_SIZE;
use crate::host;
use crate::layer::{CopyFn, Wait};

/// The smallest limit in bytes: what several readers wait for at a time must fit in, or they would fetch
/// each other's bytes out of the cache.
const MIN_CAP: u64 = 32 << 20;
/// The number of units that a cache may have whatever its limit: with one block each, 2 GiB. A unit takes
/// 33 to 66 bytes of memory, so that these are at most 34 MiB.
const MIN_UNITS: usize = 1 << 19;

/// What happened to a cache since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheCounters {
    /// Reads that found at least their first byte.
    pub(crate) hits: u64,
    /// The bytes of these reads.
    pub(crate) hit_bytes: u64,
    /// Reads that did not.
    pub(crate) misses: u64,
    /// Bytes that were stored.
    pub(crate) stored_bytes: u64,
    /// Bytes that made room for others.
    pub(crate) evicted_bytes: u64,
    /// Bytes that did not match their checksum.
    pub(crate) dropped_bytes: u64,
    /// Bytes for which the host had no room.
    pub(crate) overflowed_bytes: u64,
    /// Bytes in the file now.
    pub(crate) present_bytes: u64,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    hit_bytes: AtomicU64,
    misses: AtomicU64,
    stored_bytes: AtomicU64,
    evicted_bytes: AtomicU64,
    dropped_bytes: AtomicU64,
    overflowed_bytes: AtomicU64,
}

/// What is there of a piece of a unit.
enum Lookup<'a> {
    /// Not its first byte.
    Absent,
    /// A prefix, with blocks that must be compared with their checksum first.
    Unverified(Range<u64>, u64),
    /// A prefix, which stays there while the shard is held.
    Present(RwLockReadGuard<'a, Shard>, Range<u64>),
}

/// The cache of one image, shared by all disks that have the image as their base.
pub(crate) struct Cache {
    file: File,
    /// The size of the image in bytes.
    size: u64,
    /// The most bytes in the file.
    cap: AtomicU64,
    max_units: usize,
    units: Units,
    overflow: Overflow,
    /// The next units to evict, each after the age at which it was chosen.
    victims: Mutex<VecDeque<(u64, u64)>>,
    counters: Counters,
    /// Whether the file could not be read, and is used no more.
    is_broken: AtomicBool,
    /// Whether the image is about to be changed, so that nobody may take what is here for it.
    is_discarded: AtomicBool,
    /// What a cache with a name has on disk besides its bytes.
    persistent: Option<Persistent>,
    /// The limit of all caches in the directory, in bytes.
    dir_cap: u64,
    /// Whether the directory may hold images that nobody uses.
    has_idle_images: AtomicBool,
}

impl Cache {
    /// Reads the longest prefix of `offset..offset + buf.len()` that is there into `buf`. Returns its
    /// length in bytes; 0 when the first byte is not there.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when bytes are there but cannot be had without waiting.
    pub(crate) fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
        let done = self.read_uncounted(buf, offset, wait)?;
        let counters = &self.counters;
        match done {
            0 => counters.misses.fetch_add(1, Ordering::Relaxed),
            _ => counters.hits.fetch_add(1, Ordering::Relaxed),
        };
        counters.hit_bytes.fetch_add(done as u64, Ordering::Relaxed);
        Ok(done)
    }

    /// Reads as [`read_at`](Self::read_at) does, for no user of the image.
    ///
    /// # Errors
    /// Those of [`read_at`](Self::read_at).
    pub(crate) fn read_uncounted(
        &self,
        buf: &mut [u8],
        offset: u64,
        wait: Wait,
    ) -> io::Result<usize> {
        let wanted = offset..offset.saturating_add(buf.len() as u64).min(self.size);
        let mut done = 0;
        for (unit, piece) in pieces(wanted.clone()) {
            let len = byte_len(&piece);
            let got = match self.read_unit(&mut buf[done..done + len], unit, piece, wait) {
                Err(_) if done > 0 => break,
                got => got?,
            };
            done += got;
            if got < len {
                break;
            }
        }
        if done < byte_len(&wanted) {
            done += self.overflow.read(&mut buf[done..byte_len(&wanted)], offset + done as u64);
        }
        Ok(done)
    }

    /// Reads the prefix of `piece`, in `unit`, that is in the file.
    fn read_unit(
        &self,
        buf: &mut [u8],
        unit: u64,
        piece: Range<u64>,
        wait: Wait,
    ) -> io::Result<usize> {
        loop {
            match self.look_up(unit, &piece, wait)? {
                Lookup::Absent => return Ok(0),
                Lookup::Unverified(prefix, blocks) => {
                    let len = byte_len(&prefix);
                    if self.read_unverified(&mut buf[..len], unit, &prefix, wait)? {
                        return Ok(len);
                    }
                    self.verify(unit, blocks, wait)?;
                }
                Lookup::Present(shard, prefix) => {
                    let len = byte_len(&prefix);
                    return match host::read_at(&self.file, &mut buf[..len], prefix.start, wait) {
                        Ok(got) if got == len => Ok(len),
                        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Err(error),
                        bad => {
                            drop(shard);
                            self.give_up(bad.err());
                            // Also what was put back meanwhile: it would count as there.
                            self.units.remove(unit, u64::MAX);
                            Ok(0)
                        }
                    };
                }
            }
        }
    }

    /// Returns the prefix of `piece` that is present in `unit`, compared, and stays so while the shard is
    /// held.
    fn present_prefix(
        &self,
        unit: u64,
        piece: &Range<u64>,
        wait: Wait,
    ) -> io::Result<Option<(RwLockReadGuard<'_, Shard>, Range<u64>)>> {
        loop {
            match self.look_up(unit, piece, wait)? {
                Lookup::Absent => return Ok(None),
                Lookup::Unverified(_, blocks) => self.verify(unit, blocks, wait)?,
                Lookup::Present(shard, prefix) => return Ok(Some((shard, prefix))),
            }
        }
    }

    /// Looks up the prefix of `piece` that is present in `unit`.
    fn look_up(&self, unit: u64, piece: &Range<u64>, wait: Wait) -> io::Result<Lookup<'_>> {
        let shard = self.units.read(unit, wait)?;
        let Some(found) = shard.get(&unit) else { return Ok(Lookup::Absent) };
        let Some(prefix) = prefix_of(found, piece) else { return Ok(Lookup::Absent) };
        self.units.touch(found);
        let unverified = found.unverified & mask_of(&prefix);
        Ok(match unverified {
            0 => Lookup::Present(shard, prefix),
            _ => Lookup::Unverified(prefix, unverified),
        })
    }

    /// Calls `copy` with the host file and the longest prefix of `range` (bytes) that it holds in one
    /// piece; the prefix stays there during the call. Returns the prefix and the result of `copy`, or
    /// `None` when the first byte is not in the file.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] as for [`read_at`](Self::read_at); the errors of `copy`.
    pub(crate) fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<Option<(Range<u64>, u64)>> {
        let range = range.start..range.end.min(self.size);
        let Some((unit, piece)) = pieces(range).next() else { return Ok(None) };
        let Some((shard, found)) = self.present_prefix(unit, &piece, wait)? else {
            return Ok(None);
        };
        let copied = copy(self.file.as_fd(), found.clone())?;
        drop(shard);
        Ok(Some((found, copied)))
    }

    /// Returns the parts of `range` (bytes) that are not there: ascending, in whole blocks except at
    /// the end of the image, inside the image.
    pub(crate) fn missing(&self, range: &Range<u64>) -> Vec<Range<u64>> {
        if range.start >= self.size {
            return Vec::new();
        }
        let start = range.start - range.start % BLOCK_SIZE;
        let end = range.end.checked_next_multiple_of(BLOCK_SIZE).unwrap_or(u64::MAX);
        let mut missing: Vec<Range<u64>> = Vec::new();
        for (unit, piece) in pieces(start..end.min(self.size)) {
            for run in runs(mask_of(&piece) & !self.units.present(unit)) {
                let base = unit * UNIT_SIZE;
                let start = base + run.start * BLOCK_SIZE;
                let end = (base + run.end * BLOCK_SIZE).min(self.size);
                match missing.last_mut() {
                    Some(last) if last.end == start => last.end = end,
                    _ => missing.push(start..end),
                }
            }
        }
        self.overflow.subtract_from(missing)
    }

    /// Returns the start of the first block of `range` (bytes) that is not there; `None` when all are.
    pub(crate) fn first_missing(&self, range: &Range<u64>) -> Option<u64> {
        pieces(range.start..range.end.min(self.size)).find_map(|(unit, piece)| {
            match mask_of(&piece) & !self.units.present(unit) {
                0 => None,
                _ => self.missing(&piece).first().map(|missing| missing.start),
            }
        })
    }

    /// Returns what happened so far.
    pub(crate) fn counters(&self) -> CacheCounters {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        CacheCounters {
            hits: of(&counters.hits),
            hit_bytes: of(&counters.hit_bytes),
            misses: of(&counters.misses),
            stored_bytes: of(&counters.stored_bytes),
            evicted_bytes: of(&counters.evicted_bytes),
            dropped_bytes: of(&counters.dropped_bytes),
            overflowed_bytes: of(&counters.overflowed_bytes),
            present_bytes: self.units.blocks() * BLOCK_SIZE,
        }
    }

    /// Makes sure that nobody finds what is here any more, neither in this process nor, durably, in the
    /// directory: the image is about to be changed. Those who use the cache keep it.
    ///
    /// # Errors
    /// The host's errno; what is here may be found again then.
    pub(crate) fn discard(&self) -> io::Result<()> {
        self.is_discarded.store(true, Ordering::Release);
        self.persistent.as_ref().map_or(Ok(()), Persistent::discard)
    }

    /// Whether [`discard`](Self::discard) was called.
    pub(super) fn is_discarded(&self) -> bool {
        self.is_discarded.load(Ordering::Acquire)
    }

    /// Stops using the file, which the host cannot read: what is in it is fetched again, and kept in
    /// memory.
    fn give_up(&self, error: Option<io::Error>) {
        if self.is_broken.swap(true, Ordering::Relaxed) {
            return;
        }
        let error = error.unwrap_or_else(|| host::os_error(libc::ENODATA));
        log::warn!("the read cache is not used any more: its file cannot be read: {error}");
        let mut units = Vec::new();
        self.units.for_each(|unit, _| units.push(unit));
        for unit in units {
            self.units.remove(unit, u64::MAX);
        }
    }
}

/// Returns the prefix of `piece` that is present in the unit `found`.
fn prefix_of(found: &Unit, piece: &Range<u64>) -> Option<Range<u64>> {
    let first = piece.start % UNIT_SIZE / BLOCK_SIZE;
    let blocks = u64::from((found.present >> first).trailing_ones());
    let end = (piece.start / BLOCK_SIZE + blocks) * BLOCK_SIZE;
    (blocks > 0).then(|| piece.start..piece.end.min(end))
}

/// Returns the length of a range that fits into memory.
fn byte_len(range: &Range<u64>) -> usize {
    usize::try_from(range.end.saturating_sub(range.start)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
