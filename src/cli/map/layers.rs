//! The names of the layers of a disk, taken from its status.

use crate::control::api::DiskStatus;

/// Maximum number of overlay layers with a row of their own: more rows could not be told apart.
const MAX_ROWS: usize = 64;

/// The layers of a disk, top to bottom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LayerNames {
    /// The names of the overlay's layers, by depth.
    overlay: Vec<String>,
    /// The name of the bottom of the disk.
    base: &'static str,
}

impl LayerNames {
    /// Takes the names from the disk's status.
    pub(super) fn of(status: &DiskStatus) -> Self {
        let base = if status.stream.is_some() { "stream" } else { "base" };
        let Some(overlay) = &status.overlay else {
            return Self { overlay: Vec::new(), base };
        };
        let overlay = match overlay.blocks.as_ref().map(|blocks| &blocks.chain[..]) {
            Some([_, below @ ..]) if !below.is_empty() => {
                let below = below.iter().map(|layer| layer.name.as_deref());
                let below = below.map(|name| name.unwrap_or("unnamed layer").to_owned());
                std::iter::once("now".to_owned()).chain(below).collect()
            }
            _ => vec!["overlay".to_owned()],
        };
        Self { overlay, base }
    }

    /// Returns the name of the layer at `depth`, which may contain any characters.
    pub(super) fn name(&self, depth: usize) -> &str {
        self.overlay.get(depth).map_or(self.base, String::as_str)
    }

    /// Returns the names of a picture's rows: those of the layers, where the lowest of too many layers
    /// share a row, and last that of the base.
    pub(super) fn rows(&self) -> Vec<String> {
        let mut rows = self.overlay.clone();
        if rows.len() > MAX_ROWS {
            rows.truncate(MAX_ROWS - 1);
            rows.push(format!("{} older layers", self.overlay.len() - rows.len()));
        }
        rows.push(self.base.to_owned());
        rows
    }

    /// Returns the row for pieces of the layer at `depth`.
    pub(super) fn row(&self, depth: usize) -> usize {
        match depth < self.overlay.len() {
            true => depth.min(MAX_ROWS - 1),
            false => self.overlay.len().min(MAX_ROWS),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::{BlockOverlayStatus, LayerStatus, OverlayStatus, StreamStatus};

    fn chain(names: &[Option<&str>]) -> LayerNames {
        let layer = |name: &Option<&str>| LayerStatus {
            name: name.map(str::to_owned),
            ..LayerStatus::default()
        };
        let chain = names.iter().map(layer).collect();
        let blocks = Some(BlockOverlayStatus { chain, ..BlockOverlayStatus::default() });
        of_overlay(OverlayStatus { blocks, ..OverlayStatus::default() })
    }

    fn of_overlay(overlay: OverlayStatus) -> LayerNames {
        LayerNames::of(&DiskStatus { overlay: Some(overlay), ..DiskStatus::default() })
    }

    #[test]
    fn disk_without_an_overlay_has_only_the_base() {
        let bare = LayerNames::of(&DiskStatus::default());
        assert_eq!((bare.name(0), bare.rows()), ("base", vec!["base".to_owned()]));
        assert_eq!(bare.row(0), 0);
        let stream = Some(StreamStatus::default());
        let stream = LayerNames::of(&DiskStatus { stream, ..DiskStatus::default() });
        assert_eq!(stream.name(0), "stream");
    }

    #[test]
    fn single_layer_is_called_overlay() {
        for layers in [of_overlay(OverlayStatus::default()), chain(&[Some("work")])] {
            assert_eq!((layers.name(0), layers.name(1)), ("overlay", "base"));
            assert_eq!(layers.rows(), ["overlay", "base"]);
        }
    }

    #[test]
    fn layers_are_called_like_their_snapshots() {
        let layers = chain(&[Some("work"), Some("before <upgrade>"), None]);
        assert_eq!(layers.rows(), ["now", "before <upgrade>", "unnamed layer", "base"]);
        assert_eq!(layers.name(1), "before <upgrade>");
        assert_eq!((layers.name(3), layers.name(99)), ("base", "base"));
    }

    #[test]
    fn lowest_of_too_many_layers_share_a_row() {
        let layers = chain(&[Some("s"); 100]);
        let rows = layers.rows();
        assert_eq!(
            (rows.len(), rows[63].as_str(), rows[64].as_str()),
            (65, "37 older layers", "base")
        );
        assert_eq!((layers.row(62), layers.row(63), layers.row(99)), (62, 63, 63));
        assert_eq!((layers.row(100), layers.row(101)), (64, 64));
        assert_eq!(chain(&[Some("s"); 64]).row(64), 64);
    }
}
