//! The directory behind `--store`: disks that are made, renamed and removed in the mount.
//!
//! ```text
//!   STORE/store                            says that this is a store, and of which version
//!   STORE/names/NAME -> ../disks/UUID      what the mount shows; one rename(2) renames a disk
//!   STORE/disks/UUID/stack                 which layers make it
//!   STORE/layers/UUID/{data,log}           the layers
//! ```
//!
//! A disk exists when a name leads to it. Its files are made before the name and removed after it,
//! each durable before the next; what a crash leaves without a name is swept at the next mount.

mod dirs;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use uuid::Uuid;

pub use self::dirs::{Leftovers, StoreDirs};
use crate::config::DiskSpec;
use crate::disk::{self, Disk, DiskOwner, LayerUsers, OpenContext, OpenError, OpenedDisk};
use crate::name;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::OverlayPath;
use crate::trust::TrustError;

/// A store that this process has to itself.
pub struct Store {
    dirs: Arc<StoreDirs>,
    /// The sealed layers that its disks share.
    layer_cache: Arc<LayerCache>,
}

/// Why a store cannot be used; each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The host said no.
    #[error("store '{}': {what}: {error}", dir.display())]
    Io {
        /// The store.
        dir: PathBuf,
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        error: io::Error,
    },
    /// Another mount has it.
    #[error("store '{}' is in use by another cowslip mount: unmount that first", .0.display())]
    InUse(PathBuf),
    /// It holds other things.
    #[error("'{}' is no store and not empty: name an empty or a new directory", .0.display())]
    NotAStore(PathBuf),
    /// Another user could have made it what it is.
    #[error("store '{}' {error}", dir.display())]
    Untrusted {
        /// The store.
        dir: PathBuf,
        /// Why.
        error: TrustError,
    },
    /// Another version made it.
    #[error("store '{}' has format version {version}: use a newer cowslip", dir.display())]
    Version {
        /// The store.
        dir: PathBuf,
        /// What it says.
        version: u32,
    },
    /// One of its disks.
    #[error("disk '{name}' of the store: {error}")]
    Disk {
        /// Its name.
        name: String,
        /// What is wrong with it.
        error: OpenError,
    },
}

impl StoreError {
    /// The host's errno behind it, if there is one.
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
    /// Opens the store at `dir`, making it when there is none.
    ///
    /// # Errors
    /// [`StoreError`].
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

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dirs.path()
    }

    fn disk_dir(&self, uuid: &Uuid) -> PathBuf {
        self.dir().join("disks").join(uuid.to_string())
    }

    /// Removes disks without a name and layers without a disk: what a crash left behind. What is not
    /// cowslip's stays.
    fn remove_leftovers(&self) -> io::Result<()> {
        let Leftovers { disks, layers, foreign: strangers, .. } = self.dirs.leftovers()?;
        let dir = self.dir().display();
        for stranger in strangers {
            log::warn!("store '{dir}': '{stranger}' is not cowslip's: it is left alone");
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

    /// Opens every disk, one after the other, and hands it to `each`.
    ///
    /// # Errors
    /// The line for the user: of the first disk that cannot be opened, or what `each` says.
    pub fn open_disks(
        &self,
        setting: &OpenContext<'_>,
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
                .with_overlay_path(&uuid, |place| {
                    disk::open_stored(&name, place, setting, &self.layer_cache)
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

    /// A disk of this store that knows who else may stand on its layers.
    fn with_shared_layers(&self, opened: OpenedDisk) -> OpenedDisk {
        self.share_layers(&opened.disk);
        opened
    }

    fn share_layers(&self, disk: &Disk) {
        let dirs = Arc::clone(&self.dirs);
        let others: LayerUsers = Arc::new(move |uuid| layers_used_by_others(&dirs, uuid));
        disk.share_layers(&self.layer_cache, others);
    }

    /// Keeps the temporary overlay of `disk` here and gives it its name, durably.
    ///
    /// # Errors
    /// [`StoreError`]; when it could not be named the disk goes on, and ends with the mount.
    pub fn keep(&self, disk: &Disk, name: &str) -> Result<(), StoreError> {
        let kept = self.with_overlay_path(&disk.uuid, |place| disk.keep(place));
        kept.map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        self.share_layers(disk);
        self.give_name(&disk.uuid, name)
    }

    /// Makes an empty disk and gives it its name, durably.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create(&self, name: &str, owner: DiskOwner) -> Result<OpenedDisk, StoreError> {
        self.create_named(name, |uuid, place| disk::create_blank(name, uuid, place, owner))
    }

    /// Makes the disk that `spec` asks for, with its overlay in this store, and names it.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create_over(
        &self,
        spec: &DiskSpec,
        setting: &OpenContext<'_>,
    ) -> Result<OpenedDisk, StoreError> {
        self.create_named(&spec.name, |_, place| disk::create_stored(spec, place, setting))
    }

    /// Makes a disk that holds what `from`, another disk of this store, holds now.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn clone_disk(&self, from: &Disk, name: &str) -> Result<OpenedDisk, StoreError> {
        self.create_named(name, |_, place| disk::clone_stored(from, name, place, &self.layer_cache))
    }

    /// Makes a disk by `create_named`, which is given its uuid and its place, and names it, durably.
    fn create_named(
        &self,
        name: &str,
        make: impl FnOnce(Uuid, OverlayPath<'_>) -> Result<OpenedDisk, OpenError>,
    ) -> Result<OpenedDisk, StoreError> {
        let uuid = Uuid::new_v4();
        let opened = self
            .with_overlay_path(&uuid, |place| make(uuid, place))
            .map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        self.give_name(&uuid, name)?;
        Ok(self.with_shared_layers(opened))
    }

    /// Lets `name` lead to the disk `uuid`, durably; without it the disk goes.
    fn give_name(&self, uuid: &Uuid, name: &str) -> Result<(), StoreError> {
        let target = Path::new("../disks").join(uuid.to_string());
        let failed = |error| {
            self.remove_files(uuid);
            self.io_error("naming a new disk", error)
        };
        let made = name::check_disk(name).map_err(io::Error::from).and_then(|()| {
            rustix::fs::symlinkat(target, self.dirs.names(), name).map_err(io::Error::from)
        });
        made.map_err(failed)?;
        if let Err(error) = self.dirs.names().sync_all() {
            // The name first: one that leads nowhere would be in the way of the next mount.
            return match self.remove_name(name) {
                Ok(()) => Err(failed(error)),
                Err(error) => Err(self.io_error("naming a new disk", error)),
            };
        }
        Ok(())
    }

    /// Takes the name away, durably; the disk's files stay until [`remove_files`](Self::remove_files).
    ///
    /// # Errors
    /// The host's errno.
    pub fn remove_name(&self, name: &str) -> io::Result<()> {
        name::check(name)?;
        self.dirs.remove_name(name)
    }

    /// Renames a disk, over another one if there is one, durably.
    ///
    /// # Errors
    /// The host's errno.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        name::check(from)?;
        name::check_disk(to)?;
        let names = self.dirs.names();
        rustix::fs::renameat(names, from, names, to)?;
        names.sync_all()
    }

    /// Removes the files of a disk that no name leads to and nobody has open; the layers that
    /// another disk stands on stay.
    pub fn remove_files(&self, uuid: &Uuid) {
        let _alone = self.layer_cache.lock_changes();
        let layers = self.dirs.stack_of(uuid).map(|stack| stack.layers).unwrap_or_default();
        // First the stack that names the layers: what is left over is swept at the next mount.
        let removed = self.dirs.remove_disk(&uuid.to_string()).and_then(|()| {
            let needed = layers_used_by_others(&self.dirs, uuid)?;
            let free = layers.iter().filter(|layer| !needed.contains(&layer.uuid));
            // All of them, also after one could not be removed.
            let removed: Vec<_> = free.map(|layer| self.dirs.remove_layer(layer.uuid)).collect();
            removed.into_iter().collect::<io::Result<()>>()
        });
        if let Err(error) = removed {
            log::warn!("files of a removed disk are left in '{}': {error}", self.dir().display());
        }
    }
}

/// The layers that the disks of a store other than `uuid` stand on.
///
/// # Errors
/// The host's errno, also when a stack cannot be read: nobody knows then what it needs.
fn layers_used_by_others(dirs: &StoreDirs, uuid: &Uuid) -> io::Result<HashSet<Uuid>> {
    let mut needed = HashSet::new();
    dirs.for_each_stack(|disk, stack| {
        if disk != *uuid {
            needed.extend(stack.layers.into_iter().map(|layer| layer.uuid));
        }
    })?;
    Ok(needed)
}

/// The layers that several disks of a store stand on.
///
/// # Errors
/// As [`layers_used_by_others`].
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
    fn a_disk_that_was_removed_meanwhile_has_no_clones() {
        let room = tempfile::tempdir().unwrap();
        let store = Store::open(&room.path().join("st")).unwrap();
        let owner = DiskOwner { uid: 0, gid: 0, perm: 0o600 };
        let from = store.create("a", owner).unwrap().disk;
        from.write(b"kept", 0, Wait::Yes).unwrap();
        // All it holds is sealed from then on: the next clone needs no new layer of it.
        let first = store.clone_disk(&from, "b").unwrap().disk;
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
