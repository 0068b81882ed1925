//! An image of this host that a program reads, asked over its socket.
//!
//! The image is as near as any file, and the kernel caches what is read of the disk: so nothing is
//! kept here but where its holes are, and nothing is read ahead.

use std::io;
use std::ops::Range;

use parking_lot::Mutex;

use super::answer::{answer_of, as_told, is_outage, read_range};
use super::extent_cache::ExtentCache;
use super::transport::Transport;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};

/// The bytes that one question about extents is about: 1 GiB. The program looks through its tables.
const EXTENTS_STRETCH: u64 = 1 << 30;

/// An image that a program reads.
pub(crate) struct ServedImage {
    transport: Box<dyn Transport>,
    extents: Mutex<ExtentCache>,
}

impl ServedImage {
    /// Makes a layer of the image behind `transport`.
    pub(super) fn new(transport: Box<dyn Transport>) -> Self {
        Self { transport, extents: Mutex::default() }
    }

    /// Asks for the extents around `range`, and returns the first of them in it.
    fn ask_extent(&self, range: Range<u64>) -> io::Result<Extent> {
        let most = range.start.saturating_add(EXTENTS_STRETCH).min(self.size());
        let stretch = range.start..self.extents.lock().unknown_end(&(range.start..most));
        let found = match answer_of(|done| self.transport.extents(stretch, done)).wait() {
            Ok(found) => found,
            Err(error) if is_outage(&error) => return Err(as_told(&error)),
            // What it cannot say counts as data, which a read finds bad or good.
            Err(_) => return Ok(Extent::new(range, ExtentKind::Data)),
        };
        self.extents.lock().insert(&found);
        let first = found.first().and_then(|first| first.clip(&range));
        Ok(first.unwrap_or_else(|| Extent::new(range, ExtentKind::Data)))
    }
}

impl Layer for ServedImage {
    fn size(&self) -> u64 {
        self.transport.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        if range.start >= self.size() {
            return Ok(Extent::new(range, ExtentKind::Hole));
        }
        let range = range.start..range.end.min(self.size());
        if !self.transport.knows_extents() {
            return Ok(Extent::new(range, ExtentKind::Data));
        }
        if let Some(known) = self.extents.lock().get(&range) {
            return Ok(known);
        }
        match wait {
            Wait::No => Err(os_error(libc::EAGAIN)),
            Wait::Yes => self.ask_extent(range),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let asked = offset..offset.saturating_add(buf.len() as u64);
        if offset >= self.size() {
            return Ok(Extent::new(asked, ExtentKind::Hole));
        }
        let mut range = offset..asked.end.min(self.size());
        if let Some(known) = self.extents.lock().get(&range) {
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
