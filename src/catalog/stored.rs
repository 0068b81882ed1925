//! Disks of the store: created, cloned, kept, renamed and unlinked through the mount.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::Catalog;
use super::names::{CatalogEntry, DiskOrigin, check_name, find_clash};
use crate::disk::{Disk, DiskOwner, OpenContext, OpenedDisk};
use crate::host::os_error;
use crate::name::CONTROL_DIR;
use crate::store::{NameChangeError, Store, StoreError};

/// Effect of rename(2) on a disk that already has the new name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// Replace the disk.
    Replace,
    /// Fail with `EEXIST` (`RENAME_NOREPLACE`).
    NoReplace,
}

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
            self.inodes.insert(stored);
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
        store.remove_name(name).map_err(|failed| latch_if_torn(failed, [&entry]))?;
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
        store
            .rename(from, to)
            .map_err(|failed| latch_if_torn(failed, [&entry].into_iter().chain(&replaced)))?;
        let mut names = self.names.write();
        let clashes = || names.contains_key(to) || find_clash(&names, to, &entry.disk).is_some();
        if replaced.is_none() && clashes() {
            // `add` took the name meanwhile.
            drop(names);
            if let Err(failed) = store.rename(to, from) {
                // The store has the new name, durably or not, and the mount has the old one.
                latch_if_torn(NameChangeError { is_torn: true, ..failed }, [&entry]);
            }
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
}
