//! The encoding of version 2, for streams.
//!
//! A later record overrides an earlier one, so the first blocks of a disk may be sent again at the
//! end. The size comes first, before the end of a stream with `pad=off` is known, so it is always
//! that of the disk.

use std::io;
use std::ops::Range;

/// The first bytes of every diff.
pub const BANNER: &[u8; 12] = b"rbd diff v2\n";

/// Returns the first bytes of a diff of a disk of `size` bytes: the banner and the size.
#[must_use]
pub fn preamble(size: u64) -> [u8; 29] {
    let mut bytes = [0; 29];
    bytes[..BANNER.len()].copy_from_slice(BANNER);
    bytes[BANNER.len()..].copy_from_slice(&size_record(size));
    bytes
}

/// Returns the record that names the snapshot before the changes. The record precedes the size,
/// since some readers do not look for it later.
///
/// # Errors
/// `InvalidInput` for a name of 4 GiB and more.
pub fn since_record(name: &str) -> io::Result<Vec<u8>> {
    let len = u32::try_from(name.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut bytes = vec![b'f'];
    bytes.extend((u64::from(len) + 4).to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes.extend(name.as_bytes());
    Ok(bytes)
}

/// Returns the record of the size of the disk in bytes.
#[must_use]
pub fn size_record(size: u64) -> [u8; 17] {
    let mut bytes = [b's'; 17];
    bytes[1..9].copy_from_slice(&8u64.to_le_bytes());
    bytes[9..].copy_from_slice(&size.to_le_bytes());
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

pub(super) fn record_header(tag: u8, payload: u64, offset: u64, len: u64) -> [u8; 25] {
    let mut bytes = [tag; 25];
    bytes[1..9].copy_from_slice(&payload.to_le_bytes());
    bytes[9..17].copy_from_slice(&offset.to_le_bytes());
    bytes[17..].copy_from_slice(&len.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::super::END_RECORD;
    use super::*;

    #[test]
    fn the_encoding_matches_the_format_byte_for_byte() {
        let mut expected = b"rbd diff v2\n".to_vec();
        expected.extend(b"s\x08\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0");
        expected.extend(b"w\x13\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0abc");
        expected.extend(b"z\x10\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0");
        expected.extend(b"e");
        let mut diff = preamble(4096).to_vec();
        diff.extend(data_header(&(5..8)));
        diff.extend(b"abc");
        diff.extend(zeros_record(&(8..264)));
        diff.extend(END_RECORD);
        assert_eq!(diff, expected);
    }
}
