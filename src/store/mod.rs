//! The store, the directory given with `--store`: disks that are created, renamed and removed
//! through the mount.
//!
//! ```text
//!   STORE/store                            marks the directory as a store; holds the version
//!   STORE/names/NAME -> ../disks/UUID      the names in the mount; one rename(2) renames a disk
//!   STORE/disks/UUID/stack                 the list of the disk's layers
//!   STORE/layers/UUID/{data,log}           the layers
//! ```
//!
//! A disk exists while a name links to it. Its files are created before the name and removed after
//! the name, each step durable before the next. A change of a name that could not be made durable
//! is taken back. Files that a crash leaves without a name are
//! removed at the next mount.
//!
//! Names are changed one after another: the catalog of the mount, which shows the same names, sees to
//! that.

mod dirs;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::AtFlags;
use uuid::Uuid;

pub(crate) use self::dirs::{Leftovers, StoreDirs};
use crate::config::DiskSpec;
use crate::disk::{self, Disk, DiskOwner, LayerUsers, OpenContext, OpenError, OpenedDisk};
use crate::host::os_error;
use crate::name;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::OverlayPath;
use crate::trust::TrustError;

/// A store, locked by this process.
pub struct Store {
    dirs: Arc<StoreDirs>,
    /// The sealed layers that disks of the store share.
    layer_cache: Arc<LayerCache>,
}

/// The reason why a store cannot be used; each displays as one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call on the host failed.
    #[error("store '{}': {what}: {error}", dir.display())]
    Io {
        /// Directory of the store.
        dir: PathBuf,
        /// The action that failed.
        what: &'static str,
        /// The host's error.
        error: io::Error,
    },
    /// Another mount uses the store.
    #[error("store '{}' is in use by another cowslip mount: unmount that first", .0.display())]
    InUse(PathBuf),
    /// The directory is no store, and not empty.
    #[error("'{}' is no store and not empty: name an empty or a new directory", .0.display())]
    NotAStore(PathBuf),
    /// Another user could have written to the directory.
    #[error("store '{}' {error}", dir.display())]
    Untrusted {
        /// Directory of the store.
        dir: PathBuf,
        /// The reason for the distrust.
        error: TrustError,
    },
    /// The store has the format of another version.
    #[error("store '{}' has format version {version}: use a newer cowslip", dir.display())]
    Version {
        /// Directory of the store.
        dir: PathBuf,
        /// Format version of the store.
        version: u32,
    },
    /// A disk of the store cannot be used.
    #[error("disk '{name}' of the store: {error}")]
    Disk {
        /// Name of the disk.
        name: String,
        /// The reason why the disk cannot be used.
        error: OpenError,
    },
}

/// What becomes of a disk that already has the new name of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenameMode {
    /// It is replaced.
    Replace,
    /// It stays, and the rename fails with `EEXIST` (`RENAME_NOREPLACE`).
    NoReplace,
}

/// A name that was not given, removed or changed.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct NameChangeError {
    /// The host's error.
    pub error: io::Error,
    /// Whether the names on disk may be the old or the new ones, so that no sync of the disks
    /// concerned may be acknowledged any more.
    pub is_torn: bool,
}

impl<E: Into<io::Error>> From<E> for NameChangeError {
    fn from(error: E) -> Self {
        Self { error: error.into(), is_torn: false }
    }
}

impl StoreError {
    /// Returns the host's errno behind this error, if there is one.
    #[must_use]
    pub fn os_error(&self) -> Option<i32> {
        match self {
            Self::Io { error, .. } => error.raw_os_error(),
            Self::Disk { error, .. } => error.os_error(),
            Self::InUse(_) | Self::NotAStore(_) | Self::Untrusted { .. } | Self::Version { .. } => {
                None
            }
        }
    }
}

impl Store {
    /// Opens the store at `dir`, and creates one if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when the directory cannot be used as a store.
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let dirs = Arc::new(StoreDirs::open_or_create(dir)?);
        let store = Self { dirs, layer_cache: Arc::default() };
        store
            .remove_leftovers()
            .map_err(|error| store.io_error("sweeping what has no name", error))?;
        Ok(store)
    }

    fn io_error(&self, what: &'static str, error: io::Error) -> StoreError {
        StoreError::Io { dir: self.dir().to_owned(), what, error }
    }

    /// Returns the store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dirs.path()
    }

    fn disk_dir(&self, uuid: &Uuid) -> PathBuf {
        self.dir().join("disks").join(uuid.to_string())
    }

    /// Removes disks without a name and layers without a disk, which a crash left behind. Foreign
    /// files are left alone.
    fn remove_leftovers(&self) -> io::Result<()> {
        let Leftovers { disks, layers, foreign, .. } = self.dirs.leftovers()?;
        let dir = self.dir().display();
        for name in foreign {
            log::warn!("store '{dir}': '{name}' is not cowslip's: it is left alone");
        }
        let disks = disks.iter().map(|name| self.dirs.remove_disk(name));
        let layers = layers.into_iter().map(|uuid| self.dirs.remove_layer(uuid));
        for error in disks.chain(layers).filter_map(Result::err) {
            match error.kind() {
                io::ErrorKind::Other | io::ErrorKind::ReadOnlyFilesystem => {
                    log::warn!("store '{dir}': {error}");
                }
                _ => return Err(error),
            }
        }
        Ok(())
    }

    fn with_overlay_path<T>(&self, uuid: &Uuid, use_it: impl FnOnce(OverlayPath<'_>) -> T) -> T {
        let (dir, layers) = (self.disk_dir(uuid), self.dir().join("layers"));
        use_it(OverlayPath { dir: &dir, layers: Some(&layers) })
    }

    /// Opens every disk, one after another, and passes each to `each`.
    ///
    /// # Errors
    /// A line for the user, about the first disk that cannot be opened; or the error that `each`
    /// returned.
    pub fn open_disks(
        &self,
        context: &OpenContext<'_>,
        mut each: impl FnMut(&str, OpenedDisk) -> Result<(), String>,
    ) -> Result<(), String> {
        let listed = self.dirs.named_disks();
        let listed =
            listed.map_err(|error| self.io_error("reading its names", error).to_string())?;
        let shared = shared_layers(&self.dirs);
        if let Err(error) = &shared {
            log::debug!("store '{}': layers are merged later: {error}", self.dir().display());
        }
        for (name, uuid) in listed {
            let opened = self
                .with_overlay_path(&uuid, |path| {
                    disk::open_stored(&name, path, context, &self.layer_cache)
                })
                .map_err(|error| StoreError::Disk { name: name.clone(), error }.to_string())?;
            let opened = self.with_shared_layers(opened);
            if let Ok(shared) = &shared {
                opened.disk.note_mergeable(shared);
            }
            each(&name, opened)?;
        }
        Ok(())
    }

    /// Attaches the store's shared layers to an opened disk (see [`Disk::share_layers`]).
    fn with_shared_layers(&self, opened: OpenedDisk) -> OpenedDisk {
        self.share_layers(&opened.disk);
        opened
    }

    fn share_layers(&self, disk: &Disk) {
        let dirs = Arc::clone(&self.dirs);
        let others: LayerUsers = Arc::new(move |uuid| layers_used_by_others(&dirs, uuid));
        disk.share_layers(&self.layer_cache, others);
    }

    /// Moves the temporary overlay of `disk`, which is to be called `name`, into the store.
    ///
    /// # Errors
    /// [`StoreError`]
    pub fn keep(&self, disk: &Disk, name: &str) -> Result<(), StoreError> {
        let kept = self.with_overlay_path(&disk.uuid, |path| disk.keep(path));
        kept.map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        self.share_layers(disk);
        Ok(())
    }

    /// Creates an empty disk, which is to be called `name`.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create(&self, name: &str, owner: DiskOwner) -> Result<OpenedDisk, StoreError> {
        self.create_unnamed(name, |uuid, path| disk::create_blank(name, uuid, path, owner))
    }

    /// Creates the disk that `spec` describes, with its overlay in this store, without its name.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create_over(
        &self,
        spec: &DiskSpec,
        context: &OpenContext<'_>,
    ) -> Result<OpenedDisk, StoreError> {
        self.create_unnamed(&spec.name, |_, path| disk::create_stored(spec, path, context))
    }

    /// Creates a disk with the current contents of `from`, another disk of this store. It is to be called
    /// `name`.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn clone_disk(&self, from: &Disk, name: &str) -> Result<OpenedDisk, StoreError> {
        self.create_unnamed(name, |_, path| disk::clone_stored(from, name, path, &self.layer_cache))
    }

    /// Creates a disk by calling `make` with the new UUID and overlay path.
    fn create_unnamed(
        &self,
        name: &str,
        make: impl FnOnce(Uuid, OverlayPath<'_>) -> Result<OpenedDisk, OpenError>,
    ) -> Result<OpenedDisk, StoreError> {
        let uuid = Uuid::new_v4();
        let opened = self
            .with_overlay_path(&uuid, |path| make(uuid, path))
            .map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        Ok(self.with_shared_layers(opened))
    }

    /// Names the disk `uuid`, which has no name yet, durably.
    ///
    /// # Errors
    /// [`NameChangeError`], `EEXIST` when there is such a name; the disk has none unless that says
    /// otherwise.
    pub fn give_name(&self, uuid: &Uuid, name: &str) -> Result<(), NameChangeError> {
        name::check_disk(name)?;
        let (names, target) = (self.dirs.names(), Path::new("../disks").join(uuid.to_string()));
        rustix::fs::symlinkat(target, names, name)?;
        self.sync_names(|| rustix::fs::unlinkat(names, name, AtFlags::empty()))
    }

    /// Removes a disk's name, durably; the disk's files stay until
    /// [`remove_files`](Self::remove_files).
    ///
    /// # Errors
    /// [`NameChangeError`]; the disk has its name unless that says otherwise.
    pub fn remove_name(&self, name: &str) -> Result<(), NameChangeError> {
        name::check(name)?;
        let target = self.dirs.link_target(name)?.ok_or_else(|| os_error(libc::ENOENT))?;
        let names = self.dirs.names();
        rustix::fs::unlinkat(names, name, AtFlags::empty())?;
        self.sync_names(|| rustix::fs::symlinkat(&target, names, name))
    }

    /// Renames a disk, durably, and replaces a disk that has the new name if `over` allows that.
    ///
    /// # Errors
    /// [`NameChangeError`]; the disks have their old names unless that says otherwise. `EEXIST`.
    pub fn rename(&self, from: &str, to: &str, over: RenameMode) -> Result<(), NameChangeError> {
        name::check(from)?;
        name::check_disk(to)?;
        let replaced = self.dirs.link_target(to)?;
        if replaced.is_some() && over == RenameMode::NoReplace {
            return Err(os_error(libc::EEXIST).into());
        }
        let names = self.dirs.names();
        rustix::fs::renameat(names, from, names, to)?;
        self.sync_names(|| {
            rustix::fs::renameat(names, to, names, from)?;
            replaced.iter().try_for_each(|target| rustix::fs::symlinkat(target, names, to))
        })
    }

    /// Makes a change of the names durable or, if that fails, takes it back with `undo`, durably
    /// too: the host may show the change and have it on disk, or not.
    fn sync_names(
        &self,
        undo: impl FnOnce() -> rustix::io::Result<()>,
    ) -> Result<(), NameChangeError> {
        let names = self.dirs.names();
        let Err(error) = names.sync_all() else { return Ok(()) };
        let undone = undo().map_err(io::Error::from).and_then(|()| names.sync_all());
        if let Err(again) = &undone {
            let dir = self.dir().display();
            log::error!("store '{dir}': the old names could not be put back: {again}");
        }
        Err(NameChangeError { error, is_torn: undone.is_err() })
    }

    /// Removes the files of a disk that has no name and that nobody has open. Layers that another
    /// disk needs stay.
    pub fn remove_files(&self, uuid: &Uuid) {
        let _alone = self.layer_cache.lock_changes();
        let layers = self.dirs.stack_of(uuid).map(|stack| stack.layers).unwrap_or_default();
        // Remove the stack first, since it refers to the layers: the next mount removes
        // unreferenced layers.
        let removed = self.dirs.remove_disk(&uuid.to_string()).and_then(|()| {
            let needed = layers_used_by_others(&self.dirs, uuid)?;
            let free = layers.iter().filter(|layer| !needed.contains(&layer.uuid));
            // Try all of them, even after one failed.
            let removed: Vec<_> = free.map(|layer| self.dirs.remove_layer(layer.uuid)).collect();
            removed.into_iter().collect::<io::Result<()>>()
        });
        if let Err(error) = removed {
            log::warn!("files of a removed disk are left in '{}': {error}", self.dir().display());
        }
    }
}

/// Returns the layers used by the disks of a store other than `uuid`.
///
/// # Errors
/// The host's errno, also when a stack cannot be read: the layers it needs are unknown then.
fn layers_used_by_others(dirs: &StoreDirs, uuid: &Uuid) -> io::Result<HashSet<Uuid>> {
    let mut needed = HashSet::new();
    dirs.for_each_stack(|disk, stack| {
        if disk != *uuid {
            needed.extend(stack.layers.into_iter().map(|layer| layer.uuid));
        }
    })?;
    Ok(needed)
}

/// Returns the layers that several disks of a store use.
///
/// # Errors
/// The same as [`layers_used_by_others`].
fn shared_layers(dirs: &StoreDirs) -> io::Result<HashSet<Uuid>> {
    let (mut seen, mut shared) = (HashSet::new(), HashSet::new());
    dirs.for_each_stack(|_, stack| {
        let again = stack.layers.into_iter().map(|layer| layer.uuid);
        shared.extend(again.filter(|layer| !seen.insert(*layer)));
    })?;
    Ok(shared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Wait;

    #[test]
    fn clone_of_a_removed_disk_is_refused() {
        let room = tempfile::tempdir().unwrap();
        let store = Store::open(&room.path().join("st")).unwrap();
        let owner = DiskOwner { uid: 0, gid: 0, perm: 0o600 };
        let from = store.create("a", owner).unwrap().disk;
        from.write(b"kept", 0, Wait::Yes).unwrap();
        // Cloning seals everything in `a`, so the next clone needs no new layer.
        let first = store.clone_disk(&from, "b").unwrap().disk;
        store.give_name(&from.uuid, "a").unwrap();
        store.give_name(&first.uuid, "b").unwrap();
        for (name, disk) in [("a", &from), ("b", &first)] {
            store.remove_name(name).unwrap();
            store.remove_files(&disk.uuid);
        }
        let refused = store.clone_disk(&from, "c").err().unwrap().to_string();
        assert!(refused.contains("removed meanwhile"), "{refused}");
        assert_eq!(store.dirs.named_disks().unwrap(), []);
        for dir in ["disks", "layers"] {
            assert_eq!(std::fs::read_dir(store.dir().join(dir)).unwrap().count(), 0, "{dir}");
        }
    }
}
