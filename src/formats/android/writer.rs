//! Writes Android sparse images.

use std::io::{self, Write};
use std::ops::Range;

use super::{
    BLOCK, CHUNK_LEN, Content, DONT_CARE, FILL, HEADER_LEN, MAGIC, RAW, Run, check_size, refused,
};

/// 64 MiB: the most in one RAW chunk. `fastboot` loads whole chunks.
const MAX_RAW: u64 = 64 << 20;

/// 1 GiB: the most in one FILL chunk. libsparse up to Android 10 (Debian's `simg2img`) counts the
/// bytes of a fill with 32 bits, and drops what is more in silence.
const MAX_FILL: u64 = 1 << 30;

/// 4 TiB: the most in one DONT_CARE chunk. libsparse counts its blocks with a signed 32-bit number.
const MAX_DONT_CARE: u64 = 1 << 42;

/// What fills are parted by. libsparse joins fills that touch, and then counts their bytes with
/// 32 bits, too; it never joins RAW chunks.
static ZERO_BLOCK: [u8; 4096] = [0; 4096];

/// How many blocks and chunks an image has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Totals {
    /// Blocks of [`BLOCK`] bytes.
    pub blocks: u32,
    /// Chunks.
    pub chunks: u32,
    /// The length of the sparse image in bytes.
    pub len: u64,
}

impl Totals {
    fn add(&mut self, piece: &Piece) -> io::Result<()> {
        let more = self.chunks.checked_add(1);
        self.chunks = more.ok_or_else(|| refused("there are too many chunks".to_owned()))?;
        // It cannot overflow: 2^32 chunks of less than 2^32 bytes.
        self.len += piece.total();
        Ok(())
    }
}

/// What an image will have: the runs of it are known before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    totals: Totals,
}

impl Plan {
    /// Counts what `runs` (of [`super::whole_blocks`]) of a disk of `size` bytes become.
    ///
    /// # Errors
    /// `InvalidInput` when the runs do not follow each other from 0 to `size` in whole blocks,
    /// when `size` does not fit the format, or when there are more chunks than it can count.
    pub fn new<'a>(size: u64, runs: impl IntoIterator<Item = &'a Run>) -> io::Result<Self> {
        let mut totals = Totals { blocks: check_size(size)?, chunks: 0, len: HEADER_LEN.into() };
        let mut position = 0;
        for run in runs {
            check_next(run, position, size)?;
            for piece in Pieces::of(run) {
                totals.add(&piece)?;
            }
            position = run.range.end;
        }
        if position != size {
            return Err(refused("the runs do not reach the end of the disk".to_owned()));
        }
        Ok(Self { totals })
    }

    /// What the image will have.
    #[must_use]
    pub fn totals(&self) -> Totals {
        self.totals
    }
}

/// Writes an image, run after run.
///
/// Each run of [`super::whole_blocks`] is announced with [`Self::run`]; after a data run its bytes
/// follow with [`Self::bytes`], in pieces of any length.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
    /// Where the next run begins.
    position: u64,
    /// Data of the last run that has not been handed over.
    missing: u64,
    /// Data of the chunk at hand that has not.
    in_chunk: u64,
    totals: Totals,
    plan: Plan,
}

impl<W: Write> Writer<W> {
    /// Begins an image; `output` need not seek.
    ///
    /// # Errors
    /// `output`'s own.
    pub fn new(mut output: W, plan: Plan) -> io::Result<Self> {
        output.write_all(&header(plan.totals))?;
        let totals = Totals { chunks: 0, len: HEADER_LEN.into(), ..plan.totals };
        Ok(Self { output, position: 0, missing: 0, in_chunk: 0, totals, plan })
    }

    /// The next run; zeros and don't-cares are written at once.
    ///
    /// # Errors
    /// `InvalidInput` when it does not begin where the last one ended, is not whole blocks, or
    /// data of the last one is missing; `output`'s own.
    pub fn run(&mut self, run: &Run) -> io::Result<()> {
        if self.missing > 0 {
            return Err(refused("data of the last run is missing".to_owned()));
        }
        check_next(run, self.position, self.size())?;
        if run.content == Content::Data {
            self.missing = run.range.end - run.range.start;
        } else {
            for piece in Pieces::of(run) {
                self.chunk(&piece)?;
                match piece.kind {
                    Kind::Fill => self.output.write_all(&[0; 4])?,
                    Kind::Raw => self.output.write_all(&ZERO_BLOCK)?,
                    Kind::DontCare => {}
                }
            }
        }
        self.position = run.range.end;
        Ok(())
    }

    /// The next bytes of the data run at hand.
    ///
    /// # Errors
    /// `InvalidInput` when they are more than the run has; `output`'s own.
    pub fn bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 > self.missing {
            return Err(refused("there is more data than its run has".to_owned()));
        }
        while !bytes.is_empty() {
            if self.in_chunk == 0 {
                let len = self.missing.min(MAX_RAW);
                self.chunk(&Piece { kind: Kind::Raw, len })?;
                self.in_chunk = len;
            }
            let fits = usize::try_from(self.in_chunk).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(fits);
            self.output.write_all(now)?;
            self.in_chunk -= fits as u64;
            self.missing -= fits as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Ends the image.
    ///
    /// # Errors
    /// `InvalidInput` when it is not what was planned; `output`'s own.
    pub fn finish(mut self) -> io::Result<(W, Totals)> {
        if self.missing > 0 || self.position != self.size() || self.plan.totals != self.totals {
            return Err(refused("the image is not what its header says".to_owned()));
        }
        self.output.flush()?;
        Ok((self.output, self.totals))
    }

    fn size(&self) -> u64 {
        u64::from(self.totals.blocks) * BLOCK
    }

    fn chunk(&mut self, piece: &Piece) -> io::Result<()> {
        self.totals.add(piece)?;
        let mut bytes = [0; CHUNK_LEN as usize];
        let kind = match piece.kind {
            Kind::Raw => RAW,
            Kind::Fill => FILL,
            Kind::DontCare => DONT_CARE,
        };
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&number(piece.len / BLOCK)?.to_le_bytes());
        bytes[8..].copy_from_slice(&number(piece.total())?.to_le_bytes());
        self.output.write_all(&bytes)
    }
}

/// Refuses a run that does not go on at `position` in whole blocks, inside `size`.
fn check_next(run: &Run, position: u64, size: u64) -> io::Result<()> {
    let Range { start, end } = run.range;
    let whole = start.is_multiple_of(BLOCK) && end.is_multiple_of(BLOCK);
    if start != position || end < start || end > size || !whole {
        return Err(refused("a run does not follow the last one in whole blocks".to_owned()));
    }
    Ok(())
}

/// A chunk to be.
#[derive(Clone, Copy, Debug)]
struct Piece {
    kind: Kind,
    /// Of the disk, in bytes.
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Fill,
    DontCare,
}

impl Piece {
    /// The length of the chunk in bytes.
    fn total(&self) -> u64 {
        let body = match self.kind {
            Kind::Raw => self.len,
            Kind::Fill => 4,
            Kind::DontCare => 0,
        };
        u64::from(CHUNK_LEN) + body
    }
}

/// Splits a run into chunks.
///
/// ```text
///   zeros   |------- FILL 1 GiB -------| RAW 4 KiB |------- FILL 1 GiB -------| RAW 4 KiB |- FILL -|
/// ```
struct Pieces {
    content: Content,
    left: u64,
    last: Option<Kind>,
}

impl Pieces {
    fn of(run: &Run) -> Self {
        Self { content: run.content, left: run.range.end - run.range.start, last: None }
    }
}

impl Iterator for Pieces {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let (kind, most) = match (self.content, self.last) {
            (Content::Data, _) => (Kind::Raw, MAX_RAW),
            (Content::DontCare, _) => (Kind::DontCare, MAX_DONT_CARE),
            (Content::Zeros, Some(Kind::Fill)) => (Kind::Raw, BLOCK),
            (Content::Zeros, _) => (Kind::Fill, MAX_FILL),
        };
        let len = self.left.min(most);
        self.left -= len;
        self.last = Some(kind);
        (len > 0).then_some(Piece { kind, len })
    }
}

fn header(totals: Totals) -> [u8; HEADER_LEN as usize] {
    let mut bytes = [0; HEADER_LEN as usize];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    // Version 1.0.
    bytes[4] = 1;
    bytes[8..10].copy_from_slice(&HEADER_LEN.to_le_bytes());
    bytes[10..12].copy_from_slice(&CHUNK_LEN.to_le_bytes());
    bytes[12..16].copy_from_slice(&4096u32.to_le_bytes());
    bytes[16..20].copy_from_slice(&totals.blocks.to_le_bytes());
    bytes[20..24].copy_from_slice(&totals.chunks.to_le_bytes());
    bytes
}

/// A number of the format; the splitting keeps all of them small enough.
fn number(value: u64) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| refused("a chunk is too long".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(range: Range<u64>, content: Content) -> Run {
        Run { range, content }
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let runs = [
            run(0..4096, Content::Data),
            run(4096..12288, Content::Zeros),
            run(12288..16384, Content::DontCare),
        ];
        let plan = Plan::new(16384, &runs).unwrap();
        let mut writer = Writer::new(Vec::new(), plan).unwrap();
        for run in &runs {
            writer.run(run).unwrap();
            if run.content == Content::Data {
                writer.bytes(&[7; 1000]).unwrap();
                writer.bytes(&[7; 3096]).unwrap();
            }
        }
        let (output, totals) = writer.finish().unwrap();
        let mut wire =
            b"\x3a\xff\x26\xed\x01\0\0\0\x1c\0\x0c\0\0\x10\0\0\x04\0\0\0\x03\0\0\0\0\0\0\0"
                .to_vec();
        wire.extend(b"\xc1\xca\0\0\x01\0\0\0\x0c\x10\0\0");
        wire.extend([7; 4096]);
        wire.extend(b"\xc2\xca\0\0\x02\0\0\0\x10\0\0\0\0\0\0\0\xc3\xca\0\0\x01\0\0\0\x0c\0\0\0");
        assert_eq!(output, wire);
        assert_eq!(totals, Totals { blocks: 4, chunks: 3, len: wire.len() as u64 });
        assert_eq!(totals, plan.totals());
    }

    #[test]
    fn long_runs_are_split_so_that_no_tool_loses_any_of_them() {
        let size = 20 << 40 >> 1;
        let pieces = |content| Pieces::of(&run(0..size, content)).collect::<Vec<_>>();
        for (content, most) in [
            (Content::Data, MAX_RAW),
            (Content::Zeros, MAX_FILL),
            (Content::DontCare, MAX_DONT_CARE),
        ] {
            let pieces = pieces(content);
            assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), size);
            assert!(pieces.iter().all(|piece| piece.len <= most && piece.len > 0), "{content:?}");
        }
        let zeros = pieces(Content::Zeros);
        let touching = |pair: &[Piece]| pair[0].kind == Kind::Fill && pair[1].kind == Kind::Fill;
        assert!(!zeros.windows(2).any(touching));
    }

    #[test]
    fn what_was_not_planned_is_refused() {
        let data = run(0..8192, Content::Data);
        let plan = Plan::new(8192, [&data]).unwrap();
        let mut writer = Writer::new(Vec::new(), plan).unwrap();
        assert!(writer.run(&run(4096..8192, Content::Zeros)).is_err(), "it leaves a gap");
        writer.run(&data).unwrap();
        assert!(writer.bytes(&[0; 8193]).is_err(), "it is too much");
        assert!(Writer::new(Vec::new(), plan).unwrap().finish().is_err(), "nothing came");
        let mut writer = Writer::new(Vec::new(), plan).unwrap();
        writer.run(&run(0..8192, Content::Zeros)).unwrap();
        assert!(writer.finish().is_err(), "other chunks");
        assert!(Plan::new(8192, [&run(0..4096, Content::Data)]).is_err(), "it is too short");
    }
}
