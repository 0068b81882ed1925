//! Reader of Android sparse images.
//!
//! The input is not trusted: a length is used only after it has been checked against the others,
//! and no allocation depends on one.

use std::io::{self, Read};
use std::ops::Range;

use crc_fast::{CrcAlgorithm, Digest};

use super::{CHUNK_HEADER_LEN, CRC32, DONT_CARE, FILL, HEADER_LEN, MAGIC, RAW};

/// Bytes read at a time when skipping unwanted data: 64 KiB.
const SKIP_CHUNK: usize = 64 << 10;

/// Begins the CRC-32 of zlib, which checksum chunks have.
fn zlib_digest() -> Digest {
    Digest::new(CrcAlgorithm::Crc32IsoHdlc)
}

/// Whether the checksum chunks of an image are verified against its content.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksums {
    /// Skip the checksums. The checksums that Android's own tools write are wrong: libsparse counts
    /// one block of each fill, and nothing of DONT_CARE chunks.
    #[default]
    Skip,
    /// Verify the checksums, with fills expanded and DONT_CARE chunks counted as zeros, as the
    /// format specifies.
    Verify,
}

/// A record of an image. Ranges are bytes of the disk, in order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AndroidRecord {
    /// The size of the disk in bytes; always the first record.
    Size(u64),
    /// The bytes of this range follow; [`AndroidDecoder::body`] reads them.
    Data(Range<u64>),
    /// The range repeats these four bytes.
    Fill(Range<u64>, [u8; 4]),
    /// The target keeps its content in this range.
    DontCare(Range<u64>),
    /// The image is complete.
    End,
}

/// A decoder for the records of an image.
#[derive(Debug)]
pub struct AndroidDecoder<R> {
    input: R,
    block_size: u32,
    /// The size of the disk in bytes.
    size: u64,
    chunks_left: u32,
    /// The bytes by which each chunk header exceeds the known fields.
    extra_header_len: u16,
    position: u64,
    /// The bytes of the current data record that have not been read.
    unread: u64,
    is_size_returned: bool,
    /// The checksum of everything so far, if checksums are verified.
    checksum: Option<Digest>,
}

/// A reader of the bytes of a data record.
#[derive(Debug)]
pub struct AndroidRecordBody<'a, R>(&'a mut AndroidDecoder<R>);

impl<R: Read> AndroidDecoder<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// `InvalidData` if the input is not an Android sparse image of version 1, or is inconsistent;
    /// `UnexpectedEof`; the errors of `input`.
    pub fn new(mut input: R, checksums: Checksums) -> io::Result<Self> {
        let header: [u8; HEADER_LEN as usize] = read_array(&mut input)?;
        if u32_at(&header, 0) != MAGIC {
            return Err(invalid_data("it is no Android sparse image"));
        }
        if u16_at(&header, 4) != 1 {
            return Err(invalid_data("it is an Android sparse image of an unknown version"));
        }
        let missing = || invalid_data("the headers of the Android sparse image are too short");
        let more = u16_at(&header, 8).checked_sub(HEADER_LEN).ok_or_else(missing)?;
        let extra = u16_at(&header, 10).checked_sub(CHUNK_HEADER_LEN).ok_or_else(missing)?;
        let (block, blocks) = (u32_at(&header, 12), u32_at(&header, 16));
        if block == 0 || !block.is_multiple_of(4) {
            return Err(invalid_data(
                "the block size of the Android sparse image is no multiple of 4",
            ));
        }
        let size = u64::from(block) * u64::from(blocks);
        if i64::try_from(size).is_err() {
            return Err(invalid_data("the Android sparse image is larger than any file can be"));
        }
        skip(&mut input, more.into())?;
        Ok(Self {
            input,
            block_size: block,
            size,
            chunks_left: u32_at(&header, 20),
            extra_header_len: extra,
            position: 0,
            unread: 0,
            is_size_returned: false,
            checksum: (checksums == Checksums::Verify).then(zlib_digest),
        })
    }

    /// Returns the next record, after skipping the unread bytes of the current data record.
    ///
    /// # Errors
    /// `InvalidData` if lengths contradict each other, a chunk type is unknown, or a checksum is
    /// wrong; `UnexpectedEof`; the errors of the input.
    pub fn next_record(&mut self) -> io::Result<AndroidRecord> {
        if !self.is_size_returned {
            self.is_size_returned = true;
            return Ok(AndroidRecord::Size(self.size));
        }
        self.skip_unread()?;
        while self.chunks_left > 0 {
            self.chunks_left -= 1;
            if let Some(record) = self.next_chunk()? {
                return Ok(record);
            }
        }
        if self.position != self.size {
            return Err(invalid_data(
                "the chunks do not reach the end of the Android sparse image",
            ));
        }
        Ok(AndroidRecord::End)
    }

    /// Returns a reader of the bytes of the current data record.
    pub fn body(&mut self) -> AndroidRecordBody<'_, R> {
        AndroidRecordBody(self)
    }

    /// Reads the next chunk; returns `None` for a chunk without blocks.
    fn next_chunk(&mut self) -> io::Result<Option<AndroidRecord>> {
        let header: [u8; CHUNK_HEADER_LEN as usize] = read_array(&mut self.input)?;
        skip(&mut self.input, self.extra_header_len.into())?;
        let len = u64::from(self.block_size) * u64::from(u32_at(&header, 4));
        let end = self.position.checked_add(len).filter(|end| *end <= self.size);
        let end = end.ok_or_else(|| invalid_data("a chunk is past the end of the image"))?;
        let kind = u16_at(&header, 0);
        let body = match kind {
            RAW => len,
            FILL | CRC32 => 4,
            DONT_CARE => 0,
            _ => return Err(invalid_data("a chunk of the Android sparse image is unknown")),
        };
        let headers = u64::from(CHUNK_HEADER_LEN) + u64::from(self.extra_header_len);
        if u64::from(u32_at(&header, 8)) != headers + body || (kind == CRC32 && len > 0) {
            return Err(invalid_data("a chunk of the Android sparse image has two lengths"));
        }
        let range = self.position..end;
        self.position = end;
        let record = match kind {
            RAW => {
                self.unread = len;
                AndroidRecord::Data(range)
            }
            FILL => {
                let value = read_array(&mut self.input)?;
                self.add_fill(value, len);
                AndroidRecord::Fill(range, value)
            }
            DONT_CARE => {
                self.add_fill([0; 4], len);
                AndroidRecord::DontCare(range)
            }
            _ => {
                let expected = u32::from_le_bytes(read_array(&mut self.input)?);
                return self.verify_checksum(expected).map(|()| None);
            }
        };
        Ok((len > 0).then_some(record))
    }

    fn verify_checksum(&self, expected: u32) -> io::Result<()> {
        match &self.checksum {
            Some(sum) if sum.finalize() != u64::from(expected) => {
                Err(invalid_data("a checksum of the Android sparse image is wrong: it is damaged"))
            }
            _ => Ok(()),
        }
    }

    /// Adds `len` bytes of a repeated pattern to the checksum, in as many steps as `len` has bits:
    /// a few bytes of image can contain terabytes of a pattern.
    fn add_fill(&mut self, value: [u8; 4], len: u64) {
        let Some(sum) = &mut self.checksum else {
            return;
        };
        let mut twice = zlib_digest();
        twice.update(&value);
        let mut count = len / 4;
        while count > 0 {
            if count & 1 == 1 {
                sum.combine(&twice);
            }
            count >>= 1;
            let once = twice;
            twice.combine(&once);
        }
    }

    fn skip_unread(&mut self) -> io::Result<()> {
        let mut unwanted = vec![0; if self.unread > 0 { SKIP_CHUNK } else { 0 }];
        while self.unread > 0 {
            if self.body().read(&mut unwanted)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }
}

impl<R: Read> Read for AndroidRecordBody<'_, R> {
    /// Ends with the record. An input that ends earlier is an `UnexpectedEof` error.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let decoder = &mut *self.0;
        let most = usize::try_from(decoder.unread).unwrap_or(usize::MAX).min(buf.len());
        if most == 0 {
            return Ok(0);
        }
        let len = decoder.input.read(&mut buf[..most])?;
        if len == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        decoder.unread -= len as u64;
        if let Some(sum) = &mut decoder.checksum {
            sum.update(&buf[..len]);
        }
        Ok(len)
    }
}

fn u16_at(header: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([header[at], header[at + 1]])
}

fn u32_at(header: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
}

fn read_array<const N: usize>(input: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    input.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn skip(input: &mut impl Read, len: u64) -> io::Result<()> {
    let skipped = io::copy(&mut input.take(len), &mut io::sink())?;
    if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

fn invalid_data(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {

    use proptest::prelude::*;

    use super::super::{AndroidContent, AndroidPlan, AndroidRun, AndroidWriter, BLOCK_SIZE};
    use super::*;

    /// Builds an image by hand from the header lengths, the block size, and chunks.
    fn image(lens: [u16; 2], block: u32, blocks: u32, chunks: &[&[u8]]) -> Vec<u8> {
        let mut wire = MAGIC.to_le_bytes().to_vec();
        for number in [1, 0, lens[0], lens[1]] {
            wire.extend(number.to_le_bytes());
        }
        for number in [block, blocks, u32::try_from(chunks.len()).unwrap(), 0] {
            wire.extend(number.to_le_bytes());
        }
        wire.resize(lens[0].max(28).into(), b'?');
        wire.extend(chunks.concat());
        wire
    }

    fn chunk(kind: u16, blocks: u32, len: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 2]);
        bytes.extend(blocks.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(body);
        bytes
    }

    fn decode(wire: &[u8], checksums: Checksums) -> io::Result<Vec<(AndroidRecord, Vec<u8>)>> {
        let mut decoder = AndroidDecoder::new(wire, checksums)?;
        let mut records = Vec::new();
        loop {
            let record = decoder.next_record()?;
            let mut bytes = Vec::new();
            decoder.body().read_to_end(&mut bytes)?;
            let is_last = record == AndroidRecord::End;
            records.push((record, bytes));
            if is_last {
                return Ok(records);
            }
        }
    }

    fn why(wire: &[u8]) -> io::ErrorKind {
        decode(wire, Checksums::Skip).unwrap_err().kind()
    }

    #[test]
    fn longer_headers_are_skipped() {
        let raw = [&chunk(RAW, 1, 24, b"####")[..], b"12345678"].concat();
        let wire = image([40, 16], 8, 1, &[&raw]);
        let records = decode(&wire, Checksums::Skip).unwrap();
        assert_eq!(records[1], (AndroidRecord::Data(0..8), b"12345678".to_vec()));
        assert_eq!(records[2].0, AndroidRecord::End);
    }

    #[test]
    fn unread_data_is_skipped_and_still_counts_for_the_checksum() {
        let data = [9; 4096 * 20];
        let sum = crc32fast::hash(&data);
        for (sum, fine) in [(sum, true), (sum ^ 1, false)] {
            let wire = image(
                [28, 12],
                4096,
                20,
                &[&chunk(RAW, 20, 12 + 4096 * 20, &data), &chunk(CRC32, 0, 16, &sum.to_le_bytes())],
            );
            let mut decoder = AndroidDecoder::new(&wire[..], Checksums::Verify).unwrap();
            decoder.next_record().unwrap();
            assert_eq!(decoder.next_record().unwrap(), AndroidRecord::Data(0..4096 * 20));
            assert_eq!(decoder.next_record().is_ok(), fine);
            decode(&wire, Checksums::Skip).unwrap();
        }
    }

    #[test]
    fn a_terabyte_of_fill_is_verified_quickly() {
        let fill = |blocks: u32| chunk(FILL, blocks, 16, b"abcd");
        let sum = crc32fast::hash(&b"abcd".repeat(1024 * 3));
        let small = image([28, 12], 4096, 3, &[&fill(3), &chunk(CRC32, 0, 16, &sum.to_le_bytes())]);
        decode(&small, Checksums::Verify).unwrap();
        let zeros = crc32fast::hash(&[0; 8192]);
        let skipped = image(
            [28, 12],
            4096,
            2,
            &[&chunk(DONT_CARE, 2, 12, b""), &chunk(CRC32, 0, 16, &zeros.to_le_bytes())],
        );
        decode(&skipped, Checksums::Verify).unwrap();
        let large = image(
            [28, 12],
            4096,
            u32::MAX - 1,
            &[&fill(u32::MAX - 1), &chunk(CRC32, 0, 16, &[0; 4])],
        );
        assert_eq!(
            decode(&large, Checksums::Verify).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
    }

    #[test]
    fn hostile_headers_are_refused() {
        let whole = |block, blocks| image([28, 12], block, blocks, &[]);
        for wire in [
            [b"not one.".as_slice(), &[0; 40]].concat(),
            [&whole(4096, 0)[..4], &[2, 0], &[0; 40]].concat(),
            image([27, 12], 4096, 0, &[]),
            image([28, 11], 4096, 0, &[]),
            whole(0, 0),
            whole(4097, 0),
            whole(u32::MAX - 3, u32::MAX),
            // The chunks do not reach the end.
            whole(4096, 1),
        ] {
            assert_eq!(why(&wire), io::ErrorKind::InvalidData, "{wire:?}");
        }
        assert!(decode(&whole(4096, 0), Checksums::Skip).is_ok(), "an empty one is none of those");
    }

    #[test]
    fn chunks_that_contradict_themselves_are_refused() {
        for bad in [
            chunk(RAW, 1, 12, b""),
            chunk(RAW, 1, 4096 + 11, &[0; 4095]),
            chunk(RAW, u32::MAX, u32::MAX, b""),
            chunk(RAW, 0x10_0001, 12 + 4096, &[0; 4096]),
            chunk(FILL, 1, 12, b""),
            chunk(FILL, 1, 20, &[0; 8]),
            chunk(FILL, 2, 16, &[0; 4]),
            chunk(DONT_CARE, 1, 16, &[0; 4]),
            chunk(DONT_CARE, 1, 0, b""),
            chunk(CRC32, 1, 16, &[0; 4]),
            chunk(CRC32, 0, 12, b""),
            chunk(0xCAC5, 1, 12, b""),
        ] {
            assert_eq!(why(&image([28, 12], 4096, 1, &[&bad])), io::ErrorKind::InvalidData);
        }
    }

    #[test]
    fn a_truncated_image_is_an_error_wherever_it_is_cut() {
        let wire = image(
            [28, 12],
            4096,
            3,
            &[
                &chunk(RAW, 1, 12 + 4096, &[3; 4096]),
                &chunk(FILL, 1, 16, b"abcd"),
                &chunk(DONT_CARE, 1, 12, b""),
            ],
        );
        decode(&wire, Checksums::Skip).unwrap();
        for cut in (0..wire.len()).filter(|cut| *cut < 100 || *cut > 4000) {
            assert_eq!(why(&wire[..cut]), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
    }

    proptest! {
        #[test]
        fn a_written_image_is_read_back_unchanged(
            lens in prop::collection::vec((1..5u64, 0..3u8, any::<u8>()), 0..20),
            piece in 1..9000usize,
        ) {
            let mut runs = Vec::<AndroidRun>::new();
            let mut image = Vec::new();
            for (blocks, kind, byte) in lens {
                let content = [AndroidContent::DontCare, AndroidContent::Zeros, AndroidContent::Data][usize::from(kind)];
                let start = image.len() as u64;
                let end = start + blocks * BLOCK_SIZE;
                let byte = if content == AndroidContent::Data { byte } else { 0 };
                image.resize(usize::try_from(end).unwrap(), byte);
                runs.push(AndroidRun { range: start..end, content });
            }
            let size = image.len() as u64;
            let runs = super::super::whole_blocks(size, runs).unwrap();
            let plan = AndroidPlan::new(size, &runs).unwrap();
            let mut writer = AndroidWriter::new(Vec::new(), plan).unwrap();
            for run in &runs {
                writer.start_run(run).unwrap();
                if run.content == AndroidContent::Data {
                    let range = usize::try_from(run.range.start).unwrap()
                        ..usize::try_from(run.range.end).unwrap();
                    for bytes in image[range].chunks(piece) {
                        writer.write_bytes(bytes).unwrap();
                    }
                }
            }
            let (wire, totals) = writer.finish().unwrap();
            prop_assert_eq!(totals.len, wire.len() as u64);

            let records = decode(&wire, Checksums::Verify).unwrap();
            prop_assert_eq!(&records[0].0, &AndroidRecord::Size(size));
            prop_assert_eq!(records.len(), runs.len() + 2);
            for (run, (record, bytes)) in runs.iter().zip(&records[1..]) {
                let range = run.range.clone();
                match run.content {
                    AndroidContent::DontCare => prop_assert_eq!(record, &AndroidRecord::DontCare(range)),
                    AndroidContent::Zeros => prop_assert_eq!(record, &AndroidRecord::Fill(range, [0; 4])),
                    AndroidContent::Data => {
                        let at = usize::try_from(range.start).unwrap();
                        prop_assert_eq!(record, &AndroidRecord::Data(range));
                        prop_assert_eq!(&image[at..at + bytes.len()], &bytes[..]);
                    }
                }
            }
        }

        #[test]
        fn random_bytes_cause_at_most_an_error(
            noise in prop::collection::vec(any::<u8>(), 0..200),
            at in 0..150usize,
        ) {
            let raw = chunk(RAW, 1, 20, b"12345678");
            let mut wire = image([28, 12], 8, 3, &[&raw, &chunk(FILL, 2, 16, b"abcd")]);
            let at = at.min(wire.len());
            wire.splice(at..wire.len().min(at + noise.len()), noise);
            // Every record consumes bytes of the input, so this terminates.
            let _: io::Result<_> = decode(&wire, Checksums::Verify);
        }
    }
}
