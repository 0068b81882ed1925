//! Zeros in memory: the test whether bytes are all zero, and zeros to write. Pure: no I/O.

/// 1 MiB of zeros, the largest request that the kernel sends.
pub(crate) static ZEROS: [u8; 1 << 20] = [0; 1 << 20];

/// Returns whether all of `bytes` are zero, by comparing them with themselves shifted by one: that
/// is memcmp, many times faster than a loop over bytes, and it stops at the first difference.
#[must_use]
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    match bytes {
        [] => true,
        [first, rest @ ..] => *first == 0 && rest == &bytes[..rest.len()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_byte_anywhere_is_found() {
        let mut bytes = [0; 100];
        assert!(is_zero(&[]) && is_zero(&bytes));
        for at in 0..bytes.len() {
            bytes[at] = 1;
            assert!(!is_zero(&bytes) && !is_zero(&bytes[at..=at]));
            assert!(is_zero(&bytes[..at]) && is_zero(&bytes[at + 1..]));
            bytes[at] = 0;
        }
    }
}
