//! Receiving a stream into a file, which gets its name only when it is complete.
//!
//! ```text
//!   rbd ───────────> records.rs ──┐
//!   raw ───────────> raw.rs ──────┼──> receiver.rs ──> NAME.part ──> NAME
//!   android-sparse > android.rs ──┘         preflight.rs: whether, and where
//! ```
//!
//! Only records with checkpoints can be resumed: in the other formats nothing says before the end
//! of the stream which part of it is correct.

mod android;
mod head;
mod preflight;
mod raw;
mod receiver;
mod records;

use std::io::{self, Read};
use std::path::{Path, PathBuf};

use self::head::StreamHead;
use self::preflight::{CheckedDestination, device_resume_error};
use self::receiver::Receiver;
use super::destination::Destination;
use super::state::ReceiveState;
use super::{TransferError, TransferFormat, TransferProgress};
use crate::config::Overwrite;
use crate::formats::rbd::CheckedReader;
use crate::host::os_message;
use crate::part_file::PartFile;

/// The point at which a receiver begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReceiveStart {
    /// Begin with an empty file.
    New,
    /// Continue after the bytes that arrived before.
    Resume,
}

/// The parameters of `receive`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceivePlan {
    /// The path of the file or device.
    pub path: PathBuf,
    /// Whether an existing file of that name is replaced.
    pub overwrite: Overwrite,
    /// Whether to begin anew or to resume.
    pub start: ReceiveStart,
    /// The format of the stream.
    pub frames: TransferFormat,
    /// The file to which a stream of changes is applied; a copy is changed, not the file itself.
    pub onto: Option<PathBuf>,
    /// The most bytes of data to write, repeated patterns included.
    pub limit: u64,
}

/// The result of `receive`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The bytes received.
    pub progress: TransferProgress,
    /// Whether checkpoints have vouched for the content; streams of other senders contain none.
    pub is_verified: bool,
}

/// Returns the offset in bytes from which a sender should send so that `receive` can resume `path`;
/// 0 if there is nothing to resume.
///
/// # Errors
/// A line for the user if `path` is not a file or cannot be read.
pub fn resume_offset(path: &Path) -> Result<u64, TransferError> {
    let name = match Destination::of(path)? {
        Destination::Missing(name) | Destination::File(name, _) => name,
        Destination::Device(name) => return Err(device_resume_error(&name)),
    };
    // No lock: in a pipeline, the receiver that will resume may already be running.
    let found =
        PartFile::open_unlocked(&name)?.and_then(|(file, slot)| ReceiveState::load(&slot, &file));
    Ok(found.map_or(0, |state| state.offset))
}

/// Receives a file from `input`; `on_progress` is called with the progress.
///
/// # Errors
/// A line for the user: the file exists already; the stream is cut, damaged, or does not belong to
/// the part; or the host refuses. In that case no file has appeared under the name or been
/// replaced.
pub fn receive<R: Read>(
    input: R,
    plan: &ReceivePlan,
    on_progress: &mut dyn FnMut(&TransferProgress),
) -> Result<Received, TransferError> {
    let destination = CheckedDestination::of(plan)?;
    match plan.frames {
        TransferFormat::Raw => {
            let mut receiver =
                Receiver::open(destination, plan, &StreamHead::default(), on_progress)?;
            let read = receiver.receive_raw(input);
            receiver.finish(read)
        }
        TransferFormat::Rbd => {
            let mut wire = CheckedReader::new(input).map_err(|error| start_error(&error))?;
            let head = StreamHead::read(&mut wire).map_err(|error| start_error(&error))?;
            let mut receiver = Receiver::open(destination, plan, &head, on_progress)?;
            let read = receiver.receive_records(&mut wire, head);
            receiver.finish(read)
        }
        TransferFormat::AndroidSparse => {
            let (mut image, head) = android::open_image(input)?;
            let mut receiver = Receiver::open(destination, plan, &head, on_progress)?;
            let read = receiver.receive_android(&mut image);
            receiver.finish(read)
        }
    }
}

/// Returns the error for a stream that failed before any of it was used.
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
