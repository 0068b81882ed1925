//! Open handles: the objects behind the kernel's `fh` numbers.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use fuser::FileHandle;
use parking_lot::Mutex;

use super::nodes::DirEntry;
use crate::control::{ControlNode, ControlSession, MapText};
use crate::disk::{Disk, DiskFile, HandleAccess};
use crate::host::os_error;

/// The most control files and directories that one user may have open in a mount: more than any use
/// needs, at some kilobytes each.
const MAX_PER_USER: usize = 1024;
/// The most control files and directories that all untrusted users together may have open: one
/// person may have many user ids.
const MAX_UNTRUSTED: usize = 4 * MAX_PER_USER;
/// The most memory of all listings of directories, in bytes, beyond which untrusted users get no
/// other one: as much as the states of a directory of 9,000 disks that 30 handles were opened in.
const MAX_LISTINGS_SIZE: usize = 64 << 20;

/// One open file or directory.
pub(super) enum Handle {
    /// A disk, or one of its partitions.
    Disk { file: DiskFile, access: HandleAccess },
    /// A text as of the time of opening.
    Text(Arc<Vec<u8>>),
    /// The log, from this byte offset of all that was ever logged.
    Log(u64),
    /// A map, generated while it is read.
    Map { text: Arc<MapText>, disk: Arc<Disk> },
    /// A `ctl` file.
    Ctl { session: Arc<ControlSession>, node: ControlNode },
    /// A directory.
    Directory(DirectoryHandle),
}

/// An open directory.
pub(super) struct DirectoryHandle {
    ino: u64,
    read: Mutex<DirectoryRead>,
}

/// What the reader of a directory is shown.
struct DirectoryRead {
    listing: Arc<Listing>,
    /// Nothing was read yet.
    is_new: bool,
}

impl DirectoryHandle {
    /// A directory that was just opened and holds `listing`.
    pub(super) fn new(ino: u64, listing: Arc<Listing>) -> Self {
        Self { ino, read: Mutex::new(DirectoryRead { listing, is_new: true }) }
    }

    /// The directory's inode number.
    pub(super) fn ino(&self) -> u64 {
        self.ino
    }

    /// Returns the entries for a read at `offset`: those of the time of opening or, when the
    /// directory is read from its start again (rewinddir(3)), those that `list` returns now.
    ///
    /// # Errors
    /// The errors of `list`.
    pub(super) fn read(
        &self,
        offset: u64,
        list: impl FnOnce(u64) -> io::Result<Arc<Listing>>,
    ) -> io::Result<Arc<Listing>> {
        let mut read = self.read.lock();
        if offset == 0 && !std::mem::replace(&mut read.is_new, false) {
            read.listing = list(self.ino)?;
        }
        Ok(Arc::clone(&read.listing))
    }
}

/// The entries of a directory at one moment, shared by all handles that show them.
pub(super) struct Listing {
    pub(super) entries: Vec<DirEntry>,
    /// Memory in bytes.
    size: usize,
    /// The memory of all listings of the mount.
    total: Arc<AtomicUsize>,
}

impl Drop for Listing {
    fn drop(&mut self) {
        self.total.fetch_sub(self.size, Ordering::Relaxed);
    }
}

/// The user who sent a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Requester {
    pub(super) uid: u32,
    /// The user is root or the one who mounted.
    pub(super) is_trusted: bool,
}

/// All open handles of a mount.
#[derive(Default)]
pub(super) struct Handles {
    open: DashMap<u64, OpenHandle>,
    next: AtomicU64,
    counts: Arc<Mutex<HandleCounts>>,
    /// The text generated last: while nothing changes, all its openers share it.
    last_text: Mutex<Weak<Vec<u8>>>,
    /// The listing of each directory, by inode number, that was made last.
    last_listings: Mutex<HashMap<u64, Weak<Listing>>>,
    /// The memory of all listings, in bytes.
    listings_size: Arc<AtomicUsize>,
}

struct OpenHandle {
    handle: Arc<Handle>,
    /// Returned when the handle is closed.
    _permit: Option<HandlePermit>,
}

/// Number of permits in use.
#[derive(Default)]
struct HandleCounts {
    by_user: HashMap<u32, usize>,
    untrusted: usize,
}

/// A permit to have one more control file or directory open.
pub(super) struct HandlePermit {
    requester: Requester,
    counts: Arc<Mutex<HandleCounts>>,
}

impl Drop for HandlePermit {
    fn drop(&mut self) {
        let mut all = self.counts.lock();
        if !self.requester.is_trusted {
            all.untrusted -= 1;
        }
        let count = all.by_user.remove(&self.requester.uid).unwrap_or(1) - 1;
        if count > 0 {
            all.by_user.insert(self.requester.uid, count);
        }
    }
}

impl Handles {
    /// Opens a disk's file.
    ///
    /// # Errors
    /// `ESTALE` for a disk that is being removed; the other errors of [`DiskFile::open_handle`].
    pub(super) fn add_file(&self, file: DiskFile, access: HandleAccess) -> io::Result<FileHandle> {
        file.open_handle(access)?;
        Ok(self.insert(Handle::Disk { file, access }, None))
    }

    /// Takes a permit for a handle of `requester` other than a disk.
    ///
    /// # Errors
    /// `EMFILE` when that user, or all untrusted users together, have too many.
    pub(super) fn permit(&self, requester: Requester) -> io::Result<HandlePermit> {
        let mut all = self.counts.lock();
        let count = all.by_user.get(&requester.uid).copied().unwrap_or(0);
        if count >= MAX_PER_USER || !requester.is_trusted && all.untrusted >= MAX_UNTRUSTED {
            return Err(os_error(libc::EMFILE));
        }
        all.by_user.insert(requester.uid, count + 1);
        if !requester.is_trusted {
            all.untrusted += 1;
        }
        Ok(HandlePermit { requester, counts: Arc::clone(&self.counts) })
    }

    pub(super) fn add_with_permit(&self, permit: HandlePermit, handle: Handle) -> FileHandle {
        self.insert(handle, Some(permit))
    }

    fn insert(&self, handle: Handle, permit: Option<HandlePermit>) -> FileHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.insert(number, OpenHandle { handle: Arc::new(handle), _permit: permit });
        FileHandle(number)
    }

    /// Returns `text`, or an equal text that another handle already has open.
    pub(super) fn share_text(&self, text: Vec<u8>) -> Arc<Vec<u8>> {
        let mut last = self.last_text.lock();
        if let Some(same) = last.upgrade().filter(|last| **last == text) {
            return same;
        }
        let text = Arc::new(text);
        *last = Arc::downgrade(&text);
        text
    }

    /// Returns `entries` as the listing of the directory `ino` for `requester`, or the equal listing
    /// that another handle already shows.
    ///
    /// # Errors
    /// `EMFILE` for an untrusted user while the listings, as directories change and handles stay
    /// open, take too much memory.
    pub(super) fn share_listing(
        &self,
        requester: Requester,
        ino: u64,
        entries: Vec<DirEntry>,
    ) -> io::Result<Arc<Listing>> {
        let mut last = self.last_listings.lock();
        let same = last.get(&ino).and_then(Weak::upgrade).filter(|last| last.entries == entries);
        if let Some(same) = same {
            return Ok(same);
        }
        let of_entry = |entry: &DirEntry| size_of::<DirEntry>() + entry.name.capacity();
        let size = entries.iter().map(of_entry).sum();
        let total = Arc::clone(&self.listings_size);
        let others = total.fetch_add(size, Ordering::Relaxed);
        let listing = Arc::new(Listing { entries, size, total });
        if !requester.is_trusted && others + size > MAX_LISTINGS_SIZE {
            return Err(os_error(libc::EMFILE));
        }
        last.retain(|_, listing| listing.strong_count() > 0);
        last.insert(ino, Arc::downgrade(&listing));
        Ok(listing)
    }

    pub(super) fn find(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.get(&handle.0).map(|found| Arc::clone(&found.handle))
    }

    /// Returns the disk's file that `handle` has open.
    ///
    /// # Errors
    /// `EBADF`; `EINVAL` for a control file or a directory.
    pub(super) fn find_file(&self, handle: FileHandle) -> io::Result<DiskFile> {
        match self.find(handle).as_deref() {
            Some(Handle::Disk { file, .. }) => Ok(file.clone()),
            Some(_) => Err(os_error(libc::EINVAL)),
            None => Err(os_error(libc::EBADF)),
        }
    }

    pub(super) fn remove(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.remove(&handle.0).map(|(_, open)| open.handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permits_are_limited_per_user_and_for_untrusted_users_and_are_returned() {
        let handles = Handles::default();
        let requester = |uid| Requester { uid, is_trusted: uid == 0 };
        let fill = |uid| {
            let permits = std::iter::from_fn(|| handles.permit(requester(uid)).ok());
            permits.take(MAX_UNTRUSTED).collect::<Vec<_>>()
        };
        let mut others: Vec<Vec<HandlePermit>> = (1..=4).map(fill).collect();
        assert!(others.iter().all(|permits| permits.len() == MAX_PER_USER));
        assert!(handles.permit(requester(5)).is_err());
        assert_eq!(fill(0).len(), MAX_PER_USER);
        others[1].pop();
        assert!(handles.permit(requester(1)).is_err() && handles.permit(requester(5)).is_ok());
        others.clear();
        assert!(handles.counts.lock().by_user.is_empty() && handles.counts.lock().untrusted == 0);
    }

    #[test]
    fn an_unchanged_text_is_shared() {
        let handles = Handles::default();
        let one = handles.share_text(b"a".to_vec());
        assert!(Arc::ptr_eq(&one, &handles.share_text(b"a".to_vec())));
        assert!(!Arc::ptr_eq(&one, &handles.share_text(b"b".to_vec())));
    }

    /// A directory of one file with a name of `len` bytes.
    fn entries(len: usize) -> Vec<DirEntry> {
        vec![DirEntry { name: "x".repeat(len), ino: 7, is_directory: false }]
    }

    #[test]
    fn an_unchanged_listing_is_shared_and_read_again_from_the_start() {
        let handles = Handles::default();
        let requester = Requester { uid: 1, is_trusted: false };
        let list = |ino, len| handles.share_listing(requester, ino, entries(len)).unwrap();
        let one = list(1, 5);
        assert!(Arc::ptr_eq(&one, &list(1, 5)));
        assert!(!Arc::ptr_eq(&one, &list(2, 5)));
        let handle = DirectoryHandle::new(1, Arc::clone(&one));
        let len_at = |offset, now| {
            let read = handle.read(offset, |ino| Ok(list(ino, now))).unwrap();
            read.entries[0].name.len()
        };
        // A change shows only when the reader begins again.
        assert_eq!(
            [(0, 6), (1, 6), (0, 7), (1, 8), (0, 8)].map(|(at, now)| len_at(at, now)),
            [5, 5, 7, 7, 8]
        );
        drop((one, handle));
        assert_eq!(handles.listings_size.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn listings_of_a_directory_that_changes_take_bounded_memory() {
        let handles = Handles::default();
        let list = |uid, len| {
            handles.share_listing(Requester { uid, is_trusted: uid == 0 }, 1, entries(len))
        };
        let lens = (1 << 20)..(1 << 20) + 100;
        let kept: Vec<_> = lens.map_while(|len| list(1, len).ok()).collect();
        assert_eq!(kept.len(), 63);
        assert!(list(2, 1 << 20).is_err() && list(0, 1 << 20).is_ok());
        drop(kept);
        assert!(list(2, 1 << 20).is_ok());
    }
}
