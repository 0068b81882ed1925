//! Taking turns: one thing at a time is done to a disk as a whole.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::RwLockWriteGuard;

use super::super::Disk;
use super::{Force, History, OperationError};

/// How long requests that change the disk are waited for before its layers change.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long work in the background may take to give way.
const YIELD_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub(super) struct RunningOperation {
    name: &'static str,
    /// It is nobody's request, so it stops when there is one.
    is_background: bool,
    must_stop: bool,
}

/// One operation on a disk as a whole, until it is dropped.
pub(in crate::disk) struct Operation<'a>(&'a History);

impl Operation<'_> {
    /// Whether work that takes long has to stop.
    pub(in crate::disk) fn must_stop(&self) -> bool {
        self.0.is_ending.load(Ordering::SeqCst)
            || self.0.running.lock().is_some_and(|doing| doing.must_stop)
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.total_bytes.store(0, Ordering::Relaxed);
        *self.0.running.lock() = None;
        self.0.finished.notify_all();
    }
}

impl Disk {
    /// Begins an operation on the disk as a whole.
    pub(in crate::disk) fn begin_operation(
        &self,
        what: &'static str,
    ) -> Result<Operation<'_>, OperationError> {
        self.begin_operation_as(what, false)
    }

    pub(super) fn begin_operation_as(
        &self,
        what: &'static str,
        background: bool,
    ) -> Result<Operation<'_>, OperationError> {
        let life = &self.history;
        if life.is_ending.load(Ordering::SeqCst) {
            return Err(OperationError::Interrupted);
        }
        let mut doing = life.running.lock();
        if let Some(now) = &mut *doing {
            if background || !now.is_background {
                return Err(OperationError::Busy(now.name));
            }
            now.must_stop = true;
            life.finished.wait_while_for(&mut doing, |doing| doing.is_some(), YIELD_TIMEOUT);
            if let Some(now) = &*doing {
                return Err(OperationError::Busy(now.name));
            }
        }
        *doing = Some(RunningOperation { name: what, is_background: background, must_stop: false });
        Ok(Operation(life))
    }

    /// What is being done to the disk as a whole, for `status`.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.history.running.lock().map(|doing| doing.name)
    }

    /// What somebody has asked for and is not done yet.
    pub(in crate::disk) fn requested_operation(&self) -> Option<&'static str> {
        self.history.running.lock().filter(|doing| !doing.is_background).map(|doing| doing.name)
    }

    /// Makes work that takes long stop, and waits for it.
    pub(in crate::disk) fn end_operations(&self, patience: Duration) {
        self.history.is_ending.store(true, Ordering::SeqCst);
        let mut doing = self.history.running.lock();
        self.history.finished.wait_while_for(&mut doing, |doing| doing.is_some(), patience);
        drop(doing);
        self.history.diff_files.lock().clear();
        self.history.snapshot_files.lock().clear();
    }

    /// The gate, for a change of the layers. What waits behind it has no deadline meanwhile.
    pub(in crate::disk) fn gate_for_layers(
        &self,
    ) -> Result<RwLockWriteGuard<'_, ()>, OperationError> {
        let start = Instant::now();
        let gate = self
            .wait_for_gate(|| start.elapsed() < DRAIN_TIMEOUT)
            .ok_or(OperationError::WriterStuck)?;
        if self.closed.load(Ordering::SeqCst) { Err(OperationError::Interrupted) } else { Ok(gate) }
    }

    pub(in crate::disk) fn check_writers(&self, force: Force) -> Result<(), OperationError> {
        if force == Force::No && self.has_writers() {
            return Err(OperationError::Writers);
        }
        Ok(())
    }
}
