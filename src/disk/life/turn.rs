//! Taking turns: one thing at a time is done to a disk as a whole.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::RwLockWriteGuard;

use super::super::Disk;
use super::{Force, Life, LifeError};

/// How long requests that change the disk are waited for before its layers change.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long work in the background may take to give way.
const GIVE_WAY: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
pub(super) struct Doing {
    what: &'static str,
    /// It is nobody's request, so it stops when there is one.
    background: bool,
    stop: bool,
}

/// One operation on a disk as a whole, until it is dropped.
pub(in crate::disk) struct Turn<'a>(&'a Life);

impl Turn<'_> {
    /// Whether work that takes long has to stop.
    pub(in crate::disk) fn must_stop(&self) -> bool {
        self.0.ending.load(Ordering::SeqCst) || self.0.doing.lock().is_some_and(|doing| doing.stop)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.all_bytes.store(0, Ordering::Relaxed);
        *self.0.doing.lock() = None;
        self.0.done.notify_all();
    }
}

impl Disk {
    /// Begins an operation on the disk as a whole.
    pub(in crate::disk) fn begin(&self, what: &'static str) -> Result<Turn<'_>, LifeError> {
        self.begin_as(what, false)
    }

    pub(super) fn begin_as(
        &self,
        what: &'static str,
        background: bool,
    ) -> Result<Turn<'_>, LifeError> {
        let life = &self.life;
        if life.ending.load(Ordering::SeqCst) {
            return Err(LifeError::Interrupted);
        }
        let mut doing = life.doing.lock();
        if let Some(now) = &mut *doing {
            if background || !now.background {
                return Err(LifeError::Busy(now.what));
            }
            now.stop = true;
            life.done.wait_while_for(&mut doing, |doing| doing.is_some(), GIVE_WAY);
            if let Some(now) = &*doing {
                return Err(LifeError::Busy(now.what));
            }
        }
        *doing = Some(Doing { what, background, stop: false });
        Ok(Turn(life))
    }

    /// What is being done to the disk as a whole, for `status`.
    #[must_use]
    pub fn doing(&self) -> Option<&'static str> {
        self.life.doing.lock().map(|doing| doing.what)
    }

    /// What somebody has asked for and is not done yet.
    pub(in crate::disk) fn request(&self) -> Option<&'static str> {
        self.life.doing.lock().filter(|doing| !doing.background).map(|doing| doing.what)
    }

    /// Makes work that takes long stop, and waits for it.
    pub(in crate::disk) fn end_life(&self, patience: Duration) {
        self.life.ending.store(true, Ordering::SeqCst);
        let mut doing = self.life.doing.lock();
        self.life.done.wait_while_for(&mut doing, |doing| doing.is_some(), patience);
        drop(doing);
        self.life.held.lock().clear();
        self.life.files.lock().clear();
    }

    /// The gate, for a change of the layers. What waits behind it has no deadline meanwhile.
    pub(in crate::disk) fn enter_to_switch(&self) -> Result<RwLockWriteGuard<'_, ()>, LifeError> {
        let start = Instant::now();
        let gate = self.gate_alone(|| start.elapsed() < PATIENCE).ok_or(LifeError::Stuck)?;
        if self.closed.load(Ordering::SeqCst) { Err(LifeError::Interrupted) } else { Ok(gate) }
    }

    pub(in crate::disk) fn check_writers(&self, force: Force) -> Result<(), LifeError> {
        if force == Force::No && self.has_writers() {
            return Err(LifeError::Writers);
        }
        Ok(())
    }
}
