//! A reader of the records of a stream that hashes the wire on the way.

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;

use super::checkpoint::{
    CHECKPOINT_MAGIC, CHECKPOINT_TAG, Checkpoint, CheckpointKind, HashChain, LAST_PAYLOAD_LEN,
    PAYLOAD_LEN,
};
use crate::formats::rbd::{RbdDecoder, RbdRecord};

/// The most bytes of an unknown record that are skipped: 1 MiB, the same limit as in the decoder.
/// Such records hold names.
const MAX_SKIPPED: u64 = 1 << 20;
/// The longest accepted name of a snapshot in bytes: the host's limit for a file name.
const MAX_NAME_LEN: u64 = 255;
/// The input buffer in bytes, large enough for headers; longer reads bypass it.
const HEADER_BUFFER: usize = 4096;

/// A record that a receiver understands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TransferRecord {
    /// The size of the disk in bytes.
    Size(u64),
    /// The stream contains only the changes since this snapshot.
    Since(String),
    /// The bytes of this range follow.
    Data(Range<u64>),
    /// This range reads as zeros.
    Zeros(Range<u64>),
    /// The stream since the last checkpoint is correct.
    Checkpoint(Checkpoint, CheckpointKind),
    /// The stream is complete.
    End,
}

/// A reader of the records of a stream.
pub(super) struct RecordReader<R> {
    decoder: RbdDecoder<HashingReader<R>>,
}

/// The input, with a hash of everything read from it.
struct HashingReader<R> {
    input: BufReader<R>,
    chain: HashChain,
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buf)?;
        self.chain.update(&buf[..len]);
        Ok(len)
    }
}

impl<R: Read> HashingReader<R> {
    /// Returns the next byte without consuming it.
    fn peek(&mut self) -> io::Result<u8> {
        loop {
            match self.input.fill_buf() {
                Ok(bytes) => {
                    let first = bytes.first().copied();
                    return first.ok_or_else(|| io::ErrorKind::UnexpectedEof.into());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl<R: Read> RecordReader<R> {
    /// Reads the banner of the stream.
    ///
    /// # Errors
    /// `InvalidData` for a different banner; `UnexpectedEof`; the errors of `input`.
    pub(super) fn new(input: R) -> io::Result<Self> {
        let input = BufReader::with_capacity(HEADER_BUFFER, input);
        let decoder = RbdDecoder::new(HashingReader { input, chain: HashChain::default() })?;
        Ok(Self { decoder })
    }

    /// Returns the next record; unknown records are skipped.
    ///
    /// # Errors
    /// `InvalidData` for an impossible record, or a checkpoint whose hash does not match;
    /// `UnexpectedEof`; the errors of the input.
    pub(super) fn next_record(&mut self) -> io::Result<TransferRecord> {
        loop {
            match self.decoder.input().peek()? {
                b's' | b'w' | b'z' | b'e' => {
                    return Ok(match self.decoder.next_record()? {
                        RbdRecord::Size(size) => TransferRecord::Size(size),
                        RbdRecord::Data(range) => TransferRecord::Data(range),
                        RbdRecord::Zeros(range) => TransferRecord::Zeros(range),
                        RbdRecord::End => TransferRecord::End,
                    });
                }
                _ => {
                    if let Some(event) = self.other_record()? {
                        return Ok(event);
                    }
                }
            }
        }
    }

    /// Fills `buf` with bytes of the last data record.
    pub(super) fn read_bytes(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.decoder.input().read_exact(buf)
    }

    /// Reads a record that the decoder would skip.
    fn other_record(&mut self) -> io::Result<Option<TransferRecord>> {
        let input = self.decoder.input();
        let [tag] = input.read_array()?;
        let len = u64::from_le_bytes(input.read_array()?);
        match tag {
            b'f' => self.read_since(len).map(Some),
            CHECKPOINT_TAG if len == PAYLOAD_LEN || len == LAST_PAYLOAD_LEN => {
                self.read_checkpoint(len)
            }
            _ => self.skip(len).map(|()| None),
        }
    }

    fn read_since(&mut self, len: u64) -> io::Result<TransferRecord> {
        let input = self.decoder.input();
        let name_len = u32::from_le_bytes(input.read_array()?);
        if len != u64::from(name_len) + 4 || u64::from(name_len) > MAX_NAME_LEN {
            return Err(damaged_error());
        }
        let mut name = Vec::new();
        input.by_ref().take(u64::from(name_len)).read_to_end(&mut name)?;
        if name.len() as u64 != u64::from(name_len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        String::from_utf8(name).map(TransferRecord::Since).map_err(|_| damaged_error())
    }

    fn read_checkpoint(&mut self, len: u64) -> io::Result<Option<TransferRecord>> {
        let input = self.decoder.input();
        if input.read_array::<8>()? != CHECKPOINT_MAGIC {
            // Another program's record.
            return self.skip(len - 8).map(|()| None);
        }
        let mark = Checkpoint::decode(&input.read_array()?);
        let (piece, whole) = input.chain.end_piece();
        let mut said = [0; 16];
        // Read past the hash: these bytes are not part of any piece.
        input.input.read_exact(&mut said)?;
        let mut is_right = said == piece;
        let mut stage = CheckpointKind::Middle;
        if len == LAST_PAYLOAD_LEN {
            stage = CheckpointKind::Last;
            input.input.read_exact(&mut said)?;
            is_right &= said == whole;
        }
        if is_right {
            Ok(Some(TransferRecord::Checkpoint(mark, stage)))
        } else {
            Err(damaged_error())
        }
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(damaged_error());
        }
        let input = self.decoder.input();
        let skipped = io::copy(&mut input.by_ref().take(len), &mut io::sink())?;
        if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

/// Returns the error for input that no sender can have sent.
pub(super) fn damaged_error() -> io::Error {
    io::ErrorKind::InvalidData.into()
}
