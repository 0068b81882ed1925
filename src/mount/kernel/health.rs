//! Whether a mount lives: asked with a bound, for a mount may never answer.

use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use rustix::io::Errno;

use super::MountHandle;
use crate::mount::mountinfo::entry_at;

/// The state of a mount, of whatever type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MountHealth {
    /// Nothing is mounted at exactly this path.
    NotMounted,
    /// It answers; or it does not let us ask (root, too, at a user's mount without `allow_other`),
    /// or does not answer in time: not known to be dead.
    Alive,
    /// Its daemon is gone: `ENOTCONN`.
    Dead,
}

/// How long a mount may take to show that it lives. A dead one answers at once.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// The state of the mount at `mountpoint`. Waits 2 seconds at most.
pub fn mount_health(mountpoint: &Path) -> MountHealth {
    match entry_at(mountpoint) {
        None => MountHealth::NotMounted,
        Some(entry) => probe(entry.mountpoint),
    }
}

impl MountHandle {
    /// As [`condition`], of this mount.
    #[must_use]
    pub fn health(&self) -> MountHealth {
        match self.is_mounted() {
            true => probe(self.access_path()),
            false => MountHealth::NotMounted,
        }
    }
}

pub(super) fn probe(mountpoint: PathBuf) -> MountHealth {
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
        return MountHealth::Alive;
    };
    let Ok(error) = answered.recv_timeout(PROBE_TIMEOUT) else {
        return MountHealth::Alive;
    };
    // Joined, so that a later fork finds a process without threads. It only sends, so no panic.
    let _ = asking.join();
    match error {
        // ECONNABORTED: the connection was aborted through /sys/fs/fuse.
        Some(Errno::NOTCONN | Errno::CONNABORTED) => MountHealth::Dead,
        _ => MountHealth::Alive,
    }
}
