//! Cache coherence when one disk is shown by several files: the pages that the kernel holds of each
//! file stay valid.
//!
//! ```text
//!   write through disk.img.p1 ──▶ the disk's bytes ──▶ pages of disk.img that show them: dropped
//!   write through disk.img    ──▶ the disk's bytes ──▶ pages of its partitions: dropped
//!                                                  then the reply
//! ```
//!
//! The file that a change came through needs nothing: the kernel keeps its pages valid itself. A
//! write that comes from the kernel's cache is answered first, since its page is locked until the
//! reply, and two such pages of two files would wait for each other.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use fuser::{INodeNo, ReplyEntry};

use super::attr::{self, ATTR_TTL, NO_TTL};
use super::reply::{Deadline, ErrorReply, PoolKind};
use super::{CowslipFs, FsContext};
use crate::disk::{self, Disk, DiskFile};
use crate::host::os_error;
use crate::layer::Wait;

/// How long the reply to a truncation waits for pages to be dropped: dirty pages, in turn, wait for
/// the reply.
const TRUNCATE_WAIT: Duration = Duration::from_secs(1);

/// The range of all bytes of a disk.
pub(super) const WHOLE_DISK: Range<u64> = 0..u64::MAX;

/// How long the kernel may cache the attributes of a file. It does not see every change of a file
/// whose bytes are shown by other files as well.
pub(super) fn attr_ttl(file: &DiskFile) -> Duration {
    if file.disk().partition_files().is_empty() { ATTR_TTL } else { NO_TTL }
}

/// A lookup counted for a reply that is yet to be sent. Dropping the guard takes the lookup back.
struct LookupGuard {
    shared: Arc<FsContext>,
    disk: Option<Arc<Disk>>,
}

impl LookupGuard {
    /// Keeps the lookup counted, because the reply is being sent.
    fn disarm(mut self) {
        self.disk = None;
    }
}

impl Drop for LookupGuard {
    fn drop(&mut self) {
        if let Some(disk) = &self.disk {
            CowslipFs::forget_lookups(&self.shared, disk, 1);
        }
    }
}

impl CowslipFs {
    /// Returns the file with inode number `ino`; `ESTALE` when it has left the mount, so that the
    /// kernel looks the name up again.
    pub(super) fn file_by_ino(&self, ino: INodeNo) -> io::Result<DiskFile> {
        self.catalog().file_by_ino(ino.0).ok_or_else(|| os_error(libc::ESTALE))
    }

    /// Answers a lookup of a name with `file`. For a whole disk the lookup has been
    /// [counted](Disk::add_lookup) already.
    pub(super) fn reply_entry(&self, file: &DiskFile, reply: ReplyEntry) {
        let (ino, ttl, there) = (file.ino(), attr_ttl(file), file.clone());
        let disk = (!file.is_partition()).then(|| Arc::clone(file.disk()));
        let lookup = LookupGuard { shared: Arc::clone(&self.shared), disk };
        let work = move |_: &Disk, wait| there.attributes(wait);
        self.query_or_defer(file.disk(), reply, work, move |reply, found: disk::Attributes| {
            lookup.disarm();
            reply.entry(&ttl, &attr::of_disk(ino, &found), fuser::Generation(0));
        });
    }

    /// Drops the pages that the kernel holds of `range` of a disk for any file, after writing dirty
    /// pages back. Only for pool threads.
    pub(super) fn invalidate(shared: &FsContext, disk: &Disk, range: Range<u64>) {
        Self::invalidate_except(shared, disk, range, None);
    }

    /// Drops pages as [`invalidate`](Self::invalidate) does, for all files but `file`.
    pub(super) fn invalidate_others(shared: &FsContext, file: &DiskFile, range: Range<u64>) {
        Self::invalidate_except(shared, file.disk(), range, Some(file.ino()));
    }

    /// Drops the pages that the kernel holds of the file `file`, which is being truncated, and has
    /// `reply` send the reply.
    ///
    /// The kernel writes back the file's dirty pages only after the reply. Clean pages are dropped
    /// at once; while a dirty page is waited for, the reply is sent after [`TRUNCATE_WAIT`].
    pub(super) fn invalidate_truncated(
        shared: &Arc<FsContext>,
        file: &DiskFile,
        reply: impl FnOnce(),
    ) {
        let (dropped, is_dropped) = mpsc::channel();
        let (there, target) = (Arc::clone(shared), file.clone());
        let invalidate = move || {
            Self::invalidate(&there, target.disk(), WHOLE_DISK);
            // The receiver has timed out when a page was dirty.
            let _ = dropped.send(());
        };
        // A thread of its own: all threads of the disk's pool may be in this function, waiting.
        match thread::Builder::new().name("cowslip-drop".to_owned()).spawn(invalidate) {
            Ok(_) => {
                let _ = is_dropped.recv_timeout(TRUNCATE_WAIT);
                reply();
            }
            Err(_) => {
                reply();
                Self::invalidate(shared, file.disk(), WHOLE_DISK);
            }
        }
    }

    fn invalidate_except(shared: &FsContext, disk: &Disk, range: Range<u64>, except: Option<u64>) {
        let Some(notifier) = shared.notifier.get() else {
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

    /// Sends the reply about a change of `range` (bytes of the disk) through `file`, once the
    /// kernel has dropped the pages that it holds of the range for other files.
    pub(super) fn invalidate_then_reply(
        shared: &Arc<FsContext>,
        file: &DiskFile,
        range: Range<u64>,
        reply: impl FnOnce() + Send + 'static,
    ) {
        if !file.is_cached_elsewhere(&range) {
            return reply();
        }
        let (shared, there) = (Arc::clone(shared), file.clone());
        file.disk().pools.notify.run(Box::new(move || {
            Self::invalidate_others(&shared, &there, range);
            reply();
        }));
    }

    /// Changes `range` (bytes of the disk) through `file` as
    /// [`change_or_defer`](Self::change_or_defer) does. Before the reply the kernel drops the pages
    /// that it holds of the range for other files.
    pub(super) fn change_and_invalidate<R: ErrorReply, T: Send + 'static>(
        &self,
        file: &DiskFile,
        range: Range<u64>,
        reply: R,
        work: impl Fn(&DiskFile, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let (shared, there) = (Arc::clone(&self.shared), file.clone());
        let (early, target) = (Arc::clone(&self.shared), file.clone());
        let told = range.clone();
        let send = move |reply: R, value: T| {
            Self::invalidate_then_reply(&shared, &there, told, move || send(reply, value));
        };
        if !file.is_dirty_elsewhere(&range) {
            let work = move |_: &Disk, wait| work(&target, wait);
            return self.change_or_defer(file.disk(), reply, work, send);
        }
        // Older dirty bytes of the other files must not be written back after the change.
        let work = move || {
            Self::invalidate_others(&early, &target, range);
            work(&target, Wait::Yes)
        };
        let deadlines = &self.shared.deadlines;
        deadlines.defer(file.disk(), PoolKind::Invalidate, Deadline::IoTimeout, reply, work, send);
    }
}
