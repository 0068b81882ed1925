//! Export of the block map of a disk, or of its changes, which tells `bmaptool copy` what to write
//! and verify.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::{ExportKind, ExportRun, OnProgress, data_len};
use crate::formats::bmap;

/// The runs that a map includes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BmapScope {
    /// Data only: the rest of the target reads as zeros or does not matter.
    Data,
    /// Data and zeros: the target holds the disk as it was before the changes.
    All,
}

/// Writes the block map of `runs` of `file`, a disk of `size` bytes, to `out`.
///
/// # Errors
/// `InvalidInput`, with one line for the user, for an empty disk; otherwise the host's error.
pub fn write(
    mut out: &mut dyn Write,
    file: &File,
    runs: &[ExportRun],
    size: u64,
    mapped: BmapScope,
    watch: OnProgress<'_>,
) -> io::Result<()> {
    let is_mapped = |run: &&ExportRun| mapped == BmapScope::All || run.kind == ExportKind::Data;
    let total = data_len(runs.iter().map(|run| (&run.range, is_mapped(&run))));
    let mut done = 0;
    let read = |at, buf: &mut [u8]| {
        file.read_exact_at(buf, at)?;
        done += buf.len() as u64;
        watch(done.min(total), total);
        Ok(())
    };
    let ranges = runs.iter().filter(is_mapped).map(|run| run.range.clone());
    bmap::write(&mut out, size, ranges, read).map(|_| ())
}
