//! Committing: copying an overlay down into its base while the disk stays in use.
//!
//! ```text
//!   Intent, vouched           the base may change from here on; a crash is read that way
//!   copy Data, zero Zero      a batch of the base's blocks, not visible yet: the overlay
//!                             still answers for them
//!   fdatasync(base)           from here on they may be visible
//!   Data, Zero -> Lower       the batch, except blocks that changed after they were copied
//!   ... the next batch ...
//!   identity into `stack`, Done
//! ```
//!
//! The disk reads the same at every moment, and after a crash at any moment: a block becomes Lower
//! only once the base holds it durably. Repeating a commit is safe.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::Overlay;
use super::blocks::BlockMap;
use super::range_locks::LockMode;
use super::record::LogRecord;
use super::record_log::ReserveUse;
use super::state::{BlockIndex, BlockRun, BlockState};
use super::sync::SyncMode;
use crate::host::{self, os_error};
use crate::layer::{Layer, Wait, WritableLayer};

/// Bytes copied into the base before they are made durable and freed: 256 MiB.
const COMMIT_BATCH: u64 = 256 << 20;
/// Bytes copied between two checks of `should_stop`, and freed under one lock: 8 MiB.
const COPY_STEP: u64 = 8 << 20;
/// The most passes over the disk; each further pass copies blocks changed during the previous one.
const MAX_PASSES: u32 = 3;

/// The destination of a commit.
pub struct CommitTarget<'a> {
    /// The base, for its size, for zeros, and for data that the host cannot copy.
    pub layer: &'a dyn WritableLayer,
    /// The base's host file, for copies inside the host, and the offset in bytes at which the base
    /// begins in that file; `None` when the base is not a single host file.
    pub file: Option<(&'a File, u64)>,
    /// Receives the number of bytes done and their total.
    pub on_progress: &'a dyn Fn(u64, u64),
    /// Returns whether to stop.
    pub should_stop: &'a dyn Fn() -> bool,
}

/// Tracks what changes in the overlay during a commit.
#[derive(Default)]
pub(super) struct CommitTracker {
    /// Whether a commit is running. Every change reads this flag instead of taking the lock.
    is_running: AtomicBool,
    /// The changes so far; `None` when no commit is running.
    changes: Mutex<Option<ChangesDuringCommit>>,
}

struct ChangesDuringCommit {
    /// Blocks changed since their copy began, marked as Data.
    blocks: BlockMap,
    /// The smallest size of the disk since the commit began, in bytes.
    smallest_size: u64,
}

impl CommitTracker {
    /// Starts to track changes of a disk of `size` bytes.
    fn begin(&self, size: u64) {
        let changes = ChangesDuringCommit { blocks: BlockMap::new(), smallest_size: size };
        *self.changes.lock() = Some(changes);
        self.is_running.store(true, Ordering::SeqCst);
    }

    /// Stops tracking and forgets the changes.
    fn end(&self) {
        self.is_running.store(false, Ordering::SeqCst);
        *self.changes.lock() = None;
    }

    /// Marks `blocks` as changed. Called before the change, with their ranges locked.
    #[inline]
    pub(super) fn note_change(&self, blocks: &Range<BlockIndex>) {
        if self.is_running.load(Ordering::SeqCst)
            && let Some(changes) = &mut *self.changes.lock()
        {
            changes.blocks.set(blocks.clone(), BlockState::Data);
        }
    }

    /// Notes a new size in bytes. Called before the size changes.
    pub(super) fn note_size(&self, size: u64) {
        if let Some(changes) = &mut *self.changes.lock() {
            changes.smallest_size = changes.smallest_size.min(size);
        }
    }
}

impl Overlay {
    /// Returns whether a commit into the base has begun and not ended, perhaps in an earlier mount.
    #[must_use]
    pub fn is_committing(&self) -> bool {
        self.map.read().is_committing
    }

    fn record_commit_mark(&self, mark: &LogRecord) -> io::Result<()> {
        if let Some(log) = &self.log {
            log.append(std::slice::from_ref(mark), ReserveUse::Full)?;
        }
        self.map.write().is_committing = *mark == LogRecord::Intent;
        self.mark_dirty(0);
        Ok(())
    }

    /// Begins a commit, durably. The caller holds the gate exclusive.
    ///
    /// # Errors
    /// The host's errno; the commit has not begun in that case.
    pub fn begin_commit(&self) -> io::Result<()> {
        self.check_writable()?;
        if !self.is_committing() {
            self.record_commit_mark(&LogRecord::Intent)?;
        }
        self.sync_all(SyncMode::Full)?;
        self.commit.begin(self.size());
        Ok(())
    }

    /// Stops tracking changes, because the commit is interrupted or done.
    pub fn pause_commit(&self) {
        self.commit.end();
    }

    /// Marks the end of a commit, durably. The `stack` already holds the base's new identity.
    ///
    /// # Errors
    /// The host's errno.
    pub fn end_commit(&self) -> io::Result<()> {
        self.record_commit_mark(&LogRecord::Done)?;
        self.sync_all(SyncMode::Full)
    }

    /// Zeros the parts of the base that this layer hides with zeros because the disk was smaller
    /// once, durably, so that the base may become visible there.
    ///
    /// # Errors
    /// The host's errno.
    pub fn commit_truncation(&self, to: &CommitTarget<'_>) -> io::Result<()> {
        let (start, end) = {
            let map = self.map.read();
            (map.lower_limit, map.size.min(to.layer.size()))
        };
        if start >= end {
            return Ok(());
        }
        let runs: Vec<BlockRun> = {
            let map = self.map.read();
            map.blocks.runs(self.blocks_of(&(start..end))).collect()
        };
        for run in runs.into_iter().filter(|run| run.state == BlockState::Lower) {
            let bytes = self.bytes_of(&run.range);
            to.layer.punch_hole(
                bytes.start.max(start)..bytes.end.min(end),
                &super::merge::NothingBelow,
                Wait::Yes,
            )?;
        }
        to.layer.sync()
    }

    /// Makes the base, of `base` bytes, visible up to the smallest size of the disk since the
    /// commit began. The caller holds the gate exclusive and has durably zeroed the base there.
    ///
    /// # Errors
    /// The host's errno.
    pub fn raise_lower_limit(&self, base: u64) -> io::Result<()> {
        let smallest =
            self.commit.changes.lock().as_ref().map_or(0, |changes| changes.smallest_size);
        let (size, old) = {
            let map = self.map.read();
            (map.size, map.lower_limit)
        };
        let lower_limit = smallest.min(base).min(size);
        if lower_limit <= old {
            return Ok(());
        }
        if let Some(log) = &self.log {
            log.append(&[LogRecord::Size { size, lower_limit }], ReserveUse::Full)?;
        }
        self.map.write().lower_limit = lower_limit;
        self.revision.fetch_add(1, Ordering::Release);
        self.mark_dirty(0);
        Ok(())
    }

    /// Copies the blocks of this layer into the base, batch by batch, and makes them Lower.
    ///
    /// # Errors
    /// `EINTR` when `to.should_stop` returns true; otherwise the host's errno. Blocks that became
    /// Lower are in the base.
    pub fn commit_blocks(&self, to: &CommitTarget<'_>) -> io::Result<()> {
        // Make the current lower limit durable first: a power cut could otherwise bring back an
        // older one, which cuts through a sector that the base already holds whole.
        self.sync_all(SyncMode::Full)?;
        for _ in 0..MAX_PASSES {
            let (done, left) = (self.commit_pass(to)?, self.usage());
            if done == 0 || left.data + left.zero == 0 {
                break;
            }
        }
        self.sync_all(SyncMode::Full)
    }

    /// Makes one pass over the disk; returns the number of bytes that became Lower.
    fn commit_pass(&self, to: &CommitTarget<'_>) -> io::Result<u64> {
        let usage = self.usage();
        let (total, mut at, mut done, mut freed) = (usage.data + usage.zero, 0, 0, 0);
        let end = BlockIndex(self.size().min(to.layer.size()).div_ceil(self.block_size));
        loop {
            let batch = self.next_batch(&mut at, end);
            if batch.is_empty() {
                return Ok(freed);
            }
            for run in &batch {
                self.commit_run(run, to)?;
                done += run.len() * self.block_size;
                (to.on_progress)(done.min(total), total);
            }
            // If this sync fails, the copies are void; none of these blocks has become Lower yet.
            to.layer.sync()?;
            for run in &batch {
                freed += self.release_unchanged(run)?;
            }
        }
    }

    /// Returns the next runs that this layer holds, from block `at` on: at most one batch, in
    /// pieces.
    fn next_batch(&self, at: &mut u64, end: BlockIndex) -> Vec<BlockRun> {
        let map = self.map.read();
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while *at < end.0 && bytes < COMMIT_BATCH {
            let mut run = map.blocks.run_at(BlockIndex(*at)..end);
            if run.state == BlockState::Data {
                run.range.end.0 = run.range.end.0.min(*at + COPY_STEP / self.block_size);
                bytes += run.len() * self.block_size;
            }
            *at = run.range.end.0;
            if run.state != BlockState::Lower {
                batch.push(run);
            }
            if batch.len() >= 1 << 16 {
                break;
            }
        }
        batch
    }

    /// Copies one run into the base.
    fn commit_run(&self, run: &BlockRun, to: &CommitTarget<'_>) -> io::Result<()> {
        if (to.should_stop)() {
            return Err(os_error(libc::EINTR));
        }
        {
            // Changes from now on count as changes since the copy.
            let mut changes = self.commit.changes.lock();
            let changes = changes.as_mut().ok_or_else(|| os_error(libc::EINTR))?;
            changes.blocks.set(run.range.clone(), BlockState::Lower);
        }
        // A writer that marked the run before this and has not written yet holds the range lock:
        // wait for it.
        let bytes = self.bytes_of(&run.range);
        drop(self.range_locks.lock_range(&bytes, LockMode::Exclusive, Wait::Yes)?);
        let bytes = bytes.start..bytes.end.min(self.size()).min(to.layer.size());
        if bytes.is_empty() {
            return Ok(());
        }
        if run.state == BlockState::Zero {
            return to.layer.punch_hole(bytes, &super::merge::NothingBelow, Wait::Yes);
        }
        let copied = match (self.data.host_fd(bytes.clone()), to.file) {
            (Some(from), Some((file, start))) => {
                host::copy_range(from, bytes.clone(), file.as_fd(), start + bytes.start)
            }
            _ => Ok(0),
        };
        let mut at = bytes.start + host::or_copied_none(copied)?;
        let mut buf = Vec::new();
        // A server is sent as much as it can take at a time.
        let chunk = if to.file.is_some() { host::COPY_CHUNK as u64 } else { COPY_STEP };
        while at < bytes.end {
            let len = (bytes.end - at).min(chunk);
            buf.resize(usize::try_from(len).map_err(|_| os_error(libc::EFBIG))?, 0);
            self.data.read_at(&mut buf, at, Wait::Yes)?;
            to.layer.write_at(&buf, at, &super::merge::NothingBelow, Wait::Yes)?;
            at += len;
        }
        Ok(())
    }

    /// Makes the blocks of `run` that did not change since their copy Lower; returns their bytes.
    fn release_unchanged(&self, run: &BlockRun) -> io::Result<u64> {
        let bytes = self.bytes_of(&run.range);
        let _held = self.range_locks.lock_range(&bytes, LockMode::Exclusive, Wait::Yes)?;
        let clean: Vec<Range<BlockIndex>> = {
            let changes = self.commit.changes.lock();
            let changes = changes.as_ref().ok_or_else(|| os_error(libc::EINTR))?;
            let map = self.map.read();
            // Past the lower limit the base is not visible, so blocks held there stay.
            let seen = if map.lower_limit >= map.size {
                u64::MAX
            } else {
                map.lower_limit / self.block_size
            };
            let end = BlockIndex(run.range.end.0.min(seen).max(run.range.start.0));
            let kept = changes.blocks.runs(run.range.start..end);
            let clean = kept.filter(|kept| kept.state == BlockState::Lower).map(|kept| kept.range);
            clean
                .flat_map(|range| map.blocks.runs(range).collect::<Vec<_>>())
                .filter(|now| now.state == run.state)
                .map(|now| now.range)
                .collect()
        };
        let mut freed = 0;
        for range in clean {
            let sequence = self.publish(&range, BlockState::Lower)?;
            if run.state == BlockState::Data {
                self.defer_free(&range, sequence);
            }
            freed += (range.end.0 - range.start.0) * self.block_size;
        }
        self.mark_dirty(0);
        Ok(freed)
    }
}
