//! One range of an image: asked for where redirects lead, and only taken if the answer is exactly that.
//!
//! ```text
//!   the address ──▶ 30x ──▶ 30x ──▶ 206       the last place is asked directly from then on, until it
//!        ▲                           │        refuses, is gone, or what signs it has expired: then the
//!        └──── 401, 403, 404, 410 ───┘        address is asked once anew
//! ```

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use reqwest::header::{ACCEPT_ENCODING, HeaderMap, IF_RANGE, LOCATION, RANGE};
use reqwest::{Response, StatusCode};
use tokio::time::timeout;

use super::MAX_REDIRECTS;
use super::answer::{
    ContentRange, Version, check_body, check_encoding, is_empty, is_web_page, max_age, retry_after,
};
use super::auth::{Auth, Given};
use super::error::HttpError;
use super::origin::Connections;
use super::url::HttpUrl;

/// The most bytes of an answer that is not needed, and the longest time: its connection is kept for
/// that. One with more is closed.
const MAX_DRAIN: usize = 16 << 10;
const DRAIN_TIME: Duration = Duration::from_millis(500);

/// How long the end of an answer is waited for after its last byte.
const END_TIME: Duration = Duration::from_millis(500);

/// An image, and how it is asked for.
pub(super) struct Exchange {
    home: HttpUrl,
    connections: Connections,
    auth: Option<Auth>,
    /// How long the server may be silent.
    silence: Duration,
    target: Mutex<Option<Target>>,
    /// There was a redirect, so that one request at a time asks for the next.
    is_redirected: AtomicBool,
    resolving: tokio::sync::Mutex<()>,
}

/// Where redirects led.
#[derive(Clone)]
struct Target {
    url: HttpUrl,
    /// When what signs it expires.
    until: Option<Instant>,
}

/// The head of an answer that holds the range that was asked for.
pub(super) struct Part {
    response: Response,
    pub(super) range: ContentRange,
    len: usize,
}

impl Exchange {
    /// Prepares requests for `home`; the server may be silent for `silence`.
    pub(super) fn new(
        home: HttpUrl,
        connections: Connections,
        auth: Option<Auth>,
        silence: Duration,
    ) -> Self {
        Self {
            home,
            connections,
            auth,
            silence,
            target: Mutex::default(),
            is_redirected: AtomicBool::new(false),
            resolving: tokio::sync::Mutex::default(),
        }
    }

    /// Returns the address of the image.
    pub(super) fn home(&self) -> &HttpUrl {
        &self.home
    }

    /// Asks for `range` of `version`; of any version without one.
    ///
    /// # Errors
    /// [`HttpError`].
    pub(super) async fn ask(
        &self,
        range: &Range<u64>,
        version: Option<&Version>,
    ) -> Result<Part, HttpError> {
        if let Some(part) = self.ask_target(range, version).await? {
            return Ok(part);
        }
        // The first of many that find the target gone asks for the next, and the others take that.
        let _resolving = match self.is_redirected.load(Ordering::Relaxed) {
            true => Some(self.resolving.lock().await),
            false => None,
        };
        if let Some(part) = self.ask_target(range, version).await? {
            return Ok(part);
        }
        let given = self.auth.as_ref().map(Auth::given);
        let (mut response, mut end) = self.follow(range, version, given.as_ref()).await?;
        if let (Some(auth), Some(refused)) = (&self.auth, &given)
            && is_refused(response.status())
            && self.connections.is_home(&end.url)
            && auth.refresh(refused).await?
        {
            drain(response).await;
            let given = auth.given();
            (response, end) = self.follow(range, version, Some(&given)).await?;
        }
        let part = self.part(response, &end.url, range, version).await?;
        if end.url != self.home {
            self.is_redirected.store(true, Ordering::Relaxed);
            *self.target.lock() = Some(end);
        }
        Ok(part)
    }

    /// Asks where the last redirect led; `None` when there was none, or it does not lead there any more.
    async fn ask_target(
        &self,
        range: &Range<u64>,
        version: Option<&Version>,
    ) -> Result<Option<Part>, HttpError> {
        let target = self.target.lock().clone();
        let Some(Target { url, until }) = target else { return Ok(None) };
        if until.is_none_or(|until| Instant::now() < until) {
            let given = self.auth.as_ref().map(Auth::given);
            let answer = self.send(&url, range, version, given.as_ref()).await;
            let answer = answer.inspect_err(|_| self.forget(&url))?;
            if !is_gone(answer.status()) && !answer.status().is_redirection() {
                return self.part(answer, &url, range, version).await.map(Some);
            }
            drain(answer).await;
        }
        self.forget(&url);
        Ok(None)
    }

    fn forget(&self, url: &HttpUrl) {
        let mut target = self.target.lock();
        if target.as_ref().is_some_and(|target| target.url == *url) {
            *target = None;
        }
    }

    /// Asks the address of the image, and goes where redirects lead.
    async fn follow(
        &self,
        range: &Range<u64>,
        version: Option<&Version>,
        given: Option<&Given>,
    ) -> Result<(Response, Target), HttpError> {
        let mut url = self.home.clone();
        let mut lifetime = None;
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(&url, range, version, given).await?;
            if !is_redirect(response.status()) {
                let until = lifetime.and_then(|lifetime| Instant::now().checked_add(lifetime));
                return Ok((response, Target { url, until }));
            }
            let location = response.headers().get(LOCATION);
            let location = location.and_then(|value| value.to_str().ok()).unwrap_or_default();
            if location.is_empty() {
                return Err(HttpError::Location(String::new()));
            }
            let next = url.redirected(location)?;
            let ends = [lifetime, max_age(response.headers()), next.lifetime(SystemTime::now())];
            lifetime = ends.into_iter().flatten().min();
            drain(response).await;
            url = next;
        }
        Err(HttpError::Redirects)
    }

    /// Sends one request, and waits for the head of its answer.
    async fn send(
        &self,
        url: &HttpUrl,
        range: &Range<u64>,
        version: Option<&Version>,
        given: Option<&Given>,
    ) -> Result<Response, HttpError> {
        let mut request = self.connections.to(url)?.get(url.url().clone());
        request = request.header(RANGE, format!("bytes={}-{}", range.start, range.end - 1));
        request = request.header(ACCEPT_ENCODING, "identity");
        if let Some(etag) = version.and_then(Version::strong_etag) {
            request = request.header(IF_RANGE, etag);
        }
        if let Some(given) = given.filter(|_| self.connections.is_home(url)) {
            request = request.headers(given.headers.clone());
        }
        let answer = match timeout(self.silence, request.send()).await {
            Ok(answer) => answer.map_err(HttpError::from),
            Err(_) => Err(HttpError::Timeout(self.silence)),
        };
        answer.map_err(|error| self.at(url, error))
    }

    /// Names the host of an error, where it is another one than that of the address.
    fn at(&self, url: &HttpUrl, error: HttpError) -> HttpError {
        match url.host() == self.home.host() {
            true => error,
            false => HttpError::Elsewhere { host: url.host(), why: Box::new(error) },
        }
    }

    /// Makes sure that an answer of `url` holds `range` of `version`.
    async fn part(
        &self,
        response: Response,
        url: &HttpUrl,
        range: &Range<u64>,
        version: Option<&Version>,
    ) -> Result<Part, HttpError> {
        let found = match response.status() {
            StatusCode::PARTIAL_CONTENT => check_part(response.headers(), range, version),
            status => Err(self.refusal(status, response.headers(), version)),
        };
        match found {
            Ok((range, len)) => Ok(Part { response, range, len }),
            Err(error) => {
                drain(response).await;
                Err(self.at(url, error))
            }
        }
    }

    /// Says why an answer that is no part of the image is none.
    fn refusal(
        &self,
        status: StatusCode,
        headers: &HeaderMap,
        version: Option<&Version>,
    ) -> HttpError {
        match status {
            StatusCode::OK if is_web_page(headers) => return HttpError::WebPage,
            StatusCode::OK => {
                // The whole of another version comes for a range of this one (`If-Range`).
                let changed = version.map(|version| version.check(headers, None));
                if let Some(Err(error @ HttpError::Changed(_))) = changed {
                    return error;
                }
                let refused = match is_empty(headers) {
                    true => HttpError::Empty,
                    false => HttpError::NoRanges,
                };
                return check_encoding(headers).err().unwrap_or(refused);
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                let size = ContentRange::of(headers).ok().and_then(|range| range.size);
                match (version, size) {
                    (Some(version), Some(size)) if size != version.size => {
                        let text = format!("it had {} bytes, and now has {size}", version.size);
                        return HttpError::Changed(text);
                    }
                    (None, Some(0)) => return HttpError::Empty,
                    _ => {}
                }
            }
            _ => {}
        }
        let retry_after = retry_after(headers, SystemTime::now());
        HttpError::Status { status: status.as_u16(), hint: self.hint(status), retry_after }
    }

    /// Says what to do about a status.
    fn hint(&self, status: StatusCode) -> &'static str {
        match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.auth.is_some() => {
                ": the header lines of auth= are not enough"
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN if self.home.has_query() => {
                ": a signature in the query may have expired"
            }
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                ": give auth=, or the address with its query, of which nothing is recorded"
            }
            StatusCode::NOT_FOUND | StatusCode::GONE => ": there is no such image",
            StatusCode::PROXY_AUTHENTICATION_REQUIRED => {
                ": the proxy that the environment names wants a password"
            }
            _ => "",
        }
    }
}

/// Makes sure that a 206 has exactly `range` of `version`; returns its range, and its length.
fn check_part(
    headers: &HeaderMap,
    range: &Range<u64>,
    version: Option<&Version>,
) -> Result<(ContentRange, usize), HttpError> {
    check_encoding(headers)?;
    let found = ContentRange::of(headers)?;
    if let Some(version) = version {
        version.check(headers, found.size)?;
    }
    found.check(range)?;
    let len = found.range.as_ref().map_or(0, |range| range.end - range.start);
    check_body(headers, len)?;
    let too_long = || HttpError::WrongRange(format!("{len} bytes"));
    Ok((found, usize::try_from(len).map_err(|_| too_long())?))
}

impl Part {
    /// Returns the head of the answer.
    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Appends the bytes of the part to `bytes`; a beginning of them on an error. The server may be
    /// silent for `silence`.
    ///
    /// # Errors
    /// [`HttpError`].
    pub(super) async fn read(
        mut self,
        bytes: &mut Vec<u8>,
        silence: Duration,
    ) -> Result<(), HttpError> {
        let before = bytes.len();
        let result = self.read_on(bytes, silence).await;
        if result == Err(HttpError::Long) {
            // Whose bytes these are is anybody's guess.
            bytes.truncate(before);
        }
        result
    }

    async fn read_on(&mut self, bytes: &mut Vec<u8>, silence: Duration) -> Result<(), HttpError> {
        let mut left = self.len;
        bytes.reserve_exact(left);
        while left > 0 {
            let chunk = match timeout(silence, self.response.chunk()).await {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(error)) if left == self.len => return Err(error.into()),
                Ok(Err(_)) => None,
                Err(_) => return Err(HttpError::Timeout(silence)),
            };
            let Some(chunk) = chunk else {
                return Err(HttpError::Short { have: self.len - left, want: self.len });
            };
            left = left.checked_sub(chunk.len()).ok_or(HttpError::Long)?;
            bytes.extend_from_slice(&chunk);
        }
        // Only after its end can the connection be used again.
        match timeout(END_TIME, self.response.chunk()).await {
            Ok(Ok(Some(_))) => Err(HttpError::Long),
            Ok(_) | Err(_) => Ok(()),
        }
    }
}

/// Reads the rest of a short answer, so that its connection can be used again.
async fn drain(mut response: Response) {
    let reading = async {
        let mut len = 0;
        while let Ok(Some(chunk)) = response.chunk().await {
            len += chunk.len();
            if len > MAX_DRAIN {
                return;
            }
        }
    };
    // One that takes longer is closed.
    let _ = timeout(DRAIN_TIME, reading).await;
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

fn is_refused(status: StatusCode) -> bool {
    matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
}

/// Whether a place does not have the image any more, or not for us.
fn is_gone(status: StatusCode) -> bool {
    is_refused(status) || matches!(status, StatusCode::NOT_FOUND | StatusCode::GONE)
}
