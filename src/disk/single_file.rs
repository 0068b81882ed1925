//! Disks that are one host file: over a reflink overlay, and with the key `passthrough_file`.
//!
//! Writes may come past the daemon, so size, times and space are the file's own, at the moment
//! they are asked for.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::SystemTime;

use super::{Attributes, Disk, to_system_time};
use crate::config::{DiskMode, Passthrough, Resize};

impl Disk {
    /// The host file whose bytes, length and times are the disk's.
    fn single_file(&self) -> Option<Arc<File>> {
        match (self.reflink(), self.passthrough) {
            (Some(reflink), _) => Some(Arc::clone(reflink.data())),
            (None, Passthrough::On) => self.bottom().file().cloned(),
            (None, Passthrough::Off) => None,
        }
    }

    /// The same, when reads and writes may go straight to it: whoever may write the disk may make
    /// it longer. The same answer from the disk's first open to its last release.
    #[must_use]
    pub fn passthrough_file(&self) -> Option<Arc<File>> {
        // A disk of fixed size refuses what a file takes.
        self.single_file().filter(|_| self.resize == Resize::Follow)
    }

    /// What stat(2) says, when the disk is one file.
    pub(super) fn single_file_attributes(&self) -> io::Result<Option<Attributes>> {
        let Some(file) = self.single_file() else { return Ok(None) };
        let found = file.metadata()?;
        let changed = |secs: i64, nanos: i64| {
            let after_chown = self.times.ctime.load(Ordering::Relaxed);
            secs.saturating_mul(1_000_000_000).saturating_add(nanos).max(after_chown)
        };
        Ok(Some(Attributes {
            size: found.len(),
            allocated: found.blocks() * 512,
            owner: self.owner(),
            atime: found.accessed()?,
            mtime: found.modified()?,
            ctime: to_system_time(changed(found.ctime(), found.ctime_nsec())),
            blksize: self.blksize(),
            nlink: self.nlink(),
        }))
    }

    /// Sets the times that are given, when the disk is one file that may be changed.
    pub(super) fn set_single_file_times(
        &self,
        atime: Option<SystemTime>,
        mtime: Option<SystemTime>,
    ) {
        let Some(file) = self.single_file().filter(|_| self.mode != DiskMode::ReadOnly) else {
            return;
        };
        let mut times = FileTimes::new();
        if let Some(atime) = atime {
            times = times.set_accessed(atime);
        }
        if let Some(mtime) = mtime {
            times = times.set_modified(mtime);
        }
        if let Err(error) = file.set_times(times) {
            log::warn!("the times of {} are not set: {error}", self.source);
        }
    }
}
