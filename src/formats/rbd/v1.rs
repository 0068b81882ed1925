//! The encoding of version 1, for diffs in a file.

use std::ops::Range;

/// Returns the first bytes of a diff of a disk of `size` bytes: the banner and the size.
#[must_use]
pub fn preamble(size: u64) -> [u8; 21] {
    let mut bytes = *b"rbd diff v1\ns\0\0\0\0\0\0\0\0";
    bytes[13..].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// Returns the header that precedes the bytes of `range`.
#[must_use]
pub fn data_header(range: &Range<u64>) -> [u8; 17] {
    record_header(b'w', range)
}

/// Returns the record for a range of zeros.
#[must_use]
pub fn zeros_record(range: &Range<u64>) -> [u8; 17] {
    record_header(b'z', range)
}

fn record_header(tag: u8, range: &Range<u64>) -> [u8; 17] {
    let mut bytes = [tag; 17];
    bytes[1..9].copy_from_slice(&range.start.to_le_bytes());
    bytes[9..].copy_from_slice(&range.end.saturating_sub(range.start).to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::END_RECORD;
    use super::*;

    #[test]
    fn the_encoding_matches_the_format_byte_for_byte() {
        let mut expected = b"rbd diff v1\n".to_vec();
        expected.extend(b"s\0\x10\0\0\0\0\0\0");
        expected.extend(b"w\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0abc");
        expected.extend(b"z\x08\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0");
        expected.extend(b"e");
        let mut diff = preamble(4096).to_vec();
        diff.extend(data_header(&(5..8)));
        diff.extend(b"abc");
        diff.extend(zeros_record(&(8..264)));
        diff.extend(END_RECORD);
        assert_eq!(diff, expected);
    }
}
