//! Exports of a disk, or of its changes, as a file of another format.
//!
//! ```text
//!   the disk, frozen ──┐
//!                      ├─> find_runs: data and zeros ──> qcow2.rs, rbd.rs, android.rs, bmap.rs
//!   where it changed ──┘
//! ```

pub mod android;
pub mod bmap;
pub mod qcow2;
pub mod rbd;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// Bytes copied at a time: 1 MiB.
const COPY_CHUNK: usize = 1 << 20;

/// The content of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// Bytes to copy.
    Data,
    /// Zeros.
    Zero,
}

/// A run of bytes to export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRun {
    /// The position on the disk in bytes.
    pub range: Range<u64>,
    /// The content of the run.
    pub kind: ExportKind,
}

/// A callback for progress, called now and then with the bytes done and the total.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// Finds the runs of `file`, which is `size` bytes long, inside the data ranges of `changed`, or of
/// the whole file if `changed` is `None`. The runs are in rising order, and none is empty.
///
/// # Errors
/// The host's error from lseek(2).
pub fn find_runs(file: &File, changed: Option<&File>, size: u64) -> io::Result<Vec<ExportRun>> {
    let mut runs = Vec::new();
    let mut at = 0;
    while at < size {
        let range = match changed {
            None => at..size,
            Some(changed) => match next_data(changed, at, size)? {
                Some(range) => range,
                None => break,
            },
        };
        at = range.end;
        push_runs(file, range, &mut runs)?;
    }
    Ok(runs)
}

/// Returns the next data range at or after `at` and before `size`, or `None` if there is none.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => start.max(at),
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        // The file system cannot tell: everything counts as data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..size)),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    // The file changed between the two calls, or the answer was wrong: it is always safe to treat
    // everything as data.
    let end = if end > start { end.min(size) } else { size };
    Ok(Some(start..end))
}

/// Appends the data and zero runs of `range` of `file` to `runs`.
fn push_runs(file: &File, range: Range<u64>, runs: &mut Vec<ExportRun>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let data = next_data(file, at, range.end)?.unwrap_or(range.end..range.end);
        for (range, kind) in [(at..data.start, ExportKind::Zero), (data.clone(), ExportKind::Data)]
        {
            if !range.is_empty() {
                runs.push(ExportRun { range, kind });
            }
        }
        at = data.end;
    }
    Ok(())
}

/// Sums the bytes of the runs that are data.
fn data_len<'a>(runs: impl Iterator<Item = (&'a Range<u64>, bool)>) -> u64 {
    runs.filter(|(_, is_data)| *is_data).map(|(range, _)| range.end - range.start).sum()
}

/// Reads `range` of `file` in chunks and passes each with its offset to `take`.
///
/// # Errors
/// `UnexpectedEof` if the file is shorter; the host's errors; the errors of `take`.
fn for_each_chunk(
    file: &File,
    range: Range<u64>,
    buf: &mut Vec<u8>,
    mut take: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    buf.resize(COPY_CHUNK, 0);
    let mut at = range.start;
    while at < range.end {
        let len = usize::try_from(range.end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
        file.read_exact_at(&mut buf[..len], at)?;
        take(&buf[..len], at)?;
        at += len as u64;
    }
    Ok(())
}
