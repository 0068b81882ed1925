//! The rbd diff, version 2: records that carry offsets. `rbd` itself writes this version inside its
//! export format 2; `import-diff` and `merge-diff` accept only version 1 (`export/rbd.rs`).
//!
//! ```text
//!   "rbd diff v2\n"
//!   's' len=8      size                       the size of the disk
//!   'w' len=16+n   offset n  bytes...         data
//!   'z' len=16     offset n                   zeros (or a hole: the format does not distinguish)
//!   'e'                                       the end; a diff without it was cut short
//! ```
//!
//! All numbers are little-endian u64. `len` counts the bytes that follow it, so a reader can skip
//! unknown tags. Source: Ceph, doc/dev/rbd-diff.rst. A later record overrides an earlier one, so
//! the first blocks of a disk may be sent again at the end.
//!
//! The size comes first, before the end of a stream with `pad=off` is known, so it is always that
//! of the disk. Ranges without a record keep their content, which in a new image is zeros.

use std::io::{self, Read};
use std::ops::Range;

/// The first bytes of every diff.
pub const BANNER: &[u8; 12] = b"rbd diff v2\n";

/// The last byte of a complete diff.
pub const END_RECORD: [u8; 1] = *b"e";

/// The most bytes of a skipped record (`f`, `t` or unknown): 1 MiB. Such records hold names.
const MAX_SKIPPED: u64 = 1 << 20;

/// Returns the first bytes of a diff of a disk of `size` bytes: the banner and the size.
#[must_use]
pub fn preamble(size: u64) -> [u8; 29] {
    let mut bytes = [0; 29];
    bytes[..12].copy_from_slice(BANNER);
    bytes[12] = b's';
    bytes[13..21].copy_from_slice(&8u64.to_le_bytes());
    bytes[21..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// Returns the header that precedes the bytes of `range`.
#[must_use]
pub fn data_header(range: &Range<u64>) -> [u8; 25] {
    let len = range.end.saturating_sub(range.start);
    record_header(b'w', len.saturating_add(16), range.start, len)
}

/// Returns the record for a range of zeros or a hole.
#[must_use]
pub fn zeros_record(range: &Range<u64>) -> [u8; 25] {
    record_header(b'z', 16, range.start, range.end.saturating_sub(range.start))
}

fn record_header(tag: u8, payload: u64, offset: u64, len: u64) -> [u8; 25] {
    let mut bytes = [tag; 25];
    bytes[1..9].copy_from_slice(&payload.to_le_bytes());
    bytes[9..17].copy_from_slice(&offset.to_le_bytes());
    bytes[17..].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// A record of a diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RbdRecord {
    /// The size of the disk in bytes.
    Size(u64),
    /// The bytes of this range follow; the caller must read all of them.
    Data(Range<u64>),
    /// This range reads as zeros.
    Zeros(Range<u64>),
    /// The diff is complete.
    End,
}

/// A decoder for the records of a diff.
#[derive(Debug)]
pub struct RbdDecoder<R> {
    input: R,
}

impl<R: Read> RbdDecoder<R> {
    /// Reads the banner.
    ///
    /// # Errors
    /// `InvalidData` if the input is not an rbd diff v2; `UnexpectedEof`; the errors of `input`.
    pub fn new(mut input: R) -> io::Result<Self> {
        let mut banner = [0; BANNER.len()];
        input.read_exact(&mut banner)?;
        if &banner != BANNER {
            return Err(invalid_data("it is no rbd diff v2"));
        }
        Ok(Self { input })
    }

    /// Returns the next record. Snapshot names and unknown tags are skipped.
    ///
    /// # Errors
    /// `InvalidData` if lengths contradict each other; `UnexpectedEof`, also if the end record is
    /// missing; the errors of `input`.
    pub fn next_record(&mut self) -> io::Result<RbdRecord> {
        loop {
            let [tag] = self.read_array()?;
            if tag == b'e' {
                return Ok(RbdRecord::End);
            }
            let payload = self.read_u64()?;
            match tag {
                b's' if payload == 8 => return Ok(RbdRecord::Size(self.read_u64()?)),
                b'z' if payload == 16 => return Ok(RbdRecord::Zeros(self.range()?)),
                b'w' if payload >= 16 => {
                    let range = self.range()?;
                    if range.end - range.start != payload - 16 {
                        return Err(invalid_data("a data record has two lengths"));
                    }
                    return Ok(RbdRecord::Data(range));
                }
                b's' | b'z' | b'w' => return Err(invalid_data("a record has a wrong length")),
                _ => self.skip(payload)?,
            }
        }
    }

    /// Returns the input, for reading the bytes of a data record.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    fn skip(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(invalid_data("an unknown record is too long"));
        }
        let skipped = io::copy(&mut (&mut self.input).take(len), &mut io::sink())?;
        if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn range(&mut self) -> io::Result<Range<u64>> {
        let (offset, len) = (self.read_u64()?, self.read_u64()?);
        let end =
            offset.checked_add(len).ok_or_else(|| invalid_data("a record is past all offsets"))?;
        Ok(offset..end)
    }

    fn read_u64(&mut self) -> io::Result<u64> {
        self.read_array().map(u64::from_le_bytes)
    }

    fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}

fn invalid_data(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Decodes all records of a diff, with the bytes of the data records.
    fn decode(wire: &[u8]) -> io::Result<Vec<(RbdRecord, Vec<u8>)>> {
        let mut decoder = RbdDecoder::new(wire)?;
        let mut records = Vec::new();
        loop {
            let record = decoder.next_record()?;
            let mut bytes = Vec::new();
            if let RbdRecord::Data(range) = &record {
                bytes.resize(usize::try_from(range.end - range.start).unwrap(), 0);
                decoder.input().read_exact(&mut bytes)?;
            }
            let done = record == RbdRecord::End;
            records.push((record, bytes));
            if done {
                assert!(decoder.input().is_empty(), "there is more after the end");
                return Ok(records);
            }
        }
    }

    fn encode(size: u64, pieces: &[(u64, Option<Vec<u8>>, u64)]) -> Vec<u8> {
        let mut wire = preamble(size).to_vec();
        for (offset, bytes, len) in pieces {
            match bytes {
                Some(bytes) => {
                    wire.extend(data_header(&(*offset..offset + bytes.len() as u64)));
                    wire.extend(bytes);
                }
                None => wire.extend(zeros_record(&(*offset..offset + len))),
            }
        }
        wire.extend(END_RECORD);
        wire
    }

    #[test]
    fn the_encoding_matches_the_format_byte_for_byte() {
        let mut wire = b"rbd diff v2\n".to_vec();
        wire.extend(b"s\x08\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0");
        wire.extend(b"w\x13\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0abc");
        wire.extend(b"z\x10\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0");
        wire.extend(b"e");
        assert_eq!(encode(4096, &[(5, Some(b"abc".to_vec()), 0), (8, None, 256)]), wire);
    }

    #[test]
    fn snapshot_names_and_unknown_tags_are_skipped() {
        let mut wire = BANNER.to_vec();
        wire.extend(b"t\x06\0\0\0\0\0\0\0\x02\0\0\0ab?\x01\0\0\0\0\0\0\0xe");
        assert_eq!(decode(&wire).unwrap(), [(RbdRecord::End, Vec::new())]);
    }

    #[test]
    fn a_truncated_diff_is_an_error_wherever_it_is_cut() {
        let wire = encode(4096, &[(0, Some(vec![7; 40]), 0), (100, None, 50)]);
        for cut in 0..wire.len() {
            let error = decode(&wire[..cut]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof, "cut at {cut}");
        }
        decode(&wire).unwrap();
    }

    #[test]
    fn lengths_that_contradict_themselves_are_refused() {
        for record in [
            &record_header(b'w', 20, 0, 5)[..],
            &record_header(b'w', 15, 0, 0),
            &record_header(b'z', 17, 0, 5),
            &record_header(b'z', 16, u64::MAX, 2),
            &record_header(b'x', u64::MAX, 0, 0),
        ] {
            let wire = [&preamble(1)[..], record].concat();
            assert_eq!(decode(&wire).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
        assert!(RbdDecoder::new(&b"rbd diff v1\ns"[..]).is_err());
    }

    proptest! {
        #[test]
        fn encoded_records_are_decoded_unchanged(
            size in any::<u64>(),
            pieces in prop::collection::vec(
                (0..u64::MAX / 2, prop::option::of(prop::collection::vec(any::<u8>(), 0..50)),
                 0..u64::MAX / 2),
                0..20,
            ),
        ) {
            let records = decode(&encode(size, &pieces)).unwrap();
            prop_assert_eq!(records.len(), pieces.len() + 2);
            prop_assert_eq!(&records[0].0, &RbdRecord::Size(size));
            for ((offset, bytes, len), (record, got)) in pieces.iter().zip(&records[1..]) {
                let end = offset + bytes.as_ref().map_or(*len, |bytes| bytes.len() as u64);
                match bytes {
                    Some(bytes) => {
                        prop_assert_eq!(record, &RbdRecord::Data(*offset..end));
                        prop_assert_eq!(got, bytes);
                    }
                    None => prop_assert_eq!(record, &RbdRecord::Zeros(*offset..end)),
                }
            }
        }
    }
}
