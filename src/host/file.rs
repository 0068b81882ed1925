//! Bytes of a host file: reads that may refuse to wait, complete writes, durable names.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{OFlags, SeekFrom, fcntl_getfl, fcntl_setfl};
use rustix::io::{Errno, ReadWriteFlags};

use super::os_error;
use crate::layer::Wait;

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

/// Fills `buf` from `input`; returns fewer bytes only at the end of the input.
///
/// # Errors
/// The errors of reading, but for interruptions.
pub fn read_full(mut input: impl Read, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match input.read(&mut buf[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads from the page cache alone (preadv2(2), `RWF_NOWAIT`), else `EAGAIN`.
fn read_cached(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    // A negative offset would mean the file's own position.
    if i64::try_from(offset).is_err() {
        return Err(os_error(libc::EINVAL));
    }
    let mut parts = [IoSliceMut::new(buf)];
    Ok(rustix::io::preadv2(file, &mut parts, offset, ReadWriteFlags::NOWAIT)?)
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

/// Returns the descriptor of `file`, set to `O_NONBLOCK`.
///
/// # Errors
/// The host's errno.
pub fn set_nonblocking(file: impl Into<OwnedFd>) -> Result<OwnedFd, Errno> {
    let fd = file.into();
    fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
    Ok(fd)
}

/// Returns the size of a regular file or a block device in bytes (`SEEK_END`). The file's position is
/// at its end then.
///
/// # Errors
/// The host's errno; `ESPIPE` for a pipe.
pub fn file_size(file: impl AsFd) -> io::Result<u64> {
    Ok(rustix::fs::seek(file, SeekFrom::End(0))?)
}

/// Whether `file` was opened read-only.
pub fn is_read_only(file: impl AsFd) -> bool {
    let flags = rustix::fs::fcntl_getfl(file);
    flags.is_ok_and(|flags| flags & rustix::fs::OFlags::ACCMODE == rustix::fs::OFlags::RDONLY)
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
}
