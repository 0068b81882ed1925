//! An rbd diff of what changed: records that `rbd import-diff` takes.

use std::fs::File;
use std::io::{self, Write};

use super::{Kind, Run, Watch, copy};
use crate::stream::frames::rbd;

/// Writes `runs` of `file`, a disk of `size` bytes, to `out`.
///
/// # Errors
/// The host's.
pub fn write(
    out: &mut dyn Write,
    file: &File,
    runs: &[Run],
    size: u64,
    watch: Watch<'_>,
) -> io::Result<()> {
    out.write_all(&rbd::opening(size))?;
    let total = runs.iter().filter(|run| run.kind == Kind::Data);
    let total = total.map(|run| run.range.end - run.range.start).sum();
    let (mut done, mut buf) = (0, Vec::new());
    for run in runs {
        if run.kind == Kind::Zero {
            out.write_all(&rbd::zeros(&run.range))?;
            continue;
        }
        copy(file, run.range.clone(), &mut buf, |bytes, at| {
            out.write_all(&rbd::data_header(&(at..at + bytes.len() as u64)))?;
            out.write_all(bytes)?;
            done += bytes.len() as u64;
            watch(done, total);
            Ok(())
        })?;
    }
    out.write_all(&rbd::END)?;
    out.flush()
}
