//! Has the kernel forget what it knows of a disk that leaves the mount or is another one now.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};

use super::ROOT;
use crate::control::{Forget, Stale};

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
        Stale::Disk { files } => all(files.iter().map(|(name, ino)| {
            let file = notifier.inval_entry(INodeNo(ROOT), OsStr::new(name));
            // Whoever still points to the file (O_PATH, a bind mount) keeps its pages, and an
            // overlay that comes back has the same inode number.
            file.and(notifier.inval_inode(INodeNo(*ino), 0, 0))
        })),
        Stale::Bytes { inos } => {
            all(inos.iter().map(|ino| notifier.inval_inode(INodeNo(*ino), 0, 0)))
        }
        Stale::Name { parent, name } => notifier.inval_entry(INodeNo(*parent), OsStr::new(name)),
    }
}

/// All of it is done, whatever fails; the first error.
fn all(done: impl Iterator<Item = io::Result<()>>) -> io::Result<()> {
    done.fold(Ok(()), io::Result::and)
}
