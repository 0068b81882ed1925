//! A host file in segments, read and written through the page cache or past it.
//!
//! ```text
//!   byte of the disk    0 .. 8 TiB     8 .. 16 TiB     16 .. 24 TiB     24 .. 32 TiB
//!   file                data           data.1          (none yet)       data.3
//! ```
//!
//! Host file systems limit the length of a file (ext4: 16 TiB less a block), so the bytes past
//! [`SEGMENT_LEN`] go to `data.1`, `data.2`, each covering one segment. A segment is created by the
//! first write to it; a disk below that size has only `data`.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use parking_lot::RwLock;

use crate::direct::DirectFile;
use crate::host;
use crate::host::file_system::{FsKind, HostFs};
use crate::layer::Wait;

/// The length of a segment in bytes: 8 TiB, safely below the largest file of the common host file
/// systems (ext4: 16 TiB - 4 KiB).
pub const SEGMENT_LEN: u64 = 8 << 40;
/// The index of the last segment that the largest disk can have.
pub(super) const LAST_SEGMENT: usize = (super::MAX_DISK_SIZE / SEGMENT_LEN) as usize;

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
    pub(super) first: SegmentFile,
    /// The existing segments after the first, by index; only segments that were written to exist.
    pub(super) more_segments: RwLock<BTreeMap<usize, Arc<SegmentFile>>>,
    make: Option<MakeSegment>,
}

/// One file of the host, and how it is read and written.
pub(super) struct SegmentFile {
    pub(super) file: File,
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

    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
        match (self.direct.get(), wait) {
            (None, _) if self.is_memory => host::read_at(&self.file, buf, offset, Wait::Yes),
            (None, _) => host::read_at(&self.file, buf, offset, wait),
            (Some(_), Wait::No) => Err(host::os_error(libc::EAGAIN)),
            (Some(direct), Wait::Yes) => direct.read_at(buf, offset),
        }
    }

    pub(super) fn write_all_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        match self.direct.get() {
            None => host::write_all_at(&self.file, parts, offset),
            Some(direct) => direct.write_all_at(parts, offset),
        }
    }
}

impl HostFile {
    /// Wraps a file that never needs a second segment: the log or the journal.
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
    pub(super) fn find_in_segments<T>(
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
    pub(super) fn for_each_segment(
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
