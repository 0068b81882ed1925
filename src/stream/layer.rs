//! The [`Layer`] interface of streams. The mount parks replies that have to wait; these calls are
//! for other callers.

use std::io;
use std::ops::Range;
use std::sync::mpsc;

use super::input::Input;
use super::output::Output;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, ReadBelow, Wait, WritableLayer};

/// Clips `range` to the disk; returns a hole for a range past its end.
fn clip_to_size(size: u64, range: Range<u64>) -> Result<Range<u64>, Extent> {
    match range.start < size {
        true => Ok(range.start..range.end.min(size)),
        false => Err(Extent::new(range, ExtentKind::Hole)),
    }
}

impl Layer for Output {
    fn size(&self) -> u64 {
        Output::size(self)
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        match clip_to_size(Output::size(self), range) {
            Ok(range) => Output::extent_at(self, range, wait),
            Err(hole) => Ok(hole),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let range = match clip_to_size(Output::size(self), offset..offset + buf.len() as u64) {
            Ok(range) => range,
            Err(hole) => return Ok(hole),
        };
        let len = usize::try_from(range.end - range.start).unwrap_or(buf.len());
        self.read(&mut buf[..len], offset, wait)?;
        Ok(Extent::new(range, ExtentKind::Data))
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((Layer::extent_at(self, range, wait)?, None))
    }
}

impl WritableLayer for Output {
    fn write_at(&self, buf: &[u8], offset: u64, _: &dyn ReadBelow, wait: Wait) -> io::Result<()> {
        if wait == Wait::No {
            return Err(os_error(libc::EAGAIN));
        }
        let (sender, receiver) = mpsc::channel();
        // The send fails only if the receiver was dropped and needs no answer.
        self.write(offset, buf, 0, Box::new(move |result| drop(sender.send(result))));
        receiver.recv().unwrap_or_else(|_| Err(os_error(libc::EIO)))
    }

    fn zero(&self, range: Range<u64>, _: &dyn ReadBelow, _: Wait) -> io::Result<()> {
        self.discard(range)
    }

    fn punch_hole(&self, range: Range<u64>, _: &dyn ReadBelow, _: Wait) -> io::Result<()> {
        self.discard(range)
    }

    /// Reserves nothing: data that does not fit is sent. An error would make libc write a byte to
    /// each block.
    fn allocate(&self, _: Range<u64>, _: Wait) -> io::Result<()> {
        Output::sync(self)
    }

    fn set_size(&self, size: u64) -> io::Result<()> {
        self.truncate(size)
    }

    fn sync(&self) -> io::Result<()> {
        Output::sync(self)
    }
}

impl Layer for Input {
    fn size(&self) -> u64 {
        Input::size(self)
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        Ok(Input::extent_at(self, range))
    }

    fn read_at(&self, _: &mut [u8], _: u64, _: Wait) -> io::Result<Extent> {
        // Bytes of an input stream are delivered to parked reads, not fetched.
        Err(os_error(libc::EOPNOTSUPP))
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        _: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        Ok((Layer::extent_at(self, range, wait)?, None))
    }
}
