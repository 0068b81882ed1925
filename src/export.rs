//! Exports of a disk, or of its changes, as a file of another format (`diff`).
//!
//! ```text
//!   the disk, frozen ──┐
//!                      ├─> find_runs: data and zeros ──> Export ──> formats/
//!   where it changed ──┘
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::io::Errno;

use crate::formats::android::{self, AndroidContent, AndroidPlan, AndroidRun, AndroidWriter};
use crate::formats::qcow2::{self, BackingFile, Qcow2Writer};
use crate::formats::rbd::{END_RECORD, v1};
use crate::formats::{ImageRun, RunContent, bmap};
use crate::host::{self, COPY_CHUNK};

/// A callback for progress, called now and then with the bytes done and the total.
pub(crate) type OnProgress<'a> = &'a mut dyn FnMut(u64, u64);

/// The ranges that a bmap maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BmapScope {
    /// Data only: the rest of the target reads as zeros or does not matter.
    Data,
    /// Data and zeros: the target holds the disk as it was before the changes.
    All,
}

/// A disk, or its changes, to be exported.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Export<'a> {
    /// The bytes of the disk, which do not change.
    pub file: &'a File,
    /// The size of the disk in bytes.
    pub size: u64,
    /// The runs to export, in rising order ([`find_runs`]).
    pub runs: &'a [ImageRun],
}

impl Export<'_> {
    /// Writes an rbd diff of version 1 to `out`, which `rbd import-diff` and `rbd merge-diff` read.
    ///
    /// # Errors
    /// The host's errors.
    pub(crate) fn write_rbd(
        &self,
        out: &mut dyn Write,
        on_progress: OnProgress<'_>,
    ) -> io::Result<()> {
        let mut data = DataReader::new(self.file, data_len(self.runs), on_progress);
        out.write_all(&v1::preamble(self.size))?;
        for ImageRun { range, content } in self.runs {
            match content {
                RunContent::Zeros => out.write_all(&v1::zeros_record(range))?,
                RunContent::Data => data.for_each_chunk(range.clone(), |bytes, at| {
                    out.write_all(&v1::data_header(&(at..at + bytes.len() as u64)))?;
                    out.write_all(bytes)
                })?,
            }
        }
        out.write_all(&END_RECORD)?;
        out.flush()
    }

    /// Writes an Android sparse image to `out`, which `simg2img` and `fastboot` read.
    ///
    /// Zeros, and every hole of a whole disk, become fills of zeros. Ranges without a run become
    /// DONT_CARE chunks: the target keeps its content there.
    ///
    /// # Errors
    /// `InvalidInput`, with one line for the user, if the format cannot represent the size; the
    /// host's errors.
    pub(crate) fn write_android(
        &self,
        out: &mut dyn Write,
        on_progress: OnProgress<'_>,
    ) -> io::Result<()> {
        let runs = self.runs.iter().map(|run| AndroidRun {
            range: run.range.clone(),
            content: AndroidContent::from(run.content),
        });
        let runs = android::whole_blocks(self.size, runs)?;
        let mut writer = AndroidWriter::new(out, AndroidPlan::new(self.size, &runs)?)?;
        let is_data = |run: &&AndroidRun| run.content == AndroidContent::Data;
        let total = runs.iter().filter(is_data).map(|run| run.range.end - run.range.start).sum();
        let mut data = DataReader::new(self.file, total, on_progress);
        for run in &runs {
            writer.start_run(run)?;
            if run.content == AndroidContent::Data {
                data.for_each_chunk(run.range.clone(), |bytes, _| writer.write_bytes(bytes))?;
            }
        }
        writer.finish().map(|_| ())
    }

    /// Writes the block map to `out`, which tells `bmaptool copy` what to write and verify.
    ///
    /// # Errors
    /// `InvalidInput`, with one line for the user, for an empty disk; the host's errors.
    pub(crate) fn write_bmap(
        &self,
        mut out: &mut dyn Write,
        mapped: BmapScope,
        on_progress: OnProgress<'_>,
    ) -> io::Result<()> {
        let is_mapped =
            |run: &&ImageRun| mapped == BmapScope::All || run.content == RunContent::Data;
        let ranges = || self.runs.iter().filter(is_mapped).map(|run| run.range.clone());
        let total = ranges().map(|range| range.end - range.start).sum();
        let mut data = DataReader::new(self.file, total, on_progress);
        bmap::write(&mut out, self.size, ranges(), |at, buf| data.read(at, buf)).map(|_| ())
    }

    /// Writes a qcow2 image into the empty file `out`. With a `backing` file the image holds only
    /// what the runs cover, in whole clusters, and what makes its size one of whole sectors.
    ///
    /// # Errors
    /// The host's errors, and those of the imago library as text.
    pub(crate) fn write_qcow2(
        &self,
        out: &File,
        backing: Option<&BackingFile>,
        on_progress: OnProgress<'_>,
    ) -> io::Result<()> {
        let mut writer = Qcow2Writer::create(out, self.size, backing)?;
        let mut runs = qcow2::whole_clusters(self.runs, self.size);
        if backing.is_some() {
            qcow2::add_last_cluster(&mut runs, self.size);
        }
        let mut data = DataReader::new(self.file, data_len(&runs), on_progress);
        for ImageRun { range, content } in runs {
            match content {
                RunContent::Zeros => writer.write_zeros(range)?,
                RunContent::Data => writer.write_data(range, |at, buf| data.read(at, buf))?,
            }
        }
        writer.finish()
    }
}

/// Sums the bytes of the runs that are data.
fn data_len(runs: &[ImageRun]) -> u64 {
    runs.iter().map(ImageRun::data_len).sum()
}

/// A reader of the data of a disk that reports its progress.
struct DataReader<'a> {
    file: &'a File,
    done: u64,
    total: u64,
    on_progress: OnProgress<'a>,
    /// The buffer of [`for_each_chunk`](Self::for_each_chunk), kept between runs.
    buf: Vec<u8>,
}

impl<'a> DataReader<'a> {
    fn new(file: &'a File, total: u64, on_progress: OnProgress<'a>) -> Self {
        Self { file, done: 0, total, on_progress, buf: Vec::new() }
    }

    /// Fills `buf` with the bytes from `at` on.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file is shorter; the host's errors.
    fn read(&mut self, at: u64, buf: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buf, at)?;
        self.done += buf.len() as u64;
        // A format that rounds to blocks may read more than the runs.
        (self.on_progress)(self.done.min(self.total), self.total);
        Ok(())
    }

    /// Reads `range` in chunks and passes each with its offset to `take`.
    ///
    /// # Errors
    /// As for [`read`](Self::read); the errors of `take`.
    fn for_each_chunk(
        &mut self,
        range: Range<u64>,
        mut take: impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buf = std::mem::take(&mut self.buf);
        buf.resize(COPY_CHUNK, 0);
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(COPY_CHUNK).min(COPY_CHUNK);
            self.read(at, &mut buf[..len])?;
            take(&buf[..len], at)?;
            at += len as u64;
        }
        self.buf = buf;
        Ok(())
    }
}

/// Finds the runs of `file`, which is `size` bytes long, inside the data ranges of `changed`, or of
/// the whole file if `changed` is `None`. The runs are in rising order, and none is empty.
///
/// # Errors
/// The host's error from lseek(2).
pub(crate) fn find_runs(
    file: &File,
    changed: Option<&File>,
    size: u64,
) -> io::Result<Vec<ImageRun>> {
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
    let start = match host::next_data(file, at) {
        Ok(Some(start)) if start < size => start.max(at),
        Ok(_) => return Ok(None),
        // The file system cannot tell: everything counts as data.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some(at..size)),
        Err(error) => return Err(error.into()),
    };
    let end = host::data_end(file, &(start..size))?;
    Ok(Some(start..end))
}

/// Appends the data and zero runs of `range` of `file` to `runs`.
fn push_runs(file: &File, range: Range<u64>, runs: &mut Vec<ImageRun>) -> io::Result<()> {
    let mut at = range.start;
    while at < range.end {
        let data = next_data(file, at, range.end)?.unwrap_or(range.end..range.end);
        for (range, content) in
            [(at..data.start, RunContent::Zeros), (data.clone(), RunContent::Data)]
        {
            if !range.is_empty() {
                runs.push(ImageRun { range, content });
            }
        }
        at = data.end;
    }
    Ok(())
}
