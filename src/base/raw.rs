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
//! With `mode=rw` the same type takes writes. Its bytes are the host file's own, so nothing is ever
//! filled from below. A failed sync latches the base: pages that the host dropped after an error
//! are not reported again by a second sync.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::lock;
use crate::direct::{DirectFile, RangeGuard};
use crate::extents::{Extent, ExtentKind};
use crate::host;
use crate::host::file_system::{FsKind, HostFs};
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};
use crate::zeros::ZEROS;

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
    /// Set once a sync has failed: see [`WritableLayer::sync`].
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
        let manner = match kind {
            HostKind::File => HostFs::of(&*file)?.kind,
            HostKind::BlockDevice => FsKind::Local,
        };
        let no_wait = match manner {
            FsKind::Memory => ReadWriteFlags::empty(),
            _ => ReadWriteFlags::NOWAIT,
        };
        Ok(Self {
            file,
            direct: None,
            kind,
            fs_kind: manner,
            size,
            no_wait_flags: no_wait,
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

    /// Makes the base read-only, as a failed [`sync`](WritableLayer::sync) does.
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
        let end_of_file = rustix::fs::seek(&*self.file, SeekFrom::End(0))?;
        if range.start >= end_of_file {
            return Ok(extent(range, ExtentKind::Data));
        }
        Ok(extent(range.start..range.end.min(end_of_file), ExtentKind::Hole))
    }

    fn seek_failed(&self, error: Errno, range: Range<u64>) -> io::Result<Extent> {
        match error {
            Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS => {
                self.cannot_seek_holes.store(true, Ordering::Relaxed);
                Ok(extent(range, ExtentKind::Data))
            }
            error => Err(error.into()),
        }
    }

    /// Refuses changes to a latched base, and changes that this host may delay.
    fn check_change(&self, wait: Wait, change: HostChange) -> io::Result<()> {
        if self.is_latched.load(Ordering::Acquire) {
            return Err(Errno::IO.into());
        }
        // A device carries out discards and zeroing at its own speed; a file's file system only
        // records them.
        let waits = self.fs_kind == FsKind::Remote
            || (self.direct.is_some() && change == HostChange::Write)
            || (self.kind == HostKind::BlockDevice && change == HostChange::Deallocate);
        if wait == Wait::No && waits {
            return Err(Errno::AGAIN.into());
        }
        Ok(())
    }

    /// Zeros `range` by the first of `methods` that the host supports, else by writing zeros.
    fn zero_range(&self, range: Range<u64>, methods: &[FallocateFlags]) -> io::Result<()> {
        // A partial write of a unit writes the rest of the unit back, too.
        let alone = self.direct.as_ref().map(|direct| direct.lock_range(&range)).transpose()?;
        let inner = match self.kind {
            HostKind::File => range.clone(),
            HostKind::BlockDevice => host::whole_device_blocks(&range),
        };
        if inner.is_empty()
            || host::zero_by_host(&*self.file, methods, &inner, is_zeroing_refused)?
                == methods.len()
        {
            return self.write_zeros(range, alone.as_ref());
        }
        self.write_zeros(range.start..inner.start, alone.as_ref())?;
        self.write_zeros(inner.end..range.end, alone.as_ref())
    }

    /// Writes past the host's cache. The partial last unit of a file is excepted, since a write of
    /// the whole unit would make the file longer. That rest goes through the cache, and on to the
    /// device like the other bytes.
    fn write_direct(&self, alone: &RangeGuard<'_>, buf: &[u8], offset: u64) -> io::Result<()> {
        let (size, unit) = (self.size(), alone.offset_align());
        let border = if size.is_multiple_of(unit) { u64::MAX } else { size / unit * unit };
        let whole = usize::try_from(border.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (whole, mut rest) = buf.split_at(whole.min(buf.len()));
        if !whole.is_empty() {
            alone.write_all_at(&[io::IoSlice::new(whole)], offset)?;
        }
        let mut at = offset + whole.len() as u64;
        while !rest.is_empty() {
            let part = [io::IoSlice::new(rest)];
            match rustix::io::pwritev2(&*self.file, &part, at, ReadWriteFlags::DSYNC) {
                Ok(0) => return Err(Errno::IO.into()),
                Ok(len) => {
                    rest = &rest[len..];
                    at += len as u64;
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn write_zeros(&self, range: Range<u64>, alone: Option<&RangeGuard<'_>>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS.len() as u64);
            #[expect(clippy::cast_possible_truncation, reason = "at most ZEROS.len()")]
            let zeros = &ZEROS[..len as usize];
            match alone {
                None => self.file.write_all_at(zeros, at)?,
                Some(alone) => self.write_direct(alone, zeros, at)?,
            }
            at += len;
        }
        Ok(())
    }
}

impl Drop for RawBase {
    fn drop(&mut self) {
        lock::release(&self.file);
    }
}

/// The kind of a change, by its cost on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostChange {
    /// Bytes written into the page cache.
    Write,
    /// Zeroing or punching a range.
    Deallocate,
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
            return Ok(extent(range, ExtentKind::Hole));
        }
        let range = range.start..range.end.min(size);
        if self.cannot_seek_holes.load(Ordering::Relaxed) {
            return Ok(extent(range, ExtentKind::Data));
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
            return Ok(extent(asked, ExtentKind::Hole));
        }
        #[expect(clippy::cast_possible_truncation, reason = "at most buf.len()")]
        let len = (asked.end.min(size) - offset) as usize;
        let buf = &mut buf[..len];
        if wait == Wait::No {
            if self.direct.is_some() {
                return Err(Errno::AGAIN.into());
            }
            self.read_cached(buf, offset)?;
            return Ok(extent(offset..offset + len as u64, ExtentKind::Data));
        }
        let got = match &self.direct {
            None => host::read_at(&self.file, buf, offset, Wait::Yes)?,
            Some(direct) => direct.read_at(buf, offset)?,
        };
        if got == len {
            return Ok(extent(offset..offset + len as u64, ExtentKind::Data));
        }
        // The disk may just have been truncated by this daemon. If so, the rest is past its end.
        let end = offset + got as u64;
        if self.size() > end {
            return Err(Errno::IO.into());
        }
        if got > 0 {
            return Ok(extent(offset..end, ExtentKind::Data));
        }
        Ok(extent(asked, ExtentKind::Hole))
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

impl WritableLayer for RawBase {
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        _below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        self.check_change(wait, HostChange::Write)?;
        let Some(direct) = &self.direct else {
            return host::write_all_at(&self.file, &[io::IoSlice::new(buf)], offset);
        };
        let alone = direct.lock_range(&(offset..offset + buf.len() as u64))?;
        self.write_direct(&alone, buf, offset)
    }

    fn zero(&self, range: Range<u64>, _below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.check_change(wait, HostChange::Deallocate)?;
        self.zero_range(range, &[FallocateFlags::ZERO_RANGE])
    }

    fn punch_hole(&self, range: Range<u64>, _below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.check_change(wait, HostChange::Deallocate)?;
        self.zero_range(range, host::PUNCH_OR_ZERO)
    }

    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()> {
        self.check_change(wait, HostChange::Write)?;
        match self.kind {
            HostKind::File => host::allocate(&*self.file, range),
            // A device has all its space already.
            HostKind::BlockDevice => Ok(()),
        }
    }

    /// Sets the size; `EINVAL` for another size of a block device.
    fn set_size(&self, size: u64) -> io::Result<()> {
        let old = self.size();
        if size == old {
            return Ok(());
        }
        if self.kind == HostKind::BlockDevice {
            return Err(Errno::INVAL.into());
        }
        if i64::try_from(size).is_err() {
            return Err(Errno::FBIG.into());
        }
        if self.is_latched.load(Ordering::Acquire) {
            return Err(Errno::IO.into());
        }
        let SizeOwner::Ours(published) = &self.size else {
            return self.file.set_len(size);
        };
        // The smaller size is published first: no reader may find the host's new end inside the
        // size.
        published.store(old.min(size), Ordering::Release);
        if let Err(error) = self.file.set_len(size) {
            published.store(old, Ordering::Release);
            return Err(error);
        }
        published.store(size, Ordering::Release);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.is_latched.load(Ordering::Acquire) {
            return Err(Errno::IO.into());
        }
        let answer = self.file.sync_data();
        if answer.is_err() {
            self.is_latched.store(true, Ordering::Release);
        }
        answer
    }

    fn is_latched(&self) -> bool {
        self.is_latched.load(Ordering::Acquire)
    }
}

fn extent(range: Range<u64>, kind: ExtentKind) -> Extent {
    Extent { range, kind }
}

/// Whether zeros have to be written: the host has no such operation, or a block device is claimed by
/// others as well (`EBUSY`).
fn is_zeroing_refused(error: &io::Error) -> bool {
    host::is_fallocate_unsupported(error) || error.raw_os_error() == Some(libc::EBUSY)
}

#[cfg(test)]
mod tests {
    use std::os::fd::BorrowedFd;
    use std::path::Path;

    use rustix::fs::Advice;

    use super::*;
    use crate::base::testing::UnreachableBelow;

    /// The layers below a raw base, which has none: any call is a bug.
    fn file(dir: &Path, size: u64) -> Arc<File> {
        let file = tempfile::tempfile_in(dir).unwrap();
        file.set_len(size).unwrap();
        Arc::new(file)
    }

    /// Creates a base on a file system where RWF_NOWAIT and holes are known to work (`/var/tmp`).
    fn base(size: u64) -> (Arc<File>, RawBase) {
        let file = file(Path::new("/var/tmp"), size);
        let raw = RawBase::new(file.clone(), HostKind::File, size).unwrap();
        (file, raw)
    }

    fn describe(raw: &RawBase, range: Range<u64>) -> Vec<(Range<u64>, ExtentKind)> {
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

    const K64: u64 = 65536;

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
    fn writes_zeros_and_holes_reach_the_host_file() {
        let (file, raw) = base(16 * K64);
        raw.write_at(&[7; 4 * 65536], 0, &UnreachableBelow, Wait::No).unwrap();
        raw.zero(100..K64, &UnreachableBelow, Wait::No).unwrap();
        raw.punch_hole(2 * K64..4 * K64, &UnreachableBelow, Wait::No).unwrap();
        raw.sync().unwrap();

        let mut got = vec![1; 4 * 65536];
        file.read_exact_at(&mut got, 0).unwrap();
        let mut want = vec![7; 4 * 65536];
        want[100..65536].fill(0);
        want[2 * 65536..].fill(0);
        assert_eq!(got, want);
        assert_eq!(file.metadata().unwrap().len(), 16 * K64);
        assert_eq!(describe(&raw, 2 * K64..16 * K64), [(2 * K64..16 * K64, ExtentKind::Hole)]);
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
        assert_eq!((found, copied), (extent(0..K64, ExtentKind::Hole), None));
        let (found, copied) = raw.lend_at(K64..4 * K64, Wait::Yes, &mut copy).unwrap();
        assert_eq!((found, copied), (extent(K64..2 * K64, ExtentKind::Data), Some(5)));
        assert_eq!((lent.len(), &lent[0]), (1, &(K64..2 * K64)));
    }

    #[test]
    fn zeros_are_written_where_the_host_cannot_zero() {
        let (file, raw) = base(3 << 20);
        file.write_all_at(&vec![7; 3 << 20], 0).unwrap();
        raw.zero_range(10..(3 << 20) - 10, &[]).unwrap();
        let mut got = vec![1; 3 << 20];
        file.read_exact_at(&mut got, 0).unwrap();
        let mut want = vec![0; 3 << 20];
        want[..10].fill(7);
        want[(3 << 20) - 10..].fill(7);
        assert!(got == want);
    }

    #[test]
    fn the_size_follows_truncation() {
        use std::os::unix::fs::MetadataExt;

        let (file, raw) = base(K64);
        raw.write_at(&[7; 4096], 0, &UnreachableBelow, Wait::Yes).unwrap();
        raw.set_size(10).unwrap();
        assert_eq!((raw.size(), file.metadata().unwrap().len()), (10, 10));
        raw.set_size(2 * K64).unwrap();
        let mut buf = [1; 20];
        raw.read_at(&mut buf, 0, Wait::Yes).unwrap();
        assert_eq!(buf[..10], [7; 10]);
        assert_eq!(buf[10..], [0; 10]);
        let error = raw.set_size(u64::MAX).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EFBIG));
        assert_eq!(raw.size(), 2 * K64);
        raw.allocate(0..2 * K64, Wait::Yes).unwrap();
        assert_eq!(file.metadata().unwrap().blocks(), 2 * K64 / 512);
    }

    #[test]
    fn a_failed_sync_latches() {
        // /dev/full takes no fdatasync at all: EINVAL.
        let file = File::options().read(true).write(true).open("/dev/full").unwrap();
        let raw = RawBase::new(Arc::new(file), HostKind::File, K64).unwrap();
        assert!(raw.sync().is_err());
        let again = raw.sync().unwrap_err();
        assert_eq!(again.raw_os_error(), Some(libc::EIO));
        let write = raw.write_at(&[1], 0, &UnreachableBelow, Wait::Yes).unwrap_err();
        assert_eq!(write.raw_os_error(), Some(libc::EIO));
        let zero = raw.zero(0..1, &UnreachableBelow, Wait::No).unwrap_err();
        assert_eq!(zero.raw_os_error(), Some(libc::EIO));
        let size = raw.set_size(1).unwrap_err();
        assert_eq!(size.raw_os_error(), Some(libc::EIO));
    }
}
