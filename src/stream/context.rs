//! The facts about a mount that its streams depend on.

use std::path::Path;

/// Whether commands inherit our standard output, and whether a stream may use standard input or
/// output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdioMode {
    /// In the foreground and in `run`.
    Available,
    /// In a daemon, which has no standard input and output.
    Unavailable,
}

/// The facts about the mount that opening a sink or a source needs.
#[derive(Clone, Copy, Debug)]
pub struct StreamContext<'a> {
    /// The canonical path of the mountpoint. No sink or source may lead into it.
    pub mountpoint: &'a Path,
    /// The `st_dev` of the mount, once it is mounted.
    pub mount_dev: Option<u64>,
    /// Whether standard input and output are available.
    pub stdio: StdioMode,
}
