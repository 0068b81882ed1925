//! The interface of every protocol over which an image is read.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crate::extents::Extent;

/// The most bytes of one request for zeros, 256 MiB: whole blocks of any size, far below the 2^32 of NBD's
/// compact headers, and few enough for a server that writes them all within the I/O timeout.
pub(crate) const MAX_ZERO: u64 = 256 << 20;

/// The receiver of the bytes of one read: all of the range that was asked for, or an error.
pub(crate) type ReadDone = Box<dyn FnOnce(io::Result<Vec<u8>>) + Send>;
/// The receiver of the extents of one range: in ascending order, without gaps, from the start of the
/// range on and inside it; at least one.
pub(crate) type ExtentsDone = Box<dyn FnOnce(io::Result<Vec<Extent>>) + Send>;
/// The receiver of the result of one change.
pub(crate) type ChangeDone = Box<dyn FnOnce(io::Result<()>) + Send>;

/// Reads ranges of a new connection, each inside the image, aligned, and not longer than a request
/// may be; all of them at once.
pub(crate) type ReadRanges<'a> = &'a mut dyn FnMut(&[Range<u64>]) -> io::Result<Vec<Vec<u8>>>;

/// Says whether the image of a new connection is the one that was opened.
///
/// # Errors
/// Those of reading; the connection is tried again then.
pub(crate) type IdentityCheck = Arc<dyn Fn(ReadRanges<'_>) -> io::Result<bool> + Send + Sync>;

/// The requests that a server takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RequestLimits {
    /// Alignment of offsets and lengths in bytes, a power of two; 1 when any are taken.
    pub(crate) alignment: u32,
    /// The longest read or write in bytes, a multiple of `alignment`.
    pub(crate) max_len: u32,
    /// The number of requests that are worth sending before the first is answered.
    pub(crate) max_in_flight: u32,
}

/// An image on a server, open, whose size does not change.
///
/// Every method only begins a request and never waits. Its receiver is called exactly once, from any
/// thread, possibly before the method returns; it must not block for long. Requests survive an outage
/// of the server: they are sent again on a new connection, and fail with `ETIMEDOUT` only after the
/// mount's I/O timeout. A request that comes after that is tried anew, so an outage heals by itself.
pub(crate) trait Transport: Send + Sync {
    /// Returns the size of the image in bytes.
    fn size(&self) -> u64;

    /// Returns the requests that the server takes.
    fn limits(&self) -> RequestLimits;

    /// Returns what the server calls this version of the image, if it has a name that no other version
    /// has: the scheme of the name, a colon, and the name.
    fn version(&self) -> Option<String> {
        None
    }

    /// Begins to read `range` (bytes, not empty, inside the size, at most
    /// [`max_len`](RequestLimits::max_len), aligned except at the end of the image).
    ///
    /// # Errors
    /// To `done`: the server's errno; `ETIMEDOUT`; `ESTALE` when the image is another one by now,
    /// from then on for every request.
    fn read(&self, range: Range<u64>, done: ReadDone);

    /// Notes that somebody waits for the request that begins at byte `start`: a transport that can may
    /// ask once more when the answer is late.
    fn hurry(&self, _start: u64) {}

    /// Returns for how long there has been no connection, and why; `None` while there is one.
    fn outage(&self) -> Option<(Duration, String)> {
        None
    }

    /// Whether the server tells holes from data.
    fn knows_extents(&self) -> bool;

    /// Begins to ask for the extents of `range` (bytes, not empty, inside the size). The answer may
    /// describe only a prefix.
    ///
    /// # Errors
    /// Those of [`read`](Self::read), to `done`.
    fn extents(&self, range: Range<u64>, done: ExtentsDone);
}

/// An image on a server that can be changed.
pub(crate) trait WritableTransport: Transport {
    /// Begins to write `bytes` at `offset`, limited as a read is.
    ///
    /// # Errors
    /// Those of [`Transport::read`], to `done`; `ENOSPC`. After an outage in which the server may
    /// have lost changes that were not flushed, [`flush`](Self::flush) fails with `EIO` for ever.
    fn write(&self, offset: u64, bytes: Vec<u8>, done: ChangeDone);

    /// Begins to make `range` read as zeros: at most [`MAX_ZERO`] bytes, aligned as a read is. `punch` lets
    /// the server free its space.
    ///
    /// # Errors
    /// Those of [`write`](Self::write), to `done`; `EOPNOTSUPP` where the server cannot.
    fn zero(&self, range: Range<u64>, punch: bool, done: ChangeDone);

    /// Begins to make all changes durable whose `done` was called before this call.
    ///
    /// # Errors
    /// Those of [`write`](Self::write), to `done`.
    fn flush(&self, done: ChangeDone);

    /// Sets what is asked after each further or later connection whether the image is still the same.
    fn set_identity_check(&self, check: IdentityCheck);
}
