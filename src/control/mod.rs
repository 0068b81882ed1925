//! The `.cowslip` directory inside a mount: the interface of the command line.
//!
//! ```text
//!   .cowslip/status     JSON of the mount          .cowslip/DISK/status    JSON of the disk
//!   .cowslip/log        the daemon's log           .cowslip/DISK/map       its extents as JSON
//!   .cowslip/ctl        requests to the mount      .cowslip/DISK/ctl       requests to the disk
//!                                                  .cowslip/DISK/snapshots/NAME  as it was
//! ```
//!
//! The directory is reachable by name and not listed. Its files are direct I/O files of size 0. A
//! request is one line of JSON written to a `ctl`; the answer is lines of JSON, the last with `ok`
//! or `error`, and a `progress` line at least every second before that.
//!
//! Names may change while a request is on its way. A request about a disk may name the disk in
//! `inode`, by the inode number of the mounted file: it is refused (`stale`) when it reaches
//! another disk. From then on the disk stays the same: a control directory belongs to a disk, not
//! to a name, and the disk that was checked is the one that is acted on.

pub(crate) mod api;
mod disks;
mod history;
mod invalidation;
mod map;
mod node;
mod request;
mod session;
mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use parking_lot::RwLock;
use serde::Serialize;

use self::api::{Answer, Line, Outcome};
pub use self::invalidation::{Invalidation, Invalidator};
pub use self::map::MapText;
pub use self::node::ControlNode;
pub use self::request::is_valid_request;
use self::request::{matches_inode, unmount_summary};
pub use self::session::{ControlSession, REQUEST_THREADS};
pub use self::status::StatusAudience;
use crate::catalog::Catalog;
use crate::config::CacheMode;

/// The mount as the control files see it.
pub struct Control {
    /// The disks.
    pub catalog: Arc<Catalog>,
    /// The source that the mount table shows.
    pub source: String,
    /// Use of the kernel's cache.
    pub cache: CacheMode,
    /// Set once the daemon shuts down.
    pub draining: AtomicBool,
    /// The mount's device number; set once the mount exists.
    pub device: std::sync::OnceLock<u64>,
    /// Makes the kernel forget stale names and pages; set once the mount exists.
    pub invalidator: std::sync::OnceLock<Invalidator>,
    /// Number of requests in progress.
    pub running_requests: AtomicUsize,
    /// When an unmount was last told what it does to the disks. A `keep`, which changes that, has it
    /// locked, shared.
    pub summarised: RwLock<Option<Instant>>,
}

impl Control {
    /// Describes this daemon to other processes that want one of its overlays.
    #[must_use]
    pub fn holder(&self) -> crate::overlay::persist::Holder {
        crate::overlay::persist::Holder {
            pid: std::process::id(),
            mountpoint: self.catalog.mountpoint.to_string_lossy().into_owned(),
            draining: self.draining.load(Ordering::SeqCst),
        }
    }
}

/// Encodes a document or an answer as a line of JSON.
fn json_line(value: &impl Serialize) -> Vec<u8> {
    // Only a map whose keys are no strings, or a path that is not UTF-8, cannot be encoded; no
    // document holds one.
    let mut text = serde_json::to_vec(value).unwrap_or_else(|error| {
        log::error!("a control file cannot be encoded: {error}");
        Vec::new()
    });
    text.push(b'\n');
    text
}

/// Answers with a line.
fn answer_line(line: String) -> Answer {
    Ok(Outcome::Line(Line { line: Some(line) }))
}

/// Logs and answers in one line what was done.
fn log_and_answer(line: String) -> Answer {
    log::info!("{line}");
    answer_line(line)
}
