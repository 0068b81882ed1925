//! How an overlay is changed: writes, zeroing, copies in, its size.
//!
//! ```text
//!   a first touch in part        |- before -|-- written --|- after -|   one block, written whole
//!                                 from below                below
//! ```

use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::blocks::{BlockIndex, Run, State};
use super::log::{Log, Purpose};
use super::ranges::{Held, Hold, Need};
use super::record::Record;
use super::sync::Pace;
use super::{LARGEST, Overlay, is_full};
use crate::extents::Kind;
use crate::host::errno;
use crate::layer::{Copy, Layer, ReadBelow, Wait, WritableLayer};
use crate::pool::check_wanted;

impl Overlay {
    /// The parts of `range` that only cover part of a block: its head and its tail (the same block
    /// may be both). A write that ends at the disk's end covers its last block.
    fn partial_blocks(&self, range: &Range<u64>) -> [Option<BlockIndex>; 2] {
        let head = !range.start.is_multiple_of(self.block);
        let tail = !range.end.is_multiple_of(self.block) && range.end < self.size();
        let first = BlockIndex(range.start / self.block);
        let last = BlockIndex(range.end / self.block);
        [head.then_some(first), (tail && (!head || first != last)).then_some(last)]
    }

    /// Locks `range` for writing: shared, but exclusive around a block that is touched for the
    /// first time and only in part.
    fn lock_for_write(&self, range: &Range<u64>, wait: Wait) -> io::Result<Held<'_>> {
        let shared = self.ranges.need(Need::default(), range, Hold::Shared);
        let busy = || errno(libc::EAGAIN);
        let partial = self.partial_blocks(range);
        let held = self.ranges.lock(shared, wait).ok_or_else(busy)?;
        let is_first_touch =
            |block: &BlockIndex| self.map.read().blocks.state(*block) != State::Data;
        if !partial.iter().flatten().any(is_first_touch) {
            // Shared is enough, and stays so: only an exclusive holder takes a block's data away.
            return Ok(held);
        }
        drop(held);
        let need = partial.iter().flatten().fold(shared, |need, block| {
            let bytes = self.bytes_of(&(*block..BlockIndex(block.0 + 1)));
            self.ranges.need(need, &bytes, Hold::Exclusive)
        });
        self.ranges.lock(need, wait).ok_or_else(busy)
    }

    /// The bytes of `range`, which lies inside one block that holds no data yet, as they read now.
    fn fill(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<Vec<u8>> {
        let len = usize::try_from(range.end - range.start).map_err(|_| errno(libc::EFBIG))?;
        let mut bytes = vec![0; len];
        if range.is_empty() {
            return Ok(bytes);
        }
        let extent = self.look_up(&range);
        if extent.kind == Kind::Lower {
            let len = usize::try_from(extent.len()).map_err(|_| errno(libc::EFBIG))?;
            below.read_below(&mut bytes[..len], range.start, wait)?;
        }
        Ok(bytes)
    }

    /// What has to be written before and after `range` so that the blocks it touches are whole.
    fn surroundings(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let start = range.start / self.block * self.block;
        let head = if self.is_held(start) { range.start } else { start };
        // Past the disk's end as well: with the bytes that an earlier, larger disk left there, a
        // sector could come out of a power cut half new and half as old as those.
        let end = range.end.next_multiple_of(self.block);
        let tail = if self.is_held(range.end - 1) { range.end } else { end };
        Ok((self.fill(head..range.start, below, wait)?, self.fill(range.end..tail, below, wait)?))
    }

    /// `ENOSPC` when making all of `blocks` Data would exceed the limit.
    fn check_limit(&self, blocks: &Range<BlockIndex>) -> io::Result<()> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let map = self.map.read();
        let new = blocks.end.0 - blocks.start.0 - map.blocks.count(blocks.clone(), State::Data);
        if new > 0 && map.blocks.data_blocks() + new > limit {
            return Err(errno(libc::ENOSPC));
        }
        Ok(())
    }

    /// Refuses to reserve space for `blocks` when the host would hold more for this layer than its
    /// limit: what is reserved is nobody else's, though no block of it is Data.
    fn check_reserved(&self, blocks: &Range<BlockIndex>) -> io::Result<()> {
        /// The host's own, for its list of extents.
        const OVERHEAD: u64 = 1 << 20;
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let taken = self.data.allocated()?;
        let map = self.map.read();
        let (held, data) =
            (map.blocks.data_blocks(), map.blocks.count(blocks.clone(), State::Data));
        let reserved =
            taken.saturating_sub(held * self.block).saturating_sub(OVERHEAD) / self.block;
        if held + reserved + (blocks.end.0 - blocks.start.0 - data) > limit {
            return Err(errno(libc::ENOSPC));
        }
        Ok(())
    }

    /// Puts `blocks` into `state`: in the log, then in the map. Returns the record's sequence.
    /// The caller has locked their ranges and, for Data, written them.
    pub(super) fn publish(&self, blocks: &Range<BlockIndex>, state: State) -> io::Result<u64> {
        let records: Vec<Record> = {
            let map = self.map.read();
            if map.blocks.run_at(blocks.clone()) == (Run { range: blocks.clone(), state }) {
                return Ok(0); // An overwrite: the usual case, and nothing to say.
            }
            let runs = map.blocks.runs(blocks.clone()).filter(|run| run.state != state);
            runs.map(|run| Record::Set { range: run.range, state }).take(2).collect()
        };
        let sequence = match &self.log {
            Some(log) => {
                let purpose = if state == State::Data { Purpose::Grow } else { Purpose::Relieve };
                // A whole-range record says the same as many: fewer bytes, one place.
                let whole = [Record::Set { range: blocks.clone(), state }];
                log.append(if records.len() > 1 { &whole } else { &records }, purpose)?
            }
            None => 0,
        };
        self.map.write().blocks.set(blocks.clone(), state);
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
        check_wanted()?;
        let blocks = self.blocks_of(&range);
        self.note_change(&blocks);
        self.check_limit(&blocks)?;
        let (before, after) = self.surroundings(&range, below, wait)?;
        check_wanted()?;
        let parts = [IoSlice::new(&before), IoSlice::new(buf), IoSlice::new(&after)];
        let first = usize::from(before.is_empty());
        let last = if after.is_empty() { 2 } else { 3 };
        self.put(&parts[first..last], offset - before.len() as u64, &blocks)
    }

    /// Writes `parts` at `offset` and makes `blocks`, the ones they fill, Data. The caller has
    /// locked their ranges.
    fn put(
        &self,
        parts: &[IoSlice<'_>],
        offset: u64,
        blocks: &Range<BlockIndex>,
    ) -> io::Result<()> {
        let written = self.data.write_at(parts, offset);
        // Also when it failed: some of it may be there, and is seen.
        self.note_written(blocks);
        let done = written.and_then(|()| self.publish(blocks, State::Data));
        if done.is_err() {
            // What was written of it takes space that no record speaks of.
            self.free(blocks, self.log.as_ref().map_or(0, Log::last));
        }
        done.map(|_| ())
    }

    /// Runs `change`; when the host is full and freed space is still waiting to go back, gives it
    /// back and tries once more. It writes `len` bytes of data.
    fn with_relief(
        &self,
        wait: Wait,
        len: u64,
        change: impl Fn() -> io::Result<()>,
    ) -> io::Result<()> {
        self.check_latch()?;
        let done = match change() {
            Err(error) if is_full(&error) && !self.pending.lock().is_empty() => match wait {
                Wait::No => Err(errno(libc::EAGAIN)),
                Wait::Yes => {
                    self.sync_all(Pace::Whole)?;
                    change()
                }
            },
            other => other,
        };
        if done.is_ok() {
            self.mark_dirty(len);
        }
        done
    }

    /// Zeros the part `range` of one block.
    fn zero_part(&self, range: &Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        let block = BlockIndex(range.start / self.block);
        let blocks = block..BlockIndex(block.0 + 1);
        let zeros = || vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        let state = self.map.read().blocks.state(block);
        match state {
            State::Zero => return Ok(()),
            State::Data => {
                let written = self.data.write_at(&[IoSlice::new(&zeros())], range.start);
                self.note_written(&blocks);
                return written;
            }
            State::Lower => {}
        }
        let lower = self.look_up(range);
        if lower.kind != Kind::Lower || below.is_zero_below(lower.range, wait)? {
            return Ok(());
        }
        self.check_limit(&blocks)?;
        let (before, after) = self.surroundings(range, below, wait)?;
        check_wanted()?;
        let zeros = zeros();
        let parts = [IoSlice::new(&before), IoSlice::new(&zeros), IoSlice::new(&after)];
        self.put(&parts, range.start - before.len() as u64, &blocks)
    }

    fn try_zero(&self, range: &Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        let need = self.ranges.need(Need::default(), range, Hold::Exclusive);
        let _held = self.ranges.lock(need, wait).ok_or_else(|| errno(libc::EAGAIN))?;
        check_wanted()?;
        self.note_change(&self.blocks_of(range));
        // The last block counts as whole when the range reaches the disk's end.
        let end = if range.end >= self.size() {
            range.end.next_multiple_of(self.block)
        } else {
            range.end
        };
        let whole = range.start.div_ceil(self.block)..end / self.block;
        if whole.start > whole.end {
            return self.zero_part(range, below, wait);
        }
        let head = range.start..range.end.min(whole.start * self.block);
        let tail = whole.end * self.block..range.end;
        for part in [head, tail] {
            if part.start < part.end {
                self.zero_part(&part, below, wait)?;
            }
        }
        let blocks = BlockIndex(whole.start)..BlockIndex(whole.end);
        if !blocks.is_empty() {
            let sequence = match self.publish(&blocks, State::Zero)? {
                // Nothing new, but space may have been reserved there since.
                0 => self.log.as_ref().map_or(0, Log::last),
                new => new,
            };
            self.free(&blocks, sequence);
        }
        Ok(())
    }

    /// Copies `range`, which starts and ends on block borders or at the disk's end, in from a
    /// host file: `copy` is given the data file and the place, and tells how much it took.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when there is no single host file for it; `ENOSPC`; what `copy` returns.
    pub fn copy_in(&self, range: &Range<u64>, copy: Copy<'_>) -> io::Result<u64> {
        self.check_latch()?;
        let file = self.data.backing(range.clone()).ok_or_else(|| errno(libc::EOPNOTSUPP))?;
        // A direct write reads what it writes only in part, and would put it back as it was before.
        let hold = if self.is_direct() { Hold::Exclusive } else { Hold::Shared };
        let need = self.ranges.need(Need::default(), range, hold);
        let _held = self.ranges.lock(need, Wait::Yes).ok_or_else(|| errno(libc::EAGAIN))?;
        check_wanted()?;
        self.note_change(&self.blocks_of(range));
        self.check_limit(&self.blocks_of(range))?;
        let copied = copy(file, range.clone());
        self.note_written(&self.blocks_of(range));
        let copied = copied?;
        let end = range.start + copied;
        // A block that was copied in part is not published: it keeps what it had.
        let whole = if end >= range.end { range.end } else { end / self.block * self.block };
        if whole > range.start {
            self.zero_past(whole)?;
            self.publish(&self.blocks_of(&(range.start..whole)), State::Data)?;
        }
        let len = whole.saturating_sub(range.start);
        self.mark_dirty(len);
        Ok(len)
    }
}

impl Overlay {
    /// Copies what `below` has into the blocks that `range` touches and this layer does not hold
    /// yet, and tells how many bytes. A write that races with it wins.
    ///
    /// # Errors
    /// As [`WritableLayer::write_at`].
    pub fn copy_up(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<u64> {
        self.check_latch()?;
        let blocks = self.blocks_of(range);
        let bytes = self.bytes_of(&blocks);
        let need = self.ranges.need(Need::default(), &bytes, Hold::Exclusive);
        let _held = self.ranges.lock(need, wait).ok_or_else(|| errno(libc::EAGAIN))?;
        check_wanted()?;
        let (lower, limit): (Vec<Run>, u64) = {
            let map = self.map.read();
            let lower = map.blocks.runs(blocks).filter(|run| run.state == State::Lower);
            (lower.collect(), map.lower_limit.min(map.size))
        };
        let mut copied = 0;
        for run in lower {
            let bytes = self.bytes_of(&run.range);
            let seen = bytes.start..bytes.end.min(limit);
            if seen.is_empty() {
                continue;
            }
            let blocks = self.blocks_of(&seen);
            self.check_limit(&blocks)?;
            // Whole blocks: what is past the limit reads as zeros.
            let whole = self.bytes_of(&blocks);
            let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(0);
            let mut buf = vec![0; len(&whole)];
            below.read_below(&mut buf[..len(&seen)], seen.start, wait)?;
            check_wanted()?;
            self.note_change(&blocks);
            self.put(&[IoSlice::new(&buf)], whole.start, &blocks)?;
            copied += seen.end - seen.start;
        }
        if copied > 0 {
            self.mark_dirty(copied);
        }
        Ok(copied)
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
        self.with_relief(wait, buf.len() as u64, || self.try_write(buf, offset, below, wait))
    }

    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.with_relief(wait, 0, || self.try_zero(&range, below, wait))
    }

    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        // A zeroed block holds no space here either: the two are one.
        self.zero(range, below, wait)
    }

    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()> {
        // Whole blocks: a write of one byte takes all of its.
        let blocks = self.blocks_of(&range);
        let bytes = self.bytes_of(&blocks);
        let allocated = self.with_relief(wait, 0, || {
            // Shared with writers, not with what gives space back.
            let need = self.ranges.need(Need::default(), &bytes, Hold::Shared);
            let _held = self.ranges.lock(need, wait).ok_or_else(|| errno(libc::EAGAIN))?;
            check_wanted()?;
            self.check_limit(&blocks)?;
            self.check_reserved(&blocks)?;
            self.pending.lock().remove(&bytes);
            self.data.allocate(bytes.clone()).inspect_err(|_| {
                // The host may have reserved a part. What holds no data by then is given back: once
                // every record up to now is vouched, for one of them may have freed what lies here.
                let sequence = self.log.as_ref().map_or(0, Log::last);
                self.pending.lock().add(bytes.clone(), sequence);
            })
        });
        if allocated.as_ref().is_err_and(is_full) && wait == Wait::Yes {
            self.sync_all(Pace::Whole)?;
        }
        allocated
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.check_latch()?;
        if size > LARGEST {
            return Err(errno(libc::EFBIG));
        }
        let (old, lower_limit) = {
            let map = self.map.read();
            (map.size, map.lower_limit)
        };
        if size == old {
            return Ok(());
        }
        if size > old && self.is_held(old) {
            self.zero_past(old)?;
        }
        // Empty when the disk grows. Locked although the gate is ours: a sync may be giving back
        // what was freed earlier, and must not see these blocks free before they wait their turn.
        let cut = BlockIndex(size.div_ceil(self.block))..BlockIndex(old.div_ceil(self.block));
        let need = self.ranges.need(Need::default(), &self.bytes_of(&cut), Hold::Exclusive);
        let _held = self.ranges.lock(need, Wait::Yes).ok_or_else(|| errno(libc::EAGAIN))?;
        let lower_limit = lower_limit.min(size);
        self.note_size(size);
        let sequence = match &self.log {
            Some(log) => {
                let purpose = if size > old { Purpose::Grow } else { Purpose::Relieve };
                log.append(&[Record::Size { size, lower_limit }], purpose)?
            }
            None => 0,
        };
        self.map.write().resize(size, lower_limit, self.block);
        self.revision.fetch_add(1, Ordering::Release);
        self.free(&cut, sequence);
        if size < old
            && self.is_held(size)
            && let Err(error) = self.zero_past(size)
        {
            // Done before the disk grows in any case; now only for what `surroundings` says.
            ::log::debug!("the tail of the last block is not zeroed yet: {error}");
        }
        self.mark_dirty(0);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all(Pace::Quick)
    }

    fn is_latched(&self) -> bool {
        Overlay::is_latched(self)
    }
}

impl Overlay {
    /// Whether the block of byte `at` is Data.
    fn is_held(&self, at: u64) -> bool {
        self.map.read().blocks.state(BlockIndex(at / self.block)) == State::Data
    }

    /// Zeros what the data file holds from `at`, the disk's end, to the end of that block: it may
    /// be bytes from before the disk shrank.
    fn zero_past(&self, at: u64) -> io::Result<()> {
        let end = at.next_multiple_of(self.block);
        if at < end {
            let zeros = vec![0; usize::try_from(end - at).map_err(|_| errno(libc::EFBIG))?];
            let written = self.data.write_at(&[IoSlice::new(&zeros)], at);
            self.note_written(&self.blocks_of(&(at..end)));
            return written;
        }
        Ok(())
    }
}
