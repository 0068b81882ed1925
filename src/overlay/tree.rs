//! The layers of a disk and its snapshots: a tree that grows upwards from the base. No I/O.
//!
//! ```text
//!   base -- A -- B -- C -- T        T takes the writes: the top
//!                 \                 B is the snapshot "clean", D is "broken"
//!                  D
//! ```
//!
//! Every layer but the top is sealed. A layer is kept as long as it is the top, belongs to a snapshot,
//! or lies below such a layer; [`LayerTree::prune`] drops the others.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::name::{self, NameError};

/// The most layers that an overlay may have.
pub const MAX_LAYERS: usize = 1 << 15;

/// Prefix of the names of a difference's files, which lie beside those of the snapshots.
pub const DIFF_FILE_PREFIX: &str = ".frozen-";

/// One layer of an overlay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerRecord {
    /// The layer's uuid, which names its directory.
    pub uuid: Uuid,
    /// The block size in bytes.
    pub block: u32,
    /// The layer below this one; `None` for the base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Uuid>,
}

/// A snapshot: a name for a sealed layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRecord {
    /// The name of the snapshot.
    pub name: String,
    /// The highest layer of the snapshot, which shows that layer and all below it.
    pub layer: Uuid,
    /// The time at which the snapshot was taken, in seconds since the epoch.
    pub taken: i64,
}

/// The layers of a disk and its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LayerTree {
    /// The layers, each after its parent; the last one is the top.
    pub layers: Vec<LayerRecord>,
    /// The snapshots, in the order they were taken.
    pub snapshots: Vec<SnapshotRecord>,
}

/// Checks a name for a new snapshot.
///
/// # Errors
/// One line that says what is wrong; the caller puts the name in front.
pub fn check_name(name: &str) -> Result<(), &'static str> {
    match name::check(name) {
        Err(NameError::Empty | NameError::Directory | NameError::Reserved) => {
            Err("is no name for a snapshot: take a word")
        }
        Err(NameError::Slash) => Err("holds a '/': a snapshot is also a file of that name"),
        Err(NameError::ControlCharacter) => Err("holds a control character"),
        Err(NameError::TooLong) => Err("is longer than 255 bytes"),
        Ok(()) if name.starts_with(DIFF_FILE_PREFIX) => {
            Err("is no name for a snapshot: take a word")
        }
        Ok(()) => Ok(()),
    }
}

impl LayerTree {
    /// Creates a tree of one layer over the base.
    #[must_use]
    pub fn single(uuid: Uuid, block: u32) -> Self {
        let layer = LayerRecord { uuid, block, parent: None };
        Self { layers: vec![layer], snapshots: Vec::new() }
    }

    /// Describes what is wrong with the tree, if anything is.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        let Some(top) = self.layers.last() else {
            return Some("it has no layer".to_owned());
        };
        if self.layers.len() > MAX_LAYERS {
            return Some(format!("it has more than {MAX_LAYERS} layers"));
        }
        let mut known = HashSet::new();
        for layer in &self.layers {
            let parent = layer.parent.filter(|parent| !known.contains(parent));
            if !known.insert(layer.uuid) {
                return Some(format!("layer {} is there twice", layer.uuid));
            }
            if parent.is_some() {
                return Some(format!("what is below layer {} is missing", layer.uuid));
            }
            if layer.block != top.block {
                return Some("its layers have blocks of different sizes".to_owned());
            }
        }
        let mut names = HashSet::new();
        for snapshot in &self.snapshots {
            if let Err(fault) = check_name(&snapshot.name) {
                return Some(format!("the name of snapshot {:?} {fault}", snapshot.name));
            }
            if !names.insert(&snapshot.name) {
                return Some(format!("snapshot '{}' is there twice", snapshot.name));
            }
            if !known.contains(&snapshot.layer) || snapshot.layer == top.uuid {
                return Some(format!("the layer of snapshot '{}' is missing", snapshot.name));
            }
        }
        None
    }

    /// Returns the layer that takes the writes.
    #[must_use]
    pub fn top(&self) -> Option<&LayerRecord> {
        self.layers.last()
    }

    /// Returns the layer `uuid`.
    #[must_use]
    pub fn layer(&self, uuid: Uuid) -> Option<&LayerRecord> {
        self.layers.iter().find(|layer| layer.uuid == uuid)
    }

    /// Returns the snapshot `name`.
    #[must_use]
    pub fn snapshot(&self, name: &str) -> Option<&SnapshotRecord> {
        self.snapshots.iter().find(|snapshot| snapshot.name == name)
    }

    /// Returns the name of the first snapshot of the layer `uuid`.
    #[must_use]
    pub fn snapshot_name_of(&self, uuid: Uuid) -> Option<&str> {
        let found = self.snapshots.iter().find(|snapshot| snapshot.layer == uuid)?;
        Some(&found.name)
    }

    /// Returns the layer `uuid` and all below it, top to bottom.
    #[must_use]
    pub fn chain(&self, uuid: Uuid) -> Vec<LayerRecord> {
        let mut chain = Vec::new();
        let mut next = Some(uuid);
        // A layer is listed after its parent.
        for layer in self.layers.iter().rev() {
            if Some(layer.uuid) == next {
                chain.push(layer.clone());
                next = layer.parent;
            }
        }
        chain
    }

    /// Returns the layers that are based on `uuid`, directly or not.
    pub fn layers_above(&self, uuid: Uuid) -> impl Iterator<Item = &LayerRecord> {
        let is_based = move |layer: &&LayerRecord| {
            self.chain(layer.uuid).iter().skip(1).any(|below| below.uuid == uuid)
        };
        self.layers.iter().filter(is_based)
    }

    /// Returns the top and all below it, top to bottom.
    #[must_use]
    pub fn top_chain(&self) -> Vec<LayerRecord> {
        self.top().map_or_else(Vec::new, |top| self.chain(top.uuid))
    }

    /// Makes `new` the top, above `parent`; the old top keeps its place in the tree.
    pub fn push_top(&mut self, new: Uuid, parent: Option<Uuid>) {
        let block = self.top().map_or(super::DEFAULT_BLOCK_SIZE, |top| top.block);
        self.layers.push(LayerRecord { uuid: new, block, parent });
    }

    /// Drops the layers that neither the top nor a snapshot needs.
    pub fn prune(&mut self) {
        let mut kept = HashSet::new();
        let tips = self.top().map(|top| top.uuid).into_iter();
        for tip in tips.chain(self.snapshots.iter().map(|snapshot| snapshot.layer)) {
            let mut next = Some(tip);
            while let Some(uuid) = next.filter(|uuid| kept.insert(*uuid)) {
                next = self.layer(uuid).and_then(|layer| layer.parent);
            }
        }
        self.layers.retain(|layer| kept.contains(&layer.uuid));
    }

    /// Returns the layers whose parent is `uuid`.
    fn children(&self, uuid: Uuid) -> impl Iterator<Item = &LayerRecord> {
        self.layers.iter().filter(move |layer| layer.parent == Some(uuid))
    }

    /// Returns the lowest and the highest layer of a chain that may be merged into one, if there is
    /// such a chain: every layer but the highest has no name and exactly one child. The chain is as
    /// long as possible, because merging it step by step would copy the same data again and again.
    ///
    /// `is_shared` tells whether another disk uses a layer, which must not be replaced then.
    #[must_use]
    pub fn mergeable(&self, is_shared: impl Fn(Uuid) -> bool) -> Option<(Uuid, Uuid)> {
        let above = |layer: &LayerRecord| -> Option<&LayerRecord> {
            let mut children = self.children(layer.uuid);
            let (child, None) = (children.next()?, children.next()) else {
                return None;
            };
            let is_nameless = self.snapshot_name_of(layer.uuid).is_none();
            let is_free = !is_shared(layer.uuid) && !is_shared(child.uuid);
            (is_nameless && is_free).then_some(child)
        };
        self.layers.iter().find_map(|layer| {
            let mut upper = above(layer)?;
            while let Some(next) = above(upper) {
                upper = next;
            }
            Some((layer.uuid, upper.uuid))
        })
    }

    /// Replaces `old` and the layers below it, down to and including `bottom`, by `new`. Those below
    /// `old` have neither names nor other children.
    pub fn replace(&mut self, old: Uuid, bottom: Uuid, new: Uuid) {
        let parent = self.layer(bottom).and_then(|layer| layer.parent);
        for layer in &mut self.layers {
            if layer.uuid == old {
                (layer.uuid, layer.parent) = (new, parent);
            } else if layer.parent == Some(old) {
                layer.parent = Some(new);
            }
        }
        for snapshot in &mut self.snapshots {
            if snapshot.layer == old {
                snapshot.layer = new;
            }
        }
        self.prune();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u128) -> Uuid {
        Uuid::from_u128(number)
    }

    /// base - 1 - 2 - 4(top), and 3 on 2; 2 is "a", 3 is "b".
    fn sample() -> LayerTree {
        let mut tree = LayerTree::single(id(1), 512);
        tree.push_top(id(2), Some(id(1)));
        tree.push_top(id(3), Some(id(2)));
        tree.push_top(id(4), Some(id(2)));
        for (name, layer) in [("a", 2), ("b", 3)] {
            tree.snapshots.push(SnapshotRecord { name: name.into(), layer: id(layer), taken: 0 });
        }
        assert_eq!(tree.fault(), None);
        tree
    }

    fn uuids(chain: &[LayerRecord]) -> Vec<Uuid> {
        chain.iter().map(|layer| layer.uuid).collect()
    }

    #[test]
    fn a_chain_goes_down_to_the_base() {
        let tree = sample();
        assert_eq!(uuids(&tree.top_chain()), [id(4), id(2), id(1)]);
        assert_eq!(uuids(&tree.chain(id(3))), [id(3), id(2), id(1)]);
        assert_eq!(tree.snapshot_name_of(id(3)), Some("b"));
    }

    #[test]
    fn unneeded_layers_are_pruned() {
        let mut tree = sample();
        tree.snapshots.clear();
        tree.prune();
        assert_eq!(uuids(&tree.layers), [id(1), id(2), id(4)]);
    }

    #[test]
    fn named_and_shared_layers_and_forks_are_not_merged() {
        let mut tree = sample();
        let alone = |_| false;
        assert_eq!(tree.mergeable(alone), Some((id(1), id(2))));
        assert_eq!(tree.mergeable(|layer| layer == id(1)), None);
        assert_eq!(tree.mergeable(|layer| layer == id(2)), None);
        tree.replace(id(2), id(1), id(7));
        assert_eq!(tree.mergeable(alone), None);
        // Without its name it still has two layers on it.
        tree.snapshots.remove(0);
        assert_eq!(tree.mergeable(alone), None);
        tree.snapshots.clear();
        tree.prune();
        assert_eq!(tree.mergeable(alone), Some((id(7), id(4))));
    }

    #[test]
    fn the_longest_chain_without_names_is_merged_at_once() {
        let mut tree = sample();
        tree.snapshots.remove(0);
        for layer in 5..9 {
            tree.push_top(id(layer), Some(id(layer - 1)));
        }
        let alone = |_| false;
        // 3 and 4 are both children of 2, so the chain ends there.
        assert_eq!(tree.mergeable(alone), Some((id(1), id(2))));
        tree.snapshots.clear();
        tree.prune();
        assert_eq!(tree.mergeable(alone), Some((id(1), id(8))));
        // The chain ends below another disk's layer, or begins above it.
        assert_eq!(tree.mergeable(|layer| layer == id(5)), Some((id(1), id(4))));
        assert_eq!(tree.mergeable(|layer| layer <= id(5)), Some((id(6), id(8))));
        // A named layer may only be the highest of a chain.
        tree.snapshots.push(SnapshotRecord { name: "c".into(), layer: id(6), taken: 0 });
        assert_eq!(tree.mergeable(alone), Some((id(1), id(6))));
        tree.replace(id(6), id(1), id(9));
        assert_eq!(tree.fault(), None);
        assert_eq!(uuids(&tree.top_chain()), [id(8), id(7), id(9)]);
        assert_eq!(tree.snapshot_name_of(id(9)), Some("c"));
    }

    #[test]
    fn a_merged_layer_replaces_both() {
        let mut tree = sample();
        tree.snapshots.pop();
        tree.prune();
        tree.push_top(id(5), Some(id(4)));
        let name = SnapshotRecord { name: "c".into(), layer: id(4), taken: 0 };
        tree.snapshots = vec![name];
        tree.replace(id(4), id(2), id(9));
        assert_eq!(tree.fault(), None);
        assert_eq!(uuids(&tree.top_chain()), [id(5), id(9), id(1)]);
        assert_eq!(tree.snapshot_name_of(id(9)), Some("c"));
        assert_eq!(tree.layers.len(), 3);
    }

    #[test]
    fn faults_of_a_tree_are_described() {
        let faulty = |change: &dyn Fn(&mut LayerTree)| {
            let mut tree = sample();
            change(&mut tree);
            tree.fault().unwrap()
        };
        assert!(faulty(&|tree| tree.layers.clear()).contains("no layer"));
        let many = faulty(&|tree| {
            (0..MAX_LAYERS as u128).for_each(|layer| tree.push_top(id(100 + layer), Some(id(4))));
        });
        assert!(many.contains("more than 32768 layers"), "{many}");
        assert!(faulty(&|tree| tree.layers.swap(0, 1)).contains("is missing"));
        assert!(faulty(&|tree| tree.layers[1].uuid = id(1)).contains("twice"));
        assert!(faulty(&|tree| tree.layers[1].block = 4096).contains("different sizes"));
        assert!(faulty(&|tree| tree.snapshots[1].name = "a".into()).contains("twice"));
        assert!(faulty(&|tree| tree.snapshots[1].layer = id(4)).contains("is missing"));
        assert!(faulty(&|tree| tree.snapshots[1].name = "../x".into()).contains("holds a '/'"));
    }

    #[test]
    fn a_snapshot_name_must_be_a_file_name() {
        for bad in ["", ".", "..", "a/b", "a\nb", &"x".repeat(256)] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "before update", "2026-11-21", "ä"] {
            assert_eq!(check_name(good), Ok(()));
        }
    }
}
