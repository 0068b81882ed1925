//! The CRC32C of records, files and samples (the polynomial of Castagnoli, as RFC 3720 has it).

use crc_fast::{CrcAlgorithm, Digest};

/// Returns the CRC32C of `bytes`.
#[must_use]
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// Returns the CRC32C of bytes of which the first ones have the CRC32C `sum`, and the rest is `bytes`.
#[must_use]
pub fn crc32c_append(sum: u32, bytes: &[u8]) -> u32 {
    // The state of the division is the complement of the sum so far.
    let mut digest = Digest::new_with_init_state(CrcAlgorithm::Crc32Iscsi, (!sum).into());
    digest.update(bytes);
    // A CRC of 32 bits is the lower half.
    let [a, b, c, d, ..] = digest.finalize().to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4, read as little-endian numbers.
        let up: Vec<u8> = (0..32).collect();
        let down: Vec<u8> = (0..32).rev().collect();
        for (bytes, sum) in [
            (&[0; 32][..], 0x8a91_36aa),
            (&[0xff; 32], 0x62a8_ab43),
            (&up, 0x46dd_794e),
            (&down, 0x113f_db5c),
            (b"", 0),
        ] {
            assert_eq!(crc32c(bytes), sum);
        }
    }

    proptest! {
        #[test]
        fn sums_are_those_of_another_program(bytes: Vec<u8>, more in 0..70_000_usize, cut: u16, shift in 0..64_usize) {
            let long = bytes.repeat(more / bytes.len().max(1));
            let long = long.get(shift..).unwrap_or_default();
            let sum = ::crc32c::crc32c(long);
            prop_assert_eq!(crc32c(long), sum);
            let (head, tail) = long.split_at(usize::from(cut).min(long.len()));
            prop_assert_eq!(crc32c_append(crc32c(head), tail), sum);
        }
    }
}
