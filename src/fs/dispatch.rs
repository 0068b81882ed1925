//! The thread that does the work of a request: the worker that received it, where nothing has to be
//! waited for, or one of a pool.
//!
//! ```text
//!   query    worker, Wait::No  --EAGAIN-->  the disk's pools.io, Wait::Yes; for bytes that are on
//!                                           their way from a server: once they have arrived, Wait::No
//!   change   the same, with a permit; without one a thread of pools.sync takes the worker's part
//!   sync     worker, with the only permit and few blocks to write; else pools.sync
//!   names    the mount's pool; a directory is listed by the worker, unless it may wait for the host
//! ```

use std::io;
use std::ops::Range;
use std::sync::Arc;

use fuser::ReplyEmpty;

use super::context::{CowslipFs, FsContext};
use super::reply::{Deadline, ErrorReply, PoolKind, RepeatOn, would_block};
use crate::arrival::Arrival;
use crate::disk::{Disk, DiskFile};
use crate::layer::Wait;

/// Runs `work` without waiting, or in the disk's pool if it would have to wait.
fn try_or_defer<R: ErrorReply, T: 'static>(
    shared: &FsContext,
    disk: &Arc<Disk>,
    reply: R,
    work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
    send: impl FnOnce(R, T) + Send + 'static,
) {
    Arrival::forget_expected();
    let result = work(disk, Wait::No);
    if would_block(&result) {
        let target = Arc::clone(disk);
        return shared.deadlines.repeat(
            disk,
            reply,
            RepeatOn::Pool,
            move |wait| work(&target, wait),
            send,
        );
    }
    match result {
        Ok(value) => send(reply, value),
        Err(error) => reply.reply_error(error),
    }
}

impl CowslipFs {
    /// Answers a query: here if that needs no waiting, else in the disk's pool.
    pub(super) fn query_or_defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        reply: R,
        work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        try_or_defer(&self.shared, disk, reply, work, send);
    }

    /// Makes a change as [`query_or_defer`](Self::query_or_defer) answers a query. The last free
    /// worker leaves even the attempt to a pool thread that waits for no base.
    fn change_or_defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        reply: R,
        work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        if let Some(_permit) = self.worker_limit.acquire() {
            return try_or_defer(&self.shared, disk, reply, work, send);
        }
        let (shared, target) = (Arc::clone(&self.shared), Arc::clone(disk));
        disk.pools.sync.run(Box::new(move || try_or_defer(&shared, &target, reply, work, send)));
    }

    /// Changes `range` (bytes of the disk) through `file` as
    /// [`change_or_defer`](Self::change_or_defer) does. The kernel drops the pages that it holds of
    /// the range for other files: dirty ones before the change, all of them before the reply.
    pub(super) fn change_and_invalidate<R: ErrorReply, T: Send + 'static>(
        &self,
        file: &DiskFile,
        range: Range<u64>,
        reply: R,
        work: impl Fn(&DiskFile, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let (cache, changed, changed_range) =
            (Arc::clone(self.page_cache()), file.clone(), range.clone());
        let send = move |reply: R, value: T| {
            cache.invalidate_then_reply(&changed, changed_range, move || send(reply, value));
        };
        let target = file.clone();
        if !file.is_dirty_elsewhere(&range) {
            let work = move |_: &Disk, wait| work(&target, wait);
            return self.change_or_defer(file.disk(), reply, work, send);
        }
        // Older dirty bytes of the other files must not be written back after the change.
        let cache = Arc::clone(self.page_cache());
        let work = move || {
            cache.invalidate_others(&target, range);
            work(&target, Wait::Yes)
        };
        let deadlines = &self.shared.deadlines;
        deadlines.defer(file.disk(), PoolKind::Invalidate, Deadline::IoTimeout, reply, work, send);
    }

    /// Runs `work` in one of the disk's pools, without a deadline.
    pub(super) fn defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        pool: PoolKind,
        reply: R,
        work: impl FnOnce(&Disk) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let target = Arc::clone(disk);
        let work = move || work(&target);
        self.shared.deadlines.defer(disk, pool, Deadline::Unlimited, reply, work, send);
    }

    /// Syncs on the worker, for an fsync that takes as long as the device needs for a few blocks:
    /// handing the sync to another thread would cost as much. Only one worker syncs at a time;
    /// requests that arrive meanwhile share the next sync.
    pub(super) fn sync_now(&self, disk: &Arc<Disk>, reply: ReplyEmpty) {
        let Some(permit) = self.worker_limit.try_acquire_first() else {
            return self.defer_sync(disk, reply);
        };
        match disk.sync() {
            Ok(()) => reply.ok(),
            Err(error) => reply.reply_error(error),
        }
        drop(permit);
        self.busy_poll.poll_request();
    }

    /// Syncs in the pool for syncs, which may take its time.
    pub(super) fn defer_sync(&self, disk: &Arc<Disk>, reply: ReplyEmpty) {
        self.defer(disk, PoolKind::Sync, reply, Disk::sync, |reply, ()| reply.ok());
    }

    /// Answers a request that belongs to no disk in the mount's own pool.
    pub(super) fn run_on_mount_pool<R: ErrorReply, T: 'static>(
        &self,
        reply: R,
        work: impl FnOnce(&FsContext) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let shared = Arc::clone(&self.shared);
        self.shared.pool.run(Box::new(move || match work(&shared) {
            Ok(value) => send(reply, value),
            Err(error) => reply.reply_error(error),
        }));
    }
}
