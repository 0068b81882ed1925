//! The threads of a client: connections that are made again, outcomes that are told, time that runs out.

use std::io;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::options::NbdOptions;
use super::{FIRST_PAUSE, LONGEST_OPEN, LONGEST_PAUSE};
use crate::program::stop::Stop;
use crate::remote::nbd::codec::export::Export;
use crate::remote::nbd::codec::replies::{Answer, Event};
use crate::remote::nbd::connection::Connection;
use crate::remote::nbd::error::NbdError;
use crate::remote::nbd::request::{Operation, Outcome};
use crate::remote::nbd::server::Server;
use crate::remote::nbd::state::{Outage, State};
use crate::remote::transport::IdentityCheck;
use crate::remote::transport::RequestLimits;

/// The pause after a further connection could not be opened: some servers take only one client.
const PAUSE_OF_MORE: Duration = Duration::from_secs(30);

/// What the threads of a client share.
pub(super) struct Shared {
    pub(super) server: Server,
    pub(super) options: NbdOptions,
    pub(super) export: Export,
    pub(super) limits: RequestLimits,
    pub(super) state: Mutex<State>,
    /// There are requests whose time has to be watched, or the end has come.
    pub(super) watched: Condvar,
    pub(super) check: Mutex<Option<IdentityCheck>>,
    pub(super) stop: Stop,
    pub(super) threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Shared {
    pub(super) fn spawn(
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

    pub(super) fn begin(self: &Arc<Self>, operation: Operation) {
        let is_flush = matches!(operation, Operation::Flush { .. });
        let (begun, touched, another) = {
            let mut state = self.state.lock();
            let begun = match is_flush && !self.export.flags.can_flush() && state.latch.is_none() {
                // Changes are as durable as the server makes them.
                true => Err(operation.succeed(Answer::Done)),
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
            let answers = events.drain(..).filter_map(|event| {
                if let Err(failure) = &event.result {
                    log::debug!("{}: errno {}: {}", self.server, failure.errno, failure.text);
                }
                state.answer(event)
            });
            answers.collect()
        });
        ends.then(|| "the server is being shut down".to_owned())
    }

    /// The work of the first connection's thread: makes the connection again when it is lost.
    pub(super) fn serve_first(&self, first: Arc<Connection>) {
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
        let opened = loop {
            let check = self.check.lock().clone();
            let opened = self.server.open_same(&self.export, check.as_ref(), time);
            // Who begins to write to the image sets another check first: what the old one expects may be
            // gone by now.
            let is_current = match (&check, &*self.check.lock()) {
                (Some(used), Some(now)) => Arc::ptr_eq(used, now),
                (used, now) => used.is_none() && now.is_none(),
            };
            if is_current || !matches!(opened, Err(NbdError::Changed(_))) {
                break opened?;
            }
        };
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
    pub(super) fn watch(&self) {
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
