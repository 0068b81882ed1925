//! Read, write and seek: the three loops over a disk's layers.

use std::io;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use parking_lot::{RwLockReadGuard, RwLockWriteGuard};

use super::{Disk, LayerStack, Top};
use crate::config::{DirectIo, Resize};
use crate::extents::{Extent, ExtentKind, Extents, describe};
use crate::host::os_error;
use crate::layer::{Layer, ReadBelow, Wait, WritableLayer};
use crate::overlay::MAX_DISK_SIZE;
use crate::overlay::sealed::Sealed;
use crate::pool::check_cancelled;

/// How long an exclusive waiter blocks new holders of the gate at first. Changes under way end
/// within milliseconds, unless they wait for a base.
const MIN_GATE_WAIT: Duration = Duration::from_millis(100);
/// How long an exclusive waiter blocks new holders at most. A host short of clean pages may hold a
/// write up for a second.
const MAX_GATE_WAIT: Duration = Duration::from_millis(1600);
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

/// The layers below the one that is written.
pub(super) struct LowerLayers<'a>(&'a [Arc<dyn Layer>]);

impl ReadBelow for LowerLayers<'_> {
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        read_through(self.0, buf, offset, wait)
    }

    fn is_zero_below(&self, range: Range<u64>, wait: Wait) -> io::Result<bool> {
        let extent = extent_through(self.0, range.clone(), wait)?;
        Ok(extent.kind != ExtentKind::Data && extent.range.end >= range.end)
    }
}

/// Fills `buf` through `layers`, top to bottom: each layer fills its own bytes and passes the rest
/// down.
fn read_through(
    layers: &[Arc<dyn Layer>],
    buf: &mut [u8],
    offset: u64,
    wait: Wait,
) -> io::Result<()> {
    let Some((layer, below)) = layers.split_first() else {
        buf.fill(0);
        return Ok(());
    };
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let rest = &mut buf[done..];
        let extent = layer.read_at(rest, at, wait)?;
        let len = usize::try_from(extent.len()).unwrap_or(usize::MAX).min(rest.len());
        match extent.kind {
            ExtentKind::Data => {}
            ExtentKind::Zero | ExtentKind::Hole => rest[..len].fill(0),
            ExtentKind::Lower => read_through(below, &mut rest[..len], at, wait)?,
        }
        done += len;
    }
    Ok(())
}

/// Describes a prefix of `range` through `layers`, top to bottom.
fn extent_through(
    layers: &[Arc<dyn Layer>],
    mut range: Range<u64>,
    wait: Wait,
) -> io::Result<Extent> {
    for layer in layers {
        let extent = layer.extent_at(range, wait)?;
        if extent.kind != ExtentKind::Lower {
            return Ok(extent);
        }
        range = extent.range;
    }
    Ok(Extent::new(range, ExtentKind::Hole))
}

impl LayerStack {
    /// Builds the stack of a disk's layers.
    pub(super) fn new(
        top: Top,
        sealed: Option<Arc<Sealed>>,
        bottom: Option<Arc<dyn Layer>>,
    ) -> Self {
        let first = match &top {
            Top::Overlay(overlay) => Some(Arc::clone(overlay) as Arc<dyn Layer>),
            Top::Reflink(reflink) => Some(Arc::clone(reflink) as Arc<dyn Layer>),
            Top::Base(_) | Top::Nothing => None,
        };
        let middle = sealed.clone().map(|sealed| sealed as Arc<dyn Layer>);
        let all = first.into_iter().chain(middle).chain(bottom.clone()).collect();
        Self { top, sealed, bottom, all }
    }

    /// Describes a prefix of `range` and returns the depth of its layer: 0 is the top, the greatest
    /// number the base.
    pub(super) fn extent_with_depth(
        &self,
        mut range: Range<u64>,
        wait: Wait,
    ) -> io::Result<(Extent, u32)> {
        let mut depth = 0;
        if let Top::Reflink(reflink) = &self.top {
            return Ok((reflink.extent_at(range, wait)?, depth));
        }
        if let Top::Overlay(overlay) = &self.top {
            let extent = overlay.extent_at(range, wait)?;
            if extent.kind != ExtentKind::Lower {
                return Ok((extent, depth));
            }
            range = extent.range;
            depth += 1;
        }
        if let Some(sealed) = &self.sealed {
            let (extent, layer) = sealed.extent_and_layer(&range);
            depth += u32::try_from(layer).unwrap_or(u32::MAX);
            if extent.kind != ExtentKind::Lower {
                return Ok((extent, depth));
            }
            range = extent.range;
        }
        let extent = match &self.bottom {
            Some(bottom) => bottom.extent_at(range, wait)?,
            None => Extent::new(range, ExtentKind::Hole),
        };
        Ok((extent, depth))
    }

    /// The disk's size in bytes, which is the size of its topmost layer.
    pub(super) fn size(&self) -> u64 {
        self.all.first().map_or(0, |layer| layer.size())
    }

    /// Returns the layer that takes changes; `EROFS` without one.
    pub(super) fn writable(&self) -> io::Result<&dyn WritableLayer> {
        match &self.top {
            Top::Overlay(overlay) => Ok(&**overlay),
            Top::Reflink(reflink) => Ok(&**reflink),
            Top::Base(base) => Ok(&**base),
            Top::Nothing => Err(os_error(libc::EROFS)),
        }
    }

    /// The layers below the top.
    pub(super) fn below(&self) -> LowerLayers<'_> {
        LowerLayers(self.all.get(1..).unwrap_or_default())
    }

    /// Describes a prefix of `range`.
    pub(super) fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        extent_through(&self.all, range, wait)
    }

    /// All layers, top to bottom.
    pub(super) fn all(&self) -> &[Arc<dyn Layer>] {
        &self.all
    }
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

    /// Takes the gate shared, for a change of bytes.
    pub(super) fn gate_shared(&self, wait: Wait) -> io::Result<RwLockReadGuard<'_, ()>> {
        let gate = match wait {
            Wait::Yes => self.gate.read(),
            Wait::No => self.gate.try_read().ok_or_else(|| os_error(libc::EAGAIN))?,
        };
        self.check_changeable().map(|()| gate)
    }

    /// Takes the gate exclusive, for a change of the size.
    fn gate_exclusive(&self, wait: Wait) -> io::Result<RwLockWriteGuard<'_, ()>> {
        let gate = match wait {
            Wait::Yes => self
                .wait_for_gate(|| check_cancelled().is_ok())
                .ok_or_else(|| os_error(libc::EIO))?,
            Wait::No => self.gate.try_write().ok_or_else(|| os_error(libc::EAGAIN))?,
        };
        self.check_changeable().map(|()| gate)
    }

    /// Takes the gate exclusive; returns `None` once `may_wait` returns false.
    ///
    /// An exclusive waiter blocks all new shared holders, and a change that waits for a hanging
    /// base may hold the gate for as long as the base hangs. So only one caller waits at a time,
    /// and it steps back repeatedly so that the others make progress.
    pub(super) fn wait_for_gate(
        &self,
        may_wait: impl Fn() -> bool,
    ) -> Option<RwLockWriteGuard<'_, ()>> {
        let mut stint = MIN_GATE_WAIT;
        loop {
            if let Some(_first) = self.gate_queue.try_lock_for(MIN_GATE_WAIT) {
                if let Some(gate) = self.gate.try_write_for(stint) {
                    return Some(gate);
                }
                thread::sleep(stint / 2);
                stint = (stint * 2).min(MAX_GATE_WAIT);
            }
            if !may_wait() {
                return None;
            }
        }
    }

    /// Checks after the wait for the gate whether this request may still change the disk.
    fn check_changeable(&self) -> io::Result<()> {
        check_cancelled()?;
        if self.closed.load(Ordering::Relaxed) { Err(os_error(libc::EIO)) } else { Ok(()) }
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
            read_through(layers.all(), &mut buf[..len], offset, wait)?;
            return Ok(len);
        }
        read_through(layers.all(), &mut buf[..len], offset, wait)?;
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
            let _gate = self.gate_shared(wait)?;
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
        let _gate = self.gate_exclusive(wait)?;
        let layers = self.layers();
        let top = layers.writable()?;
        let old = top.size();
        if end > old {
            self.check_growth(libc::ENOSPC)?;
            top.set_size(end)?;
        }
        let written = top.write_at(buf, offset, &layers.below(), wait);
        if written.is_err() && end > old {
            // Nothing was written, so the disk must not have grown.
            top.set_size(old)?;
        }
        self.note_no_space(written)?;
        self.touch_times(&layers.top);
        Ok(())
    }

    /// Returns `refusal` when the disk's size is fixed.
    fn check_growth(&self, refusal: i32) -> io::Result<()> {
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
        self.check_direct_wait(wait)?;
        let _gate = self.gate_exclusive(wait)?;
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
        keep: SizeMode,
        wait: Wait,
    ) -> io::Result<()> {
        if range.end > MAX_DISK_SIZE {
            return Err(os_error(libc::EFBIG));
        }
        self.check_direct_wait(wait)?;
        if keep == SizeMode::Grow && range.end > self.size() {
            let _gate = self.gate_exclusive(wait)?;
            let layers = self.layers();
            if range.end > layers.size() {
                self.check_growth(libc::ENOSPC)?;
                layers.writable()?.set_size(range.end)?;
            }
        }
        let _gate = self.gate_shared(wait)?;
        let layers = self.layers();
        let top = layers.writable()?;
        let range = range.start..range.end.min(top.size());
        if !range.is_empty() {
            let below = layers.below();
            self.note_no_space(match change {
                FallocateMode::Allocate => top.allocate(range, wait),
                FallocateMode::Zero => top.zero(range, &below, wait),
                FallocateMode::Punch => top.punch_hole(range, &below, wait),
            })?;
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
        let mut at = range.start;
        let mut steps = 0;
        while at < size {
            if wait == Wait::No && steps == MAX_SEEK_STEPS {
                return Err(os_error(libc::EAGAIN));
            }
            steps += 1;
            let extent = layers.extent_at(at..size, wait)?;
            if (extent.kind == ExtentKind::Data) == (whence == Whence::Data) {
                return Ok(at);
            }
            at = extent.range.end;
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
        let mut at = range.start;
        let mut pieces = Vec::new();
        while at < end && pieces.len() < limit {
            let (extent, depth) = layers.extent_with_depth(at..end, wait)?;
            at = extent.range.end;
            pieces.push((extent, depth));
        }
        Ok(pieces)
    }

    /// Makes all that was acknowledged before the call durable (fsync(2)). A temporary overlay
    /// promises no durability and returns freed space to the host.
    ///
    /// # Errors
    /// `EIO` once the disk has latched.
    pub fn sync(&self) -> io::Result<()> {
        self.note_no_space(match &self.layers().top {
            Top::Nothing => Ok(()),
            Top::Overlay(overlay) => overlay.sync(),
            Top::Reflink(reflink) => reflink.sync(),
            Top::Base(base) => base.sync(),
        })
    }

    /// Starts writeback of `range` (bytes) on the host when a sync is likely to follow. Called
    /// after the range was written and the write answered.
    pub fn prepare_sync(&self, range: Range<u64>) {
        // Only a number is read under the lock: host I/O that hangs under it would block every
        // caller that needs the layers.
        let overlay = match &self.layers.read().top {
            Top::Overlay(overlay) if overlay.is_synced_often() => Arc::clone(overlay),
            Top::Overlay(_) | Top::Reflink(_) | Top::Base(_) | Top::Nothing => return,
        };
        overlay.prepare_sync(range);
    }

    /// Whether [`sync`](Self::sync) takes about as long as the device needs for a few blocks.
    #[must_use]
    pub fn is_quick_to_sync(&self) -> bool {
        match &self.layers().top {
            Top::Nothing => true,
            Top::Overlay(overlay) => overlay.is_quick_to_sync(),
            // Others may have written to the files of these.
            Top::Reflink(_) | Top::Base(_) => false,
        }
    }
}
