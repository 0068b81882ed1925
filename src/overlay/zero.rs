//! Zeroing in an overlay.
//!
//! ```text
//!   block      |-----------|-----------|-----------|-----------|
//!   range            |-----------------------------------|
//!              | head written | whole blocks become | tail written |
//!              | as zeros     | Zero, space freed   | as zeros     |
//! ```

use std::io::{self, IoSlice};
use std::ops::Range;

use super::Overlay;
use super::range_locks::LockMode;
use super::record_log::Log;
use super::state::{BlockIndex, BlockState};
use crate::extents::ExtentKind;
use crate::host::os_error;
use crate::layer::{Layer, ReadBelow, Wait};
use crate::pool::check_cancelled;

impl Overlay {
    /// Zeros `range`, which is a part of one block.
    fn zero_partial_block(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        let block = BlockIndex(range.start / self.block_size);
        let blocks = block..BlockIndex(block.0 + 1);
        let zeros = || vec![0; usize::try_from(range.end - range.start).unwrap_or(0)];
        let state = self.map.read().blocks.state(block);
        match state {
            BlockState::Zero => return Ok(()),
            BlockState::Data => {
                let written = self.data.write_at(&[IoSlice::new(&zeros())], range.start);
                self.note_written(&blocks);
                return written;
            }
            BlockState::Lower => {}
        }
        let lower = self.look_up(range);
        if lower.kind != ExtentKind::Lower || below.is_zero_below(lower.range, wait)? {
            return Ok(());
        }
        self.check_limit(&blocks)?;
        let (before, after) = self.block_padding(range, below, wait)?;
        check_cancelled()?;
        let zeros = zeros();
        let parts = [IoSlice::new(&before), IoSlice::new(&zeros), IoSlice::new(&after)];
        self.write_blocks(&parts, range.start - before.len() as u64, &blocks)
    }

    pub(super) fn try_zero(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        let _held = self.range_locks.lock_range(range, LockMode::Exclusive, wait)?;
        check_cancelled()?;
        self.commit.note_change(&self.blocks_of(range));
        // The last block counts as whole when the range reaches the disk's end.
        let end = if range.end >= self.size() {
            range.end.next_multiple_of(self.block_size)
        } else {
            range.end
        };
        let whole = range.start.div_ceil(self.block_size)..end / self.block_size;
        if whole.start > whole.end {
            return self.zero_partial_block(range, below, wait);
        }
        let head = range.start..range.end.min(whole.start * self.block_size);
        let tail = whole.end * self.block_size..range.end;
        for part in [head, tail] {
            if part.start < part.end {
                self.zero_partial_block(&part, below, wait)?;
            }
        }
        let blocks = BlockIndex(whole.start)..BlockIndex(whole.end);
        if !blocks.is_empty() {
            let sequence = match self.publish(&blocks, BlockState::Zero)? {
                // The blocks are Zero already, but space may have been reserved there since.
                0 => self.log.as_ref().map_or(0, Log::last_sequence),
                new => new,
            };
            self.defer_free(&blocks, sequence);
        }
        Ok(())
    }

    /// Zeros the data file from `at`, the disk's end, to the end of that block: the bytes there may
    /// be older than a shrink of the disk.
    pub(super) fn zero_block_tail(&self, at: u64) -> io::Result<()> {
        let end = at.next_multiple_of(self.block_size);
        if at < end {
            let zeros = vec![0; usize::try_from(end - at).map_err(|_| os_error(libc::EFBIG))?];
            let written = self.data.write_at(&[IoSlice::new(&zeros)], at);
            self.note_written(&self.blocks_of(&(at..end)));
            return written;
        }
        Ok(())
    }
}
