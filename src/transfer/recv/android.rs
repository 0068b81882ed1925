//! Receiving an Android sparse image into a file with holes or a device.
//!
//! | chunk | becomes |
//! |---|---|
//! | RAW | the same bytes |
//! | FILL | a hole if the pattern is zeros, else the repeated pattern |
//! | DONT_CARE | the old content of a device or of the `--onto` file; otherwise a hole |
//! | CRC32 | nothing; the checksum must be correct |

use std::io::{self, BufReader, Read};

use super::super::{BUFFER_SIZE, TransferError};
use super::head::StreamHead;
use super::receiver::{ReceiveError, Receiver};
use crate::formats::android::{AndroidDecoder, AndroidRecord, Checksums};
use crate::host::os_message;

/// The input buffer in bytes, large enough for headers; longer reads bypass it.
const HEADER_BUFFER: usize = 4096;

/// An image being read.
pub(super) type AndroidImage<R> = AndroidDecoder<BufReader<R>>;

/// Reads the header of an image.
pub(super) fn open_image<R: Read>(
    input: R,
) -> Result<(AndroidImage<R>, StreamHead), TransferError> {
    let begun = (|| {
        let input = BufReader::with_capacity(HEADER_BUFFER, input);
        let mut image = AndroidDecoder::new(input, Checksums::Verify)?;
        match image.next_record()? {
            AndroidRecord::Size(size) if size <= crate::config::MAX_SIZE => {
                Ok((image, StreamHead::with_size(size)))
            }
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it is larger than a disk can be")),
        }
    })();
    begun.map_err(|error: io::Error| {
        let what = match error.kind() {
            io::ErrorKind::UnexpectedEof => "the stream was cut at its beginning".to_owned(),
            io::ErrorKind::InvalidData => format!("what arrives cannot be taken: {error}"),
            _ => format!("cannot read the stream: {}", os_message(&error)),
        };
        TransferError::Broken { what, left: "nothing was written".to_owned() }
    })
}

impl Receiver<'_> {
    /// Receives the chunks of an image.
    pub(super) fn receive_android<R: Read>(
        &mut self,
        image: &mut AndroidImage<R>,
    ) -> Result<(), ReceiveError> {
        let mut buffer = vec![0; BUFFER_SIZE];
        loop {
            match image.next_record().map_err(ReceiveError::Stream)? {
                // The size was read first.
                AndroidRecord::Size(_) => {}
                AndroidRecord::Data(range) => {
                    let mut read = |buf: &mut [u8]| image.body().read_exact(buf);
                    self.write_data(range, &mut buffer, &mut read)?;
                }
                AndroidRecord::Fill(range, [0, 0, 0, 0]) => self.write_zeros(range)?,
                AndroidRecord::Fill(range, value) => {
                    self.check_space(range.end - range.start)?;
                    // Every piece begins at a multiple of the buffer's length in the range.
                    buffer.chunks_exact_mut(4).for_each(|four| four.copy_from_slice(&value));
                    self.write_data(range, &mut buffer, &mut |_| Ok(()))?;
                }
                AndroidRecord::DontCare(range) if self.keeps_old_content => {
                    self.progress.reached = range.end;
                }
                AndroidRecord::DontCare(range) => self.write_zeros(range)?,
                AndroidRecord::End => {
                    return self.target.flush_hole().map_err(ReceiveError::Target);
                }
            }
            (self.on_progress)(&self.progress);
        }
    }
}
