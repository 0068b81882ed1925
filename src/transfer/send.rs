//! Sending a source as a stream of records or as plain bytes.

use std::io::{self, Write};
use std::ops::Range;

use super::send_android;
use super::send_error::SendError;
use super::source::{TransferSource, ZeroDetection};
use super::zeros::split_zeros;
use super::{BUFFER_SIZE, TransferError, TransferFormat, TransferProgress};
use crate::formats::RunContent;
use crate::formats::rbd::checkpoint::{CHECKPOINT_INTERVAL, Checkpoint, CheckpointKind, HashChain};
use crate::formats::rbd::{END_RECORD, v2};

/// The bytes reserved in the buffer for a record's header, so that header and data are written at
/// once. A whole page, so that reads are page-aligned.
const HEADER_ROOM: usize = 4096;

/// The changes since a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The name of the snapshot.
    pub since: String,
    /// The changed ranges in bytes, in rising order. Nothing else is sent.
    pub ranges: Vec<Range<u64>>,
}

/// The parameters of `send`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendPlan {
    /// The offset in bytes at which sending begins. An Android sparse image always starts at 0.
    pub from: u64,
    /// The format of the stream.
    pub frames: TransferFormat,
    /// Whether data is searched for zeros.
    pub detect: ZeroDetection,
    /// The changes to send; `None` sends everything.
    pub changes: Option<Changes>,
}

/// The result of `send`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// The bytes sent.
    pub progress: TransferProgress,
    /// Whether the source was written to meanwhile, so that the stream is not a snapshot of one
    /// moment.
    pub has_changed: bool,
}

/// Sends `source` to `out`; `on_progress` is called with the progress.
///
/// # Errors
/// A line for the user: `from` is past the end, the source cannot be read or has become shorter, or
/// the stream cannot be written.
pub fn send<W: Write>(
    source: &TransferSource,
    out: W,
    plan: &SendPlan,
    on_progress: &mut dyn FnMut(&TransferProgress),
) -> Result<Sent, TransferError> {
    if let Some(size) = source.size()
        && plan.from > size
    {
        return Err(TransferError::Refused(format!(
            "'{}' has {size} bytes: it cannot be sent from {}",
            source.path().display(),
            plan.from
        )));
    }
    if plan.frames == TransferFormat::AndroidSparse {
        let progress = send_android::send(source, out, on_progress)?;
        return Ok(Sent { progress, has_changed: source.has_changed() });
    }
    let mut sender = Sender::new(source, out, plan, on_progress);
    sender.send_header().map_err(|error| SendError::Output(error).explain(source))?;
    let sent = match source.size() {
        Some(size) => sender.send_ranges(plan.changes.as_ref(), size),
        None => sender.send_pipe(),
    };
    sent.map_err(|failed| failed.explain(source))?;
    if source.has_shrunk() {
        return Err(source.shrunk_error());
    }
    sender.finish().map_err(|error| SendError::Output(error).explain(source))?;
    Ok(Sent { progress: sender.progress, has_changed: source.has_changed() })
}

/// The part of the stream for which the next checkpoint will vouch.
struct Piece {
    /// The start, in bytes of the disk.
    start: u64,
    /// The bytes of data sent so far.
    data_len: u64,
}

struct Sender<'a, W> {
    source: &'a TransferSource,
    out: W,
    plan: &'a SendPlan,
    on_progress: &'a mut dyn FnMut(&TransferProgress),
    chain: HashChain,
    progress: TransferProgress,
    /// Zeros not sent yet, because the following zeros may join them.
    pending_zeros: Range<u64>,
    /// The size announced to the receiver; for a pipe it is a guess until the end.
    announced_size: u64,
    piece: Piece,
    buffer: Vec<u8>,
}

impl<'a, W: Write> Sender<'a, W> {
    fn new(
        source: &'a TransferSource,
        out: W,
        plan: &'a SendPlan,
        on_progress: &'a mut dyn FnMut(&TransferProgress),
    ) -> Self {
        let from = plan.from;
        Self {
            source,
            out,
            plan,
            on_progress,
            chain: HashChain::default(),
            progress: TransferProgress {
                from,
                reached: from,
                size: source.size(),
                data: 0,
                holes: 0,
            },
            pending_zeros: from..from,
            announced_size: source.size().unwrap_or(from),
            piece: Piece { start: from, data_len: 0 },
            buffer: vec![0; HEADER_ROOM + BUFFER_SIZE],
        }
    }

    /// Sends the banner, the snapshot name, the size, and the first checkpoint.
    fn send_header(&mut self) -> io::Result<()> {
        if self.plan.frames == TransferFormat::Raw {
            return Ok(());
        }
        self.write_hashed(v2::BANNER)?;
        if let Some(changes) = &self.plan.changes {
            self.write_hashed(&v2::since_record(&changes.since)?)?;
        }
        self.write_hashed(&v2::size_record(self.announced_size))?;
        self.send_checkpoint(CheckpointKind::Middle)
    }

    fn finish(&mut self) -> io::Result<()> {
        if self.plan.frames == TransferFormat::Rbd {
            self.flush_zeros()?;
            if self.announced_size != self.progress.size.unwrap_or(self.progress.reached) {
                self.send_size(self.progress.reached)?;
            }
            self.send_checkpoint(CheckpointKind::Last)?;
            self.out.write_all(&END_RECORD)?;
        }
        self.out.flush()
    }

    /// Sends a file or a device.
    fn send_ranges(&mut self, changes: Option<&Changes>, size: u64) -> Result<(), SendError> {
        let whole = 0..size;
        let ranges = changes.map_or(std::slice::from_ref(&whole), |changes| &changes.ranges);
        for range in ranges {
            let mut left = range.start.max(self.plan.from)..range.end.min(size);
            while !left.is_empty() {
                let (run, content) = self.source.extent_at(&left).map_err(SendError::Source)?;
                match content {
                    RunContent::Zeros => self.add_zeros(run.clone()).map_err(SendError::Output)?,
                    RunContent::Data => self.send_data(run.clone())?,
                }
                left.start = run.end;
            }
        }
        self.flush_zeros().map_err(SendError::Output)?;
        self.progress.reached = size;
        Ok(())
    }

    fn send_data(&mut self, range: Range<u64>) -> Result<(), SendError> {
        let mut at = range.start;
        let detect = self.source.looks_for_zeros(self.plan.detect);
        while at < range.end {
            // The first piece ends at an aligned offset, so that the others are aligned.
            let most = BUFFER_SIZE as u64 - at % BUFFER_SIZE as u64;
            let len = usize::try_from((range.end - at).min(most)).unwrap_or(BUFFER_SIZE);
            let into = &mut self.buffer[HEADER_ROOM..HEADER_ROOM + len];
            self.source.read_at(into, at).map_err(SendError::Source)?;
            self.send_buffer(len, at, detect).map_err(SendError::Output)?;
            at += len as u64;
        }
        Ok(())
    }

    /// Sends a pipe; the bytes before `from` are read and dropped.
    fn send_pipe(&mut self) -> Result<(), SendError> {
        let mut at = 0;
        loop {
            let into = &mut self.buffer[HEADER_ROOM..];
            let got = self.source.read_pipe(into).map_err(SendError::Source)?;
            let end = at + got as u64;
            if end > self.plan.from {
                let skip = usize::try_from(self.plan.from.saturating_sub(at)).unwrap_or(got);
                self.buffer.copy_within(HEADER_ROOM + skip..HEADER_ROOM + got, HEADER_ROOM);
                let detect = self.source.looks_for_zeros(self.plan.detect);
                self.send_buffer(got - skip, at + skip as u64, detect)
                    .map_err(SendError::Output)?;
            }
            at = end;
            if got < BUFFER_SIZE {
                break;
            }
        }
        if at < self.plan.from {
            return Err(SendError::Source(io::Error::other("it ends before the offset of --from")));
        }
        self.flush_zeros().map_err(SendError::Output)
    }

    /// Sends the first `len` bytes of the buffer, which belong at `offset`.
    fn send_buffer(&mut self, len: usize, offset: u64, detect: bool) -> io::Result<()> {
        if !detect || self.plan.frames == TransferFormat::Raw {
            return self.send_bytes(0..len, offset);
        }
        for (run, content) in split_zeros(&self.buffer[HEADER_ROOM..HEADER_ROOM + len], offset) {
            let start = offset + run.start as u64;
            match content {
                RunContent::Data => self.send_bytes(run, start)?,
                RunContent::Zeros => self.add_zeros(start..offset + run.end as u64)?,
            }
        }
        Ok(())
    }

    /// Sends the bytes `run` of the buffer, which belong at `start`.
    fn send_bytes(&mut self, run: Range<usize>, start: u64) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let len = run.len() as u64;
        let mut first = HEADER_ROOM + run.start;
        if self.plan.frames == TransferFormat::Rbd {
            self.flush_zeros()?;
            if start + len > self.announced_size {
                self.send_size(start + len + CHECKPOINT_INTERVAL)?;
            }
            let header = v2::data_header(&(start..start + len));
            // The bytes overwritten by the header have been sent already, or are the reserved room.
            first -= header.len();
            self.buffer[first..first + header.len()].copy_from_slice(&header);
            self.chain.update(&self.buffer[first..HEADER_ROOM + run.end]);
        }
        self.out.write_all(&self.buffer[first..HEADER_ROOM + run.end])?;
        self.progress.data += len;
        self.progress.reached = start + len;
        self.piece.data_len += len;
        if self.piece.data_len >= CHECKPOINT_INTERVAL && self.plan.frames == TransferFormat::Rbd {
            self.send_checkpoint(CheckpointKind::Middle)?;
        }
        (self.on_progress)(&self.progress);
        Ok(())
    }

    /// Records a hole, to be sent together with adjacent ones.
    fn add_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        self.progress.holes += range.end - range.start;
        if self.plan.frames == TransferFormat::Raw {
            return self.send_raw_zeros(&range);
        }
        if self.pending_zeros.end == range.start && !self.pending_zeros.is_empty() {
            self.pending_zeros.end = range.end;
        } else {
            self.flush_zeros()?;
            self.pending_zeros = range;
        }
        self.progress.reached = self.pending_zeros.end;
        (self.on_progress)(&self.progress);
        Ok(())
    }

    fn send_raw_zeros(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.buffer[HEADER_ROOM..].fill(0);
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(BUFFER_SIZE).min(BUFFER_SIZE);
            self.out.write_all(&self.buffer[HEADER_ROOM..HEADER_ROOM + len])?;
            at += len as u64;
            self.progress.reached = at;
            (self.on_progress)(&self.progress);
        }
        Ok(())
    }

    fn flush_zeros(&mut self) -> io::Result<()> {
        let zeros = self.pending_zeros.clone();
        if zeros.is_empty() {
            return Ok(());
        }
        if zeros.end > self.announced_size {
            self.send_size(zeros.end + CHECKPOINT_INTERVAL)?;
        }
        self.pending_zeros = zeros.end..zeros.end;
        self.write_hashed(&v2::zeros_record(&zeros))
    }

    /// Sends the size, possibly again.
    fn send_size(&mut self, size: u64) -> io::Result<()> {
        self.announced_size = size;
        self.write_hashed(&v2::size_record(size))
    }

    fn send_checkpoint(&mut self, kind: CheckpointKind) -> io::Result<()> {
        let checkpoint = Checkpoint {
            start: self.piece.start,
            end: self.progress.reached,
            identity: self.source.version_id(),
            origin: self.plan.from,
        };
        self.piece = Piece { start: self.progress.reached, data_len: 0 };
        let record = self.chain.checkpoint_record(&checkpoint, kind);
        self.out.write_all(&record)
    }

    fn write_hashed(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chain.update(bytes);
        self.out.write_all(bytes)
    }
}
