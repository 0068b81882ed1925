//! Creating and opening persistent overlays, one process at a time.
//!
//! A new overlay is built under a temporary name beside its place and renamed into place when all
//! of it is durable, so nobody ever finds half an overlay. The lock is on the inode of the top
//! layer's `data`, so hard links, bind mounts and renames do not get around it. The file `holder`
//! only tells people which daemon has the lock.
//!
//! - `path`: the place of an overlay, and whether the way to it is trusted. `staging`: the temporary
//!   name. `build`: creating. `open`: locking and opening.
//! - `overlay_dir`: the open directory of an overlay. `layer_dir`: that of one layer.

mod build;
mod layer_dir;
mod open;
mod overlay_dir;
mod path;
pub(super) mod staging;

pub use self::build::{MakeData, NewLayer, NewOverlay, build, create};
pub(crate) use self::layer_dir::remove_layer;
pub(super) use self::layer_dir::{
    data_file_in, empty_data, end_missing, link_segment, open_layer_files, open_sealed,
};
pub(super) use self::open::take_lock;
pub use self::open::{LockedOverlay, lock_overlay};
pub use self::overlay_dir::{Holder, OpenedOverlay, OverlayDir};
pub(super) use self::path::parent_for_new;
pub use self::path::{OverlayPath, exists, open_overlay_dir, resolve_overlay_path};
pub(crate) use self::path::{STORE_DIRS, is_overlay_or_store};
pub(crate) use self::staging::STAGING_PREFIX;
pub(super) use self::staging::StagingDir;
