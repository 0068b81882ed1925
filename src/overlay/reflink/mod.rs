//! Reflink overlays: the disk is one host file that shares its blocks with the base.
//!
//! ```text
//!   base.img   A B C D E F G          read only, never touched
//!              | |   | | |
//!   data       A B X D E F Y          FICLONE of the base; the host copies a block that is written
//!                |   |   |
//!   snapshots/  monday ...            FICLONEs of `data`, read only
//! ```
//!
//! There is no map and no log: the host's file system (XFS, btrfs) does the copy-on-write, and
//! keeps it through a crash as it keeps any file. Writes may come past us, through the kernel's
//! passthrough, so nothing of `data` is kept in memory: size, times and holes are asked of the
//! file.
//!
//! ```text
//!   vm1.cow/stack        kind = "reflink", base, owner and mode; no layers
//!   vm1.cow/data         its inode never changes: the lock is on it, passthrough registers it
//!   vm1.cow/snapshots/   a file each
//!   vm1.cow/intent       there while a revert or a reset is under way
//! ```
//!
//! - `open`: making and opening. `snapshots`: snapshot, revert, reset, delete. `intent`: what makes
//!   a revert whole after a crash. `changed`: what differs from the base, as the host's extents tell it.
//!
//! Locks: the disk's gate (held by the caller), then `changing`, held across the host's calls.

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

pub use self::changed::{ChangedRanges, Flush};
pub use self::error::ReflinkError;
pub use self::intent::RevertTarget;
pub use self::open::{
    LockedReflink, OpenedReflink, SharedBase, create, lock_overlay, overlay_kind,
};
pub use self::snapshots::ReflinkSnapshot;
use crate::base::raw::RawBase;
use crate::extents::Extent;
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};

/// A disk in a file of its own that shares blocks with its base.
pub struct Reflink {
    /// The bytes of `data`.
    bytes: RawBase,
    data: Arc<File>,
    base: Arc<File>,
    dir: File,
    snapshots: File,
    /// One snapshot, revert, reset or delete at a time.
    changing: Mutex<()>,
}

impl Reflink {
    fn new(data: Arc<File>, base: Arc<File>, dir: File, snapshots: File) -> io::Result<Self> {
        let bytes = RawBase::whole(Arc::clone(&data))?;
        Ok(Self { bytes, data, base, dir, snapshots, changing: Mutex::new(()) })
    }

    /// The file that is the disk. It may be read and written by whoever gets it; its length is
    /// the disk's size.
    #[must_use]
    pub fn data(&self) -> &Arc<File> {
        &self.data
    }

    /// Whether its host's file system is read-only.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        crate::host::is_read_only(&*self.data)
    }

    /// Whether a failed sync, or a revert that could not be finished, has made it read-only.
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
