//! Replies of the transmission phase, as a state machine (doc/proto.md, "Transmission").
//!
//! ```text
//!                 ┌──────────────────────── the message is complete ─────────────────────────┐
//!                 ▼                                                                          │
//!   bytes ──▶ Header ──▶ Prefix ──▶ Data (into the read's buffer) | Status | Skip ───────────┘
//! ```
//!
//! A message that makes no sense ends the connection, because nobody knows where the next one begins.
//! A reply whose messages are sound but that does not bring every byte of a read fails that read only.

mod payload;
mod pending;

use std::collections::HashMap;

use self::payload::{
    check_count, check_descriptors, check_magic, descriptor_len, failure_of, header_len,
    push_descriptor,
};
pub(crate) use self::pending::{Answer, Event, Expected, Failure, ReplyError};
use self::pending::{Content, Pending, add, piece, prepare};
use super::Headers;
use super::coverage::Coverage;
use super::status::StatusBuilder;
use super::wire::{
    Fields, REPLY_BLOCK_STATUS, REPLY_BLOCK_STATUS_EXT, REPLY_ERROR_BIT, REPLY_FLAG_DONE,
    REPLY_NONE, REPLY_OFFSET_DATA, REPLY_OFFSET_HOLE, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    errno_of,
};

/// The longest message of an error: its length has 16 bits, and an offset may follow.
const MAX_ERROR: u64 = 6 + 65_535 + 8;

/// A chunk whose payload is being read. A simple reply counts as a chunk of its own kind.
#[derive(Debug)]
struct Chunk {
    cookie: u64,
    kind: u16,
    is_last: bool,
    /// Bytes of payload that have not come.
    left: u64,
    pending: Pending,
}

#[derive(Debug)]
enum State {
    /// The header, in `scratch`.
    Header,
    /// The first `need` bytes of the payload, in `scratch`.
    Prefix { chunk: Chunk, need: usize },
    /// Bytes of a read; the next one goes to `at` of its buffer.
    Data { chunk: Chunk, at: usize },
    /// Descriptors, each in `scratch` first.
    Status { chunk: Chunk },
    /// A payload that nobody asked for.
    Skip { chunk: Chunk },
}

/// The replies of one connection.
#[derive(Debug)]
pub(crate) struct Replies {
    headers: Headers,
    allocation: Option<u32>,
    pending: HashMap<u64, Pending>,
    state: State,
    scratch: Vec<u8>,
}

impl Replies {
    /// Begins a connection on which `headers` and the context `allocation` were agreed on.
    pub(crate) fn new(headers: Headers, allocation: Option<u32>) -> Self {
        let (pending, scratch) = (HashMap::new(), Vec::with_capacity(64));
        Self { headers, allocation, pending, state: State::Header, scratch }
    }

    /// Announces a request, before its reply is fed. Cookies are used once.
    pub(crate) fn expect(&mut self, cookie: u64, expected: Expected) {
        let content = match expected {
            Expected::Bytes(range) => {
                Content::Bytes { range, buf: Vec::new(), covered: Coverage::default() }
            }
            Expected::Extents(range) => Content::Extents { range, builder: None },
            Expected::Done => Content::Done,
        };
        self.pending.insert(cookie, Pending { content, failure: None, barren: 0 });
    }

    /// Returns where the next bytes of the server go when they are bytes of a read; empty otherwise.
    /// After some were put there, [`advance`](Self::advance) says how many.
    pub(crate) fn direct(&mut self) -> &mut [u8] {
        let State::Data { chunk, at } = &mut self.state else { return &mut [] };
        let Content::Bytes { buf, .. } = &mut chunk.pending.content else { return &mut [] };
        let end = at.saturating_add(usize::try_from(chunk.left).unwrap_or(usize::MAX));
        buf.get_mut(*at..end).unwrap_or_default()
    }

    /// Returns the request of the chunk whose payload is being read.
    pub(crate) fn receiving(&self) -> Option<u64> {
        match &self.state {
            State::Header => None,
            State::Prefix { chunk, .. }
            | State::Data { chunk, .. }
            | State::Status { chunk }
            | State::Skip { chunk } => Some(chunk.cookie),
        }
    }

    /// Counts `len` bytes, at most the length of [`direct`](Self::direct), that were put there.
    pub(crate) fn advance(
        &mut self,
        len: usize,
        events: &mut Vec<Event>,
    ) -> Result<(), ReplyError> {
        if let State::Data { chunk, at } = &mut self.state {
            *at += len;
            chunk.left = chunk.left.saturating_sub(len as u64);
            self.end_payload(events)?;
        }
        Ok(())
    }

    /// Ends the connection: returns, by cookie, the bytes from the start of each read on that have come
    /// without a gap, so that they need not be sent again.
    pub(crate) fn into_partial(mut self) -> Vec<(u64, Vec<u8>)> {
        // What the last chunk was to bring is counted when it begins.
        let mut end_of_last = None;
        match self.state {
            State::Data { chunk, at } => {
                end_of_last = Some((chunk.cookie, at));
                self.pending.insert(chunk.cookie, chunk.pending);
            }
            State::Skip { chunk } | State::Prefix { chunk, .. } => {
                self.pending.insert(chunk.cookie, chunk.pending);
            }
            State::Header | State::Status { .. } => {}
        }
        let pending = self.pending.into_iter().filter(|(_, pending)| pending.failure.is_none());
        let partial = pending.filter_map(|(cookie, pending)| {
            let Content::Bytes { mut buf, covered, .. } = pending.content else { return None };
            let mut len = covered.prefix().min(buf.len());
            if let Some((_, at)) = end_of_last.filter(|(last, at)| *last == cookie && *at < len) {
                len = at;
            }
            buf.truncate(len);
            (len > 0).then_some((cookie, buf))
        });
        partial.collect()
    }

    /// Takes bytes of the server, in pieces of any length, and adds what is answered to `events`.
    pub(crate) fn feed(
        &mut self,
        mut bytes: &[u8],
        events: &mut Vec<Event>,
    ) -> Result<(), ReplyError> {
        while !bytes.is_empty() {
            let place = self.direct();
            if !place.is_empty() {
                let len = place.len().min(bytes.len());
                let (now, rest) = bytes.split_at(len);
                place[..len].copy_from_slice(now);
                bytes = rest;
                self.advance(len, events)?;
                continue;
            }
            let want = self.wanted();
            let (now, rest) = bytes.split_at(want.min(bytes.len()));
            bytes = rest;
            self.take_small(now, want, events)?;
        }
        Ok(())
    }

    /// Returns how many bytes make the next step possible; never 0, and never bytes of a read.
    fn wanted(&self) -> usize {
        let have = self.scratch.len();
        match &self.state {
            State::Header if have < 4 => 4 - have,
            State::Header => header_len(self.magic()).saturating_sub(have),
            State::Prefix { need, .. } => need.saturating_sub(have),
            State::Status { chunk } => descriptor_len(chunk.kind).saturating_sub(have),
            State::Skip { chunk } => usize::try_from(chunk.left).unwrap_or(usize::MAX),
            State::Data { .. } => 0,
        }
        .max(1)
    }

    /// Takes `bytes`, of the `want` that the state needs.
    fn take_small(
        &mut self,
        bytes: &[u8],
        want: usize,
        events: &mut Vec<Event>,
    ) -> Result<(), ReplyError> {
        match &mut self.state {
            State::Header => {}
            State::Prefix { chunk, .. } | State::Status { chunk } | State::Skip { chunk } => {
                chunk.left = chunk.left.saturating_sub(bytes.len() as u64);
            }
            State::Data { .. } => return Ok(()),
        }
        if matches!(self.state, State::Skip { .. }) {
            return self.end_payload(events);
        }
        self.scratch.extend_from_slice(bytes);
        if bytes.len() < want {
            return Ok(());
        }
        match &mut self.state {
            // Only the magic number: it says how long the header is.
            State::Header if self.scratch.len() == 4 => check_magic(self.magic(), self.headers),
            State::Header => self.end_header(events),
            State::Prefix { .. } => self.end_prefix(events),
            State::Status { chunk } => {
                let descriptor = std::mem::take(&mut self.scratch);
                push_descriptor(chunk, &descriptor)?;
                self.end_payload(events)
            }
            State::Data { .. } | State::Skip { .. } => Ok(()),
        }
    }

    fn magic(&self) -> u32 {
        Fields(&self.scratch).u32().unwrap_or(0)
    }

    fn take_pending(&mut self, cookie: u64) -> Result<Pending, ReplyError> {
        self.pending.remove(&cookie).ok_or(ReplyError::UnknownCookie)
    }

    fn end_header(&mut self, events: &mut Vec<Event>) -> Result<(), ReplyError> {
        let header = std::mem::take(&mut self.scratch);
        let mut fields = Fields(&header);
        let magic = fields.u32();
        if magic == Some(SIMPLE_REPLY_MAGIC) {
            let error = fields.u32().ok_or(ReplyError::Length)?;
            return self.begin_simple(error, fields.u64().ok_or(ReplyError::Length)?, events);
        }
        let (Some(flags), Some(kind), Some(cookie)) = (fields.u16(), fields.u16(), fields.u64())
        else {
            return Err(ReplyError::Length);
        };
        let left = match magic {
            Some(STRUCTURED_REPLY_MAGIC) => fields.u32().map(u64::from),
            // The offset of the request comes first, for those who look at the wire.
            _ => fields.u64().and_then(|_| fields.u64()),
        };
        let left = left.ok_or(ReplyError::Length)?;
        let pending = self.take_pending(cookie)?;
        let is_last = flags & REPLY_FLAG_DONE != 0;
        self.begin_chunk(Chunk { cookie, kind, is_last, left, pending }, events)
    }

    fn begin_simple(
        &mut self,
        error: u32,
        cookie: u64,
        events: &mut Vec<Event>,
    ) -> Result<(), ReplyError> {
        let mut pending = self.take_pending(cookie)?;
        if error != 0 {
            pending.failure = Some(Failure { errno: errno_of(error), text: String::new() });
        }
        let mut chunk = Chunk { cookie, kind: REPLY_NONE, is_last: true, left: 0, pending };
        match &mut chunk.pending.content {
            _ if error != 0 => {}
            Content::Done => {}
            Content::Bytes { range, buf, covered } if self.headers == Headers::Simple => {
                let len = prepare(range, buf)?;
                add(covered, 0..len)?;
                chunk.left = len as u64;
                self.state = State::Data { chunk, at: 0 };
                return self.end_payload(events);
            }
            // "Structured reply chunk message": reads must be answered in chunks then.
            Content::Bytes { .. } | Content::Extents { .. } => return Err(ReplyError::Type),
        }
        self.end_chunk(chunk, events);
        Ok(())
    }

    fn begin_chunk(&mut self, chunk: Chunk, events: &mut Vec<Event>) -> Result<(), ReplyError> {
        let left = chunk.left;
        let need = match (chunk.kind, &chunk.pending.content) {
            (REPLY_NONE, _) if left == 0 && chunk.is_last => {
                self.end_chunk(chunk, events);
                return Ok(());
            }
            (REPLY_NONE, _) => return Err(ReplyError::Length),
            (REPLY_OFFSET_DATA, Content::Bytes { .. }) if left > 8 => 8,
            (REPLY_OFFSET_HOLE, Content::Bytes { .. }) if left == 12 => 12,
            (REPLY_BLOCK_STATUS, Content::Extents { builder: None, .. }) => {
                check_descriptors(left, 4, 8)?
            }
            (REPLY_BLOCK_STATUS_EXT, Content::Extents { builder: None, .. })
                if self.headers == Headers::Extended =>
            {
                check_descriptors(left, 8, 16)?
            }
            (kind, _) if kind & REPLY_ERROR_BIT != 0 => {
                if !(6..=MAX_ERROR).contains(&left) {
                    return Err(ReplyError::Length);
                }
                usize::try_from(left).map_err(|_| ReplyError::Length)?
            }
            (REPLY_OFFSET_DATA | REPLY_OFFSET_HOLE, Content::Bytes { .. }) => {
                return Err(ReplyError::Length);
            }
            _ => return Err(ReplyError::Type),
        };
        self.state = State::Prefix { chunk, need };
        Ok(())
    }

    fn end_prefix(&mut self, events: &mut Vec<Event>) -> Result<(), ReplyError> {
        let prefix = std::mem::take(&mut self.scratch);
        let State::Prefix { mut chunk, .. } = std::mem::replace(&mut self.state, State::Header)
        else {
            return Ok(());
        };
        let mut fields = Fields(&prefix);
        self.state = match (chunk.kind, &mut chunk.pending.content) {
            (REPLY_OFFSET_DATA, Content::Bytes { range, buf, covered }) => {
                let offset = fields.u64().ok_or(ReplyError::Length)?;
                let piece = piece(range, offset, chunk.left)?;
                prepare(range, buf)?;
                add(covered, piece.clone())?;
                State::Data { chunk, at: piece.start }
            }
            (REPLY_OFFSET_HOLE, Content::Bytes { range, buf, covered }) => {
                let (offset, len) = (fields.u64(), fields.u32());
                let (offset, len) = offset.zip(len).ok_or(ReplyError::Length)?;
                let piece = piece(range, offset, u64::from(len))?;
                // The buffer is zeros where nothing else came, and nothing comes twice.
                prepare(range, buf)?;
                add(covered, piece)?;
                State::Skip { chunk }
            }
            (kind, Content::Extents { range, builder }) if kind & REPLY_ERROR_BIT == 0 => {
                let context = fields.u32().ok_or(ReplyError::Length)?;
                check_count(kind, fields, chunk.left)?;
                match Some(context) == self.allocation {
                    true => {
                        *builder = Some(StatusBuilder::new(range));
                        State::Status { chunk }
                    }
                    false => {
                        chunk.pending.count_barren()?;
                        State::Skip { chunk }
                    }
                }
            }
            _ => {
                let failure = failure_of(fields)?;
                chunk.pending.count_barren()?;
                // The first error says what went wrong; the others follow from it.
                chunk.pending.failure.get_or_insert(failure);
                State::Skip { chunk }
            }
        };
        self.end_payload(events)
    }

    /// Ends the chunk when all its payload has come.
    fn end_payload(&mut self, events: &mut Vec<Event>) -> Result<(), ReplyError> {
        let is_complete = match &self.state {
            State::Data { chunk, .. } | State::Status { chunk } | State::Skip { chunk } => {
                chunk.left == 0
            }
            State::Header | State::Prefix { .. } => false,
        };
        if is_complete {
            match std::mem::replace(&mut self.state, State::Header) {
                State::Data { chunk, .. } | State::Status { chunk } | State::Skip { chunk } => {
                    self.end_chunk(chunk, events);
                }
                State::Header | State::Prefix { .. } => {}
            }
        }
        Ok(())
    }

    fn end_chunk(&mut self, chunk: Chunk, events: &mut Vec<Event>) {
        let Chunk { cookie, is_last, pending, .. } = chunk;
        match is_last {
            true => events.push(Event { cookie, result: pending.finish() }),
            false => drop(self.pending.insert(cookie, pending)),
        }
    }
}

#[cfg(test)]
mod tests;
