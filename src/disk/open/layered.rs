//! Disks over a base: the base is opened, and the layer that the spec asks for is put above it.

use std::sync::Arc;

use uuid::Uuid;

use super::context::OpenContext;
use super::error::OpenError;
use super::notes::{notes_on_base, notes_on_overlay};
use super::opened::{OpenedBase, OpenedDisk};
use super::owner::initial_owner;
use super::persistent::{apply_spec, assemble_persistent, open_persistent};
use super::reflink;
use crate::base::self_reference::check_self_reference;
use crate::base::{self, BaseAccess, BaseLayer, BaseOptions};
use crate::config::{DiskMode, DiskSpec, Partitions, format_size};
use crate::disk::Disk;
use crate::disk::attrs::DiskOwner;
use crate::disk::base_description::BaseDescription;
use crate::disk::history::{History, ResetSizes};
use crate::disk::layers::{LayerStack, Top};
use crate::disk::overlay_location::OverlayLocation;
use crate::host;
use crate::layer::{Layer, WritableLayer};
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::OverlayPath;
use crate::overlay::tree::LayerTree;
use crate::overlay::{DEFAULT_BLOCK_SIZE, keep};

/// Opens the base of `spec` and the overlay at `overlay`; without a path, a disk that needs an
/// overlay gets a temporary one. Layers that are open already are taken from `layer_cache`.
pub(super) fn open_layers(
    spec: &DiskSpec,
    overlay: Option<OverlayPath<'_>>,
    context: &OpenContext<'_>,
    layer_cache: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    for path in spec.source.paths() {
        check_self_reference(path, context.mountpoint, context.mount_dev)?;
    }
    if let Some(OverlayPath { dir, .. }) = overlay {
        check_self_reference(dir, context.mountpoint, context.mount_dev)?;
    }
    let access =
        if spec.mode == DiskMode::ReadWrite { BaseAccess::Write } else { BaseAccess::Read };
    let options = BaseOptions {
        format: spec.format,
        part: spec.part,
        access,
        locking: spec.locking,
        passthrough: spec.passthrough,
        direct: spec.direct,
        allow_backing: &context.allow_backing,
    };
    let base = base::open(&spec.source, options)?;
    let description = BaseDescription::of(&base, options);
    let owner = initial_owner(spec, &description, context);
    let base_notes = notes_on_base(&base, context);
    let layer = match &base.layer {
        BaseLayer::Writer(layer) => {
            return Ok(over_writable(spec, layer, base.size, description, owner, base_notes));
        }
        BaseLayer::Reader(layer) => Arc::clone(layer),
    };
    let base = OpenedBase { layer, size: base.size, description, owner };
    let mut opened = match overlay {
        _ if spec.mode == DiskMode::ReadOnly => over_read_only(spec, base),
        None => with_temporary_overlay(spec, base, context)?,
        Some(overlay) if reflink::uses_reflink(spec, overlay.dir)? => {
            reflink::open(spec, overlay.dir, base, context)?
        }
        Some(overlay) => with_overlay(spec, overlay, base, context, layer_cache)?,
    };
    opened.notes.splice(..0, base_notes);
    Ok(opened)
}

/// Makes a disk of a writable base alone (`mode=rw`).
fn over_writable(
    spec: &DiskSpec,
    layer: &Arc<dyn WritableLayer>,
    size: u64,
    description: BaseDescription,
    owner: DiskOwner,
    notes: Vec<String>,
) -> OpenedDisk {
    let bottom_layer = Arc::clone(layer) as Arc<dyn Layer>;
    let layers = LayerStack::new(Top::Writable(Arc::clone(layer)), Vec::new(), Some(bottom_layer));
    let disk = Disk::new(spec, Uuid::new_v4(), layers, description, owner);
    let summary = format!("{}, writes go straight to '{}'", format_size(size), disk.source);
    OpenedDisk { disk, summary, notes }
}

/// Makes a disk of a base that is only read (`mode=ro`).
fn over_read_only(spec: &DiskSpec, base: OpenedBase) -> OpenedDisk {
    let OpenedBase { layer, size, description, owner } = base;
    let layers = LayerStack::read_only(Vec::new(), Some(layer));
    let disk = Disk::new(spec, Uuid::new_v4(), layers, description, owner);
    let summary = format!("{}, read-only", format_size(size));
    OpenedDisk { disk, summary, notes: Vec::new() }
}

/// Makes a disk with an overlay that ends with the mount.
fn with_temporary_overlay(
    spec: &DiskSpec,
    base: OpenedBase,
    context: &OpenContext<'_>,
) -> Result<OpenedDisk, OpenError> {
    let OpenedBase { layer, size: base_size, description, owner } = base;
    let dir = host::temporary_dir();
    let size = spec.size.unwrap_or(base_size);
    let block = spec.block.unwrap_or(DEFAULT_BLOCK_SIZE);
    let lower_limit = size.min(base_size);
    let overlay = keep::temporary(&dir, block, size, lower_limit, spec.limit)
        .map_err(|error| OpenError::Temporary { dir: dir.clone(), error })?;
    let notes = notes_on_overlay(&dir, context);
    let top = Top::Overlay(Arc::new(overlay));
    let layers = LayerStack::new(top, Vec::new(), Some(layer));
    let mut disk = Disk::new(spec, Uuid::new_v4(), layers, description, owner);
    let tree = LayerTree::single(Uuid::new_v4(), block);
    disk.overlay_location = OverlayLocation::temporary(tree, dir);
    disk.history = History::new(ResetSizes { size, lower_limit }, spec.limit);
    let summary = format!(
        "{}, temporary overlay: changes end at umount ('cowslip keep' saves them)",
        format_size(size)
    );
    Ok(OpenedDisk { disk, summary, notes })
}

/// Makes a disk with the overlay at `overlay`, which is created if it does not exist.
fn with_overlay(
    spec: &DiskSpec,
    overlay: OverlayPath<'_>,
    base: OpenedBase,
    context: &OpenContext<'_>,
    layer_cache: &LayerCache,
) -> Result<OpenedDisk, OpenError> {
    let mut opened = open_persistent(spec, overlay, &base, context, layer_cache)?;
    let applied = apply_spec(spec, overlay.dir, &mut opened);
    let notes = notes_on_overlay(overlay.dir, context);
    let OpenedBase { layer, description, .. } = base;
    let opened = assemble_persistent(spec, opened, &layer, description, overlay.dir, notes);
    applied.inspect_err(|_| opened.disk.abandon())?;
    Ok(opened)
}

/// Completes a disk after its layers were opened: switches them to direct I/O if the disk has
/// `direct`, and reads the partitions if they are to be shown.
pub(super) fn complete(spec: &DiskSpec, mut opened: OpenedDisk) -> Result<OpenedDisk, OpenError> {
    opened.disk.go_direct().inspect_err(|_| opened.disk.abandon())?;
    if spec.partitions == Partitions::Shown {
        let notes = opened.disk.show_partitions(&spec.name);
        opened.notes.extend(notes.inspect_err(|_| opened.disk.abandon())?);
    }
    Ok(opened)
}
