//! Work on overlays that are not mounted: check, repair, rebase, commit, import.
//!
//! Everything here holds the overlay's lock for as long as it works, so that no daemon has the
//! overlay at the same time. The commands of the same names parse, call this, and print.
//!
//! ```text
//!   PATH ──target──▶ one overlay, or each disk of a store
//!                      │
//!                      ├─check──▶  report; with repair, what the next mount would do anyway
//!                      ├─rebase─▶  the `stack` names the base at its new path
//!                      └─commit─▶  the base has the changes, the overlay has none
//!   IMAGE ──import──▶ an overlay over the image's backing file
//! ```

pub(crate) mod check;
pub(crate) mod commit;
pub(crate) mod import;
pub(crate) mod rebase;
mod store_check;
mod target;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub(crate) use self::store_check::{StoreFinding, StoreFindingKind, StoreOutcome, check_store};
pub(crate) use self::target::{
    OverlayTarget, is_in_store, is_store, overlay_targets, single_target,
};
use crate::base::BaseError;
use crate::disk::OpenError;
use crate::overlay::error::OverlayError;
use crate::store::StoreError;

/// Time limit for running requests when a disk is closed; there are none.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);

/// The reason why work on an overlay that is not mounted failed; one line for the user.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OfflineError {
    /// The path leads to a file.
    #[error("'{}' is a file: name the directory of an overlay or a store", .0.display())]
    File(PathBuf),
    /// The directory is something else.
    #[error("'{}' is no overlay and no store: it holds neither 'stack' nor 'names'", .0.display())]
    NotAnOverlay(PathBuf),
    /// The directory is a store, where one disk must be named.
    #[error("'{}' is a store: name one of its disks, '{}/names/NAME'", .0.display(), .0.display())]
    Store(PathBuf),
    /// The overlay cannot be opened, locked or written.
    #[error("overlay '{}'{}{error}", dir.display(), separator(error))]
    Overlay {
        /// Directory of the overlay.
        dir: PathBuf,
        /// The overlay's error.
        error: OverlayError,
    },
    /// The host failed.
    #[error("{what}: {error}")]
    Host {
        /// What was being done, and to which file.
        what: String,
        /// The host's error.
        error: io::Error,
    },
    /// The base of a blank disk cannot move.
    #[error("overlay '{}' is over a blank disk: there is no base that could move", .0.display())]
    NoBase(PathBuf),
    /// The overlay has a blank disk for its base.
    #[error("overlay '{}': its base is blank: there is nothing to commit to", .0.display())]
    NothingToCommitTo(PathBuf),
    /// The base has a format that this version does not read.
    #[error("overlay '{}' has a base of format {format}: use a newer cowslip", dir.display())]
    Format {
        /// Directory of the overlay.
        dir: PathBuf,
        /// The recorded format.
        format: String,
    },
    /// The file is not the base of the overlay.
    #[error(
        "'{base}' is not the base of overlay '{}' ({difference}): name the right one, or use --force and risk nonsense",
        dir.display()
    )]
    OtherBase {
        /// The base that was named.
        base: String,
        /// Directory of the overlay.
        dir: PathBuf,
        /// How the file differs from the recorded base.
        difference: String,
    },
    /// The path of the new overlay is taken.
    #[error("'{}' is there already: name a new directory", .0.display())]
    Exists(PathBuf),
    /// An earlier import left a part of an overlay behind.
    #[error("'{}' is left of an import that was cut short: remove it", .0.display())]
    Leftover(PathBuf),
    /// A base cannot be opened.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A disk cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A store cannot be opened.
    #[error(transparent)]
    OpenStore(#[from] StoreError),
}

/// The text between an overlay's path and its error: what the host says is no continuation of the
/// sentence.
fn separator(error: &OverlayError) -> &'static str {
    if matches!(error, OverlayError::Io { .. }) { ": " } else { " " }
}

impl OfflineError {
    /// Adds the directory of the overlay to an error of the overlay.
    fn overlay(dir: &Path) -> impl FnOnce(OverlayError) -> Self {
        let dir = dir.to_owned();
        move |error| Self::Overlay { dir, error }
    }

    /// Adds what was being done to an error of the host.
    fn host(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |error| Self::Host { what, error }
    }
}
