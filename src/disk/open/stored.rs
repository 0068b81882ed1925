//! Disks of a store, whose `stack` names the base: opened, created and cloned.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::context::OpenContext;
use super::error::OpenError;
use super::layered::{complete, open_layers};
use super::opened::OpenedDisk;
use super::persistent::{assemble_persistent, new_stack, uuid_for};
use crate::base::{self, Base, BaseAccess, BaseError, BaseOptions};
use crate::config::{DiskSource, DiskSpec, RemoteAddress, RemoteSpec};
use crate::disk::Disk;
use crate::disk::attrs::DiskOwner;
use crate::disk::base_description::BaseDescription;
use crate::disk::history::FrozenLayer;
use crate::disk::operation_error::OperationError;
use crate::host::mountinfo;
use crate::layer::Layer;
use crate::overlay::DEFAULT_BLOCK_SIZE;
use crate::overlay::error::OverlayError;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::{self, NewOverlay, OpenedOverlay, OverlayPath};
use crate::overlay::record::LayerMap;
use crate::overlay::stack::{BaseRecord, Stack};
use crate::overlay::tree::LayerTree;

/// The reason why a store has no disk over `nbd+exec:`.
pub(in crate::disk) const COMMAND_IN_STORE: &str =
    "a command as its base would be started by every mount of the store: give it overlay=DIR";

/// Returns the spec of a disk over the recorded `base`, with every other key at its default.
///
/// # Errors
/// [`OverlayError::Syntax`] for an unknown format, [`OverlayError::Command`] for a base that a command
/// serves.
pub fn spec_over(name: &str, base: &BaseRecord) -> Result<DiskSpec, OverlayError> {
    let over = |source, format: &String| {
        let known = format.parse();
        let known =
            known.map_err(|_| OverlayError::Syntax(format!("a base of format {format}")))?;
        let mut spec = DiskSpec::new(name.to_owned(), source);
        spec.format = Some(known);
        spec.part = base.part();
        Ok::<_, OverlayError>(spec)
    };
    Ok(match base {
        BaseRecord::Blank { size } => DiskSpec::new(name.to_owned(), DiskSource::Blank(*size)),
        BaseRecord::File { path, format, .. } => over(DiskSource::File(path.clone()), format)?,
        BaseRecord::Remote { address, format, .. } => {
            let address = RemoteAddress::parse(address)
                .map_err(|error| OverlayError::Syntax(error.to_string()))?;
            if address.is_command() {
                return Err(OverlayError::Command);
            }
            over(DiskSource::Remote(Box::new(RemoteSpec::new(address))), format)?
        }
    })
}

/// Refuses a base that an overlay has recorded, and that nobody names, where another user's FUSE mount has
/// its path by now.
///
/// # Errors
/// [`OpenError::Refused`].
pub fn check_recorded_base(spec: &DiskSpec) -> Result<(), OpenError> {
    let DiskSource::File(path) = &spec.source else { return Ok(()) };
    mountinfo::check_recorded(path).map_err(|error| {
        OpenError::Refused(format!(
            "its base '{}' cannot be opened: {error}: put it back, or use cowslip rebase",
            path.display()
        ))
    })
}

/// Opens the disk `name` of a store, taking from `layer_cache` the layers that are open already.
///
/// # Errors
/// [`OpenError`].
pub fn open_stored(
    name: &str,
    overlay: OverlayPath<'_>,
    context: &OpenContext<'_>,
    layer_cache: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    let stack = persist::open_overlay_dir(overlay.dir).and_then(|dir| Stack::read(&dir));
    let stack = stack.map_err(OpenError::overlay(overlay.dir))?;
    let spec = spec_over(name, &stack.base).map_err(OpenError::overlay(overlay.dir))?;
    check_recorded_base(&spec)?;
    open_layers(&spec, Some(overlay), context, layer_cache).map_err(|error| match error {
        // The user did not name the base, so the message does not ask to check its name.
        OpenError::Base(BaseError::Missing(base)) => OpenError::Mismatch {
            dir: overlay.dir.to_owned(),
            why: format!(
                "needs its base '{}', which is gone: put it back, or use cowslip rebase if it was moved",
                base.display()
            ),
        },
        error => error,
    })
}

/// Creates the disk that `spec` describes in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_stored(
    spec: &DiskSpec,
    overlay: OverlayPath<'_>,
    context: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    if matches!(&spec.source, DiskSource::Remote(remote) if remote.address.is_command()) {
        return Err(OpenError::Refused(COMMAND_IN_STORE.to_owned()));
    }
    complete(spec, open_layers(spec, Some(overlay), context, &Arc::default())?)
}

/// Creates an empty disk in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_blank(
    name: &str,
    uuid: Uuid,
    overlay: OverlayPath<'_>,
    owner: DiskOwner,
) -> Result<OpenedDisk, OpenError> {
    let stack = new_stack(uuid, &BaseDescription::Blank(0), owner, DEFAULT_BLOCK_SIZE)?;
    let new = NewOverlay { stack, map: &LayerMap::new(0, 0), limit: None };
    let opened = persist::create(overlay, new).map_err(OpenError::overlay(overlay.dir))?;
    Ok(assemble_stored(name, 0, opened, overlay.dir))
}

fn assemble_stored(name: &str, size: u64, opened: OpenedOverlay, dir: &Path) -> OpenedDisk {
    let spec = DiskSpec::new(name.to_owned(), DiskSource::Blank(size));
    let base: Arc<dyn Layer> = Arc::new(base::blank::Blank::new(size));
    assemble_persistent(&spec, opened, &base, BaseDescription::Blank(size), dir, Vec::new())
}

/// Creates a disk in a store with the current contents of `from`, another disk of the store.
///
/// # Errors
/// [`OpenError`], with an [`OperationError`] as text; nothing is left behind then.
pub fn clone_stored(
    from: &Disk,
    name: &str,
    overlay: OverlayPath<'_>,
    layer_cache: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    let refused = |error: OperationError| OpenError::Refused(error.to_string());
    let _operation = from.operations.begin("a clone").map_err(refused)?;
    if from.is_latched() {
        return Err(refused(OperationError::Latched));
    }
    let FrozenLayer { layer, size, stack: old } = from.freeze().map_err(refused)?;
    let mut spec = spec_over(name, &old.base).map_err(OpenError::overlay(overlay.dir))?;
    spec.direct = from.direct;
    let (base, description) = reopen_base(from, &spec)?;
    let mut tree = LayerTree { layers: old.tree().chain(layer), snapshots: Vec::new() };
    tree.layers.reverse();
    tree.push_top(Uuid::new_v4(), Some(layer));
    let stack = Stack { uuid: uuid_for(overlay), ..old.with_tree(tree.clone()) };
    let map =
        LayerMap { mtime: from.overlay().and_then(|top| top.mtime()), ..LayerMap::new(size, size) };
    let new = NewOverlay { stack, map: &map, limit: None };
    let layers_locked = layer_cache.lock_changes();
    if !from.overlay_location.is_on_disk() {
        // The sealed layers may have been removed with the overlay.
        return Err(OpenError::Refused("it was removed meanwhile".to_owned()));
    }
    let mut created = persist::create(overlay, new).map_err(OpenError::overlay(overlay.dir))?;
    drop(layers_locked);
    for record in tree.top_chain().iter().skip(1) {
        let layer = created
            .dir
            .open_layer(record.uuid, layer_cache)
            .map_err(OpenError::overlay(overlay.dir))?;
        created.below.push(layer);
    }
    complete(
        &spec,
        assemble_persistent(
            &spec,
            created,
            &base.layer.reader(),
            description,
            overlay.dir,
            Vec::new(),
        ),
    )
}

/// Opens the base of the disk `from` once more, for another disk over it.
fn reopen_base(from: &Disk, spec: &DiskSpec) -> Result<(Base, BaseDescription), OpenError> {
    let description = from.described_base();
    let options = BaseOptions {
        format: spec.format,
        part: spec.part,
        access: BaseAccess::Read,
        locking: spec.locking,
        passthrough: spec.passthrough,
        direct: spec.direct,
        allow_backing: description.allow_backing(),
    };
    let base = base::open(&spec.source, options)?;
    // The path was opened again, and may lead to another file by now.
    if !description.is_same_files(&base) {
        let line =
            "another file is in the place of its base, or of one that this needs: put it back";
        return Err(OpenError::Refused(line.to_owned()));
    }
    let description = BaseDescription::of(&base, options);
    Ok((base, description))
}
