//! The text of a `map`: made as the reader goes on.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::disk::Disk;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::Wait;
use crate::pool::check_cancelled;

/// Extents described at a time for a `map`. What was described and not read yet is kept: 8 KiB.
const MAP_BATCH: usize = 64;

/// A `map` that is being read: JSON made as the reader goes on, so that a disk of a million
/// extents costs no memory. It is read in order, as a pipe is: whoever begins elsewhere would have
/// all before that described for nothing.
pub struct MapText {
    disk: Arc<Disk>,
    state: Mutex<MapState>,
}

#[derive(Default)]
struct MapState {
    /// Where in the text the reader is.
    offset: u64,
    /// What comes there, as far as it is described.
    ready: Vec<u8>,
    /// The next byte of the disk to describe.
    next_byte: u64,
    /// An extent that may go on in the next batch.
    pending: Option<(Extent, u32)>,
    begun: bool,
    ended: bool,
}

impl MapText {
    /// The map of `disk`, from its beginning.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    /// Up to `len` bytes of the text from `offset` on, which is where the last read ended.
    ///
    /// # Errors
    /// `ESPIPE` for any other offset; the host's errno from the base; `EIO` when nobody waits for
    /// this read any more.
    pub fn read(&self, offset: u64, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        if offset != state.offset {
            return Err(os_error(libc::ESPIPE));
        }
        while !state.ended && state.ready.len() < len {
            check_cancelled()?;
            self.describe_batch(&mut state)?;
        }
        let len = len.min(state.ready.len());
        let rest = state.ready.split_off(len);
        let read = std::mem::replace(&mut state.ready, rest);
        state.offset += read.len() as u64;
        Ok(read)
    }

    /// Describes the next batch of extents.
    fn describe_batch(&self, state: &mut MapState) -> io::Result<()> {
        let size = self.disk.size();
        let pieces = self.disk.extents_with_depth(state.next_byte..size, MAP_BATCH, Wait::Yes)?;
        if self.disk.is_closed() {
            // It was removed meanwhile: what is left of the text would look whole.
            return Err(os_error(libc::ESTALE));
        }
        for (extent, depth) in pieces {
            state.next_byte = extent.range.end;
            match &mut state.pending {
                Some((open, at)) if open.kind == extent.kind && *at == depth => {
                    open.range.end = extent.range.end;
                }
                _ => {
                    state.flush();
                    state.pending = Some((extent, depth));
                }
            }
        }
        if state.next_byte >= size {
            state.flush();
            state.ready.extend_from_slice(if state.begun { b"]\n" } else { b"[]\n" });
            state.ended = true;
        }
        Ok(())
    }
}

impl MapState {
    /// Writes the extent that is open.
    fn flush(&mut self) {
        let Some((extent, depth)) = self.pending.take() else {
            return;
        };
        let (kind, zero, data) = match extent.kind {
            ExtentKind::Data => ("data", false, true),
            ExtentKind::Zero => ("zero", true, true),
            ExtentKind::Hole | ExtentKind::Lower => ("hole", true, false),
        };
        let before = if self.begun { ",\n" } else { "[" };
        self.begun = true;
        let text = format!(
            "{before}{{ \"start\": {}, \"length\": {}, \"depth\": {depth}, \"present\": true, \"zero\": {zero}, \"data\": {data}, \"kind\": \"{kind}\"}}",
            extent.range.start,
            extent.len(),
        );
        self.ready.extend_from_slice(text.as_bytes());
    }
}
