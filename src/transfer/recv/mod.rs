//! Receiving: what arrives becomes a file, under its name only when all of it is there.
//!
//! ```text
//!   rbd ──────────> records.rs ──┐
//!   raw ──────────> plain.rs ────┼──> receiver.rs ──> NAME.part ──> NAME
//!   android-sparse > sparse.rs ──┘         place.rs: whether, and where
//! ```
//!
//! Only records with checkpoints can be resumed: nothing else says what of it is right before
//! its end.

mod android;
mod preflight;
mod raw;
mod receiver;
mod records;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::preflight::{ReceiveTarget, device_resume_error};
use self::receiver::Receiver;
use self::records::StreamHead;
use super::destination::Destination;
use super::record_reader::RecordReader;
use super::state::ReceiveState;
use super::{TransferError, TransferFormat, TransferProgress};
use crate::config::Overwrite;
use crate::host::os_message;
use crate::part_file::PartFile;

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveStart {
    /// With nothing.
    New,
    /// With what arrived before.
    Resume,
}

/// What to receive, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivePlan {
    /// The file or device.
    pub path: PathBuf,
    /// What to do about a file of that name.
    pub overwrite: Overwrite,
    /// Where to begin.
    pub start: ReceiveStart,
    /// What comes over the wire.
    pub frames: TransferFormat,
    /// The file that a stream of changes is put onto; it stays as it is.
    pub onto: Option<PathBuf>,
    /// The most bytes of data that are written, what is only repeated included.
    pub limit: u64,
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// How much of what.
    pub progress: TransferProgress,
    /// Whether checkpoints vouched for it: other senders send none.
    pub is_verified: bool,
}

/// Where to send from so that `receive` can resume `path`; 0 when there is nothing to resume.
///
/// # Errors
/// A line when it is no file, or cannot be read.
pub fn resume_offset(path: &Path) -> Result<u64, TransferError> {
    let name = match Destination::of(path)? {
        Destination::Missing(name) | Destination::File(name, _) => name,
        Destination::Device(name) => return Err(device_resume_error(&name)),
    };
    // Not locked: in a pipeline the receiver that will resume may have been started already.
    let found =
        PartFile::open_unlocked(&name)?.and_then(|(file, slot)| ReceiveState::load(&slot, &file));
    Ok(found.map_or(0, |state| state.offset))
}

/// Receives a file from `input`; `tell` hears how far it is.
///
/// # Errors
/// A line: a file that is there already, a stream that is cut, damaged or another one than the
/// part's, what the host refuses. Nothing has the name then that did not have it before.
pub fn receive<R: Read>(
    input: R,
    plan: &ReceivePlan,
    tell: &mut dyn FnMut(&TransferProgress),
) -> Result<Received, TransferError> {
    let place = ReceiveTarget::of(plan)?;
    match plan.frames {
        TransferFormat::Raw => {
            let mut receiver = Receiver::open(place, plan, &StreamHead::default(), tell)?;
            let read = receiver.receive_raw(input);
            receiver.finish(read)
        }
        TransferFormat::Rbd => {
            let mut wire = RecordReader::new(input).map_err(|error| start_error(&error))?;
            let head = StreamHead::read(&mut wire).map_err(|error| start_error(&error))?;
            let mut receiver = Receiver::open(place, plan, &head, tell)?;
            let read = receiver.receive_records(&mut wire, head);
            receiver.finish(read)
        }
        TransferFormat::AndroidSparse => {
            let (mut image, head) = android::open_image(input)?;
            let mut receiver = Receiver::open(place, plan, &head, tell)?;
            let read = receiver.receive_android(&mut image);
            receiver.finish(read)
        }
    }
}

/// The error for a stream of which nothing was used.
fn start_error(error: &io::Error) -> TransferError {
    let what = match error.kind() {
        io::ErrorKind::InvalidData => "what arrives is no rbd diff v2, or is damaged".to_owned(),
        io::ErrorKind::UnexpectedEof => "the stream was cut at its beginning".to_owned(),
        _ => format!("cannot read the stream: {}", os_message(error)),
    };
    let left = "nothing was written; 'cowslip send' makes such a stream, and --frames raw takes \
                plain bytes";
    TransferError::Broken { what, left: left.to_owned() }
}
