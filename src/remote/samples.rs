//! The samples of an image on a server, by which it is known: as those of a file ([`crate::identity`]),
//! but in ranges that a server can be asked for.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::answer::answer_of;
use super::transport::{IdentityCheck, ReadRanges, Transport};
use crate::host::os_error;
use crate::identity::{Identity, SampleHash, sample_positions};

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
