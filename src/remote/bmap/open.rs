//! The checksums of an image, compared for as long as that is open.

use std::io;
use std::sync::Arc;

use super::sums::RangeSums;
use crate::config::RemoteAddress;
use crate::formats::bmap::Bmap;
use crate::remote::cache::Cache;

/// The checksums of an image while it is open; their thread ends with it.
pub(in crate::remote) struct OpenSums(Arc<RangeSums>);

impl OpenSums {
    /// Takes the checksums of `bmap`, of the image at `address`, and begins to compare what `cache` holds;
    /// `None` where it has none.
    ///
    /// # Errors
    /// The host's errno, when no thread can be started.
    pub(in crate::remote) fn new(
        address: &RemoteAddress,
        bmap: &Bmap,
        cache: &Arc<Cache>,
    ) -> io::Result<Option<Self>> {
        let Some(sums) = RangeSums::new(address, bmap) else { return Ok(None) };
        sums.start(cache)?;
        Ok(Some(Self(sums)))
    }

    /// Returns the ranges that have a checksum.
    pub(in crate::remote) fn ranges(&self) -> &Arc<RangeSums> {
        &self.0
    }
}

impl Drop for OpenSums {
    fn drop(&mut self) {
        self.0.close();
    }
}
