//! A mounted disk frozen at a point in time, to be read while the disk is written.
//!
//! The daemon freezes the disk and shows it as two files, one of which has data wherever something
//! changed (`disk/history/diff.rs`). The files exist as long as they are open.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::client::Endpoint;
use super::progress::{ProgressDisplay, Verbosity};

/// A disk at a point in time.
pub(super) struct PointInTime {
    /// Contents of the disk.
    pub(super) file: File,
    /// A file of the same size, with data where the disk has changed and holes elsewhere.
    pub(super) changed: File,
    /// Base of the disk, as reported by the daemon: `null`, `"part"`, or its path and format.
    pub(super) base: Value,
}

impl PointInTime {
    /// Asks the daemon to freeze the disk at `place`, or takes its snapshot `until`. The changes
    /// are those since snapshot `since`, or relative to the base. `shown` is the name of the disk
    /// in messages.
    ///
    /// # Errors
    /// [`AskError`](super::client::AskError), or a line for the user when the files cannot be
    /// opened.
    pub(super) fn freeze(
        place: &Endpoint,
        shown: &Path,
        since: Option<&str>,
        until: Option<&str>,
        verbosity: Verbosity,
    ) -> anyhow::Result<Self> {
        let mut progress = ProgressDisplay::new(verbosity);
        let request = json!({ "op": "difference", "since": since, "until": until });
        let found = place.ask(&request, |now| progress.show(now));
        progress.end();
        let found = found?;
        let open = |key: &str| -> io::Result<File> {
            place.open_named("snapshots", found[key].as_str().unwrap_or_default())
        };
        let failed = || format!("cannot read '{}'", shown.display());
        let file = open("file").with_context(failed)?;
        let changed = open("changed").with_context(failed)?;
        Ok(Self { file, changed, base: found["base"].clone() })
    }
}
