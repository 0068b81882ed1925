//! The file or device that a receiver writes to.
//!
//! A hole is punched late, after the data behind it was written: a file system that allocates more
//! than requested (XFS with an extent size) may have put space into the hole for that data.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use crate::host::{
    self, PUNCH_OR_ZERO, is_fallocate_unsupported, punch_hole, whole_device_blocks, write_all_at,
    zero_by_host,
};
use crate::zeros::ZEROS;

/// The type of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetKind {
    /// A file, in which everything at and past `clean` reads as zeros.
    File {
        /// The offset in bytes.
        clean: u64,
    },
    /// A block device with unknown content.
    Device,
}

/// A writer of the target that keeps the last hole back.
#[derive(Debug)]
pub(super) struct TargetWriter {
    file: Arc<File>,
    is_device: bool,
    /// The offset up to which the target may read as something other than zeros.
    highest: u64,
    hole: Range<u64>,
    /// The value of [`highest`](Self::highest) when the hole began.
    highest_before_hole: u64,
}

impl TargetWriter {
    pub(super) fn new(file: &Arc<File>, kind: TargetKind) -> Self {
        let (is_device, highest) = match kind {
            TargetKind::File { clean } => (false, clean),
            TargetKind::Device => (true, u64::MAX),
        };
        Self { file: Arc::clone(file), is_device, highest, hole: 0..0, highest_before_hole: 0 }
    }

    /// Writes `bytes` at `offset`.
    pub(super) fn write(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let end = offset + bytes.len() as u64;
        if offset < self.hole.end && self.hole.start < end {
            self.flush_hole()?;
        }
        write_all_at(&self.file, &[IoSlice::new(bytes)], offset)?;
        self.highest = self.highest.max(end);
        self.flush_hole()
    }

    /// Makes `range` a hole, possibly later.
    pub(super) fn write_hole(&mut self, range: Range<u64>) -> io::Result<()> {
        if self.hole.end == range.start && !self.hole.is_empty() {
            self.hole.end = range.end;
            return Ok(());
        }
        self.flush_hole()?;
        (self.hole, self.highest_before_hole) = (range, self.highest);
        Ok(())
    }

    /// Punches the hole that was kept back.
    pub(super) fn flush_hole(&mut self) -> io::Result<()> {
        let hole = std::mem::take(&mut self.hole);
        if hole.is_empty() {
            return Ok(());
        }
        if self.is_device {
            return self.discard(hole);
        }
        match punch_hole(&*self.file, hole.clone()) {
            Err(error) if is_fallocate_unsupported(&error) => {
                self.write_zeros(hole.start..hole.end.min(self.highest_before_hole))
            }
            done => done,
        }
    }

    /// Sets the length to `size` bytes if the target is a file.
    pub(super) fn set_size(&mut self, size: u64) -> io::Result<()> {
        if self.is_device { Ok(()) } else { self.file.set_len(size) }
    }

    /// Flushes the hole and syncs everything to the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.flush_hole()?;
        self.file.sync_all()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let inner = whole_device_blocks(&range);
        self.write_zeros(range.start..inner.start)?;
        let unsupported =
            zero_by_host(&*self.file, PUNCH_OR_ZERO, &inner, is_fallocate_unsupported)?;
        if unsupported == PUNCH_OR_ZERO.len() {
            self.write_zeros(inner.clone())?;
        }
        self.write_zeros(inner.end..range.end)
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(ZEROS.len()).min(ZEROS.len());
            write_all_at(&self.file, &[IoSlice::new(&ZEROS[..len])], at)?;
            at += len as u64;
        }
        Ok(())
    }
}

/// Returns the size of a device in bytes.
pub(super) fn device_size(file: &File, path: &Path) -> Result<u64, super::TransferError> {
    host::file_size(file).map_err(|error| super::TransferError::host("read", path, &error))
}
