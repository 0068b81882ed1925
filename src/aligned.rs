//! Memory that direct I/O can be done with: it begins on a page border.
//!
//! The allocator hands out large pieces a few bytes behind such a border. So a page more is asked
//! for than is needed, and the border is looked for inside: no `unsafe`, and nobody else minds.

/// Where a buffer begins: a multiple of this many bytes. No device asks for more than a page.
pub const ALIGNMENT: usize = 4096;

/// A buffer that begins on a page border.
#[derive(Debug, Default)]
pub struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuf {
    /// One that holds nothing.
    #[must_use]
    pub const fn new() -> Self {
        Self { bytes: Vec::new(), start: 0 }
    }

    /// A buffer that holds `data`.
    #[must_use]
    pub fn copy_of(data: &[u8]) -> Self {
        let mut bytes: Vec<u8> = Vec::with_capacity(data.len() + ALIGNMENT);
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        // Inside the capacity: it is not moved.
        bytes.resize(start, 0);
        bytes.extend_from_slice(data);
        Self { bytes, start }
    }

    /// Room for `len` bytes, kept from call to call; what is in it is left over or zero.
    pub fn prepare(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < self.start + len {
            self.bytes = vec![0; len + ALIGNMENT];
            self.start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        }
        &mut self.bytes[self.start..self.start + len]
    }

    /// All it holds.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_begins_on_a_page_border_and_holds_what_it_should() {
        let mut kept = AlignedBuf::default();
        for len in [0, 1, 511, 4096, 70_000, 4096, 1 << 20, (1 << 20) + 1] {
            let data: Vec<u8> = (0..len).zip((0..251_u8).cycle()).map(|(_, byte)| byte).collect();
            let copy = AlignedBuf::copy_of(&data);
            assert_eq!(copy.as_slice(), data);
            assert!(len == 0 || copy.as_slice().as_ptr().align_offset(ALIGNMENT) == 0);
            let room = kept.prepare(len);
            assert_eq!(room.len(), len);
            assert!(len == 0 || room.as_ptr().align_offset(ALIGNMENT) == 0);
            room.copy_from_slice(&data);
            assert_eq!(kept.as_slice()[..len], data);
        }
    }
}
