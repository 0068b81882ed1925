//! Copies between disks, without passing the bytes through user space where the host can copy.

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;

use super::Disk;
use super::layers::{LayerStack, Top};
use crate::extents::ExtentKind;
use crate::host::{COPY_CHUNK, copy_range, or_copied_none, os_error};
use crate::layer::Wait;
use crate::overlay::Overlay;
use crate::overlay::reflink::Reflink;
use crate::pool::hold_reply;

/// The most bytes that one request copies, so that even a slow host finishes before the request's
/// deadline.
const MAX_COPY_LEN: u64 = 64 << 20;

/// The most bytes that are copied while the request cannot be given up.
const MAX_HELD_COPY: u64 = 1 << 20;

/// Copies the range `from` of `source` to `offset` of `target`. Returns the number of bytes copied:
/// fewer at the source's end, or when the source changed meanwhile.
///
/// # Errors
/// The errors of [`Disk::read`] and [`Disk::write`] under [`Wait::Yes`].
pub(super) fn copy_between(
    source: &Disk,
    from: Range<u64>,
    target: &Disk,
    offset: u64,
) -> io::Result<u64> {
    let layers = source.layers();
    let end = from.end.min(layers.size()).min(from.start.saturating_add(MAX_COPY_LEN));
    if from.start >= end {
        return Ok(0);
    }
    let old = target.size();
    let grown = offset.saturating_add(end - from.start);
    // The size is set first, so that the host can copy whole blocks into place.
    let grows = target.grow_to(grown)?;
    let mut done = 0;
    let copied = copy_extents(&layers, source, from.start..end, target, offset, &mut done);
    if grows && offset + done < grown {
        target.shrink_back(grown, old.max(offset + done))?;
    }
    copied.map(|()| done)
}

/// Copies `from` extent by extent, and counts the copied bytes in `done`.
fn copy_extents(
    layers: &LayerStack,
    source: &Disk,
    from: Range<u64>,
    target: &Disk,
    offset: u64,
    done: &mut u64,
) -> io::Result<()> {
    for piece in layers.pieces(from, Wait::Yes) {
        let (extent, _) = piece?;
        let len = extent.len();
        let to = offset + *done;
        match extent.kind {
            ExtentKind::Data => {
                let copied = copy_data(layers, source, extent.range, target, to)?;
                if copied < len {
                    *done += copied;
                    break; // The source has shrunk meanwhile.
                }
            }
            ExtentKind::Zero | ExtentKind::Hole | ExtentKind::Lower => {
                target.fallocate(
                    to..to + len,
                    super::FallocateMode::Punch,
                    super::SizeMode::Keep,
                    Wait::Yes,
                )?;
            }
        }
        *done += len;
    }
    Ok(())
}

/// Copies one Data extent: whole blocks by the host where possible, the rest through a buffer.
/// Returns the number of bytes copied.
fn copy_data(
    layers: &LayerStack,
    source: &Disk,
    from: Range<u64>,
    target: &Disk,
    offset: u64,
) -> io::Result<u64> {
    let mut at = from.start;
    while at < from.end {
        let to = offset + (at - from.start);
        let by_host = target.copy_blocks(layers, at..from.end, to)?;
        if by_host > 0 {
            at += by_host;
            continue;
        }
        let len = (from.end - at).min(COPY_CHUNK as u64);
        // Up to the target's next block boundary, so that whole blocks follow.
        let border = (to + 1).next_multiple_of(u64::from(target.block_size())) - to;
        let len =
            if to.is_multiple_of(u64::from(target.block_size())) { len } else { len.min(border) };
        let mut buf = vec![0; usize::try_from(len).map_err(|_| os_error(libc::EFBIG))?];
        let got = source.read(&mut buf, at, Wait::Yes)?;
        if got == 0 {
            break;
        }
        target.write(&buf[..got], to, Wait::Yes)?;
        at += got as u64;
    }
    Ok(at - from.start)
}

impl Disk {
    /// Copies the range `from` of `source` to `offset` of this disk (copy_file_range(2)); a copy
    /// that ends past the end grows the disk. Returns the number of bytes copied.
    ///
    /// # Errors
    /// The errors of [`read`](Self::read) of the source and of [`write`](Self::write); `EOPNOTSUPP`
    /// for a stream, which makes the kernel read and write by itself.
    pub fn copy_from(&self, source: &Self, from: Range<u64>, offset: u64) -> io::Result<u64> {
        if self.stream().is_some() || source.stream().is_some() {
            return Err(os_error(libc::EOPNOTSUPP));
        }
        copy_between(source, from, self, offset)
    }

    /// Grows the disk to `size` bytes, unless it is as large already. Returns whether it grew.
    fn grow_to(&self, size: u64) -> io::Result<bool> {
        let _gate = self.gate.exclusive(Wait::Yes)?;
        let layers = self.layers();
        let top = layers.writable()?;
        if top.size() >= size {
            return Ok(false);
        }
        self.check_growth(libc::EPERM)?;
        top.set_size(size)?;
        self.touch_times(&layers.top);
        Ok(true)
    }

    /// Shrinks a disk that was grown to `grown` bytes to `size`, unless somebody has changed its size
    /// since.
    fn shrink_back(&self, grown: u64, size: u64) -> io::Result<()> {
        let _gate = self.gate.exclusive(Wait::Yes)?;
        let layers = self.layers();
        let top = layers.writable()?;
        if top.size() == grown { top.set_size(size) } else { Ok(()) }
    }

    /// Lets the host copy the whole blocks at the start of `from` to `offset`. Returns 0 when there
    /// are none or the host cannot copy.
    fn copy_blocks(&self, source: &LayerStack, from: Range<u64>, offset: u64) -> io::Result<u64> {
        let _gate = self.gate.shared(Wait::Yes)?;
        let layers = self.layers();
        let block = u64::from(self.block_size());
        let size = layers.size();
        let end = offset.saturating_add(from.end - from.start).min(size);
        let end = if end == size { end } else { end / block * block };
        if !offset.is_multiple_of(block) || offset >= end {
            return Ok(0);
        }
        let copied = match &layers.top {
            Top::Overlay(overlay) => copy_to_overlay(overlay, offset..end, source, &from),
            Top::Reflink(reflink) => copy_to_reflink(reflink, offset..end, source, &from),
            Top::Writable(_) | Top::Nothing => return Ok(0),
        };
        if copied.is_ok() {
            self.touch_times(&layers.top);
        }
        or_copied_none(copied)
    }
}

/// Copies from the source's lent file into a reflink overlay's file.
fn copy_to_reflink(
    target: &Reflink,
    to: Range<u64>,
    source: &LayerStack,
    from: &Range<u64>,
) -> io::Result<u64> {
    if target.is_latched() {
        return Err(os_error(libc::EIO));
    }
    let wanted = from.start..from.start + (to.end - to.start).min(MAX_HELD_COPY);
    // Nothing locks the range: a later write must not be acknowledged while the host still copies.
    let _held = hold_reply()?;
    source.lend_at(wanted, &mut |input, piece| {
        copy_range(input, piece, target.data().as_fd(), to.start)
    })
}

/// Locks the target's ranges first and lends the source's file inside: a reader that is counted in
/// never waits for a lock.
fn copy_to_overlay(
    overlay: &Overlay,
    to: Range<u64>,
    source: &LayerStack,
    from: &Range<u64>,
) -> io::Result<u64> {
    let len = to.end - to.start;
    overlay.copy_in(&to, &mut |file, target| {
        let wanted = from.start..from.start + len;
        source.lend_at(wanted, &mut |input, piece| copy_range(input, piece, file, target.start))
    })
}
