//! A writable copy-on-write layer: the changes of a disk, kept apart from its base.
//!
//! ```text
//!   write ->  data file (every block at its own disk offset)
//!             then the log (durable map, append-only)         only persistent overlays
//!             then the map in memory                          what reads and seeks go by
//! ```
//!
//! - `write`: writes, zeroing, sizes. `blocks`: the map in memory. `record`, `log`: the durable map. `data`: the host files.
//! - `range_locks`: which bytes are being changed. `readers`, `pending`: when freed space may go back.
//! - `group_commit`: who shares a sync. `recover`: from files to a running overlay. `stack`: which
//!   layers make a disk, on disk. `keep`: from temporary to persistent.
//!   `verify`: is it whole? `reflink`: the other kind of overlay, which has no map: a reflink copy
//!   of its base. `journal`: syncs of few changes. `commit`: down into the base. `sealed`, `merge`,
//!   `tree`, `layer_cache`: layers below. `fiemap`: where the host keeps a file's blocks.
//!
//! Locks, outermost first: the disk's gate (held by the caller), `range_locks`, the log's tail, the map.
//! `pending` is taken inside any of them and nothing is taken inside it. Only `range_locks` is held
//! across I/O.
//!
//! Data first, map after: a crash between the two leaves bytes that nobody looks at. Freeing is
//! the other way round: record, map, and the space only once that record is vouched, so that a
//! power cut never finds a hole where the older map says data.

pub mod blocks;
pub mod boot_tag;
mod commit;
pub mod data;
mod fiemap;
pub mod group_commit;
pub mod journal;
pub mod keep;
pub mod layer_cache;
mod leaf;
pub mod log;
mod merge;
pub mod pending;
pub mod persist;
pub mod range_locks;
pub mod readers;
pub mod record;
pub mod recover;
pub mod reflink;
pub mod sealed;
pub mod stack;
mod sync;
pub mod tree;
pub mod verify;
mod write;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::blocks::{BlockIndex, BlockState};
pub use self::commit::CommitTarget;
use self::data::{HostFile, Storage};
use self::group_commit::GroupCommit;
use self::journal::{DirtyBlocks, Journal};
use self::log::Log;
use self::pending::PendingFrees;
use self::range_locks::RangeLocks;
use self::readers::Readers;
use self::record::{BootTag, LayerMap, MtimeOrigin, Nanos};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::layer::{CopyFn, Layer, Wait};

/// The default block size in bytes: the page size, so a page written is never read first.
pub const DEFAULT_BLOCK_SIZE: u32 = 4096;
/// Ranges are locked in units of at least this many bytes: a 1 MiB write takes nine locks.
const LOCK_UNIT: u64 = 128 << 10;
/// The largest size of a disk: what a signed file offset can name.
pub const MAX_DISK_SIZE: u64 = i64::MAX.cast_unsigned();

/// A copy-on-write layer.
pub struct Overlay {
    /// Block size in bytes.
    block_size: u64,
    data: Arc<dyn Storage>,
    map: RwLock<LayerMap>,
    /// `None`: a temporary overlay, gone when it is dropped.
    log: Option<Log>,
    tag: BootTag,
    range_locks: RangeLocks,
    readers: Readers,
    pending: Mutex<PendingFrees>,
    group_commit: GroupCommit,
    /// What the next sync has to write, while that is little.
    dirty_blocks: DirtyBlocks,
    journal: Journal,
    /// The highest sequence whose record, and the data behind it, is durable.
    durable: AtomicU64,
    /// Bytes that were changed since the last sync began; no longer counted once they are many.
    dirty_bytes: AtomicU64,
    /// Syncs in a row, each of a small overwrite.
    small_syncs: AtomicU32,
    /// A sync failed: no write and no sync succeeds any more.
    latched: AtomicBool,
    /// Counts changes of the map, for those who keep what they learnt from it.
    revision: AtomicU64,
    /// The most Data blocks there may be.
    limit: Option<u64>,
    /// Sealed layers below that must be durable before this one vouches for anything.
    unclosed_layers: Mutex<Vec<Arc<Overlay>>>,
    /// The commit into the base that is under way.
    commit: Mutex<Option<commit::CommitTracker>>,
    /// Whether there is one: what every change looks at.
    is_committing: AtomicBool,
    /// It is sealed, durable and its log closed: nothing is left to be done for it.
    is_closed: Mutex<bool>,
    /// Its host takes no changes, and so does it.
    is_read_only: bool,
}

/// What an overlay holds, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Bytes of blocks that hold data.
    pub data: u64,
    /// Bytes of blocks that hide the base with zeros.
    pub zero: u64,
}

impl Overlay {
    /// An overlay over `data` that starts as `clone_map`. `limit` caps the bytes of data it may hold.
    #[must_use]
    pub fn new(
        block: u32,
        data: Arc<dyn Storage>,
        image: LayerMap,
        log: Option<Log>,
        tag: BootTag,
        limit: Option<u64>,
    ) -> Self {
        let block = u64::from(block);
        let durable = log.as_ref().map_or(u64::MAX, Log::last_sequence);
        Self {
            block_size: block,
            data,
            map: RwLock::new(image),
            log,
            tag,
            range_locks: RangeLocks::new(block.max(LOCK_UNIT)),
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
            limit: limit.map(|limit| limit / block),
            unclosed_layers: Mutex::default(),
            commit: Mutex::default(),
            is_committing: AtomicBool::new(false),
            is_closed: Mutex::new(false),
            is_read_only: false,
        }
    }

    /// A layer that was sealed and closed in good order before.
    #[must_use]
    pub fn closed(block: u32, data: Arc<dyn Storage>, image: LayerMap, tag: BootTag) -> Self {
        let layer = Self::new(block, data, image, None, tag, None);
        *layer.is_closed.lock() = true;
        layer
    }

    /// Puts it on `layers`: each of them is made durable before this one vouches for a change.
    pub fn set_lower_layers(&self, layers: &[Arc<Self>]) {
        // One that is being settled at this moment is waited for later, not here.
        let is_open = |layer: &&Arc<Self>| layer.is_closed.try_lock().is_none_or(|done| !*done);
        let open = layers.iter().filter(is_open);
        *self.unclosed_layers.lock() = open.cloned().collect();
    }

    /// Caps what it may hold from now on, in bytes of data.
    pub fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit.map(|limit| limit / self.block_size);
    }

    /// Takes the place of `older`: what was learnt from that map is not taken for this one's.
    pub fn continue_revision(&self, older: &Self) {
        self.revision.store(older.revision() + 1, Ordering::Release);
    }

    /// Block size in bytes.
    #[must_use]
    pub fn block_size(&self) -> u64 {
        self.block_size
    }

    /// How far down into what lies below one can see, in bytes.
    #[must_use]
    pub fn lower_limit(&self) -> u64 {
        self.map.read().lower_limit
    }

    /// Whether its changes end with the mount.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        self.log.is_none() && !self.is_read_only
    }

    /// Whether its host's file system is read-only: every change is `EROFS`.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.is_read_only
    }

    /// Whether a failed sync has made it read-only.
    #[must_use]
    pub fn is_latched(&self) -> bool {
        self.latched.load(Ordering::Relaxed)
    }

    /// How much it holds.
    #[must_use]
    pub fn usage(&self) -> Usage {
        let map = self.map.read();
        Usage {
            // A log may name more blocks than the disk has bytes for.
            data: map.blocks.data_blocks().saturating_mul(self.block_size),
            zero: map.blocks.zero_blocks().saturating_mul(self.block_size),
        }
    }

    /// Changes whenever the map has changed.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// The modification time that the log knows.
    #[must_use]
    pub fn mtime(&self) -> Option<(Nanos, MtimeOrigin)> {
        self.map.read().mtime
    }

    /// The data file on the host, to look at its file system.
    #[must_use]
    pub fn data_file(&self) -> Option<File> {
        self.data.host_file()?.first().try_clone().ok()
    }

    /// From now on the host's page cache is passed by.
    ///
    /// # Errors
    /// `EINVAL` when the host's file system has no direct I/O; else the host's errno.
    pub fn go_direct(&self) -> io::Result<()> {
        self.data.host_file().map_or(Ok(()), HostFile::go_direct)
    }

    /// Whether the host's page cache is passed by.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.data.host_file().is_some_and(HostFile::is_direct)
    }

    /// Tells the host that `range` of the data will be read soon. What is not to be in its cache
    /// is not brought there.
    pub fn will_need(&self, range: &Range<u64>) {
        if !self.is_direct()
            && let Some(file) = self.data.host_fd(range.clone())
        {
            let len = std::num::NonZeroU64::new(range.end - range.start);
            // Advice only.
            let _ = rustix::fs::fadvise(file, range.start, len, rustix::fs::Advice::WillNeed);
        }
    }

    /// A copy of the map as it is now. The caller holds the gate exclusive.
    #[must_use]
    pub fn clone_map(&self) -> LayerMap {
        self.map.read().clone()
    }

    /// The blocks that `range` (bytes) touches.
    fn blocks_of(&self, range: &Range<u64>) -> Range<BlockIndex> {
        BlockIndex(range.start / self.block_size)..BlockIndex(range.end.div_ceil(self.block_size))
    }

    /// The bytes of `blocks`, up to the largest offset there is.
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

    /// What the map says at the start of `range`.
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

    /// Notes that the space of `blocks` may go back once record `sequence` is vouched.
    fn defer_free(&self, blocks: &Range<BlockIndex>, sequence: u64) {
        if sequence > 0 || self.log.is_none() {
            self.pending.lock().add(self.bytes_of(blocks), sequence);
        }
    }

    /// Lets the next sync give back whatever the map does not call Data: after a recovery the data
    /// file may hold blocks that no record speaks of.
    fn reclaim(&self) {
        let len = self.data.len().unwrap_or(0).max(self.size());
        let end = len.next_multiple_of(self.block_size);
        self.pending.lock().add(0..end, self.durable.load(Ordering::Relaxed));
    }

    /// Called when the bytes of `blocks` were written, before a record says so.
    fn note_written(&self, blocks: &Range<BlockIndex>) {
        if self.log.is_some() {
            self.dirty_blocks.add(blocks);
        }
    }

    /// Called after a change of `len` bytes of data: one that a running sync has passed already is
    /// then the next one's.
    fn mark_dirty(&self, len: u64) {
        // A plain load first: the line stays shared between the workers once there are many.
        if self.dirty_bytes.load(Ordering::Relaxed) <= sync::MAX_QUICK_SYNC {
            self.dirty_bytes.fetch_add(len.max(1), Ordering::SeqCst);
        }
    }
}

/// Whether the host takes no more, which may change: no space, or a limit. A file that has reached
/// the size it may have is one that is full.
pub(crate) fn is_out_of_space(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG))
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
