//! Checks, before anything is written, whether a stream may be received at a path, given what
//! exists there and what the user asked for.

use std::path::{Path, PathBuf};

use super::super::destination::{Destination, FileOwner};
use super::super::state::ReceiveState;
use super::super::{TransferError, TransferFormat};
use super::head::StreamHead;
use super::{ReceivePlan, ReceiveStart};
use crate::config::Overwrite;
use crate::part_file::PartFile;

/// A destination that may be written to, as far as is known before the stream begins.
pub(super) enum CheckedDestination {
    File {
        name: PathBuf,
        owner: Option<FileOwner>,
        part: Option<PartFile>,
        state: Option<ReceiveState>,
    },
    Device(PathBuf),
}

impl CheckedDestination {
    pub(super) fn of(plan: &ReceivePlan) -> Result<Self, TransferError> {
        let destination = Destination::of(&plan.path)?;
        let shown = plan.path.display();
        let overwrite = plan.overwrite == Overwrite::Yes;
        let (name, owner) = match destination {
            Destination::Device(name) if plan.start == ReceiveStart::Resume => {
                return Err(device_resume_error(&name));
            }
            Destination::Device(name) if overwrite => return Ok(Self::Device(name)),
            Destination::Device(_) => {
                let line = format!("'{shown}' is a device: --overwrite writes to it");
                return Err(TransferError::Refused(line));
            }
            Destination::Missing(name) => (name, None),
            Destination::File(name, owner) => (name, Some(owner)),
        };
        let part = PartFile::find(&name)?;
        let state = part.as_ref().and_then(|part| ReceiveState::load(part.slot(), part.file()));
        let resumes = plan.start == ReceiveStart::Resume;
        let may_replace = overwrite || resumes && state.as_ref().is_some_and(|it| it.overwrite);
        if owner.is_some() && !may_replace {
            let line = format!("'{shown}' exists: --overwrite replaces it");
            return Err(TransferError::Refused(line));
        }
        if let Some(state) = &state
            && !resumes
            && !overwrite
        {
            let line = format!(
                "'{shown}.part' holds the first {} bytes of it: --resume goes on with them, \
                 --overwrite begins anew",
                state.offset
            );
            return Err(TransferError::Refused(line));
        }
        let state = state.filter(|_| resumes);
        Ok(Self::File { name, owner, part, state })
    }
}

/// Checks whether the stream that begins with `head` may be received into `destination`.
pub(super) fn check_stream(
    plan: &ReceivePlan,
    head: &StreamHead,
    destination: &CheckedDestination,
) -> Result<(), TransferError> {
    check_onto(plan, head, destination)?;
    let old = match destination {
        CheckedDestination::File { state, .. } => state.as_ref(),
        CheckedDestination::Device(_) => None,
    };
    match (old, head.origin()) {
        (Some(old), _) => check_resume(plan, head, old),
        (None, 0) => Ok(()),
        (None, origin) => Err(TransferError::Refused(format!(
            "the stream begins at byte {origin}, and there is nothing of '{}' before it: send all \
             of it",
            plan.path.display()
        ))),
    }
}

/// Checks that `--onto` is given for a stream of changes, and only for one.
fn check_onto(
    plan: &ReceivePlan,
    head: &StreamHead,
    destination: &CheckedDestination,
) -> Result<(), TransferError> {
    let line = match (&head.since, &plan.onto) {
        (Some(since), None) => format!(
            "the stream holds only what changed since '{since}': name the file that holds that \
             snapshot, --onto OLD"
        ),
        (None, Some(_)) if plan.frames == TransferFormat::Rbd => {
            "the stream holds all of a disk: leave --onto out, it is for what 'send --since' makes"
                .to_owned()
        }
        (_, Some(_)) if matches!(destination, CheckedDestination::Device(_)) => {
            format!("'{}' is a device: changes are received into a file", plan.path.display())
        }
        _ => return Ok(()),
    };
    Err(TransferError::Refused(line))
}

/// Checks whether the stream continues the part with the state `old`.
fn check_resume(
    plan: &ReceivePlan,
    head: &StreamHead,
    old: &ReceiveState,
) -> Result<(), TransferError> {
    let refuse = |line: String| Err(TransferError::Refused(line));
    let (shown, origin) = (plan.path.display(), head.origin());
    let anew = "--overwrite without --resume begins anew";
    let Some(checkpoint) = head.checkpoint else {
        return refuse(format!(
            "the stream has no checkpoints, so '{shown}' cannot be resumed with it: {anew}"
        ));
    };
    if origin > old.offset {
        return refuse(format!(
            "the stream begins at byte {origin}, and '{shown}.part' has {}: send --from {0}",
            old.offset
        ));
    }
    let is_known = checkpoint.identity != 0 || old.identity != 0;
    let is_other = checkpoint.identity != old.identity || head.size != old.size;
    if is_known && is_other || head.since != old.since {
        return refuse(format!(
            "the stream is of another file, or of one that changed since '{shown}.part' was \
             begun: {anew}"
        ));
    }
    Ok(())
}

/// Returns the error for an attempt to resume a device.
pub(super) fn device_resume_error(path: &Path) -> TransferError {
    let path = path.display();
    let line = format!("'{path}' is a device: only a file can be resumed, send all of it");
    TransferError::Refused(line)
}
