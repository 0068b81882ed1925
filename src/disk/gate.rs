//! The gate of a disk: the lock under which the disk changes.
//!
//! Every change of bytes holds the gate shared; a change of the size or of the layers holds it
//! exclusive. Reads do not take it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use parking_lot::{Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::host::os_error;
use crate::layer::Wait;
use crate::pool::check_cancelled;

/// How long an exclusive waiter blocks new shared holders at first. Changes under way end within
/// milliseconds, unless they wait for a base.
const MIN_WAIT: Duration = Duration::from_millis(100);
/// How long an exclusive waiter blocks new shared holders at most. A host short of clean pages may
/// hold a write up for a second.
const MAX_WAIT: Duration = Duration::from_millis(1600);

/// A lock that is held shared for changes of bytes and exclusive for changes of the size or of the
/// layers.
#[derive(Default)]
pub(super) struct Gate {
    lock: RwLock<()>,
    /// Held by the one caller that waits for the exclusive lock (`exclusive_while`).
    queue: Mutex<()>,
    /// Set once the overlay is closed because the daemon or the disk shuts down: every change is
    /// refused from then on.
    is_closed: AtomicBool,
}

impl Gate {
    /// Takes the gate shared, for a change of bytes.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] while the gate is held exclusive; `EIO` once the gate is closed
    /// or the request was answered.
    pub(super) fn shared(&self, wait: Wait) -> io::Result<RwLockReadGuard<'_, ()>> {
        let guard = match wait {
            Wait::Yes => self.lock.read(),
            Wait::No => self.lock.try_read().ok_or_else(|| os_error(libc::EAGAIN))?,
        };
        self.check_changeable().map(|()| guard)
    }

    /// Takes the gate exclusive, for a change of the size.
    ///
    /// # Errors
    /// The errors of [`shared`](Self::shared).
    pub(super) fn exclusive(&self, wait: Wait) -> io::Result<RwLockWriteGuard<'_, ()>> {
        let guard = match wait {
            Wait::Yes => self
                .exclusive_while(|| check_cancelled().is_ok())
                .ok_or_else(|| os_error(libc::EIO))?,
            Wait::No => self.lock.try_write().ok_or_else(|| os_error(libc::EAGAIN))?,
        };
        self.check_changeable().map(|()| guard)
    }

    /// Takes the gate exclusive; returns `None` once `may_wait` returns false.
    ///
    /// An exclusive waiter blocks all new shared holders, and a change that waits for a hanging
    /// base may hold the gate for as long as the base hangs. So only one caller waits at a time,
    /// and it steps back repeatedly so that the others make progress.
    pub(super) fn exclusive_while(
        &self,
        may_wait: impl Fn() -> bool,
    ) -> Option<RwLockWriteGuard<'_, ()>> {
        let mut timeout = MIN_WAIT;
        loop {
            if let Some(_first) = self.queue.try_lock_for(MIN_WAIT) {
                if let Some(guard) = self.lock.try_write_for(timeout) {
                    return Some(guard);
                }
                thread::sleep(timeout / 2);
                timeout = (timeout * 2).min(MAX_WAIT);
            }
            if !may_wait() {
                return None;
            }
        }
    }

    /// Waits up to `timeout` for all changes under way, closes the gate for good, and returns the
    /// exclusive lock unless the time was not enough.
    pub(super) fn close(&self, timeout: Duration) -> Option<RwLockWriteGuard<'_, ()>> {
        let guard = self.lock.try_write_for(timeout);
        self.is_closed.store(true, Ordering::SeqCst);
        guard
    }

    /// Whether the gate was closed.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst)
    }

    /// Checks after the wait for the gate whether this request may still change the disk.
    fn check_changeable(&self) -> io::Result<()> {
        check_cancelled()?;
        if self.is_closed.load(Ordering::Relaxed) { Err(os_error(libc::EIO)) } else { Ok(()) }
    }
}
