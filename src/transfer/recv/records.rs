//! The records of an rbd diff, with or without our checkpoints.

use std::io::{self, Read};
use std::ops::Range;

use super::super::BUFFER;
use super::super::checkpoint::{Mark, Stage};
use super::super::state::{State, VERSION};
use super::super::wire::{Event, Wire, damaged};
use super::receiver::{Failed, Receiver};

/// What a stream says before its first byte.
#[derive(Debug, Default)]
pub(super) struct Head {
    pub(super) size: u64,
    pub(super) since: Option<String>,
    /// Its first checkpoint; other senders send none.
    pub(super) mark: Option<Mark>,
    /// What was read too far.
    next: Option<Event>,
}

impl Head {
    /// That of a stream that says its size alone.
    pub(super) fn of_size(size: u64) -> Self {
        Self { size, ..Self::default() }
    }

    /// Where the stream began.
    pub(super) fn origin(&self) -> u64 {
        self.mark.map_or(0, |mark| mark.origin)
    }

    /// What is kept of a file that nothing has arrived of.
    pub(super) fn state(&self) -> State {
        State {
            version: VERSION,
            inode: 0,
            offset: 0,
            size: self.size,
            identity: self.mark.map_or(0, |mark| mark.identity),
            since: self.since.clone(),
            overwrite: false,
        }
    }

    pub(super) fn read<R: Read>(wire: &mut Wire<R>) -> io::Result<Self> {
        let (mut head, mut size) = (Self::default(), None);
        loop {
            match wire.event()? {
                Event::Size(bytes) => size = Some(bytes),
                Event::Since(name) => head.since = Some(name),
                Event::Checkpoint(mark, Stage::Middle) => head.mark = Some(mark),
                other => head.next = Some(other),
            }
            if head.mark.is_some() || head.next.is_some() {
                // Past what a file can be there is no size, and nothing to make room for.
                head.size =
                    size.filter(|size| *size <= crate::spec::MAX_SIZE).ok_or_else(damaged)?;
                return Ok(head);
            }
        }
    }
}

impl Receiver<'_> {
    /// Takes the records of a stream.
    pub(super) fn records<R: Read>(
        &mut self,
        wire: &mut Wire<R>,
        head: Head,
    ) -> Result<(), Failed> {
        let ours = head.mark;
        let has_gaps = head.since.is_some() || ours.is_none();
        let mut verified = ours.map_or(0, |mark| mark.end);
        let mut next = head.next;
        let mut is_whole = false;
        let mut buffer = vec![0; BUFFER];
        loop {
            let event = match next.take() {
                Some(event) => event,
                None => wire.event().map_err(Failed::Stream)?,
            };
            // Of the last checkpoint's promise nothing may be changed.
            if is_whole != (event == Event::End) && (ours.is_some() || is_whole) {
                return Err(Failed::Stream(damaged()));
            }
            match event {
                Event::End => return Ok(()),
                Event::Since(_) => return Err(Failed::Stream(damaged())),
                Event::Size(size) => self.resize(size)?,
                Event::Data(range) => {
                    self.expect(&range, ours.is_some(), has_gaps)?;
                    let mut read = |buf: &mut [u8]| wire.bytes(buf);
                    self.pieces(range, &mut buffer, &mut read)?;
                }
                Event::Zeros(range) => {
                    self.expect(&range, ours.is_some(), has_gaps)?;
                    self.gap(range)?;
                    (self.tell)(&self.told);
                }
                Event::Checkpoint(mark, stage) => {
                    is_whole = stage == Stage::Last;
                    self.checkpoint(mark, ours, verified, has_gaps, is_whole)?;
                    verified = mark.end;
                }
            }
        }
    }

    /// Whether a record may cover `range` now.
    fn expect(&self, range: &Range<u64>, is_ours: bool, has_gaps: bool) -> Result<(), Failed> {
        let is_next = range.start == self.told.reached;
        let is_later = has_gaps && range.start >= self.told.reached;
        if range.end > self.told.size.unwrap_or(0) || is_ours && !is_next && !is_later {
            return Err(Failed::Stream(damaged()));
        }
        Ok(())
    }

    fn resize(&mut self, size: u64) -> Result<(), Failed> {
        if size > crate::spec::MAX_SIZE {
            return Err(Failed::Stream(damaged()));
        }
        self.told.size = Some(size);
        self.state.size = size;
        self.target.set_size(size).map_err(Failed::Target)
    }

    fn checkpoint(
        &mut self,
        mark: Mark,
        ours: Option<Mark>,
        verified: u64,
        has_gaps: bool,
        is_whole: bool,
    ) -> Result<(), Failed> {
        let is_reached =
            if has_gaps { mark.end >= self.told.reached } else { mark.end == self.told.reached };
        let is_its = ours
            .is_some_and(|first| (first.identity, first.origin) == (mark.identity, mark.origin));
        let is_all = !is_whole || Some(mark.end) == self.told.size;
        if !is_its || !is_reached || !is_all || mark.start != verified {
            return Err(Failed::Stream(damaged()));
        }
        self.told.reached = mark.end;
        self.target.settle().map_err(Failed::Target)?;
        self.is_verified = is_whole;
        self.state.offset = self.state.offset.max(mark.end);
        if let Some((_, keeper)) = &self.part
            && !is_whole
        {
            keeper.note(self.state.clone());
        }
        Ok(())
    }
}
