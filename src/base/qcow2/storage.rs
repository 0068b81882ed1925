//! The bytes of an image as a storage of the imago library, which reads tables and compressed
//! clusters through it.

use std::fmt;
use std::io;
use std::sync::Arc;

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::drivers::CommonStorageHelper;

use crate::layer::{self, Layer};

/// An image, read-only.
pub(super) struct LayerStorage {
    image: Arc<dyn Layer>,
    helper: CommonStorageHelper,
}

impl LayerStorage {
    pub(super) fn new(image: Arc<dyn Layer>) -> Self {
        Self { image, helper: CommonStorageHelper::default() }
    }
}

impl fmt::Debug for LayerStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LayerStorage").field("size", &self.image.size()).finish_non_exhaustive()
    }
}

impl fmt::Display for LayerStorage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "an image of {} bytes", self.image.size())
    }
}

impl Storage for LayerStorage {
    fn size(&self) -> io::Result<u64> {
        Ok(self.image.size())
    }

    /// Reads however long that takes; zeros past the end, as the library expects.
    unsafe fn pure_readv(&self, bufv: IoVectorMut<'_>, offset: u64) -> io::Result<()> {
        let mut at = offset;
        for mut buf in bufv.into_inner() {
            layer::read_exact(&*self.image, &mut buf, at)?;
            at = at.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    /// Refused: an image is only read.
    unsafe fn pure_writev(&self, _bufv: IoVector<'_>, _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    /// Does nothing: this storage caches nothing.
    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }
}
