//! An Android sparse image of a disk, or of its changes: `simg2img` and `fastboot` read it.
//!
//! What has changed to zeros, and every hole of a whole disk, is filled with zeros; what has not
//! changed is left to the target as it is.

use std::fs::File;
use std::io::{self, Write};

use super::{ExportKind, OnProgress, data_len, for_each_chunk};
use crate::formats::android::{
    AndroidContent, AndroidPlan, AndroidRun, AndroidWriter, whole_blocks,
};

/// Writes `runs` of `file`, a disk of `size` bytes, to `out`.
///
/// # Errors
/// `InvalidInput`, in one line for the user, for a size that the format cannot say; the host's.
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
