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
use std::sync::atomic::{AtomicU32, Ordering};

use uuid::Uuid;

use super::allocated::AllocatedCache;
use super::bottom::{Bottom, grain_at};
use super::{Attributes, Disk, FallocateMode, HandleAccess, SizeMode, Whence};
use crate::base::partitions::{self, PartitionRole, TableError, TableSource};
use crate::config::format_size;
use crate::host::os_error;
use crate::layer::Wait;

/// The most partitions listed in the note about them, which has to stay one line.
const MAX_LISTED: usize = 16;

/// Inode numbers of partition files: below those of disks, above those of control files.
const PARTITION_INODES: Range<u64> = 1 << 61..1 << 62;

/// The reason why the partitions of a disk cannot be shown; one line, to follow the disk's name.
#[derive(Debug, thiserror::Error)]
pub enum PartitionsError {
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
    range: Range<u64>,
    ino: u64,
    /// Number of open handles that can read, and so map the file: the kernel may hold pages.
    read_opens: AtomicU32,
    allocated: AllocatedCache,
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
    fn range_in(&self, disk: &Disk) -> Range<u64> {
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
    files: Vec<Arc<PartitionFile>>,
    /// Number of open handles of the whole disk that can read.
    read_opens: AtomicU32,
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
        self.partition_files.get().map_or(&[], |windows| &windows.files)
    }

    /// Reads the partition table through the disk and creates a file for each partition that can
    /// hold data. To be called once, before the disk `name` can be opened. Returns notes for the
    /// user. A blank disk may get its table later; a note says so.
    ///
    /// # Errors
    /// [`PartitionsError`]; the disk has no partition files then.
    pub fn show_partitions(&self, name: &str) -> Result<Vec<String>, PartitionsError> {
        if self.reflink().is_some() {
            return Err(PartitionsError::Reflink);
        }
        let found = match partitions::read(self, self.sector()?) {
            Err(TableError::NoTable) if matches!(*self.bottom(), Bottom::Blank(_)) => Vec::new(),
            Err(TableError::NoTable) => return Err(PartitionsError::NoTable),
            Err(TableError::Unreadable(error)) => return Err(error.into()),
            Err(TableError::Damaged(why)) => return Err(PartitionsError::Damaged(why)),
            Ok(found) => found,
        };
        let size = self.size();
        let data = found.into_iter().filter(|one| one.role == PartitionRole::Data);
        let (inside, behind): (Vec<_>, Vec<_>) = data.partition(|one| one.range.start < size);
        let window = |one: &partitions::Partition| {
            Arc::new(PartitionFile::new(&self.uuid, one.number, one.range.clone()))
        };
        let each: Vec<Arc<PartitionFile>> = inside.iter().map(window).collect();
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
        match &*self.bottom() {
            Bottom::File { file, .. } if file.metadata()?.file_type().is_block_device() => {
                Ok(Some(rustix::fs::ioctl_blksszget(&**file)?.into()))
            }
            Bottom::File { .. } | Bottom::Blank(_) => Ok(None),
        }
    }

    /// Recounts `st_blocks` of the partition files.
    pub(super) fn refresh_allocated(&self) -> io::Result<()> {
        self.partition_files().iter().try_for_each(|window| {
            self.allocated_in(window.range_in(self), &window.allocated, Wait::Yes).map(drop)
        })
    }

    /// Every file that shows bytes of `range`: its inode number, and the range in that file.
    pub fn files_showing(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        let parts = self.partition_files().iter().filter_map({
            let range = range.clone();
            move |window| {
                let shared = intersection(&window.range, &range)?;
                let start = window.range.start;
                Some((window.ino, shared.start - start..shared.end - start))
            }
        });
        std::iter::once((self.ino(), range)).chain(parts)
    }
}

/// Lists the partition files in one line.
fn describe_files(name: &str, windows: &[Arc<PartitionFile>]) -> String {
    let one = |window: &Arc<PartitionFile>| {
        let size = format_size(window.range.end - window.range.start);
        format!("{} ({size})", window.name(name))
    };
    let mut shown: Vec<String> = windows.iter().take(MAX_LISTED).map(one).collect();
    if windows.len() > MAX_LISTED {
        shown.push(format!("and {} more", windows.len() - MAX_LISTED));
    }
    match shown.is_empty() {
        true => "has no partitions yet: those made now are shown at the next mount".to_owned(),
        false => format!("partitions are shown as {}", shown.join(", ")),
    }
}

/// The intersection of two ranges, or `None` if it is empty.
fn intersection(one: &Range<u64>, other: &Range<u64>) -> Option<Range<u64>> {
    let both = one.start.max(other.start)..one.end.min(other.end);
    (both.start < both.end).then_some(both)
}

/// A file of the mount: a whole disk or one of its partitions.
///
/// Offsets and sizes are in bytes of the file unless said otherwise.
#[derive(Clone)]
pub struct DiskFile {
    disk: Arc<Disk>,
    partition: Option<Arc<PartitionFile>>,
}

impl From<Arc<Disk>> for DiskFile {
    fn from(disk: Arc<Disk>) -> Self {
        Self { disk, partition: None }
    }
}

impl DiskFile {
    /// The file of the partition `window` of `disk`.
    #[must_use]
    pub fn partition(disk: Arc<Disk>, window: Arc<PartitionFile>) -> Self {
        Self { disk, partition: Some(window) }
    }

    /// The disk that holds the bytes.
    #[must_use]
    pub fn disk(&self) -> &Arc<Disk> {
        &self.disk
    }

    /// Whether the file is a partition.
    #[must_use]
    pub fn is_partition(&self) -> bool {
        self.partition.is_some()
    }

    /// The inode number of the file.
    #[must_use]
    pub fn ino(&self) -> u64 {
        self.partition.as_ref().map_or_else(|| self.disk.ino(), |window| window.ino)
    }

    /// The range of the disk that the file shows, unbounded for a whole disk, which may grow.
    fn disk_range(&self) -> Range<u64> {
        self.partition.as_ref().map_or(0..u64::MAX, |window| window.range_in(&self.disk))
    }

    /// Whether truncating the file to 0 only discards its data.
    #[must_use]
    pub fn has_fixed_size(&self) -> bool {
        self.is_partition() || self.disk.has_fixed_size()
    }

    /// Counts a handle as opened. Each successful call is matched by one of
    /// [`release_handle`](Self::release_handle).
    ///
    /// # Errors
    /// The errors of [`Disk::open_handle`].
    pub fn open_handle(&self, access: HandleAccess) -> io::Result<()> {
        self.disk.open_handle(access)?;
        if let Some(readers) = self.read_counter(access) {
            readers.fetch_add(1, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Counts a handle as released.
    pub fn release_handle(&self, access: HandleAccess) {
        if let Some(readers) = self.read_counter(access) {
            readers.fetch_sub(1, Ordering::SeqCst);
        }
        self.disk.release_handle(access);
    }

    /// The counter of handles that can read; `None` for write-only handles and for a disk without
    /// partition files.
    fn read_counter(&self, access: HandleAccess) -> Option<&AtomicU32> {
        if access == HandleAccess::Write {
            return None;
        }
        match &self.partition {
            Some(window) => Some(&window.read_opens),
            None => self.disk.partition_files.get().map(|windows| &windows.read_opens),
        }
    }

    /// Whether the kernel may hold pages of `range` (bytes of the disk) for another file. Valid
    /// only after a change.
    #[must_use]
    pub fn is_cached_elsewhere(&self, range: &Range<u64>) -> bool {
        let Some(windows) = self.disk.partition_files.get().filter(|_| !range.is_empty()) else {
            return false;
        };
        let is_read = |readers: &AtomicU32| readers.load(Ordering::SeqCst) > 0;
        let own = self.partition.as_ref().map(|window| window.ino);
        let mut others = windows.files.iter().filter(|other| Some(other.ino) != own);
        self.is_partition() && is_read(&windows.read_opens)
            || others.any(|other| {
                intersection(&other.range, range).is_some() && is_read(&other.read_opens)
            })
    }

    /// Whether the kernel may hold dirty pages of `range` (bytes of the disk) for another file,
    /// written through a mapping and not seen by this daemon yet.
    #[must_use]
    pub fn is_dirty_elsewhere(&self, range: &Range<u64>) -> bool {
        self.disk.may_be_mapped() && self.is_cached_elsewhere(range)
    }

    /// The range of the disk for up to `len` bytes at `offset`: shorter at the end of a partition,
    /// empty past it.
    #[must_use]
    pub fn span(&self, offset: u64, len: u64) -> Range<u64> {
        let Range { start, end } = self.disk_range();
        let first = start.saturating_add(offset).min(end);
        first..first.saturating_add(len).min(end)
    }

    /// The range of the disk for a write, as [`span`](Self::span) computes it.
    ///
    /// # Errors
    /// `ENOSPC` when the whole range is past the end of a partition, as for a block device; `EFBIG`
    /// past the largest offset.
    pub fn writable_range(&self, offset: u64, len: u64) -> io::Result<Range<u64>> {
        let asked = offset.checked_add(len).ok_or_else(|| os_error(libc::EFBIG))?;
        if !self.is_partition() {
            return Ok(offset..asked);
        }
        let span = self.span(offset, len);
        if span.is_empty() && len > 0 { Err(os_error(libc::ENOSPC)) } else { Ok(span) }
    }

    /// Reads as [`Disk::read`] does.
    ///
    /// # Errors
    /// The errors of [`Disk::read`].
    pub fn read(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
        if !self.is_partition() {
            return self.disk.read(buf, offset, wait);
        }
        let span = self.span(offset, buf.len() as u64);
        let len = usize::try_from(span.end - span.start).unwrap_or(usize::MAX).min(buf.len());
        self.disk.read(&mut buf[..len], span.start, wait)
    }

    /// Changes a range as [`Disk::fallocate`] does; a partition does not grow.
    ///
    /// # Errors
    /// The errors of [`Disk::fallocate`]; `ENOSPC` for a partition that would have to grow.
    pub fn fallocate(
        &self,
        range: Range<u64>,
        change: FallocateMode,
        keep: SizeMode,
        wait: Wait,
    ) -> io::Result<()> {
        if !self.is_partition() {
            return self.disk.fallocate(range, change, keep, wait);
        }
        let bytes = self.disk_range();
        if keep == SizeMode::Grow && range.end > bytes.end - bytes.start {
            return Err(os_error(libc::ENOSPC));
        }
        let span = self.span(range.start, range.end - range.start);
        if span.is_empty() {
            Ok(())
        } else {
            self.disk.fallocate(span, change, SizeMode::Keep, wait)
        }
    }

    /// Sets the size as [`Disk::set_size`] does. A partition refuses every other size, except that
    /// 0 discards its data in an overlay.
    ///
    /// # Errors
    /// The errors of [`Disk::set_size`]; `EINVAL` for a partition.
    pub fn set_size(&self, size: u64, wait: Wait) -> io::Result<()> {
        if !self.is_partition() {
            return self.disk.set_size(size, wait);
        }
        let bytes = self.disk_range();
        let is_overlay = self.disk.overlay().is_some();
        match size {
            _ if size == bytes.end - bytes.start => Ok(()),
            0 if is_overlay => {
                self.disk.fallocate(bytes, FallocateMode::Punch, SizeMode::Keep, wait)
            }
            _ => Err(os_error(libc::EINVAL)),
        }
    }

    /// Seeks as [`Disk::seek`] does.
    ///
    /// # Errors
    /// The errors of [`Disk::seek`].
    pub fn seek(&self, offset: u64, whence: Whence, wait: Wait) -> io::Result<u64> {
        if !self.is_partition() {
            return self.disk.seek(offset, whence, wait);
        }
        let rest = self.span(offset, u64::MAX);
        let start = self.disk_range().start;
        Ok(self.disk.seek_in(rest, whence, wait)?.saturating_sub(start))
    }

    /// Copies up to `len` bytes from offset `from` of `source` to `offset` here. Returns the range
    /// of the disk that was written.
    ///
    /// # Errors
    /// The errors of [`Disk::copy_from`] and [`writable_range`](Self::writable_range); `EINVAL`
    /// when source and target overlap on one disk.
    pub fn copy_from(
        &self,
        source: &Self,
        (from, len): (u64, u64),
        offset: u64,
    ) -> io::Result<Range<u64>> {
        let from = source.span(from, len);
        let to = self.writable_range(offset, from.end - from.start)?;
        let from = from.start..from.start + (to.end - to.start);
        let is_one_disk = Arc::ptr_eq(&self.disk, &source.disk);
        // For a single file the kernel has checked that already.
        if is_one_disk && self.ino() != source.ino() && intersection(&from, &to).is_some() {
            return Err(os_error(libc::EINVAL));
        }
        let copied = self.disk.copy_from(&source.disk, from, to.start)?;
        Ok(to.start..to.start + copied)
    }

    /// Returns the file's attributes; times, owner and mode are the disk's.
    ///
    /// # Errors
    /// The errors of [`Disk::attributes`].
    pub fn attributes(&self, wait: Wait) -> io::Result<Attributes> {
        let Some(window) = &self.partition else { return self.disk.attributes(wait) };
        let held = window.range_in(&self.disk);
        let allocated = self.disk.allocated_in(held.clone(), &window.allocated, wait)?;
        let blksize = grain_at(held.start, self.disk.blksize());
        let nlink = self.disk.references.nlink();
        Ok(self.disk.attrs.stat(held.end - held.start, allocated, blksize, nlink))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::super::{OpenContext, OpenedDisk, open};
    use super::*;
    use crate::base::partitions::testing::put_entry;
    use crate::config::{DiskSource, DiskSpec};

    const SECTOR: u64 = 512;

    /// Creates a blank disk of 1 MiB with a table of `entries`: first sector and sector count of
    /// each partition.
    fn disk(entries: &[(u32, u32)]) -> (Arc<Disk>, Vec<String>) {
        let spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(1 << 20));
        let OpenedDisk { disk, .. } = open(&spec, &OpenContext::unmounted()).unwrap();
        let mut table = vec![0; 512];
        for (index, (start, count)) in entries.iter().enumerate() {
            put_entry(&mut table, 0, index, (0x83, *start, *count));
        }
        disk.write(&table, 0, Wait::Yes).unwrap();
        let notes = disk.show_partitions("d").unwrap();
        (Arc::new(disk), notes)
    }

    fn part(disk: &Arc<Disk>, at: usize) -> DiskFile {
        DiskFile::partition(Arc::clone(disk), Arc::clone(&disk.partition_files()[at]))
    }

    fn errno_of<T: std::fmt::Debug>(result: io::Result<T>) -> i32 {
        result.unwrap_err().raw_os_error().unwrap()
    }

    #[test]
    fn a_partition_file_name_is_split_as_it_is_formed() {
        assert_eq!(split_name("disk.img.p12"), Some(("disk.img", 12)));
        assert_eq!(split_name("a.p1.p2"), Some(("a.p1", 2)));
        for name in ["disk.img", "disk.p", "disk.p0", "d.p01", "d.p+1", "d.p-1", ".p1", "d.p1x"] {
            assert_eq!(split_name(name), None, "{name}");
        }
        assert_eq!(split_name("d.p4294967296"), None);
        let window = PartitionFile::new(&Uuid::new_v4(), 7, 0..1);
        assert_eq!(split_name(&window.name("a.p1")), Some(("a.p1", 7)));
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
    fn a_partition_file_ends_where_its_partition_does() {
        let (disk, notes) = disk(&[(64, 8), (72, 8)]);
        assert_eq!(notes, ["partitions are shown as d.p1 (4 KiB), d.p2 (4 KiB)"]);
        let (one, two) = (part(&disk, 0), part(&disk, 1));
        assert_eq!(one.writable_range(4000, 200).unwrap(), 64 * SECTOR + 4000..72 * SECTOR);
        assert_eq!(errno_of(one.writable_range(4096, 1)), libc::ENOSPC);
        assert_eq!(errno_of(one.writable_range(u64::MAX, 1)), libc::EFBIG);
        assert!(one.writable_range(4096, 0).unwrap().is_empty());
        disk.write(&[7; 8192], 64 * SECTOR, Wait::Yes).unwrap();
        let mut buf = [0; 200];
        assert_eq!(one.read(&mut buf, 4000, Wait::Yes).unwrap(), 96);
        assert_eq!(one.read(&mut buf, 4096, Wait::Yes).unwrap(), 0);
        assert_eq!(one.read(&mut buf, u64::MAX, Wait::Yes).unwrap(), 0);
        // Punched past the end of the partition, the hole leaves the next partition alone.
        one.fallocate(0..8192, FallocateMode::Punch, SizeMode::Keep, Wait::Yes).unwrap();
        assert_eq!(
            errno_of(one.fallocate(0..4097, FallocateMode::Zero, SizeMode::Grow, Wait::Yes)),
            libc::ENOSPC
        );
        assert_eq!(errno_of(one.seek(0, Whence::Data, Wait::Yes)), libc::ENXIO);
        assert_eq!(one.seek(100, Whence::Hole, Wait::Yes).unwrap(), 100);
        assert_eq!(two.seek(0, Whence::Hole, Wait::Yes).unwrap(), 4096);
        assert_eq!(errno_of(two.seek(4096, Whence::Hole, Wait::Yes)), libc::ENXIO);
        assert_eq!(errno_of(two.seek(u64::MAX, Whence::Hole, Wait::Yes)), libc::ENXIO);
        assert_eq!(two.attributes(Wait::Yes).unwrap().allocated, 4096);
        assert_eq!(one.attributes(Wait::Yes).unwrap().allocated, 0);
    }

    #[test]
    fn a_partition_file_keeps_its_size_and_truncation_empties_it() {
        let (disk, _) = disk(&[(64, 8), (72, 8)]);
        disk.write(&[7; 8192], 64 * SECTOR, Wait::Yes).unwrap();
        let one = part(&disk, 0);
        one.set_size(4096, Wait::Yes).unwrap();
        for size in [1, 4095, 4097, 1 << 20] {
            assert_eq!(errno_of(one.set_size(size, Wait::Yes)), libc::EINVAL);
        }
        one.set_size(0, Wait::Yes).unwrap();
        assert_eq!(one.attributes(Wait::Yes).unwrap().size, 4096);
        let mut found = [1; 8192];
        disk.read(&mut found, 64 * SECTOR, Wait::Yes).unwrap();
        assert!(found[..4096] == [0; 4096] && found[4096..] == [7; 4096]);
    }

    #[test]
    fn a_partition_file_is_cut_off_where_the_disk_is() {
        let (disk, notes) = disk(&[(64, 8), (2000, 100), (2048, 9)]);
        assert_eq!(disk.partition_files().len(), 2);
        assert!(notes[1].starts_with("partition 2 ends past the end"), "{notes:?}");
        assert!(notes[2].starts_with("partition 3 begins past the end"), "{notes:?}");
        let (one, two) = (part(&disk, 0), part(&disk, 1));
        assert_eq!(two.attributes(Wait::Yes).unwrap().size, 48 * SECTOR);
        disk.set_size(65 * SECTOR, Wait::Yes).unwrap();
        assert_eq!(one.attributes(Wait::Yes).unwrap().size, SECTOR);
        assert_eq!(two.attributes(Wait::Yes).unwrap().size, 0);
        assert_eq!(errno_of(two.writable_range(0, 1)), libc::ENOSPC);
        assert_eq!(two.read(&mut [0; 9], 0, Wait::Yes).unwrap(), 0);
        disk.set_size(1 << 20, Wait::Yes).unwrap();
        assert_eq!(two.attributes(Wait::Yes).unwrap().size, 48 * SECTOR);
    }

    #[test]
    fn open_handles_tell_which_files_may_have_cached_pages() {
        let (disk, _) = disk(&[(64, 8), (72, 8)]);
        let whole = DiskFile::from(Arc::clone(&disk));
        let (one, two) = (part(&disk, 0), part(&disk, 1));
        let first = 64 * SECTOR..65 * SECTOR;
        let cached = |shown: &DiskFile| shown.is_cached_elsewhere(&first);
        one.open_handle(HandleAccess::Write).unwrap();
        assert!(!cached(&whole) && !cached(&one) && !cached(&two));
        one.open_handle(HandleAccess::Read).unwrap();
        assert!(cached(&whole) && !cached(&one) && cached(&two));
        assert!(!whole.is_cached_elsewhere(&(5..5)), "of no bytes it holds none");
        assert!(!whole.is_dirty_elsewhere(&first));
        assert!(!whole.is_cached_elsewhere(&(72 * SECTOR..80 * SECTOR)));
        one.release_handle(HandleAccess::Read);
        whole.open_handle(HandleAccess::ReadWrite).unwrap();
        assert!(!cached(&whole) && cached(&one) && cached(&two));
        assert!(one.is_dirty_elsewhere(&first));
        assert_eq!(disk.handle_count(), 2);
        whole.release_handle(HandleAccess::ReadWrite);
        one.release_handle(HandleAccess::Write);
        assert_eq!(disk.handle_count(), 0);
        let files: Vec<_> = disk.files_showing(65 * SECTOR..u64::MAX).collect();
        let want = [
            (disk.ino(), 65 * SECTOR..u64::MAX),
            (one.ino(), SECTOR..8 * SECTOR),
            (two.ino(), 0..8 * SECTOR),
        ];
        assert_eq!(files, want);
    }

    #[test]
    fn a_copy_between_overlapping_ranges_of_one_disk_is_refused() {
        let (disk, _) = disk(&[(64, 8), (72, 8)]);
        disk.write(&[7; 4096], 64 * SECTOR, Wait::Yes).unwrap();
        let whole = DiskFile::from(Arc::clone(&disk));
        let (one, two) = (part(&disk, 0), part(&disk, 1));
        assert_eq!(errno_of(one.copy_from(&whole, (64 * SECTOR + 1, 9), 0)), libc::EINVAL);
        assert_eq!(two.copy_from(&one, (0, 1 << 20), 96).unwrap(), 72 * SECTOR + 96..80 * SECTOR);
        assert_eq!(errno_of(two.copy_from(&one, (0, 1), 4096)), libc::ENOSPC);
        assert!(two.copy_from(&one, (4096, 1), 0).unwrap().is_empty());
        let mut found = [1; 4096];
        two.read(&mut found, 0, Wait::Yes).unwrap();
        assert!(found[..96] == [0; 96] && found[96..] == [7; 4000]);
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
