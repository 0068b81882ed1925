//! What must hold before a commit begins: the base is the one that the overlay was created over, and
//! the changes fit into the free space where it is.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::super::base_description::BaseDescription;
use super::super::operation_error::OperationError;
use super::super::overlay_location::OverlayFiles;
use super::Disk;
use crate::base::WritableBase;
use crate::config::format_size;
use crate::confined;
use crate::extents::ExtentKind;
use crate::host::file_system;
use crate::identity::Identity;
use crate::layer::{Layer, Wait};
use crate::overlay::Overlay;
use crate::overlay::stack::BaseRecord;

impl Disk {
    /// Refuses a base that was changed since the overlay was created. A base in which a commit was
    /// interrupted has other bytes, but must be the same file.
    pub(super) fn check_base_identity(&self, is_resumed: bool) -> Result<(), OperationError> {
        let recorded = match &mut *self.overlay_location.lock() {
            OverlayFiles::Persistent(dir) => dir.stack.base.clone(),
            OverlayFiles::NoOverlay | OverlayFiles::Temporary { .. } => return Ok(()),
        };
        let described = self.described_base();
        if let (BaseRecord::Remote { identity, .. }, Some(remote)) = (&recorded, described.remote())
        {
            let now = match remote.identity_now() {
                Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {
                    let what = "another image is there by now";
                    return Err(changed_base(&described.location(), what));
                }
                now => now.map_err(OperationError::io("reading the base"))?,
            };
            let change = identity.differences(&now).filter(|_| !is_resumed);
            return change.map_or(Ok(()), |what| Err(changed_base(&described.location(), &what)));
        }
        let (
            BaseRecord::File { identity, path: recorded_path, .. },
            BaseDescription::File { path, file, .. },
        ) = (recorded, &*described)
        else {
            return Ok(());
        };
        // A symbolic link in the base's place may lead to a file that the user never named.
        let real =
            confined::real_path(&**file).map_err(OperationError::io("looking for the base"))?;
        if real != recorded_path {
            return Err(OperationError::Refused(format!(
                "its base '{}' is '{}' by now: if that is right, say so with cowslip rebase",
                recorded_path.display(),
                real.display()
            )));
        }
        let now = Identity::of(file).map_err(OperationError::io("reading the base"))?;
        let other = identity.file_difference(&now).filter(|_| is_resumed);
        if let Some(what) = other {
            return Err(OperationError::Refused(format!(
                "'{}' is not the base that the commit began with ({what}): put that one back, or take this one with cowslip rebase --force",
                path.display()
            )));
        }
        match identity.differences(&now).filter(|_| !is_resumed) {
            None => Ok(()),
            Some(what) => Err(changed_base(path, &what)),
        }
    }
}

/// Refuses a commit when the overlay's data does not fit into the free space for the holes of the
/// base.
pub(super) fn check_space(
    overlay: &Overlay,
    base: &WritableBase,
    dir: Option<&Path>,
) -> Result<(), OperationError> {
    let looking = || OperationError::io("looking at the base");
    let Some(file) = &base.file else { return Ok(()) };
    let found = file.metadata().map_err(looking())?;
    if !found.is_file() {
        return Ok(());
    }
    let shares = overlay.data_file().and_then(|file| file.metadata().ok());
    let is_beside = shares.is_some_and(|data| data.dev() == found.dev());
    let reflinks =
        || dir.and_then(|dir| file_system::probe_features(dir).ok()).is_some_and(|can| can.reflink);
    if is_beside && reflinks() {
        return Ok(()); // The host shares the blocks.
    }
    let mut needed = 0;
    let (mut at, size) = (0, overlay.size().min(base.layer.size()));
    while at < size {
        let extent = overlay.extent_at(at..size, Wait::Yes).map_err(looking())?;
        at = extent.range.end;
        if extent.kind != ExtentKind::Data {
            continue;
        }
        let mut from = extent.range.start;
        while from < extent.range.end {
            let below = base.layer.extent_at(from..extent.range.end, Wait::Yes);
            let below = below.map_err(looking())?;
            from = below.range.end;
            if below.kind == ExtentKind::Hole {
                needed += below.len();
            }
        }
    }
    let space = rustix::fs::fstatvfs(&**file).map_err(|error| looking()(error.into()))?;
    let free = space.f_bavail * space.f_frsize;
    if needed > free {
        return Err(OperationError::Refused(format!(
            "not enough space where its base is: {} are needed, {} are free",
            format_size(needed),
            format_size(free)
        )));
    }
    Ok(())
}

fn changed_base(location: &Path, what: &str) -> OperationError {
    OperationError::Refused(format!(
        "its base '{}' has changed under it ({what}), and what would come out is neither: put the old one back, or take this one with cowslip rebase --force",
        location.display()
    ))
}
