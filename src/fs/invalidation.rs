//! Invalidation of the kernel's cache for a disk that leaves the mount or has other contents.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};

use super::ROOT_INO;
use crate::control::{Invalidation, Invalidator};

/// Builds the function that tells the kernel, for threads that may wait: the kernel drops a name
/// only while nobody looks up names in its directory.
#[must_use]
pub fn kernel_invalidator(notifier: Notifier) -> Invalidator {
    Arc::new(move |stale: &Invalidation| {
        if let Err(error) = invalidate(&notifier, stale) {
            log::debug!("{stale:?}: the kernel forgets it by itself: {error}");
        }
    })
}

fn invalidate(notifier: &Notifier, stale: &Invalidation) -> io::Result<()> {
    match stale {
        Invalidation::Disk { files } => first_error(files.iter().map(|(name, ino)| {
            let file = notifier.inval_entry(INodeNo(ROOT_INO), OsStr::new(name));
            // A process that still refers to the file (O_PATH, a bind mount) keeps its pages, and
            // an overlay that is mounted again has the same inode number.
            file.and(notifier.inval_inode(INodeNo(*ino), 0, 0))
        })),
        Invalidation::Bytes { inos } => {
            first_error(inos.iter().map(|ino| notifier.inval_inode(INodeNo(*ino), 0, 0)))
        }
        Invalidation::Name { parent, name } => {
            notifier.inval_entry(INodeNo(*parent), OsStr::new(name))
        }
    }
}

/// Runs all of `done`, whatever fails, and returns the first error.
fn first_error(done: impl Iterator<Item = io::Result<()>>) -> io::Result<()> {
    done.fold(Ok(()), io::Result::and)
}
