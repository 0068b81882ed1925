//! Why a server gave no bytes.

use std::error::Error;
use std::io;
use std::time::Duration;

use thiserror::Error;

use super::MAX_REDIRECTS;
use crate::host::os_message;
use crate::printable;

/// The longest text of a library or a server that is shown, in characters.
const MAX_TEXT: usize = 300;

/// The reason why a server gave no bytes; one line without its address, and without secrets.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum HttpError {
    #[error("not the address of an image: {0}")]
    Url(String),
    #[error("no threads for it: {0}")]
    Threads(String),
    #[error("TLS cannot be used: {0}")]
    TlsSettings(String),
    #[error("{0}")]
    Auth(String),
    #[error("cannot connect: {0}")]
    Connect(String),
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the server did not answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("the server answered '{}'{hint}", status_text(*.status))]
    Status {
        status: u16,
        hint: &'static str,
        /// What `Retry-After` asks for.
        retry_after: Option<Duration>,
    },
    #[error(
        "the server serves no ranges (it answered 200 to a request for one): fetch the image, or serve it otherwise"
    )]
    NoRanges,
    #[error("the server answered another range than was asked for: {0}")]
    WrongRange(String),
    #[error("the server does not say how large the image is")]
    NoSize,
    #[error("the server says that the image has {0} bytes, more than a file can have")]
    TooLarge(String),
    #[error("it has {size} bytes, and at most {limit} are read")]
    LongFile { size: u64, limit: u64 },
    #[error("the image is empty")]
    Empty,
    #[error(
        "the server encodes what it sends ('{0}'), so that ranges of it are not those of the image: have it sent as it is"
    )]
    Encoded(String),
    #[error("there is a web page (text/html) in place of an image")]
    WebPage,
    /// At another host than that of the address.
    #[error("redirected to {host}: {why}")]
    Elsewhere { host: String, why: Box<HttpError> },
    #[error("more than {MAX_REDIRECTS} redirects")]
    Redirects,
    #[error("a redirect leads to no address: '{0}'")]
    Location(String),
    #[error("a redirect leads out of the encryption, to {0}: name the address that is meant")]
    Downgrade(String),
    #[error("the answer ended after {have} of {want} bytes")]
    Short { have: usize, want: usize },
    #[error("the answer is longer than the range that was asked for")]
    Long,
    #[error("the image is another one by now: {0}")]
    Changed(String),
    #[error("the answer does not say of which version of the image it is")]
    NoVersion,
}

impl HttpError {
    /// Whether the server may only not be up yet, or be busy.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Broken(_) | Self::Timeout(_) | Self::Short { .. } => true,
            Self::Status { status, .. } => is_busy(*status),
            Self::Elsewhere { why, .. } => why.is_passing(),
            _ => false,
        }
    }

    /// Whether the connection ended before an answer came: a kept one that the server closed as we
    /// sent, so that the request may go at once on another.
    pub(super) fn is_lost(&self) -> bool {
        match self {
            Self::Broken(_) => true,
            Self::Elsewhere { why, .. } => why.is_lost(),
            _ => false,
        }
    }

    /// Returns what the server asks for before the next request, if it is busy.
    pub(super) fn busy(&self) -> Option<Option<Duration>> {
        match self {
            Self::Status { status: 429 | 503, retry_after, .. } => Some(*retry_after),
            Self::Elsewhere { why, .. } => why.busy(),
            _ => None,
        }
    }
}

/// Whether a server may give the same request another answer soon.
fn is_busy(status: u16) -> bool {
    matches!(status, 408 | 425 | 429 | 500 | 502 | 503 | 504)
}

/// Returns a status with its name.
fn status_text(status: u16) -> String {
    let name = reqwest::StatusCode::from_u16(status).ok().and_then(|code| code.canonical_reason());
    name.map_or_else(|| status.to_string(), |name| format!("{status} {name}"))
}

impl From<reqwest::Error> for HttpError {
    fn from(error: reqwest::Error) -> Self {
        let (is_connect, is_timeout) = (error.is_connect(), error.is_timeout());
        // The innermost cause has neither address nor query.
        let mut cause: &dyn Error = &error.without_url();
        let mut tls = None;
        while let Some(inner) = cause.source() {
            cause = inner;
            tls = tls.or_else(|| tls_cause(cause).map(ToString::to_string));
        }
        let text = match cause.downcast_ref::<io::Error>() {
            Some(error) if error.raw_os_error().is_some() => os_message(error),
            _ => cause.to_string(),
        };
        let prefix = "failed to lookup address information: ";
        let text = match text.strip_prefix(prefix) {
            Some(why) => format!("cannot find the host: {why}"),
            None => text,
        };
        let text = shown(&text);
        match tls {
            Some(tls) => Self::Tls(shown(&tls)),
            None if is_connect || is_timeout => Self::Connect(text),
            None => Self::Broken(text),
        }
    }
}

/// Returns the error of TLS that `error` is or wraps: an `io::Error` does not tell it as its source.
fn tls_cause<'a>(mut error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    while let Some(wrapping) = error.downcast_ref::<io::Error>() {
        error = wrapping.get_ref()?;
    }
    error.downcast_ref()
}

/// Returns a beginning of a foreign text, on one line.
pub(super) fn shown(text: &str) -> String {
    printable::line(text).chars().take(MAX_TEXT).collect()
}
