//! Creating overlays: built in a temporary directory and renamed into place once they are durable.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use uuid::Uuid;

use super::layer_dir::{empty_data, make_layer, remove_layer};
use super::overlay_dir::{OpenedOverlay, OverlayDir};
use super::path::{OverlayPath, parent_for_new};
use super::staging::{self, StagingDir};
use crate::confined;
use crate::overlay::Overlay;
use crate::overlay::error::OverlayError;
use crate::overlay::host_file::HostFile;
use crate::overlay::record::LayerMap;
use crate::overlay::recover::Recovered;
use crate::overlay::stack::{LayerRecord, Stack};
use crate::trusted_path::open_dir;

/// The contents of an overlay to create.
pub struct NewOverlay<'a> {
    /// The disk's stack.
    pub stack: Stack,
    /// The initial map of the top.
    pub map: &'a LayerMap,
    /// The most bytes of data that the overlay may hold.
    pub limit: Option<u64>,
}

/// A layer to create in a new overlay, possibly with the data of an existing layer.
pub struct NewLayer<'a> {
    /// The layer's record in the stack.
    pub record: LayerRecord,
    /// The layer's initial map.
    pub map: LayerMap,
    /// Creates the data file in the directory of the layer.
    pub make_data: MakeData<'a>,
}

/// Creates the data file of a layer in the layer's directory.
pub type MakeData<'a> = Box<dyn FnOnce(&File) -> io::Result<HostFile> + 'a>;

/// Creates an overlay with an empty top; all layers below exist already.
///
/// # Errors
/// [`OverlayError`]; nothing is left behind in that case.
pub fn create(path: OverlayPath<'_>, new: NewOverlay<'_>) -> Result<OpenedOverlay, OverlayError> {
    let NewOverlay { stack, map, limit } = new;
    let part = NewLayer {
        record: stack.top_layer()?,
        map: map.clone(),
        make_data: Box::new(|dir: &File| empty_data(dir, map.size)),
    };
    build(path, stack, vec![part], limit)
}

/// Builds an overlay with the layers `parts`, one of which is the top; all other layers of `stack`
/// exist already. `limit` caps the bytes of data that the top may hold.
///
/// # Errors
/// [`OverlayError`]; nothing is left behind in that case.
pub fn build(
    path: OverlayPath<'_>,
    stack: Stack,
    parts: Vec<NewLayer<'_>>,
    limit: Option<u64>,
) -> Result<OpenedOverlay, OverlayError> {
    let parent = match path.layers {
        None => parent_for_new(path.dir)?,
        Some(_) => path.dir.parent().unwrap_or(Path::new("/")),
    };
    if path.layers.is_none() {
        staging::remove_all_abandoned(parent);
    }
    let staging_dir =
        StagingDir::new(parent).map_err(OverlayError::io("making a directory beside it"))?;
    let layers_dir = match path.layers {
        None => confined::create_dir(staging_dir.dir(), "layers"),
        Some(layers_dir) => open_dir(layers_dir),
    };
    let layers_dir = layers_dir.map_err(OverlayError::io("making its layers"))?;
    let uuids: Vec<Uuid> = parts.iter().map(|part| part.record.uuid).collect();
    // Not moved into a closure: an abandoned `StagingDir` removes itself when dropped, which must
    // happen last, when the other descriptors are closed.
    let made = match build_in(staging_dir.dir(), &layers_dir, &stack, parts, limit) {
        Ok(made) => staging_dir
            .move_into_place(path.dir, parent)
            .map(|dir| (made, dir))
            .map_err(OverlayError::io("putting it in its place")),
        Err(error) => Err(error),
    };
    match made {
        Ok(((overlay, below, lock), dir)) => {
            let dir = OverlayDir::new(stack, dir, layers_dir, lock);
            let (snapshot_layers, recovered) = (Vec::new(), Recovered::New);
            Ok(OpenedOverlay { overlay, below, snapshot_layers, recovered, dir })
        }
        Err(error) => {
            if path.layers.is_some() {
                // These layers are not inside the temporary directory, which removes itself.
                uuids.into_iter().for_each(|uuid| {
                    let _ = remove_layer(&layers_dir, uuid);
                });
            }
            Err(error)
        }
    }
}

/// The layers that were built: the top, those below it, and the lock.
type BuiltLayers = (Overlay, Vec<Arc<Overlay>>, File);

fn build_in(
    dir: &File,
    layers_dir: &File,
    stack: &Stack,
    parts: Vec<NewLayer<'_>>,
    limit: Option<u64>,
) -> Result<BuiltLayers, OverlayError> {
    let mut sealed = HashMap::new();
    let mut top = None;
    for NewLayer { record, map, make_data } in parts {
        let is_top = Some(&record) == stack.layers.last();
        let limit = limit.filter(|_| is_top);
        let (layer, lock) = make_layer(layers_dir, &record, &map, limit, make_data)?;
        if is_top {
            top = Some((layer, lock));
        } else {
            layer.close_sealed().map_err(OverlayError::io("closing its log"))?;
            sealed.insert(record.uuid, Arc::new(layer));
        }
    }
    let no_layer = || OverlayError::Syntax("it has no layer".to_owned());
    let (overlay, lock) = top.ok_or_else(no_layer)?;
    stack.write(dir)?;
    let below = stack.tree().top_chain().into_iter().skip(1);
    let below = below.filter_map(|record| sealed.get(&record.uuid).cloned()).collect();
    Ok((overlay, below, lock))
}
