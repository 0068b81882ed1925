//! The errors of opening an image on a server.

use crate::config::RemoteAddress;

/// The reason why an image on a server cannot be opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The address is malformed.
    #[error("'{address}': {why}")]
    Address {
        /// The address.
        address: RemoteAddress,
        /// The problem, and what to write instead.
        why: String,
    },
    /// The server cannot be reached, refuses the image, or answers what no server should.
    #[error("'{address}': {why}")]
    Server {
        /// The address.
        address: RemoteAddress,
        /// The problem, and what to do.
        why: String,
    },
    /// Something that a disk does with the image is not possible now.
    #[error("'{address}': {why}")]
    Refused {
        /// The address.
        address: RemoteAddress,
        /// The reason, and what to do.
        why: String,
    },
    /// What is fetched has no place on this host.
    #[error("'{address}': no place for what is fetched: {why}")]
    Cache {
        /// The address.
        address: RemoteAddress,
        /// The problem, and what to do.
        why: String,
    },
}
