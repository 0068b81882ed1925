//! Returning space to the host: queued when the map lets go of blocks, punched by a later sync.
//!
//! ```text
//!   the record that frees   ->   vouched by a sync   ->   no reader left   ->   punched
//!   queued in `pending`                                    `readers.drain`       and unqueued
//! ```
//!
//! Space that was reserved and not written has no record. It goes back with the blocks that are
//! freed, when the layer is sealed, and in a recovery.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Overlay;
use super::range_locks::LockMode;
use super::record_log::Log;
use super::state::{BlockIndex, BlockState};
use crate::layer::{Layer, Wait};

/// The most bytes held by the host that are freed under one range lock: 1 GiB.
const FREE_CHUNK: u64 = 1 << 30;
/// The most bytes freed under one range lock while changes are in progress nearby: 1 MiB, so that
/// few of the range locks are needed.
const SMALL_FREE_CHUNK: u64 = 1 << 20;

impl Overlay {
    /// Queues the space of `blocks` to be freed once record `sequence` is vouched.
    pub(super) fn defer_free(&self, blocks: &Range<BlockIndex>, sequence: u64) {
        if sequence > 0 || self.log.is_none() {
            self.uncount_reserved(blocks);
            self.pending.lock().add(self.bytes_of(blocks), sequence);
        }
    }

    /// Queues all space that the map does not call Data to be freed by the next sync. After a
    /// recovery, the data file may hold blocks that no record mentions.
    pub(super) fn reclaim(&self) {
        let len = self.data.len().unwrap_or(0).max(self.size());
        let end = len.next_multiple_of(self.block_size);
        let sequence = self.log.as_ref().map_or(0, Log::last_sequence);
        self.pending.lock().add(0..end, sequence);
    }

    /// Notes whether the host holds more than the Data of a layer that was just opened.
    pub(super) fn find_reserved(&self) {
        let held = self.data.allocated().unwrap_or(0);
        self.has_reserved.store(held > self.usage().data, Ordering::Relaxed);
    }

    /// Returns the space freed by records up to `durable` to the host, except where it was reused.
    ///
    /// Ranges that are being changed are left for the next sync: a change may be waiting for a base
    /// that hangs, and a sync must not wait for that.
    ///
    /// The number of steps depends on the space held by the host, not on the bytes that were freed:
    /// a range without space is one piece, however long, and stays one piece when part of it is
    /// being changed.
    pub(super) fn release_freed(&self, durable: u64) {
        let (mut from, mut most) = (0, FREE_CHUNK);
        loop {
            let Some(waiting) = self.pending.lock().first(&(from..u64::MAX), durable) else {
                return;
            };
            let (piece, holds_space) = self.next_free_chunk(&waiting, most);
            let Ok(_held) = self.range_locks.lock_range(&piece, LockMode::Exclusive, Wait::No)
            else {
                if most == SMALL_FREE_CHUNK || !holds_space {
                    from = piece.end;
                }
                most = SMALL_FREE_CHUNK;
                continue;
            };
            // Under the lock, every change of this piece is complete: map and `pending` agree.
            let parts = self.pending.lock().within(&piece, durable);
            self.readers.drain();
            for part in &parts {
                if let Err(error) = self.punch_unused(part) {
                    // Keeping the space loses no data, and a host that cannot punch holes never
                    // will.
                    log::debug!("space is not given back: {error}");
                }
                self.pending.lock().remove(part);
            }
            from = piece.end;
            most = (most * 2).min(FREE_CHUNK);
        }
    }

    /// Returns the first piece of `waiting`, in whole blocks, and whether the host may hold space
    /// for it: at most `most` bytes if so, otherwise everything up to the next space.
    fn next_free_chunk(&self, waiting: &Range<u64>, most: u64) -> (Range<u64>, bool) {
        let Range { start, end } = *waiting;
        if end - start <= SMALL_FREE_CHUNK {
            return (start..end, true);
        }
        match self.data.next_allocated(start..end) {
            None => (start..end, false),
            Some(at) if at - start >= self.block_size => (start..at - at % self.block_size, false),
            Some(_) => (start..end.min(start.saturating_add(most)), true),
        }
    }

    /// Punches the blocks in `part` that the map does not call Data.
    fn punch_unused(&self, part: &Range<u64>) -> io::Result<()> {
        let mut free: Vec<Range<u64>> = Vec::new();
        {
            let map = self.map.read();
            let runs = map.blocks.runs(self.blocks_of(part));
            for run in runs.filter(|run| run.state != BlockState::Data) {
                let bytes = self.bytes_of(&run.range);
                // Adjacent Lower and Zero runs form one hole.
                match free.last_mut() {
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => free.push(bytes),
                }
            }
        }
        free.into_iter().try_for_each(|range| self.data.punch_hole(range))
    }
}
