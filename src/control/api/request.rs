//! Requests to a mount and to a disk.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::stream::UnmountPolicy;

/// A request to the mount as a whole, written to `.cowslip/ctl`.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum MountRequest {
    /// Syncs every disk, reports what an unmount will discard, and ends the streams. Answered with
    /// [`Lines`](super::Lines).
    Drain {
        #[serde(default)]
        streams: UnmountPolicy,
        /// Time limit for each sink, in milliseconds; `None`: no limit.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Mounts another disk. Answered with [`Lines`](super::Lines).
    Add {
        /// The disk as on the command line of `mount`.
        disk: String,
        /// The directory where relative paths in `disk` start.
        cwd: PathBuf,
        #[serde(default)]
        force: bool,
        #[serde(default)]
        allow_backing: Vec<PathBuf>,
        #[serde(default)]
        trust: Vec<PathBuf>,
    },
    /// Removes a disk that was named on the command line or by `Add`. Answered with
    /// [`Lines`](super::Lines).
    Remove {
        name: String,
        /// The inode number of the disk that is meant; `None`: whichever has the name.
        #[serde(default)]
        inode: Option<u64>,
    },
}

/// A request to a disk, written to its `ctl`. Answered with [`Line`](super::Line) where nothing else
/// is said.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "lowercase", deny_unknown_fields)]
pub(crate) enum DiskRequest {
    /// Makes a temporary overlay persistent, in the new directory `dir`.
    Keep {
        dir: PathBuf,
        #[serde(default)]
        trust: Vec<PathBuf>,
    },
    /// Completes a stream.
    Finish {
        /// Time limit for the sink, in milliseconds; `None`: no limit.
        #[serde(default)]
        timeout_ms: Option<u64>,
    },
    /// Aborts a stream.
    Abort,
    /// Takes a snapshot of the disk; without a name, one that tells the time.
    Snapshot {
        #[serde(default)]
        name: Option<String>,
        /// Answers only once the snapshot is durable.
        #[serde(default)]
        sync: bool,
    },
    /// Lists the disk's snapshots. Answered with [`SnapshotList`](super::SnapshotList).
    Snapshots,
    /// Deletes a snapshot.
    Unsnapshot { name: String },
    /// Reverts the disk to a snapshot.
    Revert {
        name: String,
        #[serde(default)]
        force: bool,
    },
    /// Resets the disk to its base.
    Reset {
        #[serde(default)]
        force: bool,
    },
    /// Creates another disk with the same contents.
    Clone { name: String },
    /// Commits the overlay to its base.
    Commit {
        #[serde(default)]
        force: bool,
    },
    /// Prefetches the bytes from `start` to `end`.
    Prefetch {
        start: u64,
        end: u64,
        /// Copies the bytes up into the overlay.
        #[serde(default)]
        copy: bool,
    },
    /// Freezes the disk, or takes its snapshot `until`, and compares it with the snapshot `since` or
    /// with the base. Answered with [`DifferenceFiles`](super::DifferenceFiles).
    Difference {
        #[serde(default)]
        since: Option<String>,
        #[serde(default)]
        until: Option<String>,
    },
    /// Copies the base into the overlay until the base is no longer needed.
    Hydrate {
        /// Bytes a second; 0: no limit.
        #[serde(default)]
        rate: u64,
        #[serde(default)]
        action: HydrateAction,
    },
}

/// An action on a hydration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum HydrateAction {
    /// Starts or resumes; answered at the end.
    #[default]
    Wait,
    /// Starts or resumes; answered at once.
    Start,
    Pause,
    Cancel,
}

/// A request, and the disk that it means.
#[derive(Serialize)]
struct AddressedRequest<'a, R> {
    #[serde(flatten)]
    request: &'a R,
    #[serde(skip_serializing_if = "Option::is_none")]
    inode: Option<u64>,
}

/// Encodes `request` as a line. `inode` is the inode number of the mounted file of the disk that the
/// request means.
///
/// # Errors
/// A path that is not UTF-8.
pub(crate) fn encode_request(
    request: &impl Serialize,
    inode: Option<u64>,
) -> serde_json::Result<String> {
    serde_json::to_string(&AddressedRequest { request, inode })
}

/// Parses a request to a disk, and the inode number of the disk that it means; `None`: whichever
/// disk it reaches.
///
/// # Errors
/// A line of text that is no such request.
pub(crate) fn parse_disk_request(request: &[u8]) -> serde_json::Result<(Option<u64>, DiskRequest)> {
    let mut request: Value = serde_json::from_slice(request)?;
    let inode = request.as_object_mut().and_then(|keys| keys.remove("inode"));
    let inode = inode.map_or(Ok(None), serde_json::from_value)?;
    Ok((inode, serde_json::from_value(request)?))
}
