//! Writer of Android sparse images.

use std::io::{self, Write};
use std::ops::Range;

use super::{
    AndroidContent, AndroidRun, BLOCK_SIZE, CHUNK_HEADER_LEN, DONT_CARE, FILL, HEADER_LEN, MAGIC,
    RAW, block_count, invalid_input,
};

/// The most bytes in one RAW chunk: 64 MiB. `fastboot` loads whole chunks.
const MAX_RAW: u64 = 64 << 20;

/// The most bytes in one FILL chunk: 1 GiB. libsparse up to Android 10 (Debian's `simg2img`) counts
/// the bytes of a fill in 32 bits, and silently drops the rest.
const MAX_FILL: u64 = 1 << 30;

/// The most bytes in one DONT_CARE chunk: 4 TiB. libsparse counts blocks in a signed 32-bit number.
const MAX_DONT_CARE: u64 = 1 << 42;

/// The RAW block between two fills. libsparse joins adjacent fills, and counts the bytes of the
/// result in 32 bits, too; it never joins RAW chunks.
static ZERO_BLOCK: [u8; 4096] = [0; 4096];

/// The size of an image in blocks, chunks and bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AndroidTotals {
    /// The number of blocks of [`BLOCK_SIZE`] bytes.
    pub blocks: u32,
    /// The number of chunks.
    pub chunks: u32,
    /// The length of the sparse image in bytes.
    pub len: u64,
}

impl AndroidTotals {
    fn add(&mut self, piece: &Chunk) -> io::Result<()> {
        let more = self.chunks.checked_add(1);
        self.chunks = more.ok_or_else(|| invalid_input("there are too many chunks".to_owned()))?;
        // No overflow: at most 2^32 chunks of less than 2^32 bytes.
        self.len += piece.encoded_len();
        Ok(())
    }
}

/// The totals of an image, computed from its runs before writing begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AndroidPlan {
    totals: AndroidTotals,
}

impl AndroidPlan {
    /// Computes the totals of an image from `runs` (as returned by [`super::whole_blocks`]) of a
    /// disk of `size` bytes.
    ///
    /// # Errors
    /// `InvalidInput` if the runs do not cover `0..size` in order in whole blocks, if `size` does
    /// not fit the format, or if there are more chunks than the format can count.
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

    /// Returns the totals of the image.
    #[must_use]
    pub fn totals(&self) -> AndroidTotals {
        self.totals
    }
}

/// A writer of an image, one run after the other.
///
/// [`Self::start_run`] announces each run of [`super::whole_blocks`]; after a data run its bytes
/// follow with [`Self::write_bytes`], in pieces of any length.
#[derive(Debug)]
pub struct AndroidWriter<W> {
    output: W,
    /// The offset at which the next run begins.
    position: u64,
    /// The bytes of the current run not yet written.
    run_left: u64,
    /// The bytes of the current chunk not yet written.
    chunk_left: u64,
    totals: AndroidTotals,
    plan: AndroidPlan,
}

impl<W: Write> AndroidWriter<W> {
    /// Begins an image by writing its header; `output` need not support seeking.
    ///
    /// # Errors
    /// The errors of `output`.
    pub fn new(mut output: W, plan: AndroidPlan) -> io::Result<Self> {
        output.write_all(&image_header(plan.totals))?;
        let totals = AndroidTotals { chunks: 0, len: HEADER_LEN.into(), ..plan.totals };
        Ok(Self { output, position: 0, run_left: 0, chunk_left: 0, totals, plan })
    }

    /// Starts the next run; runs of zeros and DONT_CARE runs are written at once.
    ///
    /// # Errors
    /// `InvalidInput` if the run does not begin at the end of the previous one or is not whole
    /// blocks, or if data of the previous run is missing; the errors of `output`.
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

    /// Writes the next bytes of the current data run.
    ///
    /// # Errors
    /// `InvalidInput` if the bytes exceed the run; the errors of `output`.
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

    /// Finishes the image.
    ///
    /// # Errors
    /// `InvalidInput` if the image differs from the plan; the errors of `output`.
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

/// Refuses a run that does not begin at `position`, is not whole blocks, or exceeds `size`.
fn check_next(run: &AndroidRun, position: u64, size: u64) -> io::Result<()> {
    let Range { start, end } = run.range;
    let whole = start.is_multiple_of(BLOCK_SIZE) && end.is_multiple_of(BLOCK_SIZE);
    if start != position || end < start || end > size || !whole {
        return Err(invalid_input("a run does not follow the last one in whole blocks".to_owned()));
    }
    Ok(())
}

/// A chunk to be written.
#[derive(Clone, Copy, Debug)]
struct Chunk {
    kind: ChunkKind,
    /// The length on the disk in bytes.
    len: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ChunkKind {
    Raw,
    Fill,
    DontCare,
}

impl Chunk {
    /// Returns the length of the encoded chunk in bytes.
    fn encoded_len(&self) -> u64 {
        let body = match self.kind {
            ChunkKind::Raw => self.len,
            ChunkKind::Fill => 4,
            ChunkKind::DontCare => 0,
        };
        u64::from(CHUNK_HEADER_LEN) + body
    }
}

/// An iterator over the chunks of a run.
///
/// ```text
///   zeros   |----- FILL 1 GiB -----| RAW 4 KiB |----- FILL 1 GiB -----| RAW 4 KiB |- FILL -|
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

/// Converts a number of the format; the splitting keeps all of them small enough.
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
    fn the_output_matches_the_format_byte_for_byte() {
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
    fn long_runs_are_split_within_the_limits_of_all_tools() {
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
    fn runs_that_differ_from_the_plan_are_refused() {
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
