//! Operations on a disk as a whole, of which only one runs at a time.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::RwLockWriteGuard;

use super::super::Disk;
use super::{Force, History, OperationError};

/// How long requests that change the disk are waited for before its layers change.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a background operation may take to yield.
const YIELD_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub(super) struct RunningOperation {
    name: &'static str,
    /// The operation is no user's request, so it stops when one comes.
    is_background: bool,
    must_stop: bool,
}

/// A running operation on the whole disk, which ends when dropped.
pub(in crate::disk) struct Operation<'a>(&'a History);

impl Operation<'_> {
    /// Whether a long operation must stop.
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
    /// Begins an operation on the whole disk.
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

    /// The name of the running operation, for `status`.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.history.running.lock().map(|doing| doing.name)
    }

    /// The name of the running operation, if a user requested it.
    pub(in crate::disk) fn requested_operation(&self) -> Option<&'static str> {
        self.history.running.lock().filter(|doing| !doing.is_background).map(|doing| doing.name)
    }

    /// Makes long operations stop, and waits for them.
    pub(in crate::disk) fn end_operations(&self, patience: Duration) {
        self.history.is_ending.store(true, Ordering::SeqCst);
        let mut doing = self.history.running.lock();
        self.history.finished.wait_while_for(&mut doing, |doing| doing.is_some(), patience);
        drop(doing);
        self.history.diff_files.lock().clear();
        self.history.snapshot_files.lock().clear();
    }

    /// Takes the gate exclusive for a change of the layers. Requests that wait for the gate have no
    /// deadline meanwhile.
    pub(in crate::disk) fn gate_for_layers(
        &self,
    ) -> Result<RwLockWriteGuard<'_, ()>, OperationError> {
        let start = Instant::now();
        let gate = self
            .gate
            .exclusive_while(|| start.elapsed() < DRAIN_TIMEOUT)
            .ok_or(OperationError::WriterStuck)?;
        if self.gate.is_closed() { Err(OperationError::Interrupted) } else { Ok(gate) }
    }

    pub(in crate::disk) fn check_writers(&self, force: Force) -> Result<(), OperationError> {
        if force == Force::No && self.has_writers() {
            return Err(OperationError::Writers);
        }
        Ok(())
    }
}
