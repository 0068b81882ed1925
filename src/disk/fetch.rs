//! Prefetch and hydration: bring a disk's bytes into the host's cache or up into the overlay, until
//! the overlay no longer needs its base.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::Disk;
use super::bottom::Bottom;
use super::layers::{LayerStack, Top};
use super::operation_error::OperationError;
use super::overlay_location::OverlayFiles;
use crate::base::blank::Blank;
use crate::extents::ExtentKind;
use crate::host::os_error;
use crate::layer::{Layer, Wait, WritableLayer};
use crate::overlay::stack::{BaseRecord, Stack};
use crate::overlay::tree::LayerTree;

/// Bytes copied between two checks whether to stop: 1 MiB.
const COPY_CHUNK: u64 = 1 << 20;
/// The least bytes copied at a time under a rate limit: 64 KiB.
const MIN_COPY_CHUNK: u64 = 64 << 10;
/// How often a paused hydration checks whether to continue.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// The destination of a prefetch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefetchMode {
    /// The one that the disk's keys set.
    AsConfigured,
    /// The overlay.
    CopyUp,
}

/// The state of a hydration.
#[derive(Debug, Default)]
pub(super) struct HydrationState {
    /// A hydration is running or paused.
    running: AtomicBool,
    paused: AtomicBool,
    cancelled: AtomicBool,
    /// The most bytes a second; 0 for no limit.
    rate: AtomicU64,
}

/// A command for a hydration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HydrateCommand {
    /// Starts, or resumes after a pause, at no more than this many bytes a second (0: no limit).
    Run(u64),
    /// Pauses.
    Pause,
    /// Ends the hydration; copied bytes stay.
    Cancel,
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
        fetch: PrefetchMode,
        is_gone: &dyn Fn() -> bool,
    ) -> io::Result<u64> {
        let brought = self.prefetch_range(range, fetch, is_gone);
        self.operations.report_progress(0, 0);
        brought
    }

    fn prefetch_range(
        &self,
        range: Range<u64>,
        fetch: PrefetchMode,
        is_gone: &dyn Fn() -> bool,
    ) -> io::Result<u64> {
        let range = range.start..range.end.min(self.size());
        let copies = self.prefetch_copies_up(fetch);
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
                let end = range.end.min(at + COPY_CHUNK);
                brought += match copies {
                    true => self.copy_up(at..end, Wait::Yes)?,
                    false => self.warm_cache(at..end, &mut buf)?,
                };
                at = end;
            }
            self.operations.report_progress(at - range.start, total);
        }
        Ok(brought)
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

    /// Describes the disk's base for `status`.
    #[must_use]
    pub fn base_description(&self) -> String {
        match (&*self.bottom(), self.is_detached.load(Ordering::SeqCst)) {
            (Bottom::Blank(size), true) => format!("blank:{size}"),
            _ => self.source.clone(),
        }
    }

    /// Whether a prefetch copies up into the overlay.
    #[must_use]
    pub fn prefetch_copies_up(&self, fetch: PrefetchMode) -> bool {
        fetch == PrefetchMode::CopyUp || self.copy_up.cache
    }

    /// Whether reads copy up first (`cow-on-read`).
    pub(super) fn copies_on_read(&self) -> bool {
        self.copy_up.read
    }

    /// The state of a hydration, for `status`; `None` when there is none.
    #[must_use]
    pub fn hydration_status(&self) -> Option<&'static str> {
        let hydration = &self.hydration;
        let running = hydration.running.load(Ordering::SeqCst);
        running.then(|| if hydration.paused.load(Ordering::SeqCst) { "paused" } else { "running" })
    }

    /// Applies `hydrate` to the running hydration; returns `false` when there is none.
    pub fn control_hydration(&self, hydrate: HydrateCommand) -> bool {
        let hydration = &self.hydration;
        if !hydration.running.load(Ordering::SeqCst) {
            return false;
        }
        match hydrate {
            HydrateCommand::Run(rate) => {
                hydration.rate.store(rate, Ordering::SeqCst);
                hydration.paused.store(false, Ordering::SeqCst);
            }
            HydrateCommand::Pause => hydration.paused.store(true, Ordering::SeqCst),
            HydrateCommand::Cancel => hydration.cancelled.store(true, Ordering::SeqCst),
        }
        true
    }

    /// Copies everything below the overlay up into it, at no more than `rate` bytes a second (0: no
    /// limit), and then detaches the overlay from its base.
    ///
    /// # Errors
    /// [`OperationError`]; copied bytes stay, and the next hydration continues from there.
    pub fn hydrate(&self, rate: u64) -> Result<(), OperationError> {
        let operation = self.operations.begin("a hydration")?;
        let tree = self.hydratable_tree()?;
        let hydration = &self.hydration;
        hydration.rate.store(rate, Ordering::SeqCst);
        hydration.paused.store(false, Ordering::SeqCst);
        hydration.cancelled.store(false, Ordering::SeqCst);
        hydration.running.store(true, Ordering::SeqCst);
        let stop = || operation.must_stop() || hydration.cancelled.load(Ordering::SeqCst);
        let done = self.copy_up_all(&stop).and_then(|()| self.detach_base(&tree));
        hydration.running.store(false, Ordering::SeqCst);
        done
    }

    /// Checks whether a hydration could start now.
    ///
    /// # Errors
    /// The [`OperationError`] that the hydration would return.
    pub fn check_hydratable(&self) -> Result<(), OperationError> {
        match self.operations.requested() {
            Some(what) => Err(OperationError::Busy(what)),
            None => self.hydratable_tree().map(drop),
        }
    }

    /// Returns the layers of a disk that can be detached: one without snapshots and without an
    /// unfinished commit.
    fn hydratable_tree(&self) -> Result<LayerTree, OperationError> {
        let tree = self.tree("a base to copy from")?;
        if !tree.snapshots.is_empty() {
            return Err(OperationError::Refused(
                "it has snapshots, which need the base as well: delete them first".to_owned(),
            ));
        }
        if self.overlay().is_some_and(|overlay| overlay.is_committing()) {
            return Err(OperationError::CommitUnfinished);
        }
        Ok(tree)
    }

    fn copy_up_all(&self, stop: &dyn Fn() -> bool) -> Result<(), OperationError> {
        let copying = || OperationError::io("copying up into the overlay");
        let hydration = &self.hydration;
        let mut at = 0;
        while at < self.size() {
            while hydration.paused.load(Ordering::SeqCst) && !stop() {
                thread::sleep(POLL_INTERVAL);
            }
            if stop() {
                return Err(OperationError::Interrupted);
            }
            let size = self.size();
            let piece = self.layers().extent_with_depth(at..size, Wait::Yes).map_err(copying())?;
            let (extent, depth) = piece;
            if extent.kind != ExtentKind::Data || depth == 0 {
                at = extent.range.end;
            } else {
                let start = Instant::now();
                let rate = hydration.rate.load(Ordering::SeqCst);
                // A few pieces a second, however low the rate is.
                let piece = if rate == 0 {
                    COPY_CHUNK
                } else {
                    (rate / 4).clamp(MIN_COPY_CHUNK, COPY_CHUNK)
                };
                let end = extent.range.end.min(at + piece);
                let copied = self.copy_up(at..end, Wait::Yes).map_err(copying())?;
                at = end;
                if let Some(nanos) = copied.saturating_mul(1_000_000_000).checked_div(rate) {
                    let due = Duration::from_nanos(nanos);
                    while start.elapsed() < due && !stop() {
                        thread::sleep(due.saturating_sub(start.elapsed()).min(POLL_INTERVAL));
                    }
                }
            }
            self.operations.report_progress(at, size);
        }
        Ok(())
    }

    /// Detaches everything below the overlay, which by now holds all bytes that are not holes.
    fn detach_base(&self, tree: &LayerTree) -> Result<(), OperationError> {
        let Some(overlay) = self.overlay() else { return Err(OperationError::NoOverlay("a base")) };
        // Most of the sync happens here, before the gate is taken.
        overlay.sync().map_err(OperationError::io("making the overlay durable"))?;
        let layer_cache = self.history.layer_cache();
        let _layers_locked = layer_cache.lock_changes();
        let mut next = tree.clone();
        let size = self.layers().bottom.as_ref().map_or(0, |bottom| bottom.size());
        {
            let _gate = self.gate_for_layers()?;
            overlay.sync().map_err(OperationError::io("making the overlay durable"))?;
            if let Some(top) = next.layers.last_mut() {
                top.parent = None;
            }
            next.prune();
            if let OverlayFiles::Persistent(dir) = &mut *self.overlay_location.lock() {
                let base = BaseRecord::Blank { size };
                let stack = Stack { base, ..dir.stack.with_tree(next.clone()) };
                self.replace_stack(dir, stack, None)?;
            } else {
                self.replace_tree(&next, None)?;
            }
            let bottom: Arc<dyn Layer> = Arc::new(Blank::new(size));
            *self.layers.write() = Arc::new(LayerStack::new(
                Top::Overlay(Arc::clone(&overlay)),
                Vec::new(),
                Some(bottom),
            ));
            *self.bottom.lock() = Arc::new(Bottom::Blank(size));
            self.is_detached.store(true, Ordering::SeqCst);
        }
        self.drop_unused_layers(tree, &next);
        Ok(())
    }
}
