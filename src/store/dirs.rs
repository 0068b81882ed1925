//! The directories of a store, held open: listing their contents, and removing unused disks and
//! layers.
//!
//! Nothing is removed only because it lies in the wrong place. A directory is a store only if it
//! has the marker, the file `store`; a disk or a layer is a directory named by a UUID that contains
//! only the files of a disk or a layer. Everything else stays, and is only reported.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::StoreError;
use crate::confined::{self, entry_names, foreign_entry_error, open_subdir};
use crate::host;
use crate::overlay::error::OverlayError;
use crate::overlay::persist::{STAGING_PREFIX, STORE_DIRS, remove_layer};
use crate::overlay::stack::Stack;
use crate::trust::{self, TrustError};
use crate::trusted_path::{open_dir, open_or_create_dirs};

/// Time limit for the previous user of a store to release its lock.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// Name of the marker, the file that makes a directory a store.
const MARKER_FILE: &str = "store";
/// Maximum length of the marker in bytes.
const MAX_MARKER_LEN: u64 = 4 << 10;
/// Version of the store's layout that this code reads and writes.
const STORE_VERSION: u32 = 1;

/// Directory that a new file system may contain besides a store.
const LOST_AND_FOUND: &str = "lost+found";
/// Files that the directory of a disk may contain.
const DISK_FILES: [&str; 4] = ["stack", "stack.new", "holder", "holder.new"];

/// Contents of the marker.
#[derive(Serialize, Deserialize)]
struct StoreMarker {
    version: u32,
}

/// The open directories of a store, with the store's lock held.
pub(crate) struct StoreDirs {
    path: PathBuf,
    /// The root directory. Holds the lock, which is released when this file is closed.
    root: File,
    names: File,
    disks: File,
    layers: File,
}

impl StoreDirs {
    /// Opens the store at `path`, and creates one if there is none.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn open_or_create(path: &Path) -> Result<Self, StoreError> {
        let io = |what| move |error| StoreError::Io { dir: path.to_owned(), what, error };
        let root = open_or_create_dirs(path).map_err(|error| match error {
            TrustError::Io(error) => io("making its directories")(error),
            error => StoreError::Untrusted { dir: path.to_owned(), error },
        })?;
        lock_root(path, &root)?;
        let has_marker = has_marker(path, &root)?;
        if !has_marker && !is_unfinished(&root).map_err(io("reading it"))? {
            // Stores from before there were markers have none.
            let dirs = Self::open_dirs(path, root)?;
            return match dirs.is_store_like().map_err(io("reading it"))? {
                true => dirs.write_marker(),
                false => Err(StoreError::NotAStore(path.to_owned())),
            };
        }
        for name in STORE_DIRS {
            match confined::create_dir(&root, name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                made => drop(made.map_err(io("making its directories"))?),
            }
        }
        let dirs = Self::open_dirs(path, root)?;
        if has_marker { Ok(dirs) } else { dirs.write_marker() }
    }

    /// Opens the store at `path` without changing it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let io = |what| move |error| StoreError::Io { dir: path.to_owned(), what, error };
        let root = open_dir(path).map_err(io("opening it"))?;
        lock_root(path, &root)?;
        let has_marker = has_marker(path, &root)?;
        let dirs = Self::open_dirs(path, root)?;
        if has_marker || dirs.is_store_like().map_err(io("reading it"))? {
            return Ok(dirs);
        }
        Err(StoreError::NotAStore(path.to_owned()))
    }

    fn open_dirs(path: &Path, root: File) -> Result<Self, StoreError> {
        let open = |name| match open_subdir(&root, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(StoreError::NotAStore(path.to_owned()))
            }
            opened => opened.map_err(|error| {
                let what = "opening its directories";
                StoreError::Io { dir: path.join(name), what, error }
            }),
        };
        let [layers, disks, names] = STORE_DIRS;
        let (names, disks, layers) = (open(names)?, open(disks)?, open(layers)?);
        let io = |error| StoreError::Io { dir: path.to_owned(), what: "opening it", error };
        // Nobody else can redirect the real path: only trusted directories lead to it.
        let path = confined::real_path(&root).map_err(io)?;
        Ok(Self { path, root, names, disks, layers })
    }

    /// Writes the marker, which makes the directory a store for good.
    fn write_marker(self) -> Result<Self, StoreError> {
        let text = format!("version = {STORE_VERSION}\n");
        let new = format!("{MARKER_FILE}.new");
        let marked = confined::replace_file(&self.root, MARKER_FILE, &new, text.as_bytes());
        match marked {
            Ok(()) => Ok(self),
            Err(error) => {
                Err(StoreError::Io { dir: self.path, what: "marking it as a store", error })
            }
        }
    }

    /// Returns the path of the store.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the directory of names, each a link to a disk.
    #[must_use]
    pub(super) fn names(&self) -> &File {
        &self.names
    }

    /// Returns whether the directories contain only entries that belong in a store.
    fn is_store_like(&self) -> io::Result<bool> {
        let is_uuid = |name: &String| parse_uuid(name).is_some();
        Ok(self.named_disks().is_ok()
            && entry_names(&self.disks)?
                .iter()
                .all(|name| is_uuid(name) || name.starts_with(STAGING_PREFIX))
            && entry_names(&self.layers)?.iter().all(is_uuid))
    }

    /// Returns every name and the disk it links to, sorted.
    ///
    /// # Errors
    /// The host's errno; also an error when a name is no link to a disk, as in a copy of a store
    /// without its symlinks, because the disk would seem to have no name.
    pub(crate) fn named_disks(&self) -> io::Result<Vec<(String, Uuid)>> {
        let mut all = Vec::new();
        for name in entry_names(&self.names)? {
            let Some(target) = self.disk_named(&name) else {
                return Err(io::Error::other(format!(
                    "'names/{name}' is no link to one of its disks: remove it, or copy the store again with its symlinks (cp -a)"
                )));
            };
            all.push((name, target));
        }
        all.sort();
        Ok(all)
    }

    /// Returns the target of the link `name`; `None` if there is no such name.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn link_target(&self, name: &str) -> io::Result<Option<CString>> {
        match rustix::fs::readlinkat(&self.names, name, Vec::new()) {
            Ok(target) => Ok(Some(target)),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Returns the disk that `name` links to.
    fn disk_named(&self, name: &str) -> Option<Uuid> {
        let target = self.link_target(name).ok()??;
        parse_uuid(target.to_str().ok()?.strip_prefix("../disks/")?)
    }

    /// Calls `each` with the UUID and the stack of every disk.
    ///
    /// # Errors
    /// The host's errno; also an error when a stack cannot be read.
    pub(super) fn for_each_stack(&self, mut each: impl FnMut(Uuid, Stack)) -> io::Result<()> {
        for uuid in entry_names(&self.disks)?.iter().filter_map(|name| parse_uuid(name)) {
            match self.stack_of(&uuid) {
                Ok(stack) => each(uuid, stack),
                // The disk was removed between listing and reading.
                Err(OverlayError::Io { error, .. }) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
        Ok(())
    }

    /// Returns the stack of the disk `uuid`.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub(super) fn stack_of(&self, uuid: &Uuid) -> Result<Stack, OverlayError> {
        let dir =
            open_subdir(&self.disks, uuid.to_string()).map_err(OverlayError::io("opening it"))?;
        Stack::read(&dir)
    }

    /// Finds the entries that a crash left behind, and foreign ones.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn leftovers(&self) -> io::Result<Leftovers> {
        let named = self.named_disks()?;
        let disks = entry_names(&self.disks)?;
        let mut found = Leftovers::default();
        let is_gone = |uuid: &Uuid| !disks.contains(&uuid.to_string());
        found.names.extend(named.iter().filter(|(_, uuid)| is_gone(uuid)).map(|(n, _)| n.clone()));
        let mut needed = found.names.is_empty().then(HashSet::new);
        for name in disks {
            match parse_uuid(&name) {
                Some(uuid) if named.iter().any(|(_, other)| *other == uuid) => {
                    needed = needed.zip(self.stack_of(&uuid).ok()).map(|(mut needed, stack)| {
                        needed.extend(stack.layers.into_iter().map(|layer| layer.uuid));
                        needed
                    });
                }
                Some(_) => found.disks.push(name),
                None if name.starts_with(STAGING_PREFIX) => found.disks.push(name),
                None => found.foreign.push(format!("disks/{name}")),
            }
        }
        for name in entry_names(&self.layers)? {
            match (parse_uuid(&name), &needed) {
                (None, _) => found.foreign.push(format!("layers/{name}")),
                (Some(uuid), Some(needed)) if !needed.contains(&uuid) => found.layers.push(uuid),
                (Some(_), _) => {}
            }
        }
        found.disks.sort();
        found.layers.sort();
        found.foreign.sort();
        Ok(found)
    }

    /// Removes a name, durably; the disk's files stay.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn remove_name(&self, name: &str) -> io::Result<()> {
        rustix::fs::unlinkat(&self.names, name, AtFlags::empty())?;
        self.names.sync_all()
    }

    /// Removes the directory `name` of a disk. A directory that contains foreign files stays
    /// unchanged.
    ///
    /// # Errors
    /// The host's errno; for a foreign file, a line that names it.
    pub(crate) fn remove_disk(&self, name: &str) -> io::Result<()> {
        let dir = open_subdir(&self.disks, name)?;
        if let Some(other) = entry_names(&dir)?.iter().find(|file| !DISK_FILES.contains(&&***file))
        {
            return Err(foreign_entry_error(&format!("disks/{name}"), other));
        }
        // Remove the stack first: without it there is no disk.
        DISK_FILES.iter().try_for_each(|file| confined::remove_file(&dir, file))?;
        Ok(rustix::fs::unlinkat(&self.disks, name, AtFlags::REMOVEDIR)?)
    }

    /// Removes the layer `uuid`. A layer that contains foreign files stays unchanged.
    ///
    /// # Errors
    /// The host's errno; for a foreign file, a line that names it.
    pub(crate) fn remove_layer(&self, uuid: Uuid) -> io::Result<()> {
        remove_layer(&self.layers, uuid)
    }
}

/// Entries of a store that belong to no disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Leftovers {
    /// Names whose disk does not exist.
    pub names: Vec<String>,
    /// Directories of disks without a name, and of unfinished disks.
    pub disks: Vec<String>,
    /// Layers that no disk uses. Empty while a disk's stack is missing or cannot be read, since the
    /// layers it needs are unknown then.
    pub layers: Vec<Uuid>,
    /// Entries that cowslip did not create; they are left alone.
    pub foreign: Vec<String>,
}

/// Locks the root directory of a store, if no other user could have changed it.
fn lock_root(path: &Path, root: &File) -> Result<(), StoreError> {
    let io = |what| move |error| StoreError::Io { dir: path.to_owned(), what, error };
    trust::check(root).map_err(|error| StoreError::Untrusted { dir: path.to_owned(), error })?;
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    match host::lock_within(root, exclusive, RELEASE_TIMEOUT).map_err(io("locking it"))? {
        true => Ok(()),
        false => Err(StoreError::InUse(path.to_owned())),
    }
}

/// Returns whether there is a marker; it must be of a known version.
fn has_marker(path: &Path, root: &File) -> Result<bool, StoreError> {
    let bytes = match confined::read_file(root, MARKER_FILE, MAX_MARKER_LEN) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => {
            let what = "reading its marker";
            return Err(StoreError::Io { dir: path.to_owned(), what, error });
        }
    };
    let marker = std::str::from_utf8(&bytes).ok().and_then(|text| toml::from_str(text).ok());
    match marker {
        Some(StoreMarker { version: STORE_VERSION }) => Ok(true),
        Some(StoreMarker { version }) => Err(StoreError::Version { dir: path.to_owned(), version }),
        None => Err(StoreError::NotAStore(path.to_owned())),
    }
}

/// Returns whether the directory is empty, or contains only the remains of an unfinished store.
fn is_unfinished(root: &File) -> io::Result<bool> {
    for name in entry_names(root)? {
        match name.as_str() {
            LOST_AND_FOUND => {}
            name if STORE_DIRS.contains(&name) && is_empty(root, name)? => {}
            name if name.strip_suffix(".new") == Some(MARKER_FILE) => {}
            _ => return Ok(false),
        }
    }
    Ok(true)
}

fn is_empty(root: &File, name: &str) -> io::Result<bool> {
    match open_subdir(root, name) {
        Ok(dir) => Ok(entry_names(&dir)?.is_empty()),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(false),
        Err(error) => Err(error),
    }
}

/// Parses `name` as a UUID in the spelling that cowslip writes.
fn parse_uuid(name: &str) -> Option<Uuid> {
    Uuid::parse_str(name).ok().filter(|uuid| uuid.to_string() == name)
}
