//! The reader of streams with checkpoints, which hashes the wire on the way.

use std::io::{self, BufReader, Read};

use super::checkpoint::{
    CHECKPOINT_MAGIC, CHECKPOINT_TAG, Checkpoint, CheckpointKind, HashChain, LAST_PAYLOAD_LEN,
    PAYLOAD_LEN,
};
use super::decoder::{RbdDecoder, RbdRecord, TaggedRecord};

/// The input buffer in bytes, large enough for headers; longer reads bypass it.
const HEADER_BUFFER: usize = 4096;

/// A record of a stream that may contain checkpoints.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum CheckedRecord {
    Rbd(RbdRecord),
    /// The stream since the last checkpoint is correct.
    Checkpoint(Checkpoint, CheckpointKind),
}

/// A reader of the records of a stream.
pub(crate) struct CheckedReader<R> {
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
    fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl<R: Read> CheckedReader<R> {
    /// Reads the banner of the stream.
    ///
    /// # Errors
    /// `InvalidData` for a different banner; `UnexpectedEof`; the errors of `input`.
    pub(crate) fn new(input: R) -> io::Result<Self> {
        let input = BufReader::with_capacity(HEADER_BUFFER, input);
        let decoder = RbdDecoder::new(HashingReader { input, chain: HashChain::default() })?;
        Ok(Self { decoder })
    }

    /// Returns the next record; unknown records are skipped.
    ///
    /// # Errors
    /// `InvalidData` for an impossible record, or a checkpoint whose hash does not match;
    /// `UnexpectedEof`; the errors of the input.
    pub(crate) fn next_record(&mut self) -> io::Result<CheckedRecord> {
        loop {
            match self.decoder.next_tagged()? {
                TaggedRecord::Known(record) => return Ok(CheckedRecord::Rbd(record)),
                TaggedRecord::Unknown { tag: CHECKPOINT_TAG, len }
                    if len == PAYLOAD_LEN || len == LAST_PAYLOAD_LEN =>
                {
                    if let Some(record) = self.read_checkpoint(len)? {
                        return Ok(record);
                    }
                }
                TaggedRecord::Unknown { len, .. } => self.decoder.skip(len)?,
            }
        }
    }

    /// Fills `buf` with bytes of the last data record.
    pub(crate) fn read_bytes(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.decoder.input().read_exact(buf)
    }

    /// Reads a payload of `len` bytes; returns `None` if the record is another program's.
    fn read_checkpoint(&mut self, len: u64) -> io::Result<Option<CheckedRecord>> {
        let input = self.decoder.input();
        if input.read_array::<8>()? != CHECKPOINT_MAGIC {
            return self.decoder.skip(len - 8).map(|()| None);
        }
        let checkpoint = Checkpoint::decode(&input.read_array()?);
        let (piece, whole) = input.chain.end_piece();
        let mut received = [0; 16];
        // Read past the hash: these bytes are not part of any piece.
        input.input.read_exact(&mut received)?;
        let mut is_right = received == piece;
        let mut kind = CheckpointKind::Middle;
        if len == LAST_PAYLOAD_LEN {
            kind = CheckpointKind::Last;
            input.input.read_exact(&mut received)?;
            is_right &= received == whole;
        }
        if is_right {
            Ok(Some(CheckedRecord::Checkpoint(checkpoint, kind)))
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}
