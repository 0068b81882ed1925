//! The state of an input stream: its progress, the bytes kept, and the parked reads.
//!
//! This module implements the rules of the read-window. It does no I/O and starts no threads; the
//! caller holds the lock.

use std::ops::Range;

use super::read_buffer::{CHUNK_SIZE, ReadBuffer};
use super::{InputState, MAX_HELD, ReadReply};
use crate::log_throttle::LogThrottle;
use crate::stream::parked::ParkPermit;

/// Bytes that the source is read ahead. Less than [`MAX_HELD`], because chunks are dropped whole:
/// one more chunk at either end and the thread's own buffer are subtracted.
pub(super) const READ_AHEAD: u64 = MAX_HELD - 3 * CHUNK_SIZE as u64;
/// The most bytes that a reader may skip, unless the read-window is larger: 16 MiB. A probe of the
/// end of a large disk skips more, and must not consume the stream.
pub(super) const SKIP_LIMIT: u64 = 16 << 20;

/// The progress of the reader thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InputPhase {
    /// Bytes may arrive.
    Flowing,
    /// No more bytes will arrive; the outcome of the source is not known yet.
    Ending,
    /// The outcome of the source is known.
    Ended,
}

/// The state under the lock; offsets and lengths are in bytes.
pub(super) struct InputCore {
    /// The progress of the reader thread.
    pub(super) phase: InputPhase,
    pub(super) outcome: InputState,
    pub(super) error: Option<String>,
    /// The size of the read-window; `None` if a spool keeps everything.
    read_window: Option<u64>,
    /// The bytes kept in memory; empty with a spool.
    pub(super) buffer: ReadBuffer,
    /// The number of bytes that have arrived from the source.
    pub(super) arrived: u64,
    /// The highest end of an answered read.
    pub(super) served: u64,
    /// The lowest offset that can still be read; it only grows.
    low: u64,
    /// The read-window that the reads so far would have needed.
    pub(super) needed: u64,
    pub(super) pending: Vec<PendingRead>,
    /// Whether the thread is waiting to be woken.
    pub(super) idle: bool,
    too_late_log: LogThrottle,
    too_far_log: LogThrottle,
}

/// A read that has not been answered yet.
pub(super) struct PendingRead {
    pub(super) range: Range<u64>,
    pub(super) client: u32,
    pub(super) reply: ReadReply,
    /// Held while the read is parked.
    pub(super) permit: Option<ParkPermit>,
}

/// A read whose bytes have arrived; with a spool they still have to be fetched.
pub(super) struct ReadyRead {
    pub(super) range: Range<u64>,
    pub(super) bytes: Option<Vec<u8>>,
    pub(super) reply: ReadReply,
}

/// The answer to a read of bytes that cannot be read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    /// The line to log, if one is due.
    pub(super) log_line: Option<String>,
}

impl InputCore {
    /// Creates the state of a new stream; `read_window` is `None` if a spool keeps everything.
    pub(super) fn new(read_window: Option<u64>) -> Self {
        Self {
            read_window,
            phase: InputPhase::Flowing,
            outcome: InputState::Open,
            error: None,
            buffer: ReadBuffer::default(),
            arrived: 0,
            served: 0,
            low: 0,
            needed: 0,
            pending: Vec::new(),
            idle: false,
            too_late_log: LogThrottle::default(),
            too_far_log: LogThrottle::default(),
        }
    }

    /// Returns the highest offset that any read has asked for.
    pub(super) fn demanded(&self) -> u64 {
        self.pending.iter().map(|read| read.range.end).max().unwrap_or(0).max(self.served)
    }

    /// Returns the end of the read-window. During a read that skips bytes the window moves along,
    /// so that the skipped bytes need not be held.
    fn read_window_end(&self) -> u64 {
        self.served.max(self.arrived.saturating_sub(READ_AHEAD))
    }

    /// Returns a refusal if `range` cannot be read.
    pub(super) fn refusal(&mut self, range: &Range<u64>) -> Option<Refusal> {
        let at = range.start;
        let back = self.read_window_end().saturating_sub(at);
        if self.read_window.is_some() {
            self.needed = self.needed.max(back);
        }
        if at < self.low {
            let line = format!(
                "the bytes at {at} were passed and are dropped: EIO; \
                 read-window={back} would have kept them"
            );
            return Some(Refusal { log_line: self.too_late_log.allow().then_some(line) });
        }
        if range.end > self.arrived && self.phase != InputPhase::Flowing {
            return Some(Refusal { log_line: None });
        }
        let demanded = self.demanded();
        let jump = SKIP_LIMIT.max(self.read_window?);
        if at > demanded.saturating_add(jump) {
            let line = format!(
                "a read at {at} is too far ahead of the stream, which is read up to {demanded}: \
                 EIO; add spool for random access"
            );
            return Some(Refusal { log_line: self.too_far_log.allow().then_some(line) });
        }
        None
    }

    /// Records the arrival of the next bytes; with a spool they have been stored already.
    pub(super) fn append(&mut self, bytes: &[u8]) {
        if self.read_window.is_some() {
            self.buffer.append(bytes);
        }
        self.arrived += bytes.len() as u64;
    }

    /// Drops the bytes that are neither in the read-window nor needed by a parked read.
    pub(super) fn trim(&mut self) {
        let Some(read_window) = self.read_window else { return };
        let window = self.read_window_end().saturating_sub(read_window);
        let needed = self.pending.iter().map(|read| read.range.start).min();
        let low = needed.map_or(window, |needed| needed.min(window)).min(self.arrived);
        self.low = self.low.max(low);
        self.buffer.drop_before(self.low);
    }

    /// Completes a read whose bytes have all arrived.
    pub(super) fn complete(&mut self, read: PendingRead) -> ReadyRead {
        self.served = self.served.max(read.range.end);
        let bytes = self.buffer.copy_range(&read.range);
        ReadyRead { range: read.range, bytes, reply: read.reply }
    }

    /// Removes the parked reads for which `is_over` returns true, oldest first.
    pub(super) fn take_pending(
        &mut self,
        mut is_over: impl FnMut(&PendingRead) -> bool,
    ) -> Vec<PendingRead> {
        self.pending.extract_if(.., |read| is_over(read)).collect()
    }

    /// Marks the source as failed if there is a `failure`.
    pub(super) fn fail(&mut self, failure: Option<&str>) {
        if let Some(why) = failure {
            self.outcome = InputState::Failed;
            self.error = Some(why.to_owned());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_logs_the_offset_and_the_needed_read_window_once_a_second() {
        let mut core = InputCore::new(Some(10));
        core.append(&[1; 1000]);
        core.served = 1000;
        core.trim();
        assert_eq!(core.refusal(&(990..1000)), None);
        let line = core.refusal(&(900..1000)).unwrap().log_line.unwrap();
        assert!(line.contains("at 900 ") && line.contains("read-window=100 "), "{line}");
        assert_eq!(core.refusal(&(900..1000)), Some(Refusal { log_line: None }));
        core.too_late_log.age();
        assert!(core.refusal(&(900..1000)).unwrap().log_line.is_some());
        // A line of one kind does not suppress one of the other.
        let line = core.refusal(&(1 << 30..1 << 31)).unwrap().log_line.unwrap();
        assert!(line.contains("at 1073741824 ") && line.contains("spool"), "{line}");
        assert_eq!(core.refusal(&(1 << 30..1 << 31)), Some(Refusal { log_line: None }));
    }

    #[test]
    fn a_stream_with_a_spool_refuses_only_bytes_that_will_not_arrive() {
        let mut core = InputCore::new(None);
        core.append(&[1; 1000]);
        core.served = 1000;
        core.trim();
        assert_eq!(core.refusal(&(0..10)), None);
        assert_eq!(core.refusal(&(1 << 30..1 << 31)), None);
        core.phase = InputPhase::Ended;
        assert_eq!(core.refusal(&(0..1000)), None);
        assert_eq!(core.refusal(&(0..1001)), Some(Refusal { log_line: None }));
        assert_eq!((core.needed, core.buffer.memory_used()), (0, 0));
    }
}
