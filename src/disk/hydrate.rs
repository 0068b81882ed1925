//! Hydration: copies everything below the overlay up into it, and detaches the disk from its base.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use super::Disk;
use super::base_description::BaseDescription;
use super::layers::{LayerStack, Top};
use super::operation_error::OperationError;
use super::overlay_location::OverlayFiles;
use super::prefetch::Pace;
use crate::base::blank::Blank;
use crate::extents::{Extent, ExtentKind};
use crate::layer::{Layer, Wait, WritableLayer};
use crate::overlay::stack::{BaseRecord, Stack};
use crate::overlay::tree::LayerTree;
use crate::remote::CompareError;

/// How often a paused hydration checks whether to continue.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

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

/// The state of a hydration that has begun and not ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HydrationPhase {
    /// Bytes are being copied.
    Running,
    /// The hydration waits for a command to go on.
    Paused,
}

/// The state of a disk's hydration.
#[derive(Debug, Default)]
pub(super) struct Hydration {
    /// A hydration is running or paused.
    is_running: AtomicBool,
    is_paused: AtomicBool,
    is_cancelled: AtomicBool,
    /// The most bytes a second; 0 for no limit.
    rate: AtomicU64,
    /// Set once the disk has been detached from its base.
    is_detached: AtomicBool,
}

impl Hydration {
    /// Notes that a hydration has begun.
    fn begin(&self, rate: u64) {
        self.rate.store(rate, Ordering::SeqCst);
        self.is_paused.store(false, Ordering::SeqCst);
        self.is_cancelled.store(false, Ordering::SeqCst);
        self.is_running.store(true, Ordering::SeqCst);
    }

    /// The phase of the hydration; `None` when there is none.
    fn phase(&self) -> Option<HydrationPhase> {
        self.is_running.load(Ordering::SeqCst).then(|| {
            match self.is_paused.load(Ordering::SeqCst) {
                true => HydrationPhase::Paused,
                false => HydrationPhase::Running,
            }
        })
    }

    /// Applies `command`; returns `false` without a hydration.
    fn control(&self, command: HydrateCommand) -> bool {
        if !self.is_running.load(Ordering::SeqCst) {
            return false;
        }
        match command {
            HydrateCommand::Run(rate) => {
                self.rate.store(rate, Ordering::SeqCst);
                self.is_paused.store(false, Ordering::SeqCst);
            }
            HydrateCommand::Pause => self.is_paused.store(true, Ordering::SeqCst),
            HydrateCommand::Cancel => self.is_cancelled.store(true, Ordering::SeqCst),
        }
        true
    }

    /// Waits while the hydration is paused, unless it must stop.
    fn wait_while_paused(&self, must_stop: &dyn Fn() -> bool) {
        while self.is_paused.load(Ordering::SeqCst) && !must_stop() {
            thread::sleep(POLL_INTERVAL);
        }
    }

    /// Whether the disk has been detached from its base.
    pub(super) fn is_detached(&self) -> bool {
        self.is_detached.load(Ordering::SeqCst)
    }
}

impl Disk {
    /// The phase of the hydration; `None` when there is none.
    #[must_use]
    pub fn hydration_phase(&self) -> Option<HydrationPhase> {
        self.hydration.phase()
    }

    /// Applies `command` to the running hydration; returns `false` when there is none.
    pub fn control_hydration(&self, command: HydrateCommand) -> bool {
        self.hydration.control(command)
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
        hydration.begin(rate);
        let must_stop = || operation.must_stop() || hydration.is_cancelled.load(Ordering::SeqCst);
        let done = self
            .copy_up_all(&must_stop)
            .and_then(|()| self.compare_base(&must_stop))
            .and_then(|()| self.detach_base(&tree));
        hydration.is_running.store(false, Ordering::SeqCst);
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

    /// Copies up until the overlay holds all bytes that are not holes.
    fn copy_up_all(&self, must_stop: &dyn Fn() -> bool) -> Result<(), OperationError> {
        let copying = || OperationError::io("copying up into the overlay");
        let mut at = 0;
        while at < self.size() {
            self.hydration.wait_while_paused(must_stop);
            if must_stop() {
                return Err(OperationError::Interrupted);
            }
            let size = self.size();
            let piece = self.layers().extent_with_depth(at..size, Wait::Yes).map_err(copying())?;
            at = match piece {
                (Extent { range, kind: ExtentKind::Data }, 1..) => {
                    self.copy_up_paced(at, range.end, must_stop).map_err(copying())?
                }
                (extent, _) => extent.range.end,
            };
            self.operations.report_progress(at, size);
        }
        Ok(())
    }

    /// Copies up the first bytes of `start..end` and sleeps as the rate demands. Returns where the
    /// copied bytes end.
    fn copy_up_paced(&self, start: u64, end: u64, must_stop: &dyn Fn() -> bool) -> io::Result<u64> {
        let rate = match self.hydration.rate.load(Ordering::SeqCst) {
            0 => self.prefetch_rate(),
            rate => rate,
        };
        let pace = Pace::new(rate);
        let end = end.min(start + pace.step());
        let copied = self.copy_up(start..end, Wait::Yes)?;
        pace.wait(copied, must_stop);
        Ok(end)
    }

    /// Refuses to do without a base of which some bytes do not match its bmap, or were never compared: they
    /// are in the overlay by now.
    fn compare_base(&self, must_stop: &dyn Fn() -> bool) -> Result<(), OperationError> {
        let described = self.described_base();
        let Some(remote) = described.remote() else { return Ok(()) };
        remote.compare_all(must_stop).map_err(|error| match error {
            CompareError::Interrupted => OperationError::Interrupted,
            CompareError::Io(error) => {
                OperationError::io("comparing the base with its bmap")(error)
            }
            CompareError::Mismatch(_) | CompareError::TooLong(_) => {
                OperationError::Refused(error.to_string())
            }
        })
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
            let bottom = Some(Arc::new(Blank::new(size)) as Arc<dyn Layer>);
            *self.layers.write() =
                Arc::new(LayerStack::new(Top::Overlay(Arc::clone(&overlay)), Vec::new(), bottom));
            *self.described_base.lock() = Arc::new(BaseDescription::Blank(size));
            self.hydration.is_detached.store(true, Ordering::SeqCst);
        }
        self.drop_unused_layers(tree, &next);
        Ok(())
    }
}
