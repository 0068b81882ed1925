//! Disks over a persistent overlay: the new one is made, the old one must fit its base.

use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use uuid::Uuid;

use super::error::OpenError;
use super::{OpenContext, OpenedDisk, new_disk, overlay_layers};
use crate::base::Base;
use crate::config::{DiskMode, DiskSpec, OverlayKind, format_size};
use crate::disk::bottom::{BaseMismatch, Bottom, check_base, find_mismatch};
use crate::disk::history::History;
use crate::disk::{DiskOwner, OverlayLocation, Times, Top, coarse_now, mtime_of};
use crate::layer::Layer;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::{
    self, LockedOverlay, NewOverlay, OpenedOverlay, OverlayDir, OverlayPath,
};
use crate::overlay::record::{LayerMap, MtimeOrigin, Nanos};
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{LayerRecord, Stack, StackError, VERSION};
use crate::overlay::{DEFAULT_BLOCK_SIZE, MAX_DISK_SIZE, Overlay};

/// What is to be said of a disk whose overlay takes no changes.
pub(in crate::disk) const READ_ONLY_NOTE: &str =
    "its overlay is on a read-only file system: the disk can only be read";

/// A new stack of one layer over `bottom`.
pub(in crate::disk) fn new_stack(
    uuid: Uuid,
    bottom: &Bottom,
    owner: DiskOwner,
    block: u32,
) -> Result<Stack, OpenError> {
    Ok(Stack {
        version: VERSION,
        uuid,
        uid: owner.uid,
        gid: owner.gid,
        perm: owner.perm,
        kind: OverlayKind::Blocks,
        base: bottom.to_record()?,
        layers: vec![LayerRecord { uuid: Uuid::new_v4(), block, parent: None }],
        snapshots: Vec::new(),
    })
}

/// The uuid for a new disk at `place`: in a store its directory is called so.
pub(super) fn uuid_for(place: OverlayPath<'_>) -> Uuid {
    let name = place.layers.and_then(|_| place.dir.file_name()?.to_str());
    name.and_then(|name| Uuid::parse_str(name).ok()).unwrap_or_else(Uuid::new_v4)
}

pub(in crate::disk) fn overlay_error(dir: &Path) -> impl FnOnce(StackError) -> OpenError {
    let dir = dir.to_owned();
    move |error| OpenError::Overlay { dir, error }
}

pub(super) fn open_persistent(
    spec: &DiskSpec,
    place: OverlayPath<'_>,
    base: &Base,
    bottom: &Bottom,
    owner: DiskOwner,
    setting: &OpenContext<'_>,
    shelf: &LayerCache,
) -> Result<OpenedOverlay, OpenError> {
    let dir = place.dir;
    if !persist::exists(dir).map_err(overlay_error(dir))? {
        let size = spec.size.unwrap_or(base.size).min(MAX_DISK_SIZE);
        let stack =
            new_stack(uuid_for(place), bottom, owner, spec.block.unwrap_or(DEFAULT_BLOCK_SIZE))?;
        let image = &LayerMap::new(size, size.min(base.size));
        let new = NewOverlay { stack, map: image, limit: spec.limit };
        return persist::create(place, new).map_err(overlay_error(dir));
    }
    let found = persist::lock_overlay(place).map_err(overlay_error(dir))?;
    let mismatch = |why| Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    if let Some(why) = block_mismatch(spec, &found) {
        return mismatch(why);
    }
    // What it was is no more and what it will be not yet: the commit has to be finished.
    let is_changed =
        matches!(find_mismatch(&found.stack.base, bottom)?, Some(BaseMismatch::Changed(_)));
    if !is_changed
        || !bottom.is_recorded_file(&found.stack.base)?
        || !found.is_committing().map_err(overlay_error(dir))?
    {
        check_base(dir, &found.stack.base, bottom, setting)?;
    }
    if place.layers.is_none() {
        found.remove_all_unused();
    }
    found.open(spec.limit, shelf).map_err(overlay_error(dir))
}

/// Applies `spec` to the overlay, which lies at `dir` and is open: whoever gets an error has to close it.
pub(super) fn apply_spec(
    spec: &DiskSpec,
    dir: &Path,
    persistent: &mut OpenedOverlay,
) -> Result<(), OpenError> {
    let size = persistent.overlay.size();
    if let Some(wanted) = spec.size.filter(|wanted| *wanted != size)
        && persistent.recovered != Recovered::New
    {
        let (has, wanted) = (format_size(size), format_size(wanted));
        let why = format!(
            "presents {has}, not {wanted}: leave out size= and use truncate on the mounted file"
        );
        return Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    }
    adopt_owner(spec, &mut persistent.dir).map_err(overlay_error(dir))
}

/// What the spec says of the owner overrules what was kept, and is kept from now on.
pub(in crate::disk) fn adopt_owner(
    spec: &DiskSpec,
    home: &mut OverlayDir,
) -> Result<(), StackError> {
    let mut stack = home.stack.clone();
    stack.uid = spec.uid.unwrap_or(stack.uid);
    stack.gid = spec.gid.unwrap_or(stack.gid);
    stack.perm = spec.perm.unwrap_or(stack.perm);
    if stack == home.stack { Ok(()) } else { home.replace_stack(stack) }
}

fn block_mismatch(spec: &DiskSpec, found: &LockedOverlay) -> Option<String> {
    let wanted = spec.block.filter(|wanted| *wanted != found.block_size())?;
    let (has, wanted) = (format_size(found.block_size().into()), format_size(wanted.into()));
    Some(format!("has blocks of {has}, not {wanted}: leave out block=, it is fixed at creation"))
}

/// A disk over a persistent overlay, with the attributes that the overlay kept.
pub(super) fn assemble_persistent(
    spec: &DiskSpec,
    persistent: OpenedOverlay,
    base: &Arc<dyn Layer>,
    bottom: Bottom,
    dir: &Path,
    mut notes: Vec<String>,
) -> OpenedDisk {
    let OpenedOverlay { overlay, below, snapshot_layers: aside, recovered, dir: home } = persistent;
    let stack = &home.stack;
    let owner = DiskOwner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let (mtime, chosen) = last_mtime(&overlay, recovered);
    let recorded = overlay.mtime().map(|(mtime, _)| mtime);
    // Exact for one layer; of several the most it can be, for finding out more takes time.
    let sealed: u64 = below.iter().map(|layer| layer.usage().data).sum();
    let changed = overlay.usage().data + sealed;
    let summary = format!(
        "{}, overlay '{}' ({} changed)",
        format_size(overlay.size()),
        dir.display(),
        format_size(changed)
    );
    match recovered {
        Recovered::New | Recovered::Clean => {}
        Recovered::All => notes.push("recovered: the daemon had died, nothing is lost".to_owned()),
        Recovered::Vouched { lost: 0 } => notes
            .push("recovered as after a power cut: all that was synced is there".to_owned()),
        Recovered::Vouched { lost } => notes.push(format!(
            "recovered as after a power cut: the disk is as it was at its last sync ({lost} later changes of its map are gone)"
        )),
    }
    let is_read_only = overlay.is_read_only();
    if is_read_only {
        notes.push(READ_ONLY_NOTE.to_owned());
    }
    let chain = stack.tree().live();
    let uuid = stack.uuid;
    let layers = overlay_layers(overlay, below.clone(), base);
    if let Top::Overlay(top) = &layers.top {
        let aside = aside.iter().map(|(_, layer)| Arc::clone(layer));
        top.set_lower_layers(&below.iter().cloned().chain(aside).collect::<Vec<_>>());
    }
    let size = spec.size.unwrap_or(base.size());
    if layers.top.is_committing() {
        notes.push(
            "a commit into the base was cut short: reads are right, 'cowslip commit' finishes it"
                .to_owned(),
        );
    }
    let mut disk = new_disk(spec, uuid, layers, bottom, owner);
    disk.history = History::new((size, size.min(base.size())), spec.limit);
    disk.history.locking = Some(spec.locking);
    disk.history.set_sealed(&chain, &below, aside);
    disk.times = Times::new(mtime, chosen, recorded);
    disk.recovered = recovered;
    if is_read_only {
        disk.mode = DiskMode::ReadOnly;
    }
    disk.overlay_location = Mutex::new(OverlayLocation::Persistent(home));
    disk.overlay_dir = Mutex::new(Some(super::super::overlay_dir::OverlayDirId::at(dir)));
    OpenedDisk { disk, summary, notes }
}

/// The modification time to go on with. After a crash the data file may know a later write than
/// the log does.
fn last_mtime(overlay: &Overlay, recovered: Recovered) -> (Nanos, bool) {
    let Some((mtime, stamp)) = overlay.mtime() else {
        return (coarse_now(), false);
    };
    let data = overlay.data_file().and_then(|file| file.metadata().ok());
    match (stamp, recovered, data) {
        (MtimeOrigin::SetByUser, ..) => (mtime, true),
        (MtimeOrigin::Written, Recovered::All, Some(found)) => (mtime.max(mtime_of(&found)), false),
        (MtimeOrigin::Written, ..) => (mtime, false),
    }
}
