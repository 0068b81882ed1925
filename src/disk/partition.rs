//! Partition files: the partitions of a disk as files beside it (the key `partitions`).
//!
//! ```text
//!   disk.img      |-----|========|---|===========|----|
//!                       1            2
//!   disk.img.p1         |========|
//!   disk.img.p2                      |===========|
//! ```
//!
//! A partition file has no bytes of its own: a write through it changes the disk, its overlay and
//! its snapshots, and the other way round. The ranges are read from the disk's partition table at
//! the mount and stay the same until the next mount. Like a partition of a block device, a
//! partition file has a fixed size; where the disk is cut off, so is the file.
//!
//! The kernel caches pages per inode. After a change through one file, cached pages of overlapping
//! files are invalidated before the reply. The check for such pages comes after the change, because
//! an open is counted before its reply: either the check sees the open, or the opener drops older
//! cached pages.

use std::io;
use std::ops::Range;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use uuid::Uuid;

use super::Disk;
use super::allocated::AllocatedCache;
use super::base_description::BaseDescription;
use crate::base::partitions::{self, PartitionRole, PartitionTableError, TableSource};
use crate::config::format_size;
use crate::host::os_error;
use crate::layer::Wait;

/// The most partitions listed in the note about them, which has to stay one line.
const MAX_LISTED: usize = 16;

/// Inode numbers of partition files: below those of disks, above those of control files.
pub const PARTITION_INODES: Range<u64> = 1 << 61..1 << 62;

/// The reason why the partitions of a disk cannot be shown; one line, to follow the disk's name.
#[derive(Debug, thiserror::Error)]
pub enum ShowPartitionsError {
    /// The disk cannot be read.
    #[error("cannot be read for its partition table: {0}")]
    Unreadable(#[from] io::Error),
    /// The disk has nothing that looks like a table.
    #[error("has no partition table: leave out partitions, or make a table and mount it again")]
    NoTable,
    /// The table contradicts itself.
    #[error("has a damaged partition table ({0}): mend it, or leave out partitions")]
    Damaged(String),
    /// The kernel reads and writes a reflink overlay itself, so this daemon cannot keep several
    /// files coherent.
    #[error(
        "has a reflink overlay, whose bytes the kernel reads and writes itself: leave out partitions"
    )]
    Reflink,
}

/// A partition as a file of its own.
#[derive(Debug)]
pub struct PartitionFile {
    number: u32,
    pub(super) range: Range<u64>,
    pub(super) ino: u64,
    /// Number of open handles that can read, and so map the file: the kernel may hold pages.
    pub(super) read_opens: AtomicU32,
    pub(super) allocated: AllocatedCache,
}

impl PartitionFile {
    fn new(disk: &Uuid, number: u32, range: Range<u64>) -> Self {
        // This half of the uuid is not part of the disk's own inode number.
        let start = disk.as_u64_pair().1.wrapping_add(number.into());
        let ino = PARTITION_INODES.start + start % (PARTITION_INODES.end - PARTITION_INODES.start);
        Self {
            number,
            range,
            ino,
            read_opens: AtomicU32::new(0),
            allocated: AllocatedCache::default(),
        }
    }

    /// The partition's number, counted as Linux does.
    #[must_use]
    pub fn number(&self) -> u32 {
        self.number
    }

    /// The partition's range in the disk in bytes, according to the table.
    #[must_use]
    pub fn range(&self) -> &Range<u64> {
        &self.range
    }

    /// The inode number of the file.
    #[must_use]
    pub fn ino(&self) -> u64 {
        self.ino
    }

    /// The name of the file beside the disk `disk`.
    #[must_use]
    pub fn name(&self, disk: &str) -> String {
        format!("{disk}.p{}", self.number)
    }

    /// The part of the partition's range that `disk` has at its current size.
    pub(super) fn range_in(&self, disk: &Disk) -> Range<u64> {
        self.range.start..self.range.end.min(disk.size()).max(self.range.start)
    }
}

/// Splits `name` into the name of a disk and a partition's number (`NAME.pN`).
#[must_use]
pub fn split_name(name: &str) -> Option<(&str, u32)> {
    let (disk, number) = name.rsplit_once(".p")?;
    let is_plain = number.bytes().all(|byte| byte.is_ascii_digit()) && !number.starts_with('0');
    Some((disk, number.parse().ok().filter(|_| is_plain && !disk.is_empty())?))
}

/// The partition files of a disk.
#[derive(Debug, Default)]
pub(super) struct PartitionFiles {
    pub(super) files: Vec<Arc<PartitionFile>>,
    /// Number of open handles of the whole disk that can read.
    pub(super) read_opens: AtomicU32,
}

impl TableSource for Disk {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_exact_at(&self, buf: &mut [u8], at: u64) -> io::Result<()> {
        let got = self.read(buf, at, Wait::Yes)?;
        if got == buf.len() { Ok(()) } else { Err(os_error(libc::EIO)) }
    }
}

impl Disk {
    /// The partition files; none unless [`show_partitions`](Self::show_partitions) has found some.
    #[must_use]
    pub fn partition_files(&self) -> &[Arc<PartitionFile>] {
        self.partition_files.get().map_or(&[], |files| &files.files)
    }

    /// Reads the partition table through the disk and creates a file for each partition that can
    /// hold data. To be called once, before the disk `name` can be opened. Returns notes for the
    /// user. A blank disk may get its table later; a note says so.
    ///
    /// # Errors
    /// [`ShowPartitionsError`]; the disk has no partition files then.
    pub fn show_partitions(&self, name: &str) -> Result<Vec<String>, ShowPartitionsError> {
        if self.reflink().is_some() {
            return Err(ShowPartitionsError::Reflink);
        }
        let found = match partitions::read(self, self.sector()?) {
            Err(PartitionTableError::NoTable)
                if matches!(*self.described_base(), BaseDescription::Blank(_)) =>
            {
                Vec::new()
            }
            Err(PartitionTableError::NoTable) => return Err(ShowPartitionsError::NoTable),
            Err(PartitionTableError::Unreadable(error)) => return Err(error.into()),
            Err(PartitionTableError::Damaged(why)) => {
                return Err(ShowPartitionsError::Damaged(why));
            }
            Ok(found) => found,
        };
        let size = self.size();
        let data = found.into_iter().filter(|one| one.role == PartitionRole::Data);
        let (inside, behind): (Vec<_>, Vec<_>) = data.partition(|one| one.range.start < size);
        let file = |one: &partitions::Partition| {
            Arc::new(PartitionFile::new(&self.uuid, one.number, one.range.clone()))
        };
        let each: Vec<Arc<PartitionFile>> = inside.iter().map(file).collect();
        let mut notes = vec![describe_files(name, &each)];
        notes.extend(inside.iter().filter(|one| one.range.end > size).map(|one| {
            format!("partition {} ends past the end of the disk, and is cut off there", one.number)
        }));
        notes.extend(behind.iter().map(|one| {
            format!("partition {} begins past the end of the disk, and is not shown", one.number)
        }));
        // A second call keeps the existing files.
        let _ =
            self.partition_files.set(PartitionFiles { files: each, read_opens: AtomicU32::new(0) });
        Ok(notes)
    }

    /// Sector size in bytes of a block device at the bottom; `None` for other bottoms.
    fn sector(&self) -> io::Result<Option<u64>> {
        match &*self.described_base() {
            BaseDescription::File { file, .. }
                if file.metadata()?.file_type().is_block_device() =>
            {
                Ok(Some(rustix::fs::ioctl_blksszget(&**file)?.into()))
            }
            BaseDescription::File { .. }
            | BaseDescription::Remote { .. }
            | BaseDescription::Blank(_) => Ok(None),
        }
    }

    /// Recounts `st_blocks` of the partition files.
    pub(super) fn refresh_allocated(&self) -> io::Result<()> {
        self.partition_files().iter().try_for_each(|partition| {
            self.allocated_in(partition.range_in(self), &partition.allocated, Wait::Yes).map(drop)
        })
    }

    /// Every file that shows bytes of `range`: its inode number, and the range in that file.
    pub fn files_showing(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        let parts = self.partition_files().iter().filter_map({
            let range = range.clone();
            move |partition| {
                let shared = intersection(&partition.range, &range)?;
                let start = partition.range.start;
                Some((partition.ino, shared.start - start..shared.end - start))
            }
        });
        std::iter::once((self.ino(), range)).chain(parts)
    }
}

/// Lists the partition files in one line.
fn describe_files(name: &str, files: &[Arc<PartitionFile>]) -> String {
    let one = |partition: &Arc<PartitionFile>| {
        let size = format_size(partition.range.end - partition.range.start);
        format!("{} ({size})", partition.name(name))
    };
    let mut shown: Vec<String> = files.iter().take(MAX_LISTED).map(one).collect();
    if files.len() > MAX_LISTED {
        shown.push(format!("and {} more", files.len() - MAX_LISTED));
    }
    match shown.is_empty() {
        true => "has no partitions yet: those made now are shown at the next mount".to_owned(),
        false => format!("partitions are shown as {}", shown.join(", ")),
    }
}

/// The intersection of two ranges, or `None` if it is empty.
pub(super) fn intersection(one: &Range<u64>, other: &Range<u64>) -> Option<Range<u64>> {
    let both = one.start.max(other.start)..one.end.min(other.end);
    (both.start < both.end).then_some(both)
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{OpenContext, OpenedDisk, open};
    use super::*;
    use crate::config::{DiskSource, DiskSpec};

    #[test]
    fn a_partition_file_name_is_split_as_it_is_formed() {
        assert_eq!(split_name("disk.img.p12"), Some(("disk.img", 12)));
        assert_eq!(split_name("a.p1.p2"), Some(("a.p1", 2)));
        for name in ["disk.img", "disk.p", "disk.p0", "d.p01", "d.p+1", "d.p-1", ".p1", "d.p1x"] {
            assert_eq!(split_name(name), None, "{name}");
        }
        assert_eq!(split_name("d.p4294967296"), None);
        let partition = PartitionFile::new(&Uuid::new_v4(), 7, 0..1);
        assert_eq!(split_name(&partition.name("a.p1")), Some(("a.p1", 7)));
    }

    #[test]
    fn inode_numbers_of_partition_files_are_unique() {
        let mut seen = HashSet::new();
        for uuid in [Uuid::nil(), Uuid::max(), Uuid::new_v4(), Uuid::new_v4()] {
            for number in 1..=200 {
                let ino = PartitionFile::new(&uuid, number, 0..1).ino();
                assert!(PARTITION_INODES.contains(&ino));
                assert_eq!(crate::control::ControlNode::from_ino(ino), None);
                assert!(ino < 1 << 62, "disks begin there");
                assert_eq!(ino, PartitionFile::new(&uuid, number, 0..1).ino());
                seen.insert(ino);
            }
        }
        assert!(seen.len() > 600, "each of a disk has its own");
    }

    #[test]
    fn a_blank_disk_without_a_table_has_no_partition_files_and_says_so() {
        let spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(1 << 20));
        let OpenedDisk { disk, .. } = open(&spec, &OpenContext::unmounted()).unwrap();
        let notes = disk.show_partitions("d").unwrap();
        assert_eq!(notes, ["has no partitions yet: those made now are shown at the next mount"]);
        assert!(disk.partition_files().is_empty());
    }
}
