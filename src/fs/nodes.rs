//! The names, directories and owners that a mount shows, apart from FUSE: what a lookup finds, what
//! a directory lists, who owns a control file.
//!
//! ```text
//!   MNT                        Node::Root      ino 1
//!   MNT/disk.img, disk.img.p1  Node::File      a disk or a partition file, from the catalog
//!   MNT/.cowslip/...           Node::Control   found by name, not listed
//!   .../snapshots/NAME         a disk, opened when it is looked up
//! ```

use std::ffi::OsStr;
use std::io;
use std::sync::Arc;

use crate::catalog::Catalog;
use crate::control::ControlNode;
use crate::disk::{DiskFile, DiskOwner};
use crate::host::os_error;
use crate::name::{CONTROL_DIR, MAX_NAME_LEN};

/// Inode number of the mount's root directory.
pub(super) const ROOT_INO: u64 = 1;

/// A file or directory of the mount.
pub(super) enum Node {
    /// The root directory.
    Root,
    /// A control file or directory; its disk may have left.
    Control(ControlNode),
    /// A disk, a partition file, or a snapshot that was looked up.
    File(DiskFile),
}

/// The result of looking up a name.
pub(super) enum FoundName {
    /// A control file or directory.
    Control(ControlNode),
    /// A disk or a partition file. The lookup of a disk is [counted](Catalog::look_up).
    File(DiskFile),
    /// A name in the directory of a disk's snapshots, which may or may not exist: finding out may
    /// take a while.
    Snapshot {
        /// The slot of the disk.
        slot: u64,
        /// The name of the snapshot.
        name: String,
    },
}

/// An entry of a directory's listing.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct DirEntry {
    pub(super) name: String,
    pub(super) ino: u64,
    pub(super) is_directory: bool,
}

/// The nodes of a mount.
pub(super) struct Nodes {
    catalog: Arc<Catalog>,
    /// User id and group id of the user who mounted.
    owner: (u32, u32),
}

/// Returns the name as text; no disk's name is anything else.
///
/// # Errors
/// `EINVAL`.
pub(super) fn utf8_name(name: &OsStr) -> io::Result<&str> {
    name.to_str().ok_or_else(|| os_error(libc::EINVAL))
}

impl Nodes {
    /// The nodes of the mount that shows `catalog` and belongs to `owner`, a user id and a group
    /// id.
    pub(super) fn new(catalog: Arc<Catalog>, owner: (u32, u32)) -> Self {
        Self { catalog, owner }
    }

    /// Returns the node with inode number `ino`.
    ///
    /// # Errors
    /// `ESTALE` for a file that has left the mount, so that the kernel looks the name up again.
    pub(super) fn by_ino(&self, ino: u64) -> io::Result<Node> {
        if ino == ROOT_INO {
            return Ok(Node::Root);
        }
        if let Some(node) = ControlNode::from_ino(ino) {
            return Ok(Node::Control(node));
        }
        self.catalog.file_by_ino(ino).map(Node::File).ok_or_else(|| os_error(libc::ESTALE))
    }

    /// Looks up `name` in the directory `parent` for the kernel.
    ///
    /// # Errors
    /// `ENOENT`; `ENAMETOOLONG` for a name that no disk can have.
    pub(super) fn look_up(&self, parent: u64, name: &OsStr) -> io::Result<FoundName> {
        let not_found = || os_error(libc::ENOENT);
        let name = name.to_str().ok_or_else(not_found)?;
        if parent != ROOT_INO {
            return match ControlNode::from_ino(parent).ok_or_else(not_found)? {
                ControlNode::Snapshots(slot) => {
                    Ok(FoundName::Snapshot { slot, name: name.to_owned() })
                }
                node => {
                    node.child(name, &self.catalog).map(FoundName::Control).ok_or_else(not_found)
                }
            };
        }
        if name == CONTROL_DIR {
            return Ok(FoundName::Control(ControlNode::Directory));
        }
        if name.len() > MAX_NAME_LEN {
            return Err(os_error(libc::ENAMETOOLONG));
        }
        self.catalog.look_up(name).map(FoundName::File).ok_or_else(not_found)
    }

    /// Lists the entries of the directory `ino`, without `.cowslip`.
    ///
    /// # Errors
    /// `ENOTDIR`; `ENOENT` for the snapshots of a disk that has left the mount.
    pub(super) fn list(&self, ino: u64) -> io::Result<Vec<DirEntry>> {
        let entry = |name: String, ino| DirEntry { name, ino, is_directory: false };
        let directory =
            |name: &str, ino| DirEntry { name: name.to_owned(), ino, is_directory: true };
        let mut all = vec![directory(".", ino), directory("..", ROOT_INO)];
        if ino == ROOT_INO {
            for (name, found) in self.catalog.list() {
                let partitions = found.disk.partition_files().iter();
                let partitions: Vec<_> =
                    partitions.map(|part| entry(part.name(&name), part.ino())).collect();
                all.push(entry(name, found.disk.ino()));
                all.extend(partitions);
            }
            return Ok(all);
        }
        let node = ControlNode::from_ino(ino).filter(|node| node.is_directory());
        let node = node.ok_or_else(|| os_error(libc::ENOTDIR))?;
        if let ControlNode::Snapshots(slot) = node {
            let (_, found) =
                self.catalog.disk_by_slot(slot).ok_or_else(|| os_error(libc::ENOENT))?;
            let names = found.disk.snapshot_names().into_iter();
            // A client that wants the inode number looks the name up.
            all.extend(names.map(|name| entry(name, u64::MAX)));
            return Ok(all);
        }
        let children = node.children(&self.catalog).into_iter();
        all.extend(children.map(|(name, child)| DirEntry {
            name,
            ino: child.ino(),
            is_directory: child.is_directory(),
        }));
        Ok(all)
    }

    /// Whether [`list`](Self::list) may wait for the host to list the directory `ino`: only the
    /// snapshots of a disk.
    pub(super) fn waits_to_list(ino: u64) -> bool {
        matches!(ControlNode::from_ino(ino), Some(ControlNode::Snapshots(_)))
    }

    /// Whether `uid` is trusted with requests and with facts about the host: root and the user who
    /// mounted.
    pub(super) fn is_trusted(&self, uid: u32) -> bool {
        uid == 0 || uid == self.owner.0
    }

    /// The owner and mode of the root directory.
    pub(super) fn root_owner(&self) -> DiskOwner {
        self.mount_owner(0o755)
    }

    fn mount_owner(&self, perm: u16) -> DiskOwner {
        let (uid, gid) = self.owner;
        DiskOwner { uid, gid, perm }
    }

    /// Returns the owner and mode of a control file; `None` when its disk has left the mount.
    pub(super) fn control_owner(&self, node: ControlNode) -> Option<DiskOwner> {
        let of_disk = |slot| Some(self.catalog.disk_by_slot(slot)?.1.disk.owner());
        Some(match node {
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
        })
    }
}

/// A mount without a kernel, for tests.
#[cfg(test)]
pub(super) mod testing {
    use std::path::Path;

    use super::*;
    use crate::base::partitions::testing::put_entry;
    use crate::catalog::DiskOrigin;
    use crate::config::{DiskSource, DiskSpec};
    use crate::disk::{OpenContext, open};
    use crate::layer::Wait;

    /// The user who mounted.
    pub(in crate::fs) const OWNER: (u32, u32) = (1000, 100);

    /// Creates the nodes of a mount with the blank disk `d`, which has one partition when
    /// `is_partitioned`, and returns the disk's slot.
    pub(in crate::fs) fn mount_of_one_disk(is_partitioned: bool) -> (Nodes, u64) {
        let spec = DiskSpec::new("d".to_owned(), DiskSource::Blank(1 << 20));
        let disk = open(&spec, &OpenContext::unmounted()).unwrap().disk;
        if is_partitioned {
            let mut table = vec![0; 512];
            put_entry(&mut table, 0, 0, (0x83, 8, 16));
            disk.write(&table, 0, Wait::Yes).unwrap();
            disk.show_partitions("d").unwrap();
        }
        let catalog = Catalog::new(Path::new("/mnt"), None);
        let slot = catalog.add("d", Arc::new(disk), DiskOrigin::Given).unwrap().slot;
        (Nodes::new(Arc::new(catalog), OWNER), slot)
    }

    /// The file `name` in the root directory.
    pub(in crate::fs) fn file(nodes: &Nodes, name: &str) -> DiskFile {
        match nodes.look_up(ROOT_INO, OsStr::new(name)) {
            Ok(FoundName::File(file)) => file,
            _ => panic!("{name} is no disk"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::testing::{OWNER, file, mount_of_one_disk};
    use super::*;

    fn ino_of(found: FoundName) -> u64 {
        match found {
            FoundName::Control(node) => node.ino(),
            FoundName::File(file) => file.ino(),
            FoundName::Snapshot { .. } => u64::MAX,
        }
    }

    fn errno_of<T>(result: io::Result<T>) -> Option<i32> {
        result.err()?.raw_os_error()
    }

    #[test]
    fn every_listed_name_is_found_under_its_inode() {
        let (nodes, slot) = mount_of_one_disk(true);
        let expected = [
            (ROOT_INO, vec!["d", "d.p1"]),
            (ControlNode::Directory.ino(), vec!["status", "log", "ctl", "d"]),
            (ControlNode::Disk(slot).ino(), vec!["status", "map", "ctl", "snapshots"]),
        ];
        for (directory, names) in expected {
            let entries = nodes.list(directory).unwrap();
            assert!(!Nodes::waits_to_list(directory));
            let (dots, entries) = entries.split_at(2);
            assert_eq!((dots[0].ino, dots[1].ino), (directory, ROOT_INO));
            assert_eq!(entries.iter().map(|entry| &*entry.name).collect::<Vec<_>>(), names);
            for entry in entries {
                let found = nodes.look_up(directory, OsStr::new(&entry.name)).ok();
                assert_eq!(found.map(ino_of), Some(entry.ino), "{}", entry.name);
                let is_directory = match nodes.by_ino(entry.ino).ok() {
                    Some(Node::Control(node)) => node.is_directory(),
                    Some(Node::File(_)) => false,
                    _ => panic!("{} has a strange inode", entry.name),
                };
                assert_eq!(is_directory, entry.is_directory, "{}", entry.name);
            }
        }
        assert!(Nodes::waits_to_list(ControlNode::Snapshots(slot).ino()));
        assert_eq!(errno_of(nodes.list(ControlNode::Status.ino())), Some(libc::ENOTDIR));
        assert_eq!(errno_of(nodes.list(file(&nodes, "d").ino())), Some(libc::ENOTDIR));
    }

    #[test]
    fn names_that_lead_nowhere_are_refused() {
        let (nodes, slot) = mount_of_one_disk(false);
        let errno = |parent, name: &[u8]| errno_of(nodes.look_up(parent, OsStr::from_bytes(name)));
        assert_eq!(errno(ROOT_INO, b"e"), Some(libc::ENOENT));
        assert_eq!(errno(ROOT_INO, b"d.p1"), Some(libc::ENOENT));
        assert_eq!(errno(ROOT_INO, b"\xff"), Some(libc::ENOENT));
        assert_eq!(errno(ROOT_INO, &[b'a'; MAX_NAME_LEN + 1]), Some(libc::ENAMETOOLONG));
        assert_eq!(errno(ControlNode::Directory.ino(), b"e"), Some(libc::ENOENT));
        assert_eq!(errno(ControlNode::Disk(slot).ino(), b"log"), Some(libc::ENOENT));
        assert_eq!(errno(file(&nodes, "d").ino(), b"status"), Some(libc::ENOENT));
        assert_eq!(errno_of(nodes.by_ino(1 << 62)), Some(libc::ESTALE));
    }

    #[test]
    fn the_control_directory_is_found_and_not_listed() {
        let (nodes, _) = mount_of_one_disk(false);
        let found = nodes.look_up(ROOT_INO, OsStr::new(CONTROL_DIR)).ok();
        assert_eq!(found.map(ino_of), Some(ControlNode::Directory.ino()));
        assert!(nodes.list(ROOT_INO).unwrap().iter().all(|entry| entry.name != CONTROL_DIR));
    }

    #[test]
    fn a_lookup_of_a_disk_is_counted_and_one_of_a_partition_is_not() {
        let (nodes, _) = mount_of_one_disk(true);
        let disk = Arc::clone(file(&nodes, "d").disk());
        let _ = file(&nodes, "d.p1");
        disk.mark_unlinked();
        assert!(!disk.is_orphan());
        disk.forget(1);
        assert!(disk.is_orphan());
    }

    #[test]
    fn control_files_follow_the_mode_of_their_disk_but_requests_are_for_the_user_who_mounted() {
        let (nodes, slot) = mount_of_one_disk(false);
        let disk = Arc::clone(file(&nodes, "d").disk());
        disk.set_owner(DiskOwner { uid: 7, gid: 8, perm: 0o640 }).unwrap();
        let owner =
            |node| nodes.control_owner(node).map(|owner| (owner.uid, owner.gid, owner.perm));
        assert_eq!(owner(ControlNode::DiskStatus(slot)), Some((7, 8, 0o440)));
        assert_eq!(owner(ControlNode::DiskMap(slot)), Some((7, 8, 0o440)));
        assert_eq!(owner(ControlNode::Disk(slot)), Some((7, 8, 0o750)));
        assert_eq!(owner(ControlNode::DiskCtl(slot)), Some((OWNER.0, OWNER.1, 0o600)));
        assert_eq!(owner(ControlNode::Status), Some((OWNER.0, OWNER.1, 0o400)));
        assert_eq!(owner(ControlNode::DiskStatus(slot + 1)), None);
        assert_eq!(owner(ControlNode::DiskCtl(slot + 1)), None);
        assert!(nodes.is_trusted(0) && nodes.is_trusted(OWNER.0) && !nodes.is_trusted(7));
    }
}
