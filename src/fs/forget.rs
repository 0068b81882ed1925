//! Has the kernel forget a disk that leaves the mount while that goes on.

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use fuser::{INodeNo, Notifier};

use super::ROOT;
use crate::control::{Forget, Gone, Spot};

/// What tells the kernel, for threads that may wait: a name is forgotten only when nobody looks
/// into its directory.
#[must_use]
pub fn forgetter(notifier: Notifier) -> Forget {
    Arc::new(move |gone: &Gone| {
        let told = forget(&notifier, gone);
        if let Err(error) = told {
            log::debug!("{}: the kernel forgets it by itself: {error}", gone.name);
        }
    })
}

fn forget(notifier: &Notifier, gone: &Gone) -> io::Result<()> {
    let name = OsStr::new(&gone.name);
    let file = notifier.inval_entry(INodeNo(ROOT), name);
    let control = notifier.inval_entry(INodeNo(Spot::Directory.ino()), name);
    // Whoever still points to the file (O_PATH, a bind mount) keeps its pages, and an overlay that
    // comes back has the same inode number.
    let pages = notifier.inval_inode(INodeNo(gone.ino), 0, 0);
    file.and(control).and(pages)
}
