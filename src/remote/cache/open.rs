//! Opening a cache, and its part of the limit of its directory.

use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;
use sha2::{Digest, Sha256};

use super::dir::{CacheDir, DATA_FILE, OtherImages};
use super::overflow::Overflow;
use super::persist::Persistent;
use super::record::ImageId;
use super::units::{UNIT_SIZE, Units};
use super::{Cache, CacheError, Counters, MIN_CAP, MIN_UNITS};
use crate::host;

impl Cache {
    /// Creates the cache of an image of `size` bytes that is gone with its process, of at most `cap`
    /// bytes, in the host's directory for temporary files.
    ///
    /// # Errors
    /// [`CacheError::Temporary`].
    pub(crate) fn temporary(size: u64, cap: u64) -> Result<Self, CacheError> {
        let dir = host::temporary_dir();
        match tempfile::tempfile_in(&dir) {
            Ok(file) => Ok(Self::new(file, Units::new(), size, cap.max(MIN_CAP))),
            Err(error) => Err(CacheError::Temporary { dir, error }),
        }
    }

    /// Opens the cache of the image of `size` bytes with this `identity` in the directory `dir`, which
    /// is made where there is none. All caches of the directory have at most `cap` bytes together. While
    /// another process uses the cache of the image, and where the host has no room for the first few
    /// bytes, this one is temporary; a warning says so.
    ///
    /// # Errors
    /// [`CacheError`].
    pub(crate) fn open(
        dir: &Path,
        identity: &[u8],
        size: u64,
        cap: u64,
    ) -> Result<Self, CacheError> {
        match Self::open_limited(dir, identity, size, cap.max(MIN_CAP)) {
            Err(CacheError::Dir { error, .. }) if host::is_out_of_space(&error) => {
                log::warn!("read cache '{}': {error}: a temporary file is used", dir.display());
                Self::temporary(size, cap)
            }
            opened => opened,
        }
    }

    pub(super) fn open_limited(
        dir: &Path,
        identity: &[u8],
        size: u64,
        cap: u64,
    ) -> Result<Self, CacheError> {
        let hash = Sha256::new().chain_update(size.to_le_bytes()).chain_update(identity).finalize();
        let image = ImageId { hash: hash.into(), size };
        let name: String = image.hash.iter().map(|byte| format!("{byte:02x}")).collect();
        let io = |error| CacheError::Dir { dir: dir.join(&name), error };
        let Some(files) = CacheDir::open_or_create(dir)?.lock_image(name.clone())? else {
            let dir = dir.display();
            log::warn!(
                "read cache '{dir}': another mount uses it for this image, so this one fetches into a temporary file"
            );
            return Self::temporary(size, cap);
        };
        let (data, _) = files.open_or_create(DATA_FILE).map_err(io)?;
        let units = Units::new();
        let persistent = Persistent::open(files, image, cap, &data, &units).map_err(io)?;
        persistent.dir.touch();
        let mut cache = Self::new(data, units, size, cap);
        cache.persistent = Some(persistent);
        cache.maintain();
        Ok(cache)
    }

    /// Whether the cache outlives this process.
    pub(crate) fn is_persistent(&self) -> bool {
        self.persistent.is_some()
    }

    /// Adapts the limit of a persistent cache to what others in its directory take; to be called every
    /// few seconds. Waits for the host.
    pub(crate) fn maintain(&self) {
        let Some(persistent) = &self.persistent else { return };
        match persistent.dir.others() {
            Ok(others) => {
                self.has_idle_images.store(true, Ordering::Relaxed);
                self.set_limit(&others);
            }
            Err(error) => log::debug!("the directory of a read cache cannot be listed: {error}"),
        }
        self.evict_to_limits();
    }

    /// Takes what others leave of the limit of the directory. Those who use it now give up what is above
    /// an equal part; what nobody uses counts until it is removed.
    fn set_limit(&self, others: &OtherImages) {
        let left = self.dir_cap.saturating_sub(others.bytes);
        let without_idle = self.dir_cap.saturating_sub(others.idle_bytes());
        let share = (self.dir_cap / (others.live + 1)).min(without_idle);
        let least = MIN_CAP.min(self.dir_cap / 8);
        self.cap.store(left.max(share).max(least), Ordering::Relaxed);
    }

    /// Removes images that nobody uses, to have `needed` bytes more. Returns whether there are more.
    pub(super) fn remove_idle_images(&self, needed: u64) -> bool {
        let Some(persistent) = &self.persistent else { return false };
        if !self.has_idle_images.swap(false, Ordering::Relaxed) {
            return false;
        }
        let Ok(mut others) = persistent.dir.others() else { return false };
        let before = self.cap.load(Ordering::Relaxed);
        persistent.dir.remove_idle(&mut others, needed);
        self.has_idle_images.store(others.has_idle(), Ordering::Relaxed);
        self.set_limit(&others);
        self.cap.load(Ordering::Relaxed) > before
    }

    pub(super) fn new(file: File, units: Units, size: u64, cap: u64) -> Self {
        let full_units = usize::try_from(cap / UNIT_SIZE).unwrap_or(usize::MAX);
        Self {
            file,
            size,
            cap: AtomicU64::new(cap),
            max_units: full_units.max(MIN_UNITS),
            units,
            overflow: Overflow::default(),
            victims: Mutex::default(),
            counters: Counters::default(),
            is_broken: AtomicBool::new(false),
            is_discarded: AtomicBool::new(false),
            persistent: None,
            dir_cap: cap,
            has_idle_images: AtomicBool::new(false),
        }
    }
}
