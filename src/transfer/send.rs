//! Sending: a source becomes records.

use std::io::{self, Write};
use std::ops::Range;

use super::android;
use super::checkpoint::{Chain, INTERVAL, Mark, Stage};
use super::source::{Detect, Source};
use super::zeros::{Holds, runs};
use super::{BUFFER, Frames, Told, TransferError};
use crate::host::said;
use crate::stream::frames::rbd;

/// Room for a record's header before its bytes, so that both leave at once. A page, so that what
/// is read lands as the host likes it.
const ROOM: usize = 4096;

/// What changed since a snapshot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// The snapshot's name.
    pub since: String,
    /// The ranges, in rising order. Nothing else is sent.
    pub ranges: Vec<Range<u64>>,
}

/// What to send, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SendPlan {
    /// The first byte of the source that is sent. An Android sparse image is always whole.
    pub from: u64,
    /// What goes over the wire.
    pub frames: Frames,
    /// Whether zeros are looked for.
    pub detect: Detect,
    /// Only these ranges; all of it without.
    pub changes: Option<Changes>,
}

/// What was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sent {
    /// How much of what.
    pub told: Told,
    /// Whether somebody wrote to the source meanwhile: then it is no one moment of it.
    pub has_changed: bool,
}

/// Sends `source` to `out`; `tell` hears how far it is.
///
/// # Errors
/// A line: `from` past the end, a source that cannot be read or gets shorter, a stream that
/// cannot be written.
pub fn send<W: Write>(
    source: &Source,
    out: W,
    plan: &SendPlan,
    tell: &mut dyn FnMut(&Told),
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
    if plan.frames == Frames::AndroidSparse {
        let told = android::send(source, out, tell)?;
        return Ok(Sent { told, has_changed: source.has_changed() });
    }
    let mut sender = Sender::new(source, out, plan, tell);
    sender.begin().map_err(|error| sender.explain(Failed::Out(error)))?;
    let sent = match source.size() {
        Some(size) => sender.all(plan.changes.as_ref(), size),
        None => sender.pipe(),
    };
    sent.map_err(|failed| sender.explain(failed))?;
    if source.is_shorter() {
        return Err(sender.explain(Failed::In(io::ErrorKind::UnexpectedEof.into())));
    }
    sender.end().map_err(|error| sender.explain(Failed::Out(error)))?;
    Ok(Sent { told: sender.told, has_changed: source.has_changed() })
}

/// Which end failed.
enum Failed {
    In(io::Error),
    Out(io::Error),
}

struct Sender<'a, W> {
    source: &'a Source,
    out: W,
    plan: &'a SendPlan,
    tell: &'a mut dyn FnMut(&Told),
    chain: Chain,
    told: Told,
    /// Zeros that are not sent yet: more may join them.
    zeros: Range<u64>,
    /// The size that the stream was told; of a pipe it is a guess until its end.
    announced: u64,
    /// Where the piece of the next checkpoint starts, and how much data it has.
    piece: (u64, u64),
    buffer: Vec<u8>,
}

impl<'a, W: Write> Sender<'a, W> {
    fn new(source: &'a Source, out: W, plan: &'a SendPlan, tell: &'a mut dyn FnMut(&Told)) -> Self {
        let from = plan.from;
        Self {
            source,
            out,
            plan,
            tell,
            chain: Chain::default(),
            told: Told { from, reached: from, size: source.size(), data: 0, holes: 0 },
            zeros: from..from,
            announced: source.size().unwrap_or(from),
            piece: (from, 0),
            buffer: vec![0; ROOM + BUFFER],
        }
    }

    fn explain(&self, failed: Failed) -> TransferError {
        let path = self.source.path();
        match failed {
            Failed::Out(error) => TransferError::Output(said(&error)),
            Failed::In(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                self.source.got_shorter()
            }
            Failed::In(error) => TransferError::host("read", path, &error),
        }
    }

    /// Banner, names, size, and the checkpoint that tells of others.
    fn begin(&mut self) -> io::Result<()> {
        if self.plan.frames == Frames::Raw {
            return Ok(());
        }
        let opening = rbd::opening(self.announced);
        match &self.plan.changes {
            None => self.emit(&opening)?,
            Some(changes) => {
                // The name comes before the size: some readers look no further for it.
                let (banner, size) = opening.split_at(rbd::BANNER.len());
                self.emit(banner)?;
                let name = changes.since.as_bytes();
                let len = u32::try_from(name.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
                let mut record = vec![b'f'];
                record.extend((u64::from(len) + 4).to_le_bytes());
                record.extend(len.to_le_bytes());
                record.extend(name);
                self.emit(&record)?;
                self.emit(size)?;
            }
        }
        self.checkpoint(Stage::Middle)
    }

    fn end(&mut self) -> io::Result<()> {
        if self.plan.frames == Frames::Rbd {
            self.flush_zeros()?;
            if self.announced != self.told.size.unwrap_or(self.told.reached) {
                self.announce(self.told.reached)?;
            }
            self.checkpoint(Stage::Last)?;
            self.out.write_all(&rbd::END)?;
        }
        self.out.flush()
    }

    /// A file or a device.
    fn all(&mut self, changes: Option<&Changes>, size: u64) -> Result<(), Failed> {
        let whole = 0..size;
        let ranges = changes.map_or(std::slice::from_ref(&whole), |changes| &changes.ranges);
        for range in ranges {
            let mut left = range.start.max(self.plan.from)..range.end.min(size);
            while !left.is_empty() {
                let (run, holds) = self.source.run(&left).map_err(Failed::In)?;
                match holds {
                    Holds::Zeros => self.hole(run.clone()).map_err(Failed::Out)?,
                    Holds::Data => self.data(run.clone())?,
                }
                left.start = run.end;
            }
        }
        self.flush_zeros().map_err(Failed::Out)?;
        self.told.reached = size;
        Ok(())
    }

    fn data(&mut self, range: Range<u64>) -> Result<(), Failed> {
        let mut at = range.start;
        let detect = self.source.detects(self.plan.detect);
        while at < range.end {
            // The first one only up to where the others are aligned.
            let most = BUFFER as u64 - at % BUFFER as u64;
            let len = usize::try_from((range.end - at).min(most)).unwrap_or(BUFFER);
            let into = &mut self.buffer[ROOM..ROOM + len];
            self.source.read_at(into, at).map_err(Failed::In)?;
            self.pass(len, at, detect).map_err(Failed::Out)?;
            at += len as u64;
        }
        Ok(())
    }

    /// A pipe: what comes before `from` is read and dropped.
    fn pipe(&mut self) -> Result<(), Failed> {
        let mut at = 0;
        loop {
            let into = &mut self.buffer[ROOM..];
            let got = self.source.read_next(into).map_err(Failed::In)?;
            let end = at + got as u64;
            if end > self.plan.from {
                let skip = usize::try_from(self.plan.from.saturating_sub(at)).unwrap_or(got);
                self.buffer.copy_within(ROOM + skip..ROOM + got, ROOM);
                let detect = self.source.detects(self.plan.detect);
                self.pass(got - skip, at + skip as u64, detect).map_err(Failed::Out)?;
            }
            at = end;
            if got < BUFFER {
                break;
            }
        }
        if at < self.plan.from {
            return Err(Failed::In(io::Error::other("it ends before the offset of --from")));
        }
        self.flush_zeros().map_err(Failed::Out)
    }

    /// Sends the `len` bytes in the buffer, which lie at `offset`.
    fn pass(&mut self, len: usize, offset: u64, detect: bool) -> io::Result<()> {
        if !detect || self.plan.frames == Frames::Raw {
            return self.bytes(0..len, offset);
        }
        for (run, holds) in runs(&self.buffer[ROOM..ROOM + len], offset) {
            let start = offset + run.start as u64;
            match holds {
                Holds::Data => self.bytes(run, start)?,
                Holds::Zeros => self.hole(start..offset + run.end as u64)?,
            }
        }
        Ok(())
    }

    /// Sends `run` of the buffer, which lies at `start`.
    fn bytes(&mut self, run: Range<usize>, start: u64) -> io::Result<()> {
        if run.is_empty() {
            return Ok(());
        }
        let len = run.len() as u64;
        let mut first = ROOM + run.start;
        if self.plan.frames == Frames::Rbd {
            self.flush_zeros()?;
            if start + len > self.announced {
                self.announce(start + len + INTERVAL)?;
            }
            let header = rbd::data_header(&(start..start + len));
            // What was there has been sent, or is the room.
            first -= header.len();
            self.buffer[first..first + header.len()].copy_from_slice(&header);
            self.chain.update(&self.buffer[first..ROOM + run.end]);
        }
        self.out.write_all(&self.buffer[first..ROOM + run.end])?;
        self.told.data += len;
        self.told.reached = start + len;
        self.piece.1 += len;
        if self.piece.1 >= INTERVAL && self.plan.frames == Frames::Rbd {
            self.checkpoint(Stage::Middle)?;
        }
        (self.tell)(&self.told);
        Ok(())
    }

    /// Notes a hole; it leaves with those that follow it.
    fn hole(&mut self, range: Range<u64>) -> io::Result<()> {
        self.told.holes += range.end - range.start;
        if self.plan.frames == Frames::Raw {
            return self.plain_zeros(&range);
        }
        if self.zeros.end == range.start && !self.zeros.is_empty() {
            self.zeros.end = range.end;
        } else {
            self.flush_zeros()?;
            self.zeros = range;
        }
        self.told.reached = self.zeros.end;
        (self.tell)(&self.told);
        Ok(())
    }

    fn plain_zeros(&mut self, range: &Range<u64>) -> io::Result<()> {
        self.buffer[ROOM..].fill(0);
        let mut at = range.start;
        while at < range.end {
            let len = usize::try_from(range.end - at).unwrap_or(BUFFER).min(BUFFER);
            self.out.write_all(&self.buffer[ROOM..ROOM + len])?;
            at += len as u64;
            self.told.reached = at;
            (self.tell)(&self.told);
        }
        Ok(())
    }

    fn flush_zeros(&mut self) -> io::Result<()> {
        let zeros = self.zeros.clone();
        if zeros.is_empty() {
            return Ok(());
        }
        if zeros.end > self.announced {
            self.announce(zeros.end + INTERVAL)?;
        }
        self.zeros = zeros.end..zeros.end;
        self.emit(&rbd::zeros(&zeros))
    }

    /// Tells the size (again).
    fn announce(&mut self, size: u64) -> io::Result<()> {
        self.announced = size;
        let opening = rbd::opening(size);
        self.emit(&opening[rbd::BANNER.len()..])
    }

    fn checkpoint(&mut self, stage: Stage) -> io::Result<()> {
        let mark = Mark {
            start: self.piece.0,
            end: self.told.reached,
            identity: self.source.identity(),
            origin: self.plan.from,
        };
        self.piece = (self.told.reached, 0);
        let record = self.chain.record(&mark, stage);
        self.out.write_all(&record)
    }

    fn emit(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.chain.update(bytes);
        self.out.write_all(bytes)
    }
}
