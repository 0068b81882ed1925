//! A writable copy-on-write layer: the changes of a disk, kept apart from its base.
//!
//! ```text
//!   write ->  data file (every block at its own disk offset)
//!             then the log (durable map, append-only)         only persistent overlays
//!             then the map in memory                          what reads and seeks go by
//! ```
//!
//! - `change`: writes, zeroing, sizes. `blocks`: the map in memory. `record`, `log`: the durable map. `data`: the host files.
//! - `ranges`: which bytes are being changed. `readers`, `pending`: when freed space may go back.
//! - `turns`: who shares a sync. `recover`: from files to a running overlay. `stack`: which
//!   layers make a disk, on disk. `keep`: from temporary to persistent.
//!   `verify`: is it whole? `reflink`: the other kind of overlay, which has no map: a reflink copy
//!   of its base. `journal`: syncs of few changes. `commit`: down into the base. `sealed`, `merge`,
//!   `tree`, `shelf`: layers below. `fiemap`: where the host keeps a file's blocks.
//!
//! Locks, outermost first: the disk's gate (held by the caller), `ranges`, the log's tail, the map.
//! `pending` is taken inside any of them and nothing is taken inside it. Only `ranges` is held
//! across I/O.
//!
//! Data first, map after: a crash between the two leaves bytes that nobody looks at. Freeing is
//! the other way round: record, map, and the space only once that record is vouched, so that a
//! power cut never finds a hole where the older map says data.

pub mod blocks;
mod change;
mod commit;
pub mod data;
mod fiemap;
pub mod journal;
pub mod keep;
mod leaf;
pub mod life;
pub mod log;
mod merge;
pub mod pending;
pub mod persist;
pub mod ranges;
pub mod readers;
pub mod record;
pub mod recover;
pub mod reflink;
pub mod sealed;
pub mod shelf;
pub mod stack;
mod sync;
pub mod tree;
pub mod turns;
pub mod verify;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use parking_lot::{Mutex, RwLock};

use self::blocks::{BlockIndex, State};
pub use self::commit::CommitTo;
use self::data::{HostFile, Storage};
use self::journal::{Fresh, Journal};
use self::log::Log;
use self::pending::Pending;
use self::ranges::RangeLocks;
use self::readers::Readers;
use self::record::{Image, Nanos, Stamp, Tag};
use self::turns::Turns;
use crate::extents::{Extent, Kind};
use crate::host::errno;
use crate::layer::{Copy, Layer, Wait};

/// The default block size in bytes: the page size, so a page written is never read first.
pub const DEFAULT_BLOCK: u32 = 4096;
/// Ranges are locked in units of at least this many bytes: a 1 MiB write takes nine locks.
const LOCK_UNIT: u64 = 128 << 10;
/// The largest size of a disk: what a signed file offset can name.
pub const LARGEST: u64 = i64::MAX.cast_unsigned();

/// A copy-on-write layer.
pub struct Overlay {
    /// Block size in bytes.
    block: u64,
    data: Arc<dyn Storage>,
    map: RwLock<Image>,
    /// `None`: a temporary overlay, gone when it is dropped.
    log: Option<Log>,
    tag: Tag,
    ranges: RangeLocks,
    readers: Readers,
    pending: Mutex<Pending>,
    turns: Turns,
    /// What the next sync has to write, while that is little.
    fresh: Fresh,
    journal: Journal,
    /// The highest sequence whose record, and the data behind it, is durable.
    durable: AtomicU64,
    /// Bytes that were changed since the last sync began; no longer counted once they are many.
    dirty: AtomicU64,
    /// Syncs in a row, each of a small overwrite.
    habit: AtomicU32,
    /// A sync failed: no write and no sync succeeds any more.
    latched: AtomicBool,
    /// Counts changes of the map, for those who keep what they learnt from it.
    revision: AtomicU64,
    /// The most Data blocks there may be.
    limit: Option<u64>,
    /// Sealed layers below that must be durable before this one vouches for anything.
    unsettled: Mutex<Vec<Arc<Overlay>>>,
    /// The commit into the base that is under way.
    commit: Mutex<Option<commit::Progress>>,
    /// Whether there is one: what every change looks at.
    is_committing: AtomicBool,
    /// It is sealed, durable and its log closed: nothing is left to be done for it.
    settled: Mutex<bool>,
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
    /// An overlay over `data` that starts as `image`. `limit` caps the bytes of data it may hold.
    #[must_use]
    pub fn new(
        block: u32,
        data: Arc<dyn Storage>,
        image: Image,
        log: Option<Log>,
        tag: Tag,
        limit: Option<u64>,
    ) -> Self {
        let block = u64::from(block);
        let durable = log.as_ref().map_or(u64::MAX, Log::last);
        Self {
            block,
            data,
            map: RwLock::new(image),
            log,
            tag,
            ranges: RangeLocks::new(block.max(LOCK_UNIT)),
            readers: Readers::default(),
            pending: Mutex::default(),
            turns: Turns::default(),
            fresh: Fresh::default(),
            journal: Journal::default(),
            durable: AtomicU64::new(durable),
            dirty: AtomicU64::new(0),
            habit: AtomicU32::new(0),
            latched: AtomicBool::new(false),
            revision: AtomicU64::new(0),
            limit: limit.map(|limit| limit / block),
            unsettled: Mutex::default(),
            commit: Mutex::default(),
            is_committing: AtomicBool::new(false),
            settled: Mutex::new(false),
            is_read_only: false,
        }
    }

    /// A layer that was sealed and closed in good order before.
    #[must_use]
    pub fn closed(block: u32, data: Arc<dyn Storage>, image: Image, tag: Tag) -> Self {
        let layer = Self::new(block, data, image, None, tag, None);
        *layer.settled.lock() = true;
        layer
    }

    /// Puts it on `layers`: each of them is made durable before this one vouches for a change.
    pub fn stand_on(&self, layers: &[Arc<Self>]) {
        // One that is being settled at this moment is waited for later, not here.
        let is_open = |layer: &&Arc<Self>| layer.settled.try_lock().is_none_or(|done| !*done);
        let open = layers.iter().filter(is_open);
        *self.unsettled.lock() = open.cloned().collect();
    }

    /// Caps what it may hold from now on, in bytes of data.
    pub fn set_limit(&mut self, limit: Option<u64>) {
        self.limit = limit.map(|limit| limit / self.block);
    }

    /// Takes the place of `older`: what was learnt from that map is not taken for this one's.
    pub fn follow(&self, older: &Self) {
        self.revision.store(older.revision() + 1, Ordering::Release);
    }

    /// Block size in bytes.
    #[must_use]
    pub fn block(&self) -> u64 {
        self.block
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
            data: map.blocks.data_blocks().saturating_mul(self.block),
            zero: map.blocks.zero_blocks().saturating_mul(self.block),
        }
    }

    /// Changes whenever the map has changed.
    #[must_use]
    pub fn revision(&self) -> u64 {
        self.revision.load(Ordering::Acquire)
    }

    /// The modification time that the log knows.
    #[must_use]
    pub fn mtime(&self) -> Option<(Nanos, Stamp)> {
        self.map.read().mtime
    }

    /// The data file on the host, to look at its file system.
    #[must_use]
    pub fn first_file(&self) -> Option<File> {
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
            && let Some(file) = self.data.backing(range.clone())
        {
            let len = std::num::NonZeroU64::new(range.end - range.start);
            // Advice only.
            let _ = rustix::fs::fadvise(file, range.start, len, rustix::fs::Advice::WillNeed);
        }
    }

    /// A copy of the map as it is now. The caller holds the gate exclusive.
    #[must_use]
    pub fn image(&self) -> Image {
        self.map.read().clone()
    }

    /// The blocks that `range` (bytes) touches.
    fn blocks_of(&self, range: &Range<u64>) -> Range<BlockIndex> {
        BlockIndex(range.start / self.block)..BlockIndex(range.end.div_ceil(self.block))
    }

    /// The bytes of `blocks`, up to the largest offset there is.
    fn bytes_of(&self, blocks: &Range<BlockIndex>) -> Range<u64> {
        blocks.start.0.saturating_mul(self.block)..blocks.end.0.saturating_mul(self.block)
    }

    fn check_latch(&self) -> io::Result<()> {
        match (self.is_read_only, self.is_latched()) {
            (true, _) => Err(errno(libc::EROFS)),
            (false, true) => Err(errno(libc::EIO)),
            (false, false) => Ok(()),
        }
    }

    /// What the map says at the start of `range`.
    fn look_up(&self, range: &Range<u64>) -> Extent {
        let map = self.map.read();
        if range.start >= map.size {
            return Extent::new(range.clone(), Kind::Hole);
        }
        let run = map.blocks.run_at(self.blocks_of(range));
        let mut end = self.bytes_of(&run.range).end.min(range.end).min(map.size);
        let kind = match run.state {
            State::Data => Kind::Data,
            State::Zero => Kind::Hole,
            State::Lower if range.start >= map.lower_limit => Kind::Hole,
            State::Lower => {
                end = end.min(map.lower_limit);
                Kind::Lower
            }
        };
        Extent::new(range.start..end, kind)
    }

    /// Notes that the space of `blocks` may go back once record `sequence` is vouched.
    fn free(&self, blocks: &Range<BlockIndex>, sequence: u64) {
        if sequence > 0 || self.log.is_none() {
            self.pending.lock().add(self.bytes_of(blocks), sequence);
        }
    }

    /// Lets the next sync give back whatever the map does not call Data: after a recovery the data
    /// file may hold blocks that no record speaks of.
    fn reclaim(&self) {
        let len = self.data.len().unwrap_or(0).max(self.size());
        let end = len.next_multiple_of(self.block);
        self.pending.lock().add(0..end, self.durable.load(Ordering::Relaxed));
    }

    /// Called when the bytes of `blocks` were written, before a record says so.
    fn note_written(&self, blocks: &Range<BlockIndex>) {
        if self.log.is_some() {
            self.fresh.note(blocks);
        }
    }

    /// Called after a change of `len` bytes of data: one that a running sync has passed already is
    /// then the next one's.
    fn mark_dirty(&self, len: u64) {
        // A plain load first: the line stays shared between the workers once there are many.
        if self.dirty.load(Ordering::Relaxed) <= sync::FEW {
            self.dirty.fetch_add(len.max(1), Ordering::SeqCst);
        }
    }
}

/// Whether the host takes no more, which may change: no space, or a limit. A file that has reached
/// the size it may have is one that is full.
pub(crate) fn is_full(error: &io::Error) -> bool {
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
        if extent.kind == Kind::Data {
            let len = usize::try_from(extent.len()).map_err(|_| errno(libc::EFBIG))?;
            self.data.read_at(&mut buf[..len], offset, wait)?;
        }
        Ok(extent)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        _: Wait,
        copy: Copy<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        let _reading = self.readers.enter();
        let extent = self.look_up(&range);
        let file =
            if extent.kind == Kind::Data { self.data.backing(extent.range.clone()) } else { None };
        let copied = file.map(|file| copy(file, extent.range.clone())).transpose()?;
        Ok((extent, copied))
    }
}
