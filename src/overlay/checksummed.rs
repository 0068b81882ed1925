//! The first line of the small TOML files of an overlay: the checksum of everything after it.
//!
//! ```text
//!   checksum = "crc32c:0123abcd"
//! ```

use crate::checksum;

/// Returns the contents of a file that holds `body`.
pub(super) fn encode(body: &str) -> Vec<u8> {
    format!("{}\n{body}", checksum_line(body)).into_bytes()
}

/// Returns the body of a file whose checksum is right.
pub(super) fn decode(bytes: &[u8]) -> Option<&str> {
    let (head, body) = std::str::from_utf8(bytes).ok()?.split_once('\n')?;
    (head == checksum_line(body)).then_some(body)
}

fn checksum_line(body: &str) -> String {
    format!("checksum = \"crc32c:{:08x}\"", checksum::crc32c(body.as_bytes()))
}
