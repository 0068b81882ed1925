//! Commit: writes the changes of an overlay that is not mounted into its base.

use std::io;
use std::path::{Path, PathBuf};

use super::{CLOSE_TIMEOUT, OfflineError};
use crate::disk::{self, Disk, Force, OpenContext, OperationError};
use crate::overlay::stack::{BaseRecord, Stack};
use crate::overlay::{Usage, persist};

/// An overlay that is opened for a commit.
pub(crate) struct OfflineCommit {
    disk: Disk,
    base: PathBuf,
}

impl OfflineCommit {
    /// Opens the overlay in `dir`, which must not be a disk of a store.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub(crate) fn open(dir: &Path) -> Result<Self, OfflineError> {
        let failed = || OfflineError::overlay(dir);
        let stack = persist::open_overlay_dir(dir).and_then(|dir| Stack::read(&dir));
        let stack = stack.map_err(failed())?;
        let base = match &stack.base {
            BaseRecord::File { path, .. } => path.clone(),
            BaseRecord::Remote { address, .. } => PathBuf::from(address),
            BaseRecord::Blank { .. } => {
                return Err(OfflineError::NothingToCommitTo(dir.to_owned()));
            }
        };
        let name = dir.file_name().map_or("overlay".into(), |name| name.to_string_lossy());
        let mut spec = disk::spec_over(&name, &stack.base).map_err(failed())?;
        disk::check_recorded_base(&spec)?;
        spec.overlay = Some(dir.to_owned());
        // The commit itself refuses a base that changed, even with force.
        let context = OpenContext { force: true, ..OpenContext::unmounted() };
        let disk = disk::open(&spec, &context)?.disk;
        Ok(Self { disk, base })
    }

    /// Recorded path or address of the base, which the commit writes to.
    #[must_use]
    pub(crate) fn base(&self) -> &Path {
        &self.base
    }

    /// Bytes done so far and bytes in all.
    #[must_use]
    pub(crate) fn progress(&self) -> (u64, u64) {
        self.disk.progress()
    }

    /// Commits until `is_cancelled` returns true, and returns the number of bytes committed. A
    /// commit that is interrupted is finished by the next one.
    ///
    /// # Errors
    /// [`OperationError`].
    pub(crate) fn run(&self, is_cancelled: &dyn Fn() -> bool) -> Result<Usage, OperationError> {
        Ok(self.disk.commit(Force::No, is_cancelled)?.committed)
    }

    /// Closes the overlay.
    ///
    /// # Errors
    /// The host's errno.
    pub(crate) fn close(self) -> io::Result<()> {
        self.disk.close(CLOSE_TIMEOUT)
    }
}
