//! Changes to a raw base that is mounted with `mode=rw`, or committed to.
//!
//! Its bytes are the host file's own, so nothing is ever filled from below. A failed sync latches
//! the base: pages that the host dropped after an error are not reported again by a second sync.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use rustix::fs::FallocateFlags;
use rustix::io::{Errno, ReadWriteFlags};

use super::{HostKind, RawBase, SizeOwner};
use crate::direct::RangeGuard;
use crate::host;
use crate::host::file_system::FsKind;
use crate::layer::{Layer, ReadBelow, Wait, WritableLayer};
use crate::pool::check_cancelled;
use crate::zeros::ZEROS;

/// The kind of a change, by its cost on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HostChange {
    /// Bytes written into the page cache.
    Write,
    /// Zeroing or punching a range.
    Deallocate,
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
        let guard = direct.lock_range(&(offset..offset + buf.len() as u64))?;
        self.write_direct(&guard, buf, offset)
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

impl RawBase {
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
        let guard = self.direct.as_ref().map(|direct| direct.lock_range(&range)).transpose()?;
        let inner = match self.kind {
            HostKind::File => range.clone(),
            HostKind::BlockDevice => host::whole_device_blocks(&range),
        };
        if inner.is_empty()
            || host::zero_by_host(&*self.file, methods, &inner, is_zeroing_refused)?
                == methods.len()
        {
            return self.write_zeros(range, guard.as_ref());
        }
        self.write_zeros(range.start..inner.start, guard.as_ref())?;
        self.write_zeros(inner.end..range.end, guard.as_ref())
    }

    /// Writes past the host's cache. The partial last unit of a file is excepted, since a write of
    /// the whole unit would make the file longer. That rest goes through the cache, and on to the
    /// device like the other bytes.
    fn write_direct(&self, guard: &RangeGuard<'_>, buf: &[u8], offset: u64) -> io::Result<()> {
        let (size, unit) = (self.size(), guard.offset_align());
        let border = if size.is_multiple_of(unit) { u64::MAX } else { size / unit * unit };
        let whole = usize::try_from(border.saturating_sub(offset)).unwrap_or(usize::MAX);
        let (whole, mut rest) = buf.split_at(whole.min(buf.len()));
        if !whole.is_empty() {
            guard.write_all_at(&[io::IoSlice::new(whole)], offset)?;
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

    fn write_zeros(&self, range: Range<u64>, guard: Option<&RangeGuard<'_>>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            check_cancelled()?;
            let len = (range.end - at).min(ZEROS.len() as u64);
            #[expect(clippy::cast_possible_truncation, reason = "at most ZEROS.len()")]
            let zeros = &ZEROS[..len as usize];
            match guard {
                None => self.file.write_all_at(zeros, at)?,
                Some(guard) => self.write_direct(guard, zeros, at)?,
            }
            at += len;
        }
        Ok(())
    }
}

/// Whether zeros have to be written: the host has no such operation, or a block device is claimed by
/// others as well (`EBUSY`).
fn is_zeroing_refused(error: &io::Error) -> bool {
    host::is_fallocate_unsupported(error) || error.raw_os_error() == Some(libc::EBUSY)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::sync::Arc;

    use super::super::tests::{K64, base, describe};
    use super::*;
    use crate::base::testing::UnreachableBelow;
    use crate::extents::ExtentKind;

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

    /// A request that is given up when it has been looked at so many times.
    struct GivenUpAfter(std::cell::Cell<usize>);

    impl crate::pool::Cancellable for GivenUpAfter {
        fn is_cancelled(&self) -> bool {
            let left = self.0.get();
            self.0.set(left.saturating_sub(1));
            left == 0
        }

        fn hold(&self) -> bool {
            !self.is_cancelled()
        }

        fn release(&self) {}
    }

    #[test]
    fn a_request_that_was_given_up_writes_no_more_zeros() {
        let (file, raw) = base(8 << 20);
        file.write_all_at(&vec![7; 8 << 20], 0).unwrap();
        let zero = || raw.zero_range(0..8 << 20, &[]);
        let given_up = GivenUpAfter(std::cell::Cell::new(3));
        let error = crate::pool::run_cancellable(given_up, zero).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        let mut got = vec![1; 8 << 20];
        file.read_exact_at(&mut got, 0).unwrap();
        let zeros = got.iter().take_while(|byte| **byte == 0).count();
        assert_eq!(zeros, 3 << 20);
        assert!(got[zeros..].iter().all(|byte| *byte == 7));
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
