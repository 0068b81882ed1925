//! Partition tables: finds the byte ranges of a disk's partitions.
//!
//! ```text
//!   sector 0    1        2 ...                       ... last - 1 ...   last
//!   | MBR     | GPT    | its entries | partitions | copy of entries | backup GPT |
//!       │         an MBR with an entry of type 0xEE means: read the GPT
//!       └ else: four entries; an extended one begins a chain of further MBRs (mbr.rs)
//! ```
//!
//! A table may come from an attacker: each number in it is checked, a chain is followed up to a
//! limit, and at most a few hundred KiB are read. The result is the partitions that Linux would
//! find, with the same numbers.
//!
//! The crates that read such tables also write them, and let the table decide how much is read; the
//! code needed here is small.

mod gpt;
mod mbr;

use std::io;
use std::ops::Range;

use crate::config::format_size;
use crate::layer::{self, Layer};

/// Sector sizes of disks in bytes; the second is rare in files.
const SECTOR_SIZES: [u64; 2] = [512, 4096];

/// The most partitions that a message lists, which has to stay one line.
const MAX_LISTED: usize = 16;

/// The reason why partitions cannot be read; one line, to follow the base's name.
#[derive(Debug, thiserror::Error)]
pub enum PartitionTableError {
    /// The host cannot read the table.
    #[error("cannot be read for its partition table: {0}")]
    Unreadable(#[from] io::Error),
    /// The base has nothing that looks like a table.
    #[error("has no partition table: drop partition=, or name its bytes with offset= and len=")]
    NoTable,
    /// The table contradicts itself.
    #[error(
        "has a damaged partition table ({0}): mend it, or name the bytes with offset= and len="
    )]
    Damaged(String),
}

/// A disk whose partition table is read.
pub trait TableSource {
    /// The size in bytes.
    fn size(&self) -> u64;

    /// Fills `buf` with the bytes from `at` on. All of them must be inside the size.
    ///
    /// # Errors
    /// The host's errno.
    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()>;
}

impl TableSource for &dyn Layer {
    fn size(&self) -> u64 {
        Layer::size(*self)
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        layer::read_exact(*self, buf, at)
    }
}

/// The use of a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PartitionRole {
    /// Data.
    Data,
    /// A container of logical partitions.
    Extended,
}

/// A partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// The number as Linux counts: from 1, logical partitions from 5 on.
    pub number: u32,
    /// The range in bytes: not empty, and possibly reaching past the end of the disk.
    pub range: Range<u64>,
    /// The use of the partition.
    pub role: PartitionRole,
}

/// Reads the partitions of `disk`. `sector` is the sector size in bytes, if known.
///
/// # Errors
/// [`PartitionTableError`] when there is no table, or none that can be used.
pub fn read(
    disk: &dyn TableSource,
    sector: Option<u64>,
) -> Result<Vec<Partition>, PartitionTableError> {
    let first = read_at(disk, 0, SECTOR_SIZES[0])?.ok_or(PartitionTableError::NoTable)?;
    let entries = mbr::parse_entries(&first).ok_or(PartitionTableError::NoTable)?;
    if entries.iter().any(mbr::MbrEntry::is_protective) {
        let sectors = match sector {
            Some(4096) => [4096, 512],
            _ => SECTOR_SIZES,
        };
        return gpt::read(disk, &sectors);
    }
    mbr::read(disk, &entries, sector.unwrap_or(SECTOR_SIZES[0]))
}

/// Reads `len` bytes at `at`; `None` unless all of them are inside the size.
fn read_at(disk: &dyn TableSource, at: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
    let is_inside = at.checked_add(len).is_some_and(|end| end <= disk.size());
    let Some(len) = usize::try_from(len).ok().filter(|_| is_inside) else { return Ok(None) };
    let mut bytes = vec![0; len];
    disk.read_exact_at(&mut bytes, at)?;
    Ok(Some(bytes))
}

/// Converts `sectors` sectors from `start` on to a byte range; `None` when it is empty or its
/// numbers overflow.
fn sector_range(start: u64, sectors: u64, sector: u64) -> Option<Range<u64>> {
    let (start, len) = (start.checked_mul(sector)?, sectors.checked_mul(sector)?);
    let end = start.checked_add(len).filter(|end| i64::try_from(*end).is_ok())?;
    (len > 0).then_some(start..end)
}

/// Lists the partitions for a message: `1 (100 MiB), 2 (4 GiB)`.
#[must_use]
pub fn list_partitions(partitions: &[Partition]) -> String {
    let one = |partition: &Partition| match partition.role {
        PartitionRole::Data => {
            let size = format_size(partition.range.end - partition.range.start);
            format!("{} ({size})", partition.number)
        }
        PartitionRole::Extended => format!("{} (extended)", partition.number),
    };
    let mut shown: Vec<String> = partitions.iter().take(MAX_LISTED).map(one).collect();
    if partitions.len() > MAX_LISTED {
        shown.push(format!("and {} more", partitions.len() - MAX_LISTED));
    }
    if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
}

#[cfg(test)]
pub(crate) mod testing {
    //! A disk in memory, and helpers that write a table into it.

    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Bytes from offset 0 on, zeros after them up to the size, and a count of the bytes read.
    pub(crate) struct MemoryDisk {
        pub(crate) bytes: Vec<u8>,
        pub(crate) size: u64,
        pub(crate) read: AtomicU64,
    }

    impl MemoryDisk {
        pub(crate) fn new(bytes: Vec<u8>, size: u64) -> Self {
            Self { bytes, size, read: AtomicU64::new(0) }
        }
    }

    impl TableSource for MemoryDisk {
        fn size(&self) -> u64 {
            self.size
        }

        fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
            assert!(at + buf.len() as u64 <= self.size, "read past the end");
            self.read.fetch_add(buf.len() as u64, Ordering::Relaxed);
            for (at, byte) in (at..).zip(buf) {
                let at = usize::try_from(at).unwrap();
                *byte = self.bytes.get(at).copied().unwrap_or(0);
            }
            Ok(())
        }
    }

    /// Writes entry `index` of the MBR whose sector starts at byte `at`.
    pub(crate) fn put_entry(
        bytes: &mut [u8],
        at: usize,
        index: usize,
        (kind, start, count): (u8, u32, u32),
    ) {
        let entry = at + 446 + index * 16;
        bytes[entry + 4] = kind;
        bytes[entry + 8..entry + 12].copy_from_slice(&start.to_le_bytes());
        bytes[entry + 12..entry + 16].copy_from_slice(&count.to_le_bytes());
        bytes[at + 510..at + 512].copy_from_slice(&[0x55, 0xaa]);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use proptest::prelude::*;

    use super::testing::{MemoryDisk, put_entry};
    use super::*;

    fn why(disk: &MemoryDisk) -> String {
        read(disk, None).unwrap_err().to_string()
    }

    #[test]
    fn a_disk_without_a_table_is_reported() {
        for size in [0, 511, 512, 1 << 20] {
            assert!(why(&MemoryDisk::new(Vec::new(), size)).contains("has no partition table"));
        }
        // The boot sector of a FAT file system: a signature, and code where entries would be.
        let mut fat = vec![0x90; 512];
        fat[510..].copy_from_slice(&[0x55, 0xaa]);
        assert!(why(&MemoryDisk::new(fat, 1 << 20)).contains("has no partition table"));
    }

    #[test]
    fn the_list_of_partitions_stays_on_one_line() {
        assert_eq!(list_partitions(&[]), "none");
        let make = |number| Partition { number, range: 0..1 << 20, role: PartitionRole::Data };
        let mut all: Vec<Partition> = (1..=2).map(make).collect();
        all[1].role = PartitionRole::Extended;
        assert_eq!(list_partitions(&all), "1 (1 MiB), 2 (extended)");
        let all: Vec<Partition> = (1..=128).map(make).collect();
        assert!(list_partitions(&all).ends_with("16 (1 MiB), and 112 more"));
    }

    #[test]
    fn reading_a_layer_fills_holes_with_zeros() {
        let blank = crate::base::blank::Blank::new(4096);
        let blank: &dyn Layer = &blank;
        let mut buf = [7; 512];
        blank.read_exact_at(&mut buf, 100).unwrap();
        assert_eq!(buf, [0; 512]);
    }

    /// Generates 64 KiB that start like a table and are arbitrary after that.
    fn hostile() -> impl Strategy<Value = Vec<u8>> {
        let entry = (
            prop_oneof![Just(5_u8), Just(0x83), Just(0xee), any::<u8>()],
            0..140_u32,
            any::<u32>(),
        );
        let sector = proptest::collection::vec(entry, 4);
        proptest::collection::vec(sector, 1..128).prop_map(|sectors| {
            let mut bytes = vec![0; 512 * 128];
            for (at, entries) in sectors.iter().enumerate() {
                for (index, entry) in entries.iter().enumerate() {
                    put_entry(&mut bytes, at * 512, index, *entry);
                }
            }
            bytes
        })
    }

    proptest! {
        #[test]
        fn no_table_makes_the_parser_read_much_or_return_many(
            bytes in hostile(), size in 512..1_u64 << 40, large: bool,
        ) {
            let disk = MemoryDisk::new(bytes, size);
            let sector = if large { 4096 } else { 512 };
            match read(&disk, Some(sector)) {
                Ok(found) => {
                    prop_assert!(found.len() <= 4 + 128);
                    prop_assert!(found.iter().all(|one| one.range.start < one.range.end));
                    prop_assert!(found.is_sorted_by(|one, next| one.number < next.number));
                }
                Err(error) => prop_assert!(!error.to_string().contains('\n')),
            }
            prop_assert!(disk.read.load(Ordering::Relaxed) <= 256 << 10);
        }

        #[test]
        fn no_bytes_break_the_parser(bytes: Vec<u8>, size in 0..1_u64 << 20) {
            let mut bytes = bytes;
            bytes.resize(2048, 0);
            bytes[510..512].copy_from_slice(&[0x55, 0xaa]);
            let _ = read(&MemoryDisk::new(bytes, size), None);
        }
    }
}
