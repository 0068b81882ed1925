//! The client: an image on an HTTP server, whose requests are sent again until they are answered.
//!
//! ```text
//!   read ── a task ──▶ a slot ──▶ Exchange::ask ──▶ the bytes, to the receiver
//!             ▲                        │
//!             └── a pause (retry.rs) ──┘ it failed: what came is kept, and the rest is asked for
//! ```
//!
//! A task waits for nothing but its request, so that many of them take no threads.

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use super::answer::Version;
use super::auth::Auth;
use super::error::HttpError;
use super::exchange::Exchange;
use super::origin::Connections;
use super::retry::{pause, random};
use super::runtime;
use super::url::HttpUrl;
use crate::config::{AuthSource, RemoteAddress};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::remote::tls::TlsFiles;
use crate::remote::transport::{ExtentsDone, ReadDone, RequestLimits, Transport};

/// What the first request brings: size, version, and the bytes by which a format is known.
const HEAD_LEN: u64 = 64 << 10;
/// The longest request in bytes; the fetcher asks for less.
const MAX_LEN: u32 = 4 << 20;
/// The longest time for the first answer.
const LONGEST_OPEN: Duration = Duration::from_secs(10);
/// A failure that lasts this long is told in the log.
const TOLD_AFTER: Duration = Duration::from_secs(1);
/// Answers after which a server that was busy gets one more request at a time.
const RECOVERY: u32 = 32;

/// The settings of a client.
#[derive(Clone, Debug)]
pub(crate) struct HttpOptions {
    /// How long a request may take, all tries included.
    pub(crate) io_timeout: Duration,
    /// How long [`open`](HttpClient::open) waits for a server that is not up.
    pub(crate) open_timeout: Duration,
    /// The most requests at a time.
    pub(crate) connections: u32,
    /// The files of TLS.
    pub(crate) tls: TlsFiles,
    /// The source of header lines.
    pub(crate) auth: Option<AuthSource>,
    /// The working directory of a command that prints header lines.
    pub(crate) dir: PathBuf,
}

/// An image on an HTTP server. Dropping it ends its requests with `ECANCELED`.
pub(crate) struct HttpClient {
    shared: Arc<Shared>,
    runtime: Handle,
}

/// What the requests share.
struct Shared {
    exchange: Exchange,
    version: Version,
    io_timeout: Duration,
    /// How long the server may be silent within a request.
    silence: Duration,
    connections: u32,
    /// Requests that may be sent now. Fewer while the server is busy, by `withheld`.
    slots: Semaphore,
    withheld: AtomicU32,
    answers: AtomicU32,
    /// The errno with which all requests end, once there is one.
    end: watch::Sender<Option<i32>>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    outage: Option<Outage>,
    /// Until when a busy server wants no requests.
    busy_until: Option<Instant>,
}

/// The time since the last answer.
struct Outage {
    since: Instant,
    why: String,
    is_told: bool,
}

impl HttpClient {
    /// Asks for the beginning of the image at `address`, and returns it with the client.
    ///
    /// # Errors
    /// [`HttpError`].
    pub(crate) fn open(
        address: &RemoteAddress,
        options: &HttpOptions,
    ) -> Result<(Self, Vec<u8>), HttpError> {
        let home = HttpUrl::parse(address)?;
        let runtime = runtime::handle()?;
        let conns = usize::try_from(options.connections).unwrap_or(1).max(1);
        let connections = Connections::new(&home, &options.tls, conns)?;
        let read = |source| Auth::read(source, &options.dir, options.io_timeout);
        let auth = options.auth.as_ref().map(read).transpose()?;
        if auth.is_some() && !home.is_encrypted() {
            log::warn!("{home}: what auth= names is sent without encryption");
        }
        let silence = options.io_timeout / 2;
        let exchange = Exchange::new(home, connections, auth, silence);
        let (version, head) = runtime.block_on(wait_for_server(&exchange, options))?;
        let shared = Arc::new(Shared {
            exchange,
            version,
            io_timeout: options.io_timeout,
            silence,
            connections: options.connections.max(1),
            slots: Semaphore::new(conns),
            withheld: AtomicU32::new(0),
            answers: AtomicU32::new(0),
            end: watch::Sender::new(None),
            state: Mutex::default(),
        });
        Ok((Self { shared, runtime }, head))
    }

    /// Returns the time of the last modification in seconds since 1970, if the server names it.
    pub(crate) fn modified(&self) -> Option<i64> {
        self.shared.version.modified()
    }
}

/// Asks for the beginning, and waits for a server that is not up.
async fn wait_for_server(
    exchange: &Exchange,
    options: &HttpOptions,
) -> Result<(Version, Vec<u8>), HttpError> {
    let until = Instant::now() + options.open_timeout;
    let time = options.io_timeout.min(LONGEST_OPEN);
    let mut failures = 0;
    loop {
        let error = match timeout(time, ask_first(exchange, time)).await {
            Ok(Ok(opened)) => return Ok(opened),
            Ok(Err(error)) => error,
            Err(_) => HttpError::Timeout(time),
        };
        failures += 1;
        let asked = error.busy().flatten();
        let next = Instant::now() + pause(failures, random(), asked);
        if !error.is_passing() || next >= until {
            return Err(error);
        }
        if failures == 1 {
            let home = exchange.home();
            log::warn!("{home}: {error}; waiting for it up to {:?}", options.open_timeout);
        }
        sleep_until(next).await;
    }
}

/// Asks for the beginning of an image of which nothing is known.
async fn ask_first(
    exchange: &Exchange,
    silence: Duration,
) -> Result<(Version, Vec<u8>), HttpError> {
    let part = exchange.ask(&(0..HEAD_LEN), None).await?;
    let size = part.range.size.ok_or(HttpError::NoSize)?;
    if i64::try_from(size).is_err() {
        return Err(HttpError::TooLarge(size.to_string()));
    }
    let version = Version::new(part.headers(), size);
    let is_web_page = super::answer::is_web_page(part.headers());
    let mut head = Vec::new();
    part.read(&mut head, silence).await?;
    match is_web_page && head.trim_ascii_start().starts_with(b"<") {
        true => Err(HttpError::WebPage),
        false => Ok((version, head)),
    }
}

impl Shared {
    /// Reads `range`, until it is there, its time is over, or all ends.
    async fn read(&self, range: Range<u64>) -> io::Result<Vec<u8>> {
        let mut end = self.end.subscribe();
        let deadline = Instant::now() + self.io_timeout;
        let errno = tokio::select! {
            biased;
            ended = end.wait_for(Option::is_some) => match ended {
                Ok(errno) => errno.unwrap_or(libc::ECANCELED),
                Err(_) => libc::ECANCELED,
            },
            read = timeout_at(deadline, self.read_until_there(&range)) => match read {
                Ok(Ok(bytes)) => return Ok(bytes),
                Ok(Err(errno)) => errno,
                Err(_) => libc::ETIMEDOUT,
            },
        };
        Err(os_error(errno))
    }

    /// Reads `range`, however often that fails.
    ///
    /// # Errors
    /// `ESTALE` when the image is another one.
    async fn read_until_there(&self, range: &Range<u64>) -> Result<Vec<u8>, i32> {
        let mut bytes = Vec::new();
        let mut failures = 0;
        loop {
            let before = bytes.len();
            let tried = self.try_read(range, &mut bytes).await;
            // A connection that brings something each time, however little, is no failing server.
            if bytes.len() > before {
                failures = 0;
            }
            let error = match tried {
                Ok(()) => {
                    self.note_answer();
                    return Ok(bytes);
                }
                Err(HttpError::Changed(why)) => {
                    self.latch(&why);
                    return Err(libc::ESTALE);
                }
                Err(error) => error,
            };
            self.note_failure(&error);
            failures += 1;
            // A kept connection may have been closed as we sent: not a fault of the server's.
            let is_first = failures == 1 && error.is_lost();
            if !is_first {
                sleep(pause(failures, random(), None)).await;
            }
        }
    }

    /// Asks for what is missing of `range` after `bytes`, and appends what comes of it.
    async fn try_read(&self, range: &Range<u64>, bytes: &mut Vec<u8>) -> Result<(), HttpError> {
        let closed = |_| HttpError::Broken("it was closed".to_owned());
        let _slot = self.slots.acquire().await.map_err(closed)?;
        loop {
            let busy_until = self.state.lock().busy_until;
            match busy_until.filter(|until| Instant::now() < *until) {
                Some(until) => sleep_until(until).await,
                None => break,
            }
        }
        let rest = range.start + bytes.len() as u64..range.end;
        let part = self.exchange.ask(&rest, Some(&self.version)).await?;
        part.read(bytes, self.silence).await
    }

    fn note_answer(&self) {
        let answers = self.answers.fetch_add(1, Ordering::Relaxed);
        let is_due = answers % RECOVERY == RECOVERY - 1;
        let less = |withheld: u32| withheld.checked_sub(1);
        if is_due && self.withheld.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
        {
            self.slots.add_permits(1);
        }
        let outage = self.state.lock().outage.take();
        if let Some(outage) = outage.filter(|outage| outage.is_told) {
            let (home, lasted) = (self.exchange.home(), outage.since.elapsed());
            log::warn!("{home}: it answers again, after {lasted:.1?}");
        }
    }

    fn note_failure(&self, error: &HttpError) {
        let home = self.exchange.home();
        log::debug!("{home}: {error}");
        let mut state = self.state.lock();
        let now = Instant::now();
        let why = error.to_string();
        let new = || Outage { since: now, why: String::new(), is_told: false };
        let outage = state.outage.get_or_insert_with(new);
        outage.why.clone_from(&why);
        let is_due = !outage.is_told && now - outage.since >= TOLD_AFTER;
        outage.is_told |= is_due;
        if let Some(asked) = error.busy() {
            self.withhold_slot();
            let until = now.checked_add(asked.unwrap_or_default().min(self.io_timeout));
            state.busy_until = state.busy_until.max(until);
        }
        drop(state);
        if is_due {
            log::warn!("{home}: {why}; asking on");
        }
    }

    /// Sends one request less at a time, and always one.
    fn withhold_slot(&self) {
        if self.withheld.load(Ordering::Relaxed) + 1 < self.connections {
            let withheld = u32::try_from(self.slots.forget_permits(1)).unwrap_or(0);
            self.withheld.fetch_add(withheld, Ordering::Relaxed);
        }
    }

    /// Ends all requests, now and from now on: the image is another one.
    fn latch(&self, why: &str) {
        let is_first = self.end.send_if_modified(|end| {
            let is_first = end.is_none();
            end.get_or_insert(libc::ESTALE);
            is_first
        });
        if is_first {
            let home = self.exchange.home();
            log::error!("{home}: the image is another one by now: {why}");
        }
    }
}

impl Transport for HttpClient {
    fn size(&self) -> u64 {
        self.shared.version.size
    }

    fn limits(&self) -> RequestLimits {
        let max_in_flight = self.shared.connections;
        RequestLimits { alignment: 1, max_len: MAX_LEN, max_in_flight }
    }

    fn version(&self) -> Option<String> {
        self.shared.version.strong_etag().map(|etag| format!("etag:{etag}"))
    }

    fn outage(&self) -> Option<(Duration, String)> {
        let state = self.shared.state.lock();
        state.outage.as_ref().map(|outage| (outage.since.elapsed(), outage.why.clone()))
    }

    fn read(&self, range: Range<u64>, done: ReadDone) {
        let is_valid = !range.is_empty()
            && range.end <= self.size()
            && range.end - range.start <= u64::from(MAX_LEN);
        if !is_valid {
            return done(Err(os_error(libc::EINVAL)));
        }
        let shared = Arc::clone(&self.shared);
        self.runtime.spawn(async move { done(shared.read(range).await) });
    }

    fn knows_extents(&self) -> bool {
        false
    }

    fn extents(&self, range: Range<u64>, done: ExtentsDone) {
        done(Ok(vec![Extent::new(range, ExtentKind::Data)]));
    }
}

impl Drop for HttpClient {
    fn drop(&mut self) {
        self.shared.end.send_modify(|end| {
            end.get_or_insert(libc::ECANCELED);
        });
    }
}
