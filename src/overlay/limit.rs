//! The space that an overlay's data takes, and the limit on it, the disk key `limit`, which is checked
//! before a change takes space.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::Overlay;
use super::state::{BlockIndex, BlockState};
use crate::host::os_error;

/// The space that an overlay's blocks take, for display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes in Data blocks.
    pub data: u64,
    /// Bytes in Zero blocks, which hide the base.
    pub zero: u64,
}

impl Overlay {
    /// Returns the space that the overlay's blocks take.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let map = self.map.read();
        Usage {
            // A log may name blocks past the last byte offset, so the product may overflow.
            data: map.blocks.data_blocks().saturating_mul(self.block_size),
            zero: map.blocks.zero_blocks().saturating_mul(self.block_size),
        }
    }

    /// Caps the bytes of data that the overlay may hold from now on.
    pub fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit.map(|limit| limit / self.block_size);
    }

    /// Refuses to make all of `blocks` Data when that would exceed the limit, what is reserved
    /// elsewhere included.
    ///
    /// # Errors
    /// `ENOSPC`.
    #[inline]
    pub(super) fn check_limit(&self, blocks: &Range<BlockIndex>) -> io::Result<()> {
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let map = self.map.read();
        let new =
            blocks.end.0 - blocks.start.0 - map.blocks.count(blocks.clone(), BlockState::Data);
        if new > 0 && map.blocks.data_blocks() + new + self.reserved_outside(blocks) > limit {
            return Err(os_error(libc::ENOSPC));
        }
        Ok(())
    }

    /// Returns the number of blocks outside `blocks` that are known to be reserved.
    fn reserved_outside(&self, blocks: &Range<BlockIndex>) -> u64 {
        if !self.has_reserved.load(Ordering::Relaxed) {
            return 0;
        }
        let reserved = self.reserved.lock();
        reserved.data_blocks() - reserved.count(blocks.clone(), BlockState::Data)
    }

    /// Counts those of `blocks` that are not Data as reserved.
    pub(super) fn count_reserved(&self, blocks: &Range<BlockIndex>) {
        if self.limit.is_none() {
            return;
        }
        let map = self.map.read();
        // Taken under the map: a block that becomes Data is in no case counted afterwards.
        let mut reserved = self.reserved.lock();
        for run in map.blocks.runs(blocks.clone()).filter(|run| run.state != BlockState::Data) {
            reserved.set(run.range, BlockState::Data);
        }
    }

    /// Counts `blocks` as reserved no more: they have become Data, or their space is given back.
    /// Called after the map was changed.
    pub(super) fn uncount_reserved(&self, blocks: &Range<BlockIndex>) {
        if self.limit.is_some() && self.has_reserved.load(Ordering::Relaxed) {
            self.reserved.lock().set(blocks.clone(), BlockState::Lower);
        }
    }

    /// Refuses to reserve space for `blocks` when the host would then hold more for this layer than
    /// its limit: reserved space is not available to others, although none of its blocks is Data.
    ///
    /// # Errors
    /// `ENOSPC`; the host's errno.
    pub(super) fn check_reservation(&self, blocks: &Range<BlockIndex>) -> io::Result<()> {
        /// Bytes that the host may need for its own list of extents.
        const HOST_OVERHEAD: u64 = 1 << 20;
        let Some(limit) = self.limit else {
            return Ok(());
        };
        let taken = self.data.allocated()?;
        let map = self.map.read();
        let (held, data) =
            (map.blocks.data_blocks(), map.blocks.count(blocks.clone(), BlockState::Data));
        let reserved = taken.saturating_sub(held * self.block_size).saturating_sub(HOST_OVERHEAD)
            / self.block_size;
        if held + reserved + (blocks.end.0 - blocks.start.0 - data) > limit {
            return Err(os_error(libc::ENOSPC));
        }
        Ok(())
    }
}
