//! Opening: from a disk's spec to a disk.
//!
//! ```text
//!   open ──┬─> stream                              a stream, which has no layers
//!          └─> layered ──> base::open
//!                 ├─ mode=rw, mode=ro              the base alone
//!                 ├─ no overlay=                   a temporary overlay
//!                 ├─ reflink                       a reflink overlay
//!                 └─ persistent                    an overlay directory: base_match checks the base
//!   stored: the disks of a store, whose `stack` says what they are based on
//! ```

mod base_match;
mod context;
mod error;
mod layered;
mod notes;
mod opened;
mod owner;
mod persistent;
mod reflink;
mod stored;
mod stream;

use std::sync::Arc;

pub use self::context::OpenContext;
pub use self::error::OpenError;
use self::layered::{complete, open_layers};
pub use self::opened::OpenedDisk;
pub(super) use self::persistent::new_stack;
pub(super) use self::stored::COMMAND_IN_STORE;
pub use self::stored::{
    check_recorded_base, clone_stored, create_blank, create_stored, open_stored, spec_over,
};
use crate::config::{DiskSource, DiskSpec};
use crate::layer::Wait;
use crate::overlay::persist::{self, OverlayPath};

/// Opens the disk that `spec` describes.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn open(spec: &DiskSpec, context: &OpenContext<'_>) -> Result<OpenedDisk, OpenError> {
    if let DiskSource::Stream(stream) = &spec.source {
        return stream::open(spec, stream, context);
    }
    let dir = spec
        .overlay
        .as_deref()
        .map(|dir| persist::resolve_overlay_path(dir).map_err(OpenError::overlay(dir)));
    let spec = &DiskSpec { overlay: dir.transpose()?, ..spec.clone() };
    let overlay = spec.overlay.as_deref().map(|dir| OverlayPath { dir, layers: None });
    let opened = complete(spec, open_layers(spec, overlay, context, &Arc::default())?)?;
    if opened.disk.attributes(Wait::No).is_err() {
        // The base is on another host: it is waited for now, so that no stat has to wait later.
        if let Err(error) = opened.disk.attributes(Wait::Yes) {
            log::debug!("{}: its extents are not known: {error}", spec.name);
        }
    }
    Ok(opened)
}
