//! Receiving plain bytes: zeros become holes, and the file ends where the input ends.

use std::io::Read;

use super::super::BUFFER_SIZE;
use super::super::zeros::split_zeros;
use super::receiver::{ReceiveError, Receiver};
use crate::formats::RunContent;
use crate::host::read_full;

impl Receiver<'_> {
    /// Receives plain bytes up to the end of the input.
    pub(super) fn receive_raw<R: Read>(&mut self, mut input: R) -> Result<(), ReceiveError> {
        let mut buffer = vec![0; BUFFER_SIZE];
        let mut at = 0;
        self.progress.size = None;
        loop {
            let got = read_full(&mut input, &mut buffer).map_err(ReceiveError::Stream)?;
            for (run, content) in split_zeros(&buffer[..got], at) {
                let (start, end) = (at + run.start as u64, at + run.end as u64);
                let done = match content {
                    RunContent::Data => {
                        self.check_limit(end - start)?;
                        self.progress.data += end - start;
                        self.target.write(&buffer[run], start)
                    }
                    RunContent::Zeros => {
                        self.progress.holes = self.progress.holes.saturating_add(end - start);
                        self.target.write_hole(start..end)
                    }
                };
                done.map_err(ReceiveError::Target)?;
            }
            at += got as u64;
            self.progress.reached = at;
            (self.on_progress)(&self.progress);
            if got < BUFFER_SIZE {
                self.progress.size = Some(at);
                return self.target.set_size(at).map_err(ReceiveError::Target);
            }
        }
    }
}
