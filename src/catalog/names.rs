//! The names of a mount's disks and partition files.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use crate::disk::{Disk, PartitionFile, split_name};
use crate::name;

/// Origin of a disk, which decides whether its name can change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOrigin {
    /// The command line or the TOML file.
    Given,
    /// The store.
    Stored,
}

/// A disk in the catalog.
pub struct CatalogEntry {
    /// The disk.
    pub disk: Arc<Disk>,
    /// Origin of the disk.
    pub origin: DiskOrigin,
    /// A small number that is unique in the mount, for the inode numbers of the disk's control
    /// files.
    pub slot: u64,
}

/// Refuses a `name` that no disk can have.
pub(super) fn check_name(name: &str) -> io::Result<()> {
    Ok(name::check_disk(name)?)
}

/// The names of a mount's disks.
pub(super) type DiskNames = BTreeMap<String, Arc<CatalogEntry>>;

/// Finds the partition file called `name`, and its disk.
pub(super) fn find_partition(
    names: &DiskNames,
    name: &str,
) -> Option<(Arc<Disk>, Arc<PartitionFile>)> {
    let (disk, number) = split_name(name)?;
    let disk = &names.get(disk)?.disk;
    let partition = disk.partition_files().iter().find(|partition| partition.number() == number)?;
    Some((Arc::clone(disk), Arc::clone(partition)))
}

/// Returns why `disk` cannot be called `name` beside `names`, in one line without the name: another
/// disk's partition file has it, or a partition file of `disk` would clash or have too long a name.
pub(super) fn find_clash(names: &DiskNames, name: &str, disk: &Disk) -> Option<String> {
    if let Some((other, partition)) = find_partition(names, name)
        && other.uuid != disk.uuid
    {
        let number = partition.number();
        return Some(format!(
            "that is the name of partition {number} of another disk: give one another NAME="
        ));
    }
    disk.partition_files().iter().find_map(|partition| {
        let (part, number) = (partition.name(name), partition.number());
        if name::check(&part).is_err() {
            return Some(format!(
                "partition {number} would have too long a name: give the disk a shorter NAME="
            ));
        }
        names.get(&part).filter(|other| other.disk.uuid != disk.uuid)?;
        Some(format!(
            "partition {number} is shown as '{part}', and so is another disk: give one another NAME="
        ))
    })
}
