//! What was inflated of compressed clusters: reads come in pieces smaller than those. One of these
//! serves all images of a chain, so what it holds does not grow with their number.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

/// The most that is kept: 8 MiB, four of the largest clusters.
const MAX_CACHED_BYTES: usize = 8 << 20;

/// An image and the cluster's beginning.
type ClusterKey = (usize, u64);

/// Clusters that were inflated, the newest last.
#[derive(Debug, Default)]
pub(super) struct ClusterCache(Mutex<ClusterCacheState>);

#[derive(Debug, Default)]
struct ClusterCacheState {
    clusters: VecDeque<(ClusterKey, Arc<[u8]>)>,
    bytes: usize,
}

impl ClusterCache {
    pub(super) fn new() -> Arc<Self> {
        Arc::default()
    }

    /// The cluster, if it is kept.
    pub(super) fn get(&self, key: ClusterKey) -> Option<Arc<[u8]>> {
        let kept = self.0.lock();
        kept.clusters.iter().find(|(at, _)| *at == key).map(|(_, bytes)| Arc::clone(bytes))
    }

    /// Keeps it; the oldest go.
    pub(super) fn insert(&self, key: ClusterKey, bytes: &Arc<[u8]>) {
        let mut kept = self.0.lock();
        if kept.clusters.iter().any(|(at, _)| *at == key) {
            return;
        }
        kept.bytes += bytes.len();
        kept.clusters.push_back((key, Arc::clone(bytes)));
        while kept.bytes > MAX_CACHED_BYTES
            && let Some((_, oldest)) = kept.clusters.pop_front()
        {
            kept.bytes -= oldest.len();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_go_and_each_image_has_its_own() {
        let inflated = ClusterCache::new();
        let cluster: Arc<[u8]> = vec![7; MAX_CACHED_BYTES / 4].into();
        for image in 0..2 {
            for start in 0..3 {
                inflated.insert((image, start), &cluster);
                inflated.insert((image, start), &cluster);
            }
        }
        assert!(inflated.get((0, 0)).is_none() && inflated.get((0, 1)).is_none());
        assert!(inflated.get((0, 2)).is_some());
        assert!((0..3).all(|start| inflated.get((1, start)).is_some()));
    }
}
