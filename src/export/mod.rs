//! What leaves as a file of another format: the changes of a disk, or all of it.
//!
//! ```text
//!   the disk, frozen ──┐
//!                      ├─> plan: runs of data and of zeros ──> qcow2.rs, rbd.rs, android.rs, bmap.rs
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

/// How much is read and written at a time: 1 MiB.
const COPY_CHUNK: usize = 1 << 20;

/// What a run of bytes becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportKind {
    /// Its bytes are copied.
    Data,
    /// It reads as zeros.
    Zero,
}

/// A run of bytes that leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportRun {
    /// Bytes of the disk.
    pub range: Range<u64>,
    /// What they are.
    pub kind: ExportKind,
}

/// How far it is, and of how many bytes: called now and then.
pub type OnProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// The runs of `file`, `size` bytes long, inside what `changed` has data for; of all of it without
/// that. In rising order, none empty.
///
/// # Errors
/// The host's, of a seek.
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

/// The next run of data from `at` on.
fn next_data(file: &File, at: u64, size: u64) -> io::Result<Option<Range<u64>>> {
    let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(start) if start < size => start.max(at),
        Ok(_) | Err(Errno::NXIO) => return Ok(None),
        // It cannot tell: all of it is data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..size)),
        Err(error) => return Err(error.into()),
    };
    let end = rustix::fs::seek(file, SeekFrom::Hole(start))?;
    // Changed between the two questions, or told wrong: that all of it is data is always safe.
    let end = if end > start { end.min(size) } else { size };
    Ok(Some(start..end))
}

/// Appends what `range` of `file` is.
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

/// How many bytes the runs have that are data.
fn data_len<'a>(runs: impl Iterator<Item = (&'a Range<u64>, bool)>) -> u64 {
    runs.filter(|(_, is_data)| *is_data).map(|(range, _)| range.end - range.start).sum()
}

/// Reads all of `range` of `file` piece by piece; each is handed to `take` with its offset.
///
/// # Errors
/// `UnexpectedEof`; the host's; those of `take`.
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
