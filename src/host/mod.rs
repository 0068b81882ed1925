//! The host below the layers: its files, its file systems, its mounts, its processes.
//!
//! Nothing here knows of disks; of the layers only the types of an answer are used (`layer::Wait`,
//! `extents::Extent`). A function wraps one system call, or reads one file of
//! `/proc`, and handles short results, interruptions and missing features. Functions on open files
//! are reached as `host::read_at`; the file systems and the table of mounts by their modules.

mod copy;
mod file;
mod file_lock;
pub mod file_system;
mod holes;
pub mod mountinfo;
mod process_exit;
mod procfs;
#[cfg(test)]
pub(crate) mod testing;

use std::io;
use std::path::PathBuf;

pub use self::copy::{COPY_CHUNK, copy_range, or_copied_none};
pub use self::file::{
    file_size, is_read_only, read_at, read_full, set_nonblocking, start_writeback, sync_dir,
    sync_parent_dir, write_all_at,
};
pub use self::file_lock::{LOCK_POLL_INTERVAL, lock_within};
pub use self::holes::{
    PUNCH_OR_ZERO, allocate, data_end, extent_at, fallocate, is_fallocate_unsupported, next_data,
    punch_hole, whole_device_blocks, zero_by_host,
};
pub use self::process_exit::{ProcessState, wait_for_exit};
pub use self::procfs::{is_being_killed, process_of_thread, stat_fields};

/// Builds an `io::Error` from a raw errno.
#[must_use]
pub fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Returns whether `error` means that the host is out of space: a full disk, a quota or a file size
/// limit, all of which may pass. A file that has reached its maximum size counts as full.
#[must_use]
pub fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
}

/// Returns the directory for files that end with their process: `$TMPDIR`, or else `/var/tmp`, which
/// is on a disk.
#[must_use]
pub fn temporary_dir() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or("/var/tmp".into(), PathBuf::from)
}

/// Returns an error's message without the number that Rust appends.
#[must_use]
pub fn os_message(error: &io::Error) -> String {
    let text = error.to_string();
    match text.rfind(" (os error ") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

/// Makes all threads allocate from one heap (mallopt(3), `M_ARENA_MAX`). By default glibc gives
/// each thread a heap of its own, and memory freed in one is of no use to the others: a block map
/// that is cleared and rebuilt took up to twice its size. Requests allocate next to nothing.
pub fn use_single_arena() {
    // SAFETY: sets a number in the allocator. Other C libraries have no such setting, and no need.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}
