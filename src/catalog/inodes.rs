//! The files of a mount by inode number: disks, including those without a name, partition files, and
//! snapshots that were looked up.

use std::sync::{Arc, Weak};

use dashmap::{DashMap, DashSet};
use uuid::Uuid;

use super::names::CatalogEntry;
use crate::disk::{Disk, DiskFile};
use crate::overlay::stack::inode_of;

/// The files of a mount by inode number. Each map locks one shard at a time.
#[derive(Default)]
pub(super) struct Inodes {
    /// Disks, including those without a name.
    disks: DashMap<u64, Arc<CatalogEntry>>,
    /// Partition files of those disks.
    partitions: DashMap<u64, DiskFile>,
    /// Snapshot files that were looked up.
    snapshots: DashMap<u64, Weak<Disk>>,
    /// Disks by inode numbers that they had before, which the kernel has yet to forget.
    former: DashMap<u64, Weak<Disk>>,
    /// Inode numbers of disks that have left the mount. Whoever still refers to such a file keeps the
    /// kernel's inode.
    left: DashSet<u64>,
}

impl Inodes {
    /// Whether the inode number of `disk` or of one of its partition files is taken.
    pub(super) fn clashes(&self, disk: &Disk) -> bool {
        let is_taken = |ino| self.partitions.contains_key(&ino);
        self.disks.contains_key(&disk.ino())
            || self.left.contains(&inode_of(&disk.uuid)) && self.has_uuid(&disk.uuid)
            || disk.partition_files().iter().any(|partition| is_taken(partition.ino()))
    }

    /// Returns another disk of the inode number of `disk`: one of the same overlay, copied.
    pub(super) fn twin(&self, disk: &Disk) -> Option<Arc<CatalogEntry>> {
        // It may have another number than its uuid says by now.
        let ino = match self.former.get(&disk.ino()).and_then(|former| former.upgrade()) {
            Some(former) => former.ino(),
            None => disk.ino(),
        };
        let found = self.disks.get(&ino).map(|entry| Arc::clone(&entry));
        found.filter(|entry| !std::ptr::eq(&*entry.disk, disk))
    }

    fn has_uuid(&self, uuid: &Uuid) -> bool {
        self.disks.iter().any(|entry| entry.disk.uuid == *uuid)
    }

    /// Registers a disk, in place of an earlier entry of the same disk.
    pub(super) fn insert(&self, entry: Arc<CatalogEntry>) {
        self.disks.insert(entry.disk.ino(), entry);
    }

    /// Registers the partition files of `disk`.
    pub(super) fn insert_partitions(&self, disk: &Arc<Disk>) {
        for partition in disk.partition_files() {
            let file = DiskFile::partition(Arc::clone(disk), Arc::clone(partition));
            self.partitions.insert(partition.ino(), file);
        }
    }

    /// Registers a snapshot's file, for as long as its disk holds the file.
    pub(super) fn insert_snapshot(&self, file: &Arc<Disk>) {
        if self.snapshots.insert(file.ino(), Arc::downgrade(file)).is_none() {
            self.snapshots.retain(|_, file| file.strong_count() > 0);
        }
    }

    /// Gives `disk` another inode number. The kernel's inode of the old one leads nowhere then.
    pub(super) fn renumber(&self, disk: &Arc<Disk>) {
        let old = disk.ino();
        let found = self.disks.get(&old).map(|entry| Arc::clone(&entry));
        let Some(entry) = found.filter(|entry| Arc::ptr_eq(&entry.disk, disk)) else { return };
        let ino = self.unused();
        self.note_former(old, disk);
        // First, so that the disk is in the map all the time.
        self.disks.insert(ino, entry);
        disk.set_ino(ino);
        self.disks.remove(&old);
    }

    /// Gives `disk`, which is about to be registered, another inode number if a disk of its number was
    /// in the mount before.
    pub(super) fn renumber_returning(&self, disk: &Arc<Disk>) {
        if self.left.contains(&disk.ino()) {
            self.note_former(disk.ino(), disk);
            disk.set_ino(self.unused());
        }
    }

    fn note_former(&self, ino: u64, disk: &Arc<Disk>) {
        self.former.retain(|_, disk| disk.strong_count() > 0);
        self.former.insert(ino, Arc::downgrade(disk));
    }

    /// Returns an inode number that nothing has or had.
    fn unused(&self) -> u64 {
        let is_used = |ino: &u64| self.disks.contains_key(ino) || self.snapshots.contains_key(ino);
        std::iter::repeat_with(|| inode_of(&Uuid::new_v4()))
            .find(|ino| !is_used(ino))
            .unwrap_or_default()
    }

    /// Returns the disk that has or had the inode number `ino`.
    pub(super) fn disk_once_of(&self, ino: u64) -> Option<Arc<Disk>> {
        let file = self.file(ino).filter(|file| !file.is_partition());
        let former = || self.former.get(&ino)?.upgrade();
        file.map(|file| Arc::clone(file.disk())).or_else(former)
    }

    /// Removes a disk and its partition files.
    pub(super) fn remove(&self, disk: &Disk) {
        self.left.insert(inode_of(&disk.uuid));
        self.disks.remove(&disk.ino());
        self.remove_partitions(disk);
    }

    /// Removes a disk that [nobody can reach](Disk::is_orphan) any more, and returns whether it was
    /// one.
    pub(super) fn remove_orphan(&self, disk: &Disk) -> bool {
        // Others reach the disk by inode number only while it is in this map.
        let is_orphan = self.disks.remove_if(&disk.ino(), |_, entry| entry.disk.is_orphan());
        if is_orphan.is_some() {
            self.remove_partitions(disk);
        }
        is_orphan.is_some()
    }

    fn remove_partitions(&self, disk: &Disk) {
        for partition in disk.partition_files() {
            self.partitions.remove(&partition.ino());
        }
    }

    /// Returns the file with inode number `ino`: a disk, a partition file or a snapshot.
    pub(super) fn file(&self, ino: u64) -> Option<DiskFile> {
        let disk = self.disks.get(&ino).map(|entry| Arc::clone(&entry.disk));
        let partition = || self.partitions.get(&ino).map(|file| file.clone());
        let snapshot = || self.snapshots.get(&ino)?.upgrade().map(DiskFile::from);
        disk.map(|disk| DiskFile::found_by(ino, disk)).or_else(partition).or_else(snapshot)
    }

    /// Returns every disk, including those without a name.
    pub(super) fn disks(&self) -> Vec<Arc<Disk>> {
        self.disks.iter().map(|entry| Arc::clone(&entry.disk)).collect()
    }
}
