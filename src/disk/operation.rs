//! Operations on a disk as a whole, of which only one runs at a time: snapshots, reverts, commits,
//! hydration, merging.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, RwLockWriteGuard};

use super::Disk;
use super::operation_error::OperationError;

/// How long requests that change the disk are waited for before its layers change.
const WRITER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a background operation may take to yield.
const YIELD_TIMEOUT: Duration = Duration::from_secs(60);

/// Whether an operation proceeds although the disk is open for writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// The operation is refused.
    No,
    /// The operation proceeds.
    Yes,
}

#[derive(Clone, Copy)]
struct RunningOperation {
    name: &'static str,
    /// The operation is no user's request, so it stops when one comes.
    is_background: bool,
    must_stop: bool,
}

/// The operation that runs on a disk, and its progress.
#[derive(Default)]
pub(super) struct Operations {
    /// The running operation, and whether it must yield. Locked for a moment; the operation lasts.
    running: Mutex<Option<RunningOperation>>,
    finished: Condvar,
    /// Set when the mount ends: long operations must stop.
    is_ending: AtomicBool,
    /// The progress of the running operation: bytes done, and in total.
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

/// A running operation on the whole disk, which ends when dropped.
pub(super) struct Operation<'a>(&'a Operations);

impl Operation<'_> {
    /// Whether a long operation must stop.
    pub(super) fn must_stop(&self) -> bool {
        self.0.is_ending() || self.0.running.lock().is_some_and(|running| running.must_stop)
    }
}

impl Drop for Operation<'_> {
    fn drop(&mut self) {
        self.0.report_progress(0, 0);
        *self.0.running.lock() = None;
        self.0.finished.notify_all();
    }
}

impl Operations {
    /// Begins the operation `name`, which a user requested. An operation in the background is made
    /// to yield first.
    ///
    /// # Errors
    /// [`OperationError::Busy`] while another operation runs; [`OperationError::Interrupted`] when
    /// the mount ends.
    pub(super) fn begin(&self, name: &'static str) -> Result<Operation<'_>, OperationError> {
        self.begin_as(name, false)
    }

    /// Begins the operation `name`, which yields to operations that users request.
    ///
    /// # Errors
    /// The errors of [`begin`](Self::begin).
    pub(super) fn begin_in_background(
        &self,
        name: &'static str,
    ) -> Result<Operation<'_>, OperationError> {
        self.begin_as(name, true)
    }

    fn begin_as(
        &self,
        name: &'static str,
        is_background: bool,
    ) -> Result<Operation<'_>, OperationError> {
        if self.is_ending() {
            return Err(OperationError::Interrupted);
        }
        let mut running = self.running.lock();
        if let Some(other) = &mut *running {
            if is_background || !other.is_background {
                return Err(OperationError::Busy(other.name));
            }
            other.must_stop = true;
            self.finished.wait_while_for(&mut running, |other| other.is_some(), YIELD_TIMEOUT);
            if let Some(other) = &*running {
                return Err(OperationError::Busy(other.name));
            }
        }
        *running = Some(RunningOperation { name, is_background, must_stop: false });
        Ok(Operation(self))
    }

    /// The name of the running operation.
    pub(super) fn running(&self) -> Option<&'static str> {
        self.running.lock().map(|running| running.name)
    }

    /// The name of the running operation, if a user requested it.
    pub(super) fn requested(&self) -> Option<&'static str> {
        self.running.lock().filter(|running| !running.is_background).map(|running| running.name)
    }

    /// Whether the mount ends, so that long operations must stop.
    pub(super) fn is_ending(&self) -> bool {
        self.is_ending.load(Ordering::SeqCst)
    }

    /// Makes long operations stop, and waits for them up to `timeout`.
    pub(super) fn end(&self, timeout: Duration) {
        self.is_ending.store(true, Ordering::SeqCst);
        let mut running = self.running.lock();
        self.finished.wait_while_for(&mut running, |running| running.is_some(), timeout);
    }

    /// Sets the progress of the running operation: bytes done, and in total.
    pub(super) fn report_progress(&self, done: u64, total: u64) {
        self.done_bytes.store(done, Ordering::Relaxed);
        self.total_bytes.store(total, Ordering::Relaxed);
    }

    /// The progress of the running operation: bytes done, and in total.
    fn progress(&self) -> (u64, u64) {
        (self.done_bytes.load(Ordering::Relaxed), self.total_bytes.load(Ordering::Relaxed))
    }
}

impl Disk {
    /// The name of the running operation, for `status`.
    #[must_use]
    pub fn operation(&self) -> Option<&'static str> {
        self.operations.running()
    }

    /// The progress of the current operation: bytes done, and in total.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        self.operations.progress()
    }

    /// Makes long operations stop and waits for them, then drops the files of snapshots.
    pub(super) fn end_operations(&self, timeout: Duration) {
        self.operations.end(timeout);
        self.history.drop_files();
    }

    /// Takes the gate exclusive for a change of the layers.
    ///
    /// # Errors
    /// [`OperationError::WriterStuck`] when a change does not end in time;
    /// [`OperationError::Interrupted`] once the disk is closed.
    pub(super) fn gate_for_layers(&self) -> Result<RwLockWriteGuard<'_, ()>, OperationError> {
        let start = Instant::now();
        let gate = self
            .gate
            .exclusive_while(|| start.elapsed() < WRITER_TIMEOUT)
            .ok_or(OperationError::WriterStuck)?;
        if self.gate.is_closed() { Err(OperationError::Interrupted) } else { Ok(gate) }
    }

    /// Refuses an operation on a disk that is open for writing, unless `force` allows it.
    ///
    /// # Errors
    /// [`OperationError::Writers`].
    pub(super) fn check_writers(&self, force: Force) -> Result<(), OperationError> {
        if force == Force::No && self.has_writers() {
            return Err(OperationError::Writers);
        }
        Ok(())
    }
}
