//! Cache of inflated clusters: reads are smaller than a compressed cluster. All images of a chain
//! share one cache, so its memory does not grow with their number.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

/// The most bytes that are cached: 8 MiB, four of the largest clusters.
const MAX_CACHED_BYTES: usize = 8 << 20;

/// An image, and the offset of the cluster in bytes.
type ClusterKey = (usize, u64);

/// Inflated clusters, the newest last.
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

    /// Returns the cluster, if it is cached.
    pub(super) fn get(&self, key: ClusterKey) -> Option<Arc<[u8]>> {
        let kept = self.0.lock();
        kept.clusters.iter().find(|(at, _)| *at == key).map(|(_, bytes)| Arc::clone(bytes))
    }

    /// Caches a cluster, and evicts the oldest ones if necessary.
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
    fn the_oldest_clusters_are_evicted_and_images_are_kept_apart() {
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
