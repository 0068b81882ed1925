//! Writes to disks, allocations in them, and copies between them.
//!
//! A write is done on the worker, in the order of the steps: older dirty pages of other files are
//! dropped, the bytes are written, stale pages are dropped, a synchronous write is made durable,
//! the reply is sent. The first step that would have to wait takes itself and all later ones to a
//! pool of the disk.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use fuser::{Errno, ReplyEmpty, ReplyWrite, WriteFlags};

use super::context::{CowslipFs, FsContext};
use super::page_cache::PageCache;
use super::reply::{Deadline, ErrorReply as _, PoolKind};
use crate::aligned::AlignedBuf;
use crate::disk::{Disk, DiskFile, FallocateMode, SizeMode};
use crate::host::os_error;
use crate::layer::Wait;
use crate::stream::Stream;
use crate::stream::output::Output;

/// The sender of the bytes of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteOrigin {
    /// The client.
    Client,
    /// The kernel's page cache. The bytes are there already, and their page is locked until the
    /// reply, so an invalidation of it would deadlock.
    PageCache,
}

impl WriteOrigin {
    /// Decodes the flags of a request.
    pub(super) fn decode(flags: WriteFlags) -> Self {
        match flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            true => Self::PageCache,
            false => Self::Client,
        }
    }
}

/// A write as the kernel sent it, without its bytes.
#[derive(Clone, Copy)]
pub(super) struct WriteRequest {
    /// Offset in the file, in bytes.
    pub(super) offset: u64,
    pub(super) origin: WriteOrigin,
    /// The write must be durable before the reply (`O_DSYNC`).
    pub(super) sync: bool,
    /// The client's process.
    pub(super) pid: u32,
}

impl CowslipFs {
    /// Writes `data` to `file` and replies.
    pub(super) fn write_file(
        &self,
        file: &DiskFile,
        data: &[u8],
        request: WriteRequest,
        reply: ReplyWrite,
    ) {
        let range = match file.writable_range(request.offset, data.len() as u64) {
            Ok(range) => range,
            Err(error) => return reply.error(error.into()),
        };
        // Shorter than `data` only at the end of a partition.
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX).min(data.len());
        let data = &data[..len];
        let Ok(written) = u32::try_from(len) else {
            return reply.error(Errno::EINVAL);
        };
        let disk = file.disk();
        if let Some(Stream::Output(output)) = disk.stream() {
            let client = (request.origin == WriteOrigin::Client).then_some(request.pid);
            return self.write_stream(disk, output, data, range.start, client, reply);
        }
        let write = DiskWrite {
            offset: range.start,
            len: written,
            has_cached_readers: request.origin == WriteOrigin::Client
                && !file.is_partition()
                && self.page_cache().has_cached_readers(disk),
            origin: request.origin,
            sync: request.sync,
        };
        if let Some(permit) = self.worker_limit.acquire() {
            write.run(&self.shared, file, data, reply);
            disk.prepare_sync(range);
            drop(permit);
            return self.busy_poll.poll_request();
        }
        let (shared, target, data) = (Arc::clone(&self.shared), file.clone(), data.to_vec());
        disk.pools.sync.run(Box::new(move || write.run(&shared, &target, &data, reply)));
    }

    /// Writes `data` to the output stream of `disk` at `offset`, for the thread `client` or for the
    /// kernel's page cache.
    fn write_stream(
        &self,
        disk: &Arc<Disk>,
        output: &Arc<Output>,
        data: &[u8],
        offset: u64,
        client: Option<u32>,
        reply: ReplyWrite,
    ) {
        let written = u32::try_from(data.len()).unwrap_or(u32::MAX);
        let send = Box::new(move |result: io::Result<()>| match result {
            Ok(()) => reply.written(written),
            Err(error) => reply.error(error.into()),
        });
        // The write may wait for the host of a spill file.
        if let Some(permit) = self.worker_limit.acquire() {
            disk.stream_write(output, data, offset, client, send);
            return drop(permit);
        }
        let (disk, data) = (Arc::clone(disk), data.to_vec());
        Arc::clone(&disk.pools.sync).run(Box::new(move || {
            if let Some(Stream::Output(output)) = disk.stream() {
                disk.stream_write(output, &data, offset, client, send);
            }
        }));
    }

    /// Allocates, zeroes or punches `range` of `file`, as fallocate(2) does.
    pub(super) fn allocate(
        &self,
        file: &DiskFile,
        range: Range<u64>,
        (change, size_mode): (FallocateMode, SizeMode),
        reply: ReplyEmpty,
    ) {
        let span = file.span(range.start, range.end - range.start);
        let work =
            move |file: &DiskFile, wait| file.fallocate(range.clone(), change, size_mode, wait);
        self.change_and_invalidate(file, span, reply, work, |reply, ()| reply.ok());
    }

    /// Copies `len` bytes at `start` of `source` to `offset` of `target`, and replies with the number
    /// of bytes copied.
    pub(super) fn copy_file(
        &self,
        source: DiskFile,
        (start, len): (u64, u64),
        target: &DiskFile,
        offset: u64,
        reply: ReplyWrite,
    ) {
        let must_invalidate = self.page_cache().has_cached_readers(target.disk())
            || !target.disk().partition_files().is_empty();
        let (cache, file) = (Arc::clone(self.page_cache()), target.clone());
        let work = move || {
            let range = file.span(offset, len);
            if file.is_dirty_elsewhere(&range) {
                // Older dirty bytes of another file must not be written back after these.
                cache.invalidate_others(&file, range);
            }
            let copied = file.copy_from(&source, (start, len), offset)?;
            let len = copied.end - copied.start;
            if must_invalidate && len > 0 {
                cache.invalidate(file.disk(), copied);
            }
            u32::try_from(len).map_err(|_| os_error(libc::EIO))
        };
        let pool = if must_invalidate { PoolKind::Invalidate } else { PoolKind::Work };
        let deadlines = &self.shared.deadlines;
        deadlines.defer(target.disk(), pool, Deadline::IoTimeout, reply, work, ReplyWrite::written);
    }
}

/// A write to a disk, without its bytes.
#[derive(Clone, Copy)]
struct DiskWrite {
    /// Offset in the disk, in bytes.
    offset: u64,
    /// Number of bytes, which the reply acknowledges.
    len: u32,
    /// A handle reads through the kernel's cache, which must drop the range before the reply.
    has_cached_readers: bool,
    origin: WriteOrigin,
    /// The write must be durable before the reply (`O_DSYNC`).
    sync: bool,
}

impl DiskWrite {
    /// Writes `data` without waiting, or in one of the disk's pools if that would have to wait.
    fn run(self, shared: &Arc<FsContext>, file: &DiskFile, data: &[u8], reply: ReplyWrite) {
        let Self { offset, len: written, origin, sync, .. } = self;
        let range = self.range();
        // Older dirty bytes of another file must not be written back after these.
        let drop_first = origin == WriteOrigin::Client && file.is_dirty_elsewhere(&range);
        let result = match drop_first {
            false => file.disk().write(data, offset, Wait::No),
            true => Err(os_error(libc::EAGAIN)),
        };
        match result {
            Ok(()) if !self.must_invalidate(file) && (!sync || file.disk().is_quick_to_sync()) => {
                let durable = if sync { file.disk().sync() } else { Ok(()) };
                match durable {
                    Ok(()) => reply.written(written),
                    Err(error) => reply.reply_error(error),
                }
                return self.invalidate_after_reply(&shared.page_cache, file);
            }
            Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => {
                return reply.reply_error(error);
            }
            Ok(()) | Err(_) => {}
        }
        let unwritten = result.is_err().then(|| AlignedBuf::copy_of(data));
        let deadline = if sync { Deadline::Unlimited } else { Deadline::IoTimeout };
        let (target, cache) = (file.clone(), Arc::clone(&shared.page_cache));
        let work = move || {
            if drop_first {
                cache.invalidate_others(&target, range);
            }
            if let Some(data) = unwritten {
                target.disk().write(data.as_slice(), offset, Wait::Yes)?;
            }
            self.invalidate(&cache, &target);
            if sync { target.disk().sync() } else { Ok(()) }
        };
        let (target, cache) = (file.clone(), Arc::clone(&shared.page_cache));
        let send = move |reply: ReplyWrite, ()| {
            reply.written(written);
            self.invalidate_after_reply(&cache, &target);
        };
        shared.deadlines.defer(file.disk(), self.pool_kind(file), deadline, reply, work, send);
    }

    /// The range in bytes of the disk.
    fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len.into())
    }

    /// Whether the kernel must drop pages before the reply. Valid only after the write.
    fn must_invalidate(&self, file: &DiskFile) -> bool {
        self.has_cached_readers
            || self.origin == WriteOrigin::Client && file.is_cached_elsewhere(&self.range())
    }

    /// Makes the kernel drop the stale pages of the range.
    fn invalidate(&self, cache: &PageCache, file: &DiskFile) {
        if self.has_cached_readers {
            cache.invalidate(file.disk(), self.range());
        } else if self.must_invalidate(file) {
            cache.invalidate_others(file, self.range());
        }
    }

    /// Makes the kernel drop the other files' pages of a range that it wrote back, after the reply.
    fn invalidate_after_reply(&self, cache: &Arc<PageCache>, file: &DiskFile) {
        if self.origin == WriteOrigin::PageCache {
            cache.invalidate_then_reply(file, self.range(), || ());
        }
    }

    /// The pool that does the part of the write that has to wait.
    fn pool_kind(&self, file: &DiskFile) -> PoolKind {
        let may_invalidate =
            self.origin == WriteOrigin::Client && !file.disk().partition_files().is_empty();
        match (self.has_cached_readers || may_invalidate, self.sync) {
            (true, _) => PoolKind::Invalidate,
            (false, true) => PoolKind::Sync,
            (false, false) => PoolKind::Work,
        }
    }
}
