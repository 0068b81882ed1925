//! Export of the changes of a disk as an rbd diff of version 1, which `rbd import-diff` and `rbd
//! merge-diff` read.

use std::fs::File;
use std::io::{self, Write};

use super::{ExportKind, ExportRun, OnProgress, data_len, for_each_chunk};
use crate::formats::rbd::{END_RECORD, v1};

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
    out.write_all(&v1::preamble(size))?;
    let total = data_len(runs.iter().map(|run| (&run.range, run.kind == ExportKind::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for run in runs {
        if run.kind == ExportKind::Zero {
            out.write_all(&v1::zeros_record(&run.range))?;
            continue;
        }
        for_each_chunk(file, run.range.clone(), &mut buf, |bytes, at| {
            out.write_all(&v1::data_header(&(at..at + bytes.len() as u64)))?;
            out.write_all(bytes)?;
            done += bytes.len() as u64;
            watch(done, total);
            Ok(())
        })?;
    }
    out.write_all(&END_RECORD)?;
    out.flush()
}
