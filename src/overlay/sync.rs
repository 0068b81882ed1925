//! Making an overlay durable, and latching it after a failure.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Overlay;
use super::journal::NewEntry;
use super::range_locks::{LockMode, StripeSet};
use super::record::{LogRecord, MtimeOrigin, Nanos};
use super::record_log::{Log, ReserveUse};
use super::state::BlockIndex;
use crate::host::{self, is_out_of_space, os_error};
use crate::layer::Wait;

/// The most changed bytes that are still written about as quickly as one block: 128 KiB.
pub(super) const MAX_QUICK_SYNC: u64 = 128 << 10;
/// The largest small overwrite, in bytes: 64 KiB.
const MAX_SMALL_OVERWRITE: u64 = 64 << 10;
/// The number of consecutive syncs, each of a small overwrite, that count as frequent.
const FREQUENT_SYNCS: u32 = 8;
/// The extent of a sync.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncMode {
    /// The least that a client's request needs; possibly an entry in the journal.
    Fast,
    /// The data and the log themselves, so that freed space can be returned.
    Full,
}

impl Overlay {
    /// Returns whether the overlay was changed since the last sync began.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty_bytes.load(Ordering::Relaxed) > 0
    }

    /// Returns whether a sync would take about as long as the device needs for a few blocks.
    #[must_use]
    pub fn is_quick_to_sync(&self) -> bool {
        self.dirty_bytes.load(Ordering::Relaxed) <= MAX_QUICK_SYNC
            && self.group_commit.is_idle()
            && self.unclosed_layers.lock().is_empty()
            && self.pending.lock().is_empty()
    }

    /// Returns whether each of the last syncs covered a small overwrite. Never waits.
    #[must_use]
    pub fn is_synced_often(&self) -> bool {
        self.small_syncs.load(Ordering::Relaxed) >= FREQUENT_SYNCS
    }

    /// Starts writing `range` (bytes, just written) to the device when the overlay is synced often
    /// and `range` is the only change since the last sync, so that part of the work is done before
    /// the next sync. Best effort.
    pub fn prepare_sync(&self, range: Range<u64>) {
        if !self.is_small_overwrite() || self.is_direct() {
            return;
        }
        if self.dirty_bytes.load(Ordering::Relaxed) != range.end - range.start {
            // Several writes before a sync may hit the same block: each of them would go to the
            // device, and on some file systems the second write waits for the first.
            self.small_syncs.store(0, Ordering::Relaxed);
            return;
        }
        if let Some(file) = self.data.host_fd(range.clone()) {
            host::start_writeback(file, range);
        }
    }

    /// Returns whether the changes since the last sync are only a small overwrite of existing
    /// blocks.
    fn is_small_overwrite(&self) -> bool {
        let Some(log) = &self.log else { return false };
        let is_small =
            (1..=MAX_SMALL_OVERWRITE).contains(&self.dirty_bytes.load(Ordering::Relaxed));
        is_small
            && log.last_sequence() < self.journal.next_sequence(self.durable.load(Ordering::SeqCst))
    }

    /// Makes all changes acknowledged before the call durable and returns freed space to the host.
    /// A temporary overlay promises no durability: only the space is freed.
    pub(super) fn sync_all(&self, mode: SyncMode) -> io::Result<()> {
        match &self.log {
            Some(log) => self.group_commit.run(|| self.sync_now(log, mode))?,
            None => {
                self.dirty_bytes.store(0, Ordering::SeqCst);
                self.close_lower_layers()?;
            }
        }
        // Outside the group commit: callers that waited for the sync need not wait for this.
        self.release_freed(self.durable.load(Ordering::SeqCst));
        Ok(())
    }

    /// Performs one sync: the data behind every record so far, then a `Vouch` for these records,
    /// then the log; or, for few changes, a journal entry.
    fn sync_now(&self, log: &Log, mode: SyncMode) -> io::Result<()> {
        if self.is_latched() {
            return Err(os_error(libc::EIO));
        }
        if self.is_small_overwrite() {
            self.small_syncs.fetch_add(1, Ordering::Relaxed);
        } else if self.is_dirty() {
            self.small_syncs.store(0, Ordering::Relaxed);
        }
        self.dirty_bytes.store(0, Ordering::SeqCst);
        let upto = log.last_sequence();
        self.close_lower_layers().map_err(|error| self.latch_unless_full(log, error))?;
        // Taken after `upto`: a writer notes its blocks before it appends the record. Taken also
        // after the steps that may fail and be retried: the blocks taken here are made durable
        // here, or the disk latches.
        let dirty = self.dirty_blocks.take();
        if mode == SyncMode::Fast
            && let Some(dirty) = dirty
            && self.sync_to_journal(log, upto, &dirty)
        {
            return Ok(());
        }
        self.data.sync().map_err(|error| self.latch(log, &error))?;
        let durable = self.durable.load(Ordering::SeqCst);
        // Always true while there are journal entries: the first of them had a new record.
        if upto > durable {
            let vouch = log.append(&[LogRecord::Vouch { upto, durable }], ReserveUse::Full);
            let vouch = vouch.map_err(|error| self.latch_unless_full(log, error))?;
            log.sync().map_err(|error| self.latch(log, &error))?;
            // The Vouch itself is durable as well; directly after `upto` it covers itself.
            let durable = if vouch == upto + 1 { vouch } else { upto };
            self.durable.store(durable, Ordering::SeqCst);
            log.set_vouched(upto);
            self.journal.void_entries();
        }
        Ok(())
    }

    /// Makes the blocks in `dirty` and the records up to `upto` durable in the journal. Returns
    /// `false` when they do not fit, or when one of the blocks is being changed.
    fn sync_to_journal(&self, log: &Log, upto: u64, dirty: &[BlockIndex]) -> bool {
        let generation = log.vouched();
        let next = self.journal.next_sequence(generation);
        let count = (upto + 1).saturating_sub(next);
        if count == 0 && dirty.is_empty() && self.journal.has_entries() {
            return true; // Nothing has changed since the last entry.
        }
        // Plain overwrites are as quick with a whole sync, and quicker once they are frequent: a
        // whole sync makes the entries void. Freed space needs a whole sync, too.
        let is_plain = upto <= self.durable.load(Ordering::SeqCst);
        if is_plain || self.is_synced_often() || self.is_direct() || !self.pending.lock().is_empty()
        {
            return false;
        }
        let Ok(block_size) = u32::try_from(self.block_size) else { return false };
        if !self.journal.accept(count, dirty.len(), self.block_size) {
            return false;
        }
        let (Some(bytes), Ok(records)) = (self.read_stable(dirty), log.raw_records(next, count))
        else {
            return false;
        };
        let uuid = log.uuid();
        let (blocks, bytes, records) = (dirty, &bytes[..], &records[..]);
        let entry = NewEntry { uuid, block_size, generation, records, blocks, bytes };
        self.journal.write(log.dir(), &entry)
    }

    /// Reads `blocks` while their ranges are locked; `None` when one of them is being changed.
    fn read_stable(&self, blocks: &[BlockIndex]) -> Option<Vec<u8>> {
        let range = |block: &BlockIndex| self.bytes_of(&(*block..BlockIndex(block.0 + 1)));
        let need = blocks.iter().fold(StripeSet::default(), |need, block| {
            self.range_locks.include(need, &range(block), LockMode::Exclusive)
        });
        let _held = self.range_locks.lock(need, Wait::No)?;
        let len = usize::try_from(self.block_size).ok()?;
        let mut bytes = vec![0; blocks.len() * len];
        for (block, piece) in blocks.iter().zip(bytes.chunks_mut(len)) {
            self.data.read_at(piece, range(block).start, Wait::Yes).ok()?;
        }
        Some(bytes)
    }

    /// Makes the overlay read-only for good after a failure of something other than its own sync.
    pub fn poison(&self) {
        let error = os_error(libc::EIO);
        match &self.log {
            Some(log) => drop(self.latch(log, &error)),
            None => self.latched.store(true, Ordering::SeqCst),
        }
    }

    /// Closes a sealed layer: makes everything durable, gives reserved space back, which no write
    /// will use any more, and closes the log in good order. Does nothing when called again.
    ///
    /// # Errors
    /// The errors of [`close`](Self::close).
    pub fn close_sealed(&self) -> io::Result<()> {
        let mut is_closed = self.is_closed.lock();
        if !*is_closed {
            if self.has_reserved.swap(false, Ordering::Relaxed) {
                self.reclaim();
            }
            self.close()?;
            *is_closed = true;
        }
        Ok(())
    }

    /// Closes the sealed layers below, once.
    fn close_lower_layers(&self) -> io::Result<()> {
        let layers = self.unclosed_layers.lock().clone();
        layers.iter().try_for_each(|layer| layer.close_sealed())?;
        // Others may have been added meanwhile.
        let is_closed = |layer: &Arc<Self>| layers.iter().any(|closed| Arc::ptr_eq(closed, layer));
        self.unclosed_layers.lock().retain(|layer| !is_closed(layer));
        Ok(())
    }

    /// Latches the overlay, unless the error only means that there was no space for a record.
    fn latch_unless_full(&self, log: &Log, error: io::Error) -> io::Error {
        if !is_out_of_space(&error) {
            return self.latch(log, &error);
        }
        // Nothing was lost, only not vouched for: the next sync tries again.
        self.mark_dirty(0);
        error
    }

    /// Makes the overlay read-only for good: the host's cache may differ from the device from now
    /// on, so no later sync could be trusted. Returns the `EIO` for the caller's reply.
    fn latch(&self, log: &Log, error: &io::Error) -> io::Error {
        self.latched.store(true, Ordering::SeqCst);
        let durable = self.durable.load(Ordering::SeqCst);
        log::error!("sync failed, the disk is read-only from now on: {error}");
        let poisoned = log
            .append(&[LogRecord::Poisoned { durable, vouched: log.vouched() }], ReserveUse::Full);
        if let Err(error) = poisoned.and_then(|_| log.sync()) {
            log::error!("could not mark the log as poisoned: {error}");
        }
        os_error(libc::EIO)
    }

    /// Records a modification time in the log for the next mount.
    ///
    /// # Errors
    /// The host's errno.
    pub fn record_mtime(&self, mtime: Nanos, origin: MtimeOrigin) -> io::Result<()> {
        self.map.write().mtime = Some((mtime, origin));
        if let Some(log) = &self.log
            && !self.is_latched()
        {
            log.append(&[LogRecord::Attr { mtime, origin }], ReserveUse::Keep)?;
        }
        Ok(())
    }

    /// Returns whether `maintain` would have work to do. Never waits for the device: the caller also
    /// answers requests that are past their deadline. What a sync has locked is left to the next call.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        self.is_dirty()
            || self.journal.has_idle_entries()
            || !self.unclosed_layers.lock().is_empty()
            || !self.pending.lock().is_empty()
            || self.log.as_ref().is_some_and(Log::needs_compaction)
    }

    /// Does the background work due every few seconds: a sync when something has changed, and a
    /// compaction when the log has become long.
    ///
    /// # Errors
    /// The host's errno; after a failed sync the overlay is latched.
    pub fn maintain(&self) -> io::Result<()> {
        if self.is_latched() {
            return Ok(());
        }
        let is_waiting =
            || !self.pending.lock().is_empty() || !self.unclosed_layers.lock().is_empty();
        if self.is_dirty() || self.journal.has_entries() || is_waiting() {
            self.sync_all(SyncMode::Full)?;
        }
        let Some(log) = &self.log else { return Ok(()) };
        if !log.needs_compaction() {
            return Ok(());
        }
        self.group_commit.run(|| {
            self.sync_now(log, SyncMode::Full)?;
            if let Err(error) = log.compact(self.durable.load(Ordering::SeqCst), self.tag) {
                // No sync has failed, and other callers may share this one: continue with the old
                // log.
                log::warn!("a long log could not be reduced: {error}");
            }
            Ok(())
        })
    }

    /// Syncs the overlay and marks the log as closed in good order. This is the last call before
    /// the overlay is dropped.
    ///
    /// # Errors
    /// `EIO` when the overlay has latched; otherwise the host's errno.
    pub fn close(&self) -> io::Result<()> {
        self.sync_all(SyncMode::Full)?;
        let Some(log) = &self.log else { return Ok(()) };
        self.journal.finish();
        log.append(&[LogRecord::Close], ReserveUse::Full)?;
        log.finish()
    }
}
