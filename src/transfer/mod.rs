//! Sparse transfer: a file through a pipe, as large on the way as its data, and the same file at
//! the other end: bytes, size and holes.
//!
//! ```text
//!   source ──runs──> send ──> s C w w z w C ... z C e ──> recv ──> NAME.part ──> NAME
//!            SEEK_DATA,         records of an rbd diff v2      │
//!            zeros found        C: what came so far is right   └─ keeper ──> NAME.part.state
//! ```
//!
//! - Records rise and leave nothing out, trailing holes included, so a receiver knows at each
//!   moment up to where its file is whole.
//! - What came since the last checkpoint is believed only when the next one vouches for it, and a
//!   file gets its name only when the last one vouched for all of it.
//! - `NAME.part.state` says how far the file is whole *and durable*: it is written after its data
//!   were synced, by a thread of its own, so that the stream does not wait for the disk.
//!
//! `docs/transfer.md` has the format of a checkpoint and the promises.

pub mod checkpoint;
mod destination;
mod error;
mod onto;
mod record_reader;
mod recv;
mod send;
mod send_android;
mod source;
mod state;
mod target;
mod zeros;

pub use error::TransferError;
pub use recv::{ReceivePlan, ReceiveStart, Received, receive, resume_offset};
pub use send::{Changes, SendPlan, Sent, send};
pub use source::{TransferSource, ZeroDetection};

/// What goes over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TransferFormat {
    /// The records of an rbd diff, version 2, with checkpoints.
    #[default]
    Rbd,
    /// The bytes alone, in order.
    Raw,
    /// An Android sparse image.
    AndroidSparse,
}

/// How far a transfer is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferProgress {
    /// The offset it began at.
    pub from: u64,
    /// The offset it has reached.
    pub reached: u64,
    /// Where it ends, when that is known.
    pub size: Option<u64>,
    /// Bytes of data so far.
    pub data: u64,
    /// Bytes of holes and zeros so far.
    pub holes: u64,
}

/// How often a pipe is written and read: half of the second-level cache of common processors, so
/// what was just hashed is still there when it is copied.
const BUFFER_SIZE: usize = 256 << 10;
