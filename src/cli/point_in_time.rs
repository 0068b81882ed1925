//! A mounted disk at one moment, to be read while the disk is written.
//!
//! The daemon freezes the disk and shows it as two files, one of them with data where something
//! changed (`disk/life/differ.rs`). They are there as long as they are open.

use std::fs::File;
use std::io;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Value, json};

use super::client::Endpoint;
use super::progress::{ProgressDisplay, Verbosity};

/// A disk as it was at one moment.
pub(super) struct PointInTime {
    /// What it held.
    pub(super) file: File,
    /// As long, with data where it has changed and holes elsewhere.
    pub(super) changed: File,
    /// Its base, as the daemon tells it: `null`, `"part"`, or its path and format.
    pub(super) base: Value,
}

impl PointInTime {
    /// Has the daemon freeze the disk at `place`, or takes it as it was at snapshot `until`; what
    /// has changed is what has since snapshot `since`, or since there was only its base. `shown`:
    /// what to call the disk.
    ///
    /// # Errors
    /// A line: [`AskError`](super::client::AskError), or that its files cannot be opened.
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
