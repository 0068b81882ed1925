//! The text of a `map`, generated as the reader proceeds.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::disk::Disk;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::Wait;
use crate::pool::check_cancelled;

/// Extents described at a time for a `map`. Described but unread text is kept: 8 KiB.
const MAP_BATCH: usize = 64;

/// A `map` that is being read: JSON generated as the reader proceeds, so that a disk of a million
/// extents costs no memory. The text can only be read in order, like a pipe: a read that starts
/// elsewhere would need everything before it described in vain.
pub struct MapText {
    disk: Arc<Disk>,
    state: Mutex<MapState>,
}

#[derive(Default)]
struct MapState {
    /// The reader's offset in the text.
    offset: u64,
    /// The described text from `offset` on.
    ready: Vec<u8>,
    /// The next byte of the disk to describe.
    next_byte: u64,
    /// The last extent, which may continue in the next batch.
    pending: Option<(Extent, u32)>,
    begun: bool,
    ended: bool,
}

impl MapText {
    /// Creates the map of `disk`, from the start.
    #[must_use]
    pub fn new(disk: Arc<Disk>) -> Self {
        Self { disk, state: Mutex::default() }
    }

    /// Returns up to `len` bytes of the text from `offset` on, which must be where the last read
    /// ended.
    ///
    /// # Errors
    /// `ESPIPE` for any other offset; the host's errno from the base; `EIO` when this read has been
    /// given up; `ESTALE` when the disk was removed.
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
            // The disk was removed meanwhile: the text would end early and yet look complete.
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
    /// Writes out the pending extent.
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
