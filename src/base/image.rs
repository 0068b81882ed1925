//! The image behind a base: its bytes, wherever they are, and what messages call it.
//!
//! The readers of formats take the bytes from a [`Layer`]. Only what belongs to a file of the host,
//! such as its place among other files, is asked of the file, and an image on a server has none.

use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use super::file::BaseFile;
use crate::layer::Layer;

/// An image, open, in a format that is still to be read.
pub struct BaseImage {
    /// The bytes of the image.
    pub(in crate::base) layer: Arc<dyn Layer>,
    /// The path of the file, or the name of an image on a server, as messages show it.
    pub(in crate::base) name: PathBuf,
    /// The file of the host; `None` for an image on a server.
    pub(in crate::base) file: Option<BaseFile>,
}

impl BaseImage {
    /// Creates the image on a server whose bytes `layer` reads. `shown_name` is for messages, and
    /// must hold no secrets.
    #[must_use]
    pub fn on_server(layer: Arc<dyn Layer>, shown_name: &str) -> Self {
        Self { layer, name: shown_name.into(), file: None }
    }

    /// Returns the file of the host, with its path.
    pub(in crate::base) fn host_file(&self) -> Option<(PathBuf, Arc<File>)> {
        let file = self.file.as_ref()?;
        Some((self.name.clone(), Arc::clone(&file.file)))
    }
}

/// An image that was opened.
pub(super) struct OpenedImage {
    /// The layer that reads it.
    pub(super) layer: Arc<dyn Layer>,
    /// The other files that it is read from, the nearest first.
    pub(super) needs: Vec<(PathBuf, Arc<File>)>,
}

impl From<BaseFile> for BaseImage {
    fn from(file: BaseFile) -> Self {
        let (name, layer) = (file.real_path.clone(), Arc::clone(&file.raw));
        Self { layer, name, file: Some(file) }
    }
}
