//! What stat(2) says of the mount's files, in the kernel's terms.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo, ReplyAttr};

use super::{CowslipFs, ROOT};
use crate::control::Spot;
use crate::disk::{Attributes, Owner, Space};

/// How long the kernel may believe an answer. Every change comes through it, so it knows better
/// by itself; a second bounds what it cannot know (space given back in the background).
pub(super) const TTL: Duration = Duration::from_secs(1);
/// For what changes without the kernel's knowledge. A name below `.cowslip` leads to another disk as
/// soon as disks are renamed, removed or cloned, and a command must not act on the one before.
pub(super) const NO_TIME: Duration = Duration::ZERO;

/// The attributes of a disk.
pub(super) fn of_disk(ino: u64, found: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: found.size,
        blocks: found.allocated.div_ceil(512),
        atime: found.atime,
        mtime: found.mtime,
        ctime: found.ctime,
        crtime: found.ctime,
        kind: FileType::RegularFile,
        perm: found.owner.perm,
        nlink: found.links,
        uid: found.owner.uid,
        gid: found.owner.gid,
        rdev: 0,
        blksize: found.block,
        flags: 0,
    }
}

fn plain(ino: u64, kind: FileType, owner: Owner, time: SystemTime) -> FileAttr {
    FileAttr {
        ino: INodeNo(ino),
        size: 0,
        blocks: 0,
        atime: time,
        mtime: time,
        ctime: time,
        crtime: time,
        kind,
        perm: owner.perm,
        nlink: if kind == FileType::Directory { 2 } else { 1 },
        uid: owner.uid,
        gid: owner.gid,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// Space on the file system of `dir`, or none.
pub(super) fn space_of(dir: Option<&Path>) -> io::Result<Space> {
    let Some(dir) = dir else {
        return Ok(Space { total: 0, free: 0, available: 0 });
    };
    let found = rustix::fs::statvfs(dir)?;
    Ok(Space {
        total: found.f_blocks * found.f_frsize,
        free: found.f_bfree * found.f_frsize,
        available: found.f_bavail * found.f_frsize,
    })
}

impl CowslipFs {
    fn owned(&self, perm: u16) -> Owner {
        let (uid, gid) = self.shared.owner;
        Owner { uid, gid, perm }
    }

    /// The attributes of the mount's root.
    pub(super) fn root_attr(&self) -> FileAttr {
        plain(ROOT, FileType::Directory, self.owned(0o755), self.shared.mounted)
    }

    /// The attributes of a control file; `None` when its disk is gone.
    pub(super) fn spot_attr(&self, spot: Spot) -> Option<FileAttr> {
        let of_disk = |slot| {
            let disk = self.shared.catalog.slot(slot)?.1;
            Some(disk.disk.owner())
        };
        let owner = match spot {
            Spot::Directory => self.owned(0o755),
            Spot::Status | Spot::Log => self.owned(0o400),
            Spot::Ctl => self.owned(0o600),
            Spot::DiskCtl(slot) => of_disk(slot).map(|_| self.owned(0o600))?,
            Spot::Disk(slot) | Spot::Snapshots(slot) => {
                let owner = of_disk(slot)?;
                // Whoever may read the disk may look into its directory.
                Owner { perm: owner.perm | (owner.perm & 0o444) >> 2, ..owner }
            }
            Spot::DiskStatus(slot) | Spot::DiskMap(slot) => {
                let owner = of_disk(slot)?;
                Owner { perm: owner.perm & 0o444, ..owner }
            }
        };
        let kind = if spot.is_directory() { FileType::Directory } else { FileType::RegularFile };
        Some(plain(spot.ino(), kind, owner, self.shared.mounted))
    }

    /// Answers a change of a control file's attributes, which changes nothing.
    pub(super) fn getattr_of_spot(&self, ino: INodeNo, reply: ReplyAttr) {
        match Spot::of(ino.0).and_then(|spot| self.spot_attr(spot)) {
            Some(attr) => reply.attr(&TTL, &attr),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }
}
