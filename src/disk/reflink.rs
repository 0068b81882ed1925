//! Disks over a reflink overlay: opening one.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::bottom::{Bottom, check_base};
use super::open::{
    OpenError, Opened, READ_ONLY, Setting, adopt_owner, assemble, in_overlay, new_stack,
    notes_on_overlay,
};
use super::{Disk, Home, Layers, Owner, Times, Top, mtime_of};
use crate::layer::Layer;
use crate::overlay::recover::Recovered;
use crate::overlay::reflink::{self, Persistent, Reflink, ReflinkError, Source};
use crate::overlay::{DEFAULT_BLOCK, LARGEST};
use crate::spec::{DiskSpec, Format, Mode, OverlayKind, format_size};

/// Whether `spec` asks for a reflink overlay, or `dir` holds one.
///
/// # Errors
/// What is in `dir` is no overlay.
pub(super) fn is_meant(spec: &DiskSpec, dir: &Path) -> Result<bool, OpenError> {
    if spec.overlay_kind == OverlayKind::Reflink {
        return Ok(true);
    }
    let there = reflink::kind_of(dir).map_err(in_overlay(dir))?;
    Ok(there == Some(OverlayKind::Reflink))
}

/// Opens the reflink overlay at `dir`, making it when there is none.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub(super) fn open(
    spec: &DiskSpec,
    dir: &Path,
    (bottom, base): (Bottom, Arc<dyn Layer>),
    owner: Owner,
    setting: &Setting<'_>,
    mut notes: Vec<String>,
) -> Result<Opened, OpenError> {
    let (persistent, recovered) = match reflink::kind_of(dir).map_err(in_overlay(dir))? {
        None => (create(spec, dir, &bottom, owner)?, Recovered::New),
        Some(_) => (open_existing(spec, dir, &bottom, setting)?, Recovered::Clean),
    };
    let Persistent { layer, home, finished } = persistent;
    notes.extend(finished.map(|of| format!("the interrupted {of} is finished")));
    notes.extend(notes_on_overlay(dir, setting));
    let summary = format!(
        "{}, reflink overlay '{}' ({} changed)",
        format_size(layer.size()),
        dir.display(),
        format_size(layer.changed_about().unwrap_or(0))
    );
    let stack = &home.stack;
    let owner = Owner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let written = layer.data().metadata().ok();
    let is_read_only = layer.is_read_only();
    let layer = Arc::new(layer);
    // The base is never asked: the layer above has an answer for all. Its locks are kept with it.
    let layers = Layers::new(Top::Reflink(layer), None, Some(base));
    let mut disk = assemble(spec, stack.uuid, layers, bottom, owner);
    if let Some(found) = written {
        disk.times = Times::new(mtime_of(&found), false, None);
    }
    if is_read_only {
        disk.mode = Mode::ReadOnly;
        notes.push(READ_ONLY.to_owned());
    }
    disk.recovered = recovered;
    disk.home = Mutex::new(Home::Kept(home));
    disk.overlay_dir = Mutex::new(Some(super::residing::Residing::at(dir)));
    Ok(Opened { disk, summary, notes })
}

/// Names the overlay that said no.
fn refused(dir: &Path) -> impl Fn(ReflinkError) -> OpenError {
    move |error| match error {
        ReflinkError::Stack(error) => in_overlay(dir)(error),
        error => OpenError::Mismatch { dir: dir.to_owned(), why: error.to_string() },
    }
}

/// The base as what is shared; refused when it has no blocks that could be.
fn source_of(bottom: &Bottom) -> Result<Source<'_>, ReflinkError> {
    match bottom {
        Bottom::File { format, .. } if *format != Format::Raw => {
            Err(ReflinkError::Base("a qcow2 image"))
        }
        Bottom::File { view: Some(_), .. } => Err(ReflinkError::Base("a part of one")),
        Bottom::File { path, file, .. } if file.metadata().is_ok_and(|found| found.is_file()) => {
            Ok(Source { path, file })
        }
        Bottom::File { .. } => Err(ReflinkError::Base("a block device")),
        Bottom::Blank(_) => Err(ReflinkError::Base("blank")),
    }
}

fn create(
    spec: &DiskSpec,
    dir: &Path,
    bottom: &Bottom,
    owner: Owner,
) -> Result<Persistent, OpenError> {
    let base = source_of(bottom).map_err(refused(dir))?;
    let mut stack = new_stack(Uuid::new_v4(), bottom, owner, DEFAULT_BLOCK)?;
    stack.kind = OverlayKind::Reflink;
    stack.layers.clear();
    let size = spec.size.map(|size| size.min(LARGEST));
    reflink::create(dir, stack, &base, size).map_err(refused(dir))
}

fn open_existing(
    spec: &DiskSpec,
    dir: &Path,
    bottom: &Bottom,
    setting: &Setting<'_>,
) -> Result<Persistent, OpenError> {
    let found = reflink::find(dir).map_err(refused(dir))?;
    check_base(dir, &found.stack().base, bottom, setting)?;
    check_fixed(spec, dir)?;
    let base = source_of(bottom).map_err(refused(dir))?;
    let mut there = found.open(base.file).map_err(refused(dir))?;
    check_size(spec, dir, there.layer.size())?;
    adopt_owner(spec, &mut there.home).map_err(in_overlay(dir))?;
    Ok(there)
}

/// Refuses keys that an overlay without a block map has no use for.
fn check_fixed(spec: &DiskSpec, dir: &Path) -> Result<(), OpenError> {
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
    /// The reflink overlay, when the disk has one.
    #[must_use]
    pub fn reflink(&self) -> Option<Arc<Reflink>> {
        match &self.layers().top {
            Top::Reflink(reflink) => Some(Arc::clone(reflink)),
            Top::Overlay(_) | Top::Base(_) | Top::Nothing => None,
        }
    }
}
