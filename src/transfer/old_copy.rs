//! A copy of an older file, to which a stream of changes is applied.

use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::AsFd;

use super::source::{TransferSource, ZeroDetection};
use super::zeros::split_zeros;
use crate::formats::RunContent;
use crate::host::{COPY_CHUNK, copy_range, or_copied_none, write_all_at};

/// Gives `target`, which is `from` bytes long, the content of `source` (a file or a device) from
/// offset `from` on. The blocks are shared if the file system supports it, else copied with their
/// holes.
///
/// # Errors
/// The host's errors.
pub(super) fn copy(source: &TransferSource, target: &File, from: u64) -> io::Result<()> {
    if from == 0 && rustix::fs::ioctl_ficlone(target, source.file()).is_ok() {
        return Ok(());
    }
    let size = source.size().unwrap_or(0);
    target.set_len(size.max(from))?;
    let mut left = from..size;
    while !left.is_empty() {
        let (run, content) = source.extent_at(&left)?;
        left.start = run.end;
        if content == RunContent::Data {
            copy_data(source, target, run)?;
        }
    }
    Ok(())
}

fn copy_data(source: &TransferSource, target: &File, range: Range<u64>) -> io::Result<()> {
    let mut at = range.start;
    // A copy inside the host would turn zeros of a device into data.
    if !source.looks_for_zeros(ZeroDetection::AsNeeded) {
        let copied = copy_range(source.file().as_fd(), range.clone(), target.as_fd(), at);
        at += or_copied_none(copied)?;
    }
    let mut piece = vec![0; COPY_CHUNK];
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
        source.read_at(&mut piece[..len], at)?;
        for (run, content) in split_zeros(&piece[..len], at) {
            if content == RunContent::Data || !source.looks_for_zeros(ZeroDetection::AsNeeded) {
                let start = at + run.start as u64;
                write_all_at(target, &[IoSlice::new(&piece[run])], start)?;
            }
        }
        at += len as u64;
    }
    Ok(())
}
