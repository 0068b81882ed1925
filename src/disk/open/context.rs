//! What the opening of a disk takes from its mount.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::stream::context::StdioMode;

/// The settings of a mount that apply to all its disks.
pub struct OpenContext<'a> {
    /// The canonical path of the mountpoint.
    pub mountpoint: &'a Path,
    /// The mount's device number, once it is mounted.
    pub mount_dev: Option<u64>,
    /// User id of the mounting user: the owner of disks whose keys name no other.
    pub uid: u32,
    /// Group id of the mounting user.
    pub gid: u32,
    /// Whether a base that changed under its overlay is used all the same.
    pub force: bool,
    /// Directories that may contain the files which a base refers to, besides the base's own
    /// directory.
    pub allow_backing: Vec<PathBuf>,
    /// Whether streams may use the caller's standard input and output.
    pub stdio: StdioMode,
    /// Directories whose file system was probed already.
    pub probed_dirs: Mutex<HashSet<PathBuf>>,
}

impl OpenContext<'static> {
    /// The context of a disk that is opened without being mounted, by the current user.
    #[must_use]
    pub fn unmounted() -> Self {
        Self {
            mountpoint: Path::new("/proc/self/mountpoint"),
            mount_dev: None,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            force: false,
            allow_backing: Vec::new(),
            stdio: StdioMode::Unavailable,
            probed_dirs: Mutex::new(HashSet::new()),
        }
    }
}
