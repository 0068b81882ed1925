//! Changes of an overlay: writes, and everything that a [`WritableLayer`] does.
//!
//! ```text
//!   a first touch in part        |- before -|-- written --|- after -|   one block, written whole
//!                                 from below                below
//! ```

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::range_locks::{LockMode, StripeGuard, StripeSet};
use super::record::LogRecord;
use super::record_log::{Log, ReserveUse};
use super::state::{BlockIndex, BlockRun, BlockState};
use super::sync::SyncMode;
use super::{MAX_DISK_SIZE, Overlay};
use crate::extents::ExtentKind;
use crate::host::{is_out_of_space, os_error};
use crate::layer::{Layer, ReadBelow, Wait, WritableLayer};
use crate::pool::check_cancelled;

impl Overlay {
    /// Returns the blocks that `range` covers only in part: its head and its tail (which may be the
    /// same block). A write that ends at the disk's end covers the last block completely.
    fn partial_blocks(&self, range: &Range<u64>) -> [Option<BlockIndex>; 2] {
        let head = !range.start.is_multiple_of(self.block_size);
        let tail = !range.end.is_multiple_of(self.block_size) && range.end < self.size();
        let first = BlockIndex(range.start / self.block_size);
        let last = BlockIndex(range.end / self.block_size);
        [head.then_some(first), (tail && (!head || first != last)).then_some(last)]
    }

    /// Locks `range` for writing: shared, but exclusive around a block that is touched for the
    /// first time and only in part.
    fn lock_for_write(&self, range: &Range<u64>, wait: Wait) -> io::Result<StripeGuard<'_>> {
        let shared = self.range_locks.include(StripeSet::default(), range, LockMode::Shared);
        let busy = || os_error(libc::EAGAIN);
        let partial = self.partial_blocks(range);
        let held = self.range_locks.lock(shared, wait).ok_or_else(busy)?;
        let is_first_touch =
            |block: &BlockIndex| self.map.read().blocks.state(*block) != BlockState::Data;
        if !partial.iter().flatten().any(is_first_touch) {
            // A shared lock is enough and stays enough: only an exclusive holder takes a block's
            // data away.
            return Ok(held);
        }
        drop(held);
        let need = partial.iter().flatten().fold(shared, |need, block| {
            let bytes = self.bytes_of(&(*block..BlockIndex(block.0 + 1)));
            self.range_locks.include(need, &bytes, LockMode::Exclusive)
        });
        self.range_locks.lock(need, wait).ok_or_else(busy)
    }

    /// Returns whether the block that contains byte `at` is Data.
    fn has_data_at(&self, at: u64) -> bool {
        self.map.read().blocks.state(BlockIndex(at / self.block_size)) == BlockState::Data
    }

    /// Reads the current bytes of `range`, which lies inside one block that holds no data yet.
    fn read_current(
        &self,
        range: Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start).map_err(|_| os_error(libc::EFBIG))?;
        let mut bytes = vec![0; len];
        if range.is_empty() {
            return Ok(bytes);
        }
        let extent = self.look_up(&range);
        if extent.kind == ExtentKind::Lower {
            let len = usize::try_from(extent.len()).map_err(|_| os_error(libc::EFBIG))?;
            below.read_below(&mut bytes[..len], range.start, wait)?;
        }
        Ok(bytes)
    }

    /// Returns the bytes to write before and after `range` so that every block it touches is
    /// written whole.
    pub(super) fn block_padding(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let start = range.start / self.block_size * self.block_size;
        let head = if self.has_data_at(start) { range.start } else { start };
        // The padding also covers the part past the disk's end. That part may still hold bytes of
        // an earlier, larger disk, and a power cut could leave a sector half new and half that old.
        let end = range.end.next_multiple_of(self.block_size);
        let tail = if self.has_data_at(range.end - 1) { range.end } else { end };
        Ok((
            self.read_current(head..range.start, below, wait)?,
            self.read_current(range.end..tail, below, wait)?,
        ))
    }

    /// Returns the bytes of the layers below that a change needs which starts at `start` and goes to
    /// the disk's end or past it: those of the block that it covers only in part. Empty if none.
    #[must_use]
    pub(crate) fn needed_below(&self, start: u64) -> Range<u64> {
        let block = start / self.block_size * self.block_size;
        if block < start {
            let found = self.look_up(&(block..block.saturating_add(self.block_size)));
            if found.kind == ExtentKind::Lower {
                return found.range;
            }
        }
        start..start
    }

    /// Sets `blocks` to `state`: first in the log, then in the map. Returns the record's sequence.
    /// The caller has locked their ranges and, for Data, written them.
    pub(super) fn publish(&self, blocks: &Range<BlockIndex>, state: BlockState) -> io::Result<u64> {
        let records: Vec<LogRecord> = {
            let map = self.map.read();
            if map.blocks.run_at(blocks.clone()) == (BlockRun { range: blocks.clone(), state }) {
                return Ok(0); // An overwrite, the usual case: nothing to record.
            }
            let runs = map.blocks.runs(blocks.clone()).filter(|run| run.state != state);
            runs.map(|run| LogRecord::Set { range: run.range, state }).take(2).collect()
        };
        let sequence = match &self.log {
            Some(log) => {
                let reserve_use =
                    if state == BlockState::Data { ReserveUse::Keep } else { ReserveUse::Partial };
                // One record of the whole range says the same as many and takes fewer bytes.
                let whole = [LogRecord::Set { range: blocks.clone(), state }];
                log.append(if records.len() > 1 { &whole } else { &records }, reserve_use)?
            }
            None => 0,
        };
        self.map.write().blocks.set(blocks.clone(), state);
        self.uncount_reserved(blocks);
        self.revision.fetch_add(1, Ordering::Release);
        Ok(sequence)
    }

    fn try_write(
        &self,
        buf: &[u8],
        offset: u64,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        let _held = self.lock_for_write(&range, wait)?;
        check_cancelled()?;
        let blocks = self.blocks_of(&range);
        self.commit.note_change(&blocks);
        self.check_limit(&blocks)?;
        let (before, after) = self.block_padding(&range, below, wait)?;
        check_cancelled()?;
        let parts = [IoSlice::new(&before), IoSlice::new(buf), IoSlice::new(&after)];
        let first = usize::from(before.is_empty());
        let last = if after.is_empty() { 2 } else { 3 };
        self.write_blocks(&parts[first..last], offset - before.len() as u64, &blocks)
    }

    /// Writes `parts` at `offset` and makes `blocks`, which they fill, Data. The caller has locked
    /// the ranges of these blocks.
    pub(super) fn write_blocks(
        &self,
        parts: &[IoSlice<'_>],
        offset: u64,
        blocks: &Range<BlockIndex>,
    ) -> io::Result<()> {
        let written = self.data.write_at(parts, offset);
        // Also after a failure: some of the bytes may have been written and are visible.
        self.note_written(blocks);
        let done = written.and_then(|()| self.publish(blocks, BlockState::Data));
        if done.is_err() {
            // Whatever was written takes space that no record mentions.
            self.defer_free(blocks, self.log.as_ref().map_or(0, Log::last_sequence));
        }
        done.map(|_| ())
    }

    /// Runs `change`, which writes `len` bytes of data. When the host is full and freed space is
    /// still waiting to be returned, returns that space and tries once more.
    fn retry_when_full(
        &self,
        wait: Wait,
        len: u64,
        change: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        self.check_writable()?;
        let done = match change() {
            Err(error) if is_out_of_space(&error) && !self.pending.lock().is_empty() => {
                match wait {
                    Wait::No => Err(os_error(libc::EAGAIN)),
                    Wait::Yes => {
                        self.sync_all(SyncMode::Full)?;
                        change()
                    }
                }
            }
            other => other,
        };
        if done.is_ok() {
            self.mark_dirty(len);
        }
        done
    }
}

impl WritableLayer for Overlay {
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        self.retry_when_full(wait, buf.len() as u64, || self.try_write(buf, offset, below, wait))
    }

    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.retry_when_full(wait, 0, || self.try_zero(&range, below, wait))
    }

    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        // Zero blocks hold no space here, so zeroing and punching are the same.
        self.zero(range, below, wait)
    }

    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()> {
        // Whole blocks are reserved, because a write of one byte takes a whole block.
        let blocks = self.blocks_of(&range);
        let bytes = self.bytes_of(&blocks);
        let allocated = self.retry_when_full(wait, 0, || {
            // Compatible with writers, but not with anything that frees space.
            let _held = self.range_locks.lock_range(&bytes, LockMode::Shared, wait)?;
            check_cancelled()?;
            self.check_limit(&blocks)?;
            self.check_reservation(&blocks)?;
            self.pending.lock().remove(&bytes);
            self.has_reserved.store(true, Ordering::Relaxed);
            self.count_reserved(&blocks);
            self.data.allocate(bytes.clone()).inspect_err(|_| {
                // The host may have reserved a part. Blocks that hold no data by then are freed
                // once every record so far is vouched, because one of those records may have freed
                // the blocks in `bytes`.
                self.uncount_reserved(&blocks);
                let sequence = self.log.as_ref().map_or(0, Log::last_sequence);
                self.pending.lock().add(bytes.clone(), sequence);
            })
        });
        if allocated.as_ref().is_err_and(is_out_of_space) && wait == Wait::Yes {
            self.sync_all(SyncMode::Full)?;
        }
        allocated
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.check_writable()?;
        if size > MAX_DISK_SIZE {
            return Err(os_error(libc::EFBIG));
        }
        let (old, lower_limit) = {
            let map = self.map.read();
            (map.size, map.lower_limit)
        };
        if size == old {
            return Ok(());
        }
        if size > old && self.has_data_at(old) {
            self.zero_block_tail(old)?;
        }
        // The range is empty when the disk grows. The lock is needed although the caller holds the
        // gate: a sync may be punching space that was freed earlier, and must not see these blocks
        // as free before they are queued under their own sequence.
        let cut =
            BlockIndex(size.div_ceil(self.block_size))..BlockIndex(old.div_ceil(self.block_size));
        let _held =
            self.range_locks.lock_range(&self.bytes_of(&cut), LockMode::Exclusive, Wait::Yes)?;
        let lower_limit = lower_limit.min(size);
        self.commit.note_size(size);
        let sequence = match &self.log {
            Some(log) => {
                let reserve_use = if size > old { ReserveUse::Keep } else { ReserveUse::Partial };
                log.append(&[LogRecord::Size { size, lower_limit }], reserve_use)?
            }
            None => 0,
        };
        self.map.write().resize(size, lower_limit, self.block_size);
        self.revision.fetch_add(1, Ordering::Release);
        self.defer_free(&cut, sequence);
        if size < old
            && self.has_data_at(size)
            && let Err(error) = self.zero_block_tail(size)
        {
            // The tail is zeroed before the disk grows in any case; zeroing it here only avoids the
            // mixed sector described in `block_padding`.
            log::debug!("the tail of the last block is not zeroed yet: {error}");
        }
        self.mark_dirty(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all(SyncMode::Fast)
    }

    fn is_latched(&self) -> bool {
        Overlay::is_latched(self)
    }
}
