//! The block map of a disk, or of its changes: what `bmaptool copy` writes and verifies of it.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use super::{ExportKind, ExportRun, OnProgress, data_len};
use crate::formats::bmap;

/// Which runs a map names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BmapScope {
    /// Data alone: the target has zeros elsewhere, or nothing that matters.
    Data,
    /// Zeros, too: the target has the disk as it was before the changes.
    All,
}

/// Writes the map of `runs` of `file`, a disk of `size` bytes, to `out`.
///
/// # Errors
/// `InvalidInput`, in one line for the user, for an empty disk; the host's.
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
