//! A sink with random access: a file or a block device that holds the disk itself.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::vectored::{MAX_WRITE, fitting_count, write_parts, write_some_zeros};
use crate::base::lock::OutputLock;
use crate::base::raw::HostKind;
use crate::host::{
    PUNCH_OR_ZERO, is_fallocate_unsupported, os_error, whole_device_blocks, zero_by_host,
};
use crate::program::stop::Stop;

/// The most bytes of a gap discarded in one call: 1 GiB. A discard may be slow, and the stop signal
/// is checked between two calls.
const MAX_DISCARD: u64 = 1 << 30;

/// A writer to a file or device.
#[derive(Debug)]
pub(super) struct SeekableWriter {
    file: Arc<File>,
    kind: HostKind,
    /// Keeps all disks off a device; a file has no name yet by which one could take it.
    _lock: Option<OutputLock>,
    /// The methods to try for a gap on a device: those that were found unsupported are left out.
    hole_methods: &'static [FallocateFlags],
    stop: Stop,
}

impl SeekableWriter {
    /// Creates a writer to `file`, which must read as zeros.
    pub(super) fn to_file(file: File, stop: Stop) -> Self {
        let (file, kind) = (Arc::new(file), HostKind::File);
        Self { file, kind, _lock: None, hole_methods: PUNCH_OR_ZERO, stop }
    }

    /// Creates a writer to the block device `file`, which `lock` keeps all others off.
    pub(super) fn to_device(file: Arc<File>, lock: OutputLock, stop: Stop) -> Self {
        let kind = HostKind::BlockDevice;
        Self { file, kind, _lock: Some(lock), hole_methods: PUNCH_OR_ZERO, stop }
    }

    /// Writes all of `parts` from `offset` on; calls `passed` with the length of each piece.
    pub(super) fn write_all(
        &self,
        mut offset: u64,
        parts: &[IoSlice<'_>],
        mut passed: impl FnMut(u64),
    ) -> io::Result<()> {
        write_parts(parts, |left| {
            let written = self.write_some(left, offset)?;
            passed(written as u64);
            offset += written as u64;
            Ok(written)
        })
    }

    /// Writes zeros to `range`, as data.
    pub(super) fn write_zeros(
        &self,
        range: Range<u64>,
        mut passed: impl FnMut(u64),
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let written = write_some_zeros(range.end - at, |pieces| self.write_some(pieces, at))?;
            passed(written);
            at += written;
        }
        Ok(())
    }

    /// Leaves a gap that reads as zeros: a file needs nothing, since it contains only zeros there.
    pub(super) fn write_hole(
        &mut self,
        range: Range<u64>,
        mut passed: impl FnMut(u64),
    ) -> io::Result<()> {
        if self.kind == HostKind::File {
            passed(range.end - range.start);
            return Ok(());
        }
        let inner = whole_device_blocks(&range);
        self.write_zeros(range.start..inner.start, &mut passed)?;
        let mut at = inner.start;
        while at < inner.end {
            let end = inner.end.min(at.saturating_add(MAX_DISCARD));
            self.discard(at..end, &mut passed)?;
            at = end;
        }
        self.write_zeros(inner.end..range.end, passed)
    }

    /// Makes whole sectors of a device read as zeros.
    fn discard(&mut self, range: Range<u64>, mut passed: impl FnMut(u64)) -> io::Result<()> {
        if self.stop.is_stopped() {
            return Err(os_error(libc::ECANCELED));
        }
        let unsupported =
            zero_by_host(&self.file, self.hole_methods, &range, is_fallocate_unsupported)?;
        self.hole_methods = &self.hole_methods[unsupported..];
        if self.hole_methods.is_empty() {
            return self.write_zeros(range, passed);
        }
        passed(range.end - range.start);
        Ok(())
    }

    /// Syncs everything to the disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn write_some(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<usize> {
        loop {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            let written = match fitting_count(parts) {
                0 => rustix::io::pwrite(&self.file, &parts[0][..MAX_WRITE], offset),
                count => rustix::io::pwritev(&self.file, &parts[..count], offset),
            };
            match written {
                Ok(0) => return Err(os_error(libc::EIO)),
                Ok(len) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}
