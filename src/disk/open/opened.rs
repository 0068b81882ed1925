//! Results of an opening: the base, and the whole disk.

use std::sync::Arc;

use crate::disk::Disk;
use crate::disk::attrs::DiskOwner;
use crate::disk::base_description::BaseDescription;
use crate::layer::Layer;

/// An opened base that is only read, before its disk is made.
pub(super) struct OpenedBase {
    pub(super) layer: Arc<dyn Layer>,
    /// Size in bytes.
    pub(super) size: u64,
    pub(super) description: BaseDescription,
    /// The owner of a disk whose overlay records none.
    pub(super) owner: DiskOwner,
}

/// A disk that was opened, and the lines about it for the user.
pub struct OpenedDisk {
    /// The disk.
    pub disk: Disk,
    /// A summary of the disk, which `mount` prints after its name.
    pub summary: String,
    /// Notes: how the overlay was recovered, and features that the file systems lack.
    pub notes: Vec<String>,
}
