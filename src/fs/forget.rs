//! Has the kernel forget what it knows of a disk that leaves the mount or is another one now.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};

use super::ROOT;
use crate::control::{Forget, Spot, Stale};

/// What tells the kernel, for threads that may wait: a name is forgotten only when nobody looks
/// into its directory.
#[must_use]
pub fn forgetter(notifier: Notifier) -> Forget {
    Arc::new(move |stale: &Stale| {
        if let Err(error) = forget(&notifier, stale) {
            log::debug!("{stale:?}: the kernel forgets it by itself: {error}");
        }
    })
}

fn forget(notifier: &Notifier, stale: &Stale) -> io::Result<()> {
    match stale {
        Stale::Disk { name, ino } => {
            let name = OsStr::new(name);
            let file = notifier.inval_entry(INodeNo(ROOT), name);
            let control = notifier.inval_entry(INodeNo(Spot::Directory.ino()), name);
            // Whoever still points to the file (O_PATH, a bind mount) keeps its pages, and an
            // overlay that comes back has the same inode number.
            let pages = notifier.inval_inode(INodeNo(*ino), 0, 0);
            file.and(control).and(pages)
        }
        Stale::Bytes { ino } => notifier.inval_inode(INodeNo(*ino), 0, 0),
        Stale::Name { parent, name } => notifier.inval_entry(INodeNo(*parent), OsStr::new(name)),
    }
}
