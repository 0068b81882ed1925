//! Traces: what is read of an image at first, recorded by one mount (`trace=FILE`) so that the next ones
//! fetch just that before it is read.
//!
//! A trace is text, for people to look at and to cut:
//!
//! ```text
//!   cowslip trace 1
//!   0 4096                 the byte and the number of bytes, in the order of the first reads
//!   1048576 131072
//! ```
//!
//! It is a hint: where it does not fit the image any more, bytes are fetched in vain.

mod record;
mod replay;

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use self::record::Recorder;
use self::replay::Replay;
use super::BLOCK_SIZE;
use super::fetcher::Fetcher;
use crate::confined::{self, FileAccess};
use crate::host::os_message;

const HEADER: &str = "cowslip trace 1";
/// The ranges of a trace beyond which none is added.
const MAX_RANGES: usize = 1 << 20;
/// The most bytes of a trace: 4 GiB, as much as a cache keeps unless it is told otherwise.
const MAX_LEN: u64 = 4 << 30;
/// The longest file of a trace in bytes.
const MAX_FILE_LEN: u64 = 48 << 20;
/// The bytes of a trace that are fetched in the order of their places rather than of their reads.
const BATCH_LEN: u64 = 4 << 20;
/// Ranges are fetched as one where the gaps between them are at most this part of all of it.
const MAX_GAP_PART: u64 = 16;

/// What is done with the trace of an image.
pub(super) enum TraceUse {
    /// It is recorded.
    Record(Recorder),
    /// It is fetched.
    Replay(Arc<Replay>),
}

impl TraceUse {
    /// Records the first reads of an image of `size` bytes in the file at `file`; where there is one, begins
    /// to fetch what it has, at most `rate` bytes a second (0: no limit).
    ///
    /// # Errors
    /// A line without the name of the file.
    pub(super) fn begin(
        file: &Path,
        size: u64,
        fetcher: &Arc<Fetcher>,
        rate: u64,
    ) -> Result<Self, String> {
        let Some(replay) = Replay::read(file, size)? else {
            return Ok(Self::Record(Recorder::new(file)));
        };
        replay.start(fetcher, rate).map_err(|error| os_message(&error))?;
        Ok(Self::Replay(replay))
    }

    /// Notes that `range` was read from what is kept. Returns whether a trace has brought it, and brings
    /// what is read next.
    pub(super) fn note_hit(&self, range: &Range<u64>) -> bool {
        match self {
            Self::Record(recorder) => {
                recorder.note(range);
                false
            }
            Self::Replay(replay) => replay.contains(range),
        }
    }

    /// Whether all of `range` is in a trace that is being fetched.
    pub(super) fn is_bringing(&self, range: &Range<u64>) -> bool {
        matches!(self, Self::Replay(replay) if replay.is_running() && replay.contains(range))
    }

    /// Whether there is periodic work.
    pub(super) fn needs_maintenance(&self) -> bool {
        matches!(self, Self::Record(recorder) if recorder.is_recording())
    }

    /// Writes a trace that is complete. Waits for the host.
    pub(super) fn maintain(&self) {
        if let Self::Record(recorder) = self {
            recorder.maintain();
        }
    }
}

/// Blocks of an image, [`BLOCK_SIZE`] bytes each.
#[derive(Debug, Default)]
struct BlockSet(HashMap<u64, u64>);

impl BlockSet {
    /// Adds the blocks that `range` touches; returns those that are new.
    fn insert(&mut self, range: &Range<u64>) -> Vec<Range<u64>> {
        let mut new: Vec<Range<u64>> = Vec::new();
        for block in blocks(range) {
            let group = self.0.entry(block / 64).or_default();
            if std::mem::replace(group, *group | 1 << (block % 64)) & 1 << (block % 64) != 0 {
                continue;
            }
            let (start, end) = (block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE);
            match new.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => new.push(start..end),
            }
        }
        new
    }

    /// Whether all blocks that `range` touches are here.
    fn contains(&self, range: &Range<u64>) -> bool {
        let has =
            |block: u64| self.0.get(&(block / 64)).is_some_and(|g| g >> (block % 64) & 1 == 1);
        blocks(range).all(has)
    }
}

/// The numbers of the blocks that `range` touches.
fn blocks(range: &Range<u64>) -> Range<u64> {
    range.start / BLOCK_SIZE..range.end.div_ceil(BLOCK_SIZE)
}

/// Ranges of an image in the order in which they were first read: whole blocks, none twice.
#[derive(Debug, Default)]
struct Trace {
    ranges: Vec<Range<u64>>,
    blocks: BlockSet,
    /// The bytes of all ranges.
    len: u64,
}

impl Trace {
    /// Adds what is new of `range`, up to [`MAX_LEN`] and about [`MAX_RANGES`].
    fn add(&mut self, range: &Range<u64>) {
        let range = range.start
            ..range.end.min(range.start.saturating_add(MAX_LEN.saturating_sub(self.len)));
        if range.is_empty() || self.ranges.len() >= MAX_RANGES {
            return;
        }
        for new in self.blocks.insert(&range) {
            self.len += new.end - new.start;
            match self.ranges.last_mut() {
                Some(last) if last.end == new.start => last.end = new.end,
                _ => self.ranges.push(new),
            }
        }
    }

    /// Reads the trace in `file`, of an image of `size` bytes. `None` when there is no such file.
    ///
    /// # Errors
    /// A line without the name of the file.
    fn read(file: &Path, size: u64) -> Result<Option<Self>, String> {
        let opened = match confined::open_input(file, FileAccess::Read) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            opened => opened.map_err(|error| os_message(&error))?,
        };
        let bytes = confined::read_to_limit(&opened, MAX_FILE_LEN);
        let bytes = bytes.map_err(|error| os_message(&error))?;
        let text = String::from_utf8(bytes).map_err(|_| "it is no trace".to_owned())?;
        Self::parse(&text, size).map(Some)
    }

    /// Parses a trace of an image of `size` bytes.
    fn parse(text: &str, size: u64) -> Result<Self, String> {
        let mut lines = text.lines();
        if lines.next() != Some(HEADER) {
            return Err(format!("it is no trace: its first line is not '{HEADER}'"));
        }
        let mut trace = Self::default();
        for (at, line) in lines.enumerate() {
            let range = parse_range(line).ok_or_else(|| {
                format!("line {}: write the byte and the number of bytes, as in 4096 8192", at + 2)
            })?;
            let range = range.start.min(size)..range.end.min(size);
            if !range.is_empty() {
                trace.add(&range);
            }
        }
        Ok(trace)
    }

    fn to_text(&self) -> String {
        let mut text = format!("{HEADER}\n");
        for range in &self.ranges {
            let _ = writeln!(text, "{} {}", range.start, range.end - range.start);
        }
        text
    }

    /// Returns what is fetched, in order: neighbours within a batch are one.
    fn fetches(&self) -> Vec<Range<u64>> {
        let mut fetches = Vec::new();
        let (mut batch, mut len): (Vec<Range<u64>>, u64) = (Vec::new(), 0);
        for (at, range) in self.ranges.iter().enumerate() {
            len += range.end - range.start;
            batch.push(range.clone());
            if len >= BATCH_LEN || at + 1 == self.ranges.len() {
                batch.sort_unstable_by_key(|range| range.start);
                fetches.extend(joined(&batch));
                batch.clear();
                len = 0;
            }
        }
        fetches
    }
}

/// Joins ranges, in ascending order and disjoint, as long as the gaps are a small part of all.
fn joined(ranges: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut joined: Vec<Range<u64>> = Vec::new();
    let mut gaps = 0;
    for range in ranges {
        if let Some(last) = joined.last_mut() {
            let gap = range.start - last.end;
            if (gaps + gap) * MAX_GAP_PART <= range.end - last.start {
                last.end = range.end;
                gaps += gap;
                continue;
            }
        }
        joined.push(range.clone());
        gaps = 0;
    }
    joined
}

/// Parses one line: an offset and a length, in bytes.
fn parse_range(line: &str) -> Option<Range<u64>> {
    let (start, len) = line.split_once(' ')?;
    let (start, len): (u64, u64) = (start.parse().ok()?, len.parse().ok()?);
    Some(start..start.checked_add(len).filter(|end| *end <= crate::config::MAX_SIZE)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_trace_has_each_block_once_in_the_order_of_first_reads(
            reads in prop::collection::vec((0_u64..1 << 20, 1_u64..1 << 16), 0..60),
        ) {
            let mut trace = Trace::default();
            let mut model: Vec<u64> = Vec::new();
            for (start, len) in reads {
                let range = start..start + len;
                for block in blocks(&range) {
                    if !model.contains(&block) {
                        model.push(block);
                    }
                }
                trace.add(&range);
                prop_assert!(trace.blocks.contains(&range));
            }
            let blocks_of = |ranges: &[Range<u64>]| ranges.iter().flat_map(blocks).collect::<Vec<_>>();
            prop_assert_eq!(&blocks_of(&trace.ranges), &model);
            // It is read as it was written, cut to the image.
            let again = Trace::parse(&trace.to_text(), u64::MAX).unwrap();
            prop_assert_eq!(&again.ranges, &trace.ranges);
            let size = 1 << 19;
            let cut = Trace::parse(&trace.to_text(), size).unwrap();
            prop_assert!(cut.ranges.iter().all(|range| range.start < size));
            // All of it is fetched, and little more.
            let fetches = trace.fetches();
            let mut fetched = blocks_of(&fetches);
            fetched.sort_unstable();
            fetched.dedup();
            prop_assert!(model.iter().all(|block| fetched.binary_search(block).is_ok()));
            let bytes: u64 = fetches.iter().map(|range| range.end - range.start).sum();
            let wanted = model.len() as u64 * BLOCK_SIZE;
            prop_assert!(bytes <= wanted + wanted / (MAX_GAP_PART - 1));
        }
    }

    #[test]
    fn what_is_no_trace_is_refused() {
        for (text, why) in [
            ("", "its first line is not"),
            ("cowslip trace 2\n", "its first line is not"),
            ("cowslip trace 1\n0 4096\n\n", "line 3: write"),
            ("cowslip trace 1\n-1 2\n", "line 2"),
            ("cowslip trace 1\n18446744073709551615 2\n", "line 2"),
            ("cowslip trace 1\n0 9223372036854775808\n", "line 2"),
        ] {
            assert!(Trace::parse(text, 1 << 20).unwrap_err().contains(why), "{text}");
        }
        let much = Trace::parse("cowslip trace 1\n0 9223372036854775807\n", 1 << 20).unwrap();
        assert_eq!(much.to_text(), "cowslip trace 1\n0 1048576\n");
        // A range may be all of an image that has any size.
        let huge = Trace::parse("cowslip trace 1\n0 9223372036854775807\n8 9\n", u64::MAX).unwrap();
        assert_eq!(huge.to_text(), format!("cowslip trace 1\n0 {MAX_LEN}\n"));
    }
}
