//! Closing of a disk: at the end of its mount (`close`), because its mount did not come about
//! (`abandon`), or by removing it from a mount that continues without it.
//!
//! ```text
//!   retire ──> (out of the catalog) ──> shut_down: stop the pools -> gate -> take the layers away
//!      │                                       -> wait until they are unused -> close, unlock
//!      └─ the disk is in use: nothing has changed
//! ```
//!
//! The process does not end here, and so its descriptors stay open: a late request may still refer
//! to the disk, but the disk has no layers by then. Only when no other reference to the layers is
//! left are they closed, so a log's `Close` is really its last record.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::Disk;
use super::layers::{LayerStack, Top};
use super::overlay_location::OverlayDirState;
use crate::host::os_error;
use crate::overlay::Overlay;
use crate::overlay::recover::Recovered;
use crate::stream::UnmountPolicy;
use crate::stream::output::DrainTimeout;

/// How often the shutdown checks whether a late request has ended, which usually takes
/// microseconds.
const POLL_INTERVAL: Duration = Duration::from_millis(1);

impl Disk {
    /// Makes everything durable and closes the log cleanly. No call may follow.
    ///
    /// When a change still waits for its base after `timeout`, that change is abandoned: all
    /// others are made durable, and the next mount finds the log not closed.
    ///
    /// # Errors
    /// `ETIMEDOUT` when a change was abandoned; `EIO` when the disk has latched; the host's errno.
    pub fn close(&self, timeout: Duration) -> io::Result<()> {
        self.end_operations(timeout);
        let gate = self.gate.close(timeout);
        match &self.layers().top {
            Top::Overlay(overlay) if gate.is_some() => self.close_overlay(overlay)?,
            top => top.sync()?,
        }
        self.overlay_location.remove_holder();
        if gate.is_some() { Ok(()) } else { Err(os_error(libc::ETIMEDOUT)) }
    }

    /// Closes a disk whose mount did not come about, and removes the overlay that was created for
    /// it.
    pub fn abandon(&self) {
        if self.stream().is_some() {
            if let Err(error) = self.end_stream(UnmountPolicy::Abort, DrainTimeout::Unlimited) {
                log::warn!("{}: {error}", self.source);
            }
            return;
        }
        if let Err(error) = self.close(Duration::MAX) {
            log::warn!("{}: {error}", self.source);
        }
        self.remove_new_overlay();
    }

    /// Removes the overlay of a disk that is closed, or could not be, if it was created for the disk and
    /// its path still leads to it.
    pub(crate) fn remove_new_overlay(&self) {
        if self.recovered == Recovered::New
            && self.overlay_dir_state() == Some(OverlayDirState::InPlace)
            && let Some(dir) = self.overlay_dir()
            && let Err(error) = std::fs::remove_dir_all(&dir)
        {
            log::warn!("'{}' is left behind: {error}", dir.display());
        }
    }

    /// Whether the disk has lost its layers or is about to: its contents are no longer valid.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Shuts down a retired disk that has no name: on return everything is durable, the log is
    /// closed cleanly and the files are free for others. `summarize` is called when the disk can no
    /// longer change.
    ///
    /// A request that still waits for its base after `timeout` keeps the files until it ends.
    ///
    /// # Errors
    /// `ETIMEDOUT` when such a request is left; `EIO` when the disk has latched; the host's errno.
    pub fn shut_down(&self, timeout: Duration, summarize: impl FnOnce(&Self)) -> io::Result<()> {
        let until = Instant::now() + timeout;
        let left = || until.saturating_duration_since(Instant::now());
        self.end_operations(left());
        // No idle thread may be left behind; whether all have finished is checked below.
        self.pools.stop(left());
        let gate = self.gate.close(left());
        summarize(self);
        let none = Arc::new(LayerStack::read_only(Vec::new(), None));
        let layers = std::mem::replace(&mut *self.layers.write(), none);
        let overlay_dir = self.overlay_location.take();
        let is_alone =
            || gate.is_some() && Arc::strong_count(&layers) == 1 && layers.is_top_unused();
        while !is_alone() && !left().is_zero() {
            thread::sleep(POLL_INTERVAL);
        }
        let is_alone = is_alone();
        let closed = match &layers.top {
            Top::Overlay(overlay) if is_alone => self.close_overlay(overlay),
            // The end of the stream was reported when it was finished or aborted.
            Top::Writable(_) if self.stream().is_some() => Ok(()),
            top => top.sync(),
        };
        match overlay_dir {
            Some(dir) if is_alone => dir.unlock(),
            Some(dir) => dir.remove_holder(),
            None => {}
        }
        // Dropping the last reference to a base releases its locks.
        drop(layers);
        closed?;
        if is_alone { Ok(()) } else { Err(os_error(libc::ETIMEDOUT)) }
    }

    /// Closes the log cleanly, with the modification time as its last entry before the end.
    fn close_overlay(&self, overlay: &Overlay) -> io::Result<()> {
        self.record_mtime(overlay);
        overlay.close()
    }
}

impl LayerStack {
    /// Whether the overlay is unused: these layers hold two references to it, in `top` and in
    /// `all`.
    fn is_top_unused(&self) -> bool {
        match &self.top {
            Top::Overlay(overlay) => Arc::strong_count(overlay) == 2,
            Top::Reflink(reflink) => Arc::strong_count(reflink) == 2,
            Top::Writable(_) | Top::Nothing => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{OpenContext, OpenedDisk, open};
    use super::*;
    use crate::config::{DiskSource, DiskSpec};
    use crate::layer::Wait;
    use crate::overlay::persist::OverlayPath;

    const SHORT: Duration = Duration::from_millis(50);
    const LONG: Duration = Duration::from_secs(60);

    fn disk(overlay: Option<&Path>) -> Result<Disk, String> {
        let mut spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(1 << 20));
        spec.overlay = overlay.map(Path::to_owned);
        let context = OpenContext::unmounted();
        let opened = open(&spec, &context).map_err(|error| error.to_string())?;
        let OpenedDisk { disk, .. } = opened;
        Ok(disk)
    }

    #[test]
    fn a_retired_disk_is_not_kept() {
        let disk = disk(None).unwrap();
        disk.retire().unwrap();
        assert!(disk.keep(OverlayPath { dir: Path::new("/nowhere/kept"), layers: None }).is_err());
    }

    #[test]
    fn an_overlay_is_free_after_shut_down_even_if_the_disk_is_still_referenced() {
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("ov");
        let disk = disk(Some(&dir)).unwrap();
        disk.write(b"kept", 4096, Wait::Yes).unwrap();
        disk.retire().unwrap();
        let mut seen = 0;
        disk.shut_down(LONG, |disk| seen = disk.size()).unwrap();
        assert_eq!(seen, 1 << 20);
        let again = self::disk(Some(&dir)).unwrap();
        assert_eq!(again.recovered(), Recovered::Clean);
        let mut found = [0; 4];
        again.read(&mut found, 4096, Wait::Yes).unwrap();
        assert_eq!(&found, b"kept");
        // Nothing written through the old disk reaches the files.
        assert!(disk.write(b"late", 4096, Wait::Yes).is_err());
        disk.set_times(None, Some(std::time::SystemTime::now()));
        disk.maintain().unwrap();
        disk.sync().unwrap();
        again.close(LONG).unwrap();
        drop(again);
        assert_eq!(self::disk(Some(&dir)).unwrap().recovered(), Recovered::Clean);
    }

    #[test]
    fn a_late_request_keeps_the_overlay_locked_until_it_ends() {
        let room = tempfile::tempdir().unwrap();
        let dir = room.path().join("ov");
        let disk = disk(Some(&dir)).unwrap();
        let late = disk.overlay();
        disk.retire().unwrap();
        let error = disk.shut_down(SHORT, |_| {}).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT));
        let refused = self::disk(Some(&dir)).err().unwrap();
        assert!(refused.contains("in use"), "{refused}");
        drop(late);
        self::disk(Some(&dir)).unwrap();
    }
}
