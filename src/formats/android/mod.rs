//! Android sparse images, version 1.0, the format of `simg2img` and `fastboot`.
//!
//! ```text
//!   header, 28 bytes:  magic u32  major u16  minor u16  header len u16  chunk header len u16
//!                      block size u32  blocks u32  chunks u32  checksum u32
//!   chunk, 12 bytes:   type u16  0 u16  blocks u32  len with this header u32, then
//!     RAW 0xCAC1         the bytes of its blocks
//!     FILL 0xCAC2        4 bytes that are repeated
//!     DONT_CARE 0xCAC3   nothing
//!     CRC32 0xCAC4       the checksum of everything before it; the chunk has no blocks
//! ```
//!
//! All numbers are little-endian. Chunks carry no offsets: they follow each other from the first
//! block to the last. Source: AOSP, libsparse/sparse_format.h.
//!
//! The header contains the number of chunks, so it can be written only once all runs are known; an
//! [`AndroidPlan`] counts the chunks beforehand.
//!
//! DONT_CARE does not mean zero: the target keeps its content there. A hole that must read as zeros
//! is written as a FILL of 0 ([`AndroidContent::Zeros`]). [`AndroidContent::DontCare`] is only for
//! ranges that must keep their content, such as the unchanged ranges of a diff.

mod reader;
mod writer;

use std::io;
use std::ops::Range;

use super::RunContent;
pub use reader::{AndroidDecoder, AndroidRecord, AndroidRecordBody, Checksums};
pub use writer::{AndroidPlan, AndroidTotals, AndroidWriter};

/// The block size of written images in bytes: the one that every Android tool accepts.
pub const BLOCK_SIZE: u64 = 4096;

const MAGIC: u32 = 0xED26_FF3A;
const HEADER_LEN: u16 = 28;
const CHUNK_HEADER_LEN: u16 = 12;

const RAW: u16 = 0xCAC1;
const FILL: u16 = 0xCAC2;
const DONT_CARE: u16 = 0xCAC3;
const CRC32: u16 = 0xCAC4;

/// The content of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AndroidContent {
    /// Unspecified: the target keeps its content.
    DontCare,
    /// Zeros: the target reads as zeros afterwards.
    Zeros,
    /// Data bytes.
    Data,
}

impl From<RunContent> for AndroidContent {
    fn from(content: RunContent) -> Self {
        match content {
            RunContent::Data => Self::Data,
            RunContent::Zeros => Self::Zeros,
        }
    }
}

/// A run of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AndroidRun {
    /// The position in the image, in bytes.
    pub range: Range<u64>,
    /// The content of the run.
    pub content: AndroidContent,
}

/// Rounds `runs` to runs of whole blocks that cover `0..size` without gaps.
///
/// ```text
///   given      |--- zeros ---|- data -|              .         |- zeros -|
///   blocks     |       |       |       |       |       |       |       |
///   returned   |-zeros-|---- data -----|-- don't care -|- data -|-zeros-|
/// ```
///
/// Ranges covered by no run are [`AndroidContent::DontCare`]. A block of mixed content is data, so
/// a data run may be longer than the one given; the caller reads its bytes by the returned range.
///
/// # Errors
/// `InvalidInput`, with one line for the user, if `size` is not a multiple of [`BLOCK_SIZE`] or
/// exceeds the limit of the format (16 TiB less a block), or if the runs are not in rising order or
/// exceed `size`.
pub fn whole_blocks(
    size: u64,
    runs: impl IntoIterator<Item = AndroidRun>,
) -> io::Result<Vec<AndroidRun>> {
    block_count(size)?;
    let mut all = JoinedRuns::default();
    let mut end = 0;
    for AndroidRun { range, content } in runs {
        if range.start < end || range.end > size || range.start > range.end {
            return Err(invalid_input("the runs are not in order, or leave the disk".to_owned()));
        }
        all.push(end..range.start, AndroidContent::DontCare);
        end = range.end;
        all.push(range, content);
    }
    all.push(end..size, AndroidContent::DontCare);
    let mut blocks = JoinedRuns::default();
    for AndroidRun { range, content } in all.0 {
        // No overflow: the size is a multiple of the block size.
        let (first, last) =
            (range.start.next_multiple_of(BLOCK_SIZE), range.end / BLOCK_SIZE * BLOCK_SIZE);
        let shared = |at: u64| at / BLOCK_SIZE * BLOCK_SIZE..at.next_multiple_of(BLOCK_SIZE);
        blocks.push(shared(range.start), AndroidContent::Data);
        blocks.push(first..last, content);
        blocks.push(shared(range.end), AndroidContent::Data);
    }
    Ok(blocks.0)
}

/// Consecutive runs, with neighbours of the same content joined.
#[derive(Default)]
struct JoinedRuns(Vec<AndroidRun>);

impl JoinedRuns {
    /// Appends the part of `range` that lies after the existing runs.
    fn push(&mut self, range: Range<u64>, content: AndroidContent) {
        let reached = self.0.last().map_or(0, |run| run.range.end);
        let range = range.start.max(reached)..range.end;
        if range.is_empty() {
            return;
        }
        match self.0.last_mut() {
            Some(run) if run.content == content => run.range.end = range.end,
            _ => self.0.push(AndroidRun { range, content }),
        }
    }
}

/// Returns the number of blocks of a disk of `size` bytes.
fn block_count(size: u64) -> io::Result<u32> {
    if !size.is_multiple_of(BLOCK_SIZE) {
        let next = size.div_ceil(BLOCK_SIZE).saturating_mul(BLOCK_SIZE);
        return Err(invalid_input(format!(
            "an Android sparse image has whole blocks of {BLOCK_SIZE} bytes, and the disk has {size} \
             bytes: mount it with size={next} to export it"
        )));
    }
    u32::try_from(size / BLOCK_SIZE).map_err(|_| {
        invalid_input(format!(
            "an Android sparse image holds less than 16 TiB, and the disk has {size} bytes"
        ))
    })
}

fn invalid_input(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn run(range: Range<u64>, content: AndroidContent) -> AndroidRun {
        AndroidRun { range, content }
    }

    #[test]
    fn a_block_of_mixed_content_is_data() {
        let runs = [
            run(0..6000, AndroidContent::Zeros),
            run(6000..9000, AndroidContent::Data),
            run(20480..20481, AndroidContent::Zeros),
            run(20481..20482, AndroidContent::DontCare),
            run(24576..30000, AndroidContent::Zeros),
            run(30000..32768, AndroidContent::Zeros),
        ];
        let expected = [
            run(0..4096, AndroidContent::Zeros),
            run(4096..12288, AndroidContent::Data),
            run(12288..20480, AndroidContent::DontCare),
            // As zeros, the block would overwrite bytes that must not change.
            run(20480..24576, AndroidContent::Data),
            run(24576..32768, AndroidContent::Zeros),
        ];
        assert_eq!(whole_blocks(32768, runs).unwrap(), expected);
    }

    #[test]
    fn a_size_that_is_not_a_multiple_of_the_block_is_refused_with_a_remedy() {
        let line = whole_blocks(10000, []).unwrap_err().to_string();
        assert!(line.contains("size=12288") && !line.contains('\n'), "{line}");
        let line = whole_blocks(1 << 44, []).unwrap_err().to_string();
        assert!(line.contains("16 TiB"), "{line}");
        assert_eq!(whole_blocks(0, []).unwrap(), []);
    }

    #[test]
    fn runs_out_of_order_are_refused() {
        let zeros = |range| run(range, AndroidContent::Zeros);
        assert!(whole_blocks(8192, [zeros(4096..8192), zeros(0..10)]).is_err());
        assert!(whole_blocks(8192, [zeros(4096..8193)]).is_err());
    }

    proptest! {
        #[test]
        fn every_block_has_the_content_of_its_bytes(
            lens in prop::collection::vec((1..9000u64, 0..3u8), 0..30),
        ) {
            let mut runs = Vec::new();
            let mut at = 0;
            for (len, kind) in lens {
                let content = [AndroidContent::DontCare, AndroidContent::Zeros, AndroidContent::Data][usize::from(kind)];
                runs.push(run(at..at + len, content));
                at += len;
            }
            let size = at.next_multiple_of(BLOCK_SIZE);
            let joined = whole_blocks(size, runs.clone()).unwrap();
            let mut end = 0;
            for pair in joined.windows(2) {
                prop_assert!(pair[0].content != pair[1].content, "not joined");
            }
            for AndroidRun { range, content } in joined {
                prop_assert_eq!(range.start, end);
                end = range.end;
                for block in range.step_by(4096) {
                    let mut of_block = runs.iter()
                        .filter(|run| run.range.start < block + BLOCK_SIZE && run.range.end > block)
                        .map(|run| run.content)
                        // The gap between the last run and the size.
                        .chain((block + BLOCK_SIZE > at).then_some(AndroidContent::DontCare));
                    let first = of_block.next().unwrap();
                    let one = of_block.all(|other| other == first);
                    prop_assert_eq!(if one { first } else { AndroidContent::Data }, content);
                }
            }
            prop_assert_eq!(end, size);
        }
    }
}
