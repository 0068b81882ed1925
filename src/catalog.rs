//! The catalog of a mount: the names that the mount shows, and the disk behind each inode.
//!
//! Disks given on the command line keep their names; disks of a store can be created, renamed and
//! removed. A removed disk stays, without a name, until its last handle is released and the kernel
//! has forgotten the inode: a process that looked the name up before can still open it, as in any
//! file system.
//!
//! The partition files of a disk have no names of their own: `NAME.pN` is partition N of the disk
//! NAME, and follows when the disk is renamed.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use parking_lot::RwLock;

use crate::disk::{
    Disk, DiskFile, DiskOwner, InUse, OpenContext, OpenedDisk, PartitionFile, split_name,
};
use crate::host::os_error;
use crate::name::{self, CONTROL_DIR};
use crate::store::{Store, StoreError};

/// Origin of a disk, which decides whether its name can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOrigin {
    /// The command line or the TOML file.
    Given,
    /// The store.
    Stored,
}

/// A disk in the catalog.
pub struct CatalogEntry {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Origin of the disk.
    pub origin: DiskOrigin,
    /// A small number that is unique in the mount, for the inode numbers of the disk's control
    /// files.
    pub slot: u64,
}

/// Effect of rename(2) on a disk that already has the new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replace the disk.
    Replace,
    /// Fail with `EEXIST` (`RENAME_NOREPLACE`).
    NoReplace,
}

/// Refuses a `name` that no disk can have.
fn check_name(name: &str) -> io::Result<()> {
    Ok(name::check_disk(name)?)
}

/// The names of a mount's disks.
type DiskNames = BTreeMap<String, Arc<CatalogEntry>>;

/// Finds the partition file called `name`, and its disk.
fn find_partition(names: &DiskNames, name: &str) -> Option<(Arc<Disk>, Arc<PartitionFile>)> {
    let (disk, number) = split_name(name)?;
    let disk = &names.get(disk)?.disk;
    let window = disk.partition_files().iter().find(|window| window.number() == number)?;
    Some((Arc::clone(disk), Arc::clone(window)))
}

/// Returns why `disk` cannot be called `name` beside `names`, in one line without the name: another
/// disk's partition file has it, or a partition file of `disk` would clash or have too long a name.
fn find_clash(names: &DiskNames, name: &str, disk: &Disk) -> Option<String> {
    if let Some((other, window)) = find_partition(names, name)
        && other.uuid != disk.uuid
    {
        let number = window.number();
        return Some(format!(
            "that is the name of partition {number} of another disk: give one another NAME="
        ));
    }
    disk.partition_files().iter().find_map(|window| {
        let (part, number) = (window.name(name), window.number());
        if name::check(&part).is_err() {
            return Some(format!(
                "partition {number} would have too long a name: give the disk a shorter NAME="
            ));
        }
        names.get(&part).filter(|other| other.disk.uuid != disk.uuid)?;
        Some(format!(
            "partition {number} is shown as '{part}', and so is another disk: give one another NAME="
        ))
    })
}

/// The names and inodes of a mount.
pub struct Catalog {
    /// The mountpoint.
    pub mountpoint: PathBuf,
    names: RwLock<DiskNames>,
    /// Disks by inode number, including those without a name.
    inodes: DashMap<u64, Arc<CatalogEntry>>,
    /// Partition files of those disks, by inode number.
    partitions: DashMap<u64, DiskFile>,
    /// Snapshot files that were looked up, by inode number.
    snapshots: DashMap<u64, Weak<Disk>>,
    next_slot: AtomicU64,
    store: Option<Store>,
}

impl Catalog {
    /// Creates an empty catalog for the mount at `mountpoint`.
    #[must_use]
    pub fn new(mountpoint: &Path, store: Option<Store>) -> Self {
        Self {
            mountpoint: mountpoint.to_owned(),
            names: RwLock::default(),
            inodes: DashMap::new(),
            partitions: DashMap::new(),
            snapshots: DashMap::new(),
            next_slot: AtomicU64::new(1),
            store,
        }
    }

    /// Opens every disk of the store, if there is one, and passes each to `each`.
    ///
    /// # Errors
    /// The same as [`Store::open_disks`].
    pub fn open_stored(
        &self,
        setting: &OpenContext<'_>,
        each: impl FnMut(&str, OpenedDisk) -> Result<(), String>,
    ) -> Result<(), String> {
        self.store.as_ref().map_or(Ok(()), |store| store.open_disks(setting, each))
    }

    /// Returns the store if `dir` is its directory, so that an overlay there becomes a disk of the
    /// store.
    #[must_use]
    pub fn store_at(&self, dir: &Path) -> Option<&Store> {
        let same = |store: &&Store| {
            let real = |path: &Path| path.canonicalize().ok();
            real(dir).is_some_and(|dir| Some(dir) == real(store.dir()))
        };
        self.store.as_ref().filter(same)
    }

    /// Moves the disk `name`, whose overlay is temporary, into the store at `dir`. Returns `None`
    /// when `dir` is no store of this mount.
    ///
    /// # Errors
    /// A line for the user.
    pub fn keep_in_store(
        &self,
        name: &str,
        entry: &CatalogEntry,
        dir: &Path,
    ) -> Option<Result<(), String>> {
        let store = self.store_at(dir)?;
        let kept = store.keep(&entry.disk, name).map_err(|error| error.to_string());
        if kept.is_ok() {
            let disk = Arc::clone(&entry.disk);
            let stored =
                Arc::new(CatalogEntry { disk, origin: DiskOrigin::Stored, slot: entry.slot });
            let mut names = self.names.write();
            if names.get(name).is_none_or(|there| there.slot != entry.slot) {
                return Some(Err(
                    "it was removed meanwhile: the store has it all the same".to_owned()
                ));
            }
            names.insert(name.to_owned(), Arc::clone(&stored));
            self.inodes.insert(stored.disk.ino(), stored);
        }
        Some(kept)
    }

    /// Creates the disk `to` with the current contents of `entry`, a disk of the store.
    ///
    /// # Errors
    /// A line for the user; nothing is left behind then.
    pub fn clone_disk(&self, entry: &CatalogEntry, to: &str) -> Result<Arc<Disk>, String> {
        let Some(store) = &self.store else {
            return Err("the mount has no store: mount with --store DIR, and the disk with \
                        overlay=DIR, to clone it"
                .to_owned());
        };
        if entry.origin != DiskOrigin::Stored {
            let dir = store.dir().display();
            return Err(match entry.disk.overlay_dir() {
                None if entry.disk.overlay().is_some() => {
                    format!(
                        "its changes are temporary: 'cowslip keep FILE {dir}' makes it a disk of the store first"
                    )
                }
                Some(own) => format!(
                    "its overlay '{}' lies outside the store '{dir}': make a true copy with cp, or mount it with overlay={dir} from the start",
                    own.display()
                ),
                None => "it has no overlay: only copy-on-write disks have clones".to_owned(),
            });
        }
        check_name(to).map_err(|_| format!("'{to}' cannot be the name of a disk: take another"))?;
        if self.named(to).is_some() || self.partition_named(to).is_some() {
            return Err(format!("there is a disk '{to}' already: take another name"));
        }
        let opened = store.clone_disk(&entry.disk, to).map_err(|error| match error {
            StoreError::Disk { error, .. } => error.to_string(),
            error => error.to_string(),
        })?;
        let disk = Arc::new(opened.disk);
        self.add_stored(store, to, &disk).map_err(|error| error.to_string())?;
        Ok(disk)
    }

    /// Adds a disk under a name that is not yet taken.
    ///
    /// # Errors
    /// `EEXIST`; `EINVAL` or `ENAMETOOLONG` for a name that no disk can have.
    pub fn add(
        &self,
        name: &str,
        disk: Arc<Disk>,
        origin: DiskOrigin,
    ) -> io::Result<Arc<CatalogEntry>> {
        check_name(name)?;
        let mut names = self.names.write();
        if names.contains_key(name)
            || self.inodes.contains_key(&disk.ino())
            || find_clash(&names, name, &disk).is_some()
            || disk
                .partition_files()
                .iter()
                .any(|window| self.partitions.contains_key(&window.ino()))
        {
            return Err(os_error(libc::EEXIST));
        }
        self.index_partitions(&disk);
        let slot = self.next_slot.fetch_add(1, Ordering::Relaxed);
        let entry = Arc::new(CatalogEntry { disk, origin, slot });
        names.insert(name.to_owned(), Arc::clone(&entry));
        self.inodes.insert(entry.disk.ino(), Arc::clone(&entry));
        Ok(entry)
    }

    /// Registers the partition files of `disk` by their inode numbers.
    fn index_partitions(&self, disk: &Arc<Disk>) {
        for window in disk.partition_files() {
            let shown = DiskFile::partition(Arc::clone(disk), Arc::clone(window));
            self.partitions.insert(window.ino(), shown);
        }
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
        self.index_partitions(&entry.disk);
        Ok(notes)
    }

    /// Refuses a disk `name` if its name or a name of its partition files clashes with another
    /// disk.
    ///
    /// # Errors
    /// A line for the user, without the name.
    pub fn check_clash(&self, name: &str, disk: &Disk) -> Result<(), String> {
        find_clash(&self.names.read(), name, disk).map_or(Ok(()), Err)
    }

    /// Returns the partition file called `name`.
    #[must_use]
    pub fn partition_named(&self, name: &str) -> Option<DiskFile> {
        let (disk, window) = find_partition(&self.names.read(), name)?;
        Some(DiskFile::partition(disk, window))
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
        let window =
            || find_partition(&names, name).map(|(disk, part)| DiskFile::partition(disk, part));
        // Partition files are not counted: the kernel is not told to forget them when their disk
        // goes.
        disk.inspect(|shown| shown.disk().add_lookup()).or_else(window)
    }

    /// Returns the file with inode number `ino`: a disk, a partition file or a snapshot.
    #[must_use]
    pub fn file_by_ino(&self, ino: u64) -> Option<DiskFile> {
        let disk = self.inodes.get(&ino).map(|entry| Arc::clone(&entry.disk));
        let window = || self.partitions.get(&ino).map(|shown| shown.clone());
        let snapshot = || self.snapshots.get(&ino)?.upgrade().map(DiskFile::from);
        disk.map(DiskFile::from).or_else(window).or_else(snapshot)
    }

    /// Registers a snapshot's file by its inode number, for as long as the disk holds the file.
    pub fn index_snapshot(&self, file: &Arc<Disk>) {
        if self.snapshots.insert(file.ino(), Arc::downgrade(file)).is_none() {
            self.snapshots.retain(|_, file| file.strong_count() > 0);
        }
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
        self.inodes.iter().map(|entry| Arc::clone(&entry.disk)).collect()
    }

    /// Returns the store's directory, on whose file system new disks are created.
    #[must_use]
    pub fn store_dir(&self) -> Option<&Path> {
        self.store.as_ref().map(Store::dir)
    }

    fn require_store(&self, what: &str, name: &str) -> io::Result<&Store> {
        self.store.as_ref().ok_or_else(|| {
            log::warn!(
                "{what} '{name}' refused: mount with --store DIR to make, rename and remove disks"
            );
            os_error(libc::EPERM)
        })
    }

    /// Creates an empty disk in the store.
    ///
    /// # Errors
    /// `EPERM` without a store; `EEXIST`; `EINVAL` or `ENAMETOOLONG` for a name that no disk can
    /// have; the host's errno.
    pub fn create(&self, name: &str, owner: DiskOwner) -> io::Result<Arc<Disk>> {
        if self.file_named(name).is_some() || name == CONTROL_DIR {
            return Err(os_error(libc::EEXIST));
        }
        check_name(name)?;
        let store = self.require_store("create", name)?;
        let opened = store.create(name, owner).map_err(|error| {
            log::error!("create '{name}': {error}");
            os_error(error.os_error().unwrap_or(libc::EIO))
        })?;
        let disk = Arc::new(opened.disk);
        self.add_stored(store, name, &disk)?;
        Ok(disk)
    }

    /// Adds a disk that was just created in `store`; if that fails, removes the disk from the store
    /// too.
    ///
    /// # Errors
    /// `EEXIST` when another disk took the name meanwhile.
    pub fn add_stored(
        &self,
        store: &Store,
        name: &str,
        disk: &Arc<Disk>,
    ) -> io::Result<Arc<CatalogEntry>> {
        self.add(name, Arc::clone(disk), DiskOrigin::Stored).inspect_err(|_| {
            if let Err(error) = store.remove_name(name) {
                log::warn!("'{name}' stays in the store: {error}");
                return;
            }
            store.remove_files(&disk.uuid);
        })
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
        self.inodes.remove(&entry.disk.ino());
        for window in entry.disk.partition_files() {
            self.partitions.remove(&window.ino());
        }
        Ok(())
    }

    fn require_stored(&self, what: &str, name: &str) -> io::Result<(&Store, Arc<CatalogEntry>)> {
        if self.partition_named(name).is_some() {
            log::warn!("{what} '{name}' refused: it is a partition of another disk");
            return Err(os_error(libc::EPERM));
        }
        let entry = self.named(name).ok_or_else(|| os_error(libc::ENOENT))?;
        let store = self.require_store(what, name)?;
        if entry.origin == DiskOrigin::Given {
            log::warn!("{what} '{name}' refused: it is not a disk of the store");
            return Err(os_error(libc::EPERM));
        }
        Ok((store, entry))
    }

    /// Removes a disk's name; the disk itself is removed with its last handle.
    ///
    /// # Errors
    /// `ENOENT`; `EPERM` for a disk that is not in the store and for a partition file; the host's
    /// errno.
    pub fn unlink(&self, name: &str) -> io::Result<()> {
        let (store, entry) = self.require_stored("unlink", name)?;
        store.remove_name(name)?;
        let mut names = self.names.write();
        names.remove(name);
        entry.disk.mark_unlinked();
        drop(names);
        self.dispose(&entry.disk);
        Ok(())
    }

    /// Renames a disk of the store, and its partition files with it.
    ///
    /// # Errors
    /// The errors of [`unlink`](Self::unlink). `EEXIST` when `over` forbids replacing a disk, and
    /// when a partition file would get the name of another disk.
    pub fn rename(&self, from: &str, to: &str, over: RenameMode) -> io::Result<()> {
        let (store, entry) = self.require_stored("rename", from)?;
        check_name(to)?;
        if from == to {
            return Ok(());
        }
        let replaced = match self.named(to) {
            Some(_) if over == RenameMode::NoReplace => return Err(os_error(libc::EEXIST)),
            Some(_) => Some(self.require_stored("rename over", to)?.1),
            None if self.partition_named(to).is_some() => return Err(os_error(libc::EPERM)),
            None => None,
        };
        if let Err(line) = self.check_clash(to, &entry.disk) {
            log::warn!("rename '{from}' to '{to}' refused: {line}");
            return Err(os_error(libc::EEXIST));
        }
        store.rename(from, to)?;
        let mut names = self.names.write();
        let clashes = || names.contains_key(to) || find_clash(&names, to, &entry.disk).is_some();
        if replaced.is_none() && clashes() {
            // `add` took the name meanwhile.
            drop(names);
            store.rename(to, from)?;
            return Err(os_error(libc::EEXIST));
        }
        names.remove(from);
        names.insert(to.to_owned(), entry);
        if let Some(replaced) = &replaced {
            replaced.disk.mark_unlinked();
        }
        drop(names);
        if let Some(replaced) = replaced {
            self.dispose(&replaced.disk);
        }
        Ok(())
    }

    /// Removes a disk that [nobody can reach](Disk::is_orphan) any more, and its files in the
    /// store.
    pub fn dispose(&self, disk: &Arc<Disk>) {
        // Others reach the disk by inode number only while it is in this map.
        if self.inodes.remove_if(&disk.ino(), |_, entry| entry.disk.is_orphan()).is_none() {
            return;
        }
        for window in disk.partition_files() {
            self.partitions.remove(&window.ino());
        }
        if let Some(store) = &self.store {
            // The overlay is not closed first: its files are removed.
            store.remove_files(&disk.uuid);
        }
    }
}
