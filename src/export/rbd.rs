//! Export of the changes of a disk as an rbd diff of version 1, which `rbd import-diff` and `rbd
//! merge-diff` read.
//!
//! ```text
//!   "rbd diff v1\n"
//!   's' size             the size of the disk
//!   'w' offset n bytes   data
//!   'z' offset n         zeros
//!   'e'                  the end
//! ```
//!
//! All numbers are little-endian u64. Source: Ceph, doc/dev/rbd-diff.rst. Offsets rise and no
//! record is empty, since `merge-diff` refuses anything else. Version 2, which streams use
//! (`formats/rbd.rs`), adds a length after every tag.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;

use super::{ExportKind, ExportRun, OnProgress, data_len, for_each_chunk};

/// The first bytes of every diff of version 1.
const BANNER: &[u8] = b"rbd diff v1\n";

/// Writes `runs` of `file`, a disk of `size` bytes, to `out` as an rbd diff.
///
/// # Errors
/// The host's errors.
pub fn write(
    out: &mut dyn Write,
    file: &File,
    runs: &[ExportRun],
    size: u64,
    watch: OnProgress<'_>,
) -> io::Result<()> {
    out.write_all(BANNER)?;
    out.write_all(b"s")?;
    out.write_all(&size.to_le_bytes())?;
    let total = data_len(runs.iter().map(|run| (&run.range, run.kind == ExportKind::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for run in runs {
        if run.kind == ExportKind::Zero {
            out.write_all(&record_header(b'z', &run.range))?;
            continue;
        }
        for_each_chunk(file, run.range.clone(), &mut buf, |bytes, at| {
            out.write_all(&record_header(b'w', &(at..at + bytes.len() as u64)))?;
            out.write_all(bytes)?;
            done += bytes.len() as u64;
            watch(done, total);
            Ok(())
        })?;
    }
    out.write_all(b"e")?;
    out.flush()
}

fn record_header(tag: u8, range: &Range<u64>) -> [u8; 17] {
    let mut bytes = [tag; 17];
    bytes[1..9].copy_from_slice(&range.start.to_le_bytes());
    bytes[9..].copy_from_slice(&(range.end - range.start).to_le_bytes());
    bytes
}
