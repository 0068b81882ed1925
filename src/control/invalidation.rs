//! State of a disk that the kernel has cached and has to forget, before a request is answered that
//! makes it stale: the names and pages of a removed disk, the pages of one that was reverted or reset,
//! the name of a deleted snapshot.

use std::sync::Arc;
use std::sync::mpsc;
use std::time::Duration;

use super::Control;
use crate::disk::Disk;

/// State that the kernel may have cached and that is stale.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Invalidation {
    /// A disk has left the mount.
    Disk {
        /// The mounted file and the files of its partitions, each with its inode number.
        files: Vec<(String, u64)>,
    },
    /// A disk's contents have changed.
    Bytes {
        /// The inode numbers of the mounted file and of its partitions.
        inos: Vec<u64>,
    },
    /// A name is gone, that of a deleted snapshot: its cached entry leads to no file.
    Name {
        /// The inode number of the directory.
        parent: u64,
        /// The name.
        name: String,
    },
}

/// A function that makes the kernel forget stale state. A call may wait for requests in progress, so a
/// thread of the disk's `pools.notify` makes it.
pub type Invalidator = Arc<dyn Fn(&Invalidation) + Send + Sync>;

/// Time limit for an invalidation. Names and attributes in the kernel's cache expire after a second
/// anyway; its pages of a file go once the invalidation is done.
const INVALIDATE_TIMEOUT: Duration = Duration::from_secs(1);

impl Control {
    /// Makes the kernel forget the `stale` state of a disk and waits for that: it must not be
    /// visible once the request has been answered.
    pub(super) fn wait_for_invalidation(&self, disk: &Disk, stale: Invalidation) {
        let Some(invalidate) = self.invalidator.get().map(Arc::clone) else {
            return;
        };
        let (ended, end) = mpsc::channel();
        disk.pools.notify.run(Box::new(move || {
            invalidate(&stale);
            // The receiver may have timed out.
            let _ = ended.send(());
        }));
        // The kernel may be waiting for this very thread, so the wait is bounded.
        let _ = end.recv_timeout(INVALIDATE_TIMEOUT);
    }

    /// Makes the kernel write back and drop its pages of a disk. The kernel keeps pages even of a
    /// disk that is not open.
    pub(super) fn drop_cached_pages(&self, disk: &Disk) {
        let inos = disk.files_showing(0..u64::MAX).map(|(ino, _)| ino).collect();
        self.wait_for_invalidation(disk, Invalidation::Bytes { inos });
    }
}
