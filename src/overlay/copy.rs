//! Copies into an overlay: from a host file, and up from the layers below.

use std::io::{self, IoSlice};
use std::ops::Range;

use super::Overlay;
use super::range_locks::LockMode;
use super::state::{BlockRun, BlockState};
use crate::host::os_error;
use crate::layer::{CopyFn, ReadBelow, Wait};
use crate::pool::check_cancelled;

impl Overlay {
    /// Copies a host file's bytes into `range`, which starts and ends on block borders or at the
    /// disk's end. `copy` receives the data file and the range in it, and returns the number of
    /// bytes copied.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when no single host file holds the range; `ENOSPC`; the errors of `copy`.
    pub fn copy_in(&self, range: &Range<u64>, copy: CopyFn<'_>) -> io::Result<u64> {
        self.check_writable()?;
        let file = self.data.host_fd(range.clone()).ok_or_else(|| os_error(libc::EOPNOTSUPP))?;
        // Not even overwrites may come between: the host copies for as long as the source takes, and
        // goes on when this request was given up. And a direct write of part of a unit reads the whole
        // unit first and would write back its old bytes.
        let _held = self.range_locks.lock_range(range, LockMode::Exclusive, Wait::Yes)?;
        check_cancelled()?;
        self.commit.note_change(&self.blocks_of(range));
        self.check_limit(&self.blocks_of(range))?;
        let copied = copy(file, range.clone());
        self.note_written(&self.blocks_of(range));
        let copied = copied?;
        let end = range.start + copied;
        // A block that was copied only in part is not published and keeps its old contents.
        let whole =
            if end >= range.end { range.end } else { end / self.block_size * self.block_size };
        if whole > range.start {
            self.zero_block_tail(whole)?;
            self.publish(&self.blocks_of(&(range.start..whole)), BlockState::Data)?;
        }
        let len = whole.saturating_sub(range.start);
        self.mark_dirty(len);
        Ok(len)
    }

    /// Copies the bytes of `below` into the blocks that `range` touches and this layer does not
    /// hold yet. Returns the number of bytes copied. A write that races with the copy wins.
    ///
    /// # Errors
    /// The errors of [`write_at`](crate::layer::WritableLayer::write_at).
    pub fn copy_up(
        &self,
        range: &Range<u64>,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<u64> {
        self.check_writable()?;
        let blocks = self.blocks_of(range);
        let bytes = self.bytes_of(&blocks);
        let _held = self.range_locks.lock_range(&bytes, LockMode::Exclusive, wait)?;
        check_cancelled()?;
        let (lower, lower_limit): (Vec<BlockRun>, u64) = {
            let map = self.map.read();
            let lower = map.blocks.runs(blocks).filter(|run| run.state == BlockState::Lower);
            (lower.collect(), map.lower_limit.min(map.size))
        };
        let mut copied = 0;
        for run in lower {
            let bytes = self.bytes_of(&run.range);
            let seen = bytes.start..bytes.end.min(lower_limit);
            if seen.is_empty() {
                continue;
            }
            let blocks = self.blocks_of(&seen);
            self.check_limit(&blocks)?;
            // Whole blocks are written: the part past the lower limit reads as zeros.
            let whole = self.bytes_of(&blocks);
            let len = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(0);
            let mut buf = vec![0; len(&whole)];
            below.read_below(&mut buf[..len(&seen)], seen.start, wait)?;
            check_cancelled()?;
            self.commit.note_change(&blocks);
            self.write_blocks(&[IoSlice::new(&buf)], whole.start, &blocks)?;
            copied += seen.end - seen.start;
        }
        if copied > 0 {
            self.mark_dirty(copied);
        }
        Ok(copied)
    }
}

#[cfg(test)]
mod tests {
    use super::super::keep::temporary;
    use super::*;
    use crate::base::testing::UnreachableBelow;
    use crate::layer::WritableLayer;

    #[test]
    fn no_write_of_the_same_bytes_comes_between_a_copy() {
        let dir = tempfile::tempdir_in("/var/tmp").unwrap();
        let overlay = temporary(dir.path(), 4096, 1 << 20, 0, None).unwrap();
        let write = |wait| overlay.write_at(&[7; 4096], 8192, &UnreachableBelow, wait);
        write(Wait::Yes).unwrap();
        let copied = overlay.copy_in(&(0..65_536), &mut |_, range| {
            // The block is there already, and is only overwritten.
            let refused = write(Wait::No).unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
            Ok(range.end - range.start)
        });
        assert_eq!(copied.unwrap(), 65_536);
        write(Wait::No).unwrap();
    }
}
