//! The files of a layer on the host, the sparse `data` file and the `log`, behind one trait.
//!
//! Every block is stored at its own disk offset in `data`. Host file systems limit the length of a
//! file (ext4: 16 TiB less a block), so the bytes past [`SEGMENT_LEN`] go to `data.1`, `data.2`,
//! each covering one segment; a disk below that size has only `data`.
//!
//! The trait exists for the tests: they use a file in memory that forgets all data that was not
//! synced.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, SeekFrom};

use super::fiemap::{Fiemap, Flush};
use crate::direct::DirectFile;
use crate::host;
use crate::host::file_system::{FsKind, HostFs};
use crate::layer::Wait;

/// The length of a segment in bytes: 8 TiB, safely below the largest file of the common host file
/// systems (ext4: 16 TiB - 4 KiB).
pub const SEGMENT_LEN: u64 = 8 << 40;
/// The index of the last segment that the largest disk can have.
pub(super) const LAST_SEGMENT: usize = (super::MAX_DISK_SIZE / SEGMENT_LEN) as usize;

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

    /// Frees the space of `range`, which reads as zeros afterwards.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where the file system cannot punch holes.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Reserves space for `range` without changing its contents or the length of the file.
    ///
    /// # Errors
    /// `ENOSPC`; `EOPNOTSUPP` where the file system cannot reserve space.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;

    /// Returns the bytes that the file takes on the host, including space that is only reserved; 0
    /// where this is unknown.
    ///
    /// # Errors
    /// The host's errno.
    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    /// Reserves space for `range`, which reads as zeros, and makes the file at least that long. A
    /// later write into `range` does not change the length, so its sync has to write nothing but
    /// the data.
    ///
    /// # Errors
    /// The errors of [`allocate`](Self::allocate).
    fn extend(&self, range: Range<u64>) -> io::Result<()>;

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

/// Creates the file of a missing segment, given the segment's index.
pub type MakeSegment = Box<dyn Fn(usize) -> io::Result<File> + Send + Sync>;

/// Whether to create a missing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// Create the file.
    IfMissing,
    /// Return `None` for a missing file.
    Never,
}

/// A host file, split into segments when it is longer than the host allows for one file.
pub struct HostFile {
    first: SegmentFile,
    /// The existing segments after the first, by index; only segments that were written to exist.
    more_segments: RwLock<BTreeMap<usize, Arc<SegmentFile>>>,
    make: Option<MakeSegment>,
}

/// One file of the host, and how it is read and written.
struct SegmentFile {
    file: File,
    /// Whether the file is in memory. Reading such a file never waits, and the host has no
    /// `RWF_NOWAIT` for it.
    is_memory: bool,
    /// The same file opened for direct I/O, once `go_direct` was called.
    direct: OnceLock<DirectFile>,
}

impl SegmentFile {
    fn new(file: File) -> Self {
        let is_memory = HostFs::of(&file).is_ok_and(|fs| fs.kind == FsKind::Memory);
        Self { file, is_memory, direct: OnceLock::new() }
    }

    fn go_direct(&self) -> io::Result<()> {
        if self.direct.get().is_none() {
            // If another thread sets it first, its file is as good as this one: nothing is written
            // yet.
            let _ = self.direct.set(DirectFile::reopen(&self.file)?);
        }
        Ok(())
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
        match (self.direct.get(), wait) {
            (None, _) if self.is_memory => host::read_at(&self.file, buf, offset, Wait::Yes),
            (None, _) => host::read_at(&self.file, buf, offset, wait),
            (Some(_), Wait::No) => Err(host::os_error(libc::EAGAIN)),
            (Some(direct), Wait::Yes) => direct.read_at(buf, offset),
        }
    }

    fn write_all_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        match self.direct.get() {
            None => host::write_all_at(&self.file, parts, offset),
            Some(direct) => direct.write_all_at(parts, offset),
        }
    }
}

impl HostFile {
    /// Wraps a file that never needs a second segment (the log).
    #[must_use]
    pub fn single(file: File) -> Self {
        Self { first: SegmentFile::new(file), more_segments: RwLock::default(), make: None }
    }

    /// Wraps a data file; `make` creates segments on demand. `more` must hold all segments that
    /// exist already, because a sync covers the whole file, including earlier writes.
    #[must_use]
    pub fn segmented(first: File, more: Vec<(usize, File)>, make: MakeSegment) -> Self {
        let more = more.into_iter().map(|(index, file)| (index, Arc::new(SegmentFile::new(file))));
        let more = RwLock::new(more.collect());
        Self { first: SegmentFile::new(first), more_segments: more, make: Some(make) }
    }

    /// Returns the file of the first segment, which carries the lock.
    #[must_use]
    pub fn first(&self) -> &File {
        &self.first.file
    }

    /// Makes reads and writes bypass the host's page cache from now on, also those of segments
    /// created later. Nothing is being written to the file during this call.
    ///
    /// # Errors
    /// The errors of [`DirectFile::reopen`].
    pub fn go_direct(&self) -> io::Result<()> {
        // Locked first, so that no segment is added in between.
        let more = self.more_segments.write();
        more.values().try_for_each(|segment| segment.go_direct())?;
        self.first.go_direct()
    }

    /// Returns whether reads and writes bypass the host's page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.first.direct.get().is_some()
    }

    /// Returns all existing segments with their indexes.
    ///
    /// # Errors
    /// The host's errno from duplicating a descriptor.
    pub fn segments(&self) -> io::Result<Vec<(usize, File)>> {
        let mut all = vec![(0, self.first.file.try_clone()?)];
        for (index, segment) in &*self.more_segments.read() {
            all.push((*index, segment.file.try_clone()?));
        }
        Ok(all)
    }

    /// Returns the segment `index`, which is not the first, if it exists.
    fn segment(&self, index: usize) -> Option<Arc<SegmentFile>> {
        self.more_segments.read().get(&index).cloned()
    }

    /// Returns the segment `index`, which is not the first, and creates it when it is missing.
    fn make_segment(&self, index: usize) -> io::Result<Arc<SegmentFile>> {
        if let Some(segment) = self.segment(index) {
            return Ok(segment);
        }
        let Some(make) = &self.make else {
            return Err(host::os_error(libc::EFBIG));
        };
        let mut more = self.more_segments.write();
        if let Some(segment) = more.get(&index) {
            return Ok(Arc::clone(segment));
        }
        let segment = Arc::new(SegmentFile::new(make(index)?));
        if self.is_direct() {
            segment.go_direct()?;
        }
        more.insert(index, Arc::clone(&segment));
        Ok(segment)
    }

    /// Calls `each` with every existing segment that `range` touches, the segment's index and the
    /// bytes of `range` in it (offsets inside its file), until a call returns a value.
    ///
    /// Takes no step for a segment that does not exist: most segments of a huge disk are missing.
    fn find_in_segments<T>(
        &self,
        range: &Range<u64>,
        mut each: impl FnMut(usize, &SegmentFile, Range<u64>) -> Option<T>,
    ) -> Option<T> {
        let within = |index: usize| {
            let floor = index as u64 * SEGMENT_LEN;
            range.start.max(floor) - floor..range.end.min(floor + SEGMENT_LEN) - floor
        };
        if range.start < range.end.min(SEGMENT_LEN)
            && let Some(found) = each(0, &self.first, within(0))
        {
            return Some(found);
        }
        let end = segment_of(range.end.saturating_sub(1));
        let mut next = segment_of(range.start).max(1);
        while next <= end {
            let found = self
                .more_segments
                .read()
                .range(next..=end)
                .next()
                .map(|(at, it)| (*at, it.clone()));
            let (index, segment) = found?;
            if let Some(found) = each(index, &segment, within(index)) {
                return Some(found);
            }
            next = index + 1;
        }
        None
    }

    /// Calls `each` with the file of every segment that `range` touches, the bytes of `range` in it
    /// (offsets inside that file), and the position of those bytes inside `range`.
    fn for_each_segment(
        &self,
        range: Range<u64>,
        create: Create,
        mut each: impl FnMut(Option<&SegmentFile>, Range<u64>, u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let index = segment_of(at);
            let floor = index as u64 * SEGMENT_LEN;
            let end = range.end.min(floor + SEGMENT_LEN);
            let inside = at - floor..end - floor;
            if index == 0 {
                each(Some(&self.first), inside, at - range.start)?;
            } else {
                let segment = match create {
                    Create::Never => self.segment(index),
                    Create::IfMissing => Some(self.make_segment(index)?),
                };
                each(segment.as_deref(), inside, at - range.start)?;
            }
            at = end;
        }
        Ok(())
    }
}

/// Returns the index of the segment that contains byte `offset`.
fn segment_of(offset: u64) -> usize {
    (offset / SEGMENT_LEN) as usize
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
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Ok(at) => Some(at),
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(offset),
    }
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
            Some(file) => host::allocate(&file.file, inside),
            None => Err(host::os_error(libc::EIO)),
        })
    }

    fn allocated(&self) -> io::Result<u64> {
        let more = self.more_segments.read();
        let files = std::iter::once(&self.first).chain(more.values().map(AsRef::as_ref));
        let blocks = files.map(|segment| Ok(segment.file.metadata()?.blocks()));
        Ok(blocks.sum::<io::Result<u64>>()? * 512)
    }

    fn extend(&self, range: Range<u64>) -> io::Result<()> {
        self.for_each_segment(range, Create::IfMissing, |file, inside, _| match file {
            Some(file) => host::fallocate(&file.file, FallocateFlags::empty(), inside),
            None => Err(host::os_error(libc::EIO)),
        })
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        // Only the log is truncated, and the log has no second segment.
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
