//! Passthrough: the kernel reads and writes the single host file behind a disk without asking this
//! daemon.
//!
//! ```text
//!   read, write, splice, mmap                     kernel ──────────────▶ host file
//!   lseek, truncate, fallocate, fsync, stat, copy kernel ─▶ this daemon ─▶ host file
//! ```
//!
//! The kernel's rules: a file is registered once for an inode, and that registration (a
//! `BackingId`) stays while any open uses it; an inode has passthrough opens or cached opens, but
//! never both. So the mode of an inode is decided at its first open and holds until its last
//! RELEASE. A disk that cannot be passed through (the daemon lacks CAP_SYS_ADMIN, the host file is
//! on a stacked file system, the kernel is older) is served like any other until then; the next
//! first open tries again. An open that must not write past this daemon, because the disk has
//! latched, is direct: the kernel allows direct opens beside passthrough.
//!
//! A mapping outlives its RELEASE here: it maps the host file itself, and keeps that file's mount
//! busy.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::Arc;

use fuser::{BackingId, InitFlags, KernelConfig};
use parking_lot::Mutex;

use crate::config::CacheMode;
use crate::disk::Disk;

/// Largest stack depth of backing files: they may not lie on stacked file systems, and one stacked
/// file system may lie on this mount.
const MAX_STACK_DEPTH: u32 = 1;

/// Requests passthrough from the kernel, unless the kernel keeps dirty pages itself: the two
/// exclude each other.
pub(super) fn negotiate(config: &mut KernelConfig, cache: CacheMode) {
    if cache != CacheMode::Auto {
        return;
    }
    if config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).is_err() {
        log::info!("this kernel's FUSE has no passthrough");
        return;
    }
    // The call fails only above the kernel's limit, which is 2.
    let _ = config.set_max_stack_depth(MAX_STACK_DEPTH);
}

/// How an open of a disk is answered.
pub(super) enum OpenMode {
    /// Served by this daemon, like a disk of several host files.
    Served,
    /// Direct, past the kernel's cache, beside opens that are passed through.
    Direct,
    /// Passed through to the host file.
    Passthrough(Arc<BackingId>),
}

/// An inode that could be passed through, from its first open to its last RELEASE.
struct PassthroughInode {
    opens: u64,
    /// The registered host file. `None`: the kernel refused, and the disk is served.
    backing: Option<Arc<BackingId>>,
}

/// The open inodes that could be passed through, by inode number.
#[derive(Default)]
pub(super) struct PassthroughInodes {
    inodes: Mutex<HashMap<u64, PassthroughInode>>,
}

impl PassthroughInodes {
    /// Counts an open of `disk` and decides how to answer it; `register` registers a file with the
    /// kernel. Each call is matched by one of [`release`](Self::release).
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
        // Held during the registration: two concurrent first opens must not register the file
        // twice.
        let mut inodes = self.inodes.lock();
        let inode = inodes.entry(disk.ino()).or_insert_with(|| {
            let backing = register(&file).map(Arc::new);
            if let Err(error) = &backing {
                log::info!("{}: served without passthrough: {error}", disk.source);
            }
            PassthroughInode { opens: 0, backing: backing.ok() }
        });
        inode.opens += 1;
        match &inode.backing {
            None => OpenMode::Served,
            Some(_) if disk.is_latched() => OpenMode::Direct,
            Some(backing) => OpenMode::Passthrough(Arc::clone(backing)),
        }
    }

    /// Counts a release of an open.
    pub(super) fn release(&self, ino: u64) {
        let mut inodes = self.inodes.lock();
        let Some(inode) = inodes.get_mut(&ino) else {
            return;
        };
        inode.opens -= 1;
        if inode.opens == 0 {
            // The kernel dropped the file before it sent the RELEASE, so the next first open
            // may register it anew.
            inodes.remove(&ino);
        }
    }

    /// Whether the kernel bypasses this daemon for the inode `ino`, and so holds no pages of it.
    pub(super) fn is_active(&self, ino: u64) -> bool {
        self.inodes.lock().get(&ino).is_some_and(|inode| inode.backing.is_some())
    }
}
