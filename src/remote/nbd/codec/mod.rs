//! The NBD protocol without I/O (doc/proto.md of the NBD project).
//!
//! ```text
//!   server's bytes ──▶ Handshake ──▶ Export             which image, how large, what it takes
//!   server's bytes ──▶ Replies   ──▶ Event, Event ...   answers to requests
//!   encode ──▶ our bytes
//! ```
//!
//! What a server says is hostile until it is checked: every length is bounded before it is allocated,
//! the bytes of a read are counted, and a message that makes no sense ends the connection.

mod coverage;
pub(super) mod export;
pub(super) mod handshake;
pub(super) mod replies;
pub(super) mod request;
mod status;
pub(super) mod wire;

/// The form of requests and replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Headers {
    /// Compact requests, one simple reply each.
    Simple,
    /// Compact requests, replies in chunks.
    Structured,
    /// Extended requests, replies in chunks; all lengths have 64 bits.
    Extended,
}
