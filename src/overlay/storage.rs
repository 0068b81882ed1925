//! The files of a layer on the host (the sparse `data` file, the `log` and the `journal`) behind one
//! trait.
//!
//! Every block is stored at its own disk offset in `data`, which is a [`HostFile`]. The trait exists
//! for the tests: they use a file in memory that forgets all data that was not synced.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;

use rustix::fs::FallocateFlags;

use super::fiemap::{Fiemap, Flush};
use super::host_file::{Create, HostFile, SEGMENT_LEN};
use crate::host;
use crate::layer::Wait;

/// A host file with the operations that a layer needs. Offsets and ranges are in bytes.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
pub trait Storage: Send + Sync {
    /// Fills `buf` from `offset` on; bytes past the end of the file read as zeros.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the read would have to wait; otherwise the host's errno.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()>;

    /// Writes all `parts`, one after the other, at `offset`.
    ///
    /// # Errors
    /// The host's errno.
    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Frees the space of `range`, which reads as zeros afterwards. Space past the end of the file
    /// may stay.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where the file system cannot punch holes.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Reserves space for `range` without changing its contents, and makes the file at least that
    /// long: [`punch_hole`](Self::punch_hole) does not reach space past the end of a file (ext4). So
    /// a later write into `range` does not change the length, and its sync has to write nothing but
    /// the data.
    ///
    /// # Errors
    /// `ENOSPC`, when a part may have been reserved; `EOPNOTSUPP` where the file system cannot
    /// reserve space.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;

    /// Returns the bytes that the file takes on the host, including space that is only reserved; 0
    /// where this is unknown.
    ///
    /// # Errors
    /// The host's errno.
    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    /// Truncates the file to `len`, including the space reserved past it.
    ///
    /// # Errors
    /// The host's errno.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// Returns the length of the file in bytes; with several segments, the end of the last one.
    ///
    /// # Errors
    /// The host's errno.
    fn len(&self) -> io::Result<u64>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The host's errno.
    fn sync(&self) -> io::Result<()>;

    /// Returns the first offset at or after `offset` where the file may hold bytes other than
    /// zeros: `offset` itself when the host does not know, `None` when there is no such byte. Only
    /// for a file that nobody is writing to.
    fn next_data(&self, offset: u64) -> Option<u64> {
        Some(offset)
    }

    /// Returns the first offset in `range` where the host may hold space: the start of `range` when
    /// the host does not know, `None` when there is no such space.
    ///
    /// The answer is a hint: space written concurrently may be missed, and on a host without FIEMAP
    /// also space that was reserved and not written yet.
    fn next_allocated(&self, range: Range<u64>) -> Option<u64>;

    /// Drops the host's cache of the file, so that the next read comes from the device.
    fn drop_cache(&self);

    /// Returns the host file that holds all of `range` at the range's own offsets, if there is one.
    fn host_fd(&self, range: Range<u64>) -> Option<BorrowedFd<'_>>;

    /// Returns the host file behind this storage, if there is one.
    fn host_file(&self) -> Option<&HostFile>;
}

/// Does the work of [`Storage::next_allocated`] for one file.
fn next_allocated_in(file: &File, range: Range<u64>) -> Option<u64> {
    let next = match Fiemap::starting_at(file, range.start, Flush::No).next() {
        Ok(extent) => extent?.range.start,
        // A host that does not report its extents may still report where data is.
        Err(_) => next_data_in(file, range.start)?,
    };
    (next < range.end).then_some(next.max(range.start))
}

/// Does the work of [`Storage::next_data`] for one file.
fn next_data_in(file: &File, offset: u64) -> Option<u64> {
    host::next_data(file, offset).unwrap_or(Some(offset))
}

#[expect(clippy::cast_possible_truncation, reason = "positions inside a buffer in memory")]
impl Storage for HostFile {
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        let range = offset..offset + buf.len() as u64;
        self.for_each_segment(range, Create::Never, |file, inside, at| {
            let len = (inside.end - inside.start) as usize;
            let piece = &mut buf[at as usize..at as usize + len];
            let got = match file {
                Some(file) => file.read_at(piece, inside.start, wait)?,
                None => 0,
            };
            piece[got..].fill(0);
            Ok(())
        })
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let total: usize = parts.iter().map(|part| part.len()).sum();
        let end = offset.checked_add(total as u64).ok_or_else(|| host::os_error(libc::EFBIG))?;
        if end <= SEGMENT_LEN {
            return self.first.write_all_at(parts, offset);
        }
        // Rare: bytes are copied only past the first 8 TiB, to split them at the border.
        let whole: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
        self.for_each_segment(offset..end, Create::IfMissing, |file, inside, at| {
            let file = file.ok_or_else(|| host::os_error(libc::EIO))?;
            let piece = &whole[at as usize..at as usize + (inside.end - inside.start) as usize];
            file.write_all_at(&[IoSlice::new(piece)], inside.start)
        })
    }

    fn punch_hole(&self, range: Range<u64>) -> io::Result<()> {
        self.find_in_segments(&range, |_, segment, inside| {
            host::punch_hole(&segment.file, inside).err()
        })
        .map_or(Ok(()), Err)
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        self.for_each_segment(range, Create::IfMissing, |file, inside, _| match file {
            Some(file) => host::fallocate(&file.file, FallocateFlags::empty(), inside),
            None => Err(host::os_error(libc::EIO)),
        })
    }

    fn allocated(&self) -> io::Result<u64> {
        let more = self.more_segments.read();
        let files = std::iter::once(&self.first).chain(more.values().map(AsRef::as_ref));
        let blocks = files.map(|segment| Ok(segment.file.metadata()?.blocks()));
        Ok(blocks.sum::<io::Result<u64>>()? * 512)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        // Only the log and the journal are truncated, and neither has a second segment.
        self.first.file.set_len(len.min(SEGMENT_LEN))
    }

    fn len(&self) -> io::Result<u64> {
        let more = self.more_segments.read();
        match more.last_key_value() {
            None => Ok(self.first.file.metadata()?.len()),
            Some((index, segment)) => {
                // Bytes past the end of a segment belong to no block.
                Ok(*index as u64 * SEGMENT_LEN + segment.file.metadata()?.len().min(SEGMENT_LEN))
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.first.file.sync_data()?;
        let more: Vec<_> = self.more_segments.read().values().cloned().collect();
        more.iter().try_for_each(|segment| segment.file.sync_data())
    }

    fn next_data(&self, offset: u64) -> Option<u64> {
        if !self.more_segments.read().is_empty() {
            return Some(offset);
        }
        // Bytes past the end of a segment belong to no block.
        next_data_in(&self.first.file, offset).filter(|at| *at < SEGMENT_LEN)
    }

    fn next_allocated(&self, range: Range<u64>) -> Option<u64> {
        self.find_in_segments(&range, |index, segment, inside| {
            Some(index as u64 * SEGMENT_LEN + next_allocated_in(&segment.file, inside)?)
        })
    }

    fn drop_cache(&self) {
        let drop_cache = |file: &File| {
            // Only a hint: a page that cannot be dropped is a page that was never lost.
            let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
        };
        drop_cache(&self.first.file);
        self.more_segments.read().values().for_each(|segment| drop_cache(&segment.file));
    }

    fn host_fd(&self, range: Range<u64>) -> Option<BorrowedFd<'_>> {
        (range.end <= SEGMENT_LEN).then(|| self.first.file.as_fd())
    }

    fn host_file(&self) -> Option<&HostFile> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_in_memory_is_read_without_waiting() {
        let data = HostFile::single(tempfile::tempfile_in("/dev/shm").unwrap());
        data.write_at(&[IoSlice::new(&[3; 4096])], 0).unwrap();
        let mut buf = [0; 4096];
        data.read_at(&mut buf, 0, Wait::No).unwrap();
        assert_eq!(buf, [3; 4096]);
    }
}
