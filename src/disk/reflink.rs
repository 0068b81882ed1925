//! Disks with a reflink overlay: creates or opens the overlay.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::bottom::{Bottom, check_base};
use super::open::{
    OpenContext, OpenError, OpenedDisk, READ_ONLY_NOTE, adopt_owner, new_disk, new_stack,
    notes_on_overlay, overlay_error,
};
use super::{Disk, DiskOwner, LayerStack, OverlayLocation, Times, Top, mtime_of};
use crate::config::{DiskMode, DiskSpec, Format, OverlayKind, format_size};
use crate::layer::Layer;
use crate::overlay::recover::Recovered;
use crate::overlay::reflink::{self, OpenedReflink, Reflink, ReflinkError, SharedBase};
use crate::overlay::{DEFAULT_BLOCK_SIZE, MAX_DISK_SIZE};

/// Whether `spec` asks for a reflink overlay, or `dir` contains one.
///
/// # Errors
/// [`OpenError`] when `dir` contains something else than an overlay.
pub(super) fn uses_reflink(spec: &DiskSpec, dir: &Path) -> Result<bool, OpenError> {
    if spec.overlay_kind == OverlayKind::Reflink {
        return Ok(true);
    }
    let there = reflink::overlay_kind(dir).map_err(overlay_error(dir))?;
    Ok(there == Some(OverlayKind::Reflink))
}

/// Opens the reflink overlay at `dir`, or creates one.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub(super) fn open(
    spec: &DiskSpec,
    dir: &Path,
    (bottom, base): (Bottom, Arc<dyn Layer>),
    owner: DiskOwner,
    setting: &OpenContext<'_>,
    mut notes: Vec<String>,
) -> Result<OpenedDisk, OpenError> {
    let (persistent, recovered) = match reflink::overlay_kind(dir).map_err(overlay_error(dir))? {
        None => (create(spec, dir, &bottom, owner)?, Recovered::New),
        Some(_) => (open_existing(spec, dir, &bottom, setting)?, Recovered::Clean),
    };
    let OpenedReflink { layer, dir: home, finished } = persistent;
    notes.extend(finished.map(|of| format!("the interrupted {of} is finished")));
    notes.extend(notes_on_overlay(dir, setting));
    let summary = format!(
        "{}, reflink overlay '{}' ({} changed)",
        format_size(layer.size()),
        dir.display(),
        format_size(layer.estimate_changed().unwrap_or(0))
    );
    let stack = &home.stack;
    let owner = DiskOwner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let written = layer.data().metadata().ok();
    let is_read_only = layer.is_read_only();
    let layer = Arc::new(layer);
    // The base is never read: the layer above answers every request. The base stays open for its
    // locks.
    let layers = LayerStack::new(Top::Reflink(layer), None, Some(base));
    let mut disk = new_disk(spec, stack.uuid, layers, bottom, owner);
    if let Some(found) = written {
        disk.times = Times::new(mtime_of(&found), false, None);
    }
    if is_read_only {
        disk.mode = DiskMode::ReadOnly;
        notes.push(READ_ONLY_NOTE.to_owned());
    }
    disk.recovered = recovered;
    disk.overlay_location = Mutex::new(OverlayLocation::Persistent(home));
    disk.overlay_dir = Mutex::new(Some(super::overlay_dir::OverlayDirId::at(dir)));
    Ok(OpenedDisk { disk, summary, notes })
}

/// Adds the overlay's directory to an error.
fn reflink_error(dir: &Path) -> impl Fn(ReflinkError) -> OpenError {
    move |error| match error {
        ReflinkError::Stack(error) => overlay_error(dir)(error),
        error => OpenError::Mismatch { dir: dir.to_owned(), why: error.to_string() },
    }
}

/// Returns the base as a source of shared blocks; refuses a base without blocks to share.
fn reflink_source(bottom: &Bottom) -> Result<SharedBase<'_>, ReflinkError> {
    match bottom {
        Bottom::File { format, .. } if *format != Format::Raw => {
            Err(ReflinkError::Base("a qcow2 image"))
        }
        Bottom::File { view: Some(_), .. } => Err(ReflinkError::Base("a part of one")),
        Bottom::File { path, file, .. } if file.metadata().is_ok_and(|found| found.is_file()) => {
            Ok(SharedBase { path, file })
        }
        Bottom::File { .. } => Err(ReflinkError::Base("a block device")),
        Bottom::Blank(_) => Err(ReflinkError::Base("blank")),
    }
}

fn create(
    spec: &DiskSpec,
    dir: &Path,
    bottom: &Bottom,
    owner: DiskOwner,
) -> Result<OpenedReflink, OpenError> {
    let base = reflink_source(bottom).map_err(reflink_error(dir))?;
    let mut stack = new_stack(Uuid::new_v4(), bottom, owner, DEFAULT_BLOCK_SIZE)?;
    stack.kind = OverlayKind::Reflink;
    stack.layers.clear();
    let size = spec.size.map(|size| size.min(MAX_DISK_SIZE));
    reflink::create(dir, stack, &base, size).map_err(reflink_error(dir))
}

fn open_existing(
    spec: &DiskSpec,
    dir: &Path,
    bottom: &Bottom,
    setting: &OpenContext<'_>,
) -> Result<OpenedReflink, OpenError> {
    let found = reflink::lock_overlay(dir).map_err(reflink_error(dir))?;
    check_base(dir, &found.stack().base, bottom, setting)?;
    check_keys(spec, dir)?;
    let base = reflink_source(bottom).map_err(reflink_error(dir))?;
    let mut there = found.open(base.file).map_err(reflink_error(dir))?;
    check_size(spec, dir, there.layer.size())?;
    adopt_owner(spec, &mut there.dir).map_err(overlay_error(dir))?;
    Ok(there)
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

fn check_size(spec: &DiskSpec, dir: &Path, size: u64) -> Result<(), OpenError> {
    let Some(wanted) = spec.size.filter(|wanted| *wanted != size) else {
        return Ok(());
    };
    let (has, wanted) = (format_size(size), format_size(wanted));
    let why = format!(
        "presents {has}, not {wanted}: leave out size= and use truncate on the mounted file"
    );
    Err(OpenError::Mismatch { dir: dir.to_owned(), why })
}

impl Disk {
    /// The reflink overlay, if the disk has one.
    #[must_use]
    pub fn reflink(&self) -> Option<Arc<Reflink>> {
        match &self.layers().top {
            Top::Reflink(reflink) => Some(Arc::clone(reflink)),
            Top::Overlay(_) | Top::Base(_) | Top::Nothing => None,
        }
    }
}
