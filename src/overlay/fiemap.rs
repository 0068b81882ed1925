//! Where the host keeps the blocks of a file (FIEMAP, linux/fiemap.h).
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

use super::reflink::Flush;

/// `FS_IOC_FIEMAP`: `_IOWR('f', 11, struct fiemap)`, 32 bytes without its extents.
const FS_IOC_FIEMAP: libc::c_ulong = 0xC020_660B;
/// `FIEMAP_FLAG_SYNC`: what is dirty is written, and so has its place, before the answer.
const FIEMAP_FLAG_SYNC: u32 = 1;
/// Extents in one answer: 28 KiB.
const EXTENTS_PER_CALL: usize = 512;

/// `FIEMAP_EXTENT_LAST`.
const FIEMAP_EXTENT_LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_MERGED` and `FIEMAP_EXTENT_SHARED`: with these and [`FIEMAP_EXTENT_LAST`] an extent is bytes
/// at a place and nothing else. Any other flag says that the place does not tell the bytes: not
/// written yet, compressed, encrypted, inside an inode, unwritten.
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

/// Some bytes of a file that the host keeps somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct MappedExtent {
    /// Bytes of the file.
    pub(super) range: Range<u64>,
    /// The place of the first, in bytes of the host's device; `None` when it does not tell them.
    pub(super) physical: Option<u64>,
}

/// The mapped extents of a file in order, a batch at a time.
pub(super) struct Fiemap<'a> {
    file: &'a File,
    flush: Flush,
    request: Box<FiemapRequest>,
    /// The next of the batch.
    index: usize,
    /// Where the next batch begins; `None` when there is none.
    next: Option<u64>,
}

impl<'a> Fiemap<'a> {
    pub(super) fn new(file: &'a File, flush: Flush) -> Self {
        Self::starting_at(file, 0, flush)
    }

    /// The extents that reach past byte `start`.
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

    /// Asks for the extents from `start` on.
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

    /// The next extent, if there is one.
    ///
    /// # Errors
    /// The host's errno; `EOPNOTSUPP` where it has no FIEMAP.
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
    fn the_structures_are_as_large_as_the_kernels() {
        assert_eq!(size_of::<FiemapExtent>(), 56);
        assert_eq!(std::mem::offset_of!(FiemapRequest, extents), 32);
        assert_eq!(std::mem::offset_of!(FiemapExtent, flags), 40);
    }

    #[test]
    fn every_extent_of_a_file_of_more_than_a_batch_is_told() {
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
