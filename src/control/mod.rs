//! The `.cowslip` directory inside a mount: what the command line talks to.
//!
//! ```text
//!   .cowslip/status          JSON of the mount          .cowslip/DISK/status    JSON of the disk
//!   .cowslip/log             the daemon's log           .cowslip/DISK/map       its extents as JSON
//!   .cowslip/ctl             requests to the mount      .cowslip/DISK/ctl       requests to the disk
//!                                                       .cowslip/DISK/snapshots/NAME  as it was
//! ```
//!
//! It is reachable by name and not listed. Its files are direct I/O files of size 0. A request is
//! one line of JSON written to a `ctl`; the answer is lines of JSON, the last with `ok` or
//! `error`, and a `progress` line at least every second before it.
//!
//! Names change while a request is on its way. One about a disk may say in `inode` which one it
//! means, by the inode number of the mounted file: it is refused (`stale`) when it has reached
//! another. What it reached stays the same from then on: a control directory belongs to a disk, not
//! to a name, and the disk that was checked is the one that is acted on.

mod disks;
mod history;
mod map;
mod node;
mod request;
mod session;
mod status;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use serde_json::Value;

pub use self::disks::{Invalidation, Invalidator};
pub use self::map::MapText;
pub use self::node::ControlNode;
pub use self::request::is_valid_request;
use self::request::{HydrateAction, matches_inode, stale_answer, unmount_summary};
pub use self::session::{ControlSession, REQUEST_THREADS};
pub use self::status::StatusAudience;
use crate::catalog::Catalog;
use crate::config::CacheMode;

/// What the control files know of the mount.
pub struct Control {
    /// The disks.
    pub catalog: Arc<Catalog>,
    /// What the mount table shows as its source.
    pub source: String,
    /// How the kernel's cache is used.
    pub cache: CacheMode,
    /// The daemon is on its way out.
    pub draining: AtomicBool,
    /// The mount's device number, once it is there.
    pub device: std::sync::OnceLock<u64>,
    /// Has the kernel forget a disk, once the mount is there.
    pub invalidator: std::sync::OnceLock<Invalidator>,
    /// Requests that are being worked on.
    pub running_requests: AtomicUsize,
}

impl Control {
    /// What others read who want an overlay of this mount.
    #[must_use]
    pub fn holder(&self) -> crate::overlay::persist::Holder {
        crate::overlay::persist::Holder {
            pid: std::process::id(),
            mountpoint: self.catalog.mountpoint.to_string_lossy().into_owned(),
            draining: self.draining.load(Ordering::SeqCst),
        }
    }
}

fn json_line(value: &Value) -> Vec<u8> {
    let mut text = value.to_string().into_bytes();
    text.push(b'\n');
    text
}
