//! Open handles: what the kernel's `fh` numbers stand for.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use dashmap::DashMap;
use fuser::FileHandle;
use parking_lot::Mutex;

use crate::control::{MapText, Session, Spot};
use crate::disk::{Access, Disk, Shown};
use crate::host::errno;

/// Control files and directories that one user has open at a time in a mount: more than any use
/// needs, and some kilobytes each.
const MOST: usize = 1024;
/// As many for all users together who neither mounted nor are root: one user may be many.
const MOST_OF_OTHERS: usize = 4 * MOST;

/// One open file or directory.
pub(super) enum Handle {
    /// A disk, or a window of one.
    Disk { shown: Shown, access: Access },
    /// A text as it was when it was opened.
    Text(Arc<Vec<u8>>),
    /// The log, from this offset of all that was ever logged.
    Log(u64),
    /// A map, made while it is read.
    Map { text: Arc<MapText>, disk: Arc<Disk> },
    /// A control file.
    Ctl { session: Arc<Session>, spot: Spot },
    /// A directory, as it was when it was opened.
    Directory(Vec<(String, u64, fuser::FileType)>),
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Asker {
    pub(super) uid: u32,
    /// Who mounted, or root.
    pub(super) is_trusted: bool,
}

/// All open handles of a mount.
#[derive(Default)]
pub(super) struct Handles {
    open: DashMap<u64, Open>,
    next: AtomicU64,
    places: Arc<Mutex<Places>>,
    /// The text that was made last: while nothing changes, all who open it share it.
    last: Mutex<Weak<Vec<u8>>>,
}

struct Open {
    handle: Arc<Handle>,
    /// Given back when it is closed.
    _place: Option<Place>,
}

/// How many have a place.
#[derive(Default)]
struct Places {
    of: HashMap<u32, usize>,
    others: usize,
}

/// The right to have one more control file or directory open.
pub(super) struct Place {
    asker: Asker,
    all: Arc<Mutex<Places>>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut all = self.all.lock();
        if !self.asker.is_trusted {
            all.others -= 1;
        }
        let count = all.of.remove(&self.asker.uid).unwrap_or(1) - 1;
        if count > 0 {
            all.of.insert(self.asker.uid, count);
        }
    }
}

impl Handles {
    pub(super) fn add(&self, handle: Handle) -> FileHandle {
        self.insert(handle, None)
    }

    /// A place for a handle of `asker` that is no disk.
    ///
    /// # Errors
    /// `EMFILE` when he has, or all others together have, too many.
    pub(super) fn place(&self, asker: Asker) -> io::Result<Place> {
        let mut all = self.places.lock();
        let count = all.of.get(&asker.uid).copied().unwrap_or(0);
        if count >= MOST || !asker.is_trusted && all.others >= MOST_OF_OTHERS {
            return Err(errno(libc::EMFILE));
        }
        all.of.insert(asker.uid, count + 1);
        if !asker.is_trusted {
            all.others += 1;
        }
        Ok(Place { asker, all: Arc::clone(&self.places) })
    }

    pub(super) fn add_at(&self, place: Place, handle: Handle) -> FileHandle {
        self.insert(handle, Some(place))
    }

    fn insert(&self, handle: Handle, place: Option<Place>) -> FileHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.insert(number, Open { handle: Arc::new(handle), _place: place });
        FileHandle(number)
    }

    /// `text`, or the same one that somebody has open already.
    pub(super) fn share(&self, text: Vec<u8>) -> Arc<Vec<u8>> {
        let mut last = self.last.lock();
        if let Some(same) = last.upgrade().filter(|last| **last == text) {
            return same;
        }
        let text = Arc::new(text);
        *last = Arc::downgrade(&text);
        text
    }

    pub(super) fn find(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.get(&handle.0).map(|found| Arc::clone(&found.handle))
    }

    pub(super) fn remove(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.remove(&handle.0).map(|(_, open)| open.handle)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_bounded_for_each_user_and_for_all_others_and_come_back() {
        let handles = Handles::default();
        let asker = |uid| Asker { uid, is_trusted: uid == 0 };
        let fill = |uid| {
            let places = std::iter::from_fn(|| handles.place(asker(uid)).ok());
            places.take(MOST_OF_OTHERS).collect::<Vec<_>>()
        };
        let mut others: Vec<Vec<Place>> = (1..=4).map(fill).collect();
        assert!(others.iter().all(|places| places.len() == MOST));
        assert!(handles.place(asker(5)).is_err());
        assert_eq!(fill(0).len(), MOST);
        others[1].pop();
        assert!(handles.place(asker(1)).is_err() && handles.place(asker(5)).is_ok());
        others.clear();
        assert!(handles.places.lock().of.is_empty() && handles.places.lock().others == 0);
    }

    #[test]
    fn a_text_that_has_not_changed_is_shared() {
        let handles = Handles::default();
        let one = handles.share(b"a".to_vec());
        assert!(Arc::ptr_eq(&one, &handles.share(b"a".to_vec())));
        assert!(!Arc::ptr_eq(&one, &handles.share(b"b".to_vec())));
    }
}
