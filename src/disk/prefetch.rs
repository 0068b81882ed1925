//! Prefetch: brings a disk's bytes into the host's cache or up into the overlay.

use std::io;
use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use super::Disk;
use crate::extents::ExtentKind;
use crate::host::os_error;
use crate::layer::Wait;
use crate::remote::RemoteImage;

/// Bytes copied between two checks whether to stop: 1 MiB.
const COPY_STEP: u64 = 1 << 20;

/// The least bytes copied at a time under a rate limit: 64 KiB.
const MIN_COPY_STEP: u64 = 64 << 10;
/// How often a copy that waits for its rate checks whether to stop.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The pace of one step of a copy.
pub(super) struct Pace {
    begun: Instant,
    /// The most bytes a second; 0 for no limit.
    rate: u64,
}

impl Pace {
    /// Begins a step at no more than `rate` bytes a second (0: no limit).
    pub(super) fn new(rate: u64) -> Self {
        Self { begun: Instant::now(), rate }
    }

    /// Returns the most bytes of the step: a few steps a second, however low the rate is.
    pub(super) fn step(&self) -> u64 {
        if self.rate == 0 { COPY_STEP } else { (self.rate / 4).clamp(MIN_COPY_STEP, COPY_STEP) }
    }

    /// Sleeps after a step of `bytes` bytes as the rate demands, until `must_stop` says so.
    pub(super) fn wait(&self, bytes: u64, must_stop: &dyn Fn() -> bool) {
        let Some(nanos) = bytes.saturating_mul(1_000_000_000).checked_div(self.rate) else {
            return;
        };
        let due = Duration::from_nanos(nanos);
        while self.begun.elapsed() < due && !must_stop() {
            thread::sleep(due.saturating_sub(self.begun.elapsed()).min(POLL_INTERVAL));
        }
    }
}

/// The destination of a prefetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefetchMode {
    /// The one that the disk's keys set.
    AsConfigured,
    /// The overlay.
    CopyUp,
}

impl Disk {
    /// Prefetches `range` (bytes) and returns the number of bytes that were not there before.
    /// [`progress`](Self::progress) reports how far the prefetch is.
    ///
    /// # Errors
    /// The host's errno; `EINTR` when the client is gone or the mount ends; `EROFS` for copying up
    /// without an overlay.
    pub fn prefetch(
        &self,
        range: Range<u64>,
        mode: PrefetchMode,
        is_gone: &dyn Fn() -> bool,
    ) -> io::Result<u64> {
        let brought = self.prefetch_range(range, mode, is_gone);
        self.operations.report_progress(0, 0);
        brought
    }

    fn prefetch_range(
        &self,
        range: Range<u64>,
        mode: PrefetchMode,
        is_gone: &dyn Fn() -> bool,
    ) -> io::Result<u64> {
        let range = range.start..range.end.min(self.size());
        let copies = self.prefetch_copies_up(mode);
        if copies && self.overlay().is_none() {
            return Err(os_error(libc::EROFS));
        }
        let mut brought = 0;
        let mut at = range.start;
        let total = range.end.saturating_sub(at);
        self.operations.report_progress(0, total);
        let mut buf = Vec::new();
        while at < range.end {
            if self.operations.is_ending() || is_gone() {
                return Err(os_error(libc::EINTR));
            }
            let (extent, depth) = self.layers().extent_with_depth(at..range.end, Wait::Yes)?;
            if extent.kind != ExtentKind::Data || (copies && depth == 0) {
                // One step, however long the range without anything to prefetch is.
                at = extent.range.end;
            } else {
                let pace = Pace::new(self.prefetch_rate());
                let end = range.end.min(at + pace.step());
                let bytes = match copies {
                    true => self.copy_up(at..end, Wait::Yes)?,
                    false => self.warm_cache(at..end, &mut buf)?,
                };
                brought += bytes;
                pace.wait(bytes, &|| self.operations.is_ending() || is_gone());
                at = end;
            }
            self.operations.report_progress(at - range.start, total);
        }
        Ok(brought)
    }

    /// The most bytes a second that are fetched of a base on a server before they are read; 0 for no limit.
    pub(super) fn prefetch_rate(&self) -> u64 {
        self.described_base().remote().map_or(0, RemoteImage::prefetch_rate)
    }

    /// Reads the disk's bytes of `range` into the host's cache.
    fn warm_cache(&self, range: Range<u64>, buf: &mut Vec<u8>) -> io::Result<u64> {
        let layers = self.layers();
        let mut warmed = 0;
        for piece in layers.pieces(range, Wait::Yes) {
            let (extent, depth) = piece?;
            if extent.kind != ExtentKind::Data {
                continue;
            }
            if let (Some(overlay), 0) = (layers.top.overlay(), depth) {
                overlay.will_need(&extent.range);
                continue;
            }
            buf.resize(usize::try_from(extent.len()).map_err(|_| os_error(libc::EFBIG))?, 0);
            self.read(buf, extent.range.start, Wait::Yes)?;
            warmed += extent.len();
        }
        Ok(warmed)
    }

    /// Copies the lower layers' bytes of `range` up into the overlay, and returns how many.
    pub(super) fn copy_up(&self, range: Range<u64>, wait: Wait) -> io::Result<u64> {
        let _gate = self.gate.shared(wait)?;
        let layers = self.layers();
        let overlay = layers.top.overlay().ok_or_else(|| os_error(libc::EROFS))?;
        let end = range.end.min(layers.size());
        let mut copied = 0;
        for piece in layers.pieces(range.start..end, wait) {
            let (extent, depth) = piece?;
            if extent.kind == ExtentKind::Data && depth > 0 {
                copied += overlay.copy_up(&extent.range, &layers.below(), wait)?;
            }
        }
        Ok(copied)
    }

    /// Whether a prefetch copies up into the overlay.
    #[must_use]
    pub fn prefetch_copies_up(&self, mode: PrefetchMode) -> bool {
        mode == PrefetchMode::CopyUp || self.copy_up.cache
    }

    /// Whether reads copy up first (`cow-on-read`): they write to the host then.
    #[must_use]
    pub fn copies_on_read(&self) -> bool {
        self.copy_up.read
    }
}
