//! Attributes of the mount's files and the space behind them, as FUSE encodes them.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{Errno, FileAttr, FileType, INodeNo, ReplyAttr, ReplyStatfs};

use super::context::{CowslipFs, FsContext};
use super::nodes::{Node, Nodes, ROOT_INO};
use crate::control::ControlNode;
use crate::disk::{Attributes, Disk, DiskFile, DiskOwner, FsSpace};
use crate::name::MAX_NAME_LEN;

/// How long the kernel may cache an answer. Every change comes through the kernel, so it notices by
/// itself; one second bounds the changes that it cannot see (space freed in the background).
pub(super) const ATTR_TTL: Duration = Duration::from_secs(1);
/// Cache time of answers that change without the kernel's knowledge: none. A name below `.cowslip`
/// means another disk as soon as disks are renamed, removed or cloned, and a command must not act
/// on the previous one.
pub(super) const NO_TTL: Duration = Duration::ZERO;

/// How long the kernel may cache the attributes of a file. It does not see every change of a file
/// whose bytes are shown by other files as well.
pub(super) fn attr_ttl(file: &DiskFile) -> Duration {
    if file.disk().partition_files().is_empty() { ATTR_TTL } else { NO_TTL }
}

/// Permission bits that a mode may set. Set-id bits are excluded: the mount is `nosuid`, and so a
/// write has none to clear.
pub(super) const PERM_MASK: u32 = 0o1777;

/// The type of a node.
pub(super) fn file_type(is_directory: bool) -> FileType {
    if is_directory { FileType::Directory } else { FileType::RegularFile }
}

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

/// Encodes the attributes of the mount's root; `time` is the time of the mount.
pub(super) fn of_root(nodes: &Nodes, time: SystemTime) -> FileAttr {
    synthetic_attr(ROOT_INO, FileType::Directory, nodes.root_owner(), time)
}

/// Encodes the attributes of a control file; `None` when its disk has left the mount.
fn of_control(nodes: &Nodes, node: ControlNode, time: SystemTime) -> Option<FileAttr> {
    let owner = nodes.control_owner(node)?;
    Some(synthetic_attr(node.ino(), file_type(node.is_directory()), owner, time))
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
fn space_of(dir: Option<&Path>) -> io::Result<FsSpace> {
    let Some(dir) = dir else {
        return Ok(FsSpace { total: 0, free: 0, available: 0 });
    };
    Ok(FsSpace::from(rustix::fs::statvfs(dir)?))
}

impl CowslipFs {
    /// Replies with the attributes of `file`.
    pub(super) fn reply_attr(&self, file: &DiskFile, reply: ReplyAttr) {
        let (ino, ttl, target) = (file.ino(), attr_ttl(file), file.clone());
        let work = move |_: &Disk, wait| target.attributes(wait);
        self.query_or_defer(file.disk(), reply, work, move |reply, found: Attributes| {
            reply.attr(&ttl, &of_disk(ino, &found));
        });
    }

    /// Returns the attributes of a control file; `None` when its disk has left the mount.
    pub(super) fn control_attr(&self, node: ControlNode) -> Option<FileAttr> {
        of_control(&self.nodes, node, self.shared.mounted_at)
    }

    /// Replies with the attributes of a control file.
    pub(super) fn reply_control_attr(&self, node: ControlNode, reply: ReplyAttr) {
        match self.control_attr(node) {
            Some(attr) => reply.attr(&ATTR_TTL, &attr),
            None => reply.error(Errno::ENOENT),
        }
    }

    /// Replies with the space on the file system behind the inode `ino`: of its disk's, else of the
    /// first disk's, else of the store's.
    pub(super) fn reply_space(&self, ino: u64, reply: ReplyStatfs) {
        let disk = match self.nodes.by_ino(ino) {
            Ok(Node::File(file)) => Some(Arc::clone(file.disk())),
            _ => self.shared.catalog.list().first().map(|(_, entry)| Arc::clone(&entry.disk)),
        };
        let block = disk.as_ref().map_or(4096, |disk| disk.block_size());
        let work = move |shared: &FsContext| match disk {
            Some(disk) => disk.space(),
            None => space_of(shared.catalog.store_dir()),
        };
        self.run_on_mount_pool(reply, work, move |reply, space| {
            let unit = u64::from(block);
            let files = 1 << 20;
            reply.statfs(
                space.total / unit,
                space.free / unit,
                space.available / unit,
                files,
                files,
                block,
                u32::try_from(MAX_NAME_LEN).unwrap_or(u32::MAX),
                block,
            );
        });
    }
}
