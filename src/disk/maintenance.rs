//! The periodic work on a disk.

use std::io;
use std::sync::atomic::Ordering;

use super::Disk;
use crate::layer::Wait;
use crate::remote::RemoteImage;

impl Disk {
    /// Whether `maintain` has work to do and is not running already.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        !self.maintaining.load(Ordering::SeqCst)
            && (self.allocated.is_stale()
                || self.described_base().remote().is_some_and(RemoteImage::needs_maintenance)
                || self.overlay().is_some_and(|overlay| overlay.needs_maintenance()))
    }

    /// Does the periodic work, every few seconds: records the modification time in the log and
    /// flushes changes to the device. Only one call runs at a time, so a slow device or base holds
    /// one thread.
    ///
    /// # Errors
    /// The host's errno. Unless that is `ENOSPC`, the disk has latched.
    pub fn maintain(&self) -> io::Result<()> {
        if self.maintaining.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let done = self.run_maintenance();
        self.maintaining.store(false, Ordering::SeqCst);
        done
    }

    fn run_maintenance(&self) -> io::Result<()> {
        if let Some(remote) = self.described_base().remote() {
            remote.maintain();
        }
        if let Some(overlay) = self.overlay() {
            self.record_mtime(&overlay);
            overlay.maintain()?;
        }
        if self.allocated.take_stale()
            && let Err(error) = self.allocated(Wait::Yes).and_then(|_| self.refresh_allocated())
        {
            log::debug!("{}: its extents are not known: {error}", self.source);
        }
        Ok(())
    }
}
