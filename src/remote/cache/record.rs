//! The file `map`: which blocks of `data` hold which bytes. Pure: no I/O.
//!
//! ```text
//!   header   magic 8 | version 4 | 0 4 | size 8 | identity 32 | 0 4 | crc 4           64 bytes
//!   record   block 8 | blocks 2 | kind 2 | crc of the bytes 4 | 0 4 | crc 4           24 bytes
//!   record   ...
//! ```
//!
//! All numbers are little-endian. A record of kind 1 says that blocks were stored, with the CRC32C of
//! identity, offset and bytes; one of kind 2 that a whole unit was punched out. Records are appended
//! and never synced, so after a crash any of them may be missing, torn, or about bytes that never
//! reached the disk: a record counts only with its own checksum, and the bytes only with theirs.

use std::io::{self, Read};

use super::units::{UNIT_BLOCKS, mask_of};
use crate::checksum;
use crate::host;
use crate::remote::BLOCK_SIZE;

pub(super) const HEADER_LEN: usize = 64;
pub(super) const RECORD_LEN: usize = 24;
/// Blocks that one record may describe, aligned to so many: what is read at once to compare it, 64 KiB.
pub(super) const GROUP_BLOCKS: u64 = 16;

const MAGIC: [u8; 8] = *b"cowslipC";
const VERSION: u32 = 1;
const STORED: u16 = 1;
const EVICTED: u16 = 2;

/// The image whose bytes a cache holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ImageId {
    /// SHA-256 of its identity.
    pub(super) hash: [u8; 32],
    /// Its size in bytes.
    pub(super) size: u64,
}

impl ImageId {
    /// Returns the checksum of `bytes`, those of this image from `offset` on.
    pub(super) fn checksum(&self, offset: u64, bytes: &[u8]) -> u32 {
        let seed = checksum::crc32c_append(checksum::crc32c(&self.hash), &offset.to_le_bytes());
        checksum::crc32c_append(seed, bytes)
    }

    pub(super) fn header(&self) -> [u8; HEADER_LEN] {
        let mut header = [0; HEADER_LEN];
        header[..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&VERSION.to_le_bytes());
        header[16..24].copy_from_slice(&self.size.to_le_bytes());
        header[24..56].copy_from_slice(&self.hash);
        let crc = checksum::crc32c(&header[..60]);
        header[60..].copy_from_slice(&crc.to_le_bytes());
        header
    }

    pub(super) fn encode(&self, record: &Record) -> [u8; RECORD_LEN] {
        let mut bytes = [0; RECORD_LEN];
        let (block, blocks, kind, crc) = match *record {
            Record::Stored(run) => (run.block, run.blocks, STORED, run.crc),
            Record::Evicted { unit } => (unit * UNIT_BLOCKS, 0, EVICTED, 0),
        };
        bytes[..8].copy_from_slice(&block.to_le_bytes());
        bytes[8..10].copy_from_slice(&blocks.to_le_bytes());
        bytes[10..12].copy_from_slice(&kind.to_le_bytes());
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        let crc = self.checksum(0, &bytes[..20]);
        bytes[20..].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Decodes a record; `None` when it is damaged, of another image, or outside of this one.
    pub(super) fn decode(&self, bytes: &[u8; RECORD_LEN]) -> Option<Record> {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        if word(20) != self.checksum(0, &bytes[..20]) {
            return None;
        }
        let block = u64::from(word(4)) << 32 | u64::from(word(0));
        let all_blocks = self.size.div_ceil(BLOCK_SIZE);
        match half(10) {
            STORED => {
                let blocks = half(8);
                let end = block.checked_add(blocks.into())?;
                let is_one_group = block / GROUP_BLOCKS == end.checked_sub(1)? / GROUP_BLOCKS;
                let run = Run { block, blocks, crc: word(12) };
                (blocks > 0 && is_one_group && end <= all_blocks).then_some(Record::Stored(run))
            }
            EVICTED if block < all_blocks => Some(Record::Evicted { unit: block / UNIT_BLOCKS }),
            _ => None,
        }
    }

    /// Reads at most `limit` records of `map`. `None` when it is the map of something else.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn read_map(&self, mut map: impl Read, limit: usize) -> io::Result<Option<MapText>> {
        let mut header = [0; HEADER_LEN];
        if host::read_full(&mut map, &mut header)? < HEADER_LEN || header != self.header() {
            return Ok(None);
        }
        let mut found = MapText { records: Vec::new(), damaged: 0 };
        let mut bytes = [0; RECORD_LEN];
        while found.records.len() + found.damaged < limit
            && host::read_full(&mut map, &mut bytes)? == RECORD_LEN
        {
            match self.decode(&bytes) {
                Some(record) => found.records.push(record),
                None => found.damaged += 1,
            }
        }
        Ok(Some(found))
    }
}

/// The contents of a map.
#[derive(Debug)]
pub(super) struct MapText {
    /// The records, in the order in which they were written.
    pub(super) records: Vec<Record>,
    /// The number of those that do not count.
    pub(super) damaged: usize,
}

/// Blocks that were stored together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    /// The first one, by its number in the image.
    pub(super) block: u64,
    /// How many, at most [`GROUP_BLOCKS`].
    pub(super) blocks: u16,
    /// The checksum of their bytes.
    pub(super) crc: u32,
}

impl Run {
    pub(super) fn unit(&self) -> u64 {
        self.block / UNIT_BLOCKS
    }

    /// Returns the bytes of the run in an image of `size` bytes.
    pub(super) fn range(&self, size: u64) -> std::ops::Range<u64> {
        let end = (self.block + u64::from(self.blocks)) * BLOCK_SIZE;
        self.block * BLOCK_SIZE..end.min(size)
    }

    /// Returns the blocks of the run as a mask of its unit.
    pub(super) fn mask(&self) -> u64 {
        mask_of(&self.range(u64::MAX))
    }
}

/// One entry of a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Record {
    /// Blocks were stored.
    Stored(Run),
    /// Nothing of this unit is there any more.
    Evicted {
        /// The number of the unit.
        unit: u64,
    },
}

impl Record {
    fn unit(&self) -> u64 {
        match self {
            Self::Stored(run) => run.unit(),
            Self::Evicted { unit } => *unit,
        }
    }
}

/// Returns the runs that are left when `records` have been followed in their order, each after the
/// number of its record, in ascending order of their blocks. No two of them overlap.
pub(super) fn follow(records: &[Record]) -> Vec<(usize, Run)> {
    let mut order: Vec<usize> = (0..records.len()).collect();
    order.sort_by_key(|at| records[*at].unit());
    let mut all = Vec::new();
    for of_unit in order.chunk_by(|one, other| records[*one].unit() == records[*other].unit()) {
        let start = all.len();
        for &at in of_unit {
            match records[at] {
                Record::Evicted { .. } => all.truncate(start),
                Record::Stored(run) => {
                    // The file has the newer bytes; the checksum of the older ones says nothing now.
                    let mut kept = all.split_off(start);
                    kept.retain(|(_, older): &(usize, Run)| older.mask() & run.mask() == 0);
                    all.append(&mut kept);
                    all.push((at, run));
                }
            }
        }
        all[start..].sort_by_key(|(_, run)| run.block);
    }
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn image(size: u64) -> ImageId {
        ImageId { hash: [7; 32], size }
    }

    fn record(size: u64) -> impl Strategy<Value = Record> {
        let blocks = size.div_ceil(BLOCK_SIZE);
        let stored =
            (0..blocks, 1u64..=GROUP_BLOCKS, any::<u32>()).prop_map(move |(at, len, crc)| {
                let end = (at + len).min(at - at % GROUP_BLOCKS + GROUP_BLOCKS).min(blocks);
                let blocks = u16::try_from(end - at).unwrap();
                Record::Stored(Run { block: at, blocks, crc })
            });
        let evicted = (0..blocks.div_ceil(UNIT_BLOCKS)).prop_map(|unit| Record::Evicted { unit });
        prop_oneof![4 => stored, 1 => evicted]
    }

    const SIZE: u64 = (1 << 20) + 5000;

    proptest! {
        #[test]
        fn every_record_is_read_as_it_was_written(record in record(SIZE)) {
            let bytes = image(SIZE).encode(&record);
            prop_assert_eq!(image(SIZE).decode(&bytes), Some(record));
            let other = ImageId { hash: [8; 32], size: SIZE };
            prop_assert_eq!(other.decode(&bytes), None);
        }

        #[test]
        fn no_damage_is_taken_for_a_record(record in record(SIZE), bit in 0..RECORD_LEN * 8) {
            let mut bytes = image(SIZE).encode(&record);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(image(SIZE).decode(&bytes), None);
        }

        #[test]
        fn no_record_reaches_past_the_image(block: u64, blocks: u16, crc: u32) {
            let bytes = image(SIZE).encode(&Record::Stored(Run { block, blocks, crc }));
            if let Some(Record::Stored(run)) = image(SIZE).decode(&bytes) {
                prop_assert!(run.range(SIZE).end <= SIZE && !run.range(SIZE).is_empty());
                prop_assert_eq!(run.mask().count_ones(), u32::from(blocks));
            }
        }

        /// Following records is what a plain array of blocks does, except that a run of which a part
        /// was replaced is gone.
        #[test]
        fn the_last_record_of_a_block_counts(
            records in prop::collection::vec(record(SIZE), 0..60),
        ) {
            let mut model = vec![None; usize::try_from(SIZE.div_ceil(BLOCK_SIZE)).unwrap() + 64];
            for (at, record) in records.iter().enumerate() {
                match record {
                    Record::Evicted { unit } => {
                        let start = usize::try_from(unit * UNIT_BLOCKS).unwrap();
                        model[start..start + 64].fill(None);
                    }
                    Record::Stored(run) => {
                        let start = usize::try_from(run.block).unwrap();
                        let blocks = start..start + usize::from(run.blocks);
                        let hit: Vec<_> = model[blocks.clone()].iter().flatten().copied().collect();
                        for block in &mut model {
                            if block.is_some_and(|owner| hit.contains(&owner)) {
                                *block = None;
                            }
                        }
                        model[blocks].fill(Some(at));
                    }
                }
            }
            let mut found = vec![None; model.len()];
            let mut end = 0;
            for (at, run) in follow(&records) {
                prop_assert!(run.block >= end);
                end = run.block + u64::from(run.blocks);
                prop_assert_eq!(records[at], Record::Stored(run));
                for block in run.block..end {
                    found[usize::try_from(block).unwrap()] = Some(at);
                }
            }
            prop_assert_eq!(found, model);
        }
    }

    #[test]
    fn a_map_is_read_up_to_its_limit_and_past_damage() {
        let image = image(SIZE);
        let records: Vec<Record> = (0..4).map(|unit| Record::Evicted { unit }).collect();
        let mut map = image.header().to_vec();
        records.iter().for_each(|record| map.extend(image.encode(record)));
        let read = |map: &[u8], limit| image.read_map(map, limit).unwrap();
        assert_eq!(read(&map, 9).unwrap().records, records);
        assert_eq!(read(&map, 3).unwrap().records, records[..3]);
        map[HEADER_LEN + RECORD_LEN] ^= 1;
        map.pop();
        let found = read(&map, 9).unwrap();
        assert_eq!((found.records, found.damaged), (vec![records[0], records[2]], 1));
        map[20] ^= 1;
        assert!(read(&map, 9).is_none() && read(&map[..50], 9).is_none() && read(&[], 9).is_none());
    }
}
