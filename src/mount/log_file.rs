//! The file that a daemon logs to (`--log`), which is none that a disk uses.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::kernel::check_answers;
use super::plan::MountPlan;
use crate::base::lock;
use crate::config::DiskSource;
use crate::confined;
use crate::overlay::persist;
use crate::trusted_path;

/// Opens the log at `path` for the mount of `plan`. Nothing is written to it, and no disk of any mount
/// takes it as its image from now on.
///
/// # Errors
/// A line for the user: it cannot be opened; it is the image of a disk, or lies in an overlay or a
/// store.
pub(super) fn open(path: &Path, plan: &MountPlan) -> Result<File, String> {
    let refused = |why: &dyn std::fmt::Display| format!("log '{}': {why}", path.display());
    check_answers(path).map_err(|error| refused(&error))?;
    // Looked at before the file is created, and again where links have led to.
    if let Some(Ok(dir)) = path.parent().map(trusted_path::real_dir) {
        check_place(&dir, plan).map_err(|why| refused(&why))?;
    }
    let file = trusted_path::open_append(path).map_err(|error| refused(&error))?;
    let found = file.metadata().map_err(|error| refused(&error))?;
    if !found.is_file() {
        return Ok(file);
    }
    if let Some(dir) = confined::real_path(&file).ok().as_deref().and_then(Path::parent) {
        check_place(dir, plan).map_err(|why| refused(&why))?;
    }
    for disk in &plan.disks {
        if let DiskSource::File(base) = &disk.source
            && check_answers(base).is_ok()
            && let Ok(base) = base.metadata()
            && (base.dev(), base.ino()) == (found.dev(), found.ino())
        {
            return Err(refused(&format!(
                "it is the image of the disk '{}': name another file",
                disk.name
            )));
        }
    }
    // For the images that those need, for other mounts, and for disks that are added later.
    lock::lock_log(&file, path).map_err(|error| error.to_string())?;
    Ok(file)
}

/// Refuses the directory `dir`, whose path has no links, if it is in an overlay or a store, or in what
/// becomes one with this mount.
fn check_place(dir: &Path, plan: &MountPlan) -> Result<(), String> {
    let planned = plan.disks.iter().filter_map(|disk| disk.overlay.as_deref());
    // What does not answer is told when it is opened.
    let planned = planned.chain(plan.store.as_deref()).filter(|path| check_answers(path).is_ok());
    let mut planned = planned.flat_map(Path::canonicalize);
    let owner = dir.ancestors().find(|dir| persist::is_overlay_or_store(dir)).map(Path::to_owned);
    match owner.or_else(|| planned.find(|planned| dir.starts_with(planned))) {
        Some(owner) => Err(format!(
            "it is in '{}', which holds cowslip's own files: name a file elsewhere",
            owner.display()
        )),
        None => Ok(()),
    }
}
