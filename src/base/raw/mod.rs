//! The raw base: a file or a block device whose bytes are the disk's.
//!
//! Reads have two speeds. Under [`Wait::No`] the host reads with `RWF_NOWAIT`, from the page cache
//! or not at all; under [`Wait::Yes`] it reads however long that takes. Holes are found with
//! `SEEK_DATA` and `SEEK_HOLE`; on a host that supports neither everything counts as data, which is
//! always safe.
//!
//! With `direct`, I/O bypasses the host's page cache: every read and write waits for the device.
//!
//! A base that was shortened by others returns `EIO` for missing bytes, never zeros.
//!
//! With `mode=rw` the same type takes writes: `write.rs`.

mod write;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::io::{Errno, ReadWriteFlags};

use super::lock;
use crate::direct::DirectFile;
use crate::extents::{Extent, ExtentKind};
use crate::host;
use crate::host::file_system::{FsKind, HostFs};
use crate::layer::{CopyFn, Layer, Wait};

/// The kind of host object that holds the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HostKind {
    /// A regular file.
    File,
    /// A block device: no visible holes, and a fixed size.
    BlockDevice,
}

/// A raw file or block device. Dropping it releases its base locks.
#[derive(Debug)]
pub struct RawBase {
    file: Arc<File>,
    /// The same file opened for direct I/O, if I/O is to bypass the host's page cache.
    direct: Option<DirectFile>,
    kind: HostKind,
    fs_kind: FsKind,
    size: SizeOwner,
    /// The flags of a read that must not wait: memory file systems never wait, and have no
    /// `RWF_NOWAIT`.
    no_wait_flags: ReadWriteFlags,
    /// Set once the host was found to lack `RWF_NOWAIT`: every read that must not wait is then
    /// `EAGAIN`.
    lacks_nowait: AtomicBool,
    /// Set once the host was found unable to tell holes from data.
    cannot_seek_holes: AtomicBool,
    /// Set once a sync has failed: see [`WritableLayer::sync`](crate::layer::WritableLayer::sync).
    is_latched: AtomicBool,
}

/// The authority on the size.
#[derive(Debug)]
enum SizeOwner {
    /// This layer: the size in bytes changes only through it, and the host's file must have at
    /// least as many.
    Ours(AtomicU64),
    /// The host file, which others are allowed to resize. The last known size in bytes stands
    /// in when the host's stat fails, since an error must not look like the end of the disk.
    Host(AtomicU64),
}

impl RawBase {
    /// Creates a layer for the first `size` bytes of `file`.
    ///
    /// # Errors
    /// The host's errno when the file system cannot be determined.
    pub fn new(file: Arc<File>, kind: HostKind, size: u64) -> io::Result<Self> {
        Self::with_size(file, kind, SizeOwner::Ours(AtomicU64::new(size)))
    }

    /// Creates a layer for the whole regular file `file`, at its current length at any time.
    ///
    /// # Errors
    /// The errors of [`new`](Self::new).
    pub fn whole(file: Arc<File>) -> io::Result<Self> {
        let size = AtomicU64::new(file.metadata()?.len());
        Self::with_size(file, HostKind::File, SizeOwner::Host(size))
    }

    fn with_size(file: Arc<File>, kind: HostKind, size: SizeOwner) -> io::Result<Self> {
        let fs_kind = match kind {
            HostKind::File => HostFs::of(&*file)?.kind,
            HostKind::BlockDevice => FsKind::Local,
        };
        let no_wait_flags = match fs_kind {
            FsKind::Memory => ReadWriteFlags::empty(),
            _ => ReadWriteFlags::NOWAIT,
        };
        Ok(Self {
            file,
            direct: None,
            kind,
            fs_kind,
            size,
            no_wait_flags,
            lacks_nowait: AtomicBool::new(false),
            cannot_seek_holes: AtomicBool::new(kind == HostKind::BlockDevice),
            is_latched: AtomicBool::new(false),
        })
    }

    /// Makes I/O bypass the host's page cache.
    ///
    /// # Errors
    /// The errors of [`DirectFile::reopen`].
    pub fn with_direct_io(mut self) -> io::Result<Self> {
        self.direct = Some(DirectFile::reopen(&self.file)?);
        Ok(self)
    }

    /// The kind of host object.
    #[must_use]
    pub fn kind(&self) -> HostKind {
        self.kind
    }

    /// Makes the base read-only, as a failed [`sync`](crate::layer::WritableLayer::sync) does.
    pub fn latch(&self) {
        self.is_latched.store(true, Ordering::Release);
    }

    /// Reads from the page cache alone: all of `buf`, or `EAGAIN`.
    fn read_cached(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        if self.lacks_nowait.load(Ordering::Relaxed) {
            return Err(Errno::AGAIN.into());
        }
        let flags = self.no_wait_flags;
        let len = buf.len();
        match rustix::io::preadv2(&*self.file, &mut [io::IoSliceMut::new(buf)], offset, flags) {
            Ok(got) if got == len => Ok(()),
            // A short read: the rest is not cached, or the file got shorter. The waiting read finds
            // out which.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Err(Errno::AGAIN.into()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                self.lacks_nowait.store(true, Ordering::Relaxed);
                Err(Errno::AGAIN.into())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Finds the extent at `range.start` on the host; `range` is inside the size.
    fn seek_extent(&self, range: Range<u64>) -> io::Result<Extent> {
        match host::extent_at(&*self.file, range.clone()) {
            Ok(Some(found)) => Ok(found),
            Ok(None) => self.seek_past_data(range),
            Err(error) => self.seek_failed(error, range),
        }
    }

    /// Describes a range without data: a hole up to the end of the host file. After that end, in a
    /// file that got shorter, the range is Data, so that reading it fails as it must.
    fn seek_past_data(&self, range: Range<u64>) -> io::Result<Extent> {
        let end_of_file = host::file_size(&*self.file)?;
        if range.start >= end_of_file {
            return Ok(Extent::new(range, ExtentKind::Data));
        }
        Ok(Extent::new(range.start..range.end.min(end_of_file), ExtentKind::Hole))
    }

    fn seek_failed(&self, error: Errno, range: Range<u64>) -> io::Result<Extent> {
        match error {
            Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS => {
                self.cannot_seek_holes.store(true, Ordering::Relaxed);
                Ok(Extent::new(range, ExtentKind::Data))
            }
            error => Err(error.into()),
        }
    }
}

impl Drop for RawBase {
    fn drop(&mut self) {
        lock::release(&self.file);
    }
}

impl Layer for RawBase {
    fn size(&self) -> u64 {
        match &self.size {
            SizeOwner::Ours(size) => size.load(Ordering::Acquire),
            SizeOwner::Host(last) => match self.file.metadata() {
                Ok(found) => {
                    last.store(found.len(), Ordering::Release);
                    found.len()
                }
                // For instance a file system that has shut down.
                Err(_) => last.load(Ordering::Acquire),
            },
        }
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        let size = self.size();
        if range.start >= size {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let range = range.start..range.end.min(size);
        if self.cannot_seek_holes.load(Ordering::Relaxed) {
            return Ok(Extent::new(range, ExtentKind::Data));
        }
        if wait == Wait::No && self.fs_kind == FsKind::Remote {
            return Err(Errno::AGAIN.into());
        }
        self.seek_extent(range)
    }

    /// Describes everything inside the size as Data: finding holes would cost every read a second
    /// system call, to save copying some zeros.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        let size = self.size();
        if offset >= size {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most buf.len()")]
        let len = (asked.end.min(size) - offset) as usize;
        let buf = &mut buf[..len];
        if wait == Wait::No {
            if self.direct.is_some() {
                return Err(Errno::AGAIN.into());
            }
            self.read_cached(buf, offset)?;
            return Ok(Extent::new(offset..offset + len as u64, ExtentKind::Data));
        }
        let got = match &self.direct {
            None => host::read_at(&self.file, buf, offset, Wait::Yes)?,
            Some(direct) => direct.read_at(buf, offset)?,
        };
        if got == len {
            return Ok(Extent::new(offset..offset + len as u64, ExtentKind::Data));
        }
        // The disk may just have been truncated by this daemon. If so, the rest is past its end.
        let end = offset + got as u64;
        if self.size() > end {
            return Err(Errno::IO.into());
        }
        if got > 0 {
            return Ok(Extent::new(offset..end, ExtentKind::Data));
        }
        Ok(Extent::new(asked, ExtentKind::Hole))
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let found = self.extent_at(range, wait)?;
        // copy_file_range(2) does not accept devices.
        if found.kind != ExtentKind::Data || self.kind == HostKind::BlockDevice {
            return Ok((found, None));
        }
        let copied = copy(self.file.as_fd(), found.range.clone())?;
        Ok((found, Some(copied)))
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::os::unix::fs::FileExt;
    use std::path::Path;

    use rustix::fs::Advice;

    use super::*;

    /// Creates a nameless file of `size` bytes in `dir`.
    fn file(dir: &Path, size: u64) -> Arc<File> {
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len(size).unwrap();
        Arc::new(file)
    }

    /// Creates a base on a file system where RWF_NOWAIT and holes are known to work (`/var/tmp`).
    pub(super) fn base(size: u64) -> (Arc<File>, RawBase) {
        let file = file(Path::new("/var/tmp"), size);
        let raw = RawBase::new(file.clone(), HostKind::File, size).unwrap();
        (file, raw)
    }

    pub(super) fn describe(raw: &RawBase, range: Range<u64>) -> Vec<(Range<u64>, ExtentKind)> {
        let mut found = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let extent = raw.extent_at(at..range.end, Wait::No).unwrap();
            assert_eq!(extent.range.start, at);
            at = extent.range.end;
            found.push((extent.range, extent.kind));
        }
        found
    }

    pub(super) const K64: u64 = 65536;

    #[test]
    fn a_sparse_file_is_described_as_holes_and_data() {
        let (file, raw) = base(16 * K64);
        file.write_all_at(&[1; 65536], 2 * K64).unwrap();
        file.write_all_at(&[1; 65536], 8 * K64).unwrap();
        let shape = [
            (0..2 * K64, ExtentKind::Hole),
            (2 * K64..3 * K64, ExtentKind::Data),
            (3 * K64..8 * K64, ExtentKind::Hole),
            (8 * K64..9 * K64, ExtentKind::Data),
            (9 * K64..16 * K64, ExtentKind::Hole),
            (16 * K64..20 * K64, ExtentKind::Hole),
        ];
        assert_eq!(describe(&raw, 0..20 * K64), shape);
        let inside = [(2 * K64 + 5..2 * K64 + 9, ExtentKind::Data)];
        assert_eq!(describe(&raw, 2 * K64 + 5..2 * K64 + 9), inside);
    }

    #[test]
    fn the_missing_end_of_a_shortened_file_is_data_and_reading_it_fails() {
        let (file, raw) = base(16 * K64);
        file.set_len(4 * K64).unwrap();
        let shape = [(0..4 * K64, ExtentKind::Hole), (4 * K64..16 * K64, ExtentKind::Data)];
        assert_eq!(describe(&raw, 0..16 * K64), shape);

        let mut buf = [0; 4096];
        let error = raw.read_at(&mut buf, 4 * K64, Wait::Yes).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let error = raw.read_at(&mut buf, 4 * K64 - 512, Wait::Yes).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let error = raw.read_at(&mut buf, 4 * K64, Wait::No).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
    }

    #[test]
    fn a_read_ends_at_the_size_and_is_a_hole_past_it() {
        let (file, raw) = base(1000);
        file.write_all_at(&[9; 1000], 0).unwrap();
        let mut buf = [1; 512];
        let extent = raw.read_at(&mut buf, 900, Wait::Yes).unwrap();
        assert_eq!((extent.range, extent.kind), (900..1000, ExtentKind::Data));
        assert_eq!((&buf[..100], &buf[100..]), (&[9; 100][..], &[1; 412][..]));
        let extent = raw.read_at(&mut buf, 1000, Wait::No).unwrap();
        assert_eq!((extent.range, extent.kind), (1000..1512, ExtentKind::Hole));
    }

    #[test]
    fn a_read_without_waiting_returns_eagain_and_a_waiting_read_succeeds() {
        let (file, raw) = base(16 * K64);
        file.write_all_at(&[5; 65536], 0).unwrap();
        file.sync_all().unwrap();
        rustix::fs::fadvise(&*file, 0, None, Advice::DontNeed).unwrap();

        let mut buf = [0; 4096];
        let error = raw.read_at(&mut buf, 0, Wait::No).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EAGAIN));
        let extent = raw.read_at(&mut buf, 0, Wait::Yes).unwrap();
        assert_eq!((extent.range, extent.kind), (0..4096, ExtentKind::Data));
        assert_eq!(buf, [5; 4096]);
        // Now it is cached.
        raw.read_at(&mut buf, 0, Wait::No).unwrap();
    }

    #[test]
    fn a_memory_file_is_read_without_waiting_though_it_lacks_nowait() {
        let file = file(Path::new("/dev/shm"), K64);
        let raw = RawBase::new(file.clone(), HostKind::File, K64).unwrap();
        file.write_all_at(&[3; 4096], 0).unwrap();
        let mut buf = [0; 4096];
        raw.read_at(&mut buf, 0, Wait::No).unwrap();
        assert_eq!(buf, [3; 4096]);
        let shape = [(0..4096, ExtentKind::Data), (4096..K64, ExtentKind::Hole)];
        assert_eq!(describe(&raw, 0..K64), shape);
    }

    #[test]
    fn only_data_is_lent_with_its_range_in_the_file() {
        let (file, raw) = base(4 * K64);
        file.write_all_at(&[7; 65536], K64).unwrap();
        let mut lent = Vec::new();
        let mut copy = |_: BorrowedFd<'_>, range: Range<u64>| {
            lent.push(range);
            Ok(5)
        };
        let (found, copied) = raw.lend_at(0..4 * K64, Wait::Yes, &mut copy).unwrap();
        assert_eq!((found, copied), (Extent::new(0..K64, ExtentKind::Hole), None));
        let (found, copied) = raw.lend_at(K64..4 * K64, Wait::Yes, &mut copy).unwrap();
        assert_eq!((found, copied), (Extent::new(K64..2 * K64, ExtentKind::Data), Some(5)));
        assert_eq!((lent.len(), &lent[0]), (1, &(K64..2 * K64)));
    }
}
