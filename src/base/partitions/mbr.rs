//! The MBR partition table: four entries in the first sector, and the chain that an extended one
//! begins.
//!
//! ```text
//!   MBR: | 1 | 2 | extended | 4 |          numbers 1 to 4 are the positions of the entries
//!                     │
//!          EBR: | 5 | next | - | - |       start of 5: relative to this EBR
//!                      │                   start of next: relative to the first EBR
//!               EBR: | 6 | - | - | - |
//! ```
//!
//! The rules are those of Linux (`block/partitions/msdos.c`).

use std::collections::HashSet;
use std::ops::Range;

use super::{Partition, PartitionRole, PartitionTableError, TableSource, read_at, sector_range};

/// The most logical partitions, and the longest chain: more than any system shows.
const MAX_LOGICAL: usize = 128;

/// Length in bytes of the table's part of a sector.
const MBR_LEN: u64 = 512;

/// An entry of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MbrEntry {
    /// The type of the partition.
    type_id: u8,
    /// The first sector.
    start: u64,
    /// The number of sectors.
    count: u64,
}

impl MbrEntry {
    /// Whether the entry only protects a disk with a GPT from old programs.
    pub(super) fn is_protective(&self) -> bool {
        self.type_id == 0xee
    }

    fn is_extended(&self) -> bool {
        // The types for CHS, for LBA, and Linux's own.
        matches!(self.type_id, 0x05 | 0x0f | 0x85) && self.count > 0
    }
}

/// Parses the entries in the first 512 bytes of a sector; `None` if they are no table.
pub(super) fn parse_entries(sector: &[u8]) -> Option<[MbrEntry; 4]> {
    let table = sector.get(446..510)?;
    if sector.get(510..512)? != [0x55, 0xaa] {
        return None;
    }
    let mut entries = [MbrEntry { type_id: 0, start: 0, count: 0 }; 4];
    for (entry, bytes) in entries.iter_mut().zip(table.chunks_exact(16)) {
        // The flag is active or inactive: any other value is the code of a boot sector.
        if bytes[0] & 0x7f != 0 {
            return None;
        }
        let number = |at: usize| {
            u64::from(u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]))
        };
        *entry = MbrEntry { type_id: bytes[4], start: number(8), count: number(12) };
    }
    Some(entries)
}

/// Reads the partitions of a disk; `entries` are those of its first sector.
///
/// # Errors
/// [`PartitionTableError`] when a chain is damaged or cannot be read.
pub(super) fn read(
    disk: &dyn TableSource,
    entries: &[MbrEntry; 4],
    sector: u64,
) -> Result<Vec<Partition>, PartitionTableError> {
    let mut found = Vec::new();
    for (number, entry) in (1..).zip(entries) {
        let Some(range) = sector_range(entry.start, entry.count, sector) else { continue };
        let role = if entry.is_extended() { PartitionRole::Extended } else { PartitionRole::Data };
        found.push(Partition { number, range, role });
    }
    let extended = found.iter().filter(|one| one.role == PartitionRole::Extended);
    let extended: Vec<Range<u64>> = extended.map(|one| one.range.clone()).collect();
    let mut chain = EbrWalk { disk, sector, seen: HashSet::new(), found };
    for whole in extended {
        chain.walk_chain(&whole)?;
    }
    Ok(chain.found)
}

/// The state of a walk along the chains.
struct EbrWalk<'a> {
    disk: &'a dyn TableSource,
    sector: u64,
    /// Offsets in bytes of the sectors already read.
    seen: HashSet<u64>,
    found: Vec<Partition>,
}

impl EbrWalk<'_> {
    /// Finds the logical partitions in the extended partition `whole`.
    fn walk_chain(&mut self, whole: &Range<u64>) -> Result<(), PartitionTableError> {
        let damaged = |why: &str| PartitionTableError::Damaged(why.to_owned());
        let mut at = whole.start;
        loop {
            if !self.seen.insert(at) {
                return Err(damaged("its chain of logical partitions is a loop"));
            }
            if self.seen.len() > MAX_LOGICAL {
                return Err(damaged("its chain of logical partitions is longer than 128"));
            }
            let Some(bytes) = read_at(self.disk, at, MBR_LEN)? else {
                return Err(damaged("its chain of logical partitions leads past the end"));
            };
            // An extended partition in which no logical one was created yet.
            let Some(entries) = parse_entries(&bytes) else { return Ok(()) };
            self.add_entries(&entries, at, whole)?;
            let Some(next) = entries.iter().find(|entry| entry.is_extended()) else {
                return Ok(());
            };
            let next = whole.start + next.start * self.sector;
            if !whole.contains(&next) {
                return Err(damaged("its chain of logical partitions leaves the extended one"));
            }
            at = next;
        }
    }

    /// Adds the partitions that the sector at `at` lists.
    fn add_entries(
        &mut self,
        entries: &[MbrEntry; 4],
        at: u64,
        whole: &Range<u64>,
    ) -> Result<(), PartitionTableError> {
        for (index, entry) in entries.iter().enumerate() {
            let range = sector_range(entry.start, entry.count, self.sector)
                .filter(|_| !entry.is_extended())
                .and_then(|range| Some(at.checked_add(range.start)?..at.checked_add(range.end)?));
            let Some(range) = range.filter(|range| i64::try_from(range.end).is_ok()) else {
                continue;
            };
            // The last two entries are unused, and some programs leave junk there.
            if index >= 2 && (range.start < whole.start || range.end > whole.end) {
                continue;
            }
            let logical = self.found.iter().filter(|one| one.number > 4).count();
            if logical >= MAX_LOGICAL {
                let why = "it has more than 128 logical partitions".to_owned();
                return Err(PartitionTableError::Damaged(why));
            }
            let number = u32::try_from(logical).unwrap_or(u32::MAX).saturating_add(5);
            self.found.push(Partition { number, range, role: PartitionRole::Data });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::read;
    use super::super::testing::{MemoryDisk, put_entry};
    use super::*;

    const S: u64 = 512;

    fn numbers(disk: &MemoryDisk) -> Vec<(u32, Range<u64>)> {
        let found = read(disk, None).unwrap();
        found.into_iter().map(|one| (one.number, one.range)).collect()
    }

    /// Creates a disk with an extended partition as entry 2: 1000 sectors from sector 100 on.
    fn extended() -> Vec<u8> {
        let mut bytes = vec![0; 2000 * 512];
        put_entry(&mut bytes, 0, 1, (0x0f, 100, 1000));
        bytes
    }

    fn why(bytes: Vec<u8>) -> String {
        let size = bytes.len() as u64;
        read(&MemoryDisk::new(bytes, size), None).unwrap_err().to_string()
    }

    #[test]
    fn an_entry_is_numbered_by_its_position() {
        let mut bytes = vec![0; 512];
        put_entry(&mut bytes, 0, 0, (0x83, 1, 9));
        put_entry(&mut bytes, 0, 3, (0x07, 100, 50));
        bytes[446] = 0x80;
        let disk = MemoryDisk::new(bytes.clone(), 1 << 30);
        assert_eq!(numbers(&disk), [(1, S..10 * S), (4, 100 * S..150 * S)]);
        let of_4k = read(&disk, Some(4096)).unwrap();
        assert_eq!(of_4k[1].range, 100 * 4096..150 * 4096);
        // Code where the flag would be: a boot sector.
        bytes[462] = 0x33;
        assert!(why(bytes).contains("has no partition table"));
    }

    #[test]
    fn logical_partitions_count_from_5_and_start_after_their_own_record() {
        let mut bytes = extended();
        put_entry(&mut bytes, 0, 0, (0x83, 1, 50));
        put_entry(&mut bytes, 100 * 512, 0, (0x83, 2, 100));
        put_entry(&mut bytes, 100 * 512, 1, (0x05, 300, 200));
        put_entry(&mut bytes, 400 * 512, 0, (0x83, 1, 199));
        // Junk in an unused entry.
        put_entry(&mut bytes, 400 * 512, 2, (0x83, 5000, 199));
        let disk = MemoryDisk::new(bytes, 2000 * S);
        let want =
            [(1, S..51 * S), (2, 100 * S..1100 * S), (5, 102 * S..202 * S), (6, 401 * S..600 * S)];
        assert_eq!(numbers(&disk), want);
    }

    #[test]
    fn an_empty_extended_partition_has_no_logical_partitions() {
        assert_eq!(numbers(&MemoryDisk::new(extended(), 2000 * S)), [(2, 100 * S..1100 * S)]);
    }

    #[test]
    fn a_chain_with_a_loop_is_refused() {
        let mut bytes = extended();
        put_entry(&mut bytes, 100 * 512, 0, (0x83, 1, 10));
        put_entry(&mut bytes, 100 * 512, 1, (0x05, 300, 200));
        put_entry(&mut bytes, 400 * 512, 1, (0x05, 300, 200));
        assert!(why(bytes.clone()).contains("is a loop"));
        put_entry(&mut bytes, 400 * 512, 1, (0x05, 0, 200));
        assert!(why(bytes.clone()).contains("is a loop"));
        // Two extended partitions in the same place.
        put_entry(&mut bytes, 400 * 512, 1, (0, 0, 0));
        put_entry(&mut bytes, 0, 2, (0x05, 100, 1000));
        assert!(why(bytes).contains("is a loop"));
    }

    #[test]
    fn a_chain_that_leaves_its_partition_or_the_disk_is_refused() {
        let mut bytes = extended();
        put_entry(&mut bytes, 100 * 512, 1, (0x05, 1000, 200));
        assert!(why(bytes.clone()).contains("leaves the extended one"));
        put_entry(&mut bytes, 100 * 512, 1, (0x05, u32::MAX, u32::MAX));
        assert!(why(bytes.clone()).contains("leaves the extended one"));
        put_entry(&mut bytes, 0, 1, (0x05, 3000, 200));
        assert!(why(bytes).contains("leads past the end"));
    }

    #[test]
    fn an_overlong_chain_is_refused() {
        let mut bytes = extended();
        for record in 0..200_u32 {
            let at = (100 + record as usize) * 512;
            put_entry(&mut bytes, at, 1, (0x05, record + 1, 1));
        }
        assert!(why(bytes.clone()).contains("longer than 128"));
        for record in 0..100_usize {
            for index in [0, 2, 3] {
                put_entry(&mut bytes, (100 + record) * 512, index, (0x83, 1, 1));
            }
        }
        assert!(why(bytes).contains("more than 128 logical partitions"));
    }
}
