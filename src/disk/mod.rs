//! A mounted disk: its layers, its gate and its attributes. The three loops that walk the layers
//! (read, write, seek) are in `read_write`; `open` builds a disk from its config.
//!
//! Every change of bytes holds the [gate](gate::Gate) shared; a change of the size or of the layers
//! holds it exclusive. Readers take a snapshot of the layers and never wait for the gate.

mod bottom;
mod commit;
mod copy;
mod direct;
mod fetch;
mod gate;
mod history;
mod keep;
mod layers;
mod open;
mod overlay_dir;
mod partition;
mod pools;
mod read_write;
mod retire;
mod single_file;
mod space_failures;
mod stream;

use std::io as stdio;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use self::bottom::Bottom;
pub use self::bottom::UnreadableBase;
pub use self::commit::CommitSummary;
use self::fetch::HydrationState;
pub use self::fetch::{HydrateCommand, PrefetchMode};
use self::gate::Gate;
use self::history::History;
pub use self::history::{
    DiffBase, Difference, Force, LayerUsage, LayerUsers, OperationError, SnapshotInfo,
};
use self::layers::{LayerStack, Top};
pub use self::open::{
    OpenContext, OpenError, OpenedDisk, clone_stored, create_blank, create_stored, open,
    open_stored, spec_over,
};
use self::overlay_dir::OverlayDirId;
pub use self::overlay_dir::OverlayDirState;
use self::partition::PartitionFiles;
pub use self::partition::{DiskFile, PartitionFile, PartitionsError, split_name};
pub use self::pools::Pools;
pub use self::read_write::{FallocateMode, SizeMode, Whence};
pub use self::retire::InUse;
use self::space_failures::SpaceFailures;
use crate::config::{CopyUp, DirectIo, DiskMode, DiskSpec, Passthrough, Resize};
use crate::extents::{Extent, ExtentKind, Extents};
use crate::host::os_error;
use crate::layer::{Wait, WritableLayer};
use crate::overlay::Overlay;
use crate::overlay::persist::{Holder, OverlayDir, OverlayPath};
use crate::overlay::record::{MtimeOrigin, Nanos};
use crate::overlay::recover::Recovered;
use crate::overlay::reflink::Reflink;
use crate::overlay::stack::inode_of;
use crate::overlay::tree::LayerTree;
use crate::stream::Stream;

/// The most extents that one walk for `st_blocks` visits; all bytes after them count as data.
const MAX_WALKED_EXTENTS: usize = 16 << 10;

/// Where a disk's overlay is stored, and which layers it has.
#[expect(clippy::large_enum_variant, reason = "one a disk, which hardly ever moves")]
enum OverlayLocation {
    /// The disk has no overlay.
    NoOverlay,
    /// Unnamed files in this directory, which vanish with the mount.
    Temporary { tree: LayerTree, dir: PathBuf },
    /// An overlay directory.
    Persistent(OverlayDir),
}

impl OverlayLocation {
    /// Returns the overlay's layers, or `None` without an overlay.
    fn tree(&self) -> Option<LayerTree> {
        match self {
            Self::NoOverlay => None,
            Self::Temporary { tree, .. } => Some(tree.clone()),
            Self::Persistent(residence) => {
                Some(residence.stack.tree()).filter(|tree| !tree.layers.is_empty())
            }
        }
    }

    fn as_persistent(&mut self) -> Option<&mut OverlayDir> {
        match self {
            Self::Persistent(residence) => Some(residence),
            Self::NoOverlay | Self::Temporary { .. } => None,
        }
    }
}

/// Owner and mode of the mounted file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskOwner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Permission bits.
    pub perm: u16,
}

/// The answer of stat(2) for a disk.
#[derive(Clone, Copy, Debug)]
pub struct Attributes {
    /// Size in bytes.
    pub size: u64,
    /// Bytes that hold data, in this layer or below.
    pub allocated: u64,
    /// Owner and mode.
    pub owner: DiskOwner,
    /// Access time: the one that a user set, else the mtime at opening. Reads do not move it.
    pub atime: SystemTime,
    /// Last write, or the time that a user set.
    pub mtime: SystemTime,
    /// Last change of bytes or attributes.
    pub ctime: SystemTime,
    /// Preferred unit of I/O in bytes: no hole begins or ends inside one.
    pub blksize: u32,
    /// Number of names: 1, or 0 once the disk is unlinked.
    pub nlink: u32,
}

/// How an open handle uses the kernel's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleAccess {
    /// Reads, through the cache.
    Read,
    /// Writes only.
    Write,
    /// Reads and writes, so the handle may also map the file shared and writable.
    ReadWrite,
}

/// A mounted disk.
pub struct Disk {
    /// The disk's uuid; a persistent overlay keeps it.
    pub uuid: Uuid,
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
    /// Locked only to take a snapshot or to install new layers.
    layers: RwLock<Arc<LayerStack>>,
    owner: Mutex<DiskOwner>,
    times: Times,
    read_opens: AtomicU32,
    write_opens: AtomicU32,
    read_write_opens: AtomicU32,
    /// The last result of a walk for `st_blocks`: the overlay's revision, and the bytes.
    allocated_cache: Mutex<Option<(u64, u64)>>,
    /// Set when a stat was answered with the cached figure although the real one may have changed.
    allocated_is_stale: AtomicBool,
    /// The disk's partitions as files of their own, if they are shown.
    partition_files: OnceLock<PartitionFiles>,
    /// Where the disk's overlay is stored.
    overlay_location: Mutex<OverlayLocation>,
    history: History,
    copy_up: CopyUp,
    hydration: HydrationState,
    /// Set once the disk has been detached from its base.
    is_detached: AtomicBool,
    overlay_dir: Mutex<Option<OverlayDirId>>,
    space_failures: SpaceFailures,
    /// The bottom as the overlay's `stack` describes it.
    bottom: Mutex<Arc<Bottom>>,
    recovered: Recovered,
    /// The stream, for a disk that is one.
    stream: Option<Stream>,
    /// The threads of the disk.
    pub pools: Pools,
    maintaining: AtomicBool,
    /// Set while an operation of unbounded length holds the gate: requests then wait without a
    /// deadline.
    pub(crate) in_long_operation: AtomicBool,
    /// Set once the disk is being removed: opens are refused.
    is_retired: AtomicBool,
    /// Granularity of the bottom's holes in bytes: no hole begins or ends inside one such unit.
    grain: u32,
    /// Set once the disk has no name.
    is_unlinked: AtomicBool,
    /// Lookups that the kernel has been answered and has not forgotten yet. While there are any,
    /// the kernel may open the disk even after it was unlinked.
    lookup_count: AtomicU64,
}

/// The times of a disk, in nanoseconds since the epoch.
struct Times {
    atime: AtomicI64,
    mtime: AtomicI64,
    ctime: AtomicI64,
    /// The mtime was set by a user, and no write has happened since.
    chosen: AtomicBool,
    /// The mtime recorded in the log.
    logged_mtime: AtomicI64,
}

impl Times {
    /// Creates the times of a new disk; `recorded` is the mtime in the log, if there is one.
    fn new(mtime: Nanos, chosen: bool, recorded: Option<Nanos>) -> Self {
        Self {
            atime: mtime.into(),
            mtime: mtime.into(),
            ctime: mtime.into(),
            chosen: chosen.into(),
            logged_mtime: recorded.unwrap_or(Nanos::MIN).into(),
        }
    }
}

/// Returns the time of the kernel's coarse clock, which takes a few nanoseconds to read and is
/// exact to a few milliseconds.
fn coarse_now() -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    now.tv_sec.saturating_mul(1_000_000_000).saturating_add(now.tv_nsec)
}

fn to_system_time(nanos: Nanos) -> SystemTime {
    let distance = Duration::from_nanos(nanos.unsigned_abs());
    if nanos < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}

fn from_system_time(time: SystemTime) -> Nanos {
    let clamp = |distance: Duration| Nanos::try_from(distance.as_nanos()).unwrap_or(Nanos::MAX);
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => clamp(after),
        Err(before) => -clamp(before.duration()),
    }
}

/// Space on the file system that stores a disk's changes.
#[derive(Clone, Copy, Debug)]
pub struct FsSpace {
    /// Total space in bytes.
    pub total: u64,
    /// Free space in bytes.
    pub free: u64,
    /// Free space available to this process, in bytes.
    pub available: u64,
}

impl Disk {
    /// Makes a disk of `layers`, whose bottom is described by `bottom`, with the keys of `spec`.
    fn new(
        spec: &DiskSpec,
        uuid: Uuid,
        layers: LayerStack,
        bottom: Bottom,
        owner: DiskOwner,
    ) -> Self {
        let mtime = match (&layers.top, bottom.metadata()) {
            (Top::Overlay(_), _) | (_, None) => coarse_now(),
            (_, Some(found)) => mtime_of(&found),
        };
        let source = match bottom.path() {
            Some(path) => path.display().to_string(),
            None => format!("blank:{}", layers.size()),
        };
        let grain = bottom.grain();
        Self {
            uuid,
            mode: spec.mode,
            source,
            resize: spec.resize,
            passthrough: spec.passthrough,
            direct: spec.direct,
            gate: Gate::default(),
            layers: RwLock::new(Arc::new(layers)),
            owner: Mutex::new(owner),
            times: Times::new(mtime, false, None),
            read_opens: AtomicU32::new(0),
            write_opens: AtomicU32::new(0),
            read_write_opens: AtomicU32::new(0),
            allocated_cache: Mutex::new(None),
            allocated_is_stale: false.into(),
            partition_files: OnceLock::new(),
            overlay_location: Mutex::new(OverlayLocation::NoOverlay),
            history: History::new((0, 0), None),
            copy_up: spec.copy_up,
            hydration: HydrationState::default(),
            is_detached: false.into(),
            overlay_dir: Mutex::new(None),
            space_failures: SpaceFailures::default(),
            bottom: Mutex::new(Arc::new(bottom)),
            recovered: Recovered::Clean,
            stream: None,
            pools: Pools::default(),
            maintaining: false.into(),
            in_long_operation: false.into(),
            is_retired: false.into(),
            grain,
            is_unlinked: false.into(),
            lookup_count: 0.into(),
        }
    }

    /// The inode number of the mounted file.
    #[must_use]
    pub fn ino(&self) -> u64 {
        inode_of(&self.uuid)
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

    /// The bottom of the disk.
    fn bottom(&self) -> Arc<Bottom> {
        Arc::clone(&self.bottom.lock())
    }

    /// The state in which the overlay was found when it was opened.
    #[must_use]
    pub fn recovered(&self) -> Recovered {
        self.recovered
    }

    /// Owner and mode of the mounted file.
    #[must_use]
    pub fn owner(&self) -> DiskOwner {
        *self.owner.lock()
    }

    /// The overlay's block size in bytes; the default block size without an overlay.
    #[must_use]
    pub fn block(&self) -> u32 {
        let block = self
            .overlay()
            .map_or(u64::from(crate::overlay::DEFAULT_BLOCK_SIZE), |o| o.block_size());
        u32::try_from(block).unwrap_or(crate::overlay::DEFAULT_BLOCK_SIZE)
    }

    /// Returns the attributes that stat(2) reports.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] when the base would have to be waited for; the host's errno.
    pub fn attributes(&self, wait: Wait) -> stdio::Result<Attributes> {
        if let Some(found) = self.single_file_attributes()? {
            return Ok(found);
        }
        let allocated = self.allocated(wait)?;
        Ok(self.attributes_for(self.size(), allocated))
    }

    /// Returns the attributes of a file of `size` bytes that shows this disk.
    fn attributes_for(&self, size: u64, allocated: u64) -> Attributes {
        let time = |cell: &AtomicI64| to_system_time(cell.load(Ordering::Relaxed));
        Attributes {
            size,
            allocated,
            owner: self.owner(),
            atime: time(&self.times.atime),
            mtime: time(&self.times.mtime),
            ctime: time(&self.times.ctime),
            blksize: self.blksize(),
            nlink: self.nlink(),
        }
    }

    /// The preferred unit of I/O, in bytes.
    fn blksize(&self) -> u32 {
        self.block().min(self.grain)
    }

    /// The number of names of the disk.
    fn nlink(&self) -> u32 {
        (!self.is_unlinked.load(Ordering::SeqCst)).into()
    }

    /// Records that the disk has lost its name.
    pub fn mark_unlinked(&self) {
        self.is_unlinked.store(true, Ordering::SeqCst);
    }

    /// Counts one more lookup answered to the kernel.
    pub fn add_lookup(&self) {
        self.lookup_count.fetch_add(1, Ordering::SeqCst);
    }

    /// Subtracts `count` lookups that the kernel has forgotten.
    pub fn forget(&self, count: u64) {
        let less = |references: u64| Some(references.saturating_sub(count));
        let _ = self.lookup_count.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// Whether the disk can no longer be reached: it has no name and no open handle, and the kernel
    /// has forgotten every lookup.
    #[must_use]
    pub fn is_orphan(&self) -> bool {
        self.nlink() == 0
            && self.lookup_count.load(Ordering::SeqCst) == 0
            && self.handle_count() == 0
    }

    /// Counts the bytes of data in the disk.
    fn allocated(&self, wait: Wait) -> stdio::Result<u64> {
        if let Some(Stream::Output(output)) = &self.stream {
            return Ok(output.written());
        }
        self.allocated_in(0..self.size(), &self.allocated_cache, wait)
    }

    /// Counts the bytes of data in `range` from the extents. After [`MAX_WALKED_EXTENTS`] extents
    /// all further bytes count as data, so no hole is ever claimed that does not exist. `known`
    /// caches the result.
    ///
    /// A stat never waits for a slow base: it is answered with the cached figure, and `maintain`
    /// updates the figure later.
    fn allocated_in(
        &self,
        range: Range<u64>,
        known: &Mutex<Option<(u64, u64)>>,
        wait: Wait,
    ) -> stdio::Result<u64> {
        // A stream's data arrives without a count of revisions.
        let revision = self.layers().top.revision().filter(|_| self.stream.is_none());
        let last = *known.lock();
        if let Some((at, bytes)) = last
            && revision == Some(at)
        {
            return Ok(bytes);
        }
        match (self.walk_allocated(range, wait), last) {
            (Ok(bytes), _) => {
                *known.lock() = Some((revision.unwrap_or(0), bytes));
                Ok(bytes)
            }
            (Err(error), Some((_, bytes))) if error.raw_os_error() == Some(libc::EAGAIN) => {
                self.allocated_is_stale.store(true, Ordering::Relaxed);
                Ok(bytes)
            }
            (Err(error), _) => Err(error),
        }
    }

    fn walk_allocated(&self, range: Range<u64>, wait: Wait) -> stdio::Result<u64> {
        let end = range.end;
        let extents = self.extents(range, MAX_WALKED_EXTENTS, wait)?;
        let held = |extents: &Extents| -> u64 {
            extents.iter().filter(|extent| extent.kind != ExtentKind::Hole).map(Extent::len).sum()
        };
        Ok(held(&extents) + (end - extents.described_to().min(end)))
    }

    /// Counts a handle as released.
    pub fn release_handle(&self, access: HandleAccess) {
        self.open_counter(access).fetch_sub(1, Ordering::SeqCst);
    }

    fn open_counter(&self, access: HandleAccess) -> &AtomicU32 {
        match access {
            HandleAccess::Read => &self.read_opens,
            HandleAccess::Write => &self.write_opens,
            HandleAccess::ReadWrite => &self.read_write_opens,
        }
    }

    /// Number of open handles, including those of the disk's snapshots.
    #[must_use]
    pub fn handle_count(&self) -> u32 {
        let own = [&self.read_opens, &self.write_opens, &self.read_write_opens];
        let own: u32 = own.iter().map(|n| n.load(Ordering::SeqCst)).sum();
        own + self.snapshot_handle_count()
    }

    /// Whether a handle reads through the kernel's cache, so that a write has to invalidate it.
    #[must_use]
    pub fn has_cached_readers(&self) -> bool {
        // Streams are never cached.
        self.read_opens.load(Ordering::SeqCst) > 0 && self.stream.is_none()
    }

    /// Whether a handle may write.
    #[must_use]
    pub fn has_writers(&self) -> bool {
        self.write_opens.load(Ordering::SeqCst) > 0 || self.may_be_mapped()
    }

    /// Whether the disk's size is fixed, so that truncation to 0 only discards the data.
    #[must_use]
    pub fn has_fixed_size(&self) -> bool {
        self.resize == Resize::Fixed
    }

    /// Whether a handle may have mapped the disk shared and writable.
    #[must_use]
    pub fn may_be_mapped(&self) -> bool {
        self.read_write_opens.load(Ordering::SeqCst) > 0
    }

    /// Moves mtime and ctime after a change of bytes.
    fn touch_times(&self, top: &Top) {
        let now = coarse_now();
        self.times.mtime.store(now, Ordering::Relaxed);
        self.times.ctime.store(now, Ordering::Relaxed);
        if self.times.chosen.load(Ordering::Relaxed)
            && self.times.chosen.swap(false, Ordering::SeqCst)
            && let Top::Overlay(overlay) = top
        {
            // Logged, so that a crash does not bring the chosen time back.
            self.record_mtime(overlay);
        }
    }

    /// Records the modification time in the log, unless the log has it already.
    fn record_mtime(&self, overlay: &Overlay) {
        let mtime = self.times.mtime.load(Ordering::SeqCst);
        if self.times.logged_mtime.swap(mtime, Ordering::SeqCst) == mtime {
            return;
        }
        let chosen = self.times.chosen.load(Ordering::SeqCst);
        let stamp = if chosen { MtimeOrigin::SetByUser } else { MtimeOrigin::Written };
        if let Err(error) = overlay.record_mtime(mtime, stamp) {
            log::warn!("the time of {} is not recorded: {error}", self.source);
        }
    }

    /// Sets the given times (utimensat(2)) and moves ctime.
    pub fn set_times(&self, atime: Option<SystemTime>, mtime: Option<SystemTime>) {
        if let Some(atime) = atime {
            self.times.atime.store(from_system_time(atime), Ordering::Relaxed);
        }
        self.set_single_file_times(atime, mtime);
        if let Some(mtime) = mtime.map(from_system_time) {
            self.times.mtime.store(mtime, Ordering::Relaxed);
            self.times.chosen.store(true, Ordering::SeqCst);
            if let Some(overlay) = self.overlay() {
                self.record_mtime(&overlay);
            }
        }
        self.times.ctime.store(coarse_now(), Ordering::Relaxed);
    }

    /// Changes owner and mode; a persistent overlay stores them.
    ///
    /// # Errors
    /// `EIO` when the overlay's `stack` cannot be written; nothing has changed then.
    pub fn set_owner(&self, owner: DiskOwner) -> stdio::Result<()> {
        if let Some(residence) = self.overlay_location.lock().as_persistent() {
            let mut stack = residence.stack.clone();
            (stack.uid, stack.gid, stack.perm) = (owner.uid, owner.gid, owner.perm);
            self.replace_stack(residence, stack, None).map_err(|error| {
                log::error!("{}: the new owner or mode is not kept: {error}", self.source);
                os_error(libc::EIO)
            })?;
        }
        *self.owner.lock() = owner;
        self.times.ctime.store(coarse_now(), Ordering::Relaxed);
        Ok(())
    }

    /// Returns the space on the file system that stores the disk's changes.
    ///
    /// # Errors
    /// The host's errno from fstatvfs(2).
    pub fn space(&self) -> stdio::Result<FsSpace> {
        let Some(file) = self.layers().top.data_file() else {
            return Ok(FsSpace { total: self.size(), free: 0, available: 0 });
        };
        let found = rustix::fs::fstatvfs(&file)?;
        Ok(FsSpace {
            total: found.f_blocks * found.f_frsize,
            free: found.f_bfree * found.f_frsize,
            available: found.f_bavail * found.f_frsize,
        })
    }

    /// Whether `maintain` has work to do and is not running already.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        !self.maintaining.load(Ordering::SeqCst)
            && (self.allocated_is_stale.load(Ordering::Relaxed)
                || self.overlay().is_some_and(|overlay| overlay.needs_maintenance()))
    }

    /// Does the periodic work, every few seconds: records the modification time in the log and
    /// flushes changes to the device. Only one call runs at a time, so a slow device or base holds
    /// one thread.
    ///
    /// # Errors
    /// The host's errno. Unless that is `ENOSPC`, the disk has latched.
    pub fn maintain(&self) -> stdio::Result<()> {
        if self.maintaining.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        let done = self.run_maintenance();
        self.maintaining.store(false, Ordering::SeqCst);
        done
    }

    fn run_maintenance(&self) -> stdio::Result<()> {
        if let Some(overlay) = self.overlay() {
            self.record_mtime(&overlay);
            overlay.maintain()?;
        }
        if self.allocated_is_stale.swap(false, Ordering::SeqCst)
            && let Err(error) = self.allocated(Wait::Yes).and_then(|_| self.refresh_allocated())
        {
            log::debug!("{}: its extents are not known: {error}", self.source);
        }
        Ok(())
    }

    /// Records in a persistent overlay that this daemon holds it, for other processes to see.
    pub fn write_holder(&self, holder: &Holder) {
        if let Some(residence) = self.overlay_location.lock().as_persistent() {
            residence.write_holder(holder);
        }
    }

    /// Makes everything durable and closes the log cleanly. No call may follow.
    ///
    /// When a change still waits for its base after `patience`, that change is abandoned: all
    /// others are made durable, and the next mount finds the log not closed.
    ///
    /// # Errors
    /// `ETIMEDOUT` when a change was abandoned; `EIO` when the disk has latched; the host's errno.
    pub fn close(&self, patience: Duration) -> stdio::Result<()> {
        self.end_operations(patience);
        let gate = self.gate.close(patience);
        match &self.layers().top {
            Top::Overlay(overlay) if gate.is_some() => {
                self.record_mtime(overlay);
                overlay.close()?;
            }
            top => top.sync()?,
        }
        if let Some(residence) = self.overlay_location.lock().as_persistent() {
            residence.remove_holder();
        }
        if gate.is_some() { Ok(()) } else { Err(os_error(libc::ETIMEDOUT)) }
    }

    /// Whether a failed sync has made the disk read-only.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.layers().writable().is_ok_and(WritableLayer::is_latched)
    }

    /// Makes the temporary overlay persistent at `place`. The overlay is durable on return.
    ///
    /// # Errors
    /// [`OpenError`] when there is no temporary overlay, when something exists at `place`, or when
    /// the host fails; the disk is unchanged then.
    pub fn keep(&self, place: OverlayPath<'_>) -> Result<(), OpenError> {
        self.in_long_operation.store(true, Ordering::SeqCst);
        // Marked before the check: either this call sees the mark of `retire`, or `retire` sees
        // this one.
        let kept = match self.is_retired.load(Ordering::SeqCst) {
            false => self.keep_at(place),
            true => Err(OpenError::NothingToKeep("the disk is being removed".to_owned())),
        };
        self.in_long_operation.store(false, Ordering::SeqCst);
        kept
    }
}

/// Returns the modification time of a host file in nanoseconds since the epoch.
fn mtime_of(found: &std::fs::Metadata) -> Nanos {
    found.mtime().saturating_mul(1_000_000_000).saturating_add(found.mtime_nsec())
}
