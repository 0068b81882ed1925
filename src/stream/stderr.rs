//! The last words of a pipe of programs.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;
use rustix::event::PollFlags;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::stop::Stop;

/// How many of the last bytes are kept.
const TAIL_LEN: usize = 4096;

/// The longest line shown, in characters: an error is one line.
const MAX_LINE_CHARS: usize = 300;

/// How many reads somebody who only asks for the last line does at most, 4 KiB each: a full pipe's
/// worth. A program that never stops writing must not keep him.
const MAX_READS: usize = 16;

/// What programs write to their stderr. A thread empties the pipe, so that they never wait for us;
/// it is joined when this is dropped, whoever still holds the other end.
#[derive(Debug)]
pub(super) struct StderrTail {
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
    /// A pipe, and the end of it for the programs.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let (fd, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        let shared =
            Arc::new(StderrPipe { fd, tail: Mutex::new(VecDeque::with_capacity(TAIL_LEN)) });
        let stop = Stop::new()?;
        let (ours, until) = (Arc::clone(&shared), stop.clone());
        let reader = thread::Builder::new()
            .name("cowslip-stderr".to_owned())
            .spawn(move || ours.drain_until(&until))?;
        Ok((Self { shared, stop, reader: Some(reader) }, theirs))
    }

    /// The last line that says something, as text on one line. A program that has ended has said
    /// all it will: what is still in the pipe is read first.
    pub(super) fn last_line(&self) -> Option<String> {
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
    /// Empties the pipe until nobody holds the other end.
    fn drain_until(&self, stop: &Stop) {
        while stop.wait_for(self.fd.as_fd(), PollFlags::IN, None).is_ok() {
            match self.read_once(&mut self.tail.lock()) {
                // Somebody who wanted the last line was faster.
                Ok(1..) | Err(Errno::AGAIN) => {}
                Ok(0) | Err(_) => return,
            }
        }
    }

    /// Reads once, under the lock: the bytes keep their order.
    fn read_once(&self, tail: &mut VecDeque<u8>) -> Result<usize, Errno> {
        let mut buf = [0; TAIL_LEN];
        let got = rustix::io::retry_on_intr(|| rustix::io::read(&self.fd, &mut buf))?;
        tail.drain(..(tail.len() + got).saturating_sub(TAIL_LEN));
        tail.extend(&buf[..got]);
        Ok(got)
    }
}
