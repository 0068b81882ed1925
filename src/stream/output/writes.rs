//! The modifying operations of an output stream: write, discard, truncate.

use std::io;
use std::ops::Range;
use std::sync::atomic::Ordering;

use super::{
    BACKLOG_LIMIT, Output, OutputCore, OutputState, QueuedWrite, Rewrite, WriteReply, index,
    reply_all, spec_size,
};
use crate::host::{is_out_of_space, os_error};
use crate::stream::page_store::{PAGE_LEN, PAGE_SIZE};
use crate::stream::parked::ParkPermit;
use crate::stream::queue::WriteSource;
use crate::stream::runs::Written;
use crate::stream::window::Window;
use crate::zeros::is_zero;

/// The result of trying a write.
pub(super) enum WriteOutcome {
    Done(io::Result<()>),
    /// There is no room until the sink has accepted more.
    NoRoom,
}

impl Output {
    /// Writes `buf` at `offset`. `reply` is called once: immediately, or when the
    /// sink has made room. `client` is the thread that waits for the reply, or 0 if unknown.
    ///
    /// The errors of the reply: `EIO` once the stream is not open any more, and for a change of
    /// data before the frontier, which fails the stream; `EINTR` if the client is killed while it
    /// waits; `EBUSY` if too many writes wait already; `ENOSPC` past the end of the disk; the host's
    /// errno from the spill. What was refused must be written again: see
    /// [`finish`](Self::finish).
    pub fn write(&self, offset: u64, buf: &[u8], client: u32, reply: WriteReply) {
        self.write_or_park(offset, buf, WriteSource::Client(client), reply);
    }

    /// Writes like [`write`](Self::write) what the kernel writes back of a mapping, which nobody
    /// would write again: any number of such writes may wait, and one that is refused fails the
    /// stream.
    pub fn write_back(&self, offset: u64, buf: &[u8], reply: WriteReply) {
        self.write_or_park(offset, buf, WriteSource::PageCache, reply);
    }

    fn write_or_park(&self, offset: u64, buf: &[u8], source: WriteSource, reply: WriteReply) {
        let range = offset..offset.saturating_add(buf.len() as u64);
        let mut core = self.core.lock();
        // Writes keep their order: this one waits behind those already queued.
        let attempt = match core.queue.is_empty() {
            _ if range.end > self.size => {
                let error = os_error(libc::ENOSPC);
                self.note_refused(&mut core, range.clone(), source, &error);
                WriteOutcome::Done(Err(error))
            }
            true => self.try_write(&mut core, offset, buf, source),
            false if core.state == OutputState::Open => WriteOutcome::NoRoom,
            false => WriteOutcome::Done(Err(os_error(libc::EIO))),
        };
        match attempt {
            WriteOutcome::NoRoom => {
                let permit = ParkPermit::acquire(core.queue.len());
                if permit.is_none() && source != WriteSource::PageCache {
                    let error = os_error(libc::EBUSY);
                    self.note_refused(&mut core, range, source, &error);
                    let refused = self.take_refused(&mut core);
                    drop(core);
                    log::debug!("{}: too many writes wait for its sink", self.name);
                    reply(Err(error));
                    return reply_all(refused, libc::EIO);
                }
                core.queue.push(permit, offset, buf, source, reply);
            }
            WriteOutcome::Done(result) => {
                let refused = self.take_refused(&mut core);
                drop(core);
                self.work.notify_one();
                reply(result);
                reply_all(refused, libc::EIO);
            }
        }
    }

    /// Takes the waiting writes of a stream that is not open any more, to be refused.
    pub(super) fn take_refused(&self, core: &mut OutputCore) -> Vec<QueuedWrite> {
        if core.state == OutputState::Open { Vec::new() } else { core.queue.take_all() }
    }

    pub(super) fn try_write(
        &self,
        core: &mut OutputCore,
        offset: u64,
        buf: &[u8],
        source: WriteSource,
    ) -> WriteOutcome {
        if core.state != OutputState::Open {
            return WriteOutcome::Done(Err(os_error(libc::EIO)));
        }
        if !self.has_room(core, buf.len() as u64) {
            return WriteOutcome::NoRoom;
        }
        let pieces = WriteRuns::of(offset, buf);
        let changed = pieces.first_change(&core.window);
        if log::log_enabled!(log::Level::Trace) {
            self.trace_write(&pieces, changed);
        }
        if let Some(at) = changed {
            core.window.note_change(at);
            if !self.can_rewrite
                && at < core.window.frontier()
                && !self.matches_sent(core, offset, buf)
            {
                self.fail_late_write(core, at);
                return WriteOutcome::Done(Err(os_error(libc::EIO)));
            }
        }
        let range = pieces.range();
        match self.apply(core, &pieces) {
            Ok(()) => {
                core.refused.forget(range);
                WriteOutcome::Done(Ok(()))
            }
            Err(error) if is_out_of_space(&error) && self.make_room(core, &range) => {
                WriteOutcome::NoRoom
            }
            Err(error) => {
                self.note_refused(core, range, source, &error);
                WriteOutcome::Done(Err(error))
            }
        }
    }

    /// Returns whether `len` more bytes can be held: always, if the sink has nothing to do.
    pub(super) fn has_room(&self, core: &OutputCore, len: u64) -> bool {
        let waits = core.window.accepted() < core.window.frontier() || !core.rewrites.is_empty();
        let limit = self.window_size.saturating_add(self.spill.unwrap_or(u64::MAX / 4));
        let held = core.window.unaccepted() + core.rewrite_bytes + len;
        !waits || held <= limit.saturating_add(BACKLOG_LIMIT)
    }

    /// Logs a write as the window sees it, so that the figures of the window can be checked
    /// (`contrib/bench/streams`).
    fn trace_write(&self, pieces: &WriteRuns<'_>, changed: Option<u64>) {
        let mut shown = String::new();
        for (piece, written) in &pieces.runs {
            let letter = if *written == Written::Data { 'd' } else { 'z' };
            shown += &format!(" {letter}{}", piece.len());
        }
        let changed = changed.map_or_else(|| "-".to_owned(), |at| at.to_string());
        log::trace!("{}: write at {}, changes {changed}:{shown}", self.name, pieces.offset);
    }

    /// Returns whether the part of `buf` before the frontier equals the data there, as far as that
    /// can still be read.
    fn matches_sent(&self, core: &mut OutputCore, offset: u64, buf: &[u8]) -> bool {
        let frontier = core.window.frontier();
        let end = frontier.min(offset + buf.len() as u64);
        if offset < frontier.saturating_sub(self.read_window) {
            return false;
        }
        let mut at = offset;
        while at < end {
            let (stop, written) = core.window.runs().at(at);
            let stop = stop.min(end);
            let part = &buf[index(at - offset)..index(stop - offset)];
            let mut there = vec![0; part.len()];
            if written == Some(Written::Data) && core.pages.read(at, &mut there).is_err() {
                return false;
            }
            if there != part {
                return false;
            }
            at = stop;
        }
        true
    }

    /// Stores the write and advances the frontier as far as necessary.
    fn apply(&self, core: &mut OutputCore, pieces: &WriteRuns<'_>) -> io::Result<()> {
        // Nothing before the frontier may change, unless the frames can express a change.
        let fixed = if self.can_rewrite { core.window.taken() } else { core.window.frontier() };
        let Range { start, end } = pieces.range();
        let fixed = fixed.clamp(start, end);
        pieces.store(core, fixed..end)?;
        if self.can_rewrite {
            // Ranges that can still be read back are updated in the store, too.
            let kept = core.dropped_end.clamp(start, fixed);
            pieces.store(core, kept..fixed)?;
            pieces.each(start..kept, |at, piece, written| {
                core.window.set(at..at + piece.len() as u64, Some(written));
            });
            pieces.each(start..fixed, |at, piece, written| {
                let rewrite = match written {
                    Written::Data => Rewrite::Data(piece.to_vec()),
                    Written::Zeros => Rewrite::Zeros(piece.len() as u64),
                };
                core.push_rewrite(at, rewrite);
            });
        }
        core.window.advance();
        Ok(())
    }

    /// Reacts to a host without room for the full spill: the spill allows less from now on, and the
    /// frontier advances accordingly. Returns whether there will be room for a write to `range`.
    fn make_room(&self, core: &mut OutputCore, range: &Range<u64>) -> bool {
        if core.window.accepted() < core.window.frontier() {
            return true;
        }
        let budget = core.window.beyond().saturating_sub((range.end - range.start).max(PAGE_SIZE));
        let frontier = core.window.frontier_for_budget(budget);
        // Not past the write itself, which would come too late for the room that it needs.
        let is_possible = frontier > core.window.frontier() && frontier <= range.start;
        if is_possible {
            core.window.advance_to_budget(budget);
            self.work.notify_one();
        }
        is_possible
    }

    fn fail_late_write(&self, core: &mut OutputCore, at: u64) {
        let needed = core.window.needed();
        let frontier = core.window.frontier();
        let why = format!(
            "a write at {at} came after the frontier {frontier}: so far it needs window={} or spill={}",
            spec_size(needed.window),
            spec_size(needed.spill)
        );
        self.fail(core, why);
    }

    pub(super) fn fail(&self, core: &mut OutputCore, why: String) {
        if matches!(core.state, OutputState::Open | OutputState::Finishing) {
            log::error!("{}: the stream failed: {why}", self.name);
            core.state = OutputState::Failed;
            self.has_failed.store(true, Ordering::Release);
            core.error = Some(why);
            self.stop.stop();
            self.work.notify_all();
            self.changed.notify_all();
        }
    }

    /// Makes `range` a hole, or zeros: both cost no memory and need not be sent.
    ///
    /// # Errors
    /// `EOPNOTSUPP` if bytes other than zeros have left; `EIO` once the stream is not open any
    /// more.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut core = self.core.lock();
        if core.state != OutputState::Open {
            return Err(os_error(libc::EIO));
        }
        log::trace!("{}: discard {}..{}", self.name, range.start, range.end);
        let frontier = core.window.frontier();
        let changed = core.window.runs().data_within(range.clone()).next();
        if let Some(first) = changed {
            core.window.note_change(first.start);
            if !self.can_rewrite && first.start < frontier {
                return Err(os_error(libc::EOPNOTSUPP));
            }
        }
        let fixed = if self.can_rewrite { core.window.taken() } else { frontier };
        if self.can_rewrite {
            let head = range.start..range.end.min(fixed);
            let parts: Vec<_> = core.window.runs().data_within(head).collect();
            for part in parts {
                core.push_rewrite(part.start, Rewrite::Hole(part.end - part.start));
                core.window.set(part, None);
            }
        }
        let rest = range.start.max(fixed)..range.end;
        if !rest.is_empty() {
            core.window.set(rest.clone(), None);
            core.pages.drop_within(rest);
        }
        core.refused.forget(range);
        drop(core);
        self.work.notify_one();
        Ok(())
    }

    /// Discards the data held past `from`; the size of the disk does not change (truncation).
    ///
    /// # Errors
    /// `EIO` if bytes other than zeros past `from` have left, and once the stream is not open any
    /// more.
    pub fn truncate(&self, from: u64) -> io::Result<()> {
        let mut core = self.core.lock();
        if core.state != OutputState::Open {
            return Err(os_error(libc::EIO));
        }
        let from = from.min(self.size);
        log::trace!("{}: discard {from}..{}", self.name, self.size);
        let changed = core.window.runs().data_within(from..self.size).next();
        if let Some(first) = changed {
            core.window.note_change(first.start);
        }
        if !core.window.truncate(from) {
            return Err(os_error(libc::EIO));
        }
        let start = from.max(core.window.frontier());
        core.pages.drop_within(start..self.size);
        core.refused.forget(from..self.size);
        Ok(())
    }
}

/// A write, split once into runs of data and of zeros at page boundaries.
struct WriteRuns<'a> {
    offset: u64,
    buf: &'a [u8],
    runs: Vec<(Range<usize>, Written)>,
}

impl<'a> WriteRuns<'a> {
    fn of(offset: u64, buf: &'a [u8]) -> Self {
        let mut list: Vec<(Range<usize>, Written)> = Vec::new();
        let mut at = 0;
        while at < buf.len() {
            let skip = index((offset + at as u64) % PAGE_SIZE);
            let end = (at + PAGE_LEN - skip).min(buf.len());
            let written = if is_zero(&buf[at..end]) { Written::Zeros } else { Written::Data };
            match list.last_mut() {
                Some((last, kind)) if *kind == written => last.end = end,
                _ => list.push((at..end, written)),
            }
            at = end;
        }
        Self { offset, buf, runs: list }
    }

    fn range(&self) -> Range<u64> {
        self.offset..self.offset + self.buf.len() as u64
    }

    /// Calls `each` with the runs inside `range`, clipped to it.
    fn each(&self, range: Range<u64>, mut each: impl FnMut(u64, &[u8], Written)) {
        let part = index(range.start - self.offset)..index(range.end - self.offset);
        for (piece, written) in &self.runs {
            let clipped = piece.start.max(part.start)..piece.end.min(part.end);
            if !clipped.is_empty() {
                each(self.offset + clipped.start as u64, &self.buf[clipped], *written);
            }
        }
    }

    /// Returns the first change of all runs; see [`Window::first_change`].
    fn first_change(&self, window: &Window) -> Option<u64> {
        self.runs.iter().find_map(|(piece, written)| {
            let start = self.offset + piece.start as u64;
            match written {
                Written::Data => window.first_change(start, &self.buf[piece.clone()]),
                Written::Zeros => {
                    let range = start..self.offset + piece.end as u64;
                    window.runs().data_within(range).next().map(|data| data.start)
                }
            }
        })
    }

    /// Stores the data of `range`, then updates the window.
    fn store(&self, core: &mut OutputCore, range: Range<u64>) -> io::Result<()> {
        let mut stored = Ok(());
        let pages = &mut core.pages;
        self.each(range.clone(), |at, piece, written| {
            if written == Written::Data && stored.is_ok() {
                stored = pages.write(at, piece);
            }
        });
        stored?;
        self.each(range, |at, piece, written| {
            let range = at..at + piece.len() as u64;
            if written == Written::Zeros
                && core.window.runs().data_within(range.clone()).next().is_some()
            {
                // Zeros are not charged, so they must not keep the room of the data they cover.
                core.pages.drop_within(range.clone());
            }
            core.window.set(range, Some(written));
        });
        Ok(())
    }
}
