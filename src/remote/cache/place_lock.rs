//! Who keeps an image of an address in a directory, and who changes it.
//!
//! A cache is known by what the image holds, and a writer changes just that: so the caches of one address
//! share a lock besides those of their own, which a writer has alone.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::FlockOperation;
use sha2::{Digest, Sha256};

use super::dir::{CacheDir, LOCK_TIMEOUT};
use super::error::CacheError;
use crate::host;

/// The use of the images of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PlaceUse {
    /// What was fetched is kept.
    Keep,
    /// The image is changed.
    Change,
}

/// A lock on what a directory keeps of one address (flock(2)).
#[derive(Debug)]
pub(crate) struct PlaceLock(File);

impl PlaceLock {
    /// Locks in `dir`, which is made where there is none, what is kept of `address`. `None` while others
    /// use it so that the two exclude each other.
    ///
    /// # Errors
    /// [`CacheError`].
    pub(crate) fn take(
        dir: &Path,
        address: &str,
        use_: PlaceUse,
    ) -> Result<Option<Self>, CacheError> {
        let hash: String =
            Sha256::digest(address).iter().map(|byte| format!("{byte:02x}")).collect();
        let name = format!("{hash}.lock");
        let io = |error| CacheError::Dir { dir: dir.join(&name), error };
        let file = CacheDir::open_or_create(dir)?.open_or_create_file(&name).map_err(io)?;
        let lock = Self(file);
        Ok(lock.change(use_).map_err(io)?.then_some(lock))
    }

    /// Changes the use; false while others are in the way, with no lock then.
    pub(crate) fn change(&self, use_: PlaceUse) -> io::Result<bool> {
        let operation = match use_ {
            PlaceUse::Keep => FlockOperation::NonBlockingLockShared,
            PlaceUse::Change => FlockOperation::NonBlockingLockExclusive,
        };
        host::lock_within(&self.0, operation, LOCK_TIMEOUT)
    }
}
