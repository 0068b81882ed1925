//! One connection in use: what is to be sent, and the thread that receives.
//!
//! ```text
//!   any thread:   enqueue ──▶ outgoing ──▶ flush: sends what the socket takes, and never waits
//!   its thread:   run: receives, and sends what the socket did not take before
//! ```

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::codec::export::Export;
use super::codec::replies::{Event, Expected, Replies};
use super::link::Link;
use crate::host::os_message;

/// Bytes that are received at a time besides those that go into the buffer of a read directly: the
/// headers of many replies, or sixteen replies of 4 KiB.
const RECEIVE_BUFFER: usize = 64 << 10;

/// The most pieces in one sendmsg(2).
const MAX_PIECES: usize = 64;

/// No request: cookies count from 0.
const NO_COOKIE: u64 = u64::MAX;

/// What is sent: the encoded requests, and the payload of writes, which is kept for a resend.
#[derive(Debug)]
pub(super) enum Piece {
    Header(Vec<u8>),
    Payload(Arc<Vec<u8>>),
}

impl Piece {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Header(bytes) => bytes,
            Self::Payload(bytes) => bytes,
        }
    }
}

#[derive(Debug, Default)]
struct Outgoing {
    queue: VecDeque<Piece>,
    /// Bytes of the first piece that are sent already.
    sent: usize,
    /// The socket is full: the connection's thread goes on.
    is_blocked: bool,
}

/// A connection after its handshake.
#[derive(Debug)]
pub(super) struct Connection {
    link: Link,
    /// Locked while the socket takes bytes, which never waits.
    outgoing: Mutex<Outgoing>,
    /// Requests whose replies may come from now on.
    announced: Mutex<Vec<(u64, Expected)>>,
    /// Wakes the thread: the socket is full, or the end has come.
    wake: OwnedFd,
    began: Instant,
    /// When the server was last heard, in milliseconds after `began`.
    heard_ms: AtomicU64,
    /// When a reply was last complete, in milliseconds after `began`.
    replied_ms: AtomicU64,
    /// The request whose reply is being received; [`NO_COOKIE`] between replies.
    receiving: AtomicU64,
    has_answered: AtomicBool,
}

impl Connection {
    pub(super) fn new(link: Link) -> io::Result<Self> {
        Ok(Self {
            link,
            outgoing: Mutex::default(),
            announced: Mutex::default(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            began: Instant::now(),
            heard_ms: AtomicU64::new(0),
            replied_ms: AtomicU64::new(0),
            receiving: AtomicU64::new(NO_COOKIE),
            has_answered: AtomicBool::new(false),
        })
    }

    /// Adds a request to those that are sent by the next [`flush`](Self::flush).
    pub(super) fn enqueue(
        &self,
        cookie: u64,
        expected: Expected,
        header: Vec<u8>,
        payload: Option<Arc<Vec<u8>>>,
    ) {
        // First, so that it is there before the reply can be.
        self.announced.lock().push((cookie, expected));
        self.enqueue_unanswered(header, payload);
    }

    /// Adds a request that has no reply.
    pub(super) fn enqueue_unanswered(&self, header: Vec<u8>, payload: Option<Arc<Vec<u8>>>) {
        let mut outgoing = self.outgoing.lock();
        outgoing.queue.push_back(Piece::Header(header));
        outgoing.queue.extend(payload.map(Piece::Payload));
    }

    /// Sends what the socket takes now. A failure ends the connection; its thread tells why.
    pub(super) fn flush(&self) {
        let mut outgoing = self.outgoing.lock();
        if outgoing.is_blocked {
            return;
        }
        match self.send_queue(&mut outgoing) {
            Ok(()) => {}
            Err(Errno::AGAIN) => {
                outgoing.is_blocked = true;
                drop(outgoing);
                self.wake();
            }
            Err(_) => self.shut_down(),
        }
    }

    fn send_queue(&self, outgoing: &mut Outgoing) -> Result<(), Errno> {
        while !outgoing.queue.is_empty() {
            let skip = outgoing.sent;
            let pieces = outgoing.queue.iter().take(MAX_PIECES).enumerate().map(|(at, piece)| {
                let from = if at == 0 { skip } else { 0 };
                IoSlice::new(piece.bytes().get(from..).unwrap_or_default())
            });
            let pieces: Vec<IoSlice<'_>> = pieces.collect();
            let mut sent = self.link.send(&pieces)?;
            while let Some(first) = outgoing.queue.front() {
                let left = first.bytes().len() - outgoing.sent;
                if sent < left {
                    outgoing.sent += sent;
                    break;
                }
                sent -= left;
                outgoing.sent = 0;
                outgoing.queue.pop_front();
            }
        }
        self.link.finish_send()
    }

    /// Makes [`run`](Self::run) return.
    pub(super) fn shut_down(&self) {
        self.link.shut_down();
        self.wake();
    }

    fn wake(&self) {
        // It fails only when the counter is full, and then the thread is awake.
        let _ = rustix::io::write(&self.wake, &1_u64.to_ne_bytes());
    }

    /// Returns when the server was last heard.
    pub(super) fn last_heard(&self) -> Instant {
        self.began + Duration::from_millis(self.heard_ms.load(Ordering::Relaxed))
    }

    /// Returns when a reply was last complete; the beginning when none was.
    pub(super) fn last_reply(&self) -> Instant {
        self.began + Duration::from_millis(self.replied_ms.load(Ordering::Relaxed))
    }

    /// Returns whether the last bytes that came are a part of the reply to the request `cookie`.
    pub(super) fn is_receiving(&self, cookie: u64) -> bool {
        self.receiving.load(Ordering::Relaxed) == cookie
    }

    /// Returns whether a request was answered, at least in part, with more than an error.
    pub(super) fn has_answered(&self) -> bool {
        self.has_answered.load(Ordering::Relaxed)
    }

    /// Receives replies until the connection ends; returns why it did, and the beginnings of reads that
    /// have come. `deliver` takes what is answered; when it returns a reason, that ends the connection.
    pub(super) fn run(
        &self,
        export: &Export,
        deliver: impl FnMut(&mut Vec<Event>) -> Option<String>,
    ) -> (String, Vec<(u64, Vec<u8>)>) {
        let mut replies = Replies::new(export.headers, export.allocation);
        let why = self.receive(&mut replies, deliver);
        let partial = replies.into_partial();
        if !partial.is_empty() {
            self.has_answered.store(true, Ordering::Relaxed);
        }
        (why, partial)
    }

    fn receive(
        &self,
        replies: &mut Replies,
        mut deliver: impl FnMut(&mut Vec<Event>) -> Option<String>,
    ) -> String {
        let mut buf = vec![0; RECEIVE_BUFFER];
        let mut events = Vec::new();
        loop {
            let direct = replies.direct();
            let direct_len = direct.len();
            let parts = &mut [IoSliceMut::new(direct), IoSliceMut::new(&mut buf)];
            let received = match self.link.receive(parts) {
                Ok(0) => return "the server closed it".to_owned(),
                Ok(received) => received,
                Err(Errno::AGAIN) => match self.wait() {
                    Ok(()) => continue,
                    Err(error) => return os_message(&error.into()),
                },
                Err(error) => return os_message(&error.into()),
            };
            let heard_ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.heard_ms.store(heard_ms, Ordering::Relaxed);
            for (cookie, expected) in self.announced.lock().drain(..) {
                replies.expect(cookie, expected);
            }
            let in_place = received.min(direct_len);
            let rest = buf.get(..received - in_place).unwrap_or_default();
            let fed = replies
                .advance(in_place, &mut events)
                .and_then(|()| replies.feed(rest, &mut events));
            self.receiving.store(replies.receiving().unwrap_or(NO_COOKIE), Ordering::Relaxed);
            // What came before the fault is sound.
            let mut ended = None;
            if !events.is_empty() {
                self.replied_ms.store(heard_ms, Ordering::Relaxed);
                // A server that only refuses has not helped anybody.
                if events.iter().any(|event| event.result.is_ok()) {
                    self.has_answered.store(true, Ordering::Relaxed);
                }
                ended = deliver(&mut events);
            }
            if let Err(error) = fed {
                return error.to_string();
            }
            if let Some(why) = ended {
                return why;
            }
        }
    }

    /// Waits until there is something to receive, and sends meanwhile.
    fn wait(&self) -> Result<(), Errno> {
        let is_blocked = self.outgoing.lock().is_blocked;
        let writable = if is_blocked { PollFlags::OUT } else { PollFlags::empty() };
        let mut fds = [
            PollFd::from_borrowed_fd(self.link.as_fd(), PollFlags::IN | writable),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => return Ok(()),
            done => done?,
        };
        let (ready, woken) = (fds[0].revents(), fds[1].revents());
        if !woken.is_empty() {
            let mut count = [0; 8];
            let _ = rustix::io::read(&self.wake, &mut count);
        }
        if ready.contains(PollFlags::OUT) {
            let mut outgoing = self.outgoing.lock();
            match self.send_queue(&mut outgoing) {
                Ok(()) => outgoing.is_blocked = false,
                Err(Errno::AGAIN) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}
