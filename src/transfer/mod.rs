//! Sparse transfer of a file through a pipe: the stream is as large as the data of the file, and
//! the receiver gets the same bytes, size and holes.
//!
//! ```text
//!   source ──runs──> send ──> s C w w z w C ... z C e ──> recv ──> NAME.part ──> NAME
//!            SEEK_DATA,         records of an rbd diff v2      │
//!            zeros found        C: all so far is correct       └─ StateWriter ──> NAME.part.state
//! ```
//!
//! - Records are in rising order and leave no gap, trailing holes included, so a receiver knows at
//!   each moment up to which offset its file is complete.
//! - The bytes since the last checkpoint are trusted only when the next checkpoint vouches for
//!   them, and a file gets its name only when the last checkpoint has vouched for all of it.
//! - `NAME.part.state` records the offset up to which the file is complete *and durable*: a
//!   separate thread writes it after syncing the data, so that the stream does not wait for the
//!   disk.
//!
//! [`checkpoint`](crate::formats::rbd::checkpoint) has the format of a checkpoint, and
//! `docs/transfer.md` the guarantees.

mod destination;
mod error;
mod old_copy;
mod recv;
mod send;
mod send_android;
mod send_error;
mod source;
mod state;
mod target_writer;
mod zeros;

use std::str::FromStr;

pub use error::TransferError;
pub use recv::{ReceivePlan, ReceiveStart, Received, receive, resume_offset};
pub use send::{Changes, SendPlan, Sent, send};
pub use source::{TransferSource, ZeroDetection};

/// The format of a transfer on the wire.
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

/// The error for a word that names no transfer format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write rbd, raw or android-sparse")]
pub struct UnknownFormat;

impl FromStr for TransferFormat {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "rbd" => Ok(Self::Rbd),
            "raw" => Ok(Self::Raw),
            "android-sparse" => Ok(Self::AndroidSparse),
            _ => Err(UnknownFormat),
        }
    }
}

/// The progress of a transfer; all numbers are bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferProgress {
    /// The offset at which the transfer began.
    pub from: u64,
    /// The offset that the transfer has reached.
    pub reached: u64,
    /// The size of the disk, if known.
    pub size: Option<u64>,
    /// The number of data bytes so far.
    pub data: u64,
    /// The number of bytes in holes and zeros so far.
    pub holes: u64,
}

/// Bytes read from and written to a pipe at a time: 256 KiB, half of the second-level cache of
/// common processors, so that bytes just hashed are still cached when they are copied.
const BUFFER_SIZE: usize = 256 << 10;
