//! The client: an image on an NBD server, over connections that are made anew when they are lost.
//!
//! ```text
//!   callers ── begin ──▶ State (requests, connections) ──▶ Connection::flush
//!                          ▲        ▲
//!   cowslip-nbd-N ── answers, loss, reconnect        one thread a connection
//!   cowslip-nbd-time ── requests that are too old, servers that are silent
//! ```
//!
//! A lost connection is made again with growing pauses, and its requests are sent again: reads, and
//! changes that were not answered, may be done twice. That is harmless, but for one thing no client
//! can prevent: a server that has not noticed the loss may carry out the first copy of a write late.
//!
//! More connections than one are opened under load, and only when the server says that a flush covers
//! all of them, or that nothing can be changed.

mod options;
mod shared;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

pub(crate) use self::options::{Access, NbdOpenError, NbdOptions};
use self::shared::Shared;
use super::codec::request::{Command, Durability, encode};
use super::connection::Connection;
use super::error::NbdError;
use super::exec::ServerProgram;
use super::request::{Operation, Outcome};
use super::server::{Opened, Server};
use super::state::State;
use super::uri::NbdTarget;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::program::stop::Stop;
use crate::remote::transport::{
    ChangeDone, ExtentsDone, IdentityCheck, MAX_ZERO, ReadDone, RequestLimits, Transport,
    WritableTransport,
};

/// The longest range of one block status with compact headers, whose lengths have 32 bits, and with
/// extended ones. A server may have to walk all of it before it answers.
const MAX_STATUS: u64 = 1 << 30;

/// The first pause before a connection is made again, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The longest time for a connection and its handshake while requests wait.
const LONGEST_OPEN: Duration = Duration::from_secs(10);

/// An image on an NBD server. Dropping it ends the session and the threads; requests that are still
/// open fail with `ECANCELED`.
pub(crate) struct NbdClient {
    shared: Arc<Shared>,
}

impl NbdClient {
    /// Connects to `target`.
    ///
    /// # Errors
    /// One line: what is wrong with the server, or how long it was waited for.
    pub(crate) fn open(target: &NbdTarget, options: NbdOptions) -> Result<Self, NbdOpenError> {
        let dir = options.dir.clone();
        let tls = options.tls.clone();
        Self::open_server(&target.to_string(), options, |stop| {
            Server::new(target, &dir, &tls, stop)
        })
    }

    /// Starts `program`, which becomes the server, and connects to it. `shown` is for messages.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub(crate) fn start_program(
        program: ServerProgram,
        shown: &str,
        options: NbdOptions,
    ) -> Result<Self, NbdOpenError> {
        let name = shown.to_owned();
        Self::open_server(shown, options, |stop| Ok(Server::of_program(program, name, stop)))
    }

    fn open_server(
        target: &str,
        options: NbdOptions,
        server: impl FnOnce(Stop) -> Result<Server, NbdError>,
    ) -> Result<Self, NbdOpenError> {
        let began = Instant::now();
        let failed =
            |cause| NbdOpenError { target: target.to_owned(), cause, waited: began.elapsed() };
        let resources =
            |error: io::Error| failed(NbdError::Broken(crate::host::os_message(&error)));
        let stop = Stop::new().map_err(resources)?;
        let server = server(stop.clone()).map_err(failed)?;
        let opened = wait_for_server(&server, &options).map_err(failed)?;
        if options.access == Access::ReadWrite && opened.export.flags.is_read_only() {
            return Err(failed(NbdError::ReadOnly));
        }
        let allowed = match opened.export.flags.allows_many_connections() {
            true => options.connections,
            false => 1,
        };
        let shared = Arc::new(Shared {
            limits: opened.export.limits(),
            state: Mutex::new(State::new(allowed, &opened.export)),
            export: opened.export.clone(),
            server,
            options,
            watched: Condvar::new(),
            check: Mutex::default(),
            stop,
            threads: Mutex::default(),
        });
        let client = Self { shared };
        client.start(opened).map_err(resources)?;
        Ok(client)
    }

    fn start(&self, opened: Opened) -> io::Result<()> {
        let connection = Arc::new(Connection::new(opened.link)?);
        if let Some(slot) = self.shared.state.lock().slots.first_mut() {
            slot.is_taken = true;
            slot.connection = Some(Arc::clone(&connection));
        }
        self.shared.spawn("cowslip-nbd-0", |shared| shared.serve_first(connection))?;
        self.shared.spawn("cowslip-nbd-time", |shared| shared.watch())
    }

    /// Whether the server takes changes.
    pub(crate) fn is_writable(&self) -> bool {
        !self.shared.export.flags.is_read_only()
    }

    /// Returns the bytes at the end of the image that are less than a block of the server, which may
    /// therefore refuse to read them.
    pub(crate) fn tail(&self) -> u64 {
        self.shared.export.tail()
    }

    /// Returns the number of connections in use.
    #[cfg(test)]
    fn connections(&self) -> usize {
        let state = self.shared.state.lock();
        state.slots.iter().filter(|slot| slot.connection.is_some()).count()
    }

    fn is_inside(&self, range: &Range<u64>) -> bool {
        !range.is_empty() && range.end <= self.shared.export.size
    }

    fn durability(&self) -> Durability {
        let flags = self.shared.export.flags;
        match !flags.can_flush() && flags.can_fua() {
            true => Durability::BeforeAnswer,
            false => Durability::AtFlush,
        }
    }
}

impl Transport for NbdClient {
    fn size(&self) -> u64 {
        self.shared.export.size
    }

    fn limits(&self) -> RequestLimits {
        self.shared.limits
    }

    fn outage(&self) -> Option<(Duration, String)> {
        let state = self.shared.state.lock();
        state.outage.as_ref().map(|outage| (outage.since.elapsed(), outage.why.clone()))
    }

    fn read(&self, range: Range<u64>, done: ReadDone) {
        let is_valid = self.is_inside(&range)
            && range.end - range.start <= u64::from(self.shared.limits.max_len);
        match is_valid {
            true => self.shared.begin(Operation::Read { range, have: Vec::new(), done }),
            false => done(Err(os_error(libc::EINVAL))),
        }
    }

    fn knows_extents(&self) -> bool {
        self.shared.export.allocation.is_some()
    }

    fn extents(&self, range: Range<u64>, done: ExtentsDone) {
        if !self.is_inside(&range) {
            return done(Err(os_error(libc::EINVAL)));
        }
        if !self.knows_extents() {
            return done(Ok(vec![Extent::new(range, ExtentKind::Data)]));
        }
        let block = u64::from(self.shared.limits.alignment);
        let start = range.start / block * block;
        let end = range.end.min(start + MAX_STATUS).next_multiple_of(block);
        let query = start..end.min(self.shared.export.size);
        let asked = range.start..range.end.min(query.end);
        self.shared.begin(Operation::Extents { asked, query, done });
    }
}

impl WritableTransport for NbdClient {
    fn write(&self, offset: u64, bytes: Vec<u8>, done: ChangeDone) {
        let len = bytes.len() as u64;
        let is_valid = offset.checked_add(len).is_some_and(|end| self.is_inside(&(offset..end)))
            && len <= u64::from(self.shared.limits.max_len);
        match is_valid {
            true => {
                let (bytes, durability) = (Arc::new(bytes), self.durability());
                self.shared.begin(Operation::Write { offset, bytes, durability, done });
            }
            false => done(Err(os_error(libc::EINVAL))),
        }
    }

    fn zero(&self, range: Range<u64>, punch: bool, done: ChangeDone) {
        if !self.shared.export.flags.can_zero() {
            return done(Err(os_error(libc::EOPNOTSUPP)));
        }
        match self.is_inside(&range) && range.end - range.start <= MAX_ZERO {
            true => {
                let durability = self.durability();
                self.shared.begin(Operation::Zero { range, punch, durability, done });
            }
            false => done(Err(os_error(libc::EINVAL))),
        }
    }

    fn flush(&self, done: ChangeDone) {
        let covers = self.shared.state.lock().answered_changes();
        self.shared.begin(Operation::Flush { covers, done });
    }

    fn set_identity_check(&self, check: IdentityCheck) {
        *self.shared.check.lock() = Some(check);
    }
}

impl Drop for NbdClient {
    fn drop(&mut self) {
        let shared = &self.shared;
        let (connections, outcomes) = {
            let mut state = shared.state.lock();
            state.latch = Some(libc::ECANCELED);
            shared.stop.stop();
            let connections = state.slots.iter_mut().filter_map(|slot| slot.connection.take());
            (connections.collect::<Vec<_>>(), state.fail_all(libc::ECANCELED))
        };
        shared.watched.notify_all();
        outcomes.into_iter().for_each(Outcome::tell);
        for connection in connections {
            // The server need not wait for more ("Terminating the transmission phase").
            let header = encode(shared.export.headers, Command::Disconnect, 0, 0, 0);
            connection.enqueue_unanswered(header.unwrap_or_default(), None);
            connection.flush();
            connection.shut_down();
        }
        let threads = std::mem::take(&mut *shared.threads.lock());
        for thread in threads {
            // The receiver of a request may hold the last client, on a thread of the client.
            if thread.thread().id() != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

/// Opens the first connection, and waits for a server that is not up.
fn wait_for_server(server: &Server, options: &NbdOptions) -> Result<Opened, NbdError> {
    let until = Instant::now() + options.open_timeout;
    let mut pause = FIRST_PAUSE;
    loop {
        let time = until.saturating_duration_since(Instant::now());
        let error = match server.open(time.clamp(Duration::from_secs(1), LONGEST_OPEN)) {
            Ok(opened) => return Ok(opened),
            Err(error) => error,
        };
        if !error.is_transient() || Instant::now() + pause >= until {
            return Err(error);
        }
        if pause == FIRST_PAUSE {
            log::warn!("{server}: {error}; waiting for it up to {:?}", options.open_timeout);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests;
