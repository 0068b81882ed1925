//! An open image on a server, in either of its two forms.

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::answer::answer_of;
use super::base::{RemoteBase, RemoteStatus};
use super::transport::{IdentityCheck, ReadRanges, Transport};
use super::writable::RemoteDisk;
use crate::config::RemoteAddress;
use crate::host::os_error;
use crate::identity::{Identity, SampleHash, sample_positions};
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

    /// Whether there is periodic work on the image.
    #[must_use]
    pub fn needs_maintenance(&self) -> bool {
        match self {
            Self::Cached(shared) => shared.base().cache().is_persistent(),
            Self::Direct(disk) => disk.needs_maintenance(),
        }
    }

    /// Does the periodic work, every few seconds: keeps a persistent cache in its limits, or notes how
    /// an image that is written to can be known again. Waits for the host, but not for the server.
    pub fn maintain(&self) {
        match self {
            Self::Cached(shared) => shared.base().cache().maintain(),
            Self::Direct(disk) => disk.maintain(),
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

/// A sample of an image, in a range that a server can be asked for.
pub(super) struct Sample {
    /// The range to be read: the sample in whole blocks of the server's.
    pub(super) range: Range<u64>,
    /// The sample in the bytes of that range.
    inside: Range<usize>,
}

impl Sample {
    /// Returns the samples of an image of `size` bytes, in blocks of `alignment` bytes.
    pub(super) fn all(size: u64, alignment: u64) -> impl Iterator<Item = Self> {
        sample_positions(size).into_iter().map(move |(at, len)| {
            let start = at - at % alignment;
            let from = usize::try_from(at - start).unwrap_or(usize::MAX);
            let end = (at + len as u64).next_multiple_of(alignment).min(size);
            Self { range: start..end, inside: from..from.saturating_add(len) }
        })
    }

    /// Returns the hash of this sample alone in `bytes`, those of its range.
    pub(super) fn hash(&self, bytes: &[u8]) -> io::Result<SampleHash> {
        let mut hash = SampleHash::default();
        self.add_to(&mut hash, bytes)?;
        Ok(hash)
    }

    /// Adds the sample in `bytes`, those of its range, to `hash`.
    fn add_to(&self, hash: &mut SampleHash, bytes: &[u8]) -> io::Result<()> {
        hash.add(bytes.get(self.inside.clone()).ok_or_else(|| os_error(libc::EIO))?);
        Ok(())
    }
}

/// Returns what the image behind `transport` is known by: its size, and its version or else a hash of
/// samples.
pub(super) fn identity_of(transport: &dyn Transport) -> io::Result<Identity> {
    match transport.version() {
        Some(hash) => Ok(Identity { size: transport.size(), mtime: None, inode: None, hash }),
        None => sampled_identity_of(transport),
    }
}

/// Returns size and hash of samples of the image behind `transport`, all of which are asked for at
/// once.
pub(super) fn sampled_identity_of(transport: &dyn Transport) -> io::Result<Identity> {
    let size = transport.size();
    let alignment = u64::from(transport.limits().alignment.max(1));
    let asked: Vec<_> = Sample::all(size, alignment)
        .map(|sample| {
            let answer = answer_of(|done| transport.read(sample.range.clone(), done));
            (sample, answer)
        })
        .collect();
    let mut hash = SampleHash::default();
    for (sample, answer) in asked {
        sample.add_to(&mut hash, &answer.wait()?)?;
    }
    Ok(Identity { size, mtime: None, inode: None, hash: hash.finish() })
}

/// Returns the check that the image of a new connection is the one that `identity` is of.
pub(super) fn check_identity(transport: &dyn Transport, identity: &Identity) -> IdentityCheck {
    let alignment = u64::from(transport.limits().alignment.max(1));
    let (size, expected) = (identity.size, identity.hash.clone());
    Arc::new(move |read: ReadRanges<'_>| {
        let samples: Vec<_> = Sample::all(size, alignment).collect();
        let ranges: Vec<_> = samples.iter().map(|sample| sample.range.clone()).collect();
        let mut hash = SampleHash::default();
        for (sample, bytes) in samples.iter().zip(read(&ranges)?) {
            sample.add_to(&mut hash, &bytes)?;
        }
        Ok(hash.finish() == expected)
    })
}
