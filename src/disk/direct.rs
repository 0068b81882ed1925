//! Direct disks, whose files bypass the host's page cache (the key `direct`).
//!
//! The base is opened for direct I/O from the start. The layers follow when the disk is complete,
//! and from then on every layer that is created or opened for the disk. A layer shared by two disks
//! of a store is direct for both.

use std::io;
use std::path::Path;

use super::Disk;
use super::open::OpenError;
use crate::config::DirectIo;
use crate::host::temporary_dir;
use crate::overlay::Overlay;
use crate::overlay::persist::OpenedOverlay;

impl Disk {
    /// Switches all layers of a disk with `direct` to direct I/O.
    pub(super) fn go_direct(&self) -> Result<(), OpenError> {
        if self.direct == DirectIo::Off {
            return Ok(());
        }
        let layers = self.layers();
        let top = layers.top.overlay();
        let below = layers.sealed_layers();
        let known = self.history.open_sealed();
        let refused = |error| OpenError::NoDirect {
            dir: self.overlay_dir().as_deref().map_or_else(temporary_dir, Path::to_owned),
            error,
        };
        let mut all = top.into_iter().chain(below).chain(&known);
        all.try_for_each(|layer| layer.go_direct()).map_err(refused)
    }

    /// Switches `layer`, which was created or opened for a disk with `direct`, to direct I/O.
    pub(super) fn apply_direct(&self, layer: &Overlay) -> io::Result<()> {
        match self.direct {
            DirectIo::On => layer.go_direct(),
            DirectIo::Off => Ok(()),
        }
    }

    /// Switches all layers of an overlay that this disk is moving to, if the disk has `direct`.
    pub(super) fn apply_direct_to_all(&self, kept: &OpenedOverlay) -> io::Result<()> {
        let snapshot_layers = kept.snapshot_layers.iter().map(|(_, layer)| layer);
        kept.below.iter().chain(snapshot_layers).try_for_each(|layer| self.apply_direct(layer))?;
        self.apply_direct(&kept.overlay)
    }
}
