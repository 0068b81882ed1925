//! Images on servers: read over the network, and kept in a cache on the host.
//!
//! ```text
//!   RemoteBase (a Layer)      what is cached answers at once; the rest is fetched
//!     │          │
//!     │          └── cache/   the bytes that were fetched, and which these are
//!     └── transport.rs        asks the server, many requests at a time
//!           └── nbd/          the protocols
//! ```

mod cache;
mod nbd;
mod plan;
mod transport;

#[doc(hidden)]
pub use nbd::fuzzing;

/// Bytes in a block: the unit in which the cache knows what is there.
const BLOCK_SIZE: u64 = 4096;
