//! Why a handshake fails, worded for the user.

use thiserror::Error;

use crate::printable;

/// The longest text of a server in an error, in characters.
const MAX_TEXT: usize = 200;

/// The reason why a handshake fails.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub(crate) enum HandshakeError {
    #[error("what answers there is no NBD server")]
    NotNbd,
    #[error("the server speaks only the old NBD handshake, which names no exports")]
    OldStyle,
    #[error("the server has no export named '{name}'{}", said(.text))]
    NoExport { name: String, text: String },
    #[error(
        "the server closed the connection when asked for the export '{name}': it has none of that name, or keeps it from us"
    )]
    ExportRefused { name: String },
    #[error("the server closed the connection during the handshake")]
    Closed,
    #[error("the server requires TLS: write nbds: in place of nbd:{}", said(.text))]
    TlsRequired { text: String },
    #[error("the server has no TLS: write nbd: in place of nbds: where the network may read along{}", said(.text))]
    NoTls { text: String },
    #[error("the server is being shut down{}", said(.text))]
    ShuttingDown { text: String },
    #[error("the server refuses the export (error {:#x}){}", .code, said(.text))]
    Refused { code: u32, text: String },
    #[error("the server says that the image has {0} bytes, and more than 2^63-1 cannot be")]
    TooLarge(u64),
    #[error("the server's block sizes make no sense: smallest {min}, largest payload {max}")]
    BlockSizes { min: u32, max: u32 },
    #[error("the server sent bytes before TLS began that nobody asked for")]
    BytesBeforeTls,
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
}

impl HandshakeError {
    /// Returns whether the server may answer otherwise in a moment.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Closed | Self::ShuttingDown { .. })
    }
}

fn said(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

/// Returns the text of an error of the server, on one line.
pub(in crate::remote::nbd::codec) fn text_of(data: &[u8]) -> String {
    let text = String::from_utf8_lossy(data);
    let text: String = text.trim_end_matches('\0').trim().chars().take(MAX_TEXT).collect();
    printable::line(&text).into_owned()
}
