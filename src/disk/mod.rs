//! A mounted disk.
//!
//! ```text
//!   disk_file    what the mount shows: all of a disk, or the range of one partition
//!      v
//!   Disk         read_write, copy, prefetch, commit, hydrate, history, keep, shut_down,
//!      |         maintenance (every few seconds)
//!      |
//!      +-- gate        shared for changes of bytes, exclusive for changes of size or layers
//!      +-- layers      the current top, sealed layers and bottom, replaced as a whole
//!      +-- attrs       owner, mode, times; allocated: the space for stat
//!      +-- partition   its partitions as files
//!      +-- space       failures for lack of space
//!      +-- references  handles, lookups of the kernel, the name
//!      +-- overlay_location, described_base      where the layers are stored
//!      +-- operation   the operation on the whole disk, of which one runs at a time
//!      +-- pools       its threads
//! ```
//!
//! Three kinds of disks differ from the rest: `direct` (past the host's cache), `single_file` (reflink
//! overlays and passthrough) and `stream`.
//!
//! `open` builds a disk from its config. Readers take the layers that are current when they begin, and
//! never wait for the gate. docs/architecture.md has the order of the locks.

mod allocated;
mod attrs;
mod base_description;
mod commit;
mod copy;
mod direct;
mod disk_file;
mod gate;
mod history;
mod hydrate;
mod keep;
mod layers;
mod maintenance;
mod new_size;
mod open;
mod operation;
mod operation_error;
mod overlay_location;
mod partition;
mod pools;
mod prefetch;
mod read_write;
mod references;
mod shut_down;
mod single_file;
mod space;
mod stream;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use self::allocated::Allocated;
pub use self::attrs::{Attributes, DiskOwner};
use self::attrs::{Attrs, Times, coarse_now, mtime_of};
use self::base_description::BaseDescription;
pub use self::base_description::UnreadableBase;
pub use self::commit::CommitSummary;
pub use self::disk_file::DiskFile;
use self::gate::Gate;
pub use self::history::{DiffBase, Difference, LayerUsage, LayerUsers, SnapshotInfo};
use self::history::{History, ResetSizes};
use self::hydrate::Hydration;
pub use self::hydrate::{HydrateCommand, HydrationPhase};
use self::layers::{LayerStack, Top};
pub use self::new_size::SizeChange;
pub use self::open::{
    OpenContext, OpenError, OpenedDisk, check_recorded_base, clone_stored, create_blank,
    create_stored, open, open_stored, spec_over,
};
pub use self::operation::Force;
use self::operation::Operations;
pub use self::operation_error::OperationError;
pub use self::overlay_location::OverlayDirState;
use self::overlay_location::OverlayLocation;
use self::partition::PartitionFiles;
pub use self::partition::{PARTITION_INODES, PartitionFile, ShowPartitionsError, split_name};
pub use self::pools::Pools;
pub use self::prefetch::PrefetchMode;
pub use self::read_write::{FallocateMode, SizeMode, Whence};
use self::references::References;
pub use self::references::{HandleAccess, InUse};
pub use self::space::FsSpace;
use self::space::SpaceFailures;
use crate::config::{CopyUp, DirectIo, DiskMode, DiskSpec, Passthrough, Resize};
use crate::layer::{Wait, WritableLayer};
use crate::overlay::persist::Holder;
use crate::overlay::recover::Recovered;
use crate::overlay::reflink::Reflink;
use crate::overlay::stack::inode_of;
use crate::overlay::{DEFAULT_BLOCK_SIZE, Overlay};
use crate::stream::Stream;

/// A mounted disk.
pub struct Disk {
    /// The disk's uuid; a persistent overlay keeps it.
    pub uuid: Uuid,
    ino: AtomicU64,
    /// How the disk may be changed.
    pub mode: DiskMode,
    /// The source that the disk was opened from, as text for messages.
    pub source: String,
    resize: Resize,
    /// Whether the kernel may read and write the disk's host file directly.
    passthrough: Passthrough,
    /// Whether I/O bypasses the host's page cache. If so, every read and write of the files waits.
    direct: DirectIo,
    gate: Gate,
    /// Locked only to clone the pointer or to install new layers.
    layers: RwLock<Arc<LayerStack>>,
    attrs: Attrs,
    allocated: Allocated,
    references: References,
    /// The disk's partitions as files of their own, if they are shown.
    partition_files: OnceLock<PartitionFiles>,
    overlay_location: OverlayLocation,
    operations: Operations,
    history: History,
    copy_up: CopyUp,
    hydration: Hydration,
    space_failures: SpaceFailures,
    /// Merges of layers that failed for lack of space.
    merge_failures: SpaceFailures,
    /// The base as the overlay's `stack` describes it.
    described_base: Mutex<Arc<BaseDescription>>,
    recovered: Recovered,
    /// The stream, for a disk that is one.
    stream: Option<Stream>,
    /// The threads of the disk.
    pub pools: Pools,
    /// Set while `maintain` runs.
    maintaining: AtomicBool,
    /// Set once it was told that the base does not match its bmap.
    is_mismatch_told: AtomicBool,
    /// Granularity of the bottom's holes in bytes: no hole begins or ends inside one such unit.
    grain: u32,
}

impl Disk {
    /// Makes a disk of `layers`, over the base that `description` describes, with the keys of `spec`.
    fn new(
        spec: &DiskSpec,
        uuid: Uuid,
        layers: LayerStack,
        description: BaseDescription,
        owner: DiskOwner,
    ) -> Self {
        let mtime = match (&layers.top, description.metadata()) {
            (Top::Overlay(_), _) | (_, None) => coarse_now(),
            (_, Some(found)) => mtime_of(&found),
        };
        let source = match &description {
            BaseDescription::File { path, .. } => path.display().to_string(),
            BaseDescription::Remote { remote, .. } => remote.address().to_string(),
            BaseDescription::Blank(_) => format!("blank:{}", layers.size()),
        };
        let grain = description.grain();
        Self {
            uuid,
            ino: AtomicU64::new(inode_of(&uuid)),
            mode: spec.mode,
            source,
            resize: spec.resize,
            passthrough: spec.passthrough,
            direct: spec.direct,
            gate: Gate::default(),
            layers: RwLock::new(Arc::new(layers)),
            attrs: Attrs::new(owner, Times::new(mtime, false, None)),
            allocated: Allocated::default(),
            references: References::default(),
            partition_files: OnceLock::new(),
            overlay_location: OverlayLocation::none(),
            operations: Operations::default(),
            history: History::new(ResetSizes::default(), None),
            copy_up: spec.copy_up,
            hydration: Hydration::default(),
            space_failures: SpaceFailures::default(),
            merge_failures: SpaceFailures::default(),
            described_base: Mutex::new(Arc::new(description)),
            recovered: Recovered::Clean,
            stream: None,
            pools: Pools::default(),
            maintaining: false.into(),
            is_mismatch_told: false.into(),
            grain,
        }
    }

    /// The inode number of the mounted file: that of the uuid, until the size changes below the
    /// kernel.
    #[must_use]
    pub fn ino(&self) -> u64 {
        self.ino.load(Ordering::SeqCst)
    }

    fn layers(&self) -> Arc<LayerStack> {
        Arc::clone(&self.layers.read())
    }

    /// The size in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.layers().size()
    }

    /// The overlay, if the disk has one.
    #[must_use]
    pub fn overlay(&self) -> Option<Arc<Overlay>> {
        self.layers().top.overlay().cloned()
    }

    /// The reflink overlay, if the disk has one.
    #[must_use]
    pub fn reflink(&self) -> Option<Arc<Reflink>> {
        self.layers().top.reflink().cloned()
    }

    /// The base as the overlay records it; the layer that reads it is `layers().bottom`.
    fn described_base(&self) -> Arc<BaseDescription> {
        Arc::clone(&self.described_base.lock())
    }

    /// The state in which the overlay was found when it was opened.
    #[must_use]
    pub fn recovered(&self) -> Recovered {
        self.recovered
    }

    /// Owner and mode of the mounted file.
    #[must_use]
    pub fn owner(&self) -> DiskOwner {
        self.attrs.owner()
    }

    /// Returns the attributes that stat(2) reports.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the base would have to be waited for; the host's errno.
    pub fn attributes(&self, wait: Wait) -> io::Result<Attributes> {
        if let Some(found) = self.single_file_attributes()? {
            return Ok(found);
        }
        let allocated = self.allocated(wait)?;
        Ok(self.attrs.stat(self.size(), allocated, self.blksize(), self.references.nlink()))
    }

    /// The overlay's block size in bytes; the default block size without an overlay.
    #[must_use]
    pub fn block_size(&self) -> u32 {
        let block = self.overlay().map(|overlay| overlay.block_size());
        block.and_then(|block| u32::try_from(block).ok()).unwrap_or(DEFAULT_BLOCK_SIZE)
    }

    /// The preferred unit of I/O, in bytes.
    fn blksize(&self) -> u32 {
        self.block_size().min(self.grain)
    }

    /// Records that the disk has lost its name.
    pub fn mark_unlinked(&self) {
        self.references.mark_unlinked();
    }

    /// Counts one more lookup answered to the kernel.
    pub fn add_lookup(&self) {
        self.references.add_lookup();
    }

    /// Subtracts `count` lookups that the kernel has forgotten.
    pub fn forget(&self, count: u64) {
        self.references.forget(count);
    }

    /// Whether the disk can no longer be reached: it has no name and no open handle, and the kernel
    /// has forgotten every lookup.
    #[must_use]
    pub fn is_orphan(&self) -> bool {
        self.references.is_forgotten() && self.handle_count() == 0
    }

    /// Counts a handle as opened.
    ///
    /// # Errors
    /// `ESTALE` once the disk is being removed: the kernel looks the name up again then; `EBUSY` while
    /// it waits for [another inode number](Self::take_renumbering).
    pub fn open_handle(&self, access: HandleAccess) -> io::Result<()> {
        self.references.open(access)
    }

    /// Counts a handle as released.
    pub fn release_handle(&self, access: HandleAccess) {
        self.references.release(access);
    }

    /// Number of open handles, including those of the disk's snapshots.
    #[must_use]
    pub fn handle_count(&self) -> u32 {
        self.references.handle_count() + self.snapshot_handle_count()
    }

    /// Whether a handle reads through the kernel's cache, so that a write has to invalidate it.
    #[must_use]
    pub fn has_cached_readers(&self) -> bool {
        // Streams are never cached.
        self.references.has_readers() && self.stream.is_none()
    }

    /// Whether a handle may write.
    #[must_use]
    pub fn has_writers(&self) -> bool {
        self.references.has_writers()
    }

    /// Whether a handle may have mapped the disk shared and writable.
    #[must_use]
    pub fn may_be_mapped(&self) -> bool {
        self.references.may_be_mapped()
    }

    /// Whether an operation of unbounded length holds the gate: requests then wait without a
    /// deadline.
    #[must_use]
    pub fn deadlines_suspended(&self) -> bool {
        self.references.deadlines_suspended()
    }

    /// Marks the disk as being removed: from then on it cannot be opened.
    ///
    /// # Errors
    /// [`InUse`] when the disk is in use; the disk is unchanged then.
    pub fn retire(&self) -> Result<(), InUse> {
        self.references.retire(|| self.handle_count())
    }

    /// Whether the disk's size is fixed, so that truncation to 0 only discards the data.
    #[must_use]
    pub fn has_fixed_size(&self) -> bool {
        self.resize == Resize::Fixed
    }

    /// Records in a persistent overlay that this daemon holds it, for other processes to see.
    pub fn write_holder(&self, holder: &Holder) {
        self.overlay_location.write_holder(holder);
    }

    /// Whether a failed sync has made the disk read-only.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.layers().writable().is_ok_and(WritableLayer::is_latched)
    }

    /// Makes the disk read-only for good after a failure of something other than its own sync.
    pub fn latch(&self) {
        if let Some(overlay) = self.overlay() {
            overlay.poison();
        }
    }

    /// The directory of the disk's persistent overlay.
    #[must_use]
    pub fn overlay_dir(&self) -> Option<PathBuf> {
        self.overlay_location.path()
    }

    /// The state of that directory; `None` for a disk without one.
    #[must_use]
    pub fn overlay_dir_state(&self) -> Option<OverlayDirState> {
        self.overlay_location.dir_state(|| self.layers().top.data_file())
    }
}
