//! Owner and mode of a disk that is opened.

use std::os::unix::fs::MetadataExt;

use super::context::OpenContext;
use crate::config::{DiskMode, DiskSpec};
use crate::disk::attrs::DiskOwner;
use crate::disk::base_description::BaseDescription;
use crate::overlay::error::OverlayError;
use crate::overlay::persist::OverlayDir;

/// Returns the owner and mode of a disk whose overlay records none: the mounting user's, and
/// readable by those who can read all files of the base.
pub(super) fn initial_owner(
    spec: &DiskSpec,
    description: &BaseDescription,
    context: &OpenContext<'_>,
) -> DiskOwner {
    // A backing file may be more private than its image.
    let modes = description.files().map(|file| file.metadata().map_or(0, |found| found.mode()));
    let readable = modes.reduce(|all, mode| all & mode).unwrap_or(0) & 0o044;
    let perm = if spec.mode == DiskMode::ReadOnly { 0o400 } else { 0o600 } | readable;
    let perm = u16::try_from(perm).unwrap_or(0o600);
    DiskOwner {
        uid: spec.uid.unwrap_or(context.uid),
        gid: spec.gid.unwrap_or(context.gid),
        perm: spec.perm.unwrap_or(perm),
    }
}

/// Records in the overlay the owner and mode that `spec` sets.
pub(super) fn adopt_owner(
    spec: &DiskSpec,
    overlay_dir: &mut OverlayDir,
) -> Result<(), OverlayError> {
    let mut stack = overlay_dir.stack.clone();
    stack.uid = spec.uid.unwrap_or(stack.uid);
    stack.gid = spec.gid.unwrap_or(stack.gid);
    stack.perm = spec.perm.unwrap_or(stack.perm);
    if stack == overlay_dir.stack { Ok(()) } else { overlay_dir.replace_stack(stack) }
}
