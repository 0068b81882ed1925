//! Receiving the records of an rbd diff, with or without our checkpoints.

use std::io::{self, Read};
use std::ops::Range;

use super::super::BUFFER_SIZE;
use super::head::StreamHead;
use super::receiver::{ReceiveError, Receiver};
use crate::formats::rbd::checkpoint::{Checkpoint, CheckpointKind};
use crate::formats::rbd::{CheckedReader, CheckedRecord, RbdRecord};

impl Receiver<'_> {
    /// Receives the records of a stream.
    pub(super) fn receive_records<R: Read>(
        &mut self,
        wire: &mut CheckedReader<R>,
        head: StreamHead,
    ) -> Result<(), ReceiveError> {
        let ours = head.checkpoint;
        let has_gaps = head.since.is_some() || ours.is_none();
        let mut verified = ours.map_or(0, |checkpoint| checkpoint.end);
        let mut next = head.next_record;
        let mut is_whole = false;
        let mut buffer = vec![0; BUFFER_SIZE];
        loop {
            let record = match next.take() {
                Some(record) => record,
                None => wire.next_record().map_err(ReceiveError::Stream)?,
            };
            // Nothing may change what the last checkpoint has vouched for, so only the end may
            // follow it.
            if is_whole != (record == CheckedRecord::Rbd(RbdRecord::End))
                && (ours.is_some() || is_whole)
            {
                return Err(ReceiveError::Stream(damaged_error()));
            }
            match record {
                CheckedRecord::Rbd(RbdRecord::End) => return Ok(()),
                CheckedRecord::Rbd(RbdRecord::Since(_)) => {
                    return Err(ReceiveError::Stream(damaged_error()));
                }
                CheckedRecord::Rbd(RbdRecord::Size(size)) => self.resize(size)?,
                CheckedRecord::Rbd(RbdRecord::Data(range)) => {
                    self.check_range(&range, ours.is_some(), has_gaps)?;
                    let mut read = |buf: &mut [u8]| wire.read_bytes(buf);
                    self.write_data(range, &mut buffer, &mut read)?;
                }
                CheckedRecord::Rbd(RbdRecord::Zeros(range)) => {
                    self.check_range(&range, ours.is_some(), has_gaps)?;
                    self.write_zeros(range)?;
                    (self.on_progress)(&self.progress);
                }
                CheckedRecord::Checkpoint(checkpoint, kind) => {
                    is_whole = kind == CheckpointKind::Last;
                    self.apply_checkpoint(checkpoint, ours, verified, has_gaps, is_whole)?;
                    verified = checkpoint.end;
                }
            }
        }
    }

    /// Checks whether a record may cover `range` at this point of the stream.
    fn check_range(
        &self,
        range: &Range<u64>,
        is_ours: bool,
        has_gaps: bool,
    ) -> Result<(), ReceiveError> {
        let is_next = range.start == self.progress.reached;
        let is_later = has_gaps && range.start >= self.progress.reached;
        if range.end > self.progress.size.unwrap_or(0) || is_ours && !is_next && !is_later {
            return Err(ReceiveError::Stream(damaged_error()));
        }
        Ok(())
    }

    fn resize(&mut self, size: u64) -> Result<(), ReceiveError> {
        if size > crate::config::MAX_SIZE {
            return Err(ReceiveError::Stream(damaged_error()));
        }
        self.progress.size = Some(size);
        self.state.size = size;
        self.target.set_size(size).map_err(ReceiveError::Target)
    }

    fn apply_checkpoint(
        &mut self,
        checkpoint: Checkpoint,
        ours: Option<Checkpoint>,
        verified: u64,
        has_gaps: bool,
        is_whole: bool,
    ) -> Result<(), ReceiveError> {
        let is_reached = if has_gaps {
            checkpoint.end >= self.progress.reached
        } else {
            checkpoint.end == self.progress.reached
        };
        let is_its = ours.is_some_and(|first| {
            (first.identity, first.origin) == (checkpoint.identity, checkpoint.origin)
        });
        let is_all = !is_whole || Some(checkpoint.end) == self.progress.size;
        if !is_its || !is_reached || !is_all || checkpoint.start != verified {
            return Err(ReceiveError::Stream(damaged_error()));
        }
        self.progress.reached = checkpoint.end;
        self.target.flush_hole().map_err(ReceiveError::Target)?;
        self.is_verified = is_whole;
        self.state.offset = self.state.offset.max(checkpoint.end);
        if let Some((_, state_writer)) = &self.part
            && !is_whole
        {
            state_writer.submit(self.state.clone());
        }
        Ok(())
    }
}

/// Returns the error for input that no sender can have sent.
fn damaged_error() -> io::Error {
    io::ErrorKind::InvalidData.into()
}
