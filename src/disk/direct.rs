//! Disks whose files pass by the host's page cache (the key `direct`).
//!
//! The base is opened so. The layers follow when the disk is complete, and from then on each that
//! is made or opened for it. One that two disks of a store stand on is direct for both.

use std::io;
use std::path::Path;

use super::open::OpenError;
use super::{Disk, Top};
use crate::config::DirectIo;
use crate::overlay::Overlay;
use crate::overlay::keep::temporary_dir;
use crate::overlay::persist::OpenedOverlay;

impl Disk {
    /// Has all layers of the disk pass by the host's cache, if they are to.
    pub(super) fn go_direct(&self) -> Result<(), OpenError> {
        if self.direct == DirectIo::Off {
            return Ok(());
        }
        let layers = self.layers();
        let top = match &layers.top {
            Top::Overlay(overlay) => Some(overlay),
            Top::Reflink(_) | Top::Base(_) | Top::Nothing => None,
        };
        let below = layers.sealed.iter().flat_map(|sealed| sealed.layers());
        let known = self.history.open_sealed();
        let refused = |error| OpenError::NoDirect {
            dir: self.overlay_dir().as_deref().map_or_else(temporary_dir, Path::to_owned),
            error,
        };
        let mut all = top.into_iter().chain(below).chain(&known);
        all.try_for_each(|layer| layer.go_direct()).map_err(refused)
    }

    /// Has `layer`, which was made or opened for this disk, pass by the host's cache as well.
    pub(super) fn apply_direct(&self, layer: &Overlay) -> io::Result<()> {
        match self.direct {
            DirectIo::On => layer.go_direct(),
            DirectIo::Off => Ok(()),
        }
    }

    /// The same for all layers of an overlay that this disk is moving to.
    pub(super) fn apply_direct_to_all(&self, kept: &OpenedOverlay) -> io::Result<()> {
        let aside = kept.snapshot_layers.iter().map(|(_, layer)| layer);
        kept.below.iter().chain(aside).try_for_each(|layer| self.apply_direct(layer))?;
        self.apply_direct(&kept.overlay)
    }
}
