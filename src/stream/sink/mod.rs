//! The targets of an output stream.
//!
//! ```text
//!            data, zeros, hole
//!                   │ frames=raw, random access              frames=raw          frames=rbd
//!                   ├────────▶ SeekableWriter (file, device)     │                   │ records
//!                   └────────▶ WireWriter (fifo, cmd, stdout) ◀──┴───────────────────┘
//! ```
//!
//! One thread sends. Every operation that may block is given a [`Stop`]. A failure is permanent:
//! the bytes on the wire at that moment may end in half a record, so nothing can follow them.
//!
//! The end of a stream decides whether half an image can be taken for a whole one. A file gets its
//! name only in [`HostSink::finish`]. Commands that read a stream see the end of their input only
//! after `finish`; without it they are killed first, also when the sink is dropped, and by their
//! guard when the daemon is killed. The reader of a named pipe or of our stdout cannot be
//! informed; `frames=rbd` has an end record for that purpose.

mod open;
mod seekable;
#[cfg(test)]
pub(super) mod tests;
mod vectored;
mod watcher;
mod wire;

use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::monitor::StreamCounters;
use super::output::{Sink, SinkCallback};
use crate::config::{Overwrite, StreamFrames};
use crate::formats::rbd;
use crate::host::{os_error, os_message};
use crate::part_file::PartFile;
use crate::program::stop::Stop;
use seekable::SeekableWriter;
use watcher::Watcher;
use wire::WireWriter;

pub use super::error::StreamOpenError;
pub use super::monitor::Monitor;

/// An open sink. Dropping it unfinished aborts it.
///
/// The first send waits for a reader, if the target needs one, and sends the preamble, unless
/// `prepare` has done so. A gap before a send is sent as a hole. After a failure every call fails
/// with the same errno: `ECANCELED` once stopped, `EPIPE` without a reader, `ENOSPC` and other errors
/// of the host. `EINVAL` is the answer to an offset already sent, unless the frames can rewrite.
#[derive(Debug)]
pub struct HostSink {
    /// The target; `None` once it is closed.
    backend: Option<SinkBackend>,
    /// The file to rename at the end, and whether it may replace another.
    part: Option<(PartFile, Overwrite)>,
    frames: StreamFrames,
    /// The size of the disk in bytes.
    size: u64,
    /// Whether the wire is open and the preamble has been sent.
    is_started: bool,
    /// The errno of the first failure, which every later call returns.
    sticky_errno: Option<i32>,
    is_finished: bool,
    monitor: Monitor,
    stop: Stop,
    watcher: Option<Watcher>,
}

/// The target of the bytes.
#[derive(Debug)]
enum SinkBackend {
    /// A named pipe that has no reader yet.
    Fifo(PathBuf),
    Wire(WireWriter),
    Seekable(SeekableWriter),
    Discard,
}

/// The content of a range to send.
#[derive(Clone, Copy)]
enum SinkContent<'a, 'b> {
    Data(&'a [IoSlice<'b>]),
    Zeros,
    Hole,
}

impl HostSink {
    /// Returns a handle for other threads.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    fn unless_failed<T>(&mut self, work: impl FnOnce(&mut Self) -> io::Result<T>) -> io::Result<T> {
        if let Some(code) = self.sticky_errno {
            return Err(os_error(code));
        }
        let done = work(self);
        if let Err(error) = &done {
            self.sticky_errno = Some(error.raw_os_error().unwrap_or(libc::EIO));
        }
        done
    }

    fn counters(&self) -> Arc<StreamCounters> {
        Arc::clone(self.monitor.counters())
    }

    fn start(&mut self) -> io::Result<()> {
        if self.is_started {
            return Ok(());
        }
        if let Some(SinkBackend::Fifo(path)) = &self.backend {
            self.backend = Some(SinkBackend::Wire(WireWriter::open_fifo(path, self.stop.clone())?));
        }
        if self.frames == StreamFrames::Rbd {
            self.write_wire(&rbd::v2::preamble(self.size))?;
        }
        self.is_started = true;
        Ok(())
    }

    fn send(&mut self, range: Range<u64>, content: SinkContent<'_, '_>) -> io::Result<()> {
        let accepted = self.monitor.accepted();
        if range.start < accepted && !self.can_rewrite() {
            return Err(os_error(libc::EINVAL));
        }
        self.unless_failed(|sink| {
            sink.start()?;
            if range.start > accepted {
                sink.send_piece(accepted..range.start, SinkContent::Hole)?;
            }
            if range.is_empty() { Ok(()) } else { sink.send_piece(range, content) }
        })
    }

    fn send_piece(&mut self, range: Range<u64>, content: SinkContent<'_, '_>) -> io::Result<()> {
        if self.frames == StreamFrames::Rbd {
            return self.send_record(range, content);
        }
        let counts = self.counters();
        let passed = |len| {
            counts.wire_bytes.fetch_add(len, Ordering::Relaxed);
            counts.accepted.fetch_add(len, Ordering::Release);
        };
        let len = range.end - range.start;
        match (self.backend.as_mut(), content) {
            (Some(SinkBackend::Wire(wire)), SinkContent::Data(parts)) => {
                wire.write_all(parts, passed)
            }
            (Some(SinkBackend::Wire(wire)), _) => wire.write_zeros(len, passed),
            (Some(SinkBackend::Seekable(file)), SinkContent::Data(parts)) => {
                file.write_all(range.start, parts, passed)
            }
            (Some(SinkBackend::Seekable(file)), SinkContent::Zeros) => {
                file.write_zeros(range, passed)
            }
            (Some(SinkBackend::Seekable(file)), SinkContent::Hole) => {
                file.write_hole(range, passed)
            }
            (Some(SinkBackend::Discard), _) => {
                passed(len);
                Ok(())
            }
            (Some(SinkBackend::Fifo(_)) | None, _) => Err(os_error(libc::EBADF)),
        }
    }

    fn send_record(&mut self, range: Range<u64>, content: SinkContent<'_, '_>) -> io::Result<()> {
        match content {
            SinkContent::Data(parts) => {
                let header = rbd::v2::data_header(&range);
                let record: Vec<_> =
                    std::iter::once(IoSlice::new(&header)).chain(parts.iter().copied()).collect();
                self.write_wire_all(&record)?;
            }
            SinkContent::Zeros | SinkContent::Hole => {
                self.write_wire(&rbd::v2::zeros_record(&range))?;
            }
        }
        // A late rewrite does not move the position.
        self.counters().accepted.fetch_max(range.end, Ordering::Release);
        Ok(())
    }

    fn send_end(&mut self, end: u64) -> io::Result<()> {
        self.start()?;
        let accepted = self.monitor.accepted();
        if accepted < end {
            self.send_piece(accepted..end, SinkContent::Hole)?;
        }
        if self.frames == StreamFrames::Rbd { self.write_wire(&rbd::END_RECORD) } else { Ok(()) }
    }

    /// Writes bytes to the wire that are not the disk's alone, such as record headers.
    fn write_wire(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.write_wire_all(&[IoSlice::new(bytes)])
    }

    fn write_wire_all(&mut self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let counts = self.counters();
        let passed = |len| {
            counts.wire_bytes.fetch_add(len, Ordering::Relaxed);
        };
        match &self.backend {
            Some(SinkBackend::Wire(wire)) => wire.write_all(parts, passed),
            Some(SinkBackend::Discard) => Ok(()),
            Some(SinkBackend::Seekable(_) | SinkBackend::Fifo(_)) | None => {
                Err(os_error(libc::EBADF))
            }
        }
    }
}

impl Sink for HostSink {
    fn prepare(&mut self) -> io::Result<()> {
        self.unless_failed(Self::start)
    }

    fn watch(&mut self, on_event: SinkCallback) {
        let wire = match &self.backend {
            Some(SinkBackend::Wire(wire)) => wire.hangup_fd(),
            _ => None,
        };
        if wire.is_some() || self.monitor.pipeline().is_some() {
            self.watcher = Watcher::start(wire, self.monitor.clone(), on_event).ok();
        }
    }

    fn send_data(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let len: u64 = parts.iter().map(|part| part.len() as u64).sum();
        let end = offset.checked_add(len).ok_or_else(|| os_error(libc::EINVAL))?;
        self.send(offset..end, SinkContent::Data(parts))
    }

    fn send_zeros(&mut self, range: Range<u64>) -> io::Result<()> {
        self.send(range, SinkContent::Zeros)
    }

    fn send_hole(&mut self, range: Range<u64>) -> io::Result<()> {
        self.send(range, SinkContent::Hole)
    }

    fn can_rewrite(&self) -> bool {
        self.frames == StreamFrames::Rbd
    }

    fn explain(&self, error: &io::Error) -> String {
        self.monitor.explain(error)
    }

    fn finish(mut self: Box<Self>, end: u64) -> Result<(), String> {
        let sent = self.unless_failed(|sink| sink.send_end(end));
        sent.map_err(|error| self.explain(&error))?;
        // The watcher holds the wire as well, and readers see the end only when it is closed.
        self.watcher = None;
        let out = self.backend.take();
        if let Some(pipeline) = self.monitor.pipeline() {
            pipeline.release_guard();
            drop(out);
            pipeline.wait_unless_stopped(&self.stop)?;
        } else if let Some(SinkBackend::Seekable(file)) = &out {
            file.sync().map_err(|error| self.explain(&error))?;
        }
        if let Some((part, overwrite)) = &self.part {
            if self.stop.is_stopped() {
                // Aborted meanwhile: the file must not look complete.
                return Err(self.explain(&os_error(libc::ECANCELED)));
            }
            if self.frames == StreamFrames::Raw {
                let path = part.path().display();
                let sized = part.file().set_len(end);
                sized.map_err(|error| format!("cannot end '{path}': {}", os_message(&error)))?;
            }
            part.commit(*overwrite)?;
        }
        self.is_finished = true;
        Ok(())
    }

    fn abort(self: Box<Self>) {
        drop(self);
    }
}

impl Drop for HostSink {
    fn drop(&mut self) {
        self.watcher = None;
        if !self.is_finished {
            // Kill before the pipe is closed, which would look like the end of a complete image.
            self.monitor.kill();
            if self.backend.is_some()
                && self.monitor.accepted() == 0
                && let Some((part, _)) = &self.part
            {
                part.remove();
            }
        }
    }
}
