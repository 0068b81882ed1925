//! Reading, writing and seeking.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;

use super::Disk;
use crate::config::{DirectIo, Resize};
use crate::extents::{Extent, ExtentKind, Extents, describe};
use crate::host::os_error;
use crate::layer::{ReadBelow as _, Wait, WritableLayer};
use crate::overlay::MAX_DISK_SIZE;

/// The most extents a seek visits on a FUSE worker before it continues in the pool.
const MAX_SEEK_STEPS: usize = 512;

/// The target of an lseek(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whence {
    /// The next byte of data (`SEEK_DATA`).
    Data,
    /// The next byte of a hole, or the end of the file (`SEEK_HOLE`).
    Hole,
}

/// The change that fallocate(2) makes to a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FallocateMode {
    /// Reserves space.
    Allocate,
    /// Zeros the range.
    Zero,
    /// Turns the range into a hole.
    Punch,
}

/// Whether a range past the end extends the file (fallocate(2), `FALLOC_FL_KEEP_SIZE`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeMode {
    /// The size stays the same.
    Keep,
    /// The file grows to contain the range.
    Grow,
}

impl Disk {
    /// Returns `EAGAIN` when the I/O of a disk with `direct` would run at the device's speed on a
    /// worker.
    ///
    /// A write through the host's page cache is done by the worker, which keeps its permit for a
    /// microsecond or two. A direct write lasts as long as the device takes, and on a device that
    /// hangs one disk would hold all workers but one. The disk's own pool has the threads for that.
    /// The check is here and not in the layers, because the size is changed before the bytes are
    /// written, and nothing may have changed when `EAGAIN` is returned.
    fn check_direct_wait(&self, wait: Wait) -> io::Result<()> {
        match (self.direct, wait) {
            (DirectIo::On, Wait::No) => Err(os_error(libc::EAGAIN)),
            (DirectIo::Off, _) | (_, Wait::Yes) => Ok(()),
        }
    }

    /// Reads into `buf` from `offset` and returns the bytes read: fewer than asked only at the end.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the read would have to wait; else the host's errno.
    pub fn read(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
        let layers = self.layers();
        let left = layers.size().saturating_sub(offset);
        let len = usize::try_from(left).unwrap_or(usize::MAX).min(buf.len());
        if self.copies_on_read() && len > 0 {
            self.check_direct_wait(wait)?;
            match self.copy_up(offset..offset + len as u64, wait) {
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => return Err(error),
                // A full or latched disk can still be read.
                Ok(_) | Err(_) => {}
            }
            drop(layers);
            let layers = self.layers();
            layers.read_at(&mut buf[..len], offset, wait)?;
            return Ok(len);
        }
        layers.read_at(&mut buf[..len], offset, wait)?;
        Ok(len)
    }

    /// Writes all of `buf` at `offset`; a write that ends past the end grows the disk.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the write would have to wait; `EROFS`; `ENOSPC` when the
    /// host or the overlay's limit is full, or past the end of a disk of fixed size; `EFBIG`; `EIO`
    /// once the disk has latched.
    pub fn write(&self, buf: &[u8], offset: u64, wait: Wait) -> io::Result<()> {
        if buf.is_empty() {
            return Ok(());
        }
        self.check_direct_wait(wait)?;
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= MAX_DISK_SIZE);
        let end = end.ok_or_else(|| os_error(libc::EFBIG))?;
        let layers = {
            let _gate = self.gate.shared(wait)?;
            let layers = self.layers();
            if end <= layers.size() {
                let top = layers.writable()?;
                self.note_no_space(top.write_at(buf, offset, &layers.below(), wait))?;
                self.touch_times(&layers.top);
                return Ok(());
            }
            layers
        };
        drop(layers);
        self.write_past_end(buf, offset, end, wait)
    }

    /// Writes past the end: changes first the size, then the bytes.
    fn write_past_end(&self, buf: &[u8], offset: u64, end: u64, wait: Wait) -> io::Result<()> {
        self.await_base_for_growth(offset, wait)?;
        let _gate = self.gate.exclusive(wait)?;
        let layers = self.layers();
        let top = layers.writable()?;
        self.grow_for(top, end, || top.write_at(buf, offset, &layers.below(), wait))?;
        self.touch_times(&layers.top);
        Ok(())
    }

    /// Reads what a change of the bytes from `start` on, which grows the disk, will read from the layers
    /// below: a base that hangs is waited for here, where no lock is held, and not under the gate,
    /// where all changes of the disk would wait with it.
    fn await_base_for_growth(&self, start: u64, wait: Wait) -> io::Result<()> {
        let layers = self.layers();
        layers.writable()?;
        self.check_growth(libc::ENOSPC)?;
        let Some(overlay) = layers.top.overlay() else { return Ok(()) };
        let need = overlay.needed_below(start);
        if need.is_empty() {
            return Ok(());
        }
        let len = usize::try_from(need.end - need.start).map_err(|_| os_error(libc::EFBIG))?;
        layers.below().read_below(&mut vec![0; len], need.start, wait)
    }

    /// Grows the disk to `end`, if it is smaller, for `change`; after a failure the disk is as large
    /// as before. The caller holds the gate exclusive, so that nobody else writes past the old end
    /// meanwhile.
    fn grow_for(
        &self,
        top: &dyn WritableLayer,
        end: u64,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        let old = top.size();
        if end > old {
            self.check_growth(libc::ENOSPC)?;
            top.set_size(end)?;
        }
        let changed = change();
        if changed.is_err() && end > old {
            top.set_size(old)?;
        }
        self.note_no_space(changed)
    }

    /// Returns `refusal` when the disk's size is fixed.
    pub(super) fn check_growth(&self, refusal: i32) -> io::Result<()> {
        match self.resize {
            Resize::Follow => Ok(()),
            Resize::Fixed => Err(os_error(refusal)),
        }
    }

    /// Sets the size in bytes (ftruncate(2)). A disk of fixed size refuses every other size with
    /// `EPERM`, except 0, which discards all its data.
    ///
    /// # Errors
    /// The errors of [`write`](Self::write).
    pub fn set_size(&self, size: u64, wait: Wait) -> io::Result<()> {
        self.set_size_by(self.ino(), size, wait)
    }

    /// Sets the size as [`set_size`](Self::set_size) does, for the kernel's inode `ino`.
    ///
    /// # Errors
    /// The errors of [`set_size`](Self::set_size) and [`check_ino`](Self::check_ino).
    pub(super) fn set_size_by(&self, ino: u64, size: u64, wait: Wait) -> io::Result<()> {
        self.check_direct_wait(wait)?;
        let _gate = self.gate.exclusive(wait)?;
        self.check_ino(ino)?;
        let layers = self.layers();
        let top = layers.writable()?;
        let old = top.size();
        if self.stream().is_some() {
            // A stream keeps its size.
            top.set_size(size)?;
        } else if size == 0 && self.resize == Resize::Fixed {
            top.punch_hole(0..old, &layers.below(), wait)?;
        } else if size != old {
            self.check_growth(libc::EPERM)?;
            top.set_size(size)?;
        }
        self.touch_times(&layers.top);
        Ok(())
    }

    /// Applies fallocate(2) to `range`.
    ///
    /// # Errors
    /// The errors of [`write`](Self::write); `EOPNOTSUPP` where the host cannot reserve space.
    pub fn fallocate(
        &self,
        range: Range<u64>,
        change: FallocateMode,
        size_mode: SizeMode,
        wait: Wait,
    ) -> io::Result<()> {
        if range.end > MAX_DISK_SIZE {
            return Err(os_error(libc::EFBIG));
        }
        self.check_direct_wait(wait)?;
        let grows = size_mode == SizeMode::Grow && range.end > self.size();
        if grows && change != FallocateMode::Allocate {
            self.await_base_for_growth(range.start, wait)?;
        }
        let _exclusive = grows.then(|| self.gate.exclusive(wait)).transpose()?;
        let _shared = (!grows).then(|| self.gate.shared(wait)).transpose()?;
        let layers = self.layers();
        let top = layers.writable()?;
        let apply = || {
            let range = range.start..range.end.min(top.size());
            if range.is_empty() {
                return Ok(());
            }
            let below = layers.below();
            match change {
                FallocateMode::Allocate => top.allocate(range, wait),
                FallocateMode::Zero => top.zero(range, &below, wait),
                FallocateMode::Punch => top.punch_hole(range, &below, wait),
            }
        };
        if grows {
            self.grow_for(top, range.end, apply)?;
        } else {
            self.note_no_space(apply())?;
        }
        self.touch_times(&layers.top);
        Ok(())
    }

    /// Returns the offset at or after `offset` where data or a hole begins (lseek(2)).
    ///
    /// # Errors
    /// `ENXIO` at or past the end, and when no data follows; `EAGAIN` under [`Wait::No`] when the
    /// seek would have to wait or takes long.
    pub fn seek(&self, offset: u64, whence: Whence, wait: Wait) -> io::Result<u64> {
        self.seek_in(offset..u64::MAX, whence, wait)
    }

    /// Seeks as [`seek`](Self::seek) does, within `range`, whose end counts as the end of the file.
    pub(super) fn seek_in(&self, range: Range<u64>, whence: Whence, wait: Wait) -> io::Result<u64> {
        let layers = self.layers();
        let size = layers.size().min(range.end);
        if range.start >= size {
            return Err(os_error(libc::ENXIO));
        }
        for (step, piece) in layers.pieces(range.start..size, wait).enumerate() {
            let (extent, _) = piece?;
            if (extent.kind == ExtentKind::Data) == (whence == Whence::Data) {
                return Ok(extent.range.start);
            }
            if wait == Wait::No && step + 1 == MAX_SEEK_STEPS && extent.range.end < size {
                return Err(os_error(libc::EAGAIN));
            }
        }
        match whence {
            Whence::Data => Err(os_error(libc::ENXIO)),
            Whence::Hole => Ok(size),
        }
    }

    /// Describes `range` as at most `limit` extents.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the base would have to be waited for; the host's errno.
    pub fn extents(&self, range: Range<u64>, limit: usize, wait: Wait) -> io::Result<Extents> {
        let layers = self.layers();
        let range = range.start..range.end.min(layers.size()).max(range.start);
        let limit = NonZeroUsize::new(limit).unwrap_or(NonZeroUsize::MIN);
        describe(range, limit, |rest| layers.extent_at(rest, wait))
    }

    /// Describes `range` as [`extents`](Self::extents) does, each extent with the depth of its
    /// layer: 0 is the top. Equal kinds side by side are joined only within one layer.
    ///
    /// # Errors
    /// The errors of [`extents`](Self::extents).
    pub fn extents_with_depth(
        &self,
        range: Range<u64>,
        limit: usize,
        wait: Wait,
    ) -> io::Result<Vec<(Extent, u32)>> {
        let layers = self.layers();
        let end = range.end.min(layers.size());
        layers.pieces(range.start..end, wait).take(limit).collect()
    }

    /// Makes all that was acknowledged before the call durable (fsync(2)). A temporary overlay
    /// promises no durability and returns freed space to the host.
    ///
    /// # Errors
    /// `EIO` once the disk has latched.
    pub fn sync(&self) -> io::Result<()> {
        self.note_no_space(self.layers().top.sync())
    }

    /// Starts writeback of `range` (bytes) on the host when a sync is likely to follow. Called
    /// after the range was written and the write answered.
    pub fn prepare_sync(&self, range: Range<u64>) {
        // Only a number is read under the lock: host I/O that hangs under it would block every
        // caller that needs the layers.
        let overlay = match self.layers.read().top.overlay() {
            Some(overlay) if overlay.is_synced_often() => Arc::clone(overlay),
            Some(_) | None => return,
        };
        overlay.prepare_sync(range);
    }

    /// Whether [`sync`](Self::sync) takes about as long as the device needs for a few blocks.
    #[must_use]
    pub fn is_quick_to_sync(&self) -> bool {
        self.layers().top.is_quick_to_sync()
    }
}
