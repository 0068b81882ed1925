//! A file of the mount as a view of a disk: all of it, or the range of a partition.
//!
//! The view translates offsets and keeps requests inside its range; the disk does the work.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::base_description::grain_at;
use super::partition::{PartitionFile, intersection};
use super::{Attributes, Disk, FallocateMode, HandleAccess, SizeMode, Whence};
use crate::host::os_error;
use crate::layer::Wait;

/// A file of the mount: a whole disk or one of its partitions.
///
/// Offsets and sizes are in bytes of the file unless said otherwise.
#[derive(Clone)]
pub struct DiskFile {
    disk: Arc<Disk>,
    /// The inode number by which it was found; the disk may have another one by now.
    ino: u64,
    partition: Option<Arc<PartitionFile>>,
}

impl From<Arc<Disk>> for DiskFile {
    fn from(disk: Arc<Disk>) -> Self {
        Self { ino: disk.ino(), disk, partition: None }
    }
}

impl DiskFile {
    /// The file of a partition of `disk`.
    #[must_use]
    pub fn partition(disk: Arc<Disk>, partition: Arc<PartitionFile>) -> Self {
        Self { ino: partition.ino, disk, partition: Some(partition) }
    }

    /// The file of the whole `disk`, which was found by the inode number `ino`.
    #[must_use]
    pub fn found_by(ino: u64, disk: Arc<Disk>) -> Self {
        Self { disk, ino, partition: None }
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
        self.ino
    }

    /// The range of the disk that the file shows, unbounded for a whole disk, which may grow.
    fn disk_range(&self) -> Range<u64> {
        self.partition.as_ref().map_or(0..u64::MAX, |partition| partition.range_in(&self.disk))
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
    /// The errors of [`Disk::open_handle`]; `ESTALE` when the disk has another inode number by now.
    pub fn open_handle(&self, access: HandleAccess) -> io::Result<()> {
        self.disk.open_handle(access)?;
        // Once it is counted, the number stays.
        if !self.is_partition() && self.ino != self.disk.ino() {
            self.disk.release_handle(access);
            return Err(os_error(libc::ESTALE));
        }
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
            Some(partition) => Some(&partition.read_opens),
            None => self.disk.partition_files.get().map(|files| &files.read_opens),
        }
    }

    /// Whether the kernel may hold pages of `range` (bytes of the disk) for another file. Valid
    /// only after a change.
    #[must_use]
    pub fn is_cached_elsewhere(&self, range: &Range<u64>) -> bool {
        let Some(files) = self.disk.partition_files.get().filter(|_| !range.is_empty()) else {
            return false;
        };
        let is_read = |readers: &AtomicU32| readers.load(Ordering::SeqCst) > 0;
        let own = self.partition.as_ref().map(|partition| partition.ino);
        let mut others = files.files.iter().filter(|other| Some(other.ino) != own);
        self.is_partition() && is_read(&files.read_opens)
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
        offset.checked_add(len).ok_or_else(|| os_error(libc::EFBIG))?;
        let span = self.span(offset, len);
        if span.is_empty() && len > 0 { Err(os_error(libc::ENOSPC)) } else { Ok(span) }
    }

    /// Reads as [`Disk::read`] does.
    ///
    /// # Errors
    /// The errors of [`Disk::read`].
    pub fn read(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<usize> {
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
        size_mode: SizeMode,
        wait: Wait,
    ) -> io::Result<()> {
        let shown = self.disk_range();
        if size_mode == SizeMode::Grow && range.end > shown.end - shown.start {
            return Err(os_error(libc::ENOSPC));
        }
        let size_mode = if self.is_partition() { SizeMode::Keep } else { size_mode };
        let span = self.span(range.start, range.end - range.start);
        if span.is_empty() { Ok(()) } else { self.disk.fallocate(span, change, size_mode, wait) }
    }

    /// Sets the size as [`Disk::set_size`] does. A partition refuses every other size, except that
    /// 0 discards its data in an overlay.
    ///
    /// # Errors
    /// The errors of [`Disk::set_size`]; `EINVAL` for a partition.
    pub fn set_size(&self, size: u64, wait: Wait) -> io::Result<()> {
        if !self.is_partition() {
            return self.disk.set_size_by(self.ino, size, wait);
        }
        let shown = self.disk_range();
        let is_overlay = self.disk.overlay().is_some();
        match size {
            _ if size == shown.end - shown.start => Ok(()),
            0 if is_overlay => {
                self.disk.fallocate(shown, FallocateMode::Punch, SizeMode::Keep, wait)
            }
            _ => Err(os_error(libc::EINVAL)),
        }
    }

    /// Seeks as [`Disk::seek`] does.
    ///
    /// # Errors
    /// The errors of [`Disk::seek`].
    pub fn seek(&self, offset: u64, whence: Whence, wait: Wait) -> io::Result<u64> {
        let Range { start, end } = self.disk_range();
        let first = start.saturating_add(offset).min(end);
        Ok(self.disk.seek_in(first..end, whence, wait)?.saturating_sub(start))
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
        let Some(partition) = &self.partition else { return self.disk.attributes(wait) };
        let held = partition.range_in(&self.disk);
        let allocated = self.disk.allocated_in(held.clone(), &partition.allocated, wait)?;
        let blksize = grain_at(held.start, self.disk.blksize());
        let nlink = self.disk.references.nlink();
        Ok(self.disk.attrs.stat(held.end - held.start, allocated, blksize, nlink))
    }
}

#[cfg(test)]
mod tests {
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
}
