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

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use super::codec::export::Export;
use super::codec::replies::Event;
use super::codec::request::{Command, Durability, encode};
use super::connection::Connection;
use super::error::NbdError;
use super::request::{Operation, Outcome};
use super::server::{IdentityCheck, Opened, Server};
use super::state::{Outage, State};
use super::uri::NbdTarget;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::remote::transport::{
    ChangeDone, ExtentsDone, ReadDone, RequestLimits, Transport, WritableTransport,
};
use crate::stream::stop::Stop;

/// The longest range of one block status with compact headers, whose lengths have 32 bits, and with
/// extended ones. A server may have to walk all of it before it answers.
const MAX_STATUS: u64 = 1 << 30;

/// The first pause before a connection is made again, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// The pause after a further connection could not be opened: some servers take only one client.
const PAUSE_OF_MORE: Duration = Duration::from_secs(30);

/// The longest time for a connection and its handshake while requests wait.
const LONGEST_OPEN: Duration = Duration::from_secs(10);

/// Whether the image is to be changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    ReadOnly,
    ReadWrite,
}

/// The settings of a client.
#[derive(Clone, Debug)]
pub(crate) struct NbdOptions {
    /// How long a request may take, reconnects included.
    pub(crate) io_timeout: Duration,
    /// How long [`NbdClient::open`] waits for a server that is not up; zero tries once.
    pub(crate) open_timeout: Duration,
    /// The most connections.
    pub(crate) connections: usize,
    /// Whether the image is to be changed.
    pub(crate) access: Access,
    /// The working directory of a program that becomes the server.
    pub(crate) dir: PathBuf,
}

/// The reason why a server cannot be opened: one line that names it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{target}: {cause}{}", waited_text(*.waited))]
pub(crate) struct NbdOpenError {
    /// The server, without secrets.
    pub(crate) target: String,
    /// What is wrong.
    pub(crate) cause: NbdError,
    /// How long the server was waited for.
    pub(crate) waited: Duration,
}

fn waited_text(waited: Duration) -> String {
    match waited.as_secs() {
        0 => String::new(),
        seconds => format!(" (waited {seconds} s for it)"),
    }
}

/// What a client is doing, for `status`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NbdHealth {
    /// Connections that are in use.
    pub(crate) connections: usize,
    /// Since when there is none, and why.
    pub(crate) outage: Option<(Instant, String)>,
}

/// An image on an NBD server. Dropping it ends the session and the threads; requests that are still
/// open fail with `ECANCELED`.
pub(crate) struct NbdClient {
    shared: Arc<Shared>,
}

struct Shared {
    server: Server,
    options: NbdOptions,
    export: Export,
    limits: RequestLimits,
    state: Mutex<State>,
    /// There are requests whose time has to be watched, or the end has come.
    watched: Condvar,
    check: Mutex<Option<IdentityCheck>>,
    stop: Stop,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl NbdClient {
    /// Connects to `target`.
    ///
    /// # Errors
    /// One line: what is wrong with the server, or how long it was waited for.
    pub(crate) fn open(target: &NbdTarget, options: NbdOptions) -> Result<Self, NbdOpenError> {
        let began = Instant::now();
        let failed =
            |cause| NbdOpenError { target: target.to_string(), cause, waited: began.elapsed() };
        let resources =
            |error: io::Error| failed(NbdError::Broken(crate::host::os_message(&error)));
        let stop = Stop::new().map_err(resources)?;
        let server = Server::new(target, &options.dir, stop.clone());
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

    /// Sets what is asked after each further or later connection whether the image is still the same.
    pub(crate) fn set_identity_check(&self, check: IdentityCheck) {
        *self.shared.check.lock() = Some(check);
    }

    /// Returns the bytes at the end of the image that are less than a block of the server, which may
    /// therefore refuse to read them.
    pub(crate) fn tail(&self) -> u64 {
        self.shared.export.tail()
    }

    /// Whether the server refuses changes.
    pub(crate) fn is_read_only(&self) -> bool {
        self.shared.export.flags.is_read_only()
    }

    /// Returns the connections, and the outage if there is one.
    pub(crate) fn health(&self) -> NbdHealth {
        let state = self.shared.state.lock();
        NbdHealth {
            connections: state.slots.iter().filter(|slot| slot.connection.is_some()).count(),
            outage: state.outage.as_ref().map(|outage| (outage.since, outage.why.clone())),
        }
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
        match self.is_inside(&range) {
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

impl Shared {
    fn spawn(
        self: &Arc<Self>,
        name: &str,
        work: impl FnOnce(Arc<Self>) + Send + 'static,
    ) -> io::Result<()> {
        let shared = Arc::clone(self);
        let thread = thread::Builder::new().name(name.to_owned()).spawn(|| work(shared))?;
        let mut threads = self.threads.lock();
        threads.retain(|thread| !thread.is_finished());
        threads.push(thread);
        Ok(())
    }

    fn begin(self: &Arc<Self>, operation: Operation) {
        let is_flush = matches!(operation, Operation::Flush { .. });
        let (begun, touched, another) = {
            let mut state = self.state.lock();
            let begun = match is_flush && !self.export.flags.can_flush() && state.latch.is_none() {
                // Changes are as durable as the server makes them.
                true => Err(operation.succeed(super::codec::replies::Answer::Done)),
                false => state.begin(operation, self.options.io_timeout),
            };
            let touched = state.dispatch(&self.export);
            let another = state.place_for_another(Instant::now());
            if begun.is_ok() && std::mem::take(&mut state.is_unwatched) {
                self.watched.notify_all();
            }
            (begun, touched, another)
        };
        if let Err(outcome) = begun {
            outcome.tell();
        }
        for connection in touched {
            connection.flush();
        }
        if let Some(at) = another {
            let spawned = self.spawn(&format!("cowslip-nbd-{at}"), move |shared| {
                shared.serve_another(at);
            });
            if spawned.is_err() {
                self.give_up(at);
            }
        }
    }

    /// Gives `state` what has happened, tells the outcomes, and sends what can be sent now.
    fn update(&self, change: impl FnOnce(&mut State) -> Vec<Outcome>) {
        let (outcomes, touched) = {
            let mut state = self.state.lock();
            let outcomes = change(&mut state);
            (outcomes, state.dispatch(&self.export))
        };
        // First, so that the server works while the bytes are passed on.
        for connection in touched {
            connection.flush();
        }
        outcomes.into_iter().for_each(Outcome::tell);
    }

    /// Runs the connection at `at` until it is lost, and takes its requests back.
    fn run(&self, at: usize, connection: &Connection) -> String {
        let began = Instant::now();
        let (why, partial) = connection.run(&self.export, |events| self.deliver(events));
        connection.shut_down();
        if !self.stop.is_stopped() {
            log::debug!(
                "{}: connection {at} ended after {:?}: {why}",
                self.server,
                began.elapsed()
            );
        }
        self.update(|state| {
            let failed = state.lose(at, partial, self.limits.alignment);
            let is_last = state.slots.iter().all(|slot| slot.connection.is_none());
            if is_last && state.latch.is_none() {
                state.outage = Some(Outage { since: Instant::now(), why: why.clone() });
            }
            failed
        });
        why
    }

    fn deliver(&self, events: &mut Vec<Event>) -> Option<String> {
        // A server that is being shut down will be back: its requests are asked again then.
        let is_ending = |event: &Event| {
            event.result.as_ref().is_err_and(|failure| failure.errno == libc::ESHUTDOWN)
        };
        let ends = events.iter().any(is_ending);
        events.retain(|event| !is_ending(event));
        self.update(|state| {
            let timeout = self.options.io_timeout;
            let answers = events.drain(..).filter_map(|event| {
                if let Err(failure) = &event.result {
                    log::debug!("{}: errno {}: {}", self.server, failure.errno, failure.text);
                }
                state.answer(event, timeout)
            });
            answers.collect()
        });
        ends.then(|| "the server is being shut down".to_owned())
    }

    /// The work of the first connection's thread: makes the connection again when it is lost.
    fn serve_first(&self, first: Arc<Connection>) {
        let mut connection = Some(first);
        let mut pause = Duration::ZERO;
        while let Some(current) = connection.take() {
            let why = self.run(0, &current);
            // One that answered nothing is not made again in a loop.
            if current.has_answered() {
                pause = Duration::ZERO;
            }
            drop(current);
            if self.stop.is_stopped() {
                return;
            }
            log::warn!("{}: the connection was lost: {why}", self.server);
            connection = self.reconnect(&mut pause);
        }
    }

    /// Makes the first connection again; `None` when that is not wanted any more.
    fn reconnect(&self, pause: &mut Duration) -> Option<Arc<Connection>> {
        let began = Instant::now();
        let mut last = None;
        loop {
            let time = rustix::event::Timespec::try_from(*pause).ok()?;
            *pause = (*pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
            self.stop.sleep(time).ok();
            if self.stop.is_stopped() {
                return None;
            }
            match self.open_same() {
                Ok(connection) => {
                    if self.attach(0, &connection) {
                        log::warn!(
                            "{}: connected again after {:.1?}",
                            self.server,
                            began.elapsed()
                        );
                        return Some(connection);
                    }
                    return None;
                }
                Err(NbdError::Changed(why)) => {
                    log::error!("{}: the image is another one by now: {why}", self.server);
                    self.latch(libc::ESTALE);
                    return None;
                }
                Err(error) => {
                    if last.as_ref() != Some(&error) {
                        log::warn!("{}: {error}", self.server);
                        if let Some(outage) = &mut self.state.lock().outage {
                            outage.why = error.to_string();
                        }
                    }
                    last = Some(error);
                }
            }
        }
    }

    /// The work of a further connection's thread.
    fn serve_another(&self, at: usize) {
        match self.open_same() {
            Ok(connection) => {
                if self.attach(at, &connection) {
                    self.run(at, &connection);
                }
            }
            Err(NbdError::Changed(why)) => {
                log::error!("{}: the image is another one by now: {why}", self.server);
                self.latch(libc::ESTALE);
            }
            Err(error) => {
                log::debug!("{}: no further connection: {error}", self.server);
                self.state.lock().open_after = Instant::now() + PAUSE_OF_MORE;
            }
        }
        self.give_up(at);
    }

    fn give_up(&self, at: usize) {
        if let Some(slot) = self.state.lock().slots.get_mut(at) {
            slot.is_taken = false;
        }
    }

    /// Opens a connection to the same image.
    fn open_same(&self) -> Result<Arc<Connection>, NbdError> {
        let time = self.options.io_timeout.min(LONGEST_OPEN);
        let check = self.check.lock().clone();
        let opened = self.server.open_same(&self.export, check.as_ref(), time)?;
        let failed = |error: io::Error| NbdError::Broken(crate::host::os_message(&error));
        Connection::new(opened.link).map(Arc::new).map_err(failed)
    }

    /// Puts `connection` to use; `false` when no connection is wanted any more.
    fn attach(&self, at: usize, connection: &Arc<Connection>) -> bool {
        let mut is_wanted = false;
        self.update(|state| {
            is_wanted = state.latch.is_none();
            if let Some(slot) = state.slots.get_mut(at).filter(|_| is_wanted) {
                slot.connection = Some(Arc::clone(connection));
                state.outage = None;
            }
            Vec::new()
        });
        is_wanted
    }

    /// Fails all requests with `errno`, from now on for ever, and ends the connections.
    fn latch(&self, errno: i32) {
        let mut connections = Vec::new();
        self.update(|state| {
            state.latch.get_or_insert(errno);
            connections.extend(state.slots.iter_mut().filter_map(|slot| slot.connection.take()));
            state.fail_all(errno)
        });
        for connection in connections {
            connection.shut_down();
        }
    }

    /// Watches the time of requests.
    fn watch(&self) {
        let tick = (self.options.io_timeout / 16)
            .clamp(Duration::from_millis(5), Duration::from_millis(500));
        let silence = self.options.io_timeout / 2;
        while !self.stop.is_stopped() {
            {
                let mut state = self.state.lock();
                // Under the lock, or the end would not be noticed.
                match state.has_requests() || self.stop.is_stopped() {
                    true => drop(self.watched.wait_for(&mut state, tick)),
                    false => {
                        state.is_unwatched = true;
                        self.watched.wait(&mut state);
                    }
                }
            }
            self.update(|state| state.expire(Instant::now(), silence));
        }
    }
}

#[cfg(test)]
mod tests;
