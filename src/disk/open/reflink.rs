//! Disks with a reflink overlay: creates or opens the overlay.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::base_match::check_base;
use super::context::OpenContext;
use super::error::OpenError;
use super::notes::{READ_ONLY_NOTE, notes_on_overlay};
use super::opened::{OpenedBase, OpenedDisk};
use super::owner::adopt_owner;
use super::persistent::{new_stack, size_mismatch};
use crate::base::formats::BaseFormat;
use crate::config::{DirectIo, DiskMode, DiskSpec, OverlayKind, format_size};
use crate::disk::Disk;
use crate::disk::attrs::{DiskOwner, Times, mtime_of};
use crate::disk::base_description::BaseDescription;
use crate::disk::layers::{LayerStack, Top};
use crate::disk::overlay_location::OverlayLocation;
use crate::layer::Layer;
use crate::overlay::recover::Recovered;
use crate::overlay::reflink::{self, OpenedReflink, ReflinkError, SharedBase};
use crate::overlay::{DEFAULT_BLOCK_SIZE, MAX_DISK_SIZE};

/// Whether `spec` asks for a reflink overlay, or `dir` contains one.
///
/// # Errors
/// [`OpenError`] when `dir` contains something else than an overlay.
pub(super) fn uses_reflink(spec: &DiskSpec, dir: &Path) -> Result<bool, OpenError> {
    if spec.overlay_kind == OverlayKind::Reflink {
        return Ok(true);
    }
    let found = reflink::overlay_kind(dir).map_err(OpenError::overlay(dir))?;
    Ok(found == Some(OverlayKind::Reflink))
}

/// Opens the reflink overlay at `dir`, or creates one.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub(super) fn open(
    spec: &DiskSpec,
    dir: &Path,
    base: OpenedBase,
    context: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    if spec.direct == DirectIo::On {
        let why =
            "is a reflink copy, whose bytes the kernel reads and writes itself: leave out direct";
        return Err(OpenError::Mismatch { dir: dir.to_owned(), why: why.to_owned() });
    }
    let OpenedBase { layer: base, description, owner, .. } = base;
    let kind = reflink::overlay_kind(dir).map_err(OpenError::overlay(dir))?;
    let (opened, recovered) = match kind {
        None => (create(spec, dir, &description, owner)?, Recovered::New),
        Some(_) => (open_existing(spec, dir, &description, context)?, Recovered::Clean),
    };
    let OpenedReflink { layer, dir: overlay_dir, finished } = opened;
    let mut notes = Vec::from_iter(finished.map(|of| format!("the interrupted {of} is finished")));
    notes.extend(notes_on_overlay(dir, context));
    let summary = format!(
        "{}, reflink overlay '{}' ({} changed)",
        format_size(layer.size()),
        dir.display(),
        format_size(layer.estimate_changed().unwrap_or(0))
    );
    let stack = &overlay_dir.stack;
    let owner = DiskOwner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let written = layer.data().metadata().ok();
    let is_read_only = layer.is_read_only();
    let layer = Arc::new(layer);
    // The base is never read: the layer above answers every request. The base stays open for its
    // locks.
    let layers = LayerStack::new(Top::Reflink(layer), Vec::new(), Some(base));
    let mut disk = Disk::new(spec, stack.uuid, layers, description, owner);
    if let Some(found) = written {
        disk.attrs.times = Times::new(mtime_of(&found), false, None);
    }
    if is_read_only {
        disk.mode = DiskMode::ReadOnly;
        notes.push(READ_ONLY_NOTE.to_owned());
    }
    disk.recovered = recovered;
    disk.overlay_location = OverlayLocation::persistent(overlay_dir, dir);
    Ok(OpenedDisk { disk, summary, notes })
}

/// Adds the overlay's directory to an error.
fn reflink_error(dir: &Path) -> impl Fn(ReflinkError) -> OpenError {
    move |error| match error {
        ReflinkError::Overlay(error) => OpenError::overlay(dir)(error),
        error => OpenError::Mismatch { dir: dir.to_owned(), why: error.to_string() },
    }
}

/// Returns the base as a source of shared blocks; refuses a base without blocks to share.
fn reflink_source(description: &BaseDescription) -> Result<SharedBase<'_>, ReflinkError> {
    match description {
        BaseDescription::File { format, .. } if !BaseFormat::of(*format).is_plain() => {
            Err(ReflinkError::Base(format!("a {format} image")))
        }
        BaseDescription::File { view: Some(_), .. } => {
            Err(ReflinkError::Base("a part of one".to_owned()))
        }
        BaseDescription::File { path, file, .. }
            if file.metadata().is_ok_and(|found| found.is_file()) =>
        {
            Ok(SharedBase { path, file })
        }
        BaseDescription::File { .. } => Err(ReflinkError::Base("a block device".to_owned())),
        BaseDescription::Remote { .. } => Err(ReflinkError::Base("on a server".to_owned())),
        BaseDescription::Blank(_) => Err(ReflinkError::Base("blank".to_owned())),
    }
}

fn create(
    spec: &DiskSpec,
    dir: &Path,
    description: &BaseDescription,
    owner: DiskOwner,
) -> Result<OpenedReflink, OpenError> {
    let base = reflink_source(description).map_err(reflink_error(dir))?;
    let mut stack = new_stack(Uuid::new_v4(), description, owner, DEFAULT_BLOCK_SIZE)?;
    stack.kind = OverlayKind::Reflink;
    stack.layers.clear();
    let size = spec.size.map(|size| size.min(MAX_DISK_SIZE));
    reflink::create(dir, stack, &base, size).map_err(reflink_error(dir))
}

fn open_existing(
    spec: &DiskSpec,
    dir: &Path,
    description: &BaseDescription,
    context: &OpenContext<'_>,
) -> Result<OpenedReflink, OpenError> {
    let found = reflink::lock_overlay(dir).map_err(reflink_error(dir))?;
    check_base(dir, &found.stack().base, description, context)?;
    check_keys(spec, dir)?;
    let base = reflink_source(description).map_err(reflink_error(dir))?;
    let mut opened = found.open(base.file).map_err(reflink_error(dir))?;
    if let Some(why) = size_mismatch(spec, opened.layer.size()) {
        return Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    }
    adopt_owner(spec, &mut opened.dir).map_err(OpenError::overlay(dir))?;
    Ok(opened)
}

/// Refuses keys that make no sense without a block map.
fn check_keys(spec: &DiskSpec, dir: &Path) -> Result<(), OpenError> {
    let key = match (spec.block, spec.limit) {
        (Some(_), _) => "block=",
        (_, Some(_)) => "limit=",
        _ => return Ok(()),
    };
    let why = format!("is a reflink overlay, which has no block map: leave out {key}");
    Err(OpenError::Mismatch { dir: dir.to_owned(), why })
}
