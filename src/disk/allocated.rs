//! The space of a disk as stat(2) reports it (`st_blocks`): counted from the extents, and cached.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::Disk;
use crate::extents::{Extent, ExtentKind, Extents};
use crate::layer::Wait;
use crate::stream::Stream;

/// The most extents that one count visits; all bytes after them count as data.
const MAX_WALKED_EXTENTS: usize = 16 << 10;

/// The last count of the bytes of data in a file that shows a disk.
#[derive(Debug, Default)]
pub(super) struct AllocatedCache {
    /// The revision of the layers, and the bytes.
    last: Mutex<Option<(u64, u64)>>,
}

impl AllocatedCache {
    /// Returns the cached figure if it belongs to `revision`, else that of `count`. When `count`
    /// would have to wait, returns the older figure and marks it in `is_stale`.
    ///
    /// # Errors
    /// The errors of `count`; `EAGAIN` only as long as nothing was counted yet.
    fn get_or_count(
        &self,
        revision: Option<u64>,
        is_stale: &AtomicBool,
        count: impl FnOnce() -> io::Result<u64>,
    ) -> io::Result<u64> {
        let last = *self.last.lock();
        if let Some((at, bytes)) = last
            && revision == Some(at)
        {
            return Ok(bytes);
        }
        match (count(), last) {
            (Ok(bytes), _) => {
                *self.last.lock() = Some((revision.unwrap_or(0), bytes));
                Ok(bytes)
            }
            (Err(error), Some((_, bytes))) if error.raw_os_error() == Some(libc::EAGAIN) => {
                is_stale.store(true, Ordering::Relaxed);
                Ok(bytes)
            }
            (Err(error), _) => Err(error),
        }
    }
}

/// The space of a whole disk.
#[derive(Default)]
pub(super) struct Allocated {
    cache: AllocatedCache,
    /// Set when a stat of the disk or of a partition file was answered with an older figure.
    is_stale: AtomicBool,
}

impl Allocated {
    /// Whether a figure may be out of date.
    pub(super) fn is_stale(&self) -> bool {
        self.is_stale.load(Ordering::Relaxed)
    }

    /// Returns whether a figure may be out of date, and clears that mark: the caller counts again.
    pub(super) fn take_stale(&self) -> bool {
        self.is_stale.swap(false, Ordering::SeqCst)
    }
}

impl Disk {
    /// Counts the bytes of data in the disk.
    ///
    /// # Errors
    /// The errors of [`allocated_in`](Self::allocated_in).
    pub(super) fn allocated(&self, wait: Wait) -> io::Result<u64> {
        if let Some(Stream::Output(output)) = &self.stream {
            return Ok(output.written());
        }
        self.allocated_in(0..self.size(), &self.allocated.cache, wait)
    }

    /// Counts the bytes of data in `range` from the extents. After [`MAX_WALKED_EXTENTS`] extents
    /// all further bytes count as data, so no hole is ever claimed that does not exist. The result
    /// is kept in `cache`.
    ///
    /// A stat never waits for a slow base: it is answered with the cached figure, and `maintain`
    /// updates the figure later.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when nothing was counted yet and the base would have to be
    /// waited for; the host's errno.
    pub(super) fn allocated_in(
        &self,
        range: Range<u64>,
        cache: &AllocatedCache,
        wait: Wait,
    ) -> io::Result<u64> {
        // A stream's data arrives without a count of revisions.
        let revision = self.layers().top.revision().filter(|_| self.stream.is_none());
        cache.get_or_count(revision, &self.allocated.is_stale, || self.count_data(range, wait))
    }

    fn count_data(&self, range: Range<u64>, wait: Wait) -> io::Result<u64> {
        let end = range.end;
        let extents = self.extents(range, MAX_WALKED_EXTENTS, wait)?;
        let held = |extents: &Extents| -> u64 {
            extents.iter().filter(|extent| extent.kind != ExtentKind::Hole).map(Extent::len).sum()
        };
        Ok(held(&extents) + (end - extents.described_to().min(end)))
    }
}
