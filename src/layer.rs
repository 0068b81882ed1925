//! What a layer is: the traits every base, overlay and stream answers.
//!
//! A disk is a stack of layers. Reading asks the top layer; where it answers [`ExtentKind::Lower`] the
//! question goes one layer down. Only `disk.rs` walks the stack.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::extents::Extent;
#[cfg(doc)]
use crate::extents::ExtentKind;

/// Whether a call may wait for a device, a lock or another host.
///
/// A FUSE worker asks with [`Wait::No`] and hands the request to the disk's pool when the answer
/// is `EAGAIN`; so a base that hangs holds threads of its own disk and nobody else's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Answer `EAGAIN` instead of waiting; nothing has been changed then.
    No,
    /// Wait as long as it takes.
    Yes,
}

/// Copies a range out of a host file and tells how many bytes it took.
pub type CopyFn<'a> = &'a mut dyn FnMut(BorrowedFd<'_>, Range<u64>) -> io::Result<u64>;

/// A read-only layer.
pub trait Layer: Send + Sync {
    /// The size of what this layer describes, in bytes.
    fn size(&self) -> u64;

    /// Describes a non-empty prefix of `range` (bytes, not empty) without reading data.
    ///
    /// The answer starts at `range.start` and ends at or before `range.end`. At and past
    /// [`size`](Self::size) it is a [`ExtentKind::Hole`]. What a layer cannot tell it calls
    /// [`ExtentKind::Data`]: always safe.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the answer would have to wait; else the host's errno.
    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent>;

    /// The same answer for `offset..offset + buf.len()` (`buf` is not empty), and when it is
    /// [`ExtentKind::Data`] the bytes of that prefix are in `buf`. For every other kind `buf` is left
    /// as it was.
    ///
    /// # Errors
    /// As [`extent_at`](Self::extent_at); `EIO` when the host file is shorter than it was.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent>;

    /// The same answer once more, and when it is [`ExtentKind::Data`] and one host file holds that
    /// prefix, `copy` is called with the file and the bytes' place in it, while that place is kept
    /// from being reused. Its result comes back; `None` when there was no file to lend.
    ///
    /// # Errors
    /// As [`extent_at`](Self::extent_at), and what `copy` returns.
    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)>;
}

/// Reads through the layers below a writable one: what a partly written block is filled from.
pub trait ReadBelow {
    /// Fills all of `buf` with the disk's bytes from `offset` on, as the layers below have them.
    ///
    /// # Errors
    /// As [`Layer::read_at`].
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()>;

    /// Whether the layers below read as zeros in all of `range` (a "no" may be wrong, a "yes" not).
    ///
    /// # Errors
    /// As [`Layer::extent_at`].
    fn is_zero_below(&self, range: Range<u64>, wait: Wait) -> io::Result<bool>;
}

/// A layer that takes changes. The caller holds the disk's gate shared, and exclusive for
/// [`set_size`](Self::set_size); `write_at`, `zero` and `punch_hole` stay inside the size.
pub trait WritableLayer: Layer {
    /// Writes all of `buf` at `offset` (bytes). `below` fills the rest of a block that is touched
    /// for the first time and only in part.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`], with nothing changed; `ENOSPC` when the host or the
    /// overlay's limit is full; `EIO` once the layer has latched.
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()>;

    /// Makes `range` read as zeros.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()>;

    /// Makes `range` read as zeros and gives its space back to the host, sooner or later.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at).
    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()>;

    /// Sees to it that later writes into `range` find space on the host.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at); `EOPNOTSUPP` where the host cannot.
    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()>;

    /// Changes the size. What is cut off is gone; what is added reads as zeros.
    ///
    /// # Errors
    /// As [`write_at`](Self::write_at); `EFBIG` past the largest size the host file can have.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Makes all that was acknowledged before the call durable.
    ///
    /// # Errors
    /// The host's errno; the layer has latched then and every later write and sync is `EIO`.
    fn sync(&self) -> io::Result<()>;

    /// Whether a failed sync has made it read-only. A stream fails in ways of its own.
    fn is_latched(&self) -> bool {
        false
    }
}
