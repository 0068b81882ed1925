//! Where something may be received: what is there already decides, and what was asked for.

use std::path::{Path, PathBuf};

use super::super::spot::{Owner, Spot};
use super::super::state::State;
use super::super::{Frames, TransferError};
use super::records::Head;
use super::{Begin, ReceivePlan};
use crate::part::Part;
use crate::spec::Overwrite;

/// Where it may go.
pub(super) enum Place {
    File { name: PathBuf, owner: Option<Owner>, part: Option<Part>, state: Option<State> },
    Device(PathBuf),
}

impl Place {
    pub(super) fn of(plan: &ReceivePlan) -> Result<Self, TransferError> {
        let spot = Spot::of(&plan.path)?;
        let shown = plan.path.display();
        let overwrite = plan.overwrite == Overwrite::Yes;
        let (name, owner) = match spot {
            Spot::Device(name) if plan.begin == Begin::Resume => return Err(no_resume(&name)),
            Spot::Device(name) if overwrite => return Ok(Self::Device(name)),
            Spot::Device(_) => {
                let line = format!("'{shown}' is a device: --overwrite writes to it");
                return Err(TransferError::Refused(line));
            }
            Spot::Free(name) => (name, None),
            Spot::File(name, owner) => (name, Some(owner)),
        };
        let part = Part::find(&name)?;
        let state = part.as_ref().and_then(|part| State::load(part.slot(), part.file()));
        let resumes = plan.begin == Begin::Resume;
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

/// Whether this stream may go there.
pub(super) fn check(plan: &ReceivePlan, head: &Head, place: &Place) -> Result<(), TransferError> {
    let refuse = |line: String| Err(TransferError::Refused(line));
    let shown = plan.path.display();
    let origin = head.origin();
    let old = match place {
        Place::File { state, .. } => state.as_ref(),
        Place::Device(_) => None,
    };
    match (&head.since, &plan.onto) {
        (Some(since), None) => {
            return refuse(format!(
                "the stream holds only what changed since '{since}': name the file that holds \
                 that snapshot, --onto OLD"
            ));
        }
        (None, Some(_)) if plan.frames == Frames::Rbd => {
            return refuse(
                "the stream holds all of a disk: leave --onto out, it is for what 'send --since' \
                 makes"
                    .to_owned(),
            );
        }
        (_, Some(_)) if matches!(place, Place::Device(_)) => {
            return refuse(format!("'{shown}' is a device: changes are received into a file"));
        }
        _ => {}
    }
    let Some(old) = old else {
        return match origin {
            0 => Ok(()),
            _ => refuse(format!(
                "the stream begins at byte {origin}, and there is nothing of '{shown}' before it: \
                 send all of it"
            )),
        };
    };
    let anew = "--overwrite without --resume begins anew";
    let Some(mark) = head.mark else {
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
    let is_known = mark.identity != 0 || old.identity != 0;
    let is_other = mark.identity != old.identity || head.size != old.size;
    if is_known && is_other || head.since != old.since {
        return refuse(format!(
            "the stream is of another file, or of one that changed since '{shown}.part' was \
             begun: {anew}"
        ));
    }
    Ok(())
}

/// The error for a device that is to be resumed.
pub(super) fn no_resume(path: &Path) -> TransferError {
    let path = path.display();
    let line = format!("'{path}' is a device: only a file can be resumed, send all of it");
    TransferError::Refused(line)
}
