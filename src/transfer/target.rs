//! Where it is received: what is written into the part, or into a device.
//!
//! A hole is punched late, after the data behind it was written: a file system that allocates more
//! than it is asked for (XFS with an extent size) may have put space into it for that.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FallocateFlags;

use crate::host::{fallocate, punch_hole, write_all_at};

/// A device discards whole sectors; 4 KiB is the largest in use.
const DISCARD_ALIGNMENT: u64 = 4096;
/// 1 MiB of zeros for one call.
const ZERO_CHUNK: usize = 1 << 20;

/// What is written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TargetKind {
    /// A file; all at and past `clean` reads as zeros now.
    File {
        /// In bytes.
        clean: u64,
    },
    /// A block device, of which nothing is known.
    Device,
}

/// What is written to, with the last hole.
#[derive(Debug)]
pub(super) struct TargetWriter {
    file: Arc<File>,
    is_device: bool,
    /// Up to here something else than zeros may be read.
    highest: u64,
    hole: Range<u64>,
    /// [`highest`](Self::highest) before the hole was told of.
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

    /// Makes `range` a hole.
    pub(super) fn write_hole(&mut self, range: Range<u64>) -> io::Result<()> {
        if self.hole.end == range.start && !self.hole.is_empty() {
            self.hole.end = range.end;
            return Ok(());
        }
        self.flush_hole()?;
        (self.hole, self.highest_before_hole) = (range, self.highest);
        Ok(())
    }

    /// Does what is put off.
    pub(super) fn flush_hole(&mut self) -> io::Result<()> {
        let hole = std::mem::take(&mut self.hole);
        if hole.is_empty() {
            return Ok(());
        }
        if self.is_device {
            return self.discard(hole);
        }
        match punch_hole(&*self.file, hole.clone()) {
            Err(error) if is_unsupported(&error) => {
                self.write_zeros(hole.start..hole.end.min(self.highest_before_hole))
            }
            done => done,
        }
    }

    /// Makes it `size` bytes long, if it is a file.
    pub(super) fn set_size(&mut self, size: u64) -> io::Result<()> {
        if self.is_device { Ok(()) } else { self.file.set_len(size) }
    }

    /// Everything is on the disk.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.flush_hole()?;
        self.file.sync_all()
    }

    fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let first = range.start.next_multiple_of(DISCARD_ALIGNMENT).min(range.end);
        let last = (range.end - range.end % DISCARD_ALIGNMENT).max(first);
        self.write_zeros(range.start..first)?;
        // The kernel refuses to punch unless zeros are read afterwards (blkdev_fallocate).
        let inner = first..last;
        let ways = [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE];
        let mut done = false;
        for way in ways {
            match fallocate(&*self.file, way | FallocateFlags::KEEP_SIZE, inner.clone()) {
                Ok(()) => {
                    done = true;
                    break;
                }
                Err(error) if is_unsupported(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if !done {
            self.write_zeros(inner)?;
        }
        self.write_zeros(last..range.end)
    }

    fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let mut at = range.start;
        let len =
            usize::try_from(range.end.saturating_sub(at)).unwrap_or(ZERO_CHUNK).min(ZERO_CHUNK);
        let zeros = vec![0; len];
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(ZERO_CHUNK).min(ZERO_CHUNK);
            write_all_at(&self.file, &[IoSlice::new(&zeros[..len])], at)?;
            at += len as u64;
        }
        Ok(())
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS))
}

/// The bytes of a device.
pub(super) fn device_size(file: &File, path: &Path) -> Result<u64, super::TransferError> {
    let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0));
    size.map_err(|error| super::TransferError::host("read", path, &error.into()))
}
