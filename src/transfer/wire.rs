//! What arrives, record by record, with the hashes of the wire kept on the way.

use std::io::{self, BufRead, BufReader, Read};
use std::ops::Range;

use super::checkpoint::{Chain, LAST_LEN, LEN, MAGIC, Mark, Stage, TAG};
use crate::stream::frames::rbd::{Decoder, Record};

/// The most that an unknown record may hold: 1 MiB, as the decoder has it. Those hold names.
const MAX_SKIPPED: u64 = 1 << 20;
/// The longest name of a snapshot that is taken: what the host allows for a file's.
const MAX_NAME: u64 = 255;
/// Enough for headers; what is longer is read past it.
const AHEAD: usize = 4096;

/// A record that means something here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The size of the disk.
    Size(u64),
    /// It holds only what changed since this snapshot.
    Since(String),
    /// These bytes come next.
    Data(Range<u64>),
    /// This reads as zeros.
    Zeros(Range<u64>),
    /// What came since the last of these is right.
    Checkpoint(Mark, Stage),
    /// It is over.
    End,
}

/// The records of a stream.
pub(super) struct Wire<R> {
    decoder: Decoder<Hashed<R>>,
}

/// The input, of which everything read is hashed.
struct Hashed<R> {
    input: BufReader<R>,
    chain: Chain,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.input.read(buf)?;
        self.chain.update(&buf[..len]);
        Ok(len)
    }
}

impl<R: Read> Hashed<R> {
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

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

impl<R: Read> Wire<R> {
    /// Reads the banner.
    ///
    /// # Errors
    /// `InvalidData` for another one; `UnexpectedEof`; `input`'s own.
    pub(super) fn new(input: R) -> io::Result<Self> {
        let input = BufReader::with_capacity(AHEAD, input);
        let decoder = Decoder::new(Hashed { input, chain: Chain::default() })?;
        Ok(Self { decoder })
    }

    /// The next record; unknown ones are skipped.
    ///
    /// # Errors
    /// `InvalidData` for what cannot be, or a checkpoint that does not hold; `UnexpectedEof`;
    /// the input's own.
    pub(super) fn event(&mut self) -> io::Result<Event> {
        loop {
            match self.decoder.input().peek()? {
                b's' | b'w' | b'z' | b'e' => {
                    return Ok(match self.decoder.next_record()? {
                        Record::Size(size) => Event::Size(size),
                        Record::Data(range) => Event::Data(range),
                        Record::Zeros(range) => Event::Zeros(range),
                        Record::End => Event::End,
                    });
                }
                _ => {
                    if let Some(event) = self.other()? {
                        return Ok(event);
                    }
                }
            }
        }
    }

    /// Fills `buf` with bytes of the data record that came last.
    pub(super) fn bytes(&mut self, buf: &mut [u8]) -> io::Result<()> {
        self.decoder.input().read_exact(buf)
    }

    /// A record that the decoder would skip.
    fn other(&mut self) -> io::Result<Option<Event>> {
        let input = self.decoder.input();
        let [tag] = input.array()?;
        let len = u64::from_le_bytes(input.array()?);
        match tag {
            b'f' => self.since(len).map(Some),
            TAG if len == LEN || len == LAST_LEN => self.checkpoint(len),
            _ => self.skip(len).map(|()| None),
        }
    }

    fn since(&mut self, len: u64) -> io::Result<Event> {
        let input = self.decoder.input();
        let name_len = u32::from_le_bytes(input.array()?);
        if len != u64::from(name_len) + 4 || u64::from(name_len) > MAX_NAME {
            return Err(damaged());
        }
        let mut name = Vec::new();
        input.by_ref().take(u64::from(name_len)).read_to_end(&mut name)?;
        if name.len() as u64 != u64::from(name_len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        String::from_utf8(name).map(Event::Since).map_err(|_| damaged())
    }

    fn checkpoint(&mut self, len: u64) -> io::Result<Option<Event>> {
        let input = self.decoder.input();
        if input.array::<8>()? != MAGIC {
            // Somebody else's.
            return self.skip(len - 8).map(|()| None);
        }
        let mark = Mark::of(&input.array()?);
        let (piece, whole) = input.chain.close();
        let mut said = [0; 16];
        // Past the hash: these are not part of any piece.
        input.input.read_exact(&mut said)?;
        let mut is_right = said == piece;
        let mut stage = Stage::Middle;
        if len == LAST_LEN {
            stage = Stage::Last;
            input.input.read_exact(&mut said)?;
            is_right &= said == whole;
        }
        if is_right { Ok(Some(Event::Checkpoint(mark, stage))) } else { Err(damaged()) }
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(damaged());
        }
        let input = self.decoder.input();
        let skipped = io::copy(&mut input.by_ref().take(len), &mut io::sink())?;
        if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }
}

/// What arrived cannot be what was sent.
pub(super) fn damaged() -> io::Error {
    io::ErrorKind::InvalidData.into()
}
