//! Making an overlay durable, latching it when that fails, and giving freed space back.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::blocks::{BlockIndex, BlockState};
use super::journal::NewEntry;
use super::log::{Log, ReserveUse};
use super::range_locks::{LockMode, StripeSet};
use super::record::{LogRecord, MtimeOrigin, Nanos};
use super::{Overlay, is_out_of_space};
use crate::host::{self, os_error};
use crate::layer::Wait;

/// Up to so many changed bytes are few: written as quickly as one block, more or less.
pub(super) const MAX_QUICK_SYNC: u64 = 128 << 10;
/// What a small overwrite is at the most, in bytes.
const MAX_SMALL_OVERWRITE: u64 = 64 << 10;
/// So many syncs in a row, each of a small overwrite, are a habit.
const FREQUENT_SYNCS: u32 = 8;
/// Freed space goes back in pieces of at most this many bytes of what the host holds, each under
/// its range's lock.
const FREE_CHUNK: u64 = 1 << 30;
/// Where something is being changed, in pieces of this many: it holds few of the range locks.
const SMALL_FREE_CHUNK: u64 = 1 << 20;

/// How much a sync is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SyncMode {
    /// What a client waits for.
    Fast,
    /// All of it: data and log as they are, and freed space given back.
    Full,
}

impl Overlay {
    /// Whether something was changed since the last sync began.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty_bytes.load(Ordering::Relaxed) > 0
    }

    /// Whether a sync would take about as long as the device needs for a few blocks.
    #[must_use]
    pub fn is_quick_to_sync(&self) -> bool {
        self.dirty_bytes.load(Ordering::Relaxed) <= MAX_QUICK_SYNC
            && self.group_commit.is_idle()
            && self.unclosed_layers.lock().is_empty()
            && self.pending.lock().is_empty()
    }

    /// Whether the last syncs were each of a small overwrite. Waits for nothing.
    #[must_use]
    pub fn is_synced_often(&self) -> bool {
        self.small_syncs.load(Ordering::Relaxed) >= FREQUENT_SYNCS
    }

    /// Called after `range`, in bytes, was written to an overlay that is synced often. When that is all
    /// since the last sync, the host begins to write it to the device: part of that is done by the
    /// time a sync of it comes. Best effort.
    pub fn prepare_sync(&self, range: Range<u64>) {
        if !self.is_small_overwrite() || self.is_direct() {
            return;
        }
        if self.dirty_bytes.load(Ordering::Relaxed) != range.end - range.start {
            // Who writes several times before a sync may write the same block: it would go to the
            // device each time, and some file systems have the second write wait for the first.
            self.small_syncs.store(0, Ordering::Relaxed);
            return;
        }
        if let Some(file) = self.data.host_fd(range.clone()) {
            host::start_writeback(file, range);
        }
    }

    /// Whether what was written since the last sync is little, and nothing else has changed.
    fn is_small_overwrite(&self) -> bool {
        let Some(log) = &self.log else { return false };
        let is_small =
            (1..=MAX_SMALL_OVERWRITE).contains(&self.dirty_bytes.load(Ordering::Relaxed));
        is_small
            && log.last_sequence() < self.journal.next_sequence(self.durable.load(Ordering::SeqCst))
    }

    /// Makes all that was acknowledged before the call durable, and gives freed space back. A
    /// temporary overlay promises nothing: only the space goes back.
    pub(super) fn sync_all(&self, pace: SyncMode) -> io::Result<()> {
        match &self.log {
            Some(log) => self.group_commit.run(|| self.sync_now(log, pace))?,
            None => {
                self.dirty_bytes.store(0, Ordering::SeqCst);
                self.close_lower_layers()?;
            }
        }
        // After the turn: whoever waited for it need not wait for this.
        self.release_freed(self.durable.load(Ordering::SeqCst));
        Ok(())
    }

    /// One sync: the data behind every record so far, then a `Vouch` for them, then the log; or,
    /// of few changes, an entry in the journal.
    fn sync_now(&self, log: &Log, pace: SyncMode) -> io::Result<()> {
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
        // After `upto`: whoever has put a record there has noted its blocks. And after what may
        // fail and be tried again: what is taken here is made durable here, or the disk latches.
        let fresh = self.dirty_blocks.take();
        if pace == SyncMode::Fast
            && let Some(fresh) = fresh
            && self.sync_to_journal(log, upto, &fresh)
        {
            return Ok(());
        }
        self.data.sync().map_err(|error| self.latch(log, &error))?;
        let durable = self.durable.load(Ordering::SeqCst);
        // So it is while there are entries: the first of them had a new record.
        if upto > durable {
            let vouch = log.append(&[LogRecord::Vouch { upto, durable }], ReserveUse::Full);
            let vouch = vouch.map_err(|error| self.latch_unless_full(log, error))?;
            log.sync().map_err(|error| self.latch(log, &error))?;
            // The Vouch itself is durable as well; with nothing in between it covers itself.
            let durable = if vouch == upto + 1 { vouch } else { upto };
            self.durable.store(durable, Ordering::SeqCst);
            log.set_vouched(upto);
            self.journal.void_entries();
        }
        Ok(())
    }

    /// Makes the changes in `dirty_blocks`, and the records up to `upto`, durable in the journal; `false`
    /// when they do not fit, or somebody changes those blocks at this moment.
    fn sync_to_journal(&self, log: &Log, upto: u64, fresh: &[BlockIndex]) -> bool {
        let generation = log.vouched();
        let next = self.journal.next_sequence(generation);
        let count = (upto + 1).saturating_sub(next);
        if count == 0 && fresh.is_empty() && self.journal.has_entries() {
            return true; // Nothing was changed since the last entry.
        }
        // Overwrites alone are as quick the other way, and quicker once they are a habit: a whole sync
        // makes the entries void. Freed space waits for one, too.
        let is_plain = upto <= self.durable.load(Ordering::SeqCst);
        if is_plain || self.is_synced_often() || self.is_direct() || !self.pending.lock().is_empty()
        {
            return false;
        }
        let Ok(block) = u32::try_from(self.block_size) else { return false };
        if !self.journal.accept(count, fresh.len(), self.block_size) {
            return false;
        }
        let (Some(bytes), Ok(records)) = (self.read_stable(fresh), log.raw_records(next, count))
        else {
            return false;
        };
        let uuid = log.uuid();
        let (blocks, bytes, records) = (fresh, &bytes[..], &records[..]);
        let draft = NewEntry { uuid, block_size: block, generation, records, blocks, bytes };
        self.journal.write(log.dir(), &draft)
    }

    /// What `blocks` hold, while nobody changes them.
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

    /// Makes the overlay read-only for good because something else than a sync of it failed.
    pub fn poison(&self) {
        let error = os_error(libc::EIO);
        match &self.log {
            Some(log) => drop(self.latch(log, &error)),
            None => self.latched.store(true, Ordering::SeqCst),
        }
    }

    /// A sealed layer's end: everything durable, the log closed in good order. Again is nothing.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn close_sealed(&self) -> io::Result<()> {
        let mut settled = self.is_closed.lock();
        if !*settled {
            self.close()?;
            *settled = true;
        }
        Ok(())
    }

    /// Makes the sealed layers below durable, once.
    fn close_lower_layers(&self) -> io::Result<()> {
        let layers = self.unclosed_layers.lock().clone();
        layers.iter().try_for_each(|layer| layer.close_sealed())?;
        self.unclosed_layers.lock().clear();
        Ok(())
    }

    /// Latches, unless it was only that there is no space for a record.
    fn latch_unless_full(&self, log: &Log, error: io::Error) -> io::Error {
        if !is_out_of_space(&error) {
            return self.latch(log, &error);
        }
        // Nothing was lost, only not vouched for: the next sync tries again.
        self.mark_dirty(0);
        error
    }

    /// Makes the overlay read-only for good: what the host has in its cache may not be what is
    /// on the device any more, so no later sync could be believed. Returns the `EIO` to answer.
    fn latch(&self, log: &Log, error: &io::Error) -> io::Error {
        self.latched.store(true, Ordering::SeqCst);
        let durable = self.durable.load(Ordering::SeqCst);
        ::log::error!("sync failed, the disk is read-only from now on: {error}");
        let poisoned = log
            .append(&[LogRecord::Poisoned { durable, vouched: log.vouched() }], ReserveUse::Full);
        if let Err(error) = poisoned.and_then(|_| log.sync()) {
            ::log::error!("could not mark the log as poisoned: {error}");
        }
        os_error(libc::EIO)
    }

    /// Gives back the space of what records up to `durable` freed and nobody has taken since.
    ///
    /// What is being changed at this moment is left for the next time: a change may be waiting
    /// for a base that hangs, and no sync waits for that.
    ///
    /// Takes steps for the space that there is, not for the bytes that were freed: what holds none
    /// is one piece, however long, and is left as one when some of it is being changed.
    fn release_freed(&self, durable: u64) {
        let (mut from, mut most) = (0, FREE_CHUNK);
        loop {
            let Some(waiting) = self.pending.lock().first(&(from..u64::MAX), durable) else {
                return;
            };
            let (piece, holds_space) = self.next_free_chunk(&waiting, most);
            let need = self.range_locks.include(StripeSet::default(), &piece, LockMode::Exclusive);
            let Some(_held) = self.range_locks.lock(need, Wait::No) else {
                if most == SMALL_FREE_CHUNK || !holds_space {
                    from = piece.end;
                }
                most = SMALL_FREE_CHUNK;
                continue;
            };
            // Under the lock every change of this piece is whole: map and pending agree.
            let parts = self.pending.lock().within(&piece, durable);
            self.readers.drain();
            for part in &parts {
                if let Err(error) = self.punch_unused(part) {
                    // Space that stays is no loss of data; a host that cannot punch never will.
                    ::log::debug!("space is not given back: {error}");
                }
                self.pending.lock().remove(part);
            }
            from = piece.end;
            most = (most * 2).min(FREE_CHUNK);
        }
    }

    /// The first piece of `waiting`, whole blocks, and whether the host may hold space for it: at
    /// most `most` bytes when it may, else all up to where it may again.
    fn next_free_chunk(&self, waiting: &Range<u64>, most: u64) -> (Range<u64>, bool) {
        let Range { start, end } = *waiting;
        if end - start <= SMALL_FREE_CHUNK {
            return (start..end, true);
        }
        match self.data.next_allocated(start..end) {
            None => (start..end, false),
            Some(at) if at - start >= self.block_size => (start..at - at % self.block_size, false),
            Some(_) => (start..end.min(start.saturating_add(most)), true),
        }
    }

    /// Punches what the map does not call Data in `part`.
    fn punch_unused(&self, part: &Range<u64>) -> io::Result<()> {
        let mut free: Vec<Range<u64>> = Vec::new();
        {
            let map = self.map.read();
            let runs = map.blocks.runs(self.blocks_of(part));
            for run in runs.filter(|run| run.state != BlockState::Data) {
                let bytes = self.bytes_of(&run.range);
                // Lower and Zero runs side by side are one hole.
                match free.last_mut() {
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => free.push(bytes),
                }
            }
        }
        free.into_iter().try_for_each(|range| self.data.punch_hole(range))
    }

    /// Puts a modification time into the log, for the next mount to find.
    ///
    /// # Errors
    /// The host's errno.
    pub fn record_mtime(&self, mtime: Nanos, stamp: MtimeOrigin) -> io::Result<()> {
        self.map.write().mtime = Some((mtime, stamp));
        if let Some(log) = &self.log
            && !self.is_latched()
        {
            log.append(&[LogRecord::Attr { mtime, stamp }], ReserveUse::Keep)?;
        }
        Ok(())
    }

    /// Whether `maintain` would have something to do.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        self.is_dirty()
            || self.journal.has_entries()
            || !self.unclosed_layers.lock().is_empty()
            || !self.pending.lock().is_empty()
            || self.log.as_ref().is_some_and(Log::needs_compaction)
    }

    /// What happens in the background every few seconds: a sync when there is something new,
    /// and a shorter log when it has become long.
    ///
    /// # Errors
    /// The host's errno; a failed sync has latched the overlay.
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
                // No sync has failed, and others may share this one: the log goes on.
                ::log::warn!("a long log could not be reduced: {error}");
            }
            Ok(())
        })
    }

    /// Syncs and marks the log as closed in good order; the last call before the overlay goes.
    ///
    /// # Errors
    /// `EIO` when the overlay has latched; the host's errno.
    pub fn close(&self) -> io::Result<()> {
        self.sync_all(SyncMode::Full)?;
        let Some(log) = &self.log else { return Ok(()) };
        self.journal.finish();
        log.append(&[LogRecord::Close], ReserveUse::Full)?;
        log.finish()
    }
}
