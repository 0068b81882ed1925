//! The placement of a file's blocks on the host's device (FIEMAP, linux/fiemap.h).
//!
//! ```text
//!   struct fiemap                      struct fiemap_extent
//!   0   start   u64                    0   logical   u64
//!   8   length  u64                    8   physical  u64
//!   16  flags, mapped, count, 0  u32   16  length    u64
//!   32  count extents                  40  flags     u32      56 bytes in all
//! ```

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`, 32 bytes without the extents.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;
/// `FIEMAP_FLAG_SYNC`: the host writes dirty data, which thereby gets its place, before it answers.
const FIEMAP_FLAG_SYNC: u32 = 1;
/// Extents per call: 28 KiB.
const EXTENTS_PER_CALL: usize = 512;

/// `FIEMAP_EXTENT_LAST`.
const FIEMAP_EXTENT_LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_MERGED` and `FIEMAP_EXTENT_SHARED`: an extent with only these flags and
/// [`FIEMAP_EXTENT_LAST`] is plain bytes at a place on the device. Any other flag means that the
/// place does not determine the bytes: allocation delayed, reserved and not written, compressed,
/// encrypted, inside an inode.
const PLAIN_EXTENT_FLAGS: u32 = FIEMAP_EXTENT_LAST | 0x1000 | 0x2000;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct FiemapExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

#[repr(C)]
struct FiemapRequest {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
    extents: [FiemapExtent; EXTENTS_PER_CALL],
}

/// Whether the host writes dirty data before it reports extents. Until dirty data is written, a
/// changed block may still be reported as shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flush {
    /// Written first: the answer is current, but has to wait for the device.
    First,
    /// Not written: the answer covers only data that was already written back.
    No,
}

/// A range of a file for which the host holds space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedExtent {
    /// The bytes of the file, half-open.
    pub(super) range: Range<u64>,
    /// The place of the first byte, in bytes of the host's device; `None` when the place does not
    /// determine the bytes.
    pub(super) physical: Option<u64>,
}

/// Iterates over the mapped extents of a file in order, fetching a batch at a time.
pub(super) struct Fiemap<'a> {
    file: &'a File,
    flush: Flush,
    request: Box<FiemapRequest>,
    /// The index of the next extent in the batch.
    index: usize,
    /// The offset in bytes at which the next batch begins; `None` when there is none.
    next: Option<u64>,
}

impl<'a> Fiemap<'a> {
    pub(super) fn new(file: &'a File, flush: Flush) -> Self {
        Self::starting_at(file, 0, flush)
    }

    /// Iterates over the extents that reach past byte `start`.
    pub(super) fn starting_at(file: &'a File, start: u64, flush: Flush) -> Self {
        let extents = [FiemapExtent::default(); EXTENTS_PER_CALL];
        let empty = FiemapRequest {
            start: 0,
            length: 0,
            flags: 0,
            mapped: 0,
            count: 0,
            reserved: 0,
            extents,
        };
        Self { file, flush, request: Box::new(empty), index: 0, next: Some(start) }
    }

    /// Fetches the extents from `start` on.
    fn fetch_batch(&mut self, start: u64) -> io::Result<()> {
        let request = &mut *self.request;
        request.start = start;
        request.length = u64::MAX - start;
        request.flags = match self.flush {
            Flush::First => FIEMAP_FLAG_SYNC,
            Flush::No => 0,
        };
        request.mapped = 0;
        request.count = u32::try_from(EXTENTS_PER_CALL).unwrap_or(0);
        // SAFETY: the kernel reads 32 bytes and writes at most `count` extents after them, which
        // `FiemapRequest` has room for.
        let done = unsafe { libc::ioctl(self.file.as_raw_fd(), FS_IOC_FIEMAP, &raw mut *request) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        self.index = 0;
        let last = self.batch().last();
        self.next = match last {
            Some(extent) if extent.flags & FIEMAP_EXTENT_LAST == 0 => {
                Some(extent.logical.saturating_add(extent.length)).filter(|next| *next > start)
            }
            _ => None,
        };
        Ok(())
    }

    fn batch(&self) -> &[FiemapExtent] {
        let mapped = usize::try_from(self.request.mapped).unwrap_or(EXTENTS_PER_CALL);
        &self.request.extents[..mapped.min(EXTENTS_PER_CALL)]
    }

    /// Returns the next extent, if there is one.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where the host has no FIEMAP.
    pub(super) fn next(&mut self) -> io::Result<Option<MappedExtent>> {
        while self.index >= self.batch().len() {
            let Some(start) = self.next else { return Ok(None) };
            self.fetch_batch(start)?;
        }
        let found = self.batch()[self.index];
        self.index += 1;
        let physical = (found.flags & !PLAIN_EXTENT_FLAGS == 0).then_some(found.physical);
        let range = found.logical..found.logical.saturating_add(found.length);
        Ok(Some(MappedExtent { range, physical }))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn the_structures_have_the_kernels_layout() {
        assert_eq!(size_of::<FiemapExtent>(), 56);
        assert_eq!(std::mem::offset_of!(FiemapRequest, extents), 32);
        assert_eq!(std::mem::offset_of!(FiemapExtent, flags), 40);
    }

    #[test]
    fn all_extents_are_returned_across_several_batches() {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        let count = EXTENTS_PER_CALL as u64 * 2 + 7;
        for index in 0..count {
            file.write_all_at(&[1; 4096], index * 8192).unwrap();
        }
        let mut map = Fiemap::new(&file, Flush::First);
        let mut found = Vec::new();
        while let Some(mapped) = map.next().unwrap() {
            assert!(mapped.physical.is_some());
            found.push(mapped.range);
        }
        let wanted: Vec<_> = (0..count).map(|at| at * 8192..at * 8192 + 4096).collect();
        assert_eq!(found, wanted);
    }
}
