//! The catalog of a mount: the names that the mount shows, and the disk behind each inode.
//!
//! Disks given on the command line keep their names; disks of a store can be created, renamed and
//! removed. A removed disk stays, without a name, until its last handle is released and the kernel
//! has forgotten the inode: a process that looked the name up before can still open it, as in any
//! file system.
//!
//! The partition files of a disk have no names of their own: `NAME.pN` is partition N of the disk
//! NAME, and follows when the disk is renamed.

mod inodes;
mod names;
mod stored;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::inodes::Inodes;
pub use self::names::{CatalogEntry, DiskOrigin};
use self::names::{DiskNames, check_name, find_clash, find_partition};
use crate::disk::{Disk, DiskFile, InUse};
use crate::host::os_error;
pub use crate::store::RenameMode;
use crate::store::Store;

/// The names and inodes of a mount.
pub struct Catalog {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    /// Held from the moment when a name is found free or taken until the mount shows the change, and the
    /// store has it durably.
    name_changes: Mutex<()>,
    names: RwLock<DiskNames>,
    inodes: Inodes,
    next_slot: AtomicU64,
    store: Option<Store>,
}

impl Catalog {
    /// Creates an empty catalog for the mount at `mountpoint`.
    #[must_use]
    pub fn new(mountpoint: &Path, store: Option<Store>) -> Self {
        Self {
            mountpoint: mountpoint.to_owned(),
            name_changes: Mutex::default(),
            names: RwLock::default(),
            inodes: Inodes::default(),
            next_slot: AtomicU64::new(1),
            store,
        }
    }

    /// Adds a disk under a name that is not yet taken. A disk of the store has the name there already.
    ///
    /// # Errors
    /// `EEXIST`; `EINVAL` or `ENAMETOOLONG` for a name that no disk can have.
    pub fn add(
        &self,
        name: &str,
        disk: Arc<Disk>,
        origin: DiskOrigin,
    ) -> io::Result<Arc<CatalogEntry>> {
        let _alone = self.name_changes.lock();
        self.check_free(&self.names.read(), name, &disk)?;
        Ok(self.insert(name, disk, origin))
    }

    /// Refuses a disk that cannot be added beside `names`, as [`add`](Self::add) does.
    fn check_free(&self, names: &DiskNames, name: &str, disk: &Disk) -> io::Result<()> {
        check_name(name)?;
        let is_taken = names.contains_key(name)
            || self.inodes.clashes(disk)
            || find_clash(names, name, disk).is_some();
        if is_taken { Err(os_error(libc::EEXIST)) } else { Ok(()) }
    }

    /// Inserts a disk under a name that is free. `name_changes` is locked since that was found.
    fn insert(&self, name: &str, disk: Arc<Disk>, origin: DiskOrigin) -> Arc<CatalogEntry> {
        let mut names = self.names.write();
        self.inodes.insert_partitions(&disk);
        let slot = self.next_slot.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(CatalogEntry { disk, origin, slot });
        names.insert(name.to_owned(), Arc::clone(&entry));
        self.inodes.insert(Arc::clone(&entry));
        entry
    }

    /// Shows the partitions of the disk `name`, which is in the catalog already, and returns notes
    /// for the user. May only be called while nobody can open the disk.
    ///
    /// # Errors
    /// A line for the user, without the name; the disk then has no partition files, or none is
    /// visible.
    pub fn show_partitions(&self, name: &str, entry: &CatalogEntry) -> Result<Vec<String>, String> {
        let notes = entry.disk.show_partitions(name).map_err(|error| error.to_string())?;
        self.check_clash(name, &entry.disk)?;
        self.inodes.insert_partitions(&entry.disk);
        Ok(notes)
    }

    /// Refuses a disk `name` if its name or a name of its partition files clashes with another
    /// disk, or if it is a copy of one.
    ///
    /// # Errors
    /// A line for the user, without the name.
    pub fn check_clash(&self, name: &str, disk: &Disk) -> Result<(), String> {
        let names = self.names.read();
        if let Some(twin) = self.inodes.twin(disk) {
            let other = names.iter().find(|(_, entry)| Arc::ptr_eq(entry, &twin));
            let other = other.map_or("a disk that was removed", |(name, _)| name);
            return Err(format!(
                "its overlay is a copy of that of '{other}', and a mount shows one of them: use another mount"
            ));
        }
        find_clash(&names, name, disk).map_or(Ok(()), Err)
    }

    /// Returns the partition file called `name`.
    #[must_use]
    pub fn partition_named(&self, name: &str) -> Option<DiskFile> {
        let (disk, partition) = find_partition(&self.names.read(), name)?;
        Some(DiskFile::partition(disk, partition))
    }

    /// Returns the disk called `name`.
    #[must_use]
    pub fn named(&self, name: &str) -> Option<Arc<CatalogEntry>> {
        self.names.read().get(name).cloned()
    }

    /// Returns the file called `name`: a disk or a partition file.
    #[must_use]
    pub fn file_named(&self, name: &str) -> Option<DiskFile> {
        let disk = self.named(name).map(|entry| DiskFile::from(Arc::clone(&entry.disk)));
        disk.or_else(|| self.partition_named(name))
    }

    /// Looks `name` up for the kernel, like [`file_named`](Self::file_named), and counts the lookup
    /// of a disk: the disk stays, even without its name, until the kernel has
    /// [forgotten](Disk::forget) the inode.
    #[must_use]
    pub fn look_up(&self, name: &str) -> Option<DiskFile> {
        // Count under the lock: a thread that removes the name must see this lookup.
        let names = self.names.read();
        let disk = names.get(name).map(|entry| DiskFile::from(Arc::clone(&entry.disk)));
        let partition =
            || find_partition(&names, name).map(|(disk, part)| DiskFile::partition(disk, part));
        // Partition files are not counted: the kernel is not told to forget them when their disk
        // goes.
        disk.inspect(|file| file.disk().add_lookup()).or_else(partition)
    }

    /// Returns the file with inode number `ino`: a disk, a partition file or a snapshot.
    #[must_use]
    pub fn file_by_ino(&self, ino: u64) -> Option<DiskFile> {
        self.inodes.file(ino)
    }

    /// Returns the disk or the snapshot that has the inode number `ino`, or had it, for the kernel to
    /// forget.
    #[must_use]
    pub fn disk_once_of(&self, ino: u64) -> Option<Arc<Disk>> {
        self.inodes.disk_once_of(ino)
    }

    /// Gives a disk another inode number: the kernel forgets what it knows of the file under the old
    /// one, which leads nowhere from now on. Nobody may have the disk open. Returns the old number.
    pub fn renumber(&self, disk: &Arc<Disk>) -> u64 {
        // A lookup by name finds the old number or the new one.
        let _names = self.names.write();
        let old = disk.ino();
        self.inodes.renumber(disk);
        old
    }

    /// Gives a disk that is about to be added another inode number if it was in the mount before: the
    /// kernel may still have the inode, with a size that is not the disk's any more.
    pub fn renumber_returning(&self, disk: &Arc<Disk>) {
        self.inodes.renumber_returning(disk);
    }

    /// Registers a snapshot's file by its inode number, for as long as the disk holds the file.
    pub fn index_snapshot(&self, file: &Arc<Disk>) {
        self.inodes.insert_snapshot(file);
    }

    /// Returns the name of the disk with this slot, and the disk.
    #[must_use]
    pub fn disk_by_slot(&self, slot: u64) -> Option<(String, Arc<CatalogEntry>)> {
        let names = self.names.read();
        let (name, entry) = names.iter().find(|(_, entry)| entry.slot == slot)?;
        Some((name.clone(), Arc::clone(entry)))
    }

    /// Returns every name with its disk, sorted by name.
    #[must_use]
    pub fn list(&self) -> Vec<(String, Arc<CatalogEntry>)> {
        let names = self.names.read();
        names.iter().map(|(name, entry)| (name.clone(), Arc::clone(entry))).collect()
    }

    /// Returns every disk, including those without a name.
    #[must_use]
    pub fn disks(&self) -> Vec<Arc<Disk>> {
        self.inodes.disks()
    }

    /// Removes a disk that was given on the command line, unless it is in use; `entry` is the
    /// result of [`named`](Self::named). The disk's control files disappear too.
    ///
    /// # Errors
    /// `None` when the name now belongs to another disk; otherwise the users of the disk.
    pub fn remove(&self, name: &str, entry: &Arc<CatalogEntry>) -> Result<(), Option<InUse>> {
        let mut names = self.names.write();
        if !names.get(name).is_some_and(|there| Arc::ptr_eq(there, entry)) {
            return Err(None);
        }
        entry.disk.retire()?;
        names.remove(name);
        self.inodes.remove(&entry.disk);
        Ok(())
    }

    /// Removes a disk that [nobody can reach](Disk::is_orphan) any more, and its files in the
    /// store.
    pub fn dispose(&self, disk: &Arc<Disk>) {
        if self.inodes.remove_orphan(disk)
            && let Some(store) = &self.store
        {
            // The overlay is not closed first: its files are removed.
            store.remove_files(&disk.uuid);
        }
    }
}
