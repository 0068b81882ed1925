//! The settings of a client, and what it says of itself.

use std::path::PathBuf;
use std::time::Duration;

use thiserror::Error;

use crate::remote::nbd::error::NbdError;
use crate::remote::tls::TlsFiles;

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
    /// How long [`open`](super::NbdClient::open) waits for a server that is not up; zero tries once.
    pub(crate) open_timeout: Duration,
    /// The most connections.
    pub(crate) connections: usize,
    /// Whether the image is to be changed.
    pub(crate) access: Access,
    /// The files of TLS.
    pub(crate) tls: TlsFiles,
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
