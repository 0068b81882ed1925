//! An Android sparse image: what it holds becomes a file with holes.
//!
//! | chunk | becomes |
//! |---|---|
//! | RAW | its bytes |
//! | FILL | a hole when it is zeros, else its bytes |
//! | DONT_CARE | what was there: of a device, or of the file of `--onto`; else a hole |
//! | CRC32 | nothing; it must be right |

use std::io::{self, BufReader, Read};

use super::super::{BUFFER, TransferError};
use super::receiver::{Failed, Receiver};
use super::records::Head;
use crate::formats::android::{Checksums, Decoder, Record};
use crate::host::said;

/// Enough for headers; what is longer is read past it.
const AHEAD: usize = 4096;

/// An image that is being read.
pub(super) type Image<R> = Decoder<BufReader<R>>;

/// Reads the beginning of an image.
pub(super) fn begin<R: Read>(input: R) -> Result<(Image<R>, Head), TransferError> {
    let begun = (|| {
        let input = BufReader::with_capacity(AHEAD, input);
        let mut image = Decoder::new(input, Checksums::Verify)?;
        match image.next_record()? {
            Record::Size(size) if size <= crate::spec::MAX_SIZE => Ok((image, Head::of_size(size))),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than a disk can be")),
        }
    })();
    begun.map_err(|error: io::Error| {
        let what = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the stream was cut at its beginning".to_owned(),
            io::ErrorKind::InvalidData => format!("what arrives cannot be taken: {error}"),
            _ => format!("cannot read the stream: {}", said(&error)),
        };
        TransferError::Broken { what, left: "nothing was written".to_owned() }
    })
}

impl Receiver<'_> {
    /// Takes the chunks of an image.
    pub(super) fn sparse<R: Read>(&mut self, image: &mut Image<R>) -> Result<(), Failed> {
        let mut buffer = vec![0; BUFFER];
        loop {
            match image.next_record().map_err(Failed::Stream)? {
                // It came first.
                Record::Size(_) => {}
                Record::Data(range) => {
                    let mut read = |buf: &mut [u8]| image.body().read_exact(buf);
                    self.pieces(range, &mut buffer, &mut read)?;
                }
                Record::Fill(range, [0, 0, 0, 0]) => self.gap(range)?,
                Record::Fill(range, value) => {
                    self.check_room(range.end - range.start)?;
                    // Every piece begins at a multiple of the buffer's length in the range.
                    buffer.chunks_exact_mut(4).for_each(|four| four.copy_from_slice(&value));
                    self.pieces(range, &mut buffer, &mut |_| Ok(()))?;
                }
                Record::DontCare(range) if self.stands_on_something => {
                    self.told.reached = range.end;
                }
                Record::DontCare(range) => self.gap(range)?,
                Record::End => return self.target.settle().map_err(Failed::Target),
            }
            (self.tell)(&self.told);
        }
    }
}
