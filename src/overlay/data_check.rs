//! Whether the data file holds the bytes that the map calls Data.
//!
//! A block past the end of its segment would read as zeros, so a layer that has one is damaged. The
//! file's lengths are enough to tell: no data is read.

use std::collections::HashMap;
use std::io;
use std::ops::Range;

use super::host_file::SEGMENT_LEN;
use super::record::LayerMap;
use super::state::{BlockIndex, BlockState};
use super::storage::Storage;
use crate::config::format_size;

/// Returns the end of each segment of the data file, in bytes of the disk, by index.
pub(super) fn segment_ends(data: &dyn Storage) -> io::Result<HashMap<u64, u64>> {
    let Some(file) = data.host_file() else {
        return Ok(HashMap::new());
    };
    let mut ends = HashMap::new();
    for (index, segment) in file.segments()? {
        let index = index as u64;
        ends.insert(index, index * SEGMENT_LEN + segment.metadata()?.len());
    }
    Ok(ends)
}

/// Sums up the bytes that `map`, with blocks of `block_size` bytes, calls Data and that lie past the
/// end of the data file. Looks at the map only past the ends of segments, so it costs little for an
/// intact layer.
///
/// # Errors
/// The host's errno.
pub(super) fn missing_data(
    data: &dyn Storage,
    map: &LayerMap,
    block_size: u64,
) -> io::Result<ByteSum> {
    let mut missing = ByteSum::default();
    if data.host_file().is_none() {
        return Ok(missing);
    }
    let mut add_missing = |range: Range<u64>| {
        let range = range.start..range.end.min(map.size);
        if range.is_empty() {
            return;
        }
        let blocks =
            BlockIndex(range.start / block_size)..BlockIndex(range.end.div_ceil(block_size));
        for run in map.blocks.runs(blocks).filter(|run| run.state == BlockState::Data) {
            let start = run.range.start.0.saturating_mul(block_size).max(range.start);
            let end = run.range.end.0.saturating_mul(block_size).min(range.end);
            missing.add(start..end);
        }
    };
    let mut ends: Vec<_> = segment_ends(data)?.into_iter().collect();
    ends.sort_unstable();
    let mut covered = 0;
    for (index, end) in ends {
        add_missing(covered..index * SEGMENT_LEN);
        covered = end;
    }
    add_missing(covered..u64::MAX);
    Ok(missing)
}

/// Describes Data blocks that cannot be valid: past the disk's size, or past the end of the data
/// file, whose segments end at `ends` (bytes of the disk). One line for each problem.
pub(super) fn misplaced(map: &LayerMap, block_size: u64, ends: &HashMap<u64, u64>) -> Vec<String> {
    let (mut outside, mut missing) = (ByteSum::default(), ByteSum::default());
    let all = BlockIndex(0)..BlockIndex(u64::MAX);
    for run in map.blocks.runs(all).filter(|run| run.state == BlockState::Data) {
        let bytes = run.range.start.0.saturating_mul(block_size)
            ..run.range.end.0.saturating_mul(block_size);
        // The last block may reach past the end of the disk and is stored only up to that end.
        let size = map.size;
        outside.add(bytes.start.max(size.next_multiple_of(block_size))..bytes.end);
        for part in split_by_segment(bytes.start..bytes.end.min(size)) {
            let end = ends.get(&(part.start / SEGMENT_LEN)).copied().unwrap_or(0);
            missing.add(part.start.max(end)..part.end);
        }
    }
    let line = |sum: ByteSum, problem: &str| {
        let first = sum.first?;
        let size = format_size(sum.bytes);
        Some(format!("{size} of data from byte {first} on {problem}"))
    };
    let lines = [
        line(outside, "lie past the end of the disk"),
        line(missing, "are missing: the data file is too short, restore it from a backup"),
    ];
    lines.into_iter().flatten().collect()
}

/// Splits `range` at the borders of segments.
fn split_by_segment(range: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let mut at = range.start;
    std::iter::from_fn(move || {
        let start = at;
        at = range.end.min((start / SEGMENT_LEN + 1).saturating_mul(SEGMENT_LEN));
        (start < range.end).then_some(start..at)
    })
}

/// A number of bytes, and the offset of the first of them.
#[derive(Default)]
pub(super) struct ByteSum {
    pub(super) first: Option<u64>,
    pub(super) bytes: u64,
}

impl ByteSum {
    fn add(&mut self, range: Range<u64>) {
        if !range.is_empty() {
            self.first.get_or_insert(range.start);
            self.bytes += range.end - range.start;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map_with_data(size: u64, data: Range<u64>) -> LayerMap {
        let mut map = LayerMap::new(size, size);
        map.blocks.set(BlockIndex(data.start)..BlockIndex(data.end), BlockState::Data);
        map
    }

    #[test]
    fn data_past_the_end_of_the_disk_is_reported() {
        let ends = HashMap::from([(0, 1 << 20)]);
        assert_eq!(misplaced(&map_with_data(5000, 0..2), 4096, &ends), Vec::<String>::new());
        let lines = misplaced(&map_with_data(5000, 0..4), 4096, &ends);
        assert_eq!(lines, ["8 KiB of data from byte 8192 on lie past the end of the disk"]);
    }

    #[test]
    fn missing_data_is_found_in_each_segment_separately() {
        let block = 1 << 20;
        let border = SEGMENT_LEN / block;
        let map = map_with_data(2 * SEGMENT_LEN, border - 1..border + 2);
        let whole = HashMap::from([(0, SEGMENT_LEN), (1, SEGMENT_LEN + 2 * block)]);
        assert_eq!(misplaced(&map, block, &whole), Vec::<String>::new());
        let short = HashMap::from([(0, SEGMENT_LEN), (1, SEGMENT_LEN + block)]);
        assert!(misplaced(&map, block, &short)[0].starts_with("1 MiB of data"));
        let parts: Vec<_> = split_by_segment(SEGMENT_LEN - 1..SEGMENT_LEN + 1).collect();
        assert_eq!(parts, [SEGMENT_LEN - 1..SEGMENT_LEN, SEGMENT_LEN..SEGMENT_LEN + 1]);
    }
}
