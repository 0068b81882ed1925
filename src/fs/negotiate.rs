//! The agreement with the kernel at `FUSE_INIT`: its abilities that are used, and sizes.

use fuser::{InitFlags, KernelConfig};

use super::passthrough;
use crate::config::CacheMode;
use crate::stream::parked;

/// Largest request in bytes, 1 MiB: the kernel's limit of pages in one request.
const MAX_IO_SIZE: u32 = 1 << 20;
/// Requests that the kernel keeps in flight for read-ahead and asynchronous I/O, of all disks
/// together. Many may wait for stalled streams; the other disks must not wait with them.
const MAX_BACKGROUND: u16 = 4096;
const _: () = assert!(2 * parked::MAX_PARKED <= MAX_BACKGROUND as usize);

/// Requests what this daemon uses, for a mount with `cache`. A kernel without some of it is noted
/// in the log.
pub(super) fn negotiate(config: &mut KernelConfig, cache: CacheMode) {
    let mut wanted = vec![
        InitFlags::FUSE_ASYNC_DIO,
        InitFlags::FUSE_PARALLEL_DIROPS,
        InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
        // Without it the kernel asks for `security.capability` at every buffered write.
        InitFlags::FUSE_HANDLE_KILLPRIV_V2,
    ];
    if cache == CacheMode::Writeback {
        wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
    }
    // No READDIRPLUS: attributes that had to be waited for could only be invented, and a size of 0
    // would end the reads of every process that has the file open.
    for flag in wanted {
        if config.add_capabilities(flag).is_err() {
            log::info!("this kernel's FUSE has no {flag:?}");
        }
    }
    // Each setter returns its limit when the value exceeds it.
    let _ = config.set_max_write(MAX_IO_SIZE);
    if let Err(most) = config.set_max_readahead(MAX_IO_SIZE) {
        let _ = config.set_max_readahead(most);
    }
    let _ = config.set_max_background(MAX_BACKGROUND);
    passthrough::negotiate(config, cache);
}
