//! The layer traits: the interface of every base, overlay and stream.
//!
//! A disk is a stack of layers. A read asks the top layer; where the top answers
//! [`ExtentKind::Lower`], the next layer down is asked. Only the `disk` module walks the stack.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;

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

/// Fills `buf` with the bytes of `layer` from `offset` on, however long that takes. What is not data,
/// or past the size, is filled with zeros.
///
/// # Errors
/// The errors of [`Layer::read_at`].
pub fn read_exact(layer: &dyn Layer, buf: &mut [u8], offset: u64) -> io::Result<()> {
    let mut done = 0;
    while done < buf.len() {
        let rest = &mut buf[done..];
        let found = layer.read_at(rest, offset.saturating_add(done as u64), Wait::Yes)?;
        let len = usize::try_from(found.len()).unwrap_or(usize::MAX).min(rest.len());
        if len == 0 {
            return Err(os_error(libc::EIO));
        }
        if found.kind != ExtentKind::Data {
            rest[..len].fill(0);
        }
        done += len;
    }
    Ok(())
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

#[cfg(test)]
pub(crate) mod testing {
    //! A layer in memory, which can be as slow and as broken as a server.

    use std::io;
    use std::ops::Range;

    use parking_lot::Mutex;

    use super::{CopyFn, Layer, Wait};
    use crate::arrival::Arrival;
    use crate::extents::{Extent, ExtentKind};
    use crate::host::os_error;

    /// The bytes of which it knows whether they are zeros, at multiples of as many.
    const BLOCK: usize = 4096;

    /// Bytes in memory: data, and holes where all of a block of 4 KiB are zeros.
    pub(crate) struct MemoryLayer {
        bytes: Vec<u8>,
        /// The longest answer in bytes.
        longest: usize,
        /// Whether every answer is waited for, as when nothing is in a cache.
        is_slow: bool,
        /// The bytes that cannot be read, and the errno.
        failure: Mutex<Option<(Range<u64>, i32)>>,
    }

    impl MemoryLayer {
        pub(crate) fn new(bytes: Vec<u8>) -> Self {
            Self { bytes, longest: usize::MAX, is_slow: false, failure: Mutex::default() }
        }

        /// Makes no answer longer than `longest` bytes.
        pub(crate) fn with_short_answers(self, longest: usize) -> Self {
            Self { longest, ..self }
        }

        /// Makes every answer under [`Wait::No`] `EAGAIN`, with an arrival that is done.
        pub(crate) fn with_delay(self) -> Self {
            Self { is_slow: true, ..self }
        }

        /// Makes what touches the given bytes fail with the given errno, from now on.
        pub(crate) fn set_failure(&self, failure: Option<(Range<u64>, i32)>) {
            *self.failure.lock() = failure;
        }

        fn answer(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
            assert!(!range.is_empty());
            if self.is_slow && wait == Wait::No {
                let arrival = Arrival::default();
                arrival.complete(Ok(()));
                arrival.expect();
                return Err(os_error(libc::EAGAIN));
            }
            let (start, size) = (range.start, self.size());
            if start >= size {
                return Ok(Extent::new(range, ExtentKind::Hole));
            }
            let at = usize::try_from(start).unwrap();
            let asked = usize::try_from(range.end.min(size) - start).unwrap().min(self.longest);
            let mut len = 0;
            let mut kinds = self.bytes[at - at % BLOCK..].chunks(BLOCK).map(kind_of).peekable();
            let kind = *kinds.peek().unwrap();
            while len < asked && kinds.next() == Some(kind) {
                len += BLOCK - (at + len) % BLOCK;
            }
            let range = start..start + len.min(asked) as u64;
            match &*self.failure.lock() {
                Some((bad, errno)) if bad.start < range.end && range.start < bad.end => {
                    Err(os_error(*errno))
                }
                _ => Ok(Extent::new(range, kind)),
            }
        }
    }

    fn kind_of(block: &[u8]) -> ExtentKind {
        if block.iter().all(|byte| *byte == 0) { ExtentKind::Hole } else { ExtentKind::Data }
    }

    impl Layer for MemoryLayer {
        fn size(&self) -> u64 {
            self.bytes.len() as u64
        }

        fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
            self.answer(range, wait)
        }

        fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
            let found = self.answer(offset..offset + buf.len() as u64, wait)?;
            if found.kind == ExtentKind::Data {
                let (at, len) = (usize::try_from(offset).unwrap(), found.len());
                let len = usize::try_from(len).unwrap();
                buf[..len].copy_from_slice(&self.bytes[at..at + len]);
            }
            Ok(found)
        }

        fn lend_at(
            &self,
            range: Range<u64>,
            wait: Wait,
            _copy: CopyFn<'_>,
        ) -> io::Result<(Extent, Option<u64>)> {
            Ok((self.answer(range, wait)?, None))
        }
    }

    #[test]
    fn an_exact_read_takes_every_answer_and_zeros_for_what_is_no_data() {
        let mut bytes = vec![7; 3 * BLOCK + 100];
        bytes[BLOCK..2 * BLOCK].fill(0);
        let layer = MemoryLayer::new(bytes.clone()).with_delay().with_short_answers(1000);
        let mut buf = vec![9; bytes.len() - 5 + 300];
        super::read_exact(&layer, &mut buf, 5).unwrap();
        assert!(buf[..bytes.len() - 5] == bytes[5..] && buf[bytes.len() - 5..] == [0; 300]);
        layer.set_failure(Some((8000..8001, libc::ETIMEDOUT)));
        super::read_exact(&layer, &mut buf[..7000], 5).unwrap();
        let error = super::read_exact(&layer, &mut buf, 5).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT));
    }
}
