//! Images on servers: read over the network, and kept in a cache on the host.
//!
//! ```text
//!   RemoteBase (a Layer)      what is cached answers at once; the rest is fetched. RemoteDisk
//!     │     │     │           (mode=rw) keeps nothing and asks the transport itself
//!     │     │     └── cache/  the bytes that were fetched, and which these are
//!     │     └── plan.rs       what to fetch for a read, and what to read ahead (pure)
//!     ├── known_extents.rs    where there are holes, as the server tells or a bmap says
//!     ├── bmap/               what was fetched matches the checksums of a bmap
//!     ├── trace/              what is read first: recorded, and fetched ahead the next time
//!     └── fetcher.rs          each byte once; what somebody waits for first
//!           └── transport.rs  asks the server, many requests at a time
//!                 ├── nbd/    the protocols
//!                 └── http/
//! ```
//!
//! A file of this host that a program reads is asked in the same way (`served.rs`).

mod answer;
mod base;
mod bmap;
mod cache;
mod commit;
mod error;
mod extent_cache;
mod fetcher;
#[cfg(feature = "network")]
mod http;
mod image;
mod known_extents;
mod nbd;
mod open;
mod plan;
mod samples;
mod served;
mod servers;
mod tls;
mod trace;
mod transport;
mod waited_extents;
mod watched_samples;
mod writable;
mod writer_guard;

pub use self::base::{RemoteBase, RemoteStatus};
pub use self::bmap::{CompareError, SumStatus};
pub use self::error::RemoteError;
pub use self::image::RemoteImage;
#[doc(hidden)]
pub use self::nbd::fuzzing;
pub(crate) use self::nbd::{IMAGE_PATH, Jail, SHELL, ServerProgram};
pub use self::open::{open, open_writable};
pub(crate) use self::open::{serve, set_io_timeout};
pub(crate) use self::served::ServedImage;
pub use self::servers::add_server;
pub use self::writable::RemoteDisk;

/// Why a build without the feature `network` cannot open an image.
#[cfg(not(feature = "network"))]
const NO_NETWORK: &str = "this cowslip was built without HTTP and TLS (the feature 'network')";

/// The granularity of what is fetched and kept, in bytes: a page.
const BLOCK_SIZE: u64 = 4 << 10;

#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
