//! An Android sparse image of a disk, or of its changes: `simg2img` and `fastboot` read it.
//!
//! What has changed to zeros, and every hole of a whole disk, is filled with zeros; what has not
//! changed is left to the target as it is.

use std::fs::File;
use std::io::{self, Write};

use super::{Kind, Watch, copy, data_of};
use crate::formats::android::{Content, Plan, Run, Writer, whole_blocks};

/// Writes `runs` of `file`, a disk of `size` bytes, to `out`.
///
/// # Errors
/// `InvalidInput`, in one line for the user, for a size that the format cannot say; the host's.
pub fn write(
    out: &mut dyn Write,
    file: &File,
    runs: &[super::Run],
    size: u64,
    watch: Watch<'_>,
) -> io::Result<()> {
    let content = |kind| match kind {
        Kind::Data => Content::Data,
        Kind::Zero => Content::Zeros,
    };
    let runs = runs.iter().map(|run| Run { range: run.range.clone(), content: content(run.kind) });
    let runs = whole_blocks(size, runs)?;
    let mut writer = Writer::new(out, Plan::new(size, &runs)?)?;
    let total = data_of(runs.iter().map(|run| (&run.range, run.content == Content::Data)));
    let (mut done, mut buf) = (0, Vec::new());
    for run in &runs {
        writer.run(run)?;
        if run.content == Content::Data {
            copy(file, run.range.clone(), &mut buf, |bytes, _| {
                writer.bytes(bytes)?;
                done += bytes.len() as u64;
                watch(done, total);
                Ok(())
            })?;
        }
    }
    writer.finish().map(|_| ())
}
