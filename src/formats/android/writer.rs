//! Writes Android sparse images.

use std::io::{self, Write};
use std::ops::Range;

use super::{
    AndroidContent, AndroidRun, BLOCK_SIZE, CHUNK_HEADER_LEN, DONT_CARE, FILL, HEADER_LEN, MAGIC,
    RAW, block_count, invalid_input,
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
pub struct AndroidTotals {
    /// Blocks of [`BLOCK_SIZE`] bytes.
    pub blocks: u32,
    /// Chunks.
    pub chunks: u32,
    /// The length of the sparse image in bytes.
    pub len: u64,
}

impl AndroidTotals {
    fn add(&mut self, piece: &Chunk) -> io::Result<()> {
        let more = self.chunks.checked_add(1);
        self.chunks = more.ok_or_else(|| invalid_input("there are too many chunks".to_owned()))?;
        // It cannot overflow: 2^32 chunks of less than 2^32 bytes.
        self.len += piece.encoded_len();
        Ok(())
    }
}

/// What an image will have: the runs of it are known before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AndroidPlan {
    totals: AndroidTotals,
}

impl AndroidPlan {
    /// Counts what `runs` (of [`super::whole_blocks`]) of a disk of `size` bytes become.
    ///
    /// # Errors
    /// `InvalidInput` when the runs do not follow each other from 0 to `size` in whole blocks,
    /// when `size` does not fit the format, or when there are more chunks than it can count.
    pub fn new<'a>(size: u64, runs: impl IntoIterator<Item = &'a AndroidRun>) -> io::Result<Self> {
        let mut totals =
            AndroidTotals { blocks: block_count(size)?, chunks: 0, len: HEADER_LEN.into() };
        let mut position = 0;
        for run in runs {
            check_next(run, position, size)?;
            for piece in Chunks::of(run) {
                totals.add(&piece)?;
            }
            position = run.range.end;
        }
        if position != size {
            return Err(invalid_input("the runs do not reach the end of the disk".to_owned()));
        }
        Ok(Self { totals })
    }

    /// What the image will have.
    #[must_use]
    pub fn totals(&self) -> AndroidTotals {
        self.totals
    }
}

/// Writes an image, run after run.
///
/// Each run of [`super::whole_blocks`] is announced with [`Self::start_run`]; after a data run its bytes
/// follow with [`Self::write_bytes`], in pieces of any length.
#[derive(Debug)]
pub struct AndroidWriter<W> {
    output: W,
    /// Where the next run begins.
    position: u64,
    /// Data of the last run that has not been handed over.
    run_left: u64,
    /// Data of the chunk at hand that has not.
    chunk_left: u64,
    totals: AndroidTotals,
    plan: AndroidPlan,
}

impl<W: Write> AndroidWriter<W> {
    /// Begins an image; `output` need not seek.
    ///
    /// # Errors
    /// `output`'s own.
    pub fn new(mut output: W, plan: AndroidPlan) -> io::Result<Self> {
        output.write_all(&image_header(plan.totals))?;
        let totals = AndroidTotals { chunks: 0, len: HEADER_LEN.into(), ..plan.totals };
        Ok(Self { output, position: 0, run_left: 0, chunk_left: 0, totals, plan })
    }

    /// The next run; zeros and don't-cares are written at once.
    ///
    /// # Errors
    /// `InvalidInput` when it does not begin where the last one ended, is not whole blocks, or
    /// data of the last one is missing; `output`'s own.
    pub fn start_run(&mut self, run: &AndroidRun) -> io::Result<()> {
        if self.run_left > 0 {
            return Err(invalid_input("data of the last run is missing".to_owned()));
        }
        check_next(run, self.position, self.size())?;
        if run.content == AndroidContent::Data {
            self.run_left = run.range.end - run.range.start;
        } else {
            for piece in Chunks::of(run) {
                self.write_chunk_header(&piece)?;
                match piece.kind {
                    ChunkKind::Fill => self.output.write_all(&[0; 4])?,
                    ChunkKind::Raw => self.output.write_all(&ZERO_BLOCK)?,
                    ChunkKind::DontCare => {}
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
    pub fn write_bytes(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        if bytes.len() as u64 > self.run_left {
            return Err(invalid_input("there is more data than its run has".to_owned()));
        }
        while !bytes.is_empty() {
            if self.chunk_left == 0 {
                let len = self.run_left.min(MAX_RAW);
                self.write_chunk_header(&Chunk { kind: ChunkKind::Raw, len })?;
                self.chunk_left = len;
            }
            let fits = usize::try_from(self.chunk_left).unwrap_or(usize::MAX).min(bytes.len());
            let (now, later) = bytes.split_at(fits);
            self.output.write_all(now)?;
            self.chunk_left -= fits as u64;
            self.run_left -= fits as u64;
            bytes = later;
        }
        Ok(())
    }

    /// Ends the image.
    ///
    /// # Errors
    /// `InvalidInput` when it is not what was planned; `output`'s own.
    pub fn finish(mut self) -> io::Result<(W, AndroidTotals)> {
        if self.run_left > 0 || self.position != self.size() || self.plan.totals != self.totals {
            return Err(invalid_input("the image is not what its header says".to_owned()));
        }
        self.output.flush()?;
        Ok((self.output, self.totals))
    }

    fn size(&self) -> u64 {
        u64::from(self.totals.blocks) * BLOCK_SIZE
    }

    fn write_chunk_header(&mut self, piece: &Chunk) -> io::Result<()> {
        self.totals.add(piece)?;
        let mut bytes = [0; CHUNK_HEADER_LEN as usize];
        let kind = match piece.kind {
            ChunkKind::Raw => RAW,
            ChunkKind::Fill => FILL,
            ChunkKind::DontCare => DONT_CARE,
        };
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[4..8].copy_from_slice(&to_u32(piece.len / BLOCK_SIZE)?.to_le_bytes());
        bytes[8..].copy_from_slice(&to_u32(piece.encoded_len())?.to_le_bytes());
        self.output.write_all(&bytes)
    }
}

/// Refuses a run that does not go on at `position` in whole blocks, inside `size`.
fn check_next(run: &AndroidRun, position: u64, size: u64) -> io::Result<()> {
    let Range { start, end } = run.range;
    let whole = start.is_multiple_of(BLOCK_SIZE) && end.is_multiple_of(BLOCK_SIZE);
    if start != position || end < start || end > size || !whole {
        return Err(invalid_input("a run does not follow the last one in whole blocks".to_owned()));
    }
    Ok(())
}

/// A chunk to be.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    kind: ChunkKind,
    /// Of the disk, in bytes.
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkKind {
    Raw,
    Fill,
    DontCare,
}

impl Chunk {
    /// The length of the chunk in bytes.
    fn encoded_len(&self) -> u64 {
        let body = match self.kind {
            ChunkKind::Raw => self.len,
            ChunkKind::Fill => 4,
            ChunkKind::DontCare => 0,
        };
        u64::from(CHUNK_HEADER_LEN) + body
    }
}

/// Splits a run into chunks.
///
/// ```text
///   zeros   |------- FILL 1 GiB -------| RAW 4 KiB |------- FILL 1 GiB -------| RAW 4 KiB |- FILL -|
/// ```
struct Chunks {
    content: AndroidContent,
    left: u64,
    last: Option<ChunkKind>,
}

impl Chunks {
    fn of(run: &AndroidRun) -> Self {
        Self { content: run.content, left: run.range.end - run.range.start, last: None }
    }
}

impl Iterator for Chunks {
    type Item = Chunk;

    fn next(&mut self) -> Option<Chunk> {
        let (kind, most) = match (self.content, self.last) {
            (AndroidContent::Data, _) => (ChunkKind::Raw, MAX_RAW),
            (AndroidContent::DontCare, _) => (ChunkKind::DontCare, MAX_DONT_CARE),
            (AndroidContent::Zeros, Some(ChunkKind::Fill)) => (ChunkKind::Raw, BLOCK_SIZE),
            (AndroidContent::Zeros, _) => (ChunkKind::Fill, MAX_FILL),
        };
        let len = self.left.min(most);
        self.left -= len;
        self.last = Some(kind);
        (len > 0).then_some(Chunk { kind, len })
    }
}

fn image_header(totals: AndroidTotals) -> [u8; HEADER_LEN as usize] {
    let mut bytes = [0; HEADER_LEN as usize];
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    // Version 1.0.
    bytes[4] = 1;
    bytes[8..10].copy_from_slice(&HEADER_LEN.to_le_bytes());
    bytes[10..12].copy_from_slice(&CHUNK_HEADER_LEN.to_le_bytes());
    bytes[12..16].copy_from_slice(&4096u32.to_le_bytes());
    bytes[16..20].copy_from_slice(&totals.blocks.to_le_bytes());
    bytes[20..24].copy_from_slice(&totals.chunks.to_le_bytes());
    bytes
}

/// A number of the format; the splitting keeps all of them small enough.
fn to_u32(value: u64) -> io::Result<u32> {
    u32::try_from(value).map_err(|_| invalid_input("a chunk is too long".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(range: Range<u64>, content: AndroidContent) -> AndroidRun {
        AndroidRun { range, content }
    }

    #[test]
    fn the_bytes_are_those_of_the_format() {
        let runs = [
            run(0..4096, AndroidContent::Data),
            run(4096..12288, AndroidContent::Zeros),
            run(12288..16384, AndroidContent::DontCare),
        ];
        let plan = AndroidPlan::new(16384, &runs).unwrap();
        let mut writer = AndroidWriter::new(Vec::new(), plan).unwrap();
        for run in &runs {
            writer.start_run(run).unwrap();
            if run.content == AndroidContent::Data {
                writer.write_bytes(&[7; 1000]).unwrap();
                writer.write_bytes(&[7; 3096]).unwrap();
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
        assert_eq!(totals, AndroidTotals { blocks: 4, chunks: 3, len: wire.len() as u64 });
        assert_eq!(totals, plan.totals());
    }

    #[test]
    fn long_runs_are_split_so_that_no_tool_loses_any_of_them() {
        let size = 20 << 40 >> 1;
        let pieces = |content| Chunks::of(&run(0..size, content)).collect::<Vec<_>>();
        for (content, most) in [
            (AndroidContent::Data, MAX_RAW),
            (AndroidContent::Zeros, MAX_FILL),
            (AndroidContent::DontCare, MAX_DONT_CARE),
        ] {
            let pieces = pieces(content);
            assert_eq!(pieces.iter().map(|piece| piece.len).sum::<u64>(), size);
            assert!(pieces.iter().all(|piece| piece.len <= most && piece.len > 0), "{content:?}");
        }
        let zeros = pieces(AndroidContent::Zeros);
        let touching =
            |pair: &[Chunk]| pair[0].kind == ChunkKind::Fill && pair[1].kind == ChunkKind::Fill;
        assert!(!zeros.windows(2).any(touching));
    }

    #[test]
    fn what_was_not_planned_is_refused() {
        let data = run(0..8192, AndroidContent::Data);
        let plan = AndroidPlan::new(8192, [&data]).unwrap();
        let mut writer = AndroidWriter::new(Vec::new(), plan).unwrap();
        assert!(
            writer.start_run(&run(4096..8192, AndroidContent::Zeros)).is_err(),
            "it leaves a gap"
        );
        writer.start_run(&data).unwrap();
        assert!(writer.write_bytes(&[0; 8193]).is_err(), "it is too much");
        assert!(AndroidWriter::new(Vec::new(), plan).unwrap().finish().is_err(), "nothing came");
        let mut writer = AndroidWriter::new(Vec::new(), plan).unwrap();
        writer.start_run(&run(0..8192, AndroidContent::Zeros)).unwrap();
        assert!(writer.finish().is_err(), "other chunks");
        assert!(
            AndroidPlan::new(8192, [&run(0..4096, AndroidContent::Data)]).is_err(),
            "it is too short"
        );
    }
}
