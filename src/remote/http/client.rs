//! The client: opens an image on an HTTP server, and begins requests.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::Version;
use super::auth::Auth;
use super::error::HttpError;
use super::exchange::Exchange;
use super::origin::Connections;
use super::requests::Requests;
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
/// What must come of it: a page.
const MIN_HEAD: usize = 4 << 10;
/// The longest request in bytes; the fetcher asks for less.
const MAX_LEN: u32 = 4 << 20;
/// The longest time for the first answer.
const LONGEST_OPEN: Duration = Duration::from_secs(10);

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
    requests: Arc<Requests>,
    runtime: Handle,
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
        let exchange = Exchange::new(home, connections, auth, options.io_timeout / 2);
        let (version, head) = runtime.block_on(wait_for_server(&exchange, options))?;
        let requests = Requests::new(exchange, version, options.io_timeout, options.connections);
        Ok((Self { requests: Arc::new(requests), runtime }, head))
    }

    /// Returns the time of the last modification in seconds since 1970, if the server names it.
    pub(crate) fn modified(&self) -> Option<i64> {
        self.requests.version().modified()
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
    match part.read(&mut head, silence).await {
        // A beginning says as much, and the rest is asked for when it is needed.
        Err(HttpError::Short { have, .. }) if have >= MIN_HEAD => {}
        read => read?,
    }
    match is_web_page && head.trim_ascii_start().starts_with(b"<") {
        true => Err(HttpError::WebPage),
        false => Ok((version, head)),
    }
}

impl Transport for HttpClient {
    fn size(&self) -> u64 {
        self.requests.version().size
    }

    fn limits(&self) -> RequestLimits {
        let max_in_flight = self.requests.connections();
        RequestLimits { alignment: 1, max_len: MAX_LEN, max_in_flight }
    }

    fn version(&self) -> Option<String> {
        self.requests.version().strong_etag().map(|etag| format!("etag:{etag}"))
    }

    fn outage(&self) -> Option<(Duration, String)> {
        self.requests.outage()
    }

    fn read(&self, range: Range<u64>, done: ReadDone) {
        let is_valid = !range.is_empty()
            && range.end <= self.size()
            && range.end - range.start <= u64::from(MAX_LEN);
        if !is_valid {
            return done(Err(os_error(libc::EINVAL)));
        }
        let requests = Arc::clone(&self.requests);
        let waited_for = requests.note(range.start);
        self.runtime.spawn(async move { done(requests.read(range, waited_for).await) });
    }

    fn hurry(&self, start: u64) {
        self.requests.hurry(start);
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
        self.requests.end(libc::ECANCELED);
    }
}
