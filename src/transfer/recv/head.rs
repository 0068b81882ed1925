//! The head of a stream: all that is known of it before its first data.

use std::io::{self, Read};

use super::super::state::{ReceiveState, STATE_VERSION};
use crate::formats::rbd::checkpoint::{Checkpoint, CheckpointKind};
use crate::formats::rbd::{CheckedReader, CheckedRecord, RbdRecord};

/// The header of a stream, up to its first data.
#[derive(Debug, Default)]
pub(super) struct StreamHead {
    pub(super) size: u64,
    pub(super) since: Option<String>,
    /// The first checkpoint of the stream; streams of other senders contain none.
    pub(super) checkpoint: Option<Checkpoint>,
    /// The record after the header, which had to be read to find its end.
    pub(super) next_record: Option<CheckedRecord>,
}

impl StreamHead {
    /// Creates the header of a stream that carries only its size.
    pub(super) fn with_size(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// Returns the offset at which the stream began.
    pub(super) fn origin(&self) -> u64 {
        self.checkpoint.map_or(0, |checkpoint| checkpoint.origin)
    }

    /// Returns the state of a file of which nothing has arrived yet.
    pub(super) fn state(&self) -> ReceiveState {
        ReceiveState {
            version: STATE_VERSION,
            inode: 0,
            offset: 0,
            size: self.size,
            identity: self.checkpoint.map_or(0, |checkpoint| checkpoint.identity),
            since: self.since.clone(),
            overwrite: false,
        }
    }

    pub(super) fn read<R: Read>(wire: &mut CheckedReader<R>) -> io::Result<Self> {
        let (mut head, mut size) = (Self::default(), None);
        loop {
            match wire.next_record()? {
                CheckedRecord::Rbd(RbdRecord::Size(bytes)) => size = Some(bytes),
                CheckedRecord::Rbd(RbdRecord::Since(name)) => head.since = Some(name),
                CheckedRecord::Checkpoint(checkpoint, CheckpointKind::Middle) => {
                    head.checkpoint = Some(checkpoint);
                }
                other => head.next_record = Some(other),
            }
            if head.checkpoint.is_some() || head.next_record.is_some() {
                // A larger size than a file can have is damage, and no reason to allocate room.
                head.size = size
                    .filter(|size| *size <= crate::config::MAX_SIZE)
                    .ok_or(io::ErrorKind::InvalidData)?;
                return Ok(head);
            }
        }
    }
}
