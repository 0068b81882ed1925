//! Writes that were refused while the stream was open: for lack of space, or because too many wait.
//!
//! The image is not whole without them, so each leaves a debt, which a later write, hole or
//! truncation of the same bytes pays. A stream with debts cannot be finished. What the kernel's
//! page cache writes is written once, and nobody may ever learn that it was refused: that fails the
//! stream at once.

use std::io;
use std::ops::Range;

use super::{Output, OutputCore, OutputState};
use crate::host::os_message;
use crate::stream::queue::WriteSource;
use crate::stream::runs::{Written, WrittenRuns};

/// The most ranges that are remembered; with more the stream fails.
const MAX_RANGES: usize = 4096;

/// The ranges of the disk whose last write was refused.
#[derive(Default)]
pub(super) struct RefusedWrites {
    ranges: WrittenRuns,
    /// Why the latest of them was refused.
    why: String,
}

impl RefusedWrites {
    pub(super) fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Notes that `range` has the bytes now that its last writer wanted.
    pub(super) fn forget(&mut self, range: Range<u64>) {
        if !self.is_empty() {
            self.ranges.set(range, None);
        }
    }

    /// Returns why the stream is not whole.
    pub(super) fn debt(&self) -> Option<String> {
        let everything = 0..u64::MAX;
        let first = self.ranges.data_within(everything.clone()).next()?;
        let bytes = self.ranges.data_bytes(everything);
        Some(format!(
            "{bytes} bytes are missing, the first at {}: their write was refused ({}), and not \
             repeated",
            first.start, self.why
        ))
    }
}

impl Output {
    /// Notes that a write to `range` is refused with `error`. Once the stream is not open, nothing
    /// has to be noted: it has failed, or is complete without this write.
    pub(super) fn note_refused(
        &self,
        core: &mut OutputCore,
        range: Range<u64>,
        source: WriteSource,
        error: &io::Error,
    ) {
        let range = range.start..range.end.min(self.size);
        if core.state != OutputState::Open || range.is_empty() {
            return;
        }
        let (at, len) = (range.start, range.end - range.start);
        let why = os_message(error);
        if source == WriteSource::PageCache {
            let line =
                format!("{len} bytes at {at} that the kernel wrote back were refused: {why}");
            return self.fail(core, line);
        }
        if core.refused.is_empty() {
            log::warn!(
                "{}: a write of {len} bytes at {at} was refused: {why}; the stream cannot be \
                 finished before they are written again",
                self.name
            );
        }
        core.refused.why = why;
        core.refused.ranges.set(range, Some(Written::Data));
        if core.refused.ranges.len() > MAX_RANGES {
            let debt = core.refused.debt().unwrap_or_default();
            self.fail(core, debt);
        }
    }
}
