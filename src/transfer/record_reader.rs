//! What arrives, record by record, with the hashes of the wire kept on the way.

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;

use super::checkpoint::{
    CHECKPOINT_MAGIC, CHECKPOINT_TAG, Checkpoint, CheckpointKind, HashChain, LAST_PAYLOAD_LEN,
    PAYLOAD_LEN,
};
use crate::stream::frames::rbd::{RbdDecoder, RbdRecord};

/// The most that an unknown record may hold: 1 MiB, as the decoder has it. Those hold names.
const MAX_SKIPPED: u64 = 1 << 20;
/// The longest name of a snapshot that is taken: what the host allows for a file's.
const MAX_NAME_LEN: u64 = 255;
/// Enough for headers; what is longer is read past it.
const HEADER_BUFFER: usize = 4096;

/// A record that means something here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum TransferRecord {
    /// The size of the disk.
    Size(u64),
    /// It holds only what changed since this snapshot.
    Since(String),
    /// These bytes come next.
    Data(Range<u64>),
    /// This reads as zeros.
    Zeros(Range<u64>),
    /// What came since the last of these is right.
    Checkpoint(Checkpoint, CheckpointKind),
    /// It is over.
    End,
}

/// The records of a stream.
pub(super) struct RecordReader<R> {
    decoder: RbdDecoder<HashingReader<R>>,
}

/// The input, of which everything read is hashed.
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
    /// The next byte, which is not read yet.
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
    /// Reads the banner.
    ///
    /// # Errors
    /// `InvalidData` for another one; `UnexpectedEof`; `input`'s own.
    pub(super) fn new(input: R) -> io::Result<Self> {
        let input = BufReader::with_capacity(HEADER_BUFFER, input);
        let decoder = RbdDecoder::new(HashingReader { input, chain: HashChain::default() })?;
        Ok(Self { decoder })
    }

    /// The next record; unknown ones are skipped.
    ///
    /// # Errors
    /// `InvalidData` for what cannot be, or a checkpoint that does not hold; `UnexpectedEof`;
    /// the input's own.
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

    /// Fills `buf` with bytes of the data record that came last.
    pub(super) fn read_bytes(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.decoder.input().read_exact(buf)
    }

    /// A record that the decoder would skip.
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
            // Somebody else's.
            return self.skip(len - 8).map(|()| None);
        }
        let mark = Checkpoint::decode(&input.read_array()?);
        let (piece, whole) = input.chain.end_piece();
        let mut said = [0; 16];
        // Past the hash: these are not part of any piece.
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

/// What arrived cannot be what was sent.
pub(super) fn damaged_error() -> io::Error {
    io::ErrorKind::InvalidData.into()
}
