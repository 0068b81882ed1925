//! A writable copy-on-write layer: the changes of a disk, kept apart from its base.
//!
//! ```text
//!   write ->  data file (every block at its own disk offset)
//!             then the log (durable map, append-only)         only persistent overlays
//!             then the map in memory                          used by reads and seeks
//! ```
//!
//! - `write`: writes and size changes. `zero`, `copy`: zeroing, and copies into the overlay.
//!   `limit`: the most data that it may hold. `state`, `blocks`, `leaf`: the map in memory.
//!   `record`, `record_log`: the durable map. `storage`, `host_file`: the host files.
//! - `range_locks`: byte ranges that are being changed. `freeing`, with `pending` and
//!   `readers`: returning freed space to the host, and when.
//! - `sync`: making changes durable. `group_commit`: sharing one sync among its callers. `journal`:
//!   quick syncs of few changes.
//! - `recover`: from files to a running overlay. `boot_tag`: telling a killed daemon from a power
//!   cut. `data_check`: whether the data file holds what the map says. `verify`: checking an overlay.
//! - `stack`, `tree`: which layers make up a disk, on disk and in memory. `checksummed`: the first
//!   line of such a file. `persist`: creating and opening persistent overlays. `keep`: from
//!   temporary to persistent.
//! - `sealed`, `owners`, `merge`, `layer_cache`: the layers below the top. `commit`: copying down
//!   into the base.
//! - `reflink`: the other kind of overlay, which has no map: a reflink copy of its base. `fiemap`:
//!   where the host stores a file's blocks.
//!
//! Locks, outermost first: the disk's gate (held by the caller), `range_locks`, then for a moment the
//! log's tail, the map or `pending`, one after the other and never together. The gate and
//! `range_locks` are held across I/O; the tail during one write to the log. `docs/architecture.md`
//! has the order of all locks.
//!
//! Data first, map after: a crash between the two leaves bytes that no map refers to. Freeing goes
//! in the opposite order: first the record, then the map, and the space only once that record is
//! vouched, so that a power cut never finds a hole where the older map says Data.

pub mod blocks;
pub mod boot_tag;
mod checksummed;
mod commit;
mod copy;
mod data_check;
pub mod error;
mod fiemap;
mod freeing;
pub mod group_commit;
pub mod host_file;
pub mod journal;
pub mod keep;
pub mod layer_cache;
mod leaf;
mod limit;
mod merge;
mod owners;
pub mod pending;
pub mod persist;
pub mod range_locks;
pub mod readers;
pub mod record;
pub mod record_log;
pub mod recover;
pub mod reflink;
pub mod sealed;
pub mod stack;
pub mod state;
pub mod storage;
mod sync;
pub mod tree;
pub mod verify;
mod write;
mod zero;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::blocks::BlockMap;
pub use self::commit::CommitTarget;
use self::commit::CommitTracker;
use self::group_commit::GroupCommit;
use self::host_file::HostFile;
use self::journal::{DirtyBlocks, Journal};
pub use self::limit::Usage;
use self::pending::PendingFrees;
use self::range_locks::RangeLocks;
use self::readers::Readers;
use self::record::{BootTag, LayerMap, MtimeOrigin, Nanos};
use self::record_log::Log;
use self::state::{BlockIndex, BlockState};
use self::storage::Storage;
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};

/// The default block size in bytes: the page size, so that writing a page never reads it first.
pub const DEFAULT_BLOCK_SIZE: u32 = 4096;
/// The version of everything on disk that this code reads and writes.
pub const FORMAT_VERSION: u32 = 1;
/// The smallest unit of range locks in bytes, so that a 1 MiB write takes at most nine locks.
const LOCK_UNIT: u64 = 128 << 10;
/// The largest size of a disk in bytes: the largest signed file offset.
pub const MAX_DISK_SIZE: u64 = crate::config::MAX_SIZE;

/// A copy-on-write layer.
pub struct Overlay {
    /// Block size in bytes.
    block_size: u64,
    data: Arc<dyn Storage>,
    map: RwLock<LayerMap>,
    /// The durable map; `None` for a temporary overlay, whose changes are lost when it is dropped.
    log: Option<Log>,
    tag: BootTag,
    range_locks: RangeLocks,
    readers: Readers,
    pending: Mutex<PendingFrees>,
    group_commit: GroupCommit,
    /// The blocks that the next sync has to write, as long as they are few.
    dirty_blocks: DirtyBlocks,
    journal: Journal,
    /// The highest sequence whose record, and the data behind that record, is durable.
    durable: AtomicU64,
    /// The bytes changed since the last sync began; no longer counted once they are many.
    dirty_bytes: AtomicU64,
    /// The number of consecutive syncs that each covered only a small overwrite.
    small_syncs: AtomicU32,
    /// Set after a failed sync: no write and no sync succeeds any more.
    latched: AtomicBool,
    /// The number of changes of the map, for callers that cache results derived from the map.
    revision: AtomicU64,
    /// The largest number of blocks that may be Data or reserved.
    limit: Option<u64>,
    /// The blocks reserved since the overlay was opened that hold no data yet (called Data here),
    /// counted under a limit only.
    reserved: Mutex<BlockMap>,
    /// Whether the host may hold space that was only reserved, for blocks that are not Data.
    has_reserved: AtomicBool,
    /// Sealed layers below that must be durable before this layer vouches for anything.
    unclosed_layers: Mutex<Vec<Arc<Overlay>>>,
    /// The changes since a commit into the base began.
    commit: CommitTracker,
    /// Whether the layer is sealed and durable with its log closed, so that no work remains for it.
    is_closed: Mutex<bool>,
    /// Whether the host's file system is read-only, and this layer with it.
    is_read_only: bool,
}

impl Overlay {
    /// Creates an overlay over `data` whose map starts as `map`. `block_size` is in bytes;
    /// `limit` caps the bytes of data that the overlay may hold.
    #[must_use]
    pub fn new(
        block_size: u32,
        data: Arc<dyn Storage>,
        map: LayerMap,
        log: Option<Log>,
        tag: BootTag,
        limit: Option<u64>,
    ) -> Self {
        let block_size = u64::from(block_size);
        let durable = log.as_ref().map_or(u64::MAX, Log::last_sequence);
        Self {
            block_size,
            data,
            map: RwLock::new(map),
            log,
            tag,
            range_locks: RangeLocks::new(block_size.max(LOCK_UNIT)),
            readers: Readers::default(),
            pending: Mutex::default(),
            group_commit: GroupCommit::default(),
            dirty_blocks: DirtyBlocks::default(),
            journal: Journal::default(),
            durable: AtomicU64::new(durable),
            dirty_bytes: AtomicU64::new(0),
            small_syncs: AtomicU32::new(0),
            latched: AtomicBool::new(false),
            revision: AtomicU64::new(0),
            limit: limit.map(|limit| limit / block_size),
            reserved: Mutex::default(),
            has_reserved: AtomicBool::new(false),
            unclosed_layers: Mutex::default(),
            commit: CommitTracker::default(),
            is_closed: Mutex::new(false),
            is_read_only: false,
        }
    }

    /// Creates a layer that was already sealed and closed in good order.
    #[must_use]
    pub fn closed(block_size: u32, data: Arc<dyn Storage>, map: LayerMap, tag: BootTag) -> Self {
        let layer = Self::new(block_size, data, map, None, tag, None);
        *layer.is_closed.lock() = true;
        layer
    }

    /// Stacks this overlay on `layers`: each of them is made durable before this overlay vouches
    /// for a change.
    pub fn set_lower_layers(&self, layers: &[Arc<Self>]) {
        // A layer whose lock is held is being closed right now; the next sync waits for it, not
        // this call.
        let is_open = |layer: &&Arc<Self>| layer.is_closed.try_lock().is_none_or(|done| !*done);
        let open = layers.iter().filter(is_open);
        *self.unclosed_layers.lock() = open.cloned().collect();
    }

    /// Continues `older`'s revision counter, so that results cached under it become stale.
    pub fn continue_revision(&self, older: &Self) {
        self.revision.store(older.revision() + 1, Ordering::Release);
    }

    /// Returns the block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// Returns the offset in bytes from which on the layers below are hidden.
    #[must_use]
    pub fn lower_limit(&self) -> u64 {
        self.map.read().lower_limit
    }

    /// Returns whether the overlay's changes are lost when the disk is unmounted.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        self.log.is_none() && !self.is_read_only
    }

    /// Returns whether the host's file system is read-only, so that every change fails with
    /// `EROFS`.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Returns whether a failed sync has made the overlay read-only.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.latched.load(Ordering::Relaxed)
    }

    /// Returns the revision of the map, which grows with every change of it.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// Returns the modification time recorded in the log, if any.
    #[must_use]
    pub fn mtime(&self) -> Option<(Nanos, MtimeOrigin)> {
        self.map.read().mtime
    }

    /// Returns the data file on the host, so that the caller can examine its file system.
    #[must_use]
    pub fn data_file(&self) -> Option<File> {
        self.data.host_file()?.first().try_clone().ok()
    }

    /// Makes the data file bypass the host's page cache from now on.
    ///
    /// # Errors
    /// `EINVAL` when the host's file system has no direct I/O; otherwise the host's errno.
    pub fn go_direct(&self) -> io::Result<()> {
        self.data.host_file().map_or(Ok(()), HostFile::go_direct)
    }

    /// Returns whether the data file bypasses the host's page cache.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.data.host_file().is_some_and(HostFile::is_direct)
    }

    /// Tells the host that `range` of the data will be read soon. Does nothing when the page cache
    /// is bypassed.
    pub fn will_need(&self, range: &Range<u64>) {
        if !self.is_direct()
            && let Some(file) = self.data.host_fd(range.clone())
        {
            let len = std::num::NonZeroU64::new(range.end - range.start);
            // Only a hint, so a failure does not matter.
            let _ = rustix::fs::fadvise(file, range.start, len, rustix::fs::Advice::WillNeed);
        }
    }

    /// Returns a copy of the current map. The caller holds the gate exclusive.
    #[must_use]
    pub fn clone_map(&self) -> LayerMap {
        self.map.read().clone()
    }

    /// Returns the blocks that `range` (bytes) touches.
    fn blocks_of(&self, range: &Range<u64>) -> Range<BlockIndex> {
        BlockIndex(range.start / self.block_size)..BlockIndex(range.end.div_ceil(self.block_size))
    }

    /// Returns the bytes of `blocks`, saturating at the largest offset.
    fn bytes_of(&self, blocks: &Range<BlockIndex>) -> Range<u64> {
        blocks.start.0.saturating_mul(self.block_size)..blocks.end.0.saturating_mul(self.block_size)
    }

    fn check_writable(&self) -> io::Result<()> {
        match (self.is_read_only, self.is_latched()) {
            (true, _) => Err(os_error(libc::EROFS)),
            (false, true) => Err(os_error(libc::EIO)),
            (false, false) => Ok(()),
        }
    }

    /// Looks up the extent that starts at `range.start` in the map.
    fn look_up(&self, range: &Range<u64>) -> Extent {
        let map = self.map.read();
        if range.start >= map.size {
            return Extent::new(range.clone(), ExtentKind::Hole);
        }
        let run = map.blocks.run_at(self.blocks_of(range));
        let mut end = self.bytes_of(&run.range).end.min(range.end).min(map.size);
        let kind = match run.state {
            BlockState::Data => ExtentKind::Data,
            BlockState::Zero => ExtentKind::Hole,
            BlockState::Lower if range.start >= map.lower_limit => ExtentKind::Hole,
            BlockState::Lower => {
                end = end.min(map.lower_limit);
                ExtentKind::Lower
            }
        };
        Extent::new(range.start..end, kind)
    }

    /// Notes that the bytes of `blocks` were written, before a record says so.
    fn note_written(&self, blocks: &Range<BlockIndex>) {
        if self.log.is_some() {
            self.dirty_blocks.add(blocks);
        }
    }

    /// Counts a finished change of `len` bytes of data, so that the next sync covers it even when a
    /// running sync has already passed it.
    fn mark_dirty(&self, len: u64) {
        // Load first: the cache line stays shared between the workers once the count is high.
        if self.dirty_bytes.load(Ordering::Relaxed) <= sync::MAX_QUICK_SYNC {
            self.dirty_bytes.fetch_add(len.max(1), Ordering::SeqCst);
        }
    }
}

impl Layer for Overlay {
    fn size(&self) -> u64 {
        self.map.read().size
    }

    fn extent_at(&self, range: Range<u64>, _: Wait) -> io::Result<Extent> {
        Ok(self.look_up(&range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let _reading = self.readers.enter();
        let extent = self.look_up(&(offset..offset + buf.len() as u64));
        if extent.kind == ExtentKind::Data {
            let len = usize::try_from(extent.len()).map_err(|_| os_error(libc::EFBIG))?;
            self.data.read_at(&mut buf[..len], offset, wait)?;
        }
        Ok(extent)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        _: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let _reading = self.readers.enter();
        let extent = self.look_up(&range);
        let file = if extent.kind == ExtentKind::Data {
            self.data.host_fd(extent.range.clone())
        } else {
            None
        };
        let copied = file.map(|file| copy(file, extent.range.clone())).transpose()?;
        Ok((extent, copied))
    }
}
