//! A mounted disk frozen at a point in time, to be read while the disk is written.
//!
//! The daemon freezes the disk and shows it as two files, one of which has data wherever something
//! changed (`disk/history/diff.rs`). The files exist as long as they are open.

use std::fs::File;
use std::path::Path;

use anyhow::Context as _;

use super::client::Endpoint;
use super::progress::{ProgressDisplay, Verbosity};
use crate::control::api::{DiffBaseRecord, DifferenceFiles, DiskRequest};

/// A disk at a point in time.
pub(super) struct PointInTime {
    /// Contents of the disk.
    pub(super) file: File,
    /// A file of the same size, with data where the disk has changed and holes elsewhere.
    pub(super) changed: File,
    /// Base of the disk; `None` for a blank one.
    pub(super) base: Option<DiffBaseRecord>,
}

impl PointInTime {
    /// Asks the daemon to freeze `disk`, or takes its snapshot `until`. The changes
    /// are those since snapshot `since`, or relative to the base. `shown` is the name of the disk
    /// in messages.
    ///
    /// # Errors
    /// [`AskError`](super::client::AskError), or a line for the user when the files cannot be
    /// opened.
    pub(super) fn freeze(
        disk: &Endpoint,
        shown: &Path,
        since: Option<&str>,
        until: Option<&str>,
        verbosity: Verbosity,
    ) -> anyhow::Result<Self> {
        let mut display = ProgressDisplay::new(verbosity);
        let (since, until) = (since.map(str::to_owned), until.map(str::to_owned));
        let request = DiskRequest::Difference { since, until };
        let answer = disk.ask(&request, |progress| display.show(progress));
        display.end();
        let DifferenceFiles { file, changed, base } = answer?;
        let failed = || format!("cannot read '{}'", shown.display());
        let file = disk.open_named("snapshots", &file).with_context(failed)?;
        let changed = disk.open_named("snapshots", &changed).with_context(failed)?;
        Ok(Self { file, changed, base })
    }
}
