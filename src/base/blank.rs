//! The blank base: `blank:SIZE`, a disk that is still empty.

use std::io;
use std::ops::Range;

use crate::extents::{Extent, ExtentKind};
use crate::layer::{CopyFn, Layer, Wait};

/// A layer that is a single hole.
#[derive(Clone, Copy, Debug)]
pub struct Blank {
    size: u64,
}

impl Blank {
    /// Creates a blank of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size }
    }
}

impl Layer for Blank {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, range: Range<u64>, _wait: Wait) -> io::Result<Extent> {
        Ok(Extent { range, kind: ExtentKind::Hole })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, _wait: Wait) -> io::Result<Extent> {
        Ok(Extent {
            range: offset..offset.saturating_add(buf.len() as u64),
            kind: ExtentKind::Hole,
        })
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((self.extent_at(range, wait)?, None))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_blank_is_one_hole_and_leaves_the_buffer_unchanged() {
        let blank = Blank::new(1 << 20);
        assert_eq!(blank.size(), 1 << 20);
        let extent = blank.extent_at(5..700_000, Wait::No).unwrap();
        assert_eq!((extent.range, extent.kind), (5..700_000, ExtentKind::Hole));

        let mut buf = [7u8; 16];
        let extent = blank.read_at(&mut buf, 4096, Wait::No).unwrap();
        assert_eq!((extent.range, extent.kind), (4096..4112, ExtentKind::Hole));
        assert_eq!(buf, [7u8; 16]);
    }
}
