//! The GUID partition table (GPT): a header in the second sector, its entries, and a copy of both
//! at the end.
//!
//! Header and entries carry checksums. The copy is used when the first table is damaged. (UEFI
//! specification, 5.3.)

use super::{Partition, PartitionRole, PartitionTableError, TableSource, read_at, sector_range};

/// Size of an entry in bytes: a power of two in this range.
const ENTRY_SIZES: std::ops::RangeInclusive<u64> = 128..=4096;
/// The most entries: eight times the usual number.
const MAX_ENTRIES: u64 = 1024;
/// The most bytes of entries that are read: 128 KiB, where 16 KiB are usual.
const MAX_TABLE_LEN: u64 = 128 << 10;
/// Length in bytes of the header's defined fields.
const HEADER_LEN: usize = 92;

/// The damage found in a table.
type Flaw = &'static str;
/// The flaw of a missing signature.
const NO_GPT: Flaw = "there is no GPT where its MBR says so";

/// Reads the partitions of `disk`, trying the sector sizes `sectors` (bytes).
///
/// # Errors
/// [`PartitionTableError::Damaged`] when both the table and its copy are damaged.
pub(super) fn read(
    disk: &dyn TableSource,
    sectors: &[u64],
) -> Result<Vec<Partition>, PartitionTableError> {
    let mut worst = NO_GPT;
    for sector in sectors {
        let first = match GptHeader::read(disk, 1, *sector) {
            Ok(first) => first,
            Err(flaw) => {
                worst = if worst == NO_GPT { flaw } else { worst };
                continue;
            }
        };
        let flaw = match first.partitions(disk) {
            Ok(found) => return Ok(found),
            Err(flaw) => flaw,
        };
        // The copy is at the sector that the header names; on a disk that has grown that is not the
        // last.
        let found =
            read_at_lba(disk, first.alternate_lba, *sector).or_else(|| read_backup(disk, *sector));
        return found.ok_or_else(|| damaged(flaw));
    }
    sectors.iter().find_map(|sector| read_backup(disk, *sector)).ok_or_else(|| damaged(worst))
}

fn damaged(flaw: Flaw) -> PartitionTableError {
    PartitionTableError::Damaged(format!("{flaw}, and no copy at its end is whole"))
}

/// Reads the partitions from the copy in the last sector.
fn read_backup(disk: &dyn TableSource, sector: u64) -> Option<Vec<Partition>> {
    read_at_lba(disk, (disk.size() / sector).checked_sub(1)?, sector)
}

/// Reads the partitions from the copy at sector `lba`.
fn read_at_lba(disk: &dyn TableSource, lba: u64, sector: u64) -> Option<Vec<Partition>> {
    let found =
        GptHeader::read(disk, lba, sector).and_then(|header| header.partitions(disk)).ok()?;
    log::warn!("the first partition table of a base is damaged: its copy at the end is used");
    Some(found)
}

/// A header with a valid checksum.
struct GptHeader {
    /// Sector size in bytes.
    sector_size: u64,
    /// Sector of the other copy of the header.
    alternate_lba: u64,
    /// First sector of the entries.
    entries_lba: u64,
    /// Number of entries.
    entry_count: u64,
    /// Size of an entry in bytes.
    entry_size: u64,
    /// Checksum of all entries.
    entries_crc: u32,
}

impl GptHeader {
    fn read(disk: &dyn TableSource, lba: u64, sector: u64) -> Result<Self, Flaw> {
        let at = lba.checked_mul(sector).ok_or(NO_GPT)?;
        let bytes = read_at(disk, at, sector).map_err(|_| "its GPT cannot be read")?;
        let bytes = bytes.filter(|bytes| bytes.starts_with(b"EFI PART")).ok_or(NO_GPT)?;
        let len = usize::try_from(le32(&bytes, 12)).ok();
        let own = len.filter(|len| *len >= HEADER_LEN).and_then(|len| bytes.get(..len));
        let mut own = own.ok_or("the header of its GPT has an impossible size")?.to_vec();
        own[16..20].fill(0);
        if crc32(&own) != le32(&bytes, 16) {
            return Err("the checksum of its GPT does not match");
        }
        if le64(&bytes, 24) != lba {
            return Err("its GPT says that it belongs elsewhere");
        }
        let (count, entry) = (u64::from(le32(&bytes, 80)), u64::from(le32(&bytes, 84)));
        if !ENTRY_SIZES.contains(&entry) || !entry.is_power_of_two() {
            return Err("the entries of its GPT have an impossible size");
        }
        if count > MAX_ENTRIES || count * entry > MAX_TABLE_LEN {
            return Err("its GPT has too many entries");
        }
        let (other, entries, crc) = (le64(&bytes, 32), le64(&bytes, 72), le32(&bytes, 88));
        Ok(Self {
            sector_size: sector,
            alternate_lba: other,
            entries_lba: entries,
            entry_count: count,
            entry_size: entry,
            entries_crc: crc,
        })
    }

    fn partitions(&self, disk: &dyn TableSource) -> Result<Vec<Partition>, Flaw> {
        let outside = "the entries of its GPT are past the end";
        let at = self.entries_lba.checked_mul(self.sector_size).ok_or(outside)?;
        let bytes = read_at(disk, at, self.entry_count * self.entry_size);
        let bytes = bytes.map_err(|_| "the entries of its GPT cannot be read")?.ok_or(outside)?;
        if crc32(&bytes) != self.entries_crc {
            return Err("the checksum of its GPT's entries does not match");
        }
        let len = usize::try_from(self.entry_size).map_err(|_| outside)?;
        let entries = (1..).zip(bytes.chunks_exact(len));
        Ok(entries.filter_map(|(number, entry)| self.partition(number, entry)).collect())
    }

    /// Parses an entry; `None` if it is unused or invalid.
    fn partition(&self, number: u32, entry: &[u8]) -> Option<Partition> {
        if entry[..16].iter().all(|byte| *byte == 0) {
            return None;
        }
        let (first, last) = (le64(entry, 32), le64(entry, 40));
        let sectors = last.checked_sub(first)?.checked_add(1)?;
        let range = sector_range(first, sectors, self.sector_size)?;
        Some(Partition { number, range, role: PartitionRole::Data })
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    u64::from(le32(bytes, at)) | u64::from(le32(bytes, at + 4)) << 32
}

/// Computes the CRC-32 of Ethernet, which differs from the CRC32C of cowslip's own files.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 * (crc & 1)))
    };
    !bytes.iter().fold(!0, step)
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::super::read;
    use super::super::testing::{MemoryDisk, put_entry};
    use super::*;

    /// The variable fields of a header.
    #[derive(Clone, Copy, Debug)]
    struct HeaderFields {
        lba: u64,
        other: u64,
        entries: u64,
        count: u32,
        entry: u32,
    }

    /// Writes a GPT header with a valid checksum over the entries in `bytes`.
    fn put_header(bytes: &mut [u8], at: usize, says: HeaderFields, sector: usize) {
        let from = usize::try_from(says.entries).unwrap_or(usize::MAX).saturating_mul(sector);
        let len = (says.count as usize).saturating_mul(says.entry as usize);
        let crc = bytes.get(from..from.saturating_add(len)).map_or(0, crc32);
        let header = &mut bytes[at..at + HEADER_LEN];
        header[..8].copy_from_slice(b"EFI PART");
        header[12..16].copy_from_slice(&92_u32.to_le_bytes());
        header[16..20].fill(0);
        header[24..32].copy_from_slice(&says.lba.to_le_bytes());
        header[32..40].copy_from_slice(&says.other.to_le_bytes());
        header[72..80].copy_from_slice(&says.entries.to_le_bytes());
        header[80..84].copy_from_slice(&says.count.to_le_bytes());
        header[84..88].copy_from_slice(&says.entry.to_le_bytes());
        header[88..92].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32(header);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }

    fn put_partition(bytes: &mut [u8], at: usize, first: u64, last: u64) {
        bytes[at..at + 16].fill(7);
        bytes[at + 32..at + 40].copy_from_slice(&first.to_le_bytes());
        bytes[at + 40..at + 48].copy_from_slice(&last.to_le_bytes());
    }

    /// Creates a disk of 1000 sectors with partitions 1 and 3, and a copy of the table at its end.
    fn disk(sector: usize) -> Vec<u8> {
        let mut bytes = vec![0; 1000 * sector];
        put_entry(&mut bytes, 0, 0, (0xee, 1, 999));
        for at in [2, 990] {
            put_partition(&mut bytes, at * sector, 100, 199);
            put_partition(&mut bytes, at * sector + 2 * 128, 200, 200);
        }
        let usual = HeaderFields { lba: 1, other: 999, entries: 2, count: 8, entry: 128 };
        put_header(&mut bytes, sector, usual, sector);
        let copy = HeaderFields { lba: 999, other: 1, entries: 990, ..usual };
        put_header(&mut bytes, 999 * sector, copy, sector);
        bytes
    }

    fn memory(bytes: Vec<u8>) -> MemoryDisk {
        let size = bytes.len() as u64;
        MemoryDisk::new(bytes, size)
    }

    fn is_read(bytes: Vec<u8>, sector: u64) {
        let found = read(&memory(bytes), None).unwrap();
        let found: Vec<_> = found.into_iter().map(|one| (one.number, one.range)).collect();
        let want = [(1, 100 * sector..200 * sector), (3, 200 * sector..201 * sector)];
        assert_eq!(found, want);
    }

    fn why(bytes: Vec<u8>) -> String {
        read(&memory(bytes), None).unwrap_err().to_string()
    }

    #[test]
    fn crc32_matches_the_standard_check_value() {
        assert_eq!(crc32(b"123456789"), 0xcbf4_3926);
    }

    #[test]
    fn entries_are_numbered_by_position_with_both_sector_sizes() {
        is_read(disk(512), 512);
        is_read(disk(4096), 4096);
    }

    #[test]
    fn a_flipped_byte_in_the_table_makes_its_copy_be_used() {
        for at in (512..512 + HEADER_LEN).chain(1024..1024 + 8 * 128) {
            let mut bytes = disk(512);
            bytes[at] ^= 0x10;
            is_read(bytes, 512);
        }
        let mut bytes = disk(4096);
        bytes[4096..3 * 4096].fill(0);
        is_read(bytes, 4096);
    }

    #[test]
    fn the_copy_on_a_grown_disk_is_found_where_the_header_says() {
        let mut bytes = disk(512);
        bytes.resize(2000 * 512, 0);
        is_read(bytes.clone(), 512);
        bytes[1024] ^= 1;
        is_read(bytes, 512);
    }

    #[test]
    fn a_damaged_table_without_a_good_copy_is_refused_with_the_reason() {
        let mut bytes = disk(512);
        bytes[999 * 512..].fill(0);
        bytes[1024] ^= 1;
        assert_eq!(
            why(bytes.clone()),
            "has a damaged partition table (the checksum of its GPT's entries does not match, and \
             no copy at its end is whole): mend it, or name the bytes with offset= and len="
        );
        bytes[512 + 40] ^= 1;
        assert!(why(bytes.clone()).contains("the checksum of its GPT does not match"));
        bytes[512..1024].fill(0);
        assert!(why(bytes).contains("there is no GPT where its MBR says so"));
    }

    #[test]
    fn a_header_with_excessive_fields_is_refused() {
        let usual = HeaderFields { lba: 1, other: 999, entries: 2, count: 8, entry: 128 };
        for (says, hint) in [
            (HeaderFields { count: 1025, ..usual }, "too many entries"),
            (HeaderFields { count: u32::MAX, ..usual }, "too many entries"),
            (HeaderFields { count: 64, entry: 4096, ..usual }, "too many entries"),
            (HeaderFields { entry: 0, ..usual }, "impossible size"),
            (HeaderFields { entry: 64, ..usual }, "impossible size"),
            (HeaderFields { entry: 192, ..usual }, "impossible size"),
            (HeaderFields { entry: 8192, count: 1, ..usual }, "impossible size"),
            (HeaderFields { entries: 999, ..usual }, "past the end"),
            (HeaderFields { entries: u64::MAX, ..usual }, "past the end"),
            (HeaderFields { lba: 2, ..usual }, "belongs elsewhere"),
        ] {
            let mut bytes = disk(512);
            bytes[999 * 512..].fill(0);
            put_header(&mut bytes, 512, says, 512);
            let disk = memory(bytes);
            let line = read(&disk, None).unwrap_err().to_string();
            assert!(line.contains(hint), "{says:?}: {line}");
            assert!(disk.read.load(Ordering::Relaxed) <= 64 << 10);
        }
    }

    #[test]
    fn entries_that_end_before_they_begin_or_overflow_are_skipped() {
        let mut bytes = disk(512);
        put_partition(&mut bytes, 1024 + 128, 300, 299);
        put_partition(&mut bytes, 1024 + 3 * 128, 0, u64::MAX);
        put_partition(&mut bytes, 1024 + 4 * 128, u64::MAX - 1, u64::MAX);
        let usual = HeaderFields { lba: 1, other: 999, entries: 2, count: 8, entry: 128 };
        put_header(&mut bytes, 512, usual, 512);
        is_read(bytes, 512);
    }

    proptest! {
        #[test]
        fn no_header_makes_the_parser_read_much(
            lba in prop_oneof![Just(1), any::<u64>()],
            (other, entries) in any::<(u64, u64)>(),
            near in 0..1000_u64,
            count in prop_oneof![0..2000_u32, any::<u32>()],
            entry in prop_oneof![Just(128_u32), Just(4096), any::<u32>()],
            (spoilt, at_near) in any::<(bool, bool)>(),
        ) {
            let mut bytes = disk(512);
            let entries = if at_near { near } else { entries };
            let other = if at_near { 999 - near } else { other };
            put_header(&mut bytes, 512, HeaderFields { lba, other, entries, count, entry }, 512);
            if spoilt {
                bytes[3 * 512] ^= 1;
            }
            let disk = memory(bytes);
            match read(&disk, None) {
                Ok(found) => prop_assert!(found.len() <= 1024),
                Err(error) => prop_assert!(!error.to_string().contains('\n')),
            }
            prop_assert!(disk.read.load(Ordering::Relaxed) <= 400 << 10);
        }
    }
}
