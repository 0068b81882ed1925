//! One request of the client: what it asks, and who waits for it.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use super::codec::replies::{Answer, Expected};
use super::codec::request::{Command, Durability};
use crate::extents::{Extent, ExtentKind};
use crate::host::os_error;
use crate::remote::transport::{ChangeDone, ExtentsDone, ReadDone};

/// What is asked for.
pub(super) enum Operation {
    /// `have` came before an earlier connection was lost.
    Read {
        range: Range<u64>,
        have: Vec<u8>,
        done: ReadDone,
    },
    /// The server is asked for `query`, whole blocks around `asked`.
    Extents {
        asked: Range<u64>,
        query: Range<u64>,
        done: ExtentsDone,
    },
    Write {
        offset: u64,
        bytes: Arc<Vec<u8>>,
        durability: Durability,
        done: ChangeDone,
    },
    /// In pieces, one after the other: `range` is what is left.
    Zero {
        range: Range<u64>,
        punch: bool,
        durability: Durability,
        done: ChangeDone,
    },
    /// `covers` are the changes that were answered when it began.
    Flush {
        covers: u64,
        done: ChangeDone,
    },
}

/// A request, from its beginning to its end.
pub(super) struct Request {
    pub(super) operation: Operation,
    /// When it fails for lack of an answer.
    pub(super) deadline: Instant,
    /// The connection that it was sent on, and when.
    pub(super) sent: Option<(usize, Instant)>,
}

/// A call that tells the outcome of a request. It is made without locks.
pub(super) enum Outcome {
    Read(ReadDone, io::Result<Vec<u8>>),
    Extents(ExtentsDone, io::Result<Vec<Extent>>),
    Change(ChangeDone, io::Result<()>),
}

impl Outcome {
    pub(super) fn tell(self) {
        match self {
            Self::Read(done, result) => done(result),
            Self::Extents(done, result) => done(result),
            Self::Change(done, result) => done(result),
        }
    }
}

impl Operation {
    /// Returns what is sent: the command, its range, what it is to bring, and its payload.
    pub(super) fn message(&self) -> (Command, Range<u64>, Expected, Option<Arc<Vec<u8>>>) {
        match self {
            Self::Read { range, have, .. } => {
                let rest = range.start + have.len() as u64..range.end;
                (Command::Read, rest.clone(), Expected::Bytes(rest), None)
            }
            Self::Extents { query, .. } => {
                (Command::BlockStatus, query.clone(), Expected::Extents(query.clone()), None)
            }
            Self::Write { offset, bytes, durability, .. } => {
                let range = *offset..offset.saturating_add(bytes.len() as u64);
                (Command::Write(*durability), range, Expected::Done, Some(Arc::clone(bytes)))
            }
            Self::Zero { range, punch, durability, .. } => {
                let command = Command::WriteZeroes { punch: *punch, durability: *durability };
                (command, range.clone(), Expected::Done, None)
            }
            Self::Flush { .. } => (Command::Flush, 0..0, Expected::Done, None),
        }
    }

    /// Keeps the beginning of what a read is to bring, in whole blocks, so that each connection brings a
    /// read further, however short it lasts.
    pub(super) fn keep(&mut self, mut bytes: Vec<u8>, block: u32) {
        if let Self::Read { range, have, .. } = self {
            let total = have.len() + bytes.len();
            let whole = total - total % usize::try_from(block).unwrap_or(1).max(1);
            // All of it would be a complete read; a block is asked for once more then.
            if whole > have.len() && (whole as u64) < range.end - range.start {
                bytes.truncate(whole - have.len());
                have.extend(bytes);
            }
        }
    }

    /// Returns the bytes of memory that the request takes while it is on its way.
    pub(super) fn weight(&self) -> usize {
        match self {
            Self::Read { range, .. } => usize::try_from(range.end - range.start).unwrap_or(0),
            Self::Write { bytes, .. } => bytes.len(),
            Self::Extents { .. } | Self::Zero { .. } | Self::Flush { .. } => 0,
        }
    }

    /// Returns whether it changes the image.
    pub(super) fn is_change(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }

    /// Returns whether it changes the image, or makes changes durable.
    pub(super) fn changes_or_flushes(&self) -> bool {
        self.is_change() || matches!(self, Self::Flush { .. })
    }

    /// Ends the request with what it brought.
    pub(super) fn succeed(self, answer: Answer) -> Outcome {
        match (self, answer) {
            (Self::Read { have, done, .. }, Answer::Bytes(bytes)) if have.is_empty() => {
                Outcome::Read(done, Ok(bytes))
            }
            (Self::Read { mut have, done, .. }, Answer::Bytes(bytes)) => {
                have.extend(bytes);
                Outcome::Read(done, Ok(have))
            }
            (Self::Extents { asked, done, .. }, Answer::Extents(extents)) => {
                Outcome::Extents(done, Ok(clip(&extents, &asked)))
            }
            (Self::Read { done, .. }, _) => Outcome::Read(done, Err(os_error(libc::EIO))),
            (Self::Extents { done, .. }, _) => Outcome::Extents(done, Err(os_error(libc::EIO))),
            (Self::Write { done, .. } | Self::Zero { done, .. } | Self::Flush { done, .. }, _) => {
                Outcome::Change(done, Ok(()))
            }
        }
    }

    /// Ends the request with an errno.
    pub(super) fn fail(self, errno: i32) -> Outcome {
        let error = os_error(errno);
        match self {
            Self::Read { done, .. } => Outcome::Read(done, Err(error)),
            Self::Extents { done, .. } => Outcome::Extents(done, Err(error)),
            Self::Write { done, .. } | Self::Zero { done, .. } | Self::Flush { done, .. } => {
                Outcome::Change(done, Err(error))
            }
        }
    }
}

/// Cuts the extents of whole blocks to what was asked.
fn clip(extents: &[Extent], asked: &Range<u64>) -> Vec<Extent> {
    let clipped: Vec<Extent> = extents.iter().filter_map(|extent| extent.clip(asked)).collect();
    match clipped.is_empty() {
        false => clipped,
        // The server described only bytes of the first block that come before.
        true => vec![Extent::new(asked.clone(), ExtentKind::Data)],
    }
}
