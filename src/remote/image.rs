//! An open image on a server, in either of its two forms.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::base::{RemoteBase, RemoteStatus};
use super::bmap::CompareError;
use super::samples::{identity_of, sampled_identity_of};
use super::writable::RemoteDisk;
use crate::config::RemoteAddress;
use crate::identity::Identity;
use crate::layer::Layer;

/// An image on a server.
#[derive(Clone)]
pub enum RemoteImage {
    /// Only read, and cached on this host.
    Cached(Arc<SharedBase>),
    /// Read and written at the server.
    Direct(Arc<RemoteDisk>),
}

/// The use of an image by one disk, or by one disk and its snapshots.
pub struct SharedBase(Arc<RemoteBase>);

impl SharedBase {
    /// Returns the image.
    pub(super) fn base(&self) -> &Arc<RemoteBase> {
        &self.0
    }
}

impl Drop for SharedBase {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::SeqCst);
    }
}

impl RemoteImage {
    /// Makes the image of `base` for one more disk.
    #[must_use]
    pub fn cached(base: Arc<RemoteBase>) -> Self {
        base.users.fetch_add(1, Ordering::SeqCst);
        Self::Cached(Arc::new(SharedBase(base)))
    }

    /// Returns the layer that reads the image.
    #[must_use]
    pub fn layer(&self) -> Arc<dyn Layer> {
        match self {
            Self::Cached(shared) => Arc::clone(shared.base()) as Arc<dyn Layer>,
            Self::Direct(disk) => Arc::clone(disk) as Arc<dyn Layer>,
        }
    }

    /// Takes any image of the same size for this one after an outage: a commit into it was cut short, and the
    /// server may still carry out changes that it was sent before.
    pub fn expect_changes(&self) {
        if let Self::Cached(shared) = self
            && let Some(transport) = shared.base().writable()
        {
            transport.set_identity_check(Arc::new(|_| Ok(true)));
        }
    }

    /// Returns what the image is known by now, as the server shows it.
    ///
    /// # Errors
    /// `ETIMEDOUT` and other errnos of the server.
    pub fn identity_now(&self) -> io::Result<Identity> {
        match self {
            Self::Cached(shared) => identity_of(shared.base().transport()),
            Self::Direct(disk) => identity_of(&**disk.transport()),
        }
    }

    /// Returns the address.
    #[must_use]
    pub fn address(&self) -> &RemoteAddress {
        match self {
            Self::Cached(shared) => shared.base().address(),
            Self::Direct(disk) => disk.address(),
        }
    }

    /// Returns what the image is known by, its size and its version or a hash of samples: as it was when
    /// it was opened, or, if it is written to, as it is now.
    ///
    /// # Errors
    /// `ETIMEDOUT` and other errnos of the server.
    pub fn identity(&self) -> io::Result<Identity> {
        match self {
            Self::Cached(shared) => Ok(shared.base().identity().clone()),
            Self::Direct(disk) => identity_of(&**disk.transport()),
        }
    }

    /// Returns size and hash of samples, by which the image can be compared with one that is elsewhere.
    ///
    /// # Errors
    /// `ETIMEDOUT` and other errnos of the server.
    pub fn sampled_identity(&self) -> io::Result<Identity> {
        match self {
            Self::Cached(shared) => sampled_identity_of(shared.base().transport()),
            Self::Direct(disk) => sampled_identity_of(&**disk.transport()),
        }
    }

    /// Returns the most bytes a second that are fetched before they are read; 0 for no limit.
    #[must_use]
    pub fn prefetch_rate(&self) -> u64 {
        match self {
            Self::Cached(shared) => shared.base().spec().prefetch_rate,
            Self::Direct(_) => 0,
        }
    }

    /// Whether there is periodic work on the image.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        match self {
            Self::Cached(shared) => shared.base().needs_maintenance(),
            Self::Direct(disk) => disk.needs_maintenance(),
        }
    }

    /// Does the periodic work, every few seconds: keeps a persistent cache in its limits and writes a trace, or notes how
    /// an image that is written to can be known again. Waits for the host, but not for the server.
    pub fn maintain(&self) {
        match self {
            Self::Cached(shared) => shared.base().maintain(),
            Self::Direct(disk) => disk.maintain(),
        }
    }

    /// Compares all of the image with its bmap, if it has one, for which it is fetched where it was not
    /// before.
    ///
    /// # Errors
    /// [`CompareError`].
    pub fn compare_all(&self, must_stop: &dyn Fn() -> bool) -> Result<(), CompareError> {
        match self {
            Self::Cached(shared) => match shared.base().sums() {
                Some(sums) => shared.base().compare_all(sums, must_stop),
                None => Ok(()),
            },
            Self::Direct(_) => Ok(()),
        }
    }

    /// Returns the bytes that do not match the bmap of the image, once there are any.
    #[must_use]
    pub fn mismatch(&self) -> Option<&Range<u64>> {
        match self {
            Self::Cached(shared) => shared.base().mismatch(),
            Self::Direct(_) => None,
        }
    }

    /// Returns what was fetched so far; `None` for an image that is not cached.
    #[must_use]
    pub fn status(&self) -> Option<RemoteStatus> {
        match self {
            Self::Cached(shared) => Some(shared.base().status()),
            Self::Direct(_) => None,
        }
    }
}
