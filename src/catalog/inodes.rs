//! The files of a mount by inode number: disks, including those without a name, partition files, and
//! snapshots that were looked up.

use std::sync::{Arc, Weak};

use dashmap::DashMap;

use super::names::CatalogEntry;
use crate::disk::{Disk, DiskFile};

/// The files of a mount by inode number. Each map locks one shard at a time.
#[derive(Default)]
pub(super) struct Inodes {
    /// Disks, including those without a name.
    disks: DashMap<u64, Arc<CatalogEntry>>,
    /// Partition files of those disks.
    partitions: DashMap<u64, DiskFile>,
    /// Snapshot files that were looked up.
    snapshots: DashMap<u64, Weak<Disk>>,
}

impl Inodes {
    /// Whether the inode number of `disk` or of one of its partition files is taken.
    pub(super) fn clashes(&self, disk: &Disk) -> bool {
        let is_taken = |ino| self.partitions.contains_key(&ino);
        self.disks.contains_key(&disk.ino())
            || disk.partition_files().iter().any(|partition| is_taken(partition.ino()))
    }

    /// Returns another disk of the inode number of `disk`: one of the same overlay, copied.
    pub(super) fn twin(&self, disk: &Disk) -> Option<Arc<CatalogEntry>> {
        let found = self.disks.get(&disk.ino()).map(|entry| Arc::clone(&entry));
        found.filter(|entry| !std::ptr::eq(&*entry.disk, disk))
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

    /// Removes a disk and its partition files.
    pub(super) fn remove(&self, disk: &Disk) {
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
        disk.map(DiskFile::from).or_else(partition).or_else(snapshot)
    }

    /// Returns every disk, including those without a name.
    pub(super) fn disks(&self) -> Vec<Arc<Disk>> {
        self.disks.iter().map(|entry| Arc::clone(&entry.disk)).collect()
    }
}
