//! Passthrough: the kernel reads and writes the one host file that a disk is, without asking us.
//!
//! ```text
//!   read, write, splice, mmap                     kernel ──────────────▶ host file
//!   lseek, truncate, fallocate, fsync, stat, copy kernel ─▶ this daemon ─▶ host file
//! ```
//!
//! The kernel's rules: the file is registered once for an inode, and that registration (a
//! `BackingId`) stays while any open uses it; an inode has opens of this kind or cached ones, but
//! never both. So what a disk does is settled at its first open and holds until its last RELEASE:
//! the *term* of that inode. A disk that cannot be passed through (the daemon lacks CAP_SYS_ADMIN,
//! the host file is on a stacked file system, the kernel is older) is served as any other, and the
//! next term asks again. An open that must not write past us, since the disk has latched, comes
//! direct: the kernel lets those mix.
//!
//! A mapping outlives its RELEASE here: it is one of the host file itself, and keeps its mount
//! busy.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use fuser::{BackingId, InitFlags, KernelConfig};
use parking_lot::Mutex;

use crate::config::CacheMode;
use crate::disk::Disk;

/// Host files may not lie on stacked file systems, and one of those may lie on this mount.
const MAX_STACK_DEPTH: u32 = 1;

/// Asks the kernel for passthrough, unless it keeps dirty pages itself: the two do not go together.
pub(super) fn negotiate(config: &mut KernelConfig, cache: CacheMode) {
    if cache != CacheMode::Auto {
        return;
    }
    if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() {
        log::info!("this kernel's FUSE has no passthrough");
        return;
    }
    // It refuses only more than the kernel's limit, which is 2.
    let _ = config.set_max_stack_depth(MAX_STACK_DEPTH);
}

/// How an open of a disk is answered.
pub(super) enum OpenMode {
    /// As disks are that are more than one file.
    Served,
    /// Past the kernel's cache, though other opens are passed through.
    Direct,
    /// With the host file.
    Passthrough(Arc<BackingId>),
}

/// From an inode's first open to its last RELEASE.
struct PassthroughInode {
    opens: u64,
    /// `None`: served, because the kernel refused.
    backing: Option<Arc<BackingId>>,
}

/// The terms of all inodes that could be passed through, by inode number.
#[derive(Default)]
pub(super) struct PassthroughInodes {
    inodes: Mutex<HashMap<u64, PassthroughInode>>,
}

impl PassthroughInodes {
    /// Counts an open of `disk` in and says how it is to be answered; `register` hands a file to
    /// the kernel. Each call is matched by one of [`release`](Self::release).
    pub(super) fn open(
        &self,
        disk: &Disk,
        cache: CacheMode,
        register: impl FnOnce(&File) -> io::Result<BackingId>,
    ) -> OpenMode {
        if cache != CacheMode::Auto {
            return OpenMode::Served;
        }
        let Some(file) = disk.passthrough_file() else {
            return OpenMode::Served;
        };
        // Held while the kernel takes the file: two first opens must not register it twice.
        let mut open = self.inodes.lock();
        let term = open.entry(disk.ino()).or_insert_with(|| {
            let backing = register(&file).map(Arc::new);
            if let Err(error) = &backing {
                log::info!("{}: served without passthrough: {error}", disk.source);
            }
            PassthroughInode { opens: 0, backing: backing.ok() }
        });
        term.opens += 1;
        match &term.backing {
            None => OpenMode::Served,
            Some(_) if disk.is_latched() => OpenMode::Direct,
            Some(backing) => OpenMode::Passthrough(Arc::clone(backing)),
        }
    }

    /// An open was released.
    pub(super) fn release(&self, ino: u64) {
        let mut open = self.inodes.lock();
        let Some(term) = open.get_mut(&ino) else {
            return;
        };
        term.opens -= 1;
        if term.opens == 0 {
            // The kernel has let go of the file before it said so: the next term may register anew.
            open.remove(&ino);
        }
    }

    /// Whether the kernel goes past us for this inode, and so holds no pages of it.
    pub(super) fn is_active(&self, ino: u64) -> bool {
        self.inodes.lock().get(&ino).is_some_and(|term| term.backing.is_some())
    }
}
