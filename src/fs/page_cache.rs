//! One disk behind several files: what the kernel keeps of each of them stays right.
//!
//! ```text
//!   write through disk.img.p1 ──▶ the disk's bytes ──▶ pages of disk.img that show them: dropped
//!   write through disk.img    ──▶ the disk's bytes ──▶ pages of its windows: dropped
//!                                                  then the answer
//! ```
//!
//! The file that a change came through needs nothing: the kernel looks after its pages by itself.
//! A write that comes from its cache is answered first, since its page is locked until then, and
//! two such pages of two files would wait for each other.

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

/// How long the answer of a truncation waits for pages to be dropped: dirty ones wait for it.
const TRUNCATE_WAIT: Duration = Duration::from_secs(1);

/// All bytes of a disk.
pub(super) const WHOLE_DISK: Range<u64> = 0..u64::MAX;

/// How long the kernel may believe what it was told of a file. Of one of several that show the same
/// bytes it does not see every change.
pub(super) fn attr_ttl(shown: &DiskFile) -> Duration {
    if shown.disk().partition_files().is_empty() { ATTR_TTL } else { NO_TTL }
}

/// A disk that the kernel is about to be led to, and is not when this is dropped with it.
struct LookupGuard {
    shared: Arc<FsContext>,
    disk: Option<Arc<Disk>>,
}

impl LookupGuard {
    /// The answer goes out that leads there.
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
    /// What the file `ino` shows. `ESTALE` when that is gone: the kernel looks the name up again.
    pub(super) fn file_by_ino(&self, ino: INodeNo) -> io::Result<DiskFile> {
        self.catalog().file_by_ino(ino.0).ok_or_else(|| os_error(libc::ESTALE))
    }

    /// Answers a look-up of a name that leads to `file_by_ino`; a whole disk is
    /// [referred to](Disk::refer) for that.
    pub(super) fn reply_entry(&self, shown: &DiskFile, reply: ReplyEntry) {
        let (ino, ttl, there) = (shown.ino(), attr_ttl(shown), shown.clone());
        let disk = (!shown.is_partition()).then(|| Arc::clone(shown.disk()));
        let led = LookupGuard { shared: Arc::clone(&self.shared), disk };
        let work = move |_: &Disk, wait| there.attributes(wait);
        self.query_or_defer(shown.disk(), reply, work, move |reply, found: disk::Attributes| {
            led.disarm();
            reply.entry(&ttl, &attr::of_disk(ino, &found), fuser::Generation(0));
        });
    }

    /// Drops what the kernel has cached of `range` of a disk, through whichever file, writing dirty
    /// pages back first. Only from a pool thread.
    pub(super) fn invalidate(shared: &FsContext, disk: &Disk, range: Range<u64>) {
        Self::invalidate_except(shared, disk, range, None);
    }

    /// As [`invalidate`](Self::invalidate), for all files but the one that `file_by_ino` is.
    pub(super) fn invalidate_others(shared: &FsContext, shown: &DiskFile, range: Range<u64>) {
        Self::invalidate_except(shared, shown.disk(), range, Some(shown.ino()));
    }

    /// Drops what the kernel has cached of the file `file_by_ino`, which is being truncated, and has
    /// `answer` say that it is.
    ///
    /// Only with the answer does the kernel write back what is dirty of the file. What is clean goes
    /// at once; while a dirty page is waited for, the answer goes out after [`TRUNCATE_WAIT`].
    pub(super) fn invalidate_truncated(
        shared: &Arc<FsContext>,
        shown: &DiskFile,
        answer: impl FnOnce(),
    ) {
        let (tell, told) = mpsc::channel();
        let (there, target) = (Arc::clone(shared), shown.clone());
        let invalidate = move || {
            Self::invalidate(&there, target.disk(), WHOLE_DISK);
            // Nobody listens any more when a page was dirty.
            let _ = tell.send(());
        };
        // A thread of its own: those of the disk may all be here, waiting for it.
        match thread::Builder::new().name("cowslip-drop".to_owned()).spawn(invalidate) {
            Ok(_) => {
                let _ = told.recv_timeout(TRUNCATE_WAIT);
                answer();
            }
            Err(_) => {
                answer();
                Self::invalidate(shared, shown.disk(), WHOLE_DISK);
            }
        }
    }

    fn invalidate_except(shared: &FsContext, disk: &Disk, range: Range<u64>, except: Option<u64>) {
        let Some(notifier) = shared.notifier.get() else {
            return;
        };
        for (ino, range) in disk.files_showing(range).filter(|(ino, _)| Some(*ino) != except) {
            // No length stands for all that follows.
            let len = i64::try_from(range.end).map_or(0, |end| end - range.start.cast_signed());
            if let Err(error) = notifier.inval_inode(INodeNo(ino), range.start.cast_signed(), len) {
                log::debug!("the kernel's cache is not invalidated: {error}");
            }
        }
    }

    /// Gives an answer about a change of `range` (bytes of the disk) through `file_by_ino`, once the
    /// kernel has dropped what it holds of that for other files.
    pub(super) fn invalidate_then_reply(
        shared: &Arc<FsContext>,
        shown: &DiskFile,
        range: Range<u64>,
        answer: impl FnOnce() + Send + 'static,
    ) {
        if !shown.is_cached_elsewhere(&range) {
            return answer();
        }
        let (shared, there) = (Arc::clone(shared), shown.clone());
        shown.disk().notify_pool().run(Box::new(move || {
            Self::invalidate_others(&shared, &there, range);
            answer();
        }));
    }

    /// Carries out a change of `range` (bytes of the disk) through `file_by_ino`, as
    /// [`change_or_defer`](Self::change_or_defer) does, and has the kernel drop what it
    /// holds of that for other files before it is answered.
    pub(super) fn change_and_invalidate<R: ErrorReply, T: Send + 'static>(
        &self,
        shown: &DiskFile,
        range: Range<u64>,
        reply: R,
        work: impl Fn(&DiskFile, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let (shared, there) = (Arc::clone(&self.shared), shown.clone());
        let (early, target) = (Arc::clone(&self.shared), shown.clone());
        let told = range.clone();
        let send = move |reply: R, value: T| {
            Self::invalidate_then_reply(&shared, &there, told, move || send(reply, value));
        };
        if !shown.is_dirty_elsewhere(&range) {
            let work = move |_: &Disk, wait| work(&target, wait);
            return self.change_or_defer(shown.disk(), reply, work, send);
        }
        // Older bytes of theirs must not come after the change.
        let work = move || {
            Self::invalidate_others(&early, &target, range);
            work(&target, Wait::Yes)
        };
        let deadlines = &self.shared.deadlines;
        deadlines.defer(shown.disk(), PoolKind::Invalidate, Deadline::IoTimeout, reply, work, send);
    }
}
