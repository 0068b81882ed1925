//! Coherence of the kernel's page cache: the rules by which cached pages never show stale bytes,
//! and dirty pages never overwrite newer ones.
//!
//! The kernel caches pages per inode. A disk and its partition files are several inodes that show
//! the same bytes, and a disk's own bytes can change past its inode's pages. So it depends on the
//! open which handles use pages at all ([`PageCache::open_flags`]):
//!
//! ```text
//!   file                        cache=auto                   cache=none   cache=writeback
//!   a whole disk                readers cached, others not   direct       cached
//!   a stream, a partition file  direct                       direct       direct
//! ```
//!
//! A direct handle that can read may still be mapped, so its inode may have pages, and dirty ones
//! that this daemon has not seen if the handle can also write. Pages are kept from one open of a
//! disk to the next (`FOPEN_KEEP_CACHE`) unless it has partition files. A disk that is passed
//! through (`passthrough`) has no pages of its own: the kernel caches the host file.
//!
//! Dropping pages writes dirty ones back first. "Others" are the other files of the same disk that
//! have the range open for reading:
//!
//! ```text
//!   change                         dropped before it    dropped after it                 and the reply
//!   write by a client              dirty ones of others others; the file's own, if a     comes last
//!                                                       cached handle reads the disk
//!   write-back of cached pages     -                    others                           comes first
//!   truncation, fallocate          dirty ones of others others                           comes last
//!   truncation to 0 of a file      -                    others, then the file's own;     comes last, or
//!   whose size is fixed                                 dirty ones wait for the reply    after 1 s
//!   copy_file_range                dirty ones of others all files of the disk            comes last
//!   lseek, if pages may be dirty   all files            -                                comes last
//!   the base is found not to       -                    all files, within a second       -
//!   match its bmap
//!   revert, reset                  all files            all files; with another size     comes last
//!                                                       and cache=writeback the name
//!   snapshot, diff, clone, commit  all files            -                                comes last
//!   a disk leaves the mount        -                    all files, and their names       comes last
//!   a snapshot is deleted          -                    its name                         comes last
//! ```
//!
//! The file that a change came through needs nothing where the table says so: the kernel keeps its
//! pages valid itself. Bytes that are written back have their page locked until the reply, so an
//! invalidation before it would deadlock; two such pages of two files would wait for each other.
//! The last four rows are requests to the control files (`control`), which wait a second for the
//! kernel at most.
//!
//! With cache=writeback the kernel keeps the size of an inode as well, and only a truncation that comes
//! through it changes that. A disk whose size changes otherwise, by a revert, a reset, or while it
//! is not in the mount, gets another inode number (`disk::SizeChange`).
//!
//! Invalidations are sent by pool threads and never by a handler: the kernel may need a free worker
//! to carry one out. No lock is held meanwhile.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::sync::mpsc;
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use fuser::{FopenFlags, INodeNo, Notifier};

use super::nodes::ROOT_INO;
use crate::config::CacheMode;
use crate::control::{Invalidation, Invalidator};
use crate::disk::{Disk, DiskFile, HandleAccess};

/// How long the reply to a truncation waits for pages to be dropped: dirty pages, in turn, wait for
/// the reply.
const TRUNCATE_WAIT: Duration = Duration::from_secs(1);

/// The range of all bytes of a disk.
pub(super) const WHOLE_DISK: Range<u64> = 0..u64::MAX;

/// The flags of a handle that reads and writes past the cache.
pub(super) const DIRECT: FopenFlags =
    FopenFlags::FOPEN_DIRECT_IO.union(FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES);

/// The kernel's page cache of a mount.
pub(crate) struct PageCache {
    mode: CacheMode,
    /// Sends invalidations; set once the kernel has initialized the connection (`FUSE_INIT`).
    notifier: OnceLock<Notifier>,
}

impl PageCache {
    /// Creates the page cache of a mount that uses it in the way of `mode`.
    #[must_use]
    pub(crate) fn new(mode: CacheMode) -> Self {
        Self { mode, notifier: OnceLock::new() }
    }

    /// Makes invalidations go to `notifier`; nothing is cached before that.
    pub(crate) fn connect(&self, notifier: Notifier) {
        // A mount has one connection.
        let _ = self.notifier.set(notifier);
    }

    /// How the cache is used.
    pub(super) fn mode(&self) -> CacheMode {
        self.mode
    }

    /// Decides how a handle of `file` uses the cache.
    pub(super) fn open_flags(&self, file: &DiskFile, access: HandleAccess) -> FopenFlags {
        let is_cached = match self.mode {
            // A stream is never cached: its contents change as it flows.
            _ if file.disk().stream().is_some() || file.is_partition() => false,
            CacheMode::Auto => access == HandleAccess::Read,
            CacheMode::None => false,
            CacheMode::Writeback => true,
        };
        match (is_cached, file.disk().partition_files().is_empty()) {
            (false, _) => DIRECT,
            // Cached pages stay valid: every change comes through this mount.
            (true, true) => FopenFlags::FOPEN_KEEP_CACHE,
            // While the file is not open, the kernel is not told of changes through the other
            // files.
            (true, false) => FopenFlags::empty(),
        }
    }

    /// Whether a handle reads the disk through the cache, so that a direct write has to drop the
    /// disk's own pages.
    pub(super) fn has_cached_readers(&self, disk: &Disk) -> bool {
        self.mode == CacheMode::Auto && disk.has_cached_readers()
    }

    /// Whether the kernel may hold dirty pages of the disk that this daemon has not seen, unless
    /// the disk is passed through.
    pub(super) fn may_have_dirty_pages(&self, disk: &Disk) -> bool {
        disk.may_be_mapped() || self.mode == CacheMode::Writeback && disk.has_writers()
    }

    /// Drops the pages that the kernel holds of `range` of a disk for any file, after writing dirty
    /// pages back. Only for pool threads.
    pub(super) fn invalidate(&self, disk: &Disk, range: Range<u64>) {
        self.invalidate_except(disk, range, None);
    }

    /// Drops all pages of a disk, after writing dirty pages back. Only for pool threads.
    pub(crate) fn drop_all(&self, disk: &Disk) {
        self.invalidate(disk, WHOLE_DISK);
    }

    /// Drops pages as [`invalidate`](Self::invalidate) does, for all files but `file`.
    pub(super) fn invalidate_others(&self, file: &DiskFile, range: Range<u64>) {
        self.invalidate_except(file.disk(), range, Some(file.ino()));
    }

    fn invalidate_except(&self, disk: &Disk, range: Range<u64>, except: Option<u64>) {
        let Some(notifier) = self.notifier.get() else {
            return;
        };
        for (ino, range) in disk.files_showing(range).filter(|(ino, _)| Some(*ino) != except) {
            // A length of 0 means everything from `start` on.
            let len = i64::try_from(range.end).map_or(0, |end| end - range.start.cast_signed());
            if let Err(error) = notifier.inval_inode(INodeNo(ino), range.start.cast_signed(), len) {
                log::debug!("the kernel's cache is not invalidated: {error}");
            }
        }
    }

    /// Has `reply` answer a change of `range` (bytes of the disk) through `file`, once the kernel
    /// has dropped the pages that it holds of the range for other files.
    pub(super) fn invalidate_then_reply(
        self: &Arc<Self>,
        file: &DiskFile,
        range: Range<u64>,
        reply: impl FnOnce() + Send + 'static,
    ) {
        if !file.is_cached_elsewhere(&range) {
            return reply();
        }
        let (cache, target) = (Arc::clone(self), file.clone());
        file.disk().pools.notify.run(Box::new(move || {
            cache.invalidate_others(&target, range);
            reply();
        }));
    }

    /// Drops all pages that the kernel holds of the disk of `file`, which was truncated to 0 and
    /// kept its size, and has `reply` answer. The kernel itself drops nothing: it sees no new size.
    ///
    /// The kernel writes back the file's dirty pages only after the reply. Clean pages are dropped
    /// at once; while a dirty page is waited for, the reply is sent after [`TRUNCATE_WAIT`].
    pub(super) fn invalidate_truncated(self: &Arc<Self>, file: &DiskFile, reply: impl FnOnce()) {
        self.invalidate_others(file, WHOLE_DISK);
        let (progress, steps) = mpsc::channel();
        let (cache, disk) = (Arc::clone(self), Arc::clone(file.disk()));
        let invalidate = move || {
            let _ = progress.send(());
            cache.invalidate(&disk, WHOLE_DISK);
            // The receiver has timed out when a page was dirty.
            let _ = progress.send(());
        };
        // A thread of its own: all threads of the disk's pool may be in this function, waiting.
        match thread::Builder::new().name("cowslip-drop".to_owned()).spawn(invalidate) {
            Ok(_) => {
                // The time counts from the start of the thread, which may come late on a busy machine.
                let _ = steps.recv();
                let _ = steps.recv_timeout(TRUNCATE_WAIT);
                reply();
            }
            Err(_) => {
                reply();
                self.invalidate(file.disk(), WHOLE_DISK);
            }
        }
    }
}

/// Builds the function by which the control files make the kernel forget a disk that leaves the
/// mount, the pages of a disk whose contents have changed, or the name of a deleted snapshot. For
/// threads that may wait: the kernel drops a name only while nobody looks up names in its directory.
#[must_use]
pub(crate) fn kernel_invalidator(notifier: Notifier) -> Invalidator {
    Arc::new(move |stale: &Invalidation| {
        if let Err(error) = forget(&notifier, stale) {
            log::debug!("{stale:?}: the kernel forgets it by itself: {error}");
        }
    })
}

fn forget(notifier: &Notifier, stale: &Invalidation) -> io::Result<()> {
    match stale {
        Invalidation::Disk { files } => first_error(files.iter().map(|(name, ino)| {
            let file = notifier.inval_entry(INodeNo(ROOT_INO), OsStr::new(name));
            // A process that still refers to the file (O_PATH, a bind mount) keeps its pages, and
            // an overlay that is mounted again has the same inode number.
            file.and(notifier.inval_inode(INodeNo(*ino), 0, 0))
        })),
        Invalidation::Bytes { inos } => {
            first_error(inos.iter().map(|ino| notifier.inval_inode(INodeNo(*ino), 0, 0)))
        }
        Invalidation::Name { parent, name } => {
            notifier.inval_entry(INodeNo(*parent), OsStr::new(name))
        }
    }
}

/// Carries out all of `results`, whatever fails, and returns the first error.
fn first_error(results: impl Iterator<Item = io::Result<()>>) -> io::Result<()> {
    results.fold(Ok(()), io::Result::and)
}

#[cfg(test)]
mod tests {
    use super::super::nodes::testing::{file, mount_of_one_disk};
    use super::*;

    #[test]
    fn only_readers_of_a_whole_disk_use_the_cache_and_pages_are_kept_for_a_disk_without_partitions()
    {
        use HandleAccess::{Read, ReadWrite};
        let (plain, parts) = (mount_of_one_disk(false).0, mount_of_one_disk(true).0);
        let (keep, drop) = (FopenFlags::FOPEN_KEEP_CACHE, FopenFlags::empty());
        let (alone, whole, part) = (file(&plain, "d"), file(&parts, "d"), file(&parts, "d.p1"));
        for (mode, file, access, expected) in [
            (CacheMode::Auto, &alone, Read, keep),
            (CacheMode::Auto, &alone, ReadWrite, DIRECT),
            (CacheMode::Auto, &whole, Read, drop),
            (CacheMode::Auto, &part, Read, DIRECT),
            (CacheMode::None, &alone, Read, DIRECT),
            (CacheMode::Writeback, &alone, ReadWrite, keep),
            (CacheMode::Writeback, &whole, ReadWrite, drop),
            (CacheMode::Writeback, &part, ReadWrite, DIRECT),
        ] {
            assert_eq!(
                PageCache::new(mode).open_flags(file, access),
                expected,
                "{mode:?} {access:?}"
            );
        }
    }
}
