//! New overlays: built beside their place, and renamed into it when all of it is durable.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;
use uuid::Uuid;

use super::overlay_dir::{OverlayDir, remove_layer};
use super::staging::{self, StagingDir};
use super::{OpenedOverlay, OverlayPath, top_layer};
use crate::confined::{self, open_dir};
use crate::overlay::data::{HostFile, SEGMENT_LEN, Storage};
use crate::overlay::log::Log;
use crate::overlay::record::{BootTag, LayerMap};
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{
    LayerDir, LayerRecord, Stack, StackError, data_file_in, doing, parent_for_new,
};
use crate::overlay::{Overlay, boot_tag};
use crate::process::explain_size_error;

/// What is to be made.
pub struct NewOverlay<'a> {
    /// The disk's stack.
    pub stack: Stack,
    /// The first map of its top.
    pub map: &'a LayerMap,
    /// The most bytes of data it may hold.
    pub limit: Option<u64>,
}

/// A layer to be made in a new overlay, perhaps of one that exists elsewhere.
pub struct NewLayer<'a> {
    /// Its place in the stack.
    pub record: LayerRecord,
    /// Its map.
    pub map: LayerMap,
    /// Makes its data file in the directory of the layer.
    pub make_data: MakeData<'a>,
}

/// Makes the data file of a layer in the layer's directory.
pub type MakeData<'a> = Box<dyn FnOnce(&File) -> io::Result<HostFile> + 'a>;

/// Makes an overlay with an empty top; all layers below that exist already.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn create(place: OverlayPath<'_>, new: NewOverlay<'_>) -> Result<OpenedOverlay, StackError> {
    let NewOverlay { stack, map: image, limit } = new;
    let part = NewLayer {
        record: top_layer(&stack)?,
        map: image.clone(),
        make_data: Box::new(|layer: &File| empty_data(layer, image.size)),
    };
    build(place, stack, vec![part], limit)
}

/// An empty data file for a disk of `size` bytes. It has its length from the start: later writes
/// then change blocks only, not the file's size.
pub(super) fn empty_data(layer: &File, size: u64) -> io::Result<HostFile> {
    let file = confined::create_file(layer, "data")?;
    file.set_len(size.min(SEGMENT_LEN)).map_err(explain_size_error)?;
    data_file_in(layer.try_clone()?, file)
}

/// Builds an overlay and `parts` of its layers, the top among them; all others exist already.
/// `limit` caps the bytes of data that the top may hold.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn build(
    place: OverlayPath<'_>,
    stack: Stack,
    parts: Vec<NewLayer<'_>>,
    limit: Option<u64>,
) -> Result<OpenedOverlay, StackError> {
    let parent = match place.layers {
        None => parent_for_new(place.dir)?,
        Some(_) => place.dir.parent().unwrap_or(Path::new("/")),
    };
    if place.layers.is_none() {
        staging::remove_all_abandoned(parent);
    }
    let draft = StagingDir::new(parent).map_err(doing("making a directory beside it"))?;
    let layers = match place.layers {
        None => confined::create_dir(draft.dir(), "layers"),
        Some(path) => open_dir(path),
    };
    let layers = layers.map_err(doing("making its layers"))?;
    let uuids: Vec<Uuid> = parts.iter().map(|part| part.record.uuid).collect();
    // Not moved into a closure: what is not put into its place removes itself last of all, when the
    // other descriptors are free for that.
    let made = match build_in(draft.dir(), &layers, &stack, parts, limit) {
        Ok(made) => draft
            .move_into_place(place.dir, parent)
            .map(|dir| (made, dir))
            .map_err(doing("putting it in its place")),
        Err(error) => Err(error),
    };
    match made {
        Ok(((overlay, below, lock), dir)) => {
            let home = OverlayDir { stack, dir, layers, lock, torn: false };
            let aside = Vec::new();
            Ok(OpenedOverlay {
                overlay,
                below,
                snapshot_layers: aside,
                recovered: Recovered::New,
                dir: home,
            })
        }
        Err(error) => {
            if place.layers.is_some() {
                // Not below the temporary directory, which removes itself.
                uuids.into_iter().for_each(|uuid| {
                    let _ = remove_layer(&layers, uuid);
                });
            }
            Err(error)
        }
    }
}

/// The layers that were built: the top one, those below it, and the lock.
type BuiltLayers = (Overlay, Vec<Arc<Overlay>>, File);

fn build_in(
    dir: &File,
    layers: &File,
    stack: &Stack,
    parts: Vec<NewLayer<'_>>,
    limit: Option<u64>,
) -> Result<BuiltLayers, StackError> {
    let mut sealed = HashMap::new();
    let mut top = None;
    for NewLayer { record, map: image, make_data: put_data } in parts {
        let is_top = Some(&record) == stack.layers.last();
        let limit = limit.filter(|_| is_top);
        let (layer, lock) = make_layer(layers, &record, &image, limit, put_data)?;
        if is_top {
            top = Some((layer, lock));
        } else {
            layer.close_sealed().map_err(doing("closing its log"))?;
            sealed.insert(record.uuid, Arc::new(layer));
        }
    }
    let no_layer = || StackError::Syntax("it has no layer".to_owned());
    let (overlay, lock) = top.ok_or_else(no_layer)?;
    stack.write(dir)?;
    let below = stack.tree().live().into_iter().skip(1);
    let below = below.filter_map(|record| sealed.get(&record.uuid).cloned()).collect();
    Ok((overlay, below, lock))
}

/// Makes the files of a layer durably, and locks it.
pub(super) fn make_layer(
    layers: &File,
    record: &LayerRecord,
    image: &LayerMap,
    limit: Option<u64>,
    put_data: impl FnOnce(&File) -> io::Result<HostFile>,
) -> Result<(Overlay, File), StackError> {
    let layer =
        confined::create_dir(layers, record.uuid.to_string()).map_err(doing("making its layer"))?;
    let data = put_data(&layer).map_err(doing("making its data"))?;
    data.sync().map_err(doing("making its data durable"))?;
    let lock = data.first().try_clone().map_err(doing("locking it"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| doing("locking it")(error.into()))?;
    let start = || -> io::Result<(Log, BootTag)> {
        let tag = boot_tag::current(&layer)?;
        let home = Arc::new(LayerDir::new(layer.try_clone()?));
        let log = Log::create(home, record.uuid, u64::from(record.block), image, tag, 1)?;
        layer.sync_all()?;
        layers.sync_all()?;
        Ok((log, tag))
    };
    let (log, tag) = start().map_err(doing("writing its log"))?;
    let image = image.clone();
    let overlay = Overlay::new(record.block, Arc::new(data), image, Some(log), tag, limit);
    Ok((overlay, lock))
}
