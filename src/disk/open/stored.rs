//! Disks of a store: they know by themselves what they stand on.

use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::error::OpenError;
use super::persistent::{in_overlay, new_stack, settle, uuid_for};
use super::{Opened, Setting, complete, open_layers};
use crate::base::{self, Access, BaseError, Opening};
use crate::disk::bottom::{Bottom, over};
use crate::disk::life::{Frozen, LifeError};
use crate::disk::{Disk, Owner};
use crate::layer::Layer;
use crate::overlay::DEFAULT_BLOCK;
use crate::overlay::persist::{self, New, Persistent, Place};
use crate::overlay::record::Image;
use crate::overlay::shelf::Shelf;
use crate::overlay::stack::Stack;
use crate::overlay::tree::Tree;
use crate::spec::{DiskSpec, Source};

/// Opens the disk `name` of a store, taking from `shelf` the layers that are open already.
///
/// # Errors
/// [`OpenError`].
pub fn open_stored(
    name: &str,
    place: Place<'_>,
    setting: &Setting<'_>,
    shelf: &Arc<Shelf>,
) -> Result<Opened, OpenError> {
    let stack = persist::open_overlay(place.dir).and_then(|dir| Stack::read(&dir));
    let stack = stack.map_err(in_overlay(place.dir))?;
    let spec = over(name, &stack.base).map_err(in_overlay(place.dir))?;
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
    place: Place<'_>,
    setting: &Setting<'_>,
) -> Result<Opened, OpenError> {
    complete(spec, open_layers(spec, Some(place), setting, &Arc::default())?)
}

/// Makes an empty disk in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_blank(
    name: &str,
    uuid: Uuid,
    place: Place<'_>,
    owner: Owner,
) -> Result<Opened, OpenError> {
    let stack = new_stack(uuid, &Bottom::Blank(0), owner, DEFAULT_BLOCK)?;
    let new = New { stack, image: &Image::new(0, 0), limit: None };
    let persistent = persist::create(place, new).map_err(in_overlay(place.dir))?;
    Ok(settle_stored(name, 0, persistent, place.dir))
}

fn settle_stored(name: &str, size: u64, persistent: Persistent, dir: &Path) -> Opened {
    let spec = DiskSpec::new(name.to_owned(), Source::Blank(size));
    let base: Arc<dyn Layer> = Arc::new(base::blank::Blank::new(size));
    settle(&spec, persistent, &base, Bottom::Blank(size), dir, Vec::new())
}

/// Makes a disk in a store that holds what `from`, another disk of it, holds now.
///
/// # Errors
/// [`OpenError`], [`LifeError`] as its text; nothing is left behind then.
pub fn clone_stored(
    from: &Disk,
    name: &str,
    place: Place<'_>,
    shelf: &Arc<Shelf>,
) -> Result<Opened, OpenError> {
    let refused = |error: LifeError| OpenError::NothingToKeep(error.to_string());
    let _turn = from.begin("a clone").map_err(refused)?;
    if from.is_latched() {
        return Err(refused(LifeError::Latched));
    }
    let Frozen { layer, size, stack: old } = from.freeze().map_err(refused)?;
    let mut spec = over(name, &old.base).map_err(in_overlay(place.dir))?;
    spec.direct = from.direct;
    let bottom = from.bottom();
    let how = Opening {
        format: spec.format,
        part: spec.part,
        access: Access::Read,
        locking: spec.locking,
        passthrough: spec.passthrough,
        direct: spec.direct,
        allow_backing: bottom.allow_backing(),
    };
    let base = base::open(&spec.source, how)?;
    let mut tree = Tree { layers: old.tree().chain(layer), snapshots: Vec::new() };
    tree.layers.reverse();
    tree.grow(Uuid::new_v4(), Some(layer));
    let stack = Stack { uuid: uuid_for(place), ..old.with_tree(tree.clone()) };
    let image =
        Image { mtime: from.overlay().and_then(|top| top.mtime()), ..Image::new(size, size) };
    let new = New { stack, image: &image, limit: None };
    let alone = shelf.alone();
    if !from.is_on_disk() {
        // What it stood on may have gone with it.
        return Err(OpenError::NothingToKeep("it was removed meanwhile".to_owned()));
    }
    let mut made = persist::create(place, new).map_err(in_overlay(place.dir))?;
    drop(alone);
    for record in tree.live().iter().skip(1) {
        let layer = made.home.sealed(record.uuid, shelf).map_err(in_overlay(place.dir))?;
        made.below.push(layer);
    }
    let bottom = Bottom::of(&base, how);
    complete(&spec, settle(&spec, made, &base.layer.reader(), bottom, place.dir, Vec::new()))
}
