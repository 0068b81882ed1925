//! Whether a mount lives: asked with a bound, for a mount may never answer.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;

use super::Held;
use crate::mount::mountinfo::entry_at;

/// The state of a mount, of whatever type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is mounted at exactly this path.
    NotMounted,
    /// It answers; or it does not let us ask (root, too, at a user's mount without `allow_other`),
    /// or does not answer in time: not known to be dead.
    Alive,
    /// Its daemon is gone: `ENOTCONN`.
    Dead,
}

/// How long a mount may take to show that it lives. A dead one answers at once.
const PROBE: Duration = Duration::from_secs(2);

/// The state of the mount at `mountpoint`. Waits 2 seconds at most.
pub fn condition(mountpoint: &Path) -> Condition {
    match entry_at(mountpoint) {
        None => Condition::NotMounted,
        Some(entry) => probe(entry.mountpoint),
    }
}

impl Held {
    /// As [`condition`], of this mount.
    #[must_use]
    pub fn condition(&self) -> Condition {
        match self.is_there() {
            true => probe(self.door()),
            false => Condition::NotMounted,
        }
    }
}

pub(super) fn probe(mountpoint: PathBuf) -> Condition {
    let (answer, answered) = mpsc::channel();
    // A thread of its own, since nothing else bounds a stat. One that hangs ends with the mount
    // or with this process.
    let asking = thread::Builder::new().name("probe".into()).spawn(move || {
        // FORCE_SYNC: cached attributes outlive the daemon.
        let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::NO_AUTOMOUNT;
        let asked = rustix::fs::statx(CWD, &mountpoint, flags, StatxFlags::BASIC_STATS);
        let _ = answer.send(asked.err());
    });
    let Ok(asking) = asking else {
        return Condition::Alive;
    };
    let Ok(error) = answered.recv_timeout(PROBE) else {
        return Condition::Alive;
    };
    // Joined, so that a later fork finds a process without threads. It only sends, so no panic.
    let _ = asking.join();
    match error {
        // ECONNABORTED: the connection was aborted through /sys/fs/fuse.
        Some(Errno::NOTCONN | Errno::CONNABORTED) => Condition::Dead,
        _ => Condition::Alive,
    }
}
