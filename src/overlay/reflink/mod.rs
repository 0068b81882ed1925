//! Reflink overlays: the disk is one host file that shares its blocks with the base.
//!
//! ```text
//!   base.img   A B C D E F G          read only, never changed
//!   data       A B X D E F Y          FICLONE of the base; the host copies a written block
//!   snapshots/  monday ...            FICLONEs of `data`, read only
//! ```
//!
//! There is no map and no log: the host's file system (XFS, btrfs) does the copy-on-write and
//! preserves it through a crash like that of any file. Writes may bypass this process, through the
//! kernel's passthrough, so no property of `data` is cached in memory: size, times and holes are
//! always read from the file.
//!
//! ```text
//!   vm1.cow/stack        kind = "reflink", base, owner and mode; no layers
//!   vm1.cow/data         its inode never changes: it carries the lock, passthrough registers it
//!   vm1.cow/snapshots/   one file per snapshot
//!   vm1.cow/intent       exists while a revert or a reset is in progress
//! ```
//!
//! - `open`: creating and opening. `snapshots`: snapshot, revert, reset, delete. `intent`:
//!   completing a revert after a crash. `changed`: the differences from the base, derived from the
//!   host's extents.
//!
//! Locks: the disk's gate (held by the caller), then `changing`, held across calls to the host.

mod changed;
mod error;
mod intent;
mod open;
mod snapshots;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

pub use self::changed::ChangedRanges;
pub use self::error::ReflinkError;
pub use self::intent::RevertSource;
pub use self::open::{
    LockedReflink, OpenedReflink, SharedBase, create, lock_overlay, overlay_kind,
};
pub use self::snapshots::ReflinkSnapshot;
use crate::base::raw::RawBase;
use crate::extents::Extent;
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};

/// A disk in a host file that shares blocks with its base.
pub struct Reflink {
    /// The bytes of `data`.
    bytes: RawBase,
    data: Arc<File>,
    base: Arc<File>,
    dir: File,
    snapshots: File,
    /// Serializes snapshot, revert, reset and delete.
    changing: Mutex<()>,
}

impl Reflink {
    fn new(data: Arc<File>, base: Arc<File>, dir: File, snapshots: File) -> io::Result<Self> {
        let bytes = RawBase::whole(Arc::clone(&data))?;
        Ok(Self { bytes, data, base, dir, snapshots, changing: Mutex::new(()) })
    }

    /// Returns the file that holds the disk. Anybody who gets the file may read and write it; its
    /// length is the disk's size.
    #[must_use]
    pub fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Returns whether the host's file system is read-only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        crate::host::is_read_only(&*self.data)
    }

    /// Returns whether a failed sync or an unfinished revert has made the overlay read-only.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.bytes.is_latched()
    }
}

impl Layer for Reflink {
    fn size(&self) -> u64 {
        self.bytes.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        self.bytes.extent_at(range, wait)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        self.bytes.read_at(buf, offset, wait)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        self.bytes.lend_at(range, wait, copy)
    }
}

impl WritableLayer for Reflink {
    fn write_at(
        &self,
        buf: &[u8],
        offset: u64,
        below: &dyn ReadBelow,
        wait: Wait,
    ) -> io::Result<()> {
        self.bytes.write_at(buf, offset, below, wait)
    }

    fn zero(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.bytes.zero(range, below, wait)
    }

    fn punch_hole(&self, range: Range<u64>, below: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        self.bytes.punch_hole(range, below, wait)
    }

    fn allocate(&self, range: Range<u64>, wait: Wait) -> io::Result<()> {
        self.bytes.allocate(range, wait)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.bytes.set_size(size)
    }

    fn sync(&self) -> io::Result<()> {
        self.bytes.sync()
    }

    fn is_latched(&self) -> bool {
        self.bytes.is_latched()
    }
}
