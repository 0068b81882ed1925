//! The layer traits: the interface of every base, overlay and stream.
//!
//! A disk is a stack of layers. A read asks the top layer; where the top answers
//! [`ExtentKind::Lower`], the next layer down is asked. Only the `disk` module walks the stack.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::extents::{Extent, ExtentKind};

/// Whether a call may wait for a device, a lock or another host.
///
/// A FUSE worker asks with [`Wait::No`] and hands the request to the disk's pool when the answer is
/// `EAGAIN`, so a base that hangs blocks only threads of its own disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Return `EAGAIN` instead of waiting; nothing has been changed in that case.
    No,
    /// Wait for as long as the call takes.
    Yes,
}

/// Copies a range out of a host file and returns the number of bytes copied.
pub type CopyFn<'a> = &'a mut dyn FnMut(BorrowedFd<'_>, Range<u64>) -> io::Result<u64>;

/// A read-only layer.
pub trait Layer: Send + Sync {
    /// Returns the size, in bytes, of the disk that this layer describes.
    fn size(&self) -> u64;

    /// Describes a non-empty prefix of `range` (bytes, not empty) without reading data.
    ///
    /// The answer starts at `range.start` and ends at or before `range.end`. At and past
    /// [`size`](Self::size) the answer is a [`ExtentKind::Hole`]. Where a layer does not know, the
    /// answer is [`ExtentKind::Data`], which is always safe.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the answer would have to wait; otherwise the host's errno.
    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent>;

    /// Describes a prefix of `range` like [`extent_at`](Self::extent_at), and returns how many layers
    /// were passed on the way to the answer: of several layers that are read as one, those above
    /// the answering one, and all of them for [`ExtentKind::Lower`].
    ///
    /// # Errors
    /// The errors of [`extent_at`](Self::extent_at).
    fn extent_with_depth(&self, range: Range<u64>, wait: Wait) -> io::Result<(Extent, u32)> {
        let extent = self.extent_at(range, wait)?;
        let passed = u32::from(extent.kind == ExtentKind::Lower);
        Ok((extent, passed))
    }

    /// Describes a prefix of `offset..offset + buf.len()` (`buf` is not empty) like
    /// [`extent_at`](Self::extent_at). When that prefix is [`ExtentKind::Data`], its bytes are read
    /// into `buf`; for every other kind `buf` is left unchanged.
    ///
    /// # Errors
    /// The errors of [`extent_at`](Self::extent_at); `EIO` when the host file has become shorter.
    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent>;

    /// Describes a prefix of `range` like [`extent_at`](Self::extent_at). When that prefix is
    /// [`ExtentKind::Data`] and a single host file holds all of it, `copy` is called with that file
    /// and the prefix's byte range in the file, and the range is protected from reuse during the
    /// call. Returns the result of `copy`, or `None` when there was no file to lend.
    ///
    /// # Errors
    /// The errors of [`extent_at`](Self::extent_at) and of `copy`.
    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)>;
}

/// Reads through the layers below a writable layer, to fill the rest of a partly written block.
pub trait ReadBelow {
    /// Fills all of `buf` with the disk's bytes from `offset` on, as the layers below hold them.
    ///
    /// # Errors
    /// The errors of [`Layer::read_at`].
    fn read_below(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()>;

    /// Returns whether the layers below read as zeros in all of `range`. A "no" may be wrong, a
    /// "yes" never is.
    ///
    /// # Errors
    /// The errors of [`Layer::extent_at`].
    fn is_zero_below(&self, range: Range<u64>, wait: Wait) -> io::Result<bool>;
}

/// A layer that can be changed. The caller holds the disk's gate shared, or exclusive for
/// [`set_size`](Self::set_size); `write_at`, `zero` and `punch_hole` stay inside the size.
pub trait WritableLayer: Layer {
    /// Writes all of `buf` at `offset` (bytes). `below` supplies the rest of each block that is
    /// touched for the first time and only in part.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`], with nothing changed; `ENOSPC` when the host is full or the
    /// overlay's limit is reached; `EIO` once the layer has latched.
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
    /// The errors of [`write_at`](Self::write_at).
    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()>;

    /// Makes `range` read as zeros and returns its space to the host, at once or later.
    ///
    /// # Errors
    /// The errors of [`write_at`](Self::write_at).
    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()>;

    /// Reserves space on the host so that later writes into `range` do not run out of it.
    ///
    /// # Errors
    /// The errors of [`write_at`](Self::write_at); `EOPNOTSUPP` where the host cannot reserve
    /// space.
    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()>;

    /// Changes the size of the disk. Bytes past a smaller size are discarded; added bytes read as
    /// zeros.
    ///
    /// # Errors
    /// The errors of [`write_at`](Self::write_at); `EFBIG` past the largest size the host file can
    /// have.
    fn set_size(&self, size: u64) -> io::Result<()>;

    /// Makes all changes acknowledged before the call durable.
    ///
    /// # Errors
    /// The host's errno; the layer is latched from then on, and every later write and sync fails
    /// with `EIO`.
    fn sync(&self) -> io::Result<()>;

    /// Returns whether a failed sync has made the layer read-only. The default is for streams,
    /// which report their failures in other ways.
    fn is_latched(&self) -> bool {
        false
    }
}
