//! Connections: to the host of the image with all that makes this side known to it, to others without.

use std::sync::OnceLock;
use std::time::Duration;

use reqwest::{Client, redirect};

use super::error::HttpError;
use super::url::HttpUrl;
use crate::remote::tls::{TlsFileError, TlsFiles};

/// How long an unused connection is kept: servers close them after 5 to 75 s.
const IDLE: Duration = Duration::from_secs(60);
/// A peer that vanished without a word is found after 10 s + 3 probes of 5 s when nothing is sent,
/// and after 20 s when what was sent is not acknowledged (tcp(7)).
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(10), Duration::from_secs(5), 3);
const USER_TIMEOUT: Duration = Duration::from_secs(20);
/// The most headers of an answer; its head may have 400 KiB in all, by `hyper`'s default.
const MAX_HEADERS: usize = 128;

/// The connections of one image.
pub(super) struct Connections {
    /// The address of the image.
    home: HttpUrl,
    tls: TlsFiles,
    conns: usize,
    ours: Client,
    /// Made with the first redirect to another host.
    foreign: OnceLock<Client>,
}

impl Connections {
    /// Prepares connections to `home`, at most `conns` of which are kept for later requests.
    ///
    /// # Errors
    /// [`HttpError::TlsSettings`].
    pub(super) fn new(home: &HttpUrl, tls: &TlsFiles, conns: usize) -> Result<Self, HttpError> {
        let ours = client(home, tls, conns)?;
        let (home, tls) = (home.clone(), tls.clone());
        Ok(Self { home, tls, conns, ours, foreign: OnceLock::new() })
    }

    /// Whether what makes this side known may be sent to `url`.
    pub(super) fn is_home(&self, url: &HttpUrl) -> bool {
        self.home.is_same_origin(url)
    }

    /// Returns the client for `url`: to another host without our certificate.
    ///
    /// # Errors
    /// [`HttpError::TlsSettings`].
    pub(super) fn to(&self, url: &HttpUrl) -> Result<&Client, HttpError> {
        if self.is_home(url) {
            return Ok(&self.ours);
        }
        if let Some(client) = self.foreign.get() {
            return Ok(client);
        }
        let tls = TlsFiles { authorities: self.tls.authorities.clone(), identity: None };
        // Encrypted or not: a host without authorities is no reason to refuse what is not.
        let made = client(url, &tls, self.conns)?;
        Ok(self.foreign.get_or_init(|| made))
    }
}

/// Makes a client that does nothing by itself: it neither follows nor decodes. It takes the proxies that
/// the environment names.
fn client(url: &HttpUrl, tls: &TlsFiles, conns: usize) -> Result<Client, HttpError> {
    let unusable = |error: TlsFileError| HttpError::TlsSettings(error.to_string());
    let config = match tls.load() {
        Ok(config) => config,
        // No certificate is looked at.
        Err(_) if !url.is_encrypted() => TlsFiles::trust_nobody().map_err(unusable)?,
        Err(error) => return Err(unusable(error)),
    };
    let (idle, interval, probes) = KEEPALIVE;
    Client::builder()
        .tls_backend_preconfigured(config)
        .http1_only()
        .http1_max_headers(MAX_HEADERS)
        .redirect(redirect::Policy::none())
        .retry(reqwest::retry::never())
        .user_agent(concat!("cowslip/", env!("CARGO_PKG_VERSION")))
        .pool_max_idle_per_host(conns)
        .pool_idle_timeout(IDLE)
        .tcp_nodelay(true)
        .tcp_keepalive(idle)
        .tcp_keepalive_interval(interval)
        .tcp_keepalive_retries(probes)
        .tcp_user_timeout(USER_TIMEOUT)
        .build()
        .map_err(|error| HttpError::TlsSettings(HttpError::from(error).to_string()))
}
