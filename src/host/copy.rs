//! Copies that the host makes by itself, without the bytes passing through this process.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

/// Bytes copied at a time through memory, where the host cannot copy by itself: 1 MiB.
pub const COPY_CHUNK: usize = 1 << 20;

/// Copies the range `from` of the file `source` to offset `at` of the file `target` inside the
/// host. Returns the number of bytes copied: fewer at the end of the source, or when an error
/// followed some.
///
/// # Errors
/// The host's errno when nothing was copied; see [`or_copied_none`].
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

/// Replaces the error of a host that cannot copy between two files by a copy of 0 bytes, for a caller
/// that copies the rest through memory.
///
/// # Errors
/// The error of `copied` when a copy failed, which the host can make.
pub fn or_copied_none(copied: io::Result<u64>) -> io::Result<u64> {
    match copied {
        Err(error) if is_copy_unsupported(&error) => Ok(0),
        copied => copied,
    }
}

/// Whether the host cannot copy between the two files, as opposed to a failed copy.
fn is_copy_unsupported(error: &io::Error) -> bool {
    let known = [libc::EXDEV, libc::EOPNOTSUPP, libc::EINVAL, libc::ENOSYS, libc::EAGAIN];
    error.raw_os_error().is_some_and(|code| known.contains(&code))
}
