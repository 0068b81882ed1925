//! Open handles: what the kernel's `fh` numbers stand for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use fuser::FileHandle;

use crate::control::{MapText, Session, Spot};
use crate::disk::{Access, Disk, Shown};

/// One open file or directory.
pub(super) enum Handle {
    /// A disk, or a window of one.
    Disk { shown: Shown, access: Access },
    /// A text as it was when it was opened.
    Text(Vec<u8>),
    /// The log, from this offset of all that was ever logged.
    Log(u64),
    /// A map, made while it is read.
    Map { text: Arc<MapText>, disk: Arc<Disk> },
    /// A control file.
    Ctl { session: Arc<Session>, spot: Spot },
    /// A directory, as it was when it was opened.
    Directory(Vec<(String, u64, fuser::FileType)>),
}

/// All open handles of a mount.
#[derive(Default)]
pub(super) struct Handles {
    open: DashMap<u64, Arc<Handle>>,
    next: AtomicU64,
}

impl Handles {
    pub(super) fn add(&self, handle: Handle) -> FileHandle {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.insert(number, Arc::new(handle));
        FileHandle(number)
    }

    pub(super) fn find(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.get(&handle.0).map(|found| Arc::clone(&found))
    }

    pub(super) fn remove(&self, handle: FileHandle) -> Option<Arc<Handle>> {
        self.open.remove(&handle.0).map(|(_, handle)| handle)
    }
}
