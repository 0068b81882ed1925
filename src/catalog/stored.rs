//! Disks of the store: created, cloned, kept, renamed and unlinked through the mount.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::Catalog;
use super::names::{CatalogEntry, DiskOrigin, check_name};
use crate::disk::{Disk, DiskOwner, OpenContext, OpenedDisk};
use crate::host::os_error;
use crate::name::CONTROL_DIR;
use crate::overlay::recover::Recovered;
use crate::store::{NameChangeError, RenameMode, Store, StoreError};

/// Makes the disks of `entries` read-only for good if the store may have lost their names: what
/// they acknowledged from then on might be swept at the next mount. Returns the errno.
fn latch_if_torn<'a>(
    failed: NameChangeError,
    entries: impl IntoIterator<Item = &'a Arc<CatalogEntry>>,
) -> io::Error {
    if failed.is_torn {
        entries.into_iter().for_each(|entry| entry.disk.latch());
    }
    failed.error
}

impl Catalog {
    /// Opens every disk of the store, if there is one, and passes each to `each`.
    ///
    /// # Errors
    /// The same as [`Store::open_disks`].
    pub fn open_stored(
        &self,
        context: &OpenContext<'_>,
        each: impl FnMut(&str, OpenedDisk) -> Result<(), String>,
    ) -> Result<(), String> {
        self.store.as_ref().map_or(Ok(()), |store| store.open_disks(context, each))
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
        Some(self.keep_named(store, name, entry))
    }

    fn keep_named(&self, store: &Store, name: &str, entry: &CatalogEntry) -> Result<(), String> {
        store.keep(&entry.disk, name).map_err(|error| error.to_string())?;
        let _alone = self.name_changes.lock();
        if let Err(failed) = store.give_name(&entry.disk.uuid, name) {
            if failed.is_torn {
                // The name may be lost, and what is acknowledged from now on with it.
                entry.disk.latch();
            } else {
                // It stays usable, and ends with the mount.
                store.remove_files(&entry.disk.uuid);
            }
            return Err(format!("naming it in the store: {failed}"));
        }
        let disk = Arc::clone(&entry.disk);
        let stored = Arc::new(CatalogEntry { disk, origin: DiskOrigin::Stored, slot: entry.slot });
        let mut names = self.names.write();
        if names.get(name).is_none_or(|there| there.slot != entry.slot) {
            return Err("it was removed meanwhile: the store has it all the same".to_owned());
        }
        names.insert(name.to_owned(), Arc::clone(&stored));
        self.inodes.insert(stored);
        Ok(())
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
        let taken = || format!("there is a disk '{to}' already: take another name");
        if self.named(to).is_some() || self.partition_named(to).is_some() {
            return Err(taken());
        }
        let opened = store.clone_disk(&entry.disk, to).map_err(|error| match error {
            StoreError::Disk { error, .. } => error.to_string(),
            error => error.to_string(),
        })?;
        let disk = Arc::new(opened.disk);
        self.add_created(store, to, &disk).map_err(|error| match error.raw_os_error() {
            Some(libc::EEXIST) => taken(),
            _ => format!("naming '{to}' in the store: {error}"),
        })?;
        Ok(disk)
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
        self.add_created(store, name, &disk)
            .inspect_err(|error| log::error!("create '{name}': {error}"))?;
        Ok(disk)
    }

    /// Names a disk that was just created in `store`, there and in the mount; if that fails, closes the
    /// disk and removes its files.
    ///
    /// # Errors
    /// `EEXIST` when another disk took the name meanwhile; the host's errno.
    pub fn add_created(
        &self,
        store: &Store,
        name: &str,
        disk: &Arc<Disk>,
    ) -> io::Result<Arc<CatalogEntry>> {
        let named = self.name_created(store, name, disk);
        named.map_err(|failed| {
            if !failed.is_torn {
                self.discard(disk, Some(store));
            }
            failed.error
        })
    }

    fn name_created(
        &self,
        store: &Store,
        name: &str,
        disk: &Arc<Disk>,
    ) -> Result<Arc<CatalogEntry>, NameChangeError> {
        let _alone = self.name_changes.lock();
        self.check_free(&self.names.read(), name, disk)?;
        store.give_name(&disk.uuid, name)?;
        Ok(self.insert(name, Arc::clone(disk), DiskOrigin::Stored))
    }

    /// Removes a disk that was just created in the store from there and from the mount again.
    ///
    /// # Errors
    /// [`NameChangeError`] when it keeps its name, and its files with that.
    fn withdraw_created(
        &self,
        store: &Store,
        name: &str,
        entry: &Arc<CatalogEntry>,
    ) -> Result<(), NameChangeError> {
        let alone = self.name_changes.lock();
        store.remove_name(name)?;
        let mut names = self.names.write();
        names.remove(name);
        self.inodes.remove(&entry.disk);
        drop((names, alone));
        self.discard(&entry.disk, Some(store));
        Ok(())
    }

    /// Closes a disk that is not in the catalog, and removes what was created for it; with `created_in`
    /// that is the disk itself, which has no name in that store.
    pub fn discard(&self, disk: &Disk, created_in: Option<&Store>) {
        let Some(store) = created_in else { return disk.abandon() };
        if let Err(error) = disk.close(Duration::MAX) {
            log::debug!("{}: {error}", disk.source);
        }
        store.remove_files(&disk.uuid);
    }

    /// Closes all disks of a mount that did not come about, and removes what was created for it.
    pub fn abandon(&self) {
        for (name, entry) in self.list() {
            let is_created =
                entry.origin == DiskOrigin::Stored && entry.disk.recovered() == Recovered::New;
            match self.store.as_ref().filter(|_| is_created) {
                Some(store) => {
                    if let Err(error) = self.withdraw_created(store, &name, &entry) {
                        log::warn!("'{name}' stays in the store: {error}");
                        let _ = entry.disk.close(Duration::MAX);
                    }
                }
                None => entry.disk.abandon(),
            }
        }
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
        let alone = self.name_changes.lock();
        let (store, entry) = self.require_stored("unlink", name)?;
        store.remove_name(name).map_err(|failed| latch_if_torn(failed, [&entry]))?;
        let mut names = self.names.write();
        names.remove(name);
        entry.disk.mark_unlinked();
        drop((names, alone));
        self.dispose(&entry.disk);
        Ok(())
    }

    /// Renames a disk of the store, and its partition files with it.
    ///
    /// # Errors
    /// The errors of [`unlink`](Self::unlink). `EEXIST` when `over` forbids replacing a disk, and
    /// when a partition file would get the name of another disk.
    pub fn rename(&self, from: &str, to: &str, over: RenameMode) -> io::Result<()> {
        let alone = self.name_changes.lock();
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
        // Where the mount shows no such disk, the store may only have what is not cowslip's.
        let over = if replaced.is_some() { over } else { RenameMode::NoReplace };
        store
            .rename(from, to, over)
            .map_err(|failed| latch_if_torn(failed, [&entry].into_iter().chain(&replaced)))?;
        let mut names = self.names.write();
        names.remove(from);
        names.insert(to.to_owned(), entry);
        if let Some(replaced) = &replaced {
            replaced.disk.mark_unlinked();
        }
        drop((names, alone));
        if let Some(replaced) = replaced {
            self.dispose(&replaced.disk);
        }
        Ok(())
    }
}
