//! The directory behind `--store`: disks that are made, renamed and removed in the mount.
//!
//! ```text
//!   STORE/names/NAME -> ../disks/UUID      what the mount shows; one rename(2) renames a disk
//!   STORE/disks/UUID/stack                 which layers make it
//!   STORE/layers/UUID/{data,log}           the layers
//! ```
//!
//! A disk exists when a name leads to it. Its files are made before the name and removed after it,
//! each durable before the next; what a crash leaves without a name is swept at the next mount.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use uuid::Uuid;

use crate::disk::{self, Disk, OpenError, Opened, Others, Owner, Setting};
use crate::overlay::persist::Place;
use crate::overlay::shelf::Shelf;
use crate::overlay::stack::{Stack, StackError, doing, open_dir};
use crate::spec::DiskSpec;

/// How long a store's last user may take to be gone.
const DYING: Duration = Duration::from_secs(1);
/// How often is looked whether it is.
const LOOK: Duration = Duration::from_millis(20);

/// A store that this process has to itself.
pub struct Store {
    dir: PathBuf,
    names: File,
    /// The sealed layers that its disks share.
    shelf: Arc<Shelf>,
    /// Unlocked when it is closed.
    _lock: File,
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
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Io { error, .. } => error.raw_os_error(),
            Self::Disk { error, .. } => error.errno(),
            Self::InUse(_) | Self::NotAStore(_) => None,
        }
    }
}

impl Store {
    /// Opens the store at `dir`, making it when there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let io = |what| move |error| StoreError::Io { dir: dir.to_owned(), what, error };
        if !dir.join("names").is_dir() {
            let is_other = fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_some());
            if is_other {
                return Err(StoreError::NotAStore(dir.to_owned()));
            }
        }
        for name in ["layers", "disks", "names"] {
            fs::create_dir_all(dir.join(name)).map_err(io("making its directories"))?;
        }
        let lock = lock(dir)?;
        lock.sync_all().map_err(io("making its directories"))?;
        let names = open_dir(&dir.join("names")).map_err(io("opening its names"))?;
        let shelf = Arc::default();
        let store = Self { dir: dir.to_owned(), names, shelf, _lock: lock };
        store.sweep().map_err(io("sweeping what has no name"))?;
        Ok(store)
    }

    /// The store's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn disk_dir(&self, uuid: &Uuid) -> PathBuf {
        self.dir.join("disks").join(uuid.to_string())
    }

    /// Every name and the disk it leads to.
    fn targets(&self) -> io::Result<Vec<(String, Uuid)>> {
        targets(&self.dir)
    }

    /// Removes disks without a name and layers without a disk: what a crash left behind.
    fn sweep(&self) -> io::Result<()> {
        let leftovers = Leftovers::find(&self.dir)?;
        leftovers.disks.iter().chain(&leftovers.layers).try_for_each(fs::remove_dir_all)
    }

    fn with_place<T>(&self, uuid: &Uuid, use_it: impl FnOnce(Place<'_>) -> T) -> T {
        let (dir, layers) = (self.disk_dir(uuid), self.dir.join("layers"));
        use_it(Place { dir: &dir, layers: Some(&layers) })
    }

    /// Opens every disk, one after the other, and hands it to `each`.
    ///
    /// # Errors
    /// The line for the user: of the first disk that cannot be opened, or what `each` says.
    pub fn open_disks(
        &self,
        setting: &Setting<'_>,
        mut each: impl FnMut(&str, Opened) -> Result<(), String>,
    ) -> Result<(), String> {
        let listed = self.targets().map_err(|error| {
            let dir = self.dir.clone();
            StoreError::Io { dir, what: "reading its names", error }.to_string()
        })?;
        let shared = shared_layers(&self.dir);
        if let Err(error) = &shared {
            log::debug!("store '{}': layers are merged later: {error}", self.dir.display());
        }
        for (name, uuid) in listed {
            let opened = self
                .with_place(&uuid, |place| disk::open_stored(&name, place, setting, &self.shelf))
                .map_err(|error| StoreError::Disk { name: name.clone(), error }.to_string())?;
            let opened = self.joined(opened);
            if let Ok(shared) = &shared {
                opened.disk.note_untidy(shared);
            }
            each(&name, opened)?;
        }
        Ok(())
    }

    /// A disk of this store that knows who else may stand on its layers.
    fn joined(&self, opened: Opened) -> Opened {
        self.join(&opened.disk);
        opened
    }

    fn join(&self, disk: &Disk) {
        let dir = self.dir.clone();
        let others: Others = Arc::new(move |uuid| layers_of_others(&dir, uuid));
        disk.join(&self.shelf, others);
    }

    /// Keeps the temporary overlay of `disk` here and gives it its name, durably.
    ///
    /// # Errors
    /// [`StoreError`]; when it could not be named the disk goes on, and ends with the mount.
    pub fn keep(&self, disk: &Disk, name: &str) -> Result<(), StoreError> {
        let kept = self.with_place(&disk.uuid, |place| disk.keep(place));
        kept.map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        self.join(disk);
        self.give_name(&disk.uuid, name)
    }

    /// Makes an empty disk and gives it its name, durably.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create(&self, name: &str, owner: Owner) -> Result<Opened, StoreError> {
        self.make(name, |uuid, place| disk::create_blank(name, uuid, place, owner))
    }

    /// Makes the disk that `spec` asks for, with its overlay in this store, and names it.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn create_over(
        &self,
        spec: &DiskSpec,
        setting: &Setting<'_>,
    ) -> Result<Opened, StoreError> {
        self.make(&spec.name, |_, place| disk::create_stored(spec, place, setting))
    }

    /// Makes a disk that holds what `from`, another disk of this store, holds now.
    ///
    /// # Errors
    /// [`StoreError`]; nothing is left behind then.
    pub fn clone_disk(&self, from: &Disk, name: &str) -> Result<Opened, StoreError> {
        self.make(name, |_, place| disk::clone_stored(from, name, place, &self.shelf))
    }

    /// Makes a disk by `make`, which is given its uuid and its place, and names it, durably.
    fn make(
        &self,
        name: &str,
        make: impl FnOnce(Uuid, Place<'_>) -> Result<Opened, OpenError>,
    ) -> Result<Opened, StoreError> {
        let uuid = Uuid::new_v4();
        let opened = self
            .with_place(&uuid, |place| make(uuid, place))
            .map_err(|error| StoreError::Disk { name: name.to_owned(), error })?;
        self.give_name(&uuid, name)?;
        Ok(self.joined(opened))
    }

    /// Lets `name` lead to the disk `uuid`, durably; without it the disk goes.
    fn give_name(&self, uuid: &Uuid, name: &str) -> Result<(), StoreError> {
        let target = Path::new("../disks").join(uuid.to_string());
        let failed = |error| {
            self.discard(uuid);
            StoreError::Io { dir: self.dir.clone(), what: "naming a new disk", error }
        };
        rustix::fs::symlinkat(target, &self.names, name).map_err(|error| failed(error.into()))?;
        if let Err(error) = self.names.sync_all() {
            // The name first: one that leads nowhere would be in the way of the next mount.
            return match self.remove_name(name) {
                Ok(()) => Err(failed(error)),
                Err(error) => {
                    Err(StoreError::Io { dir: self.dir.clone(), what: "naming a new disk", error })
                }
            };
        }
        Ok(())
    }

    /// Takes the name away, durably; the disk's files stay until [`discard`](Self::discard).
    ///
    /// # Errors
    /// The host's errno.
    pub fn remove_name(&self, name: &str) -> io::Result<()> {
        rustix::fs::unlinkat(&self.names, name, rustix::fs::AtFlags::empty())?;
        self.names.sync_all()
    }

    /// Renames a disk, over another one if there is one, durably.
    ///
    /// # Errors
    /// The host's errno.
    pub fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        rustix::fs::renameat(&self.names, from, &self.names, to)?;
        self.names.sync_all()
    }

    /// Removes the files of a disk that no name leads to and nobody has open; the layers that
    /// another disk stands on stay.
    pub fn discard(&self, uuid: &Uuid) {
        let _alone = self.shelf.alone();
        let dir = self.disk_dir(uuid);
        let stack = open_dir(&dir).ok().and_then(|dir| Stack::read(&dir).ok());
        let layers = stack.map(|stack| stack.layers).unwrap_or_default();
        // First the stack that names the layers: what is left over is swept at the next mount.
        let removed = fs::remove_dir_all(&dir).and_then(|()| {
            let needed = layers_of_others(&self.dir, uuid)?;
            let free = layers.iter().filter(|layer| !needed.contains(&layer.uuid));
            let paths = free.map(|layer| self.dir.join("layers").join(layer.uuid.to_string()));
            // All of them, also after one could not be removed.
            let removed: Vec<io::Result<()>> = paths.map(fs::remove_dir_all).collect();
            removed.into_iter().collect::<io::Result<()>>()
        });
        if let Err(error) = removed {
            log::warn!("files of a removed disk are left in '{}': {error}", self.dir.display());
        }
    }
}

/// Takes the lock of the store at `dir`, which is free again when the file is closed.
///
/// # Errors
/// [`StoreError`]: a mount has it.
pub fn lock(dir: &Path) -> Result<File, StoreError> {
    let io = |what| move |error| StoreError::Io { dir: dir.to_owned(), what, error };
    let lock = open_dir(dir).map_err(io("opening it"))?;
    let start = Instant::now();
    loop {
        match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(lock),
            // The threads of a daemon that was killed end one after the other.
            Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < DYING => thread::sleep(LOOK),
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(StoreError::InUse(dir.to_owned())),
            Err(error) => return Err(io("locking it")(error.into())),
        }
    }
}

/// The disk that `name` leads to in the store `dir`.
fn target_of(dir: &Path, name: &str) -> Option<Uuid> {
    let target = fs::read_link(dir.join("names").join(name)).ok()?;
    Uuid::parse_str(target.file_name()?.to_str()?).ok()
}

/// Every name in the store `dir` and the disk it leads to.
///
/// # Errors
/// The host's errno; also when a name is no link to a disk, as in a copy of a store without its
/// symlinks: its disk would look like one without a name.
fn targets(dir: &Path) -> io::Result<Vec<(String, Uuid)>> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir.join("names"))? {
        let name = entry?.file_name();
        let target = name.to_str().and_then(|name| Some((name.to_owned(), target_of(dir, name)?)));
        let no_link = || {
            let name = name.to_string_lossy();
            io::Error::other(format!(
                "'names/{name}' is no link to one of its disks: remove it, or copy the store again with its symlinks (cp -a)"
            ))
        };
        all.push(target.ok_or_else(no_link)?);
    }
    all.sort();
    Ok(all)
}

/// What a crash left behind in a store. Only who has its lock may look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leftovers {
    /// Names whose disk is gone.
    pub names: Vec<String>,
    /// The directories of disks without a name.
    pub disks: Vec<PathBuf>,
    /// The directories of layers that no disk stands on. None while a disk's stack is gone or cannot
    /// be read: nobody knows then what it needs.
    pub layers: Vec<PathBuf>,
}

impl Leftovers {
    /// Looks for them in the store `dir`.
    ///
    /// # Errors
    /// The host's errno.
    pub fn find(dir: &Path) -> io::Result<Self> {
        let named = targets(dir)?;
        let mut found = Self::default();
        for (name, uuid) in &named {
            match fs::symlink_metadata(dir.join("disks").join(uuid.to_string())) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    found.names.push(name.clone());
                }
                Err(error) => return Err(error),
            }
        }
        let mut needed = found.names.is_empty().then(HashSet::new);
        for entry in fs::read_dir(dir.join("disks"))? {
            let path = entry?.path();
            let uuid = path.file_name().and_then(|name| Uuid::parse_str(name.to_str()?).ok());
            if uuid.is_none_or(|uuid| named.iter().all(|(_, other)| *other != uuid)) {
                found.disks.push(path);
                continue;
            }
            let stack = open_dir(&path).ok().and_then(|dir| Stack::read(&dir).ok());
            needed = needed.zip(stack).map(|(mut needed, stack)| {
                needed.extend(stack.layers.into_iter().map(|layer| layer.uuid.to_string()));
                needed
            });
        }
        for entry in fs::read_dir(dir.join("layers"))? {
            let entry = entry?;
            let name = entry.file_name();
            let is_needed =
                |needed: &HashSet<String>| name.to_str().is_some_and(|name| needed.contains(name));
            if needed.as_ref().is_some_and(|needed| !is_needed(needed)) {
                found.layers.push(entry.path());
            }
        }
        found.disks.sort();
        found.layers.sort();
        Ok(found)
    }
}

/// The layers that the disks of the store `dir` other than `uuid` stand on.
///
/// # Errors
/// The host's errno, also when a stack cannot be read: nobody knows then what it needs.
fn layers_of_others(dir: &Path, uuid: &Uuid) -> io::Result<HashSet<Uuid>> {
    let own = uuid.to_string();
    let mut needed = HashSet::new();
    each_stack(dir, |name, stack| {
        if name != own {
            needed.extend(stack.layers.into_iter().map(|layer| layer.uuid));
        }
    })?;
    Ok(needed)
}

/// The layers that several disks of the store `dir` stand on.
///
/// # Errors
/// As [`layers_of_others`].
fn shared_layers(dir: &Path) -> io::Result<HashSet<Uuid>> {
    let (mut seen, mut shared) = (HashSet::new(), HashSet::new());
    each_stack(dir, |_, stack| {
        let again = stack.layers.into_iter().map(|layer| layer.uuid);
        shared.extend(again.filter(|layer| !seen.insert(*layer)));
    })?;
    Ok(shared)
}

/// Calls `each` with the directory's name and the stack of every disk in the store `dir`.
fn each_stack(dir: &Path, mut each: impl FnMut(&str, Stack)) -> io::Result<()> {
    for entry in fs::read_dir(dir.join("disks"))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        match open_dir(&entry.path()).map_err(doing("opening it")).and_then(|dir| Stack::read(&dir))
        {
            Ok(stack) => each(name, stack),
            // It went between the two.
            Err(StackError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(io::Error::other(error.to_string())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Wait;

    #[test]
    fn a_disk_that_was_removed_meanwhile_has_no_clones() {
        let room = tempfile::tempdir().unwrap();
        let store = Store::open(&room.path().join("st")).unwrap();
        let owner = Owner { uid: 0, gid: 0, perm: 0o600 };
        let from = store.create("a", owner).unwrap().disk;
        from.write(b"kept", 0, Wait::Yes).unwrap();
        // All it holds is sealed from then on: the next clone needs no new layer of it.
        let first = store.clone_disk(&from, "b").unwrap().disk;
        for (name, disk) in [("a", &from), ("b", &first)] {
            store.remove_name(name).unwrap();
            store.discard(&disk.uuid);
        }
        let refused = store.clone_disk(&from, "c").err().unwrap().to_string();
        assert!(refused.contains("removed meanwhile"), "{refused}");
        assert_eq!(store.targets().unwrap(), []);
        for dir in ["disks", "layers"] {
            assert_eq!(fs::read_dir(store.dir().join(dir)).unwrap().count(), 0, "{dir}");
        }
    }
}
