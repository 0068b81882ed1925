//! Why a server cannot be used.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use thiserror::Error;

use super::codec::handshake::HandshakeError;
use crate::host::os_message;

/// The reason why there is no connection; one line without the name of the server.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum NbdError {
    #[error("cannot find the host '{host}': {why}")]
    Resolve { host: String, why: String },
    #[error("cannot connect: {text}")]
    Connect { errno: Option<i32>, text: String },
    #[error("the server did not answer within {} s", .0.as_secs_f32())]
    Timeout(Duration),
    #[error("the connection broke during the handshake: {0}")]
    Broken(String),
    #[error(transparent)]
    Handshake(#[from] HandshakeError),
    #[error("TLS failed: {0}")]
    Tls(String),
    #[error("TLS cannot be used: {0}")]
    TlsSettings(String),
    /// The program that is to be the server.
    #[error("{0}")]
    Program(String),
    #[error("the server exports the image read-only: take mode=ro or an overlay")]
    ReadOnly,
    #[error("the image is another one by now: {0}")]
    Changed(String),
    #[error("the server offers other requests than before, until it is as it was: {0}")]
    Differs(String),
    #[error("it was closed meanwhile")]
    Stopped,
}

impl NbdError {
    /// Describes a connect(2) that failed.
    pub(super) fn connect(error: &io::Error) -> Self {
        Self::Connect { errno: error.raw_os_error(), text: os_message(error) }
    }

    /// Returns whether the server may only not be up yet.
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            // EAI_AGAIN (getaddrinfo(3)), of which only the text is left.
            Self::Resolve { why, .. } => why.contains("emporary failure"),
            Self::Connect { errno, .. } => errno.is_some_and(is_passing),
            Self::Handshake(error) => error.is_transient(),
            Self::Timeout(_) | Self::Broken(_) | Self::Differs(_) => true,
            Self::Tls(_)
            | Self::TlsSettings(_)
            | Self::Program(_)
            | Self::ReadOnly
            | Self::Changed(_)
            | Self::Stopped => false,
        }
    }
}

/// Returns whether a server that is being started, or a network that is down, explains the errno.
fn is_passing(errno: i32) -> bool {
    [
        libc::ECONNREFUSED,
        libc::ECONNRESET,
        libc::ECONNABORTED,
        libc::ENOENT,
        libc::ETIMEDOUT,
        libc::EHOSTUNREACH,
        libc::EHOSTDOWN,
        libc::ENETUNREACH,
        libc::ENETDOWN,
        libc::EAGAIN,
    ]
    .contains(&errno)
}

/// Why encrypted bytes could not be taken.
#[derive(Debug)]
#[cfg_attr(not(feature = "network"), allow(dead_code, reason = "only TLS makes one"))]
pub(super) enum TakeError {
    Socket(Errno),
    Tls(String),
}
