//! Requests that wait for answers, and what they have brought so far.

use std::ops::Range;

use thiserror::Error;

use crate::extents::Extent;
use crate::remote::nbd::codec::coverage::{Coverage, CoverageError};
use crate::remote::nbd::codec::status::StatusBuilder;

/// The most chunks of one reply that bring nothing of what was asked for: errors, and states of other
/// contexts. A server may tell of each bad sector of a read; none has a reason for as many.
const MAX_BARREN: u32 = 4096;

/// A reply that makes no sense.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
pub(crate) enum ReplyError {
    #[error("the server broke the protocol: a reply has another magic number")]
    Magic,
    #[error("the server broke the protocol: it answers a request that was not sent")]
    UnknownCookie,
    #[error("the server broke the protocol: the type of a reply does not fit its request")]
    Type,
    #[error("the server broke the protocol: the length of a reply does not fit its type")]
    Length,
    #[error("the server broke the protocol: it sent bytes outside the range of a read")]
    Outside,
    #[error("the server broke the protocol: it sent bytes of a read twice")]
    Overlap,
    #[error("the server broke the protocol: it sent a read in too many pieces")]
    TooManyPieces,
    #[error("the server broke the protocol: it described a range in more than 2^20 extents")]
    TooManyExtents,
    #[error(
        "the server broke the protocol: it sent too many errors, or states that nobody asked for, in one reply"
    )]
    TooManyBarren,
}

/// What a request is to bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The bytes of a range; its length fits the memory.
    Bytes(Range<u64>),
    /// The extents of a range.
    Extents(Range<u64>),
    /// No more than success.
    Done,
}

/// What a request has brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    /// All bytes of the range.
    Bytes(Vec<u8>),
    /// Extents of a prefix of the range, without gaps; at least one.
    Extents(Vec<Extent>),
    /// Success.
    Done,
}

/// The failure of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// The errno.
    pub(crate) errno: i32,
    /// What the server said, or what is wrong with its reply; may be empty.
    pub(crate) text: String,
}

/// A request that is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Event {
    /// The request.
    pub(crate) cookie: u64,
    /// Its result.
    pub(crate) result: Result<Answer, Failure>,
}

/// A request that is not answered yet.
#[derive(Debug)]
pub(super) struct Pending {
    pub(super) content: Content,
    pub(super) failure: Option<Failure>,
    /// How many chunks brought nothing of what was asked for.
    pub(super) barren: u32,
}

#[derive(Debug)]
pub(super) enum Content {
    Bytes { range: Range<u64>, buf: Vec<u8>, covered: Coverage },
    Extents { range: Range<u64>, builder: Option<StatusBuilder> },
    Done,
}

impl Pending {
    /// Counts a chunk that brings nothing of what was asked for.
    ///
    /// # Errors
    /// [`ReplyError::TooManyBarren`].
    pub(super) fn count_barren(&mut self) -> Result<(), ReplyError> {
        self.barren += 1;
        if self.barren > MAX_BARREN { Err(ReplyError::TooManyBarren) } else { Ok(()) }
    }

    pub(super) fn finish(self) -> Result<Answer, Failure> {
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let incomplete = |text: &str| Failure { errno: libc::EIO, text: text.to_owned() };
        match self.content {
            Content::Bytes { range, buf, covered } => {
                let is_complete =
                    covered.is_complete(buf.len()) && buf.len() as u64 == range.end - range.start;
                match is_complete {
                    true => Ok(Answer::Bytes(buf)),
                    false => Err(incomplete("the server left out bytes of a read")),
                }
            }
            Content::Extents { builder, .. } => {
                let extents = builder.map(StatusBuilder::finish).unwrap_or_default();
                match extents.is_empty() {
                    false => Ok(Answer::Extents(extents)),
                    true => Err(incomplete("the server left out the extents of a range")),
                }
            }
            Content::Done => Ok(Answer::Done),
        }
    }
}

/// Makes the buffer of a read, once its first bytes have come. Returns its length.
pub(super) fn prepare(range: &Range<u64>, buf: &mut Vec<u8>) -> Result<usize, ReplyError> {
    let len = usize::try_from(range.end - range.start).map_err(|_| ReplyError::Length)?;
    if buf.is_empty() {
        *buf = vec![0; len];
    }
    Ok(len)
}

/// Returns the place of `len` bytes from `offset` on in the buffer of the read of `range`.
pub(super) fn piece(range: &Range<u64>, offset: u64, len: u64) -> Result<Range<usize>, ReplyError> {
    let end = offset.checked_add(len).filter(|end| *end <= range.end);
    let (Some(end), Some(start)) = (end, offset.checked_sub(range.start)) else {
        return Err(ReplyError::Outside);
    };
    if len == 0 {
        return Err(ReplyError::Length);
    }
    let place = usize::try_from(start).ok().zip(usize::try_from(end - range.start).ok());
    place.map(|(start, end)| start..end).ok_or(ReplyError::Outside)
}

pub(super) fn add(covered: &mut Coverage, piece: Range<usize>) -> Result<(), ReplyError> {
    covered.add(piece).map_err(|error| match error {
        CoverageError::Overlap => ReplyError::Overlap,
        CoverageError::TooManyPieces => ReplyError::TooManyPieces,
    })
}
