//! The tail of what programs write to stderr.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;
use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::stop::Stop;
use crate::host;

/// The number of bytes kept from the end.
const TAIL_LEN: usize = 4096;

/// The longest line shown, in characters: an error is one line.
const MAX_LINE_CHARS: usize = 300;

/// The most reads of 4 KiB that `last_line` performs: the content of a full pipe. A program that
/// never stops writing must not block the caller.
const MAX_READS: usize = 16;

/// The stderr of a pipeline, or of another program. A thread drains the pipe, so that the programs never wait for us;
/// dropping this value joins the thread, even while other processes hold the other end.
#[derive(Debug)]
pub(crate) struct StderrTail {
    shared: Arc<StderrPipe>,
    stop: Stop,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct StderrPipe {
    fd: OwnedFd,
    tail: Mutex<VecDeque<u8>>,
}

impl StderrTail {
    /// Creates a pipe; returns it and the write end for the programs.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (fd, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        let fd = host::set_nonblocking(fd)?;
        let shared =
            Arc::new(StderrPipe { fd, tail: Mutex::new(VecDeque::with_capacity(TAIL_LEN)) });
        let stop = Stop::new()?;
        let (ours, until) = (Arc::clone(&shared), stop.clone());
        let reader = thread::Builder::new()
            .name("cowslip-stderr".to_owned())
            .spawn(move || ours.drain_until(&until))?;
        Ok((Self { shared, stop, reader: Some(reader) }, theirs))
    }

    /// Returns the last non-empty line, with control characters escaped. The content of the pipe is
    /// read first, so after a program has ended, all its output has been seen.
    pub(crate) fn last_line(&self) -> Option<String> {
        let mut tail = self.shared.tail.lock();
        for _ in 0..MAX_READS {
            if !matches!(self.shared.read_once(&mut tail), Ok(1..)) {
                break;
            }
        }
        let text = String::from_utf8_lossy(tail.make_contiguous());
        // A progress bar ends its lines with a carriage return.
        let line = text.split(['\n', '\r']).map(str::trim).rfind(|line| !line.is_empty())?;
        let mut shown = String::new();
        for c in line.chars().take(MAX_LINE_CHARS) {
            match c.is_control() {
                true => shown.extend(c.escape_default()),
                false => shown.push(c),
            }
        }
        Some(shown)
    }
}

impl Drop for StderrTail {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

impl StderrPipe {
    /// Drains the pipe until its other end is closed everywhere, or until stopped.
    fn drain_until(&self, stop: &Stop) {
        while stop.wait_for(self.fd.as_fd(), PollFlags::IN, None).is_ok() {
            match self.read_once(&mut self.tail.lock()) {
                // `last_line` has read the bytes first.
                Ok(1..) | Err(Errno::AGAIN) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Reads once. The caller holds the lock, so that the bytes keep their order.
    fn read_once(&self, tail: &mut VecDeque<u8>) -> Result<usize, Errno> {
        let mut buf = [0; TAIL_LEN];
        let got = rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut buf))?;
        tail.drain(..(tail.len() + got).saturating_sub(TAIL_LEN));
        tail.extend(&buf[..got]);
        Ok(got)
    }
}
