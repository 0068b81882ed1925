//! Making one layer of several: a snapshot in the middle of a stack that is deleted.
//!
//! Sealed layers are never written, so what they add up to goes into a new layer:
//!
//! ```text
//!   upper   .  d  .  z  .  .          d data, z zeros, . lower
//!   lower   a  a  .  a  .  a |...     | upper's lower_limit: what is past it stays behind
//!   new     a  d  .  z  .  . |
//! ```

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

use super::Overlay;
use super::sealed::Sealed;
use crate::extents::Kind;
use crate::host::{self, errno};
use crate::layer::{Layer, ReadBelow, Wait, WritableLayer};

/// The most that is copied between two looks at whether to stop: 32 MiB.
const PIECE: u64 = 32 << 20;
/// Bytes read and written at a time where the host cannot copy: 1 MiB.
const BUFFER: u64 = 1 << 20;

/// Nothing lies below a layer that is being put together.
pub(super) struct Nothing;

impl ReadBelow for Nothing {
    fn read_below(&self, buf: &mut [u8], _: u64, _: Wait) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn is_zero_below(&self, _: Range<u64>, _: Wait) -> io::Result<bool> {
        Ok(true)
    }
}

impl Overlay {
    /// Takes over what `layers` hold, as if they lay on top of this layer. Nobody else uses it.
    ///
    /// # Errors
    /// `EINTR` when `stop` says so between two pieces; `ENOSPC`; the host's errno.
    pub fn absorb(&self, layers: &Sealed, stop: &dyn Fn() -> bool) -> io::Result<()> {
        let (limit, size) = (layers.lower_limit(), layers.size());
        if limit < self.size() {
            // What those layers had cut off once does not come back.
            self.set_size(limit)?;
        }
        self.set_size(size)?;
        let mut at = 0;
        while at < size {
            if stop() {
                return Err(errno(libc::EINTR));
            }
            let (extent, _) = layers.extent_of(&(at..size));
            at = extent.range.end;
            match extent.kind {
                Kind::Data => self.absorb_data(layers, extent.range, stop)?,
                Kind::Zero | Kind::Hole => {
                    // Behind data that was cut off inside a block: the rest of it is zeros already.
                    let start = extent.range.start.next_multiple_of(self.block);
                    let end = extent.range.end.min(limit).next_multiple_of(self.block).min(size);
                    if start < end {
                        self.zero(start..end, &Nothing, Wait::Yes)?;
                    }
                }
                Kind::Lower => {}
            }
        }
        Ok(())
    }

    fn absorb_data(
        &self,
        layers: &Sealed,
        range: Range<u64>,
        stop: &dyn Fn() -> bool,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            if stop() {
                return Err(errno(libc::EINTR));
            }
            let end = range.end.min(at + PIECE);
            // Whole blocks, or up to the end of the disk.
            let whole = if end == self.size() { end } else { end / self.block * self.block };
            if at < whole {
                let copied = self.absorb_in_host(layers, at..whole)?;
                at += copied;
                if copied > 0 {
                    continue;
                }
            }
            let len = (end - at).min(BUFFER);
            let mut buf = vec![0; usize::try_from(len).map_err(|_| errno(libc::EFBIG))?];
            layers.read_at(&mut buf, at, Wait::Yes)?;
            self.write_at(&buf, at, &Nothing, Wait::Yes)?;
            at += len;
        }
        Ok(())
    }

    /// Has the host copy `range`, whole blocks that are data in one layer; 0 when it cannot.
    fn absorb_in_host(&self, layers: &Sealed, range: Range<u64>) -> io::Result<u64> {
        let copied = self.copy_in(&range, &mut |to, place| {
            let mut lent = |from: BorrowedFd<'_>, piece: Range<u64>| {
                host::copy_range(from, piece.clone(), to, piece.start)
            };
            Ok(layers.lend_at(place, Wait::Yes, &mut lent)?.1.unwrap_or(0))
        });
        match copied {
            Err(error) if host::cannot_copy(&error) => Ok(0),
            copied => copied,
        }
    }
}
