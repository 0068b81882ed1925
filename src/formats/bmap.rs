//! bmap 2.0: an XML file beside an image that lists the blocks with data and their checksums, for
//! `bmaptool copy`.
//!
//! `bmaptool` writes only the mapped blocks, checks each range of them against its sha256, and
//! leaves the rest of the target as it was (a new file gets holes there). The checksum of the bmap
//! file itself is computed with zeros in its own place. The last block of an image may be cut
//! short; its checksum then covers the bytes that exist. Source: bmap-tools,
//! `bmaptools/BmapCreate.py`, and `BmapCopy.py` for what is read.

#[cfg(feature = "network")]
mod reader;

use std::io::{self, Write};
use std::ops::Range;

use sha2::{Digest, Sha256};

#[cfg(feature = "network")]
pub use self::reader::{BmapError, MAX_FILE_LEN};

/// The block size used in the file, in bytes.
pub const BLOCK_SIZE: u64 = 4096;

/// Bytes of the image read at a time: 1 MiB.
const READ_CHUNK: usize = 1 << 20;

/// The totals of a bmap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BmapTotals {
    /// The number of blocks in the image.
    pub blocks: u64,
    /// The number of mapped blocks.
    pub mapped: u64,
    /// The number of ranges of mapped blocks.
    pub ranges: usize,
}

/// A bmap that was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bmap {
    /// The size of the image in bytes.
    pub image_size: u64,
    /// The size of a block in bytes: a multiple of 512.
    pub block_size: u64,
    /// What is mapped: ascending, disjoint and inside the image. All else is zeros.
    pub ranges: Vec<BmapRange>,
    /// The SHA-256 of the file.
    pub digest: [u8; 32],
}

/// A range of blocks that are mapped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BmapRange {
    /// The place in the image, in bytes; not empty.
    pub bytes: Range<u64>,
    /// The SHA-256 of these bytes, where the bmap has it.
    pub sum: Option<[u8; 32]>,
}

impl Bmap {
    /// Makes sure that the map is what its fields promise, for tests and fuzzing.
    ///
    /// # Panics
    /// Where it is not.
    #[doc(hidden)]
    pub fn assert_sound(&self) {
        let mut end = 0;
        for BmapRange { bytes, .. } in &self.ranges {
            assert!(bytes.start >= end && !bytes.is_empty() && bytes.end <= self.image_size);
            assert!(bytes.start.is_multiple_of(self.block_size));
            assert!(bytes.end.is_multiple_of(self.block_size) || bytes.end == self.image_size);
            end = bytes.end;
        }
    }
}

/// Writes the bmap of an image of `size` bytes to `output`.
///
/// `runs` are the data ranges of the image in bytes, in rising order; they are rounded to blocks
/// and joined. `read` fills its whole buffer with the bytes of the image from the given offset on.
///
/// # Errors
/// `InvalidInput`, with one line for the user, if the image is empty, or if the runs are out of
/// order or exceed the image; the errors of `read` and `output`.
pub fn write(
    output: &mut impl Write,
    size: u64,
    runs: impl IntoIterator<Item = Range<u64>>,
    mut read: impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<BmapTotals> {
    if size == 0 {
        return Err(invalid_input("an empty image has no bmap"));
    }
    let mut buf = vec![0; READ_CHUNK];
    let mut ranges = Vec::new();
    for blocks in whole_blocks(size, runs)? {
        let bytes = blocks.start * BLOCK_SIZE..(blocks.end.saturating_mul(BLOCK_SIZE)).min(size);
        let sum = checksum(bytes, &mut buf, &mut read)?;
        ranges.push((blocks, sum));
    }
    let mapped = ranges.iter().map(|(blocks, _)| blocks.end - blocks.start).sum();
    let totals = BmapTotals { blocks: size.div_ceil(BLOCK_SIZE), mapped, ranges: ranges.len() };
    // Rendered twice: the checksum is in the middle of the text that it covers.
    let mut hasher = HashWriter(Sha256::new());
    render(&mut hasher, size, totals, &ranges, &"0".repeat(64))?;
    let sum = hex(&hasher.0.finalize().into());
    render(output, size, totals, &ranges, &sum)?;
    output.flush()?;
    Ok(totals)
}

/// Rounds `runs` to blocks and joins those that touch.
fn whole_blocks(
    size: u64,
    runs: impl IntoIterator<Item = Range<u64>>,
) -> io::Result<Vec<Range<u64>>> {
    let mut joined = Vec::<Range<u64>>::new();
    let mut last = 0;
    for run in runs {
        if run.start < last || run.end > size || run.start > run.end {
            return Err(invalid_input("the runs are not in order, or leave the image"));
        }
        last = run.end;
        let blocks = run.start / BLOCK_SIZE..run.end.div_ceil(BLOCK_SIZE);
        match joined.last_mut() {
            _ if run.is_empty() => {}
            Some(before) if blocks.start <= before.end => before.end = before.end.max(blocks.end),
            _ => joined.push(blocks),
        }
    }
    Ok(joined)
}

fn checksum(
    bytes: Range<u64>,
    buf: &mut [u8],
    read: &mut impl FnMut(u64, &mut [u8]) -> io::Result<()>,
) -> io::Result<[u8; 32]> {
    let mut hasher = Sha256::new();
    let mut at = bytes.start;
    while at < bytes.end {
        let len = usize::try_from(bytes.end - at).unwrap_or(usize::MAX).min(buf.len());
        read(at, &mut buf[..len])?;
        hasher.update(&buf[..len]);
        at += len as u64;
    }
    Ok(hasher.finalize().into())
}

fn render(
    output: &mut impl Write,
    size: u64,
    totals: BmapTotals,
    ranges: &[(Range<u64>, [u8; 32])],
    sum: &str,
) -> io::Result<()> {
    let BmapTotals { blocks, mapped, .. } = totals;
    write!(
        output,
        "<?xml version=\"1.0\" ?>\n\
         <bmap version=\"2.0\">\n\
         \x20   <ImageSize> {size} </ImageSize>\n\
         \x20   <BlockSize> {BLOCK_SIZE} </BlockSize>\n\
         \x20   <BlocksCount> {blocks} </BlocksCount>\n\
         \x20   <MappedBlocksCount> {mapped} </MappedBlocksCount>\n\
         \x20   <ChecksumType> sha256 </ChecksumType>\n\
         \x20   <BmapFileChecksum> {sum} </BmapFileChecksum>\n\
         \x20   <BlockMap>\n"
    )?;
    for (blocks, sum) in ranges {
        let (first, last, sum) = (blocks.start, blocks.end.saturating_sub(1), hex(sum));
        // Ranges in this format include their end; a single block is written as one number.
        match first == last {
            true => writeln!(output, "        <Range chksum=\"{sum}\"> {first} </Range>")?,
            false => writeln!(output, "        <Range chksum=\"{sum}\"> {first}-{last} </Range>")?,
        }
    }
    output.write_all(b"    </BlockMap>\n</bmap>\n")
}

fn hex(sum: &[u8; 32]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |value: u8| char::from(DIGITS[usize::from(value & 15)]);
    sum.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
}

/// A writer that hashes its input.
struct HashWriter(Sha256);

impl Write for HashWriter {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.0.update(buf);
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn invalid_input(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bmap(image: &[u8], runs: &[Range<u64>]) -> io::Result<(String, BmapTotals)> {
        let mut output = Vec::new();
        let totals =
            write(&mut output, image.len() as u64, runs.iter().cloned(), |offset, buf| {
                let at = usize::try_from(offset).unwrap();
                buf.copy_from_slice(&image[at..at + buf.len()]);
                Ok(())
            })?;
        Ok((String::from_utf8(output).unwrap(), totals))
    }

    fn sha256(bytes: &[u8]) -> String {
        hex(&Sha256::digest(bytes).into())
    }

    #[test]
    fn ranges_are_rounded_to_blocks_and_joined_and_the_last_block_may_be_short() {
        let mut image = vec![0; 50_000];
        image[5000..9000].fill(7);
        image[49_999] = 1;
        let runs = [5000..6000, 6000..9000, 12_288..12_289, 49_999..50_000];
        let (text, totals) = bmap(&image, &runs).unwrap();
        assert_eq!(totals, BmapTotals { blocks: 13, mapped: 4, ranges: 2 });
        let first = format!("<Range chksum=\"{}\"> 1-3 </Range>", sha256(&image[4096..16_384]));
        let last = format!("<Range chksum=\"{}\"> 12 </Range>", sha256(&image[49_152..]));
        assert!(text.contains(&first) && text.contains(&last), "{text}");
    }

    #[test]
    fn the_file_contains_its_own_checksum() {
        let (text, _) = bmap(&[3; 5000], std::slice::from_ref(&(0..5000))).unwrap();
        let (_, rest) = text.split_once("<BmapFileChecksum> ").unwrap();
        let sum = &rest[..64];
        assert_eq!(sha256(text.replacen(sum, &"0".repeat(64), 1).as_bytes()), sum);
    }

    #[test]
    fn an_empty_image_and_runs_outside_or_out_of_order_are_refused() {
        let kind = |image: &[u8], runs: &[Range<u64>]| bmap(image, runs).unwrap_err().kind();
        let (first, second) = (0..4096, 8192..9000);
        assert_eq!(kind(&[], &[]), io::ErrorKind::InvalidInput);
        assert_eq!(kind(&[0; 8192], std::slice::from_ref(&second)), io::ErrorKind::InvalidInput);
        assert_eq!(kind(&[0; 9000], &[second, first]), io::ErrorKind::InvalidInput);
    }

    #[test]
    fn a_read_error_of_the_image_is_returned() {
        let read = |_, _: &mut [u8]| Err(crate::host::os_error(libc::EIO));
        let failed = write(&mut Vec::new(), 4096, std::iter::once(0..4096), read);
        assert_eq!(failed.unwrap_err().raw_os_error(), Some(libc::EIO));
    }

    proptest! {
        #[test]
        fn exactly_the_blocks_with_data_are_mapped(
            pieces in prop::collection::vec((0..9000u64, 1..9000u64), 1..20),
        ) {
            let mut runs = Vec::new();
            let mut at = 0;
            for (gap, len) in pieces {
                runs.push(at + gap..at + gap + len);
                at += gap + len;
            }
            let joined = whole_blocks(at, runs.clone()).unwrap();
            prop_assert!(joined.windows(2).all(|pair| pair[0].end < pair[1].start));
            for block in 0..at.div_ceil(BLOCK_SIZE) {
                let (start, end) = (block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE);
                let has_data = runs.iter().any(|run| run.start < end && run.end > start);
                prop_assert_eq!(joined.iter().any(|range| range.contains(&block)), has_data);
            }
        }
    }
}
