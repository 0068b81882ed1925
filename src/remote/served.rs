//! An image of this host that a program reads, asked over its socket.
//!
//! The image is as near as any file, and the kernel caches what is read of the disk: so nothing is
//! kept here but where its holes are, and nothing is read ahead.

use std::io;
use std::ops::Range;

use super::answer::{as_told, read_range};
use super::transport::Transport;
use super::waited_extents::WaitedExtents;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};

/// An image that a program reads.
pub(crate) struct ServedImage {
    transport: Box<dyn Transport>,
    extents: WaitedExtents,
}

impl ServedImage {
    /// Makes a layer of the image behind `transport`.
    pub(super) fn new(transport: Box<dyn Transport>) -> Self {
        Self { transport, extents: WaitedExtents::default() }
    }
}

impl Layer for ServedImage {
    fn size(&self) -> u64 {
        self.transport.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        self.extents.extent_at(&*self.transport, range, wait)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size() {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        let mut range = offset..asked.end.min(self.size());
        if let Some(known) = self.extents.get(&range) {
            if known.kind != ExtentKind::Data {
                return Ok(known);
            }
            range = known.range;
        }
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        // The log says what became of the program.
        let bytes = read_range(&*self.transport, &range).map_err(|error| as_told(&error))?;
        buf.get_mut(..bytes.len()).ok_or_else(|| os_error(libc::EIO))?.copy_from_slice(&bytes);
        Ok(Extent::new(range, ExtentKind::Data))
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
