//! Disks of a store: they know by themselves what they stand on.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::error::OpenError;
use super::persistent::{assemble_persistent, new_stack, overlay_error, uuid_for};
use super::{OpenContext, OpenedDisk, complete, open_layers};
use crate::base::{self, BaseAccess, BaseError, BaseOptions};
use crate::config::{DiskSource, DiskSpec};
use crate::disk::bottom::{Bottom, spec_over};
use crate::disk::history::{FrozenLayer, OperationError};
use crate::disk::{Disk, DiskOwner};
use crate::layer::Layer;
use crate::overlay::DEFAULT_BLOCK_SIZE;
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::{self, NewOverlay, OpenedOverlay, OverlayPath};
use crate::overlay::record::LayerMap;
use crate::overlay::stack::Stack;
use crate::overlay::tree::LayerTree;

/// Opens the disk `name` of a store, taking from `layer_cache` the layers that are open already.
///
/// # Errors
/// [`OpenError`].
pub fn open_stored(
    name: &str,
    place: OverlayPath<'_>,
    setting: &OpenContext<'_>,
    shelf: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    let stack = persist::open_overlay_dir(place.dir).and_then(|dir| Stack::read(&dir));
    let stack = stack.map_err(overlay_error(place.dir))?;
    let spec = spec_over(name, &stack.base).map_err(overlay_error(place.dir))?;
    open_layers(&spec, Some(place), setting, shelf).map_err(|error| match error {
        // The user did not name it, so it is not for the user to check the name.
        OpenError::Base(BaseError::Missing(base)) => OpenError::Mismatch {
            dir: place.dir.to_owned(),
            why: format!(
                "needs its base '{}', which is gone: put it back, or use cowslip rebase if it was moved",
                base.display()
            ),
        },
        error => error,
    })
}

/// Makes the disk that `spec` asks for in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_stored(
    spec: &DiskSpec,
    place: OverlayPath<'_>,
    setting: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    complete(spec, open_layers(spec, Some(place), setting, &Arc::default())?)
}

/// Makes an empty disk in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_blank(
    name: &str,
    uuid: Uuid,
    place: OverlayPath<'_>,
    owner: DiskOwner,
) -> Result<OpenedDisk, OpenError> {
    let stack = new_stack(uuid, &Bottom::Blank(0), owner, DEFAULT_BLOCK_SIZE)?;
    let new = NewOverlay { stack, map: &LayerMap::new(0, 0), limit: None };
    let persistent = persist::create(place, new).map_err(overlay_error(place.dir))?;
    Ok(assemble_stored(name, 0, persistent, place.dir))
}

fn assemble_stored(name: &str, size: u64, persistent: OpenedOverlay, dir: &Path) -> OpenedDisk {
    let spec = DiskSpec::new(name.to_owned(), DiskSource::Blank(size));
    let base: Arc<dyn Layer> = Arc::new(base::blank::Blank::new(size));
    assemble_persistent(&spec, persistent, &base, Bottom::Blank(size), dir, Vec::new())
}

/// Makes a disk in a store that holds what `from`, another disk of it, holds now.
///
/// # Errors
/// [`OpenError`], [`OperationError`] as its text; nothing is left behind then.
pub fn clone_stored(
    from: &Disk,
    name: &str,
    place: OverlayPath<'_>,
    shelf: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    let refused = |error: OperationError| OpenError::NothingToKeep(error.to_string());
    let _turn = from.begin_operation("a clone").map_err(refused)?;
    if from.is_latched() {
        return Err(refused(OperationError::Latched));
    }
    let FrozenLayer { layer, size, stack: old } = from.freeze().map_err(refused)?;
    let mut spec = spec_over(name, &old.base).map_err(overlay_error(place.dir))?;
    spec.direct = from.direct;
    let bottom = from.bottom();
    let how = BaseOptions {
        format: spec.format,
        part: spec.part,
        access: BaseAccess::Read,
        locking: spec.locking,
        passthrough: spec.passthrough,
        direct: spec.direct,
        allow_backing: bottom.allow_backing(),
    };
    let base = base::open(&spec.source, how)?;
    // Opened by its path once more: another file may be there by now.
    if !bottom.is_same_files(&base) {
        let line =
            "another file is in the place of its base, or of one that this needs: put it back";
        return Err(OpenError::NothingToKeep(line.to_owned()));
    }
    let mut tree = LayerTree { layers: old.tree().chain(layer), snapshots: Vec::new() };
    tree.layers.reverse();
    tree.push_top(Uuid::new_v4(), Some(layer));
    let stack = Stack { uuid: uuid_for(place), ..old.with_tree(tree.clone()) };
    let image =
        LayerMap { mtime: from.overlay().and_then(|top| top.mtime()), ..LayerMap::new(size, size) };
    let new = NewOverlay { stack, map: &image, limit: None };
    let alone = shelf.lock_changes();
    if !from.has_overlay_dir() {
        // What it stood on may have gone with it.
        return Err(OpenError::NothingToKeep("it was removed meanwhile".to_owned()));
    }
    let mut made = persist::create(place, new).map_err(overlay_error(place.dir))?;
    drop(alone);
    for record in tree.live().iter().skip(1) {
        let layer = made.dir.open_layer(record.uuid, shelf).map_err(overlay_error(place.dir))?;
        made.below.push(layer);
    }
    let bottom = Bottom::of(&base, how);
    complete(
        &spec,
        assemble_persistent(&spec, made, &base.layer.reader(), bottom, place.dir, Vec::new()),
    )
}
