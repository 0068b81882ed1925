//! The files a layer keeps on the host: the sparse `data` file and the `log`, as one trait.
//!
//! Every block lies at its own disk offset in `data`. Host file systems bound the length of a
//! file (ext4: 16 TiB less a block), so the bytes past [`SEGMENT_LEN`] go to `data.1`, `data.2`, each
//! covering one segment; a disk below that size has only `data`.
//!
//! The trait is there for the tests: a file in memory that forgets what was not synced.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;
use rustix::fs::{FallocateFlags, SeekFrom};

use super::fiemap::Fiemap;
use super::reflink::Flush;
use crate::base::self_reference::{FsKind, HostFs};
use crate::direct::DirectFile;
use crate::host;
use crate::layer::Wait;

/// 8 TiB: safely below the largest file of the common host file systems (ext4: 16 TiB - 4 KiB).
pub const SEGMENT_LEN: u64 = 8 << 40;
/// The last segment that the largest disk has.
pub(super) const LAST_SEGMENT: usize = (super::MAX_DISK_SIZE / SEGMENT_LEN) as usize;

/// A host file as a layer needs it. Offsets and ranges are in bytes.
#[expect(clippy::len_without_is_empty, reason = "nobody asks whether a file is empty")]
pub trait Storage: Send + Sync {
    /// Fills `buf` from `offset`; what lies past the end of the file reads as zeros.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when it would have to wait; else the host's errno.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()>;

    /// Writes all `parts`, one after the other, at `offset`.
    ///
    /// # Errors
    /// The host's errno.
    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()>;

    /// Gives the space of `range` back; it reads as zeros.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where the file system cannot.
    fn punch_hole(&self, range: Range<u64>) -> io::Result<()>;

    /// Reserves space for `range` without changing what is read or the length.
    ///
    /// # Errors
    /// `ENOSPC`; `EOPNOTSUPP` where the file system cannot.
    fn allocate(&self, range: Range<u64>) -> io::Result<()>;

    /// Bytes of the host that it takes, what is only reserved included; 0 where nobody knows.
    ///
    /// # Errors
    /// The host's errno.
    fn allocated(&self) -> io::Result<u64> {
        Ok(0)
    }

    /// Reserves space for `range`, which reads as zeros; the file is at least as long as that then.
    /// What is written there later changes no length, and so a sync of it writes no more than it.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    fn extend(&self, range: Range<u64>) -> io::Result<()>;

    /// Cuts the file at `len`, with the space reserved past it.
    ///
    /// # Errors
    /// The host's errno.
    fn truncate(&self, len: u64) -> io::Result<()>;

    /// The file's length: that of the last segment's end, when there are several.
    ///
    /// # Errors
    /// The host's errno.
    fn len(&self) -> io::Result<u64>;

    /// Makes everything written so far durable.
    ///
    /// # Errors
    /// The host's errno.
    fn sync(&self) -> io::Result<()>;

    /// Where at or after `offset` the file may hold other bytes than zeros: at `offset` itself when
    /// the host does not tell; `None` when it holds none. Only for a file that nobody writes to.
    fn next_data(&self, offset: u64) -> Option<u64> {
        Some(offset)
    }

    /// Where at or after the start of `range` the host may hold space for a byte of it: at the
    /// start itself when the host does not tell; `None` when it holds none.
    ///
    /// A hint, for what is written at the same moment may be missed. So may be, where the host
    /// has no FIEMAP, space that was reserved and not written yet.
    fn next_allocated(&self, range: Range<u64>) -> Option<u64>;

    /// Drops what the host has cached, so that the next read comes from the device.
    fn drop_cache(&self);

    /// The host file that holds all of `range` at the range's own offsets, if one does.
    fn host_fd(&self, range: Range<u64>) -> Option<BorrowedFd<'_>>;

    /// The host file behind it, if it is one.
    fn host_file(&self) -> Option<&HostFile>;
}

/// How the file of a segment that is not there yet comes to be, by its index.
pub type MakeSegment = Box<dyn Fn(usize) -> io::Result<File> + Send + Sync>;

/// Whether a missing file is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Create {
    /// Make it.
    IfMissing,
    /// A missing one is `None`.
    Never,
}

/// A host file, in segments when it is longer than the host allows.
pub struct HostFile {
    first: SegmentFile,
    /// Segments 1 and on that exist, by their index: there are as few as were written to.
    more_segments: RwLock<BTreeMap<usize, Arc<SegmentFile>>>,
    make: Option<MakeSegment>,
}

/// A file of the host, and how its bytes are got at.
struct SegmentFile {
    file: File,
    /// It lies in memory: reading it never waits, and the host has no `RWF_NOWAIT` for it.
    is_memory: bool,
    /// Past the host's page cache, once that was asked for.
    direct: OnceLock<DirectFile>,
}

impl SegmentFile {
    fn new(file: File) -> Self {
        let is_memory = HostFs::of(&file).is_ok_and(|fs| fs.kind == FsKind::Memory);
        Self { file, is_memory, direct: OnceLock::new() }
    }

    fn go_direct(&self) -> io::Result<()> {
        if self.direct.get().is_none() {
            // Should another thread be first: one is as good as the other, nothing is written yet.
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
    /// A file that never needs a second segment (the log).
    #[must_use]
    pub fn single(file: File) -> Self {
        Self { first: SegmentFile::new(file), more_segments: RwLock::default(), make: None }
    }

    /// A data file whose further segments `make` makes. Those that are there already are `more_segments`:
    /// all of them, for a sync is one of the whole file, whoever has written it.
    #[must_use]
    pub fn segmented(first: File, more: Vec<(usize, File)>, make: MakeSegment) -> Self {
        let more = more.into_iter().map(|(index, file)| (index, Arc::new(SegmentFile::new(file))));
        let more = RwLock::new(more.collect());
        Self { first: SegmentFile::new(first), more_segments: more, make: Some(make) }
    }

    /// The first segment's file: the one that carries the lock.
    #[must_use]
    pub fn first(&self) -> &File {
        &self.first.file
    }

    /// From now on its bytes are read and written past the host's page cache: those of the
    /// segments to come as well. Nothing of it is being written at that moment.
    ///
    /// # Errors
    /// As [`DirectFile::reopen`].
    pub fn go_direct(&self) -> io::Result<()> {
        // Locked first: no segment comes in between.
        let more = self.more_segments.write();
        more.values().try_for_each(|segment| segment.go_direct())?;
        self.first.go_direct()
    }

    /// Whether the host's page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.first.direct.get().is_some()
    }

    /// All segments that exist, with their index.
    ///
    /// # Errors
    /// The host's errno from opening one.
    pub fn segments(&self) -> io::Result<Vec<(usize, File)>> {
        let mut all = vec![(0, self.first.file.try_clone()?)];
        for (index, segment) in &*self.more_segments.read() {
            all.push((*index, segment.file.try_clone()?));
        }
        Ok(all)
    }

    /// The segment `index`, not the first, if it exists.
    fn segment(&self, index: usize) -> Option<Arc<SegmentFile>> {
        self.more_segments.read().get(&index).cloned()
    }

    /// The segment `index`, not the first, made when it is not there.
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

    /// Calls `each` with every segment there is that `range` touches, with its index and the bytes
    /// of `range` in it (offsets inside its file), until one gives something.
    ///
    /// Takes no step for a segment that does not exist: most of a huge disk has none.
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

    /// Calls `each` with the file of every segment that `range` touches, the bytes of `range`
    /// there (offsets inside that file), and where they start inside `range`.
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

/// The segment that byte `offset` lies in.
fn segment_of(offset: u64) -> usize {
    (offset / SEGMENT_LEN) as usize
}

/// As [`Storage::next_allocated`], of one file.
fn next_allocated_in(file: &File, range: Range<u64>) -> Option<u64> {
    let next = match Fiemap::starting_at(file, range.start, Flush::No).next() {
        Ok(extent) => extent?.range.start,
        // A host that does not tell its extents may still tell its data.
        Err(_) => next_data_in(file, range.start)?,
    };
    (next < range.end).then_some(next.max(range.start))
}

/// As [`Storage::next_data`], of one file.
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
        // Rare: only past the first 8 TiB is a copy made, to cut it at the border.
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
        // Only the log is cut, and that has no second segment.
        self.first.file.set_len(len.min(SEGMENT_LEN))
    }

    fn len(&self) -> io::Result<u64> {
        let more = self.more_segments.read();
        match more.last_key_value() {
            None => Ok(self.first.file.metadata()?.len()),
            Some((index, segment)) => {
                // What lies past the end of a segment is nobody's.
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
        // What lies past the end of a segment is nobody's.
        next_data_in(&self.first.file, offset).filter(|at| *at < SEGMENT_LEN)
    }

    fn next_allocated(&self, range: Range<u64>) -> Option<u64> {
        self.find_in_segments(&range, |index, segment, inside| {
            Some(index as u64 * SEGMENT_LEN + next_allocated_in(&segment.file, inside)?)
        })
    }

    fn drop_cache(&self) {
        let drop_cache = |file: &File| {
            // Advice only: a page that cannot be dropped is one that was never lost.
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
    fn memory_is_read_without_waiting_though_it_knows_no_nowait() {
        let data = HostFile::single(tempfile::tempfile_in("/dev/shm").unwrap());
        data.write_at(&[IoSlice::new(&[3; 4096])], 0).unwrap();
        let mut buf = [0; 4096];
        data.read_at(&mut buf, 0, Wait::No).unwrap();
        assert_eq!(buf, [3; 4096]);
    }
}
