//! What tests and benchmarks share: the wire between a client and a server.
//!
//! ```text
//!              .------------------- Proxy -------------------.
//!   client --> | reader: faults, counts, rate --> delay queue | --> server
//!          <-- | delay queue <-- reader                       | <--
//!              '----------------------------------------------'
//! ```
//!
//! `proxy` is the wire itself, `requests` counts what a client asks for. `wire.rs` is the program for
//! benchmarks (`contrib/bench/remote`). Other crates take this folder in by `#[path]`.

mod proxy;
mod requests;
mod stream;

pub(crate) use proxy::Proxy;
pub(crate) use requests::Protocol;
pub(crate) use stream::Endpoint;
