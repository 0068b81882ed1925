//! What a disk is made of, as its status tells it.

use serde_json::Value;

/// As many overlay layers have a row of their own: beyond, rows could not be told apart.
const MAX_ROWS: usize = 64;

/// The layers of a disk, top to bottom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct LayerNames {
    /// The names of the overlay's layers, by depth.
    overlay: Vec<String>,
    /// What lies below them all.
    base: &'static str,
}

impl LayerNames {
    /// From the disk's status.
    pub(super) fn of(status: &Value) -> Self {
        let base = if status["stream"].is_object() { "stream" } else { "base" };
        let overlay = &status["overlay"];
        let overlay = match (overlay.is_object(), overlay["chain"].as_array()) {
            (false, _) => Vec::new(),
            (true, Some(chain)) if chain.len() > 1 => {
                let below = chain[1..].iter().map(|layer| layer["name"].as_str());
                let below = below.map(|name| name.unwrap_or("unnamed layer").to_owned());
                std::iter::once("now".to_owned()).chain(below).collect()
            }
            (true, _) => vec!["overlay".to_owned()],
        };
        Self { overlay, base }
    }

    /// The name of the layer at `depth`, for people; it may hold any characters.
    pub(super) fn name(&self, depth: usize) -> &str {
        self.overlay.get(depth).map_or(self.base, String::as_str)
    }

    /// The names of a picture's rows: each layer's, with those too many for rows of their own as
    /// one, and the base's last.
    pub(super) fn rows(&self) -> Vec<String> {
        let mut rows = self.overlay.clone();
        if rows.len() > MAX_ROWS {
            rows.truncate(MAX_ROWS - 1);
            rows.push(format!("{} older layers", self.overlay.len() - rows.len()));
        }
        rows.push(self.base.to_owned());
        rows
    }

    /// The row of what the layer at `depth` provides.
    pub(super) fn row(&self, depth: usize) -> usize {
        match depth < self.overlay.len() {
            true => depth.min(MAX_ROWS - 1),
            false => self.overlay.len().min(MAX_ROWS),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn chain(names: &[Option<&str>]) -> LayerNames {
        let chain: Vec<_> = names.iter().map(|name| json!({ "name": name })).collect();
        LayerNames::of(&json!({ "overlay": { "chain": chain }, "stream": null }))
    }

    #[test]
    fn a_disk_without_an_overlay_is_all_base() {
        let bare = LayerNames::of(&json!({ "overlay": null }));
        assert_eq!((bare.name(0), bare.rows()), ("base", vec!["base".to_owned()]));
        assert_eq!(bare.row(0), 0);
        let stream = LayerNames::of(&json!({ "overlay": null, "stream": {} }));
        assert_eq!(stream.name(0), "stream");
    }

    #[test]
    fn one_layer_is_the_overlay() {
        for layers in [LayerNames::of(&json!({ "overlay": {} })), chain(&[Some("work")])] {
            assert_eq!((layers.name(0), layers.name(1)), ("overlay", "base"));
            assert_eq!(layers.rows(), ["overlay", "base"]);
        }
    }

    #[test]
    fn snapshots_go_by_their_names() {
        let layers = chain(&[Some("work"), Some("before <upgrade>"), None]);
        assert_eq!(layers.rows(), ["now", "before <upgrade>", "unnamed layer", "base"]);
        assert_eq!(layers.name(1), "before <upgrade>");
        assert_eq!((layers.name(3), layers.name(99)), ("base", "base"));
    }

    #[test]
    fn very_many_layers_share_their_last_row() {
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
