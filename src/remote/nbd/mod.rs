//! Images on NBD servers (doc/proto.md of the NBD project).
//!
//! ```text
//!   uri       what the user writes ──▶ NbdTarget
//!   client    NbdClient, a Transport: requests, reconnects, timeouts
//!     ├── state, request      the requests, and which connection has them
//!     ├── connection          one connection in use, and its thread
//!     └── server              makes connections, and checks that they lead to the same image
//!           ├── link          a socket, and the handshake on it
//!           ├── tls           the same, encrypted
//!           └── exec          a program that becomes the server
//!   codec     the protocol without I/O
//! ```
//!
//! Locks: the state of a client, then what a connection sends or has announced. No lock is held while
//! a receiver is called, or while anything waits.

mod client;
mod codec;
mod connection;
mod error;
mod exec;
pub mod fuzzing;
mod link;
mod request;
mod server;
mod state;
#[cfg(test)]
mod testing;
#[cfg_attr(not(feature = "network"), path = "no_tls.rs")]
mod tls;
mod uri;

pub(crate) use client::{Access, NbdClient, NbdOptions};
pub(crate) use exec::{IMAGE_PATH, Jail, SHELL, ServerProgram};
pub(crate) use uri::NbdTarget;
