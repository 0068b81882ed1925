//! Copies that the host makes by itself, without the bytes passing through this process.

use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;

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
