//! The directory of persistent caches, given with `read-cache=DIR`.
//!
//! ```text
//!   DIR/read-cache              marks the directory; holds the version
//!   DIR/<SHA-256>/{data,map}    one image: its bytes, and which these are
//!   DIR/<SHA-256>.lock          one address: shared by those who keep images of it, held alone by who writes
//! ```
//!
//! Whoever uses an image has its directory locked (flock(2)). The limit holds for the whole DIR: the
//! images that nobody uses go first, the one that was used longest ago before all others, and those in
//! use share what is left. Only a directory with the mark is used, and only what has the names of a cache
//! in it is ever removed.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{AtFlags, FlockOperation, Timespec, Timestamps};

use super::error::CacheError;
use crate::confined::{self, FileAccess, entry_names, open_subdir};
use crate::host::{self, LOCK_POLL_INTERVAL, os_error};
use crate::trust::{self, TrustError};
use crate::trusted_path::open_or_create_dirs;

/// Names of the files of an image, and of a map that is being written.
pub(super) const DATA_FILE: &str = "data";
pub(super) const MAP_FILE: &str = "map";
pub(super) const NEW_MAP_FILE: &str = "map.new";

/// Name of the mark, and its contents.
const MARKER_FILE: &str = "read-cache";
const NEW_MARKER_FILE: &str = "read-cache.new";
const MARKER: &str = "version = 1\n";
/// Maximum length of the mark in bytes.
const MAX_MARKER_LEN: u64 = 4 << 10;
/// Directory that a new file system contains.
const LOST_AND_FOUND: &str = "lost+found";
/// Time limit for another process to release an image: one that was killed holds it until its last
/// thread is gone, and one that looks for room for a moment.
pub(super) const LOCK_TIMEOUT: Duration = Duration::from_secs(1);

/// The open directory of the caches.
pub(super) struct CacheDir {
    path: PathBuf,
    root: File,
}

/// The open directory of one image, locked by this process.
pub(super) struct ImageDir {
    root: CacheDir,
    name: String,
    files: File,
}

/// What the images of a directory take, but for one.
#[derive(Debug, Default)]
pub(super) struct OtherImages {
    /// Bytes of all of them.
    pub(super) bytes: u64,
    /// How many are in use.
    pub(super) live: u64,
    /// Those that are not, the one that was used longest ago first.
    idle: Vec<IdleImage>,
}

impl OtherImages {
    /// Returns the bytes of images that nobody uses.
    pub(super) fn idle_bytes(&self) -> u64 {
        self.idle.iter().map(|image| image.bytes).sum()
    }

    /// Whether there are images that nobody uses.
    pub(super) fn has_idle(&self) -> bool {
        !self.idle.is_empty()
    }
}

#[derive(Debug)]
struct IdleImage {
    last_used: Option<SystemTime>,
    bytes: u64,
    name: String,
}

impl CacheDir {
    /// Opens the directory at `path`, and makes it where there is none.
    ///
    /// # Errors
    /// [`CacheError`].
    pub(super) fn open_or_create(path: &Path) -> Result<Self, CacheError> {
        let io = |error| CacheError::Dir { dir: path.to_owned(), error };
        let untrusted = |error| CacheError::Untrusted { dir: path.to_owned(), error };
        let root = open_or_create_dirs(path).map_err(|error| match error {
            TrustError::Io(error) => io(error),
            error => untrusted(error),
        })?;
        trust::check(&root).map_err(untrusted)?;
        if !has_mark(path, &root)? {
            make_mark(path, &root)?;
        }
        Ok(Self { path: path.to_owned(), root })
    }

    /// Opens and locks the image `name`, and makes its directory where there is none. `None` when
    /// another process uses it.
    ///
    /// # Errors
    /// [`CacheError`].
    pub(super) fn lock_image(self, name: String) -> Result<Option<ImageDir>, CacheError> {
        let path = self.path.join(&name);
        let io = |error| CacheError::Dir { dir: path.clone(), error };
        let start = Instant::now();
        loop {
            let files = match confined::create_dir(&self.root, &name) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    open_subdir(&self.root, &name)
                }
                made => made,
            };
            let files = match files {
                // It was removed between the two.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                files => files.map_err(io)?,
            };
            trust::check(&files)
                .map_err(|error| CacheError::Untrusted { dir: path.clone(), error })?;
            match rustix::fs::flock(&files, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) if self.is_named(&name, &files).map_err(io)? => {
                    return Ok(Some(ImageDir { root: self, name, files }));
                }
                // It was removed before it was locked.
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < LOCK_TIMEOUT => {
                    thread::sleep(LOCK_POLL_INTERVAL);
                }
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(io(error.into())),
            }
        }
    }

    /// Opens the file `name` beside the images; makes it where there is none.
    ///
    /// # Errors
    /// The host's errno; [`io::ErrorKind::InvalidInput`] for something that is no regular file.
    pub(super) fn open_or_create_file(&self, name: &str) -> io::Result<File> {
        match confined::open_file(&self.root, name, FileAccess::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                match confined::create_file(&self.root, name) {
                    // Another process was faster.
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                        confined::open_file(&self.root, name, FileAccess::ReadWrite)
                    }
                    created => created,
                }
            }
            opened => opened,
        }
    }

    /// Whether `files` is still the directory `name`.
    fn is_named(&self, name: &str, files: &File) -> io::Result<bool> {
        match rustix::fs::statat(&self.root, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(found.st_ino == files.metadata()?.ino()),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl ImageDir {
    /// Returns the open directory of the image's files.
    pub(super) fn files(&self) -> &File {
        &self.files
    }

    /// Opens the file `name`; the answer says whether it was made.
    ///
    /// # Errors
    /// The host's errno; [`io::ErrorKind::InvalidInput`] for something that is no regular file, and for
    /// one of another user.
    pub(super) fn open_or_create(&self, name: &str) -> io::Result<(File, bool)> {
        match confined::open_file(&self.files, name, FileAccess::ReadWrite) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Ok((confined::create_file(&self.files, name)?, true))
            }
            opened => Ok((opened?, false)),
        }
    }

    /// Notes that the image is used now.
    pub(super) fn touch(&self) {
        let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        let times = Timestamps { last_access: now, last_modification: now };
        let map = rustix::fs::utimensat(&self.files, MAP_FILE, &times, AtFlags::SYMLINK_NOFOLLOW);
        if let Err(error) = map {
            log::debug!("the last use of a read cache is not noted: {error}");
        }
    }

    /// Looks what the other images of the directory take. Entries that are no images do not count.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn others(&self) -> io::Result<OtherImages> {
        let mut found = OtherImages::default();
        for name in entry_names(&self.root.root)? {
            if name == self.name || !is_image_name(&name) {
                continue;
            }
            let Ok(files) = open_subdir(&self.root.root, &name) else { continue };
            let look = |file| confined::open_file(&files, file, FileAccess::Read)?.metadata();
            let (data, map) = (look(DATA_FILE).ok(), look(MAP_FILE).ok());
            let blocks = [&data, &map].into_iter().flatten().map(MetadataExt::blocks);
            let bytes = blocks.sum::<u64>().saturating_mul(512);
            found.bytes = found.bytes.saturating_add(bytes);
            match rustix::fs::flock(&files, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {
                    let last_used = map.and_then(|map| map.modified().ok());
                    found.idle.push(IdleImage { last_used, bytes, name });
                }
                Err(_) => found.live += 1,
            }
        }
        found.idle.sort_by_key(|image| std::cmp::Reverse(image.last_used));
        Ok(found)
    }

    /// Removes images of `others` that nobody uses until they take `needed` bytes less, or none is left.
    /// Best effort.
    pub(super) fn remove_idle(&self, others: &mut OtherImages, needed: u64) {
        let start = others.bytes;
        while start - others.bytes < needed {
            let Some(image) = others.idle.pop() else { return };
            match self.remove_image(&image.name) {
                Ok(()) => others.bytes = others.bytes.saturating_sub(image.bytes),
                Err(error) => log::debug!("a read cache stays: {error}"),
            }
        }
    }

    /// Removes an image that nobody uses. A directory that contains foreign files stays as it is.
    fn remove_image(&self, name: &str) -> io::Result<()> {
        let root = &self.root.root;
        let files = open_subdir(root, name)?;
        rustix::fs::flock(&files, FlockOperation::NonBlockingLockExclusive)?;
        let ours = [MAP_FILE, NEW_MAP_FILE, DATA_FILE];
        if let Some(other) = entry_names(&files)?.iter().find(|file| !ours.contains(&&***file)) {
            return Err(confined::foreign_entry_error(name, other));
        }
        ours.iter().try_for_each(|file| confined::remove_file(&files, file))?;
        Ok(rustix::fs::unlinkat(root, name, AtFlags::REMOVEDIR)?)
    }
}

/// Whether the directory `root`, at `path`, has the mark.
fn has_mark(path: &Path, root: &File) -> Result<bool, CacheError> {
    match confined::read_file(root, MARKER_FILE, MAX_MARKER_LEN) {
        Ok(text) if text == MARKER.as_bytes() => Ok(true),
        Ok(_) => Err(CacheError::Version(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        // Longer than a mark can be.
        Err(error) if error.raw_os_error() == Some(libc::EFBIG) => {
            Err(CacheError::Version(path.to_owned()))
        }
        Err(error) => Err(CacheError::Dir { dir: path.to_owned(), error }),
    }
}

/// Marks the directory `root`, at `path`, which must hold nothing else. The directory is locked meanwhile:
/// another mount may be about to do the same.
fn make_mark(path: &Path, root: &File) -> Result<(), CacheError> {
    let io = |error| CacheError::Dir { dir: path.to_owned(), error };
    let exclusive = FlockOperation::NonBlockingLockExclusive;
    if !host::lock_within(root, exclusive, LOCK_TIMEOUT).map_err(io)? {
        return Err(io(os_error(libc::EWOULDBLOCK)));
    }
    let mark = || {
        if has_mark(path, root)? {
            return Ok(());
        }
        let ours = [LOST_AND_FOUND, NEW_MARKER_FILE];
        let names = entry_names(root).map_err(io)?;
        if names.iter().any(|name| !ours.contains(&name.as_str())) {
            return Err(CacheError::NotACache(path.to_owned()));
        }
        let bytes = MARKER.as_bytes();
        confined::replace_file(root, MARKER_FILE, NEW_MARKER_FILE, bytes).map_err(io)
    };
    let marked = mark();
    let unlocked = rustix::fs::flock(root, FlockOperation::Unlock);
    marked.and_then(|()| unlocked.map_err(|error| io(error.into())))
}

/// Whether `name` is spelt as the directory of an image is.
fn is_image_name(name: &str) -> bool {
    name.len() == 64 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}
