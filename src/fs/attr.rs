//! Attributes of the mount's files, as FUSE encodes them.

use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo, ReplyAttr};

use super::{CowslipFs, ROOT_INO};
use crate::control::ControlNode;
use crate::disk::{Attributes, DiskOwner, FsSpace};

/// How long the kernel may cache an answer. Every change comes through the kernel, so it notices by
/// itself; one second bounds the changes that it cannot see (space freed in the background).
pub(super) const ATTR_TTL: Duration = Duration::from_secs(1);
/// Cache time of answers that change without the kernel's knowledge: none. A name below `.cowslip`
/// means another disk as soon as disks are renamed, removed or cloned, and a command must not act
/// on the previous one.
pub(super) const NO_TTL: Duration = Duration::ZERO;

/// Encodes the attributes of a disk.
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
        nlink: found.nlink,
        uid: found.owner.uid,
        gid: found.owner.gid,
        rdev: 0,
        blksize: found.blksize,
        flags: 0,
    }
}

fn synthetic_attr(ino: u64, kind: FileType, owner: DiskOwner, time: SystemTime) -> FileAttr {
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

/// Returns the space on the file system of `dir`; zeros without one.
pub(super) fn space_of(dir: Option<&Path>) -> io::Result<FsSpace> {
    let Some(dir) = dir else {
        return Ok(FsSpace { total: 0, free: 0, available: 0 });
    };
    let found = rustix::fs::statvfs(dir)?;
    Ok(FsSpace {
        total: found.f_blocks * found.f_frsize,
        free: found.f_bfree * found.f_frsize,
        available: found.f_bavail * found.f_frsize,
    })
}

impl CowslipFs {
    fn mount_owner(&self, perm: u16) -> DiskOwner {
        let (uid, gid) = self.shared.owner;
        DiskOwner { uid, gid, perm }
    }

    /// The attributes of the mount's root.
    pub(super) fn root_attr(&self) -> FileAttr {
        synthetic_attr(
            ROOT_INO,
            FileType::Directory,
            self.mount_owner(0o755),
            self.shared.mounted_at,
        )
    }

    /// Returns the attributes of a control file; `None` when its disk has left the mount.
    pub(super) fn node_attr(&self, node: ControlNode) -> Option<FileAttr> {
        let of_disk = |slot| {
            let disk = self.shared.catalog.disk_by_slot(slot)?.1;
            Some(disk.disk.owner())
        };
        let owner = match node {
            ControlNode::Directory => self.mount_owner(0o755),
            ControlNode::Status | ControlNode::Log => self.mount_owner(0o400),
            ControlNode::Ctl => self.mount_owner(0o600),
            ControlNode::DiskCtl(slot) => of_disk(slot).map(|_| self.mount_owner(0o600))?,
            ControlNode::Disk(slot) | ControlNode::Snapshots(slot) => {
                let owner = of_disk(slot)?;
                // Users who may read the disk may also list its directory.
                DiskOwner { perm: owner.perm | (owner.perm & 0o444) >> 2, ..owner }
            }
            ControlNode::DiskStatus(slot) | ControlNode::DiskMap(slot) => {
                let owner = of_disk(slot)?;
                DiskOwner { perm: owner.perm & 0o444, ..owner }
            }
        };
        let kind = if node.is_directory() { FileType::Directory } else { FileType::RegularFile };
        Some(synthetic_attr(node.ino(), kind, owner, self.shared.mounted_at))
    }

    /// Answers a change of a control file's attributes, which has no effect, with the current ones.
    pub(super) fn getattr_of_node(&self, ino: INodeNo, reply: ReplyAttr) {
        match ControlNode::from_ino(ino.0).and_then(|node| self.node_attr(node)) {
            Some(attr) => reply.attr(&ATTR_TTL, &attr),
            None => reply.error(fuser::Errno::ENOENT),
        }
    }
}
