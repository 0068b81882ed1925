//! Disks that are a single host file: those with a reflink overlay, and those with the key
//! `passthrough`.
//!
//! Writes may bypass the daemon, so size, times and allocated space are read from the file at every
//! request.

use std::fs::{File, FileTimes};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::SystemTime;

use super::Disk;
use super::attrs::{Attributes, to_system_time};
use crate::config::{DiskMode, Passthrough, Resize};

impl Disk {
    /// The host file that provides the disk's bytes, length and times.
    fn single_file(&self) -> Option<Arc<File>> {
        match (self.reflink(), self.passthrough) {
            (Some(reflink), _) => Some(Arc::clone(reflink.data())),
            (None, Passthrough::On) => self.described_base().file().cloned(),
            (None, Passthrough::Off) => None,
        }
    }

    /// The host file that the kernel may read and write directly; a writer of the disk may then
    /// also extend it. The answer stays the same from the disk's first open to its last release.
    #[must_use]
    pub fn passthrough_file(&self) -> Option<Arc<File>> {
        // A disk of fixed size refuses writes that a file would accept.
        self.single_file().filter(|_| self.resize == Resize::Follow)
    }

    /// Returns the attributes of a disk that is a single file.
    pub(super) fn single_file_attributes(&self) -> io::Result<Option<Attributes>> {
        let Some(file) = self.single_file() else { return Ok(None) };
        let found = file.metadata()?;
        let changed = |secs: i64, nanos: i64| {
            let after_chown = self.attrs.times.ctime();
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
            nlink: self.references.nlink(),
        }))
    }

    /// Sets the given times of a disk that is a single writable file.
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
