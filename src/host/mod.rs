//! System calls on host files as layers use them: reads that do not wait, complete writes, holes.
//!
//! This module knows nothing of disks or layers; each function wraps one system call and handles
//! its short results, interruptions and missing features.

pub mod mountinfo;

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::FallocateFlags;

use crate::layer::Wait;

/// Builds an `io::Error` from a raw errno.
#[must_use]
pub fn os_error(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
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

/// Makes the name `path` durable by syncing its directory.
///
/// # Errors
/// The host's errno.
pub fn sync_parent_dir(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) => Path::new("."),
        None => Path::new("/"),
    };
    sync_dir(&File::open(parent)?)
}

/// Makes the entries of the open directory `dir` durable.
///
/// # Errors
/// The host's errno.
pub fn sync_dir(dir: &File) -> io::Result<()> {
    match dir.sync_all() {
        // Some file systems cannot sync a directory; nothing more can be done there.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        done => done,
    }
}

/// Reads up to `buf.len()` bytes at `offset`; fewer only at the end of the file.
///
/// # Errors
/// `EAGAIN` under [`Wait::No`] when some of the bytes are not in the page cache, or when the file
/// system cannot tell; else the host's errno.
pub fn read_at(file: &File, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        let at = offset + done as u64;
        let got = match wait {
            Wait::Yes => file.read_at(&mut buf[done..], at),
            Wait::No => read_cached(file, &mut buf[done..], at),
        };
        match got {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {
                return Err(os_error(libc::EAGAIN));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads from the page cache alone (preadv2(2), `RWF_NOWAIT`), else `EAGAIN`.
fn read_cached(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let part = libc::iovec { iov_base: buf.as_mut_ptr().cast(), iov_len: buf.len() };
    let offset = i64::try_from(offset).map_err(|_| os_error(libc::EINVAL))?;
    // SAFETY: `part` describes `buf`, which is borrowed mutably for the whole call.
    let got =
        unsafe { libc::preadv2(file.as_raw_fd(), &raw const part, 1, offset, libc::RWF_NOWAIT) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// The most bytes that one system call writes into the page cache. The kernel keeps the bytes of
/// one call in one folio, up to megabytes, and ext4 visits all blocks of a folio for each later
/// write into it: 4 KiB into 1 MiB take four times as long, and the sync after it twice as long.
const MAX_WRITE_CHUNK: u64 = 64 << 10;

/// Writes all of `parts`, one after the other, from `offset` on. Takes one system call if the range
/// does not cross a multiple of 64 KiB.
///
/// # Errors
/// The host's errno; some of the bytes may have been written then.
pub fn write_all_at(file: &File, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
    let total: usize = parts.iter().map(|part| part.len()).sum();
    let mut done = 0;
    while done < total {
        let at = offset + done as u64;
        let most = usize::try_from(MAX_WRITE_CHUNK - at % MAX_WRITE_CHUNK).unwrap_or(usize::MAX);
        let written = if done == 0 && total <= most {
            rustix::io::pwritev(file, parts, at).map_err(io::Error::from)
        } else {
            let rest = remaining_bytes(parts, done);
            file.write_at(&rest[..rest.len().min(most)], at)
        };
        match written {
            Ok(0) => return Err(os_error(libc::EIO)),
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Returns the rest of the part that contains byte `done`.
fn remaining_bytes<'a>(parts: &'a [IoSlice<'_>], mut done: usize) -> &'a [u8] {
    for part in parts {
        if done < part.len() {
            return &part[done..];
        }
        done -= part.len();
    }
    &[]
}

/// Starts writeback of `range` to the device without waiting (sync_file_range(2)). Best effort: a
/// failure is reported by the next sync.
pub fn start_writeback(file: impl AsFd, range: Range<u64>) {
    let file = file.as_fd().as_raw_fd();
    let len = range.end.saturating_sub(range.start);
    let (Ok(start), Ok(len)) = (i64::try_from(range.start), i64::try_from(len)) else { return };
    // SAFETY: takes numbers and touches no memory; `file` is open for the whole call.
    unsafe { libc::sync_file_range(file, start, len, libc::SYNC_FILE_RANGE_WRITE) };
}

/// Whether `file` was opened read-only.
pub fn is_read_only(file: impl AsFd) -> bool {
    let flags = rustix::fs::fcntl_getfl(file);
    flags.is_ok_and(|flags| flags & rustix::fs::OFlags::ACCMODE == rustix::fs::OFlags::RDONLY)
}

/// Punches a hole: returns the space of `range` to the host. The file keeps its length.
///
/// # Errors
/// `EOPNOTSUPP` where the file system cannot punch holes; else the host's errno.
pub fn punch_hole(file: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range)
}

/// Reserves space for `range`. The file keeps its length.
///
/// # Errors
/// `ENOSPC`; `EOPNOTSUPP` where the file system cannot reserve space; else the host's errno.
pub fn allocate(file: impl AsFd, range: Range<u64>) -> io::Result<()> {
    fallocate(file, FallocateFlags::KEEP_SIZE, range)
}

/// Calls fallocate(2) with `flags`, and retries when interrupted.
///
/// # Errors
/// The host's errno.
pub fn fallocate(file: impl AsFd, flags: FallocateFlags, range: Range<u64>) -> io::Result<()> {
    if range.is_empty() {
        return Ok(());
    }
    rustix::io::retry_on_intr(|| {
        rustix::fs::fallocate(&file, flags, range.start, range.end - range.start)
    })
    .map_err(io::Error::from)
}

/// Returns the process of the thread `tid`; `tid` itself if that cannot be determined.
#[must_use]
pub fn process_of_thread(tid: u32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{tid}/status")).unwrap_or_default();
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(tid)
}

/// Whether the process `pid` (0: unknown) is being killed or is exiting with all its threads, and
/// so will never see a reply. The requesting thread may have exited already: the kernel waits for
/// asynchronous requests in the last thread of a process.
#[must_use]
pub fn is_being_killed(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut ending = tasks.map(|task| is_thread_exiting(&task.path())).peekable();
    ending.peek().is_some() && ending.all(|is_ending| is_ending)
}

/// Whether a thread has SIGKILL pending or is exiting. `task` is its procfs directory.
fn is_thread_exiting(task: &std::path::Path) -> bool {
    /// SIGKILL in the signal masks of proc_pid_status(5).
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    /// `PF_EXITING` (linux/sched.h): the kernel waits for the outstanding requests of the process.
    const EXITING: u64 = 0x4;
    let status = std::fs::read_to_string(task.join("status")).unwrap_or_default();
    let pending = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    if pending.fold(0, |all, mask| all | mask) & KILL != 0 {
        return true;
    }
    // A thread that has exited meanwhile does not wait either.
    let Ok(stat) = std::fs::read_to_string(task.join("stat")) else {
        return true;
    };
    // `flags` is the seventh field after the name in parentheses (proc_pid_stat(5)).
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let flags = fields.split_ascii_whitespace().nth(6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

/// Copies the range `from` of the file `source` to offset `at` of the file `target` inside the
/// host. Returns the number of bytes copied: fewer at the end of the source, or when an error
/// followed some.
///
/// # Errors
/// The host's errno when nothing was copied; see [`is_copy_unsupported`].
pub fn copy_range(
    source: BorrowedFd<'_>,
    from: Range<u64>,
    target: BorrowedFd<'_>,
    at: u64,
) -> io::Result<u64> {
    let (mut input, mut output) = (from.start, at);
    while input < from.end {
        let len = usize::try_from(from.end - input).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(source, Some(&mut input), target, Some(&mut output), len)
        {
            Ok(0) => break,
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) if input == from.start => return Err(error.into()),
            Err(_) => break,
        }
    }
    Ok(input - from.start)
}

/// Whether the host cannot copy between the two files, as opposed to a failed copy.
#[must_use]
pub fn is_copy_unsupported(error: &io::Error) -> bool {
    let known = [libc::EXDEV, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOSYS, libc::EAGAIN];
    error.raw_os_error().is_some_and(|code| known.contains(&code))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_in_pieces_writes_the_same_bytes() {
        let bytes: Vec<u8> = (0..300_000u32).map(|at| (at * 7 / 64).to_le_bytes()[0]).collect();
        for (start, cuts) in
            [(0, [0, 0]), (65_000, [1, 2]), (3, [65_536, 70_000]), (65_536, [0, 9])]
        {
            for len in [1, 500, 65_536, 65_537, 300_000] {
                let bytes = &bytes[..len];
                let [one, two] = cuts.map(|cut| len.min(cut));
                let parts = [&bytes[..one], &bytes[one..two], &bytes[two..]].map(IoSlice::new);
                let file = tempfile::tempfile().unwrap();
                write_all_at(&file, &parts, start as u64).unwrap();
                let mut found = vec![0; start + len + 1];
                assert_eq!(file.read_at(&mut found, 0).unwrap(), start + len);
                assert_eq!(&found[start..start + len], bytes);
                assert!(found[..start].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_thread_belongs_to_its_process_and_is_not_being_killed() {
        let process = std::process::id();
        // A test runs in a thread of its own.
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        assert_eq!(process_of_thread(thread), process);
        assert_eq!(process_of_thread(u32::MAX), u32::MAX);
        assert!(!is_being_killed(process) && !is_being_killed(0) && !is_being_killed(u32::MAX));
    }

    #[test]
    fn a_killed_process_that_was_not_reaped_is_being_killed() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_being_killed(child.id()));
        child.kill().unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !is_being_killed(child.id()) {
            assert!(std::time::Instant::now() < until);
        }
        child.wait().unwrap();
    }
}
