//! The decoder of rbd diffs of version 2.

use std::io::{self, Read};
use std::ops::Range;

use super::v2::BANNER;

/// The most bytes of a skipped record (`t` or unknown): 1 MiB. Such records hold names.
const MAX_SKIPPED: u64 = 1 << 20;

/// The longest accepted name of a snapshot in bytes: the host's limit for a file name.
const MAX_NAME_LEN: u32 = 255;

/// A record of a diff.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RbdRecord {
    /// The size of the disk in bytes.
    Size(u64),
    /// The diff contains only the changes since this snapshot.
    Since(String),
    /// The bytes of this range follow; the caller must read all of them.
    Data(Range<u64>),
    /// This range reads as zeros.
    Zeros(Range<u64>),
    /// The diff is complete.
    End,
}

/// A record whose tag may be unknown.
pub(super) enum TaggedRecord {
    Known(RbdRecord),
    /// The payload of `len` bytes follows; the caller must read or skip all of it.
    Unknown {
        tag: u8,
        len: u64,
    },
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

    /// Returns the next record. Unknown tags are skipped.
    ///
    /// # Errors
    /// `InvalidData` if lengths contradict each other, for a snapshot name that is no name, and for
    /// an unknown record of more than 1 MiB; `UnexpectedEof`, also if the end record is missing; the
    /// errors of `input`.
    pub fn next_record(&mut self) -> io::Result<RbdRecord> {
        loop {
            match self.next_tagged()? {
                TaggedRecord::Known(record) => return Ok(record),
                TaggedRecord::Unknown { len, .. } => self.skip(len)?,
            }
        }
    }

    /// Returns the next record, whatever its tag.
    ///
    /// # Errors
    /// As for [`next_record`](Self::next_record).
    pub(super) fn next_tagged(&mut self) -> io::Result<TaggedRecord> {
        let [tag] = self.read_array()?;
        if tag == b'e' {
            return Ok(TaggedRecord::Known(RbdRecord::End));
        }
        let len = self.read_u64()?;
        let record = match tag {
            b's' if len == 8 => RbdRecord::Size(self.read_u64()?),
            b'f' => RbdRecord::Since(self.read_name(len)?),
            b'z' if len == 16 => RbdRecord::Zeros(self.read_range()?),
            b'w' if len >= 16 => {
                let range = self.read_range()?;
                if range.end - range.start != len - 16 {
                    return Err(invalid_data("a data record has two lengths"));
                }
                RbdRecord::Data(range)
            }
            b's' | b'z' | b'w' => return Err(invalid_data("a record has a wrong length")),
            _ => return Ok(TaggedRecord::Unknown { tag, len }),
        };
        Ok(TaggedRecord::Known(record))
    }

    /// Returns the input, for reading the bytes of a data record.
    pub fn input(&mut self) -> &mut R {
        &mut self.input
    }

    /// Skips `len` bytes of an unknown record.
    pub(super) fn skip(&mut self, len: u64) -> io::Result<()> {
        if len > MAX_SKIPPED {
            return Err(invalid_data("an unknown record is too long"));
        }
        let skipped = io::copy(&mut (&mut self.input).take(len), &mut io::sink())?;
        if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    /// Reads a snapshot name: its length as u32, and its bytes.
    fn read_name(&mut self, len: u64) -> io::Result<String> {
        let name_len = self.read_array().map(u32::from_le_bytes)?;
        if len != u64::from(name_len) + 4 || name_len > MAX_NAME_LEN {
            return Err(invalid_data("a snapshot name has a wrong length"));
        }
        let mut name = Vec::new();
        (&mut self.input).take(u64::from(name_len)).read_to_end(&mut name)?;
        if name.len() as u64 != u64::from(name_len) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        String::from_utf8(name).map_err(|_| invalid_data("a snapshot name is no UTF-8"))
    }

    fn read_range(&mut self) -> io::Result<Range<u64>> {
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

    use super::super::END_RECORD;
    use super::super::v2::{data_header, preamble, record_header, since_record, zeros_record};
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
    fn snapshot_names_and_unknown_tags_are_skipped() {
        let mut wire = BANNER.to_vec();
        wire.extend(b"t\x06\0\0\0\0\0\0\0\x02\0\0\0ab?\x01\0\0\0\0\0\0\0xe");
        assert_eq!(decode(&wire).unwrap(), [(RbdRecord::End, Vec::new())]);
    }

    #[test]
    fn the_snapshot_before_the_changes_has_a_name_of_at_most_255_bytes() {
        for (name, is_name) in
            [("", true), ("ab", true), (&"a".repeat(255), true), (&"a".repeat(256), false)]
        {
            let wire = [&BANNER[..], &since_record(name).unwrap(), b"e"].concat();
            let records = decode(&wire).map(|records| records[0].0.clone());
            assert_eq!(records.ok(), is_name.then(|| RbdRecord::Since(name.to_owned())));
        }
        for wrong in
            [&b"f\x06\0\0\0\0\0\0\0\x03\0\0\0ab"[..], b"f\x06\0\0\0\0\0\0\0\x02\0\0\0a\xff"]
        {
            let wire = [&BANNER[..], wrong, b"e"].concat();
            assert_eq!(decode(&wire).unwrap_err().kind(), io::ErrorKind::InvalidData);
        }
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
