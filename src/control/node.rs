//! The files and directories in `.cowslip`, and their inode numbers.

use crate::catalog::Catalog;
use crate::disk::PARTITION_INODES;

/// The first inode number beyond those of control files.
const PARTITIONS_START: u64 = PARTITION_INODES.start;

/// A file or directory in `.cowslip`. Disks are identified by slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ControlNode {
    /// `.cowslip` itself.
    Directory,
    /// `.cowslip/status`.
    Status,
    /// `.cowslip/log`.
    Log,
    /// `.cowslip/ctl`.
    Ctl,
    /// `.cowslip/DISK`.
    Disk(u64),
    /// `.cowslip/DISK/status`.
    DiskStatus(u64),
    /// `.cowslip/DISK/map`.
    DiskMap(u64),
    /// `.cowslip/DISK/ctl`.
    DiskCtl(u64),
    /// `.cowslip/DISK/snapshots`, whose entries are disks.
    Snapshots(u64),
}

impl ControlNode {
    /// The inode number: 2 to 5 for the mount's own nodes, then eight for each slot. Partitions'
    /// numbers start at 2^61, disks' own at 2^62.
    #[must_use]
    pub fn ino(self) -> u64 {
        match self {
            Self::Directory => 2,
            Self::Status => 3,
            Self::Log => 4,
            Self::Ctl => 5,
            Self::Disk(slot) => slot * 8,
            Self::DiskStatus(slot) => slot * 8 + 1,
            Self::DiskMap(slot) => slot * 8 + 2,
            Self::DiskCtl(slot) => slot * 8 + 3,
            Self::Snapshots(slot) => slot * 8 + 4,
        }
    }

    /// The node with an inode number.
    #[must_use]
    pub fn from_ino(ino: u64) -> Option<Self> {
        match (ino, ino / 8, ino % 8) {
            (2, ..) => Some(Self::Directory),
            (3, ..) => Some(Self::Status),
            (4, ..) => Some(Self::Log),
            (5, ..) => Some(Self::Ctl),
            (8..PARTITIONS_START, slot, 0) => Some(Self::Disk(slot)),
            (8..PARTITIONS_START, slot, 1) => Some(Self::DiskStatus(slot)),
            (8..PARTITIONS_START, slot, 2) => Some(Self::DiskMap(slot)),
            (8..PARTITIONS_START, slot, 3) => Some(Self::DiskCtl(slot)),
            (8..PARTITIONS_START, slot, 4) => Some(Self::Snapshots(slot)),
            _ => None,
        }
    }

    /// Whether the node is a directory.
    #[must_use]
    pub fn is_directory(self) -> bool {
        matches!(self, Self::Directory | Self::Disk(_) | Self::Snapshots(_))
    }

    /// Whether only root and the user who mounted may open the node.
    #[must_use]
    pub fn is_private(self) -> bool {
        matches!(self, Self::Status | Self::Log | Self::Ctl | Self::DiskCtl(_))
    }

    /// The node's child `name`.
    #[must_use]
    pub fn child(self, name: &str, catalog: &Catalog) -> Option<Self> {
        match (self, name) {
            (Self::Directory, "status") => Some(Self::Status),
            (Self::Directory, "log") => Some(Self::Log),
            (Self::Directory, "ctl") => Some(Self::Ctl),
            (Self::Directory, name) => catalog.named(name).map(|entry| Self::Disk(entry.slot)),
            (Self::Disk(slot), "status") => Some(Self::DiskStatus(slot)),
            (Self::Disk(slot), "map") => Some(Self::DiskMap(slot)),
            (Self::Disk(slot), "ctl") => Some(Self::DiskCtl(slot)),
            (Self::Disk(slot), "snapshots") => Some(Self::Snapshots(slot)),
            _ => None,
        }
    }

    /// The entries of the node's directory listing.
    #[must_use]
    pub fn children(self, catalog: &Catalog) -> Vec<(String, Self)> {
        let named = |names: &[&str]| -> Vec<(String, Self)> {
            let found = names.iter().map(|name| ((*name).to_owned(), self.child(name, catalog)));
            found.filter_map(|(name, node)| Some((name, node?))).collect()
        };
        match self {
            Self::Directory => {
                let mut all = named(&["status", "log", "ctl"]);
                let disks = catalog.list().into_iter();
                all.extend(disks.map(|(name, entry)| (name, Self::Disk(entry.slot))));
                all
            }
            Self::Disk(_) => named(&["status", "map", "ctl", "snapshots"]),
            _ => Vec::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_is_found_by_its_inode_number() {
        let nodes = [
            ControlNode::Directory,
            ControlNode::Status,
            ControlNode::Log,
            ControlNode::Ctl,
            ControlNode::Disk(1),
            ControlNode::DiskStatus(1),
            ControlNode::DiskMap(7),
            ControlNode::DiskCtl(1000),
        ];
        for node in nodes {
            assert_eq!(ControlNode::from_ino(node.ino()), Some(node));
        }
        assert_eq!(ControlNode::from_ino(1), None);
        assert_eq!(ControlNode::from_ino(1 << 61), None);
        assert_eq!(ControlNode::from_ino(1 << 62), None);
    }
}
