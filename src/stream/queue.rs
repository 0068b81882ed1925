//! A queue of writes that wait for a stalled sink. No thread waits with them: the thread that makes
//! room carries them out in order and replies.
//!
//! The memory for their data is bounded, too: many writers, or one with many requests in flight,
//! are queued in an unlinked file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::PathBuf;

use crate::host;
use crate::layer::Wait;
use crate::stream::parked::ParkPermit;

/// The most bytes of memory for waiting writes: 1 MiB, one request of the largest size.
const MEMORY_LIMIT: usize = 1 << 20;

/// Where a write comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteSource {
    /// A thread that waits for the reply; 0 if unknown.
    Client(u32),
    /// The kernel's page cache: whoever changed the bytes may never learn of an error.
    PageCache,
}

/// A callback that answers a write.
pub(super) type WriteReply = Box<dyn FnOnce(io::Result<()>) + Send>;

enum QueuedBytes {
    Memory(Vec<u8>),
    /// Data in the file, at this offset.
    File(u64),
}

/// A waiting write.
pub(super) struct QueuedWrite {
    pub(super) offset: u64,
    pub(super) len: usize,
    bytes: QueuedBytes,
    /// With the process, instead of the thread, that waits for the reply.
    pub(super) source: WriteSource,
    pub(super) reply: WriteReply,
    /// Missing if the write must not be refused and too many waited.
    _permit: Option<ParkPermit>,
}

/// The waiting writes, oldest first.
pub(super) struct WriteQueue {
    writes: VecDeque<QueuedWrite>,
    memory_used: usize,
    dir: PathBuf,
    file: Option<File>,
    /// The end of the used part of the file.
    file_end: u64,
}

impl WriteQueue {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { writes: VecDeque::new(), memory_used: 0, dir, file: None, file_end: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.writes.is_empty()
    }

    /// Returns the number of waiting writes.
    pub(super) fn len(&self) -> usize {
        self.writes.len()
    }

    /// Appends a write to the queue.
    pub(super) fn push(
        &mut self,
        permit: Option<ParkPermit>,
        offset: u64,
        buf: &[u8],
        source: WriteSource,
        reply: WriteReply,
    ) {
        let len = buf.len();
        let filed =
            if self.memory_used + len > MEMORY_LIMIT { self.write_to_file(buf) } else { None };
        let bytes = match filed {
            Some(at) => QueuedBytes::File(at),
            // Also if the host has no room for a file: the data has to be somewhere.
            None => {
                self.memory_used += len;
                QueuedBytes::Memory(buf.to_vec())
            }
        };
        // Resolved now, while the calling thread still exists.
        let source = match source {
            WriteSource::Client(thread) if thread != 0 => {
                WriteSource::Client(host::process_of_thread(thread))
            }
            source => source,
        };
        self.writes.push_back(QueuedWrite { offset, len, bytes, source, reply, _permit: permit });
    }

    fn write_to_file(&mut self, buf: &[u8]) -> Option<u64> {
        if self.file.is_none() {
            self.file = tempfile::tempfile_in(&self.dir).ok();
        }
        let at = self.file_end;
        host::write_all_at(self.file.as_ref()?, &[IoSlice::new(buf)], at).ok()?;
        self.file_end += buf.len() as u64;
        Some(at)
    }

    /// Returns the offset, the source and the data of the oldest write.
    pub(super) fn first(&self) -> Option<(u64, WriteSource, io::Result<Vec<u8>>)> {
        let first = self.writes.front()?;
        Some((first.offset, first.source, self.bytes_of(first)))
    }

    fn bytes_of(&self, waiting: &QueuedWrite) -> io::Result<Vec<u8>> {
        match &waiting.bytes {
            QueuedBytes::Memory(bytes) => Ok(bytes.clone()),
            QueuedBytes::File(at) => {
                let file = self.file.as_ref().ok_or_else(|| host::os_error(libc::EIO))?;
                let mut bytes = vec![0; waiting.len];
                match host::read_at(file, &mut bytes, *at, Wait::Yes)? {
                    got if got == waiting.len => Ok(bytes),
                    _ => Err(host::os_error(libc::EIO)),
                }
            }
        }
    }

    /// Returns the length of the oldest write in bytes.
    pub(super) fn first_len(&self) -> Option<usize> {
        self.writes.front().map(|first| first.len)
    }

    /// Removes the oldest write.
    pub(super) fn pop(&mut self) -> Option<QueuedWrite> {
        let first = self.writes.pop_front();
        if let Some(first) = &first {
            self.release_space(first);
        }
        first
    }

    /// Frees the space of `removed`, which is not in the queue any more.
    fn release_space(&mut self, removed: &QueuedWrite) {
        if matches!(removed.bytes, QueuedBytes::Memory(_)) {
            self.memory_used -= removed.len;
        }
        if self.writes.is_empty() {
            // An empty file is dropped, which frees its space.
            self.file_end = 0;
            self.file = None;
        }
    }

    /// Removes the writes of the clients for which `is_killed` returns true.
    pub(super) fn take_killed(&mut self, is_killed: impl Fn(u32) -> bool) -> Vec<QueuedWrite> {
        let (killed, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.writes)
            .into_iter()
            .partition(|waiting| match waiting.source {
                WriteSource::Client(process) => process != 0 && is_killed(process),
                WriteSource::PageCache => false,
            });
        self.writes = rest.into();
        killed.iter().for_each(|waiting| self.release_space(waiting));
        killed
    }

    /// Removes all writes.
    pub(super) fn take_all(&mut self) -> Vec<QueuedWrite> {
        self.memory_used = 0;
        self.file_end = 0;
        self.file = None;
        self.writes.drain(..).collect()
    }
}
