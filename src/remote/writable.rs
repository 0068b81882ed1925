//! An image on a server that a disk writes to (`mode=rw`).
//!
//! Nothing of it is kept on this host: every read asks the server, and a write is acknowledged when
//! the server has it. A sync makes the server flush; one that fails latches the image.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use super::answer::{Answer, answer_of, as_told, read_range};
use super::cache::PlaceLock;
use super::transport::{IdentityCheck, MAX_ZERO, WritableTransport};
use super::waited_extents::WaitedExtents;
use super::watched_samples::WatchedSamples;
use super::writer_guard::WriterGuard;
use crate::config::{RemoteAddress, RemoteSpec};
use crate::extents::{Extent, ExtentKind};
use crate::host::{is_fallocate_unsupported, os_error};
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};
use crate::pool::hold_reply;

/// The most zeros in bytes that are sent in one write to a server that cannot zero by itself.
const ZEROS_LEN: u64 = 256 << 10;

/// An image on a server, open for reading and writing.
pub struct RemoteDisk {
    spec: RemoteSpec,
    transport: Arc<dyn WritableTransport>,
    extents: WaitedExtents,
    /// Number of changes that have ended.
    changes: AtomicU64,
    /// Number of changes that had ended before a sync that succeeded.
    durable: AtomicU64,
    /// Held exclusive while blocks of the server's that are written only in part are read, changed
    /// and written; shared by all other changes.
    whole_blocks: RwLock<()>,
    /// The samples by which the image is known after an outage.
    samples: Arc<WatchedSamples>,
    is_latched: AtomicBool,
    /// The lock on what `read-cache=` keeps of the address: nobody keeps what is about to be changed.
    place: Mutex<Option<PlaceLock>>,
    _guard: Option<WriterGuard>,
}

impl RemoteDisk {
    /// Makes a disk of the image behind `transport`, which was opened with `spec`; reads its samples.
    /// `guard` keeps other disks from the image as long as this one is there.
    ///
    /// # Errors
    /// The errno of the server.
    pub(super) fn new(
        spec: RemoteSpec,
        transport: Arc<dyn WritableTransport>,
        guard: Option<WriterGuard>,
    ) -> io::Result<Self> {
        Ok(Self {
            samples: WatchedSamples::read(&*transport)?,
            spec,
            transport,
            extents: WaitedExtents::default(),
            changes: AtomicU64::new(0),
            durable: AtomicU64::new(0),
            whole_blocks: RwLock::new(()),
            is_latched: AtomicBool::new(false),
            place: Mutex::default(),
            _guard: guard,
        })
    }

    /// Holds `lock` until the image is not written to any more, or `None` is given.
    pub(super) fn hold_place(&self, lock: Option<PlaceLock>) {
        *self.place.lock() = lock;
    }

    /// Returns the check that a new connection shows the same image.
    pub(super) fn identity_check(&self) -> IdentityCheck {
        self.samples.check()
    }

    /// Returns the address.
    #[must_use]
    pub fn address(&self) -> &RemoteAddress {
        &self.spec.address
    }

    /// Returns what the image was opened with.
    pub(super) fn spec(&self) -> &RemoteSpec {
        &self.spec
    }

    /// Returns the transport, for questions about the whole image.
    pub(super) fn transport(&self) -> &Arc<dyn WritableTransport> {
        &self.transport
    }

    fn alignment(&self) -> u64 {
        u64::from(self.transport.limits().alignment.max(1))
    }

    fn max_len(&self) -> u64 {
        u64::from(self.transport.limits().max_len).max(self.alignment())
    }

    /// Writes `buf` at `offset` in whole blocks of the server's; the bytes beside it in the first and
    /// the last block stay what they are. This thread's request is not given up while the server has it,
    /// so no later write can be acknowledged before this one is over.
    fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (size, alignment) = (self.size(), self.alignment());
        let range = offset..offset + buf.len() as u64;
        let is_whole = range.start.is_multiple_of(alignment)
            && (range.end.is_multiple_of(alignment) || range.end == size);
        if is_whole {
            let _shared = self.whole_blocks.read();
            let _held = hold_reply()?;
            return self.write_blocks(buf, offset);
        }
        let _exclusive = self.whole_blocks.write();
        let _held = hold_reply()?;
        let start = range.start - range.start % alignment;
        let end = range.end.next_multiple_of(alignment).min(size);
        let mut bytes = read_range(&*self.transport, &(start..range.start))?;
        bytes.extend_from_slice(buf);
        bytes.extend(read_range(&*self.transport, &(range.end..end))?);
        self.write_blocks(&bytes, start)
    }

    /// Writes whole blocks, many requests at a time, and waits for all of them.
    fn write_blocks(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let step = self.max_len() - self.max_len() % self.alignment();
        let step = usize::try_from(step).unwrap_or(usize::MAX);
        let mut at = offset;
        let parts: Vec<_> = buf
            .chunks(step)
            .map(|part| {
                let start = at;
                at += part.len() as u64;
                answer_of(|done| self.transport.write(start, part.to_vec(), done))
            })
            .collect();
        // All are waited for, so that no write of this request is under way when it is answered.
        parts.into_iter().map(Answer::wait).fold(Ok(()), io::Result::and)
    }

    fn zero_range(&self, range: Range<u64>, punch: bool) -> io::Result<()> {
        let alignment = self.alignment();
        let start = range.start.next_multiple_of(alignment).min(range.end);
        let end = match range.end == self.size() {
            true => range.end,
            false => (range.end - range.end % alignment).max(start),
        };
        let mut at = start;
        while at < end {
            let piece = at..end.min(at + MAX_ZERO);
            at = piece.end;
            match self.zero_blocks(piece.clone(), punch) {
                Err(error) if is_fallocate_unsupported(&error) => self.write_zeros(piece)?,
                zeroed => zeroed?,
            }
        }
        self.write_zeros(range.start..start)?;
        self.write_zeros(end.max(start)..range.end)
    }

    /// Zeros whole blocks. As for a [`write`](Self::write), the request is not given up meanwhile.
    fn zero_blocks(&self, range: Range<u64>, punch: bool) -> io::Result<()> {
        let _shared = self.whole_blocks.read();
        let _held = hold_reply()?;
        answer_of(|done| self.transport.zero(range, punch, done)).wait()
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = (range.end - at).min(ZEROS_LEN);
            self.write(&vec![0; usize::try_from(len).unwrap_or(0)], at)?;
            at += len;
        }
        Ok(())
    }

    /// Whether [`maintain`](Self::maintain) has work to do.
    pub(super) fn needs_maintenance(&self) -> bool {
        self.samples.are_refreshable() && self.transport.outage().is_none()
    }

    /// Begins to read the samples that were changed and are durable by now.
    pub(super) fn maintain(&self) {
        self.samples.refresh(&*self.transport);
    }

    /// Runs `change` of `range` on a disk that is not latched, where the caller may wait.
    fn change(
        &self,
        wait: Wait,
        range: Range<u64>,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if self.is_latched.load(Ordering::Acquire) {
            return Err(os_error(libc::EIO));
        }
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let noted = self.samples.begin_change(range);
        let changed = change();
        drop(noted);
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.extents.forget();
        changed.map_err(|error| as_told(&error))
    }
}

impl Layer for RemoteDisk {
    fn size(&self) -> u64 {
        self.transport.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        self.extents.extent_at(&*self.transport, range, wait)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size() {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let range = offset..asked.end.min(self.size());
        let bytes = read_range(&*self.transport, &range).map_err(|error| as_told(&error))?;
        buf.get_mut(..bytes.len()).ok_or_else(|| os_error(libc::EIO))?.copy_from_slice(&bytes);
        Ok(Extent::new(range, ExtentKind::Data))
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((self.extent_at(range, wait)?, None))
    }
}

impl WritableLayer for RemoteDisk {
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        _below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        let range = offset..offset.saturating_add(buf.len() as u64);
        self.change(wait, range, || self.write(buf, offset))
    }

    fn zero(&self, range: Range<u64>, _below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.change(wait, range.clone(), || self.zero_range(range, false))
    }

    fn punch_hole(&self, range: Range<u64>, _below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.change(wait, range.clone(), || self.zero_range(range, true))
    }

    /// Reserves nothing: the protocol cannot.
    fn allocate(&self, _range: Range<u64>, _wait: Wait) -> io::Result<()> {
        Err(os_error(libc::EOPNOTSUPP))
    }

    /// `EINVAL` for another size: the server has the size.
    fn set_size(&self, size: u64) -> io::Result<()> {
        if size == self.size() { Ok(()) } else { Err(os_error(libc::EINVAL)) }
    }

    fn sync(&self) -> io::Result<()> {
        if self.is_latched.load(Ordering::Acquire) {
            return Err(os_error(libc::EIO));
        }
        let (number, changes) = (self.samples.begin_flush(), self.changes.load(Ordering::SeqCst));
        // As it was before: a flush beside this one may succeed after the server has lost the bytes.
        let is_clean = changes == self.durable.load(Ordering::SeqCst);
        let flushed = answer_of(|done| self.transport.flush(done)).wait();
        match &flushed {
            Ok(()) => {
                self.samples.end_flush(number);
                self.durable.fetch_max(changes, Ordering::SeqCst);
            }
            // Without changes that were not flushed, an outage has cost nothing.
            Err(_) if is_clean => {}
            Err(_) => self.is_latched.store(true, Ordering::Release),
        }
        flushed.map_err(|error| as_told(&error))
    }

    fn is_latched(&self) -> bool {
        self.is_latched.load(Ordering::Acquire)
    }
}
