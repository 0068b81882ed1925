//! Writes that wait for a stalled sink. No thread waits with them: whoever makes room carries
//! them out, in their order, and answers.
//!
//! Their bytes are bounded in memory, too: many writers, or one with many requests on their way,
//! wait in an unlinked file.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice};
use std::path::PathBuf;

use crate::host;
use crate::layer::Wait;

/// Bytes of memory that waiting writes take at most: one of the largest requests.
const MEMORY: usize = 1 << 20;

/// Answers a write.
pub(super) type Reply = Box<dyn FnOnce(io::Result<()>) + Send>;

enum Bytes {
    Memory(Vec<u8>),
    /// In the file, from this offset.
    Filed(u64),
}

/// A write that waits.
pub(super) struct Waiting {
    pub(super) offset: u64,
    len: usize,
    bytes: Bytes,
    /// The process that waits for it; 0: not known.
    client: u32,
    pub(super) reply: Reply,
}

/// The writes that wait, oldest first.
pub(super) struct Queue {
    waiting: VecDeque<Waiting>,
    memory: usize,
    dir: PathBuf,
    file: Option<File>,
    /// Where the file is free.
    end: u64,
}

impl Queue {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { waiting: VecDeque::new(), memory: 0, dir, file: None, end: 0 }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Puts a write at the end.
    pub(super) fn push(&mut self, offset: u64, buf: &[u8], client: u32, reply: Reply) {
        let len = buf.len();
        let filed = if self.memory + len > MEMORY { self.put_aside(buf) } else { None };
        let bytes = match filed {
            Some(at) => Bytes::Filed(at),
            // Also when the host has no room for a file: it has to be somewhere.
            None => {
                self.memory += len;
                Bytes::Memory(buf.to_vec())
            }
        };
        // Now, while the thread that asks is there.
        let client = if client == 0 { 0 } else { host::process_of(client) };
        self.waiting.push_back(Waiting { offset, len, bytes, client, reply });
    }

    fn put_aside(&mut self, buf: &[u8]) -> Option<u64> {
        if self.file.is_none() {
            self.file = tempfile::tempfile_in(&self.dir).ok();
        }
        let at = self.end;
        host::write_all_at(self.file.as_ref()?, &[IoSlice::new(buf)], at).ok()?;
        self.end += buf.len() as u64;
        Some(at)
    }

    /// The oldest: where it writes, and its bytes.
    pub(super) fn first(&self) -> Option<(u64, io::Result<Vec<u8>>)> {
        let first = self.waiting.front()?;
        Some((first.offset, self.bytes_of(first)))
    }

    fn bytes_of(&self, waiting: &Waiting) -> io::Result<Vec<u8>> {
        match &waiting.bytes {
            Bytes::Memory(bytes) => Ok(bytes.clone()),
            Bytes::Filed(at) => {
                let file = self.file.as_ref().ok_or_else(|| host::errno(libc::EIO))?;
                let mut bytes = vec![0; waiting.len];
                match host::read_at(file, &mut bytes, *at, Wait::Yes)? {
                    got if got == waiting.len => Ok(bytes),
                    _ => Err(host::errno(libc::EIO)),
                }
            }
        }
    }

    /// How long the oldest is, in bytes.
    pub(super) fn first_len(&self) -> Option<usize> {
        self.waiting.front().map(|first| first.len)
    }

    /// Takes the oldest out.
    pub(super) fn pop(&mut self) -> Option<Waiting> {
        let first = self.waiting.pop_front();
        if let Some(first) = &first {
            self.forget(first.len, &matches!(first.bytes, Bytes::Memory(_)));
        }
        first
    }

    fn forget(&mut self, len: usize, in_memory: &bool) {
        if *in_memory {
            self.memory -= len;
        }
        if self.waiting.is_empty() {
            // With nothing in it the file begins again; its room goes with it.
            self.end = 0;
            self.file = None;
        }
    }

    /// Takes out the writes whose clients `is_killed` says are being killed.
    pub(super) fn take_killed(&mut self, is_killed: impl Fn(u32) -> bool) -> Vec<Reply> {
        let (killed, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.waiting)
            .into_iter()
            .partition(|waiting| waiting.client != 0 && is_killed(waiting.client));
        self.waiting = rest.into();
        let mut replies = Vec::with_capacity(killed.len());
        for waiting in killed {
            self.forget(waiting.len, &matches!(waiting.bytes, Bytes::Memory(_)));
            replies.push(waiting.reply);
        }
        replies
    }

    /// Takes all of them out.
    pub(super) fn take_all(&mut self) -> Vec<Reply> {
        self.memory = 0;
        self.end = 0;
        self.file = None;
        self.waiting.drain(..).map(|waiting| waiting.reply).collect()
    }
}
