//! Plain bytes: zeros become holes, and the end is where the input ends.

use std::io::{self, Read};

use super::super::BUFFER;
use super::super::zeros::{Holds, runs};
use super::receiver::{Failed, Receiver};

impl Receiver<'_> {
    /// Takes plain bytes up to the end of the input.
    pub(super) fn plain<R: Read>(&mut self, mut input: R) -> Result<(), Failed> {
        let mut buffer = vec![0; BUFFER];
        let mut at = 0;
        self.told.size = None;
        loop {
            let got = fill(&mut input, &mut buffer).map_err(Failed::Stream)?;
            for (run, holds) in runs(&buffer[..got], at) {
                let (start, end) = (at + run.start as u64, at + run.end as u64);
                let done = match holds {
                    Holds::Data => {
                        self.check_limit(end - start)?;
                        self.told.data += end - start;
                        self.target.write(&buffer[run], start)
                    }
                    Holds::Zeros => {
                        self.told.holes = self.told.holes.saturating_add(end - start);
                        self.target.hole(start..end)
                    }
                };
                done.map_err(Failed::Target)?;
            }
            at += got as u64;
            self.told.reached = at;
            (self.tell)(&self.told);
            if got < BUFFER {
                self.told.size = Some(at);
                return self.target.set_size(at).map_err(Failed::Target);
            }
        }
    }
}

fn fill(input: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match input.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
