//! Reads of disks, and seeks for data and holes.

use std::cell::RefCell;
use std::io;
use std::sync::Arc;

use fuser::{ReplyData, ReplyLseek};

use super::context::CowslipFs;
use super::page_cache::WHOLE_DISK;
use super::reply::{Deadline, ErrorReply as _, PoolKind, RepeatOn, would_block};
use crate::aligned::AlignedBuf;
use crate::arrival::Arrival;
use crate::disk::{Disk, DiskFile, Whence};
use crate::layer::Wait;
use crate::stream::Stream;

/// The longest read, in bytes, that the thread answers which has brought the bytes from a server.
const MAX_COPY_AT_ARRIVAL: usize = 32 << 10;

thread_local! {
    /// Per-thread read buffer of workers and pool threads, reused across requests. Aligned, so that
    /// reads past the host's page cache (`O_DIRECT`) need no copy.
    static READ_BUFFER: RefCell<AlignedBuf> = const { RefCell::new(AlignedBuf::new()) };
}

impl CowslipFs {
    /// Reads up to `len` bytes of `file` at `offset` for the process `pid`, and replies with them.
    pub(super) fn read_file(
        &self,
        file: &DiskFile,
        offset: u64,
        len: usize,
        pid: u32,
        reply: ReplyData,
    ) {
        let disk = file.disk();
        if let Some(Stream::Input { input, .. }) = disk.stream() {
            let send = move |result: io::Result<Vec<u8>>| match result {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(error.into()),
            };
            return input.read(offset, len, pid, Box::new(send));
        }
        Arrival::forget_expected();
        let unanswered = READ_BUFFER.with_borrow_mut(|buffer| {
            let buffer = buffer.prepare(len);
            let result = file.read(buffer, offset, Wait::No);
            if would_block(&result) {
                return Some(reply);
            }
            match result {
                Ok(got) => reply.data(&buffer[..got]),
                Err(error) => reply.reply_error(error),
            }
            None
        });
        let Some(reply) = unanswered else { return self.busy_poll.poll_request() };
        let target = file.clone();
        let work = move |wait| {
            // The thread's own buffer, kept for as long as the thread lives: new memory costs as
            // much as the copy.
            let mut buffer = READ_BUFFER.take();
            match target.read(buffer.prepare(len), offset, wait) {
                Ok(got) => Ok((buffer, got)),
                Err(error) => {
                    READ_BUFFER.set(buffer);
                    Err(error)
                }
            }
        };
        let send = |reply: ReplyData, (buffer, got): (AlignedBuf, usize)| {
            reply.data(&buffer.as_slice()[..got]);
            READ_BUFFER.set(buffer);
        };
        // A long copy, or a host that takes no bytes, would hold up what arrives after it.
        let is_short = len <= MAX_COPY_AT_ARRIVAL && !disk.copies_on_read();
        let repeat_on = if is_short { RepeatOn::Arrival } else { RepeatOn::Pool };
        self.shared.deadlines.repeat(disk, reply, repeat_on, work, send);
    }

    /// Replies with the offset of the next data or hole of `file` from `offset` on.
    pub(super) fn seek_file(&self, file: DiskFile, offset: u64, whence: Whence, reply: ReplyLseek) {
        let disk = Arc::clone(file.disk());
        let send = |reply: ReplyLseek, found: u64| reply.offset(found.cast_signed());
        if self.may_have_dirty_pages(&disk) {
            // Pages written through a mapping have not reached this daemon yet.
            let cache = Arc::clone(self.page_cache());
            let work = move || {
                cache.invalidate(file.disk(), WHOLE_DISK);
                file.seek(offset, whence, Wait::Yes)
            };
            let (deadlines, pool) = (&self.shared.deadlines, PoolKind::Invalidate);
            return deadlines.defer(&disk, pool, Deadline::IoTimeout, reply, work, send);
        }
        let work = move |_: &Disk, wait| file.seek(offset, whence, wait);
        self.query_or_defer(&disk, reply, work, send);
        self.busy_poll.poll_request();
    }

    /// Whether the kernel may hold dirty pages of the disk that this daemon has not seen.
    fn may_have_dirty_pages(&self, disk: &Disk) -> bool {
        self.page_cache().may_have_dirty_pages(disk) && !self.passthrough.is_active(disk.ino())
    }
}
