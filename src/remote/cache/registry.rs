//! The caches that are open in this process, so that disks with the same base share one.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::{Cache, CacheError};

/// Where an image is cached: its directory, or `None` for a file without a name, and its identity.
type Key = (Option<PathBuf>, Vec<u8>, u64);

/// The caches that are in use.
#[derive(Default)]
pub(crate) struct CacheRegistry {
    caches: Mutex<HashMap<Key, Weak<Cache>>>,
}

impl CacheRegistry {
    /// Returns the cache of the image of `size` bytes with this `identity`: the one that is open, or else
    /// a new one of at most `cap` bytes, in `dir` or in a file without a name.
    ///
    /// # Errors
    /// [`CacheError`].
    pub(crate) fn open(
        &self,
        dir: Option<&Path>,
        identity: &[u8],
        size: u64,
        cap: u64,
    ) -> Result<Arc<Cache>, CacheError> {
        // Held meanwhile, so that no image is opened twice.
        let mut caches = self.caches.lock();
        caches.retain(|_, cache| cache.strong_count() > 0);
        // A directory that does not exist yet is known by the path that was given.
        let real = dir.map(|dir| dir.canonicalize().unwrap_or_else(|_| dir.to_owned()));
        let key = (real, identity.to_vec(), size);
        let open = caches.get(&key).and_then(Weak::upgrade);
        if let Some(cache) = open.filter(|cache| !cache.is_discarded()) {
            return Ok(cache);
        }
        let cache = Arc::new(match dir {
            Some(dir) => Cache::open(dir, identity, size, cap)?,
            None => Cache::temporary(size, cap)?,
        });
        caches.insert(key, Arc::downgrade(&cache));
        Ok(cache)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_image_has_one_cache_while_it_is_used() {
        let room = tempfile::tempdir_in("/var/tmp").unwrap();
        let registry = CacheRegistry::default();
        let open = |dir, identity: &[u8]| registry.open(dir, identity, 1 << 20, 1 << 30).unwrap();
        for dir in [None, Some(room.path())] {
            let first = open(dir, b"a");
            assert!(Arc::ptr_eq(&first, &open(dir, b"a")));
            assert!(!Arc::ptr_eq(&first, &open(dir, b"b")));
            assert_eq!(first.is_persistent(), dir.is_some());
            drop(first);
            assert_eq!(open(dir, b"a").is_persistent(), dir.is_some());
        }
        assert_eq!(registry.caches.lock().len(), 1);
    }
}
