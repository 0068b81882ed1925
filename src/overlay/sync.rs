//! Making an overlay durable, latching it when that fails, and giving freed space back.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::blocks::{BlockIndex, State};
use super::journal::Draft;
use super::log::{Log, Purpose};
use super::ranges::{Hold, Need};
use super::record::{Nanos, Record, Stamp};
use super::{Overlay, is_full};
use crate::host::{self, errno};
use crate::layer::Wait;

/// Up to so many changed bytes are few: written as quickly as one block, more or less.
pub(super) const FEW: u64 = 128 << 10;
/// What a small overwrite is at the most, in bytes.
const SMALL: u64 = 64 << 10;
/// So many syncs in a row, each of a small overwrite, are a habit.
const HABIT: u32 = 8;
/// Freed space goes back in pieces of at most this many bytes of what the host holds, each under
/// its range's lock.
const PIECE: u64 = 1 << 30;
/// Where something is being changed, in pieces of this many: it holds few of the range locks.
const SMALL_PIECE: u64 = 1 << 20;

/// How much a sync is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pace {
    /// What a client waits for.
    Quick,
    /// All of it: data and log as they are, and freed space given back.
    Whole,
}

impl Overlay {
    /// Whether something was changed since the last sync began.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) > 0
    }

    /// Whether a sync would take about as long as the device needs for a few blocks.
    #[must_use]
    pub fn is_quick_to_sync(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) <= FEW
            && self.turns.is_free()
            && self.unsettled.lock().is_empty()
            && self.pending.lock().is_empty()
    }

    /// Whether the last syncs were each of a small overwrite. Waits for nothing.
    #[must_use]
    pub fn is_synced_often(&self) -> bool {
        self.habit.load(Ordering::Relaxed) >= HABIT
    }

    /// Called after `range`, in bytes, was written to an overlay that is synced often. When that is all
    /// since the last sync, the host begins to write it to the device: part of that is done by the
    /// time a sync of it comes. Best effort.
    pub fn prepare_sync(&self, range: Range<u64>) {
        if !self.is_small_overwrite() || self.is_direct() {
            return;
        }
        if self.dirty.load(Ordering::Relaxed) != range.end - range.start {
            // Who writes several times before a sync may write the same block: it would go to the
            // device each time, and some file systems have the second write wait for the first.
            self.habit.store(0, Ordering::Relaxed);
            return;
        }
        if let Some(file) = self.data.backing(range.clone()) {
            host::begin_write_out(file, range);
        }
    }

    /// Whether what was written since the last sync is little, and nothing else has changed.
    fn is_small_overwrite(&self) -> bool {
        let Some(log) = &self.log else { return false };
        let is_small = (1..=SMALL).contains(&self.dirty.load(Ordering::Relaxed));
        is_small && log.last() < self.journal.next(self.durable.load(Ordering::SeqCst))
    }

    /// Makes all that was acknowledged before the call durable, and gives freed space back. A
    /// temporary overlay promises nothing: only the space goes back.
    pub(super) fn sync_all(&self, pace: Pace) -> io::Result<()> {
        match &self.log {
            Some(log) => self.turns.run(|| self.sync_now(log, pace))?,
            None => {
                self.dirty.store(0, Ordering::SeqCst);
                self.settle_below()?;
            }
        }
        // After the turn: whoever waited for it need not wait for this.
        self.give_back(self.durable.load(Ordering::SeqCst));
        Ok(())
    }

    /// One sync: the data behind every record so far, then a `Vouch` for them, then the log; or,
    /// of few changes, an entry in the journal.
    fn sync_now(&self, log: &Log, pace: Pace) -> io::Result<()> {
        if self.is_latched() {
            return Err(errno(libc::EIO));
        }
        if self.is_small_overwrite() {
            self.habit.fetch_add(1, Ordering::Relaxed);
        } else if self.is_dirty() {
            self.habit.store(0, Ordering::Relaxed);
        }
        self.dirty.store(0, Ordering::SeqCst);
        let upto = log.last();
        self.settle_below().map_err(|error| self.latch_unless_full(log, error))?;
        // After `upto`: whoever has put a record there has noted its blocks. And after what may
        // fail and be tried again: what is taken here is made durable here, or the disk latches.
        let fresh = self.fresh.take();
        if pace == Pace::Quick
            && let Some(fresh) = fresh
            && self.sync_to_journal(log, upto, &fresh)
        {
            return Ok(());
        }
        self.data.sync().map_err(|error| self.latch(log, &error))?;
        let durable = self.durable.load(Ordering::SeqCst);
        // So it is while there are entries: the first of them had a new record.
        if upto > durable {
            let vouch = log.append(&[Record::Vouch { upto, durable }], Purpose::Settle);
            let vouch = vouch.map_err(|error| self.latch_unless_full(log, error))?;
            log.sync().map_err(|error| self.latch(log, &error))?;
            // The Vouch itself is durable as well; with nothing in between it covers itself.
            let durable = if vouch == upto + 1 { vouch } else { upto };
            self.durable.store(durable, Ordering::SeqCst);
            log.note_vouched(upto);
            self.journal.restart();
        }
        Ok(())
    }

    /// Makes the changes in `fresh`, and the records up to `upto`, durable in the journal; `false`
    /// when they do not fit, or somebody changes those blocks at this moment.
    fn sync_to_journal(&self, log: &Log, upto: u64, fresh: &[BlockIndex]) -> bool {
        let generation = log.vouched();
        let next = self.journal.next(generation);
        let count = (upto + 1).saturating_sub(next);
        if count == 0 && fresh.is_empty() && self.journal.is_used() {
            return true; // Nothing was changed since the last entry.
        }
        // Overwrites alone are as quick the other way, and quicker once they are a habit: a whole sync
        // makes the entries void. Freed space waits for one, too.
        let is_plain = upto <= self.durable.load(Ordering::SeqCst);
        if is_plain || self.is_synced_often() || self.is_direct() || !self.pending.lock().is_empty()
        {
            return false;
        }
        let Ok(block) = u32::try_from(self.block) else { return false };
        if !self.journal.takes(count, fresh.len(), self.block) {
            return false;
        }
        let (Some(bytes), Ok(records)) = (self.bytes_now(fresh), log.raw(next, count)) else {
            return false;
        };
        let uuid = log.uuid();
        let (blocks, bytes, records) = (fresh, &bytes[..], &records[..]);
        let draft = Draft { uuid, block, generation, records, blocks, bytes };
        self.journal.write(log.home(), &draft)
    }

    /// What `blocks` hold, while nobody changes them.
    fn bytes_now(&self, blocks: &[BlockIndex]) -> Option<Vec<u8>> {
        let range = |block: &BlockIndex| self.bytes_of(&(*block..BlockIndex(block.0 + 1)));
        let need = blocks.iter().fold(Need::default(), |need, block| {
            self.ranges.need(need, &range(block), Hold::Exclusive)
        });
        let _held = self.ranges.lock(need, Wait::No)?;
        let len = usize::try_from(self.block).ok()?;
        let mut bytes = vec![0; blocks.len() * len];
        for (block, piece) in blocks.iter().zip(bytes.chunks_mut(len)) {
            self.data.read_at(piece, range(block).start, Wait::Yes).ok()?;
        }
        Some(bytes)
    }

    /// Makes the overlay read-only for good because something else than a sync of it failed.
    pub fn give_up(&self) {
        let error = errno(libc::EIO);
        match &self.log {
            Some(log) => drop(self.latch(log, &error)),
            None => self.latched.store(true, Ordering::SeqCst),
        }
    }

    /// A sealed layer's end: everything durable, the log closed in good order. Again is nothing.
    ///
    /// # Errors
    /// As [`close`](Self::close).
    pub fn settle(&self) -> io::Result<()> {
        let mut settled = self.settled.lock();
        if !*settled {
            self.close()?;
            *settled = true;
        }
        Ok(())
    }

    /// Makes the sealed layers below durable, once.
    fn settle_below(&self) -> io::Result<()> {
        let layers = self.unsettled.lock().clone();
        layers.iter().try_for_each(|layer| layer.settle())?;
        self.unsettled.lock().clear();
        Ok(())
    }

    /// Latches, unless it was only that there is no space for a record.
    fn latch_unless_full(&self, log: &Log, error: io::Error) -> io::Error {
        if !is_full(&error) {
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
        let poisoned =
            log.append(&[Record::Poisoned { durable, vouched: log.vouched() }], Purpose::Settle);
        if let Err(error) = poisoned.and_then(|_| log.sync()) {
            ::log::error!("could not mark the log as poisoned: {error}");
        }
        errno(libc::EIO)
    }

    /// Gives back the space of what records up to `durable` freed and nobody has taken since.
    ///
    /// What is being changed at this moment is left for the next time: a change may be waiting
    /// for a base that hangs, and no sync waits for that.
    ///
    /// Takes steps for the space that there is, not for the bytes that were freed: what holds none
    /// is one piece, however long, and is left as one when some of it is being changed.
    fn give_back(&self, durable: u64) {
        let (mut from, mut most) = (0, PIECE);
        loop {
            let Some(waiting) = self.pending.lock().first(&(from..u64::MAX), durable) else {
                return;
            };
            let (piece, holds_space) = self.next_piece(&waiting, most);
            let need = self.ranges.need(Need::default(), &piece, Hold::Exclusive);
            let Some(_held) = self.ranges.lock(need, Wait::No) else {
                if most == SMALL_PIECE || !holds_space {
                    from = piece.end;
                }
                most = SMALL_PIECE;
                continue;
            };
            // Under the lock every change of this piece is whole: map and pending agree.
            let parts = self.pending.lock().within(&piece, durable);
            self.readers.drain();
            for part in &parts {
                if let Err(error) = self.punch_free(part) {
                    // Space that stays is no loss of data; a host that cannot punch never will.
                    ::log::debug!("space is not given back: {error}");
                }
                self.pending.lock().remove(part);
            }
            from = piece.end;
            most = (most * 2).min(PIECE);
        }
    }

    /// The first piece of `waiting`, whole blocks, and whether the host may hold space for it: at
    /// most `most` bytes when it may, else all up to where it may again.
    fn next_piece(&self, waiting: &Range<u64>, most: u64) -> (Range<u64>, bool) {
        let Range { start, end } = *waiting;
        if end - start <= SMALL_PIECE {
            return (start..end, true);
        }
        match self.data.next_space(start..end) {
            None => (start..end, false),
            Some(at) if at - start >= self.block => (start..at - at % self.block, false),
            Some(_) => (start..end.min(start.saturating_add(most)), true),
        }
    }

    /// Punches what the map does not call Data in `part`.
    fn punch_free(&self, part: &Range<u64>) -> io::Result<()> {
        let mut free: Vec<Range<u64>> = Vec::new();
        {
            let map = self.map.read();
            let runs = map.blocks.runs(self.blocks_of(part));
            for run in runs.filter(|run| run.state != State::Data) {
                let bytes = self.bytes_of(&run.range);
                // Lower and Zero runs side by side are one hole.
                match free.last_mut() {
                    Some(last) if last.end == bytes.start => last.end = bytes.end,
                    _ => free.push(bytes),
                }
            }
        }
        free.into_iter().try_for_each(|range| self.data.punch(range))
    }

    /// Puts a modification time into the log, for the next mount to find.
    ///
    /// # Errors
    /// The host's errno.
    pub fn record_mtime(&self, mtime: Nanos, stamp: Stamp) -> io::Result<()> {
        self.map.write().mtime = Some((mtime, stamp));
        if let Some(log) = &self.log
            && !self.is_latched()
        {
            log.append(&[Record::Attr { mtime, stamp }], Purpose::Grow)?;
        }
        Ok(())
    }

    /// Whether `maintain` would have something to do.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        self.is_dirty()
            || self.journal.is_used()
            || !self.unsettled.lock().is_empty()
            || !self.pending.lock().is_empty()
            || self.log.as_ref().is_some_and(Log::is_long)
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
        let is_waiting = || !self.pending.lock().is_empty() || !self.unsettled.lock().is_empty();
        if self.is_dirty() || self.journal.is_used() || is_waiting() {
            self.sync_all(Pace::Whole)?;
        }
        let Some(log) = &self.log else { return Ok(()) };
        if !log.is_long() {
            return Ok(());
        }
        self.turns.run(|| {
            self.sync_now(log, Pace::Whole)?;
            if let Err(error) = log.reduce(self.durable.load(Ordering::SeqCst), self.tag) {
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
        self.sync_all(Pace::Whole)?;
        let Some(log) = &self.log else { return Ok(()) };
        self.journal.finish();
        log.append(&[Record::Close], Purpose::Settle)?;
        log.finish()
    }
}
