//! Page-aligned memory for direct I/O.
//!
//! The allocator returns large blocks that start a few bytes after a page boundary. So the buffer
//! allocates one page more than needed and starts at the boundary inside: that needs no `unsafe`.

/// Alignment of a buffer's start in bytes. No device requires more than a page.
pub(crate) const ALIGNMENT: usize = 4096;

/// A page-aligned buffer.
#[derive(Debug, Default)]
pub(crate) struct AlignedBuf {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuf {
    /// Creates an empty buffer.
    #[must_use]
    pub(crate) const fn new() -> Self {
        Self { bytes: Vec::new(), start: 0 }
    }

    /// Creates a buffer with a copy of `data`.
    #[must_use]
    pub(crate) fn copy_of(data: &[u8]) -> Self {
        let mut bytes: Vec<u8> = Vec::with_capacity(data.len() + ALIGNMENT);
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        // Within the capacity, so the memory does not move.
        bytes.resize(start, 0);
        bytes.extend_from_slice(data);
        Self { bytes, start }
    }

    /// Returns space for `len` bytes, reused from call to call. The contents are left over or zero.
    pub(crate) fn prepare(&mut self, len: usize) -> &mut [u8] {
        if self.bytes.len() < self.start + len {
            self.bytes = vec![0; len + ALIGNMENT];
            self.start = self.bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        }
        &mut self.bytes[self.start..self.start + len]
    }

    /// All bytes of the buffer.
    #[must_use]
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_buffer_is_page_aligned_and_holds_its_data() {
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
