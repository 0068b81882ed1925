//! The parameters of a mount, complete before it is forked.

use std::path::PathBuf;

use crate::config::{CacheMode, DiskSource, DiskSpec, Flow, MountOptions, SinkSpec};
use crate::stream::context::StdioMode;

/// Policy for a base that changed under its overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnChangedBase {
    /// Refuse to open the disk.
    Refuse,
    /// Open the disk and log a warning.
    Accept,
}

/// Whether the mount runs in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DaemonMode {
    /// Run as a daemon.
    Background,
    /// Run in the caller's terminal, or under systemd (`-f`).
    Foreground,
}

/// Parameters of a mount.
pub(crate) struct MountPlan {
    /// The mountpoint; absolute.
    pub mountpoint: PathBuf,
    /// The source that the mount table shows.
    pub source: String,
    /// The disks given on the command line and in the TOML file.
    pub disks: Vec<DiskSpec>,
    /// The directory of the store; absolute.
    pub store: Option<PathBuf>,
    /// Directories below which an image may have its backing files; absolute.
    pub allow_backing: Vec<PathBuf>,
    /// Use of the kernel's page cache.
    pub cache: CacheMode,
    /// The mount options (`-o`).
    pub options: MountOptions,
    /// The log file (`--log`); absolute.
    pub log: Option<PathBuf>,
    /// Policy for a base that changed (`--force`).
    pub on_changed_base: OnChangedBase,
    /// Foreground (`-f`) or background.
    pub mode: DaemonMode,
    /// Whether streams may use the caller's standard input and output: only with `-f`, and for
    /// `cowslip run`.
    pub stdio: StdioMode,
}

impl MountPlan {
    /// Returns whether a stream is written to standard output.
    #[must_use]
    pub(crate) fn has_stdout_sink(&self) -> bool {
        self.disks.iter().any(|disk| match &disk.source {
            DiskSource::Stream(stream) => stream.flow == Flow::Out(SinkSpec::Stdout),
            DiskSource::File(_) | DiskSource::Remote(_) | DiskSource::Blank(_) => false,
        })
    }
}

/// User id and group id of the user who mounts.
pub(super) fn current_ids() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}
