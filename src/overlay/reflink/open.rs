//! Creating and opening reflink overlays, one process at a time.
//!
//! As with block maps, a new overlay is built under a temporary name and renamed into place once it
//! is durable; the lock is on the inode of `data`.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::snapshots::{remove_unfinished_snapshot, revert_data};
use super::{Reflink, ReflinkError, RevertSource, intent};
use crate::config::OverlayKind;
use crate::confined::{self, FileAccess};
use crate::host;
use crate::host::file_system::HostFs;
use crate::overlay::error::OverlayError;
use crate::overlay::persist::{
    self, OverlayDir, StagingDir, open_overlay_dir, parent_for_new, staging,
};
use crate::overlay::stack::Stack;
use crate::process::explain_size_error;

/// A reflink overlay that is open.
pub struct OpenedReflink {
    /// The layer.
    pub layer: Reflink,
    /// The directory of the overlay, with its `stack` and its lock.
    pub dir: OverlayDir,
    /// A revert or reset that a crash had interrupted and that is now finished.
    pub finished: Option<RevertSource>,
}

/// A base whose blocks a new overlay shares.
pub struct SharedBase<'a> {
    /// The base's path, for messages.
    pub path: &'a Path,
    /// The base, a regular file.
    pub file: &'a Arc<File>,
}

/// Returns the kind of the overlay at `dir`, or `None` when there is no overlay yet.
///
/// # Errors
/// [`OverlayError`]: `dir` is something else, or its `stack` cannot be read.
pub fn overlay_kind(dir: &Path) -> Result<Option<OverlayKind>, OverlayError> {
    if !persist::exists(dir)? {
        return Ok(None);
    }
    Ok(Some(Stack::read(&open_overlay_dir(dir)?)?.kind))
}

/// Creates the overlay `stack` at `dir`, durably: a reflink copy of `base`, resized to `size` bytes
/// if that is given.
///
/// # Errors
/// [`ReflinkError`]; nothing is left behind in that case.
pub fn create(
    dir: &Path,
    stack: Stack,
    base: &SharedBase<'_>,
    size: Option<u64>,
) -> Result<OpenedReflink, ReflinkError> {
    let parent = parent_for_new(dir)?;
    staging::remove_all_abandoned(parent);
    let staging_dir =
        StagingDir::new(parent).map_err(OverlayError::io("making a directory beside it"))?;
    let data = confined::create_file(staging_dir.dir(), "data")
        .map_err(OverlayError::io("making its data"))?;
    rustix::fs::ioctl_ficlone(&data, base.file)
        .map_err(|error| sharing_error(error.into(), &data, base.path))?;
    let fill = || -> io::Result<File> {
        if let Some(size) = size {
            data.set_len(size).map_err(explain_size_error)?;
        }
        data.sync_all()?;
        confined::create_dir(staging_dir.dir(), "snapshots")
    };
    let snapshots = fill().map_err(OverlayError::io("making its data durable"))?;
    rustix::fs::flock(&data, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| OverlayError::io("locking it")(error.into()))?;
    stack.write(staging_dir.dir())?;
    let dir = staging_dir
        .move_into_place(dir, parent)
        .map_err(OverlayError::io("putting it in its place"))?;
    let files = ReflinkDir { stack, dir, data, snapshots };
    Ok(files.into_layer(base.file, None)?)
}

/// Explains why the host does not share blocks.
fn sharing_error(error: io::Error, data: &File, base: &Path) -> ReflinkError {
    match error.raw_os_error() {
        Some(libc::EXDEV) => ReflinkError::Elsewhere(base.to_owned()),
        Some(libc::EOPNOTSUPP | libc::ENOTTY | libc::EINVAL | libc::ENOSYS) => {
            let fs = HostFs::of(data).map_or("its file system", |fs| fs.name);
            ReflinkError::NoReflinks { fs, error }
        }
        _ => OverlayError::io("sharing the base's blocks")(error).into(),
    }
}

/// The open files of an overlay.
struct ReflinkDir {
    stack: Stack,
    dir: File,
    data: File,
    snapshots: File,
}

impl ReflinkDir {
    fn into_layer(
        self,
        base: &Arc<File>,
        finished: Option<RevertSource>,
    ) -> Result<OpenedReflink, OverlayError> {
        let open = || -> io::Result<(Reflink, File, File)> {
            let (dir, lock) = (self.dir.try_clone()?, self.data.try_clone()?);
            let data = Arc::new(self.data);
            let layer = Reflink::new(data, Arc::clone(base), self.dir, self.snapshots)?;
            Ok((layer, dir, lock))
        };
        let (layer, dir, lock) = open().map_err(OverlayError::io("opening its data"))?;
        // A reflink overlay has no layers, so nothing is looked up in their directory.
        let layers_dir = dir.try_clone().map_err(OverlayError::io("opening it"))?;
        let dir = OverlayDir::new(self.stack, dir, layers_dir, lock);
        Ok(OpenedReflink { layer, dir, finished })
    }
}

/// A reflink overlay that is locked and not changed yet.
pub struct LockedReflink {
    files: ReflinkDir,
}

/// Locks the reflink overlay at `dir`.
///
/// # Errors
/// [`ReflinkError`]: missing, damaged, a block map, in use.
pub fn lock_overlay(dir: &Path) -> Result<LockedReflink, ReflinkError> {
    let dir = open_overlay_dir(dir)?;
    if Stack::read(&dir)?.kind != OverlayKind::Reflink {
        return Err(ReflinkError::Blocks);
    }
    let data = confined::open_file(&dir, "data", FileAccess::AsAllowed)
        .map_err(OverlayError::io("opening its data"))?;
    persist::take_lock(&dir, &data)?;
    // Read again under the lock: the last holder may have changed the stack.
    let stack = Stack::read(&dir)?;
    let snapshots = confined::open_subdir(&dir, "snapshots")
        .map_err(OverlayError::io("opening its snapshots"))?;
    Ok(LockedReflink { files: ReflinkDir { stack, dir, data, snapshots } })
}

impl LockedReflink {
    /// Returns the stack, which names the base.
    #[must_use]
    pub fn stack(&self) -> &Stack {
        &self.files.stack
    }

    /// Returns the revert or reset that a crash has interrupted; [`open`](Self::open) finishes it.
    ///
    /// # Errors
    /// [`ReflinkError::Intent`] when the intent file is damaged; otherwise the host's errno.
    pub fn interrupted(&self) -> Result<Option<RevertSource>, ReflinkError> {
        intent::read(&self.files.dir)
    }

    /// Opens the overlay for use over `base`, which the caller has verified to be the base it was
    /// created with.
    ///
    /// # Errors
    /// [`ReflinkError`].
    pub fn open(self, base: &Arc<File>) -> Result<OpenedReflink, ReflinkError> {
        let interrupted = self.interrupted()?;
        let ReflinkDir { dir, data, snapshots, .. } = &self.files;
        remove_unfinished_snapshot(dir);
        if let Some(source) = &interrupted {
            if host::is_read_only(data) {
                let error = host::os_error(libc::EROFS);
                return Err(ReflinkError::Unfinished { of: source.clone(), error });
            }
            revert_data(source, data, base, snapshots)
                .and_then(|()| intent::clear(dir))
                .map_err(|error| ReflinkError::Unfinished { of: source.clone(), error })?;
        }
        Ok(self.files.into_layer(base, interrupted)?)
    }
}
