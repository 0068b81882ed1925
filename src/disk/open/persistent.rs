//! Disks over a persistent overlay: creates a new one, or checks and opens an existing one.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::base_match::{BaseMismatch, check_base, find_mismatch};
use super::context::OpenContext;
use super::error::OpenError;
use super::notes::READ_ONLY_NOTE;
use super::opened::{OpenedBase, OpenedDisk};
use super::owner::adopt_owner;
use crate::config::{DiskMode, DiskSpec, OverlayKind, format_size};
use crate::disk::Disk;
use crate::disk::attrs::{DiskOwner, Times, coarse_now, mtime_of};
use crate::disk::base_description::BaseDescription;
use crate::disk::history::{History, ResetSizes};
use crate::disk::layers::{LayerStack, Top};
use crate::disk::overlay_location::OverlayLocation;
use crate::layer::Layer;
use crate::overlay::FORMAT_VERSION;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::{self, LockedOverlay, NewOverlay, OpenedOverlay, OverlayPath};
use crate::overlay::record::{LayerMap, MtimeOrigin, Nanos};
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{LayerRecord, Stack};
use crate::overlay::{DEFAULT_BLOCK_SIZE, MAX_DISK_SIZE, Overlay};

/// Returns the stack of a new overlay with one layer over the base of `description`.
pub(in crate::disk) fn new_stack(
    uuid: Uuid,
    description: &BaseDescription,
    owner: DiskOwner,
    block: u32,
) -> Result<Stack, OpenError> {
    Ok(Stack {
        version: FORMAT_VERSION,
        uuid,
        uid: owner.uid,
        gid: owner.gid,
        perm: owner.perm,
        kind: OverlayKind::Blocks,
        base: description.to_record()?,
        layers: vec![LayerRecord { uuid: Uuid::new_v4(), block, parent: None }],
        snapshots: Vec::new(),
    })
}

/// The uuid of a new disk whose overlay is at `overlay`: in a store, the name of the directory.
pub(super) fn uuid_for(overlay: OverlayPath<'_>) -> Uuid {
    let name = overlay.layers.and_then(|_| overlay.dir.file_name()?.to_str());
    name.and_then(|name| Uuid::parse_str(name).ok()).unwrap_or_else(Uuid::new_v4)
}

/// Opens the overlay at `overlay`, which must fit the base, or creates one.
pub(super) fn open_persistent(
    spec: &DiskSpec,
    overlay: OverlayPath<'_>,
    base: &OpenedBase,
    context: &OpenContext<'_>,
    layer_cache: &LayerCache,
) -> Result<OpenedOverlay, OpenError> {
    let (dir, description) = (overlay.dir, &base.description);
    if !persist::exists(dir).map_err(OpenError::overlay(dir))? {
        let size = spec.size.unwrap_or(base.size).min(MAX_DISK_SIZE);
        let block = spec.block.unwrap_or(DEFAULT_BLOCK_SIZE);
        let stack = new_stack(uuid_for(overlay), description, base.owner, block)?;
        let map = &LayerMap::new(size, size.min(base.size));
        let new = NewOverlay { stack, map, limit: spec.limit };
        return persist::create(overlay, new).map_err(OpenError::overlay(dir));
    }
    let found = persist::lock_overlay(overlay).map_err(OpenError::overlay(dir))?;
    if let Some(why) = block_mismatch(spec, &found) {
        return Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    }
    // During an interrupted commit the recorded base has neither its old nor its new contents: the
    // commit has to be finished first.
    let is_changed =
        matches!(find_mismatch(&found.stack.base, description)?, Some(BaseMismatch::Changed(_)));
    // Looked at only where it matters: it costs the samples of the base, and a walk over the log.
    let is_committing = (is_changed || description.remote().is_some())
        && description.is_recorded_file(&found.stack.base)?
        && found.is_committing().map_err(OpenError::overlay(dir))?;
    if is_committing && let Some(remote) = description.remote() {
        remote.expect_changes();
    }
    if !is_changed || !is_committing {
        check_base(dir, &found.stack.base, description, context)?;
    }
    if overlay.layers.is_none() {
        found.remove_all_unused();
    }
    found.open(spec.limit, layer_cache).map_err(OpenError::overlay(dir))
}

/// Checks the size of the overlay in `dir` against `spec`, and records the owner that `spec` sets.
/// After an error the caller has to close the overlay.
pub(super) fn apply_spec(
    spec: &DiskSpec,
    dir: &Path,
    opened: &mut OpenedOverlay,
) -> Result<(), OpenError> {
    if opened.recovered != Recovered::New
        && let Some(why) = size_mismatch(spec, opened.overlay.size())
    {
        return Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    }
    adopt_owner(spec, &mut opened.dir).map_err(OpenError::overlay(dir))
}

/// Returns why an existing overlay of a disk of `size` bytes does not fit the size in `spec`.
pub(super) fn size_mismatch(spec: &DiskSpec, size: u64) -> Option<String> {
    let wanted = spec.size.filter(|wanted| *wanted != size)?;
    let (size, wanted) = (format_size(size), format_size(wanted));
    Some(format!(
        "presents {size}, not {wanted}: leave out size= and use truncate on the mounted file"
    ))
}

fn block_mismatch(spec: &DiskSpec, found: &LockedOverlay) -> Option<String> {
    let wanted = spec.block.filter(|wanted| *wanted != found.block_size())?;
    let (has, wanted) = (format_size(found.block_size().into()), format_size(wanted.into()));
    Some(format!("has blocks of {has}, not {wanted}: leave out block=, it is fixed at creation"))
}

/// Returns the note about how the overlay was recovered.
fn recovery_note(recovered: Recovered) -> Option<String> {
    match recovered {
        Recovered::New | Recovered::Clean => None,
        Recovered::All => Some("recovered: the daemon had died, nothing is lost".to_owned()),
        Recovered::Damaged => Some(
            "recovered: the daemon had died, and the last record of a log is damaged: what it said is lost"
                .to_owned(),
        ),
        Recovered::Vouched { lost: 0 } => {
            Some("recovered as after a power cut: all that was synced is there".to_owned())
        }
        Recovered::Vouched { lost } => Some(format!(
            "recovered as after a power cut: the disk is as it was at its last sync ({lost} later changes of its map are gone)"
        )),
    }
}

/// Makes a disk of an opened overlay, with the attributes that the overlay records.
pub(super) fn assemble_persistent(
    spec: &DiskSpec,
    opened: OpenedOverlay,
    base: &Arc<dyn Layer>,
    description: BaseDescription,
    dir: &Path,
    mut notes: Vec<String>,
) -> OpenedDisk {
    let OpenedOverlay { overlay, below, snapshot_layers, recovered, dir: overlay_dir } = opened;
    let stack = &overlay_dir.stack;
    let owner = DiskOwner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let (mtime, chosen) = last_mtime(&overlay, recovered);
    let recorded = overlay.mtime().map(|(mtime, _)| mtime);
    let summary = summarize(&overlay, &below, dir);
    notes.extend(recovery_note(recovered));
    let is_read_only = overlay.is_read_only();
    if is_read_only {
        notes.push(READ_ONLY_NOTE.to_owned());
    }
    let chain = stack.tree().top_chain();
    let uuid = stack.uuid;
    // A sync of the top is a sync of every layer below it, and of every snapshot.
    let snapshots = snapshot_layers.iter().map(|(_, layer)| layer);
    overlay.set_lower_layers(&below.iter().chain(snapshots).cloned().collect::<Vec<_>>());
    let top = Top::Overlay(Arc::new(overlay));
    let layers = LayerStack::new(top, below.clone(), Some(Arc::clone(base)));
    if layers.top.is_committing() {
        notes.push(
            "a commit into the base was cut short: reads are right, 'cowslip commit' finishes it"
                .to_owned(),
        );
    }
    let size = spec.size.unwrap_or(base.size());
    let mut disk = Disk::new(spec, uuid, layers, description, owner);
    disk.history =
        History::new(ResetSizes { size, lower_limit: size.min(base.size()) }, spec.limit);
    disk.history.locking = Some(spec.locking);
    disk.history.set_sealed(&chain, &below, snapshot_layers);
    disk.attrs.times = Times::new(mtime, chosen, recorded);
    disk.recovered = recovered;
    if is_read_only {
        disk.mode = DiskMode::ReadOnly;
    }
    disk.overlay_location = OverlayLocation::persistent(overlay_dir, dir);
    OpenedDisk { disk, summary, notes }
}

/// Summarizes a disk with the overlay in `dir`. The figure of changed bytes is exact for one layer;
/// for several it is an upper bound, since the exact figure takes longer.
fn summarize(overlay: &Overlay, below: &[Arc<Overlay>], dir: &Path) -> String {
    let sealed: u64 = below.iter().map(|layer| layer.usage().data).sum();
    format!(
        "{}, overlay '{}' ({} changed)",
        format_size(overlay.size()),
        dir.display(),
        format_size(overlay.usage().data + sealed)
    )
}

/// Returns the modification time to continue with, and whether a user set it. After a crash the
/// data file may know of a later write than the log.
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
