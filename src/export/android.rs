//! Export of a disk, or of its changes, as an Android sparse image, which `simg2img` and `fastboot`
//! read.
//!
//! Ranges that changed to zeros, and every hole of a whole disk, become fills of zeros. Unchanged
//! ranges become DONT_CARE chunks: the target keeps its content there.

use std::fs::File;
use std::io::{self, Write};

use super::{ExportKind, OnProgress, data_len, for_each_chunk};
use crate::formats::android::{
    AndroidContent, AndroidPlan, AndroidRun, AndroidWriter, whole_blocks,
};

/// Writes `runs` of `file`, a disk of `size` bytes, to `out` as an Android sparse image.
///
/// # Errors
/// `InvalidInput`, with one line for the user, if the format cannot represent the size; otherwise
/// the host's error.
pub fn write(
    out: &mut dyn Write,
    file: &File,
    runs: &[super::ExportRun],
    size: u64,
    watch: OnProgress<'_>,
) -> io::Result<()> {
    let content = |kind| match kind {
        ExportKind::Data => AndroidContent::Data,
        ExportKind::Zero => AndroidContent::Zeros,
    };
    let runs =
        runs.iter().map(|run| AndroidRun { range: run.range.clone(), content: content(run.kind) });
    let runs = whole_blocks(size, runs)?;
    let mut writer = AndroidWriter::new(out, AndroidPlan::new(size, &runs)?)?;
    let total = data_len(runs.iter().map(|run| (&run.range, run.content == AndroidContent::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for run in &runs {
        writer.start_run(run)?;
        if run.content == AndroidContent::Data {
            for_each_chunk(file, run.range.clone(), &mut buf, |bytes, _| {
                writer.write_bytes(bytes)?;
                done += bytes.len() as u64;
                watch(done, total);
                Ok(())
            })?;
        }
    }
    writer.finish().map(|_| ())
}
