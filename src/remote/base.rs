//! An image on a server as the bottom of a disk.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use parking_lot::Mutex;

use super::BLOCK_SIZE;
use super::bmap::{OpenSums, RangeSums, SumStatus};
use super::cache::{Cache, PlaceLock, Urgency};
use super::fetcher::Fetcher;
use super::known_extents::KnownExtents;
use super::plan::{Fetches, PlanLimits, Planner};
use super::trace::TraceUse;
use super::transport::{Transport, WritableTransport};
use crate::arrival::Arrival;
use crate::config::{RemoteAddress, RemoteSpec};
use crate::extents::{Extent, ExtentKind};
use crate::formats::bmap::Bmap;
use crate::host::os_error;
use crate::identity::Identity;
use crate::layer::{CopyFn, Layer, Wait};

/// An image on a server: what was read of it stays in a cache on this host.
///
/// What is cached is answered at once. For the rest a read under [`Wait::No`] answers `EAGAIN`, after
/// it has begun to fetch it and has left the [`Arrival`] on the thread.
pub struct RemoteBase {
    spec: RemoteSpec,
    identity: Identity,
    transport: Arc<dyn Transport>,
    /// The same transport, where the server takes changes.
    writable: Option<Arc<dyn WritableTransport>>,
    /// Number of disks that have the image as their base.
    pub(super) users: AtomicUsize,
    cache: Arc<Cache>,
    fetcher: Arc<Fetcher>,
    planner: Mutex<Planner>,
    extents: KnownExtents,
    sums: Option<OpenSums>,
    trace: Option<TraceUse>,
    /// The lock on what `read-cache=` keeps of the address.
    place: Mutex<Option<PlaceLock>>,
}

/// What the user is told of an image on a server.
#[derive(Clone, Debug)]
pub struct RemoteStatus {
    /// The size of the image in bytes.
    pub size: u64,
    /// Bytes that were fetched.
    pub fetched: u64,
    /// Bytes that are kept on this host.
    pub cached: u64,
    /// Reads that were answered from what is kept.
    pub hits: u64,
    /// Reads that were not.
    pub misses: u64,
    /// Requests for bytes.
    pub requests: u64,
    /// Requests that failed.
    pub failures: u64,
    /// For how long the oldest request that somebody waits for has been waiting.
    pub waiting: Option<Duration>,
    /// The reason why there is no connection.
    pub outage: Option<String>,
    /// What came of the checksums of its bmap, if that has any.
    pub sums: Option<SumStatus>,
}

impl RemoteBase {
    /// Makes a base of the image behind `transport`, which is known by `identity`. `spec` has the
    /// address, and says how much is fetched; `bmap` says where data is, and what it matches.
    ///
    /// # Errors
    /// The host's errno, when no thread can be started.
    pub(super) fn new(
        spec: &RemoteSpec,
        identity: Identity,
        transport: Arc<dyn Transport>,
        cache: Arc<Cache>,
        bmap: Option<&Bmap>,
    ) -> io::Result<Self> {
        let limits = PlanLimits::new(transport.size(), spec.fetch, spec.ahead, transport.limits());
        let sums = match bmap {
            Some(bmap) => OpenSums::new(&spec.address, bmap, &cache)?,
            None => None,
        };
        let to_match = sums.as_ref().map(|sums| Arc::clone(sums.ranges()));
        let fetcher = Fetcher::new(Arc::clone(&transport), Arc::clone(&cache), to_match);
        Ok(Self {
            spec: spec.clone(),
            identity,
            writable: None,
            users: AtomicUsize::new(0),
            fetcher,
            transport,
            cache,
            planner: Mutex::new(Planner::new(limits)),
            extents: KnownExtents::new(bmap),
            sums,
            trace: None,
            place: Mutex::default(),
        })
    }

    /// Keeps `head`, the first bytes of the image, which came when it was opened.
    ///
    /// # Errors
    /// `EIO` when they do not match the bmap.
    pub(super) fn keep_head(&self, mut head: Vec<u8>) -> io::Result<()> {
        let sums = self.sums.as_ref().map(OpenSums::ranges);
        if let Some(sums) = sums {
            if let Some(cut) = sums.cut_at(head.len() as u64) {
                head.truncate(usize::try_from(cut.start).unwrap_or(0));
            }
            sums.check_arrived(0, &head)?;
        }
        let bytes = 0..head.len() as u64;
        if !self.cache.missing(&bytes).is_empty() {
            self.cache.store(0, head, Urgency::Ahead);
            sums.iter().for_each(|sums| sums.note_stored(&bytes));
        }
        Ok(())
    }

    /// Returns the bytes of the image that do not match its bmap, once there are any.
    pub(super) fn mismatch(&self) -> Option<&Range<u64>> {
        self.sums.as_ref().and_then(|sums| sums.ranges().mismatch())
    }

    /// Returns the checksums of the image's bmap, if it has any.
    pub(super) fn sums(&self) -> Option<&RangeSums> {
        self.sums.as_ref().map(|sums| &**sums.ranges())
    }

    /// Makes sure that nothing was found that does not match the bmap.
    ///
    /// # Errors
    /// `EIO` after that, for good.
    fn check_sums(&self) -> io::Result<()> {
        match self.mismatch() {
            None => Ok(()),
            Some(_) => Err(os_error(libc::EIO)),
        }
    }

    /// Holds `lock` for as long as the image is kept.
    pub(super) fn with_place_lock(self, lock: Option<PlaceLock>) -> Self {
        Self { place: Mutex::new(lock), ..self }
    }

    /// Returns the lock on what is kept of the address, for who changes the image.
    pub(super) fn place_lock(&self) -> &Mutex<Option<PlaceLock>> {
        &self.place
    }

    /// Records the first reads in the file at `file`; where there is one, begins to fetch what it has.
    ///
    /// # Errors
    /// A line without the name of the file.
    pub(super) fn with_trace(self, file: &Path) -> Result<Self, String> {
        let (size, rate) = (self.transport.size(), self.spec.prefetch_rate);
        let trace = TraceUse::begin(file, size, &self.fetcher, rate)?;
        Ok(Self { trace: Some(trace), ..self })
    }

    /// Adds the means to change the image, for a commit.
    pub(super) fn with_writable(self, writable: Option<Arc<dyn WritableTransport>>) -> Self {
        Self { writable, ..self }
    }

    /// Returns the address.
    #[must_use]
    pub fn address(&self) -> &RemoteAddress {
        &self.spec.address
    }

    /// Returns what the base was opened with.
    pub(super) fn spec(&self) -> &RemoteSpec {
        &self.spec
    }

    /// Returns the transport that changes the image; `None` where the server takes no changes.
    pub(super) fn writable(&self) -> Option<&Arc<dyn WritableTransport>> {
        self.writable.as_ref()
    }

    /// Returns what the image was known by when it was opened.
    #[must_use]
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Returns the transport.
    pub(super) fn transport(&self) -> &dyn Transport {
        &*self.transport
    }

    /// Returns the cache.
    pub(super) fn cache(&self) -> &Cache {
        &self.cache
    }

    /// Whether there is periodic work.
    pub(super) fn needs_maintenance(&self) -> bool {
        self.cache.is_persistent() || self.trace.as_ref().is_some_and(TraceUse::needs_maintenance)
    }

    /// Does the periodic work: keeps a persistent cache in its limits, and writes a trace that is
    /// complete. Waits for the host.
    pub(super) fn maintain(&self) {
        self.cache.maintain();
        self.trace.iter().for_each(TraceUse::maintain);
    }

    /// Returns what was asked of the server so far.
    pub(super) fn status(&self) -> RemoteStatus {
        let (counters, kept) = (self.fetcher.counters(), self.cache.counters());
        RemoteStatus {
            size: self.transport.size(),
            cached: kept.present_bytes,
            hits: kept.hits,
            misses: kept.misses,
            fetched: counters.bytes,
            requests: counters.requests,
            failures: counters.failures,
            waiting: self.fetcher.waiting_for(),
            outage: self.transport.outage().map(|(_, why)| why),
            sums: self.sums.as_ref().map(|sums| sums.ranges().status()),
        }
    }

    /// Waits as `wait` says for `arrival`; `Ok` when the caller has to look again.
    fn wait_for(arrival: Option<Arrival>, wait: Wait) -> io::Result<()> {
        let Some(arrival) = arrival else { return Ok(()) };
        match wait {
            Wait::Yes => arrival.wait(),
            Wait::No => {
                arrival.expect();
                Err(os_error(libc::EAGAIN))
            }
        }
    }

    /// Returns what of `range` is neither cached nor on its way, nor known to be zeros.
    fn missing(&self, range: Range<u64>) -> Vec<Range<u64>> {
        let mut missing = Vec::new();
        for part in self.fetcher.missing(&range) {
            let mut at = part.start;
            while at < part.end {
                let found = self.extents.probably_at(&(at..part.end));
                at = found.range.end;
                if found.kind == ExtentKind::Data {
                    push_joined(&mut missing, found.range);
                }
            }
        }
        missing
    }

    /// Begins to fetch what a read of `range` needs and what will probably be read next. Returns the
    /// arrival of the first missing byte.
    fn begin_fetch(&self, range: &Range<u64>) -> Option<Arrival> {
        let is_exact = self.fetcher.has_failed(range)
            || self.trace.as_ref().is_some_and(|trace| trace.is_bringing(range));
        let fetches = match is_exact {
            true => Fetches::default(),
            false => self.planner.lock().on_read(range, |part| self.missing(part)),
        };
        for part in &fetches.demand {
            self.fetcher.fetch(part, Urgency::Demand);
        }
        let first = self.fetcher.fetch(&self.blocks(range), Urgency::Demand);
        for part in &fetches.ahead {
            self.fetcher.fetch(part, Urgency::Ahead);
        }
        first
    }

    /// Tells the planner of a read that the cache has answered, unless a trace has brought the bytes, and
    /// what is read next.
    fn note_hit(&self, range: &Range<u64>) {
        if self.trace.as_ref().is_some_and(|trace| trace.note_hit(range)) {
            return;
        }
        // Under contention one read more or less makes no difference to what is read ahead.
        let Some(mut planner) = self.planner.try_lock() else { return };
        let fetches = planner.on_read(range, |part| self.missing(part));
        drop(planner);
        for part in &fetches.ahead {
            self.fetcher.fetch(part, Urgency::Ahead);
        }
    }

    /// Rounds `range` out to whole blocks of the cache.
    fn blocks(&self, range: &Range<u64>) -> Range<u64> {
        let end = range.end.next_multiple_of(BLOCK_SIZE).min(self.transport.size());
        range.start - range.start % BLOCK_SIZE..end
    }

    /// Returns the kind of the first bytes of `range`, inside the size, when these are known to be
    /// zeros; asks the server, without waiting, when nothing is known.
    fn known_zeros(&self, range: &Range<u64>) -> Option<Extent> {
        let known = self.extents.at(range, &*self.transport).ok();
        known.filter(|extent| extent.kind != ExtentKind::Data)
    }
}

fn push_joined(list: &mut Vec<Range<u64>>, range: Range<u64>) {
    match list.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => list.push(range),
    }
}

impl Layer for RemoteBase {
    fn size(&self) -> u64 {
        self.transport.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        if range.start >= self.size() {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let range = range.start..range.end.min(self.size());
        loop {
            match self.extents.at(&range, &*self.transport) {
                Ok(found) => return Ok(found),
                Err(arrival) => Self::wait_for(Some(arrival), wait)?,
            }
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size() {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        let range = offset..asked.end.min(self.size());
        self.check_sums()?;
        if let Some(zeros) = self.known_zeros(&range) {
            return Ok(zeros);
        }
        loop {
            self.check_sums()?;
            let data = self.extents.data_prefix(&range);
            let len = usize::try_from(data.end - data.start).unwrap_or(usize::MAX).min(buf.len());
            let done = self.cache.read_at(&mut buf[..len], offset, wait)?;
            if done > 0 {
                let found = offset..offset + done as u64;
                self.note_hit(&found);
                return Ok(Extent::new(found, ExtentKind::Data));
            }
            Self::wait_for(self.begin_fetch(&data), wait)?;
        }
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        self.check_sums()?;
        let extent = self.extent_at(range, wait)?;
        if extent.kind != ExtentKind::Data {
            return Ok((extent, None));
        }
        match self.cache.lend_at(extent.range.clone(), wait, copy)? {
            Some((range, copied)) => {
                if let Some(trace) = &self.trace {
                    trace.note_hit(&range);
                }
                Ok((Extent::new(range, ExtentKind::Data), Some(copied)))
            }
            None => Ok((extent, None)),
        }
    }
}
