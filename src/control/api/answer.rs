//! Answers to requests.

use serde::{Deserialize, Serialize};

use super::UsageStatus;

/// The answer to a request.
pub(crate) type Answer = Result<Outcome, Refusal>;

/// The result of a request that was carried out.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Outcome {
    Line(Line),
    Lines(Lines),
    Snapshots(SnapshotList<Vec<SnapshotRecord>>),
    Difference(DifferenceFiles),
}

/// One line for the user.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Line {
    /// The operation that was done; `None` if there is nothing to report.
    #[serde(default)]
    pub(crate) line: Option<String>,
}

/// Lines for the user, one or more a disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Lines {
    /// Disks that were mounted, or changes that were discarded or kept.
    pub(crate) lines: Vec<String>,
    /// Failures. `Add` has no such key: its failures are refusals.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) failed: Option<Vec<String>>,
}

/// The snapshots of a disk, the oldest first.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SnapshotList<T> {
    #[serde(default)]
    pub(crate) snapshots: T,
}

/// A snapshot in a list.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SnapshotRecord {
    pub(crate) name: Option<String>,
    /// The time of the snapshot, in seconds since the epoch.
    pub(crate) taken: i64,
    /// The disk's size at that time, in bytes.
    pub(crate) size: Option<u64>,
    /// Bytes of data that the snapshot's own layer holds; `None` for a reflink overlay.
    pub(crate) changed: Option<u64>,
    /// Bytes of zeros that the snapshot's own layer holds; `None` for a reflink overlay.
    pub(crate) zeroed: Option<u64>,
    /// Bytes changed since the snapshot; `None` when the disk is not based on it.
    pub(crate) since: Option<UsageStatus>,
}

/// The files, among those of the disk's snapshots, that show a frozen disk and what has changed in
/// it. They exist as long as they are open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DifferenceFiles {
    /// Name of the file with the contents of the disk.
    pub(crate) file: String,
    /// Name of a file of the same size, with data where the disk has changed and holes elsewhere.
    pub(crate) changed: String,
    /// The base that the difference is relative to, without `since`; `None`: zeros.
    pub(crate) base: Option<DiffBaseRecord>,
}

/// The base of a difference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum DiffBaseRecord {
    /// A part of a file, which other formats cannot refer to, or a file whose path is not UTF-8.
    Part,
    /// All of a file.
    #[serde(untagged)]
    File {
        path: String,
        /// A value of the key `format`.
        format: String,
    },
}

/// The reason why a request was not carried out, or not to its end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Refusal {
    /// The reason as a line for the user.
    pub(super) error: String,
    /// Whether something is in use, so that another try may succeed; absent where that cannot be
    /// the reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) busy: Option<bool>,
    /// `true` when the request reached another disk than the one that it means; otherwise absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stale: Option<bool>,
}

impl Refusal {
    /// Creates a refusal for the reason `error`, a line for the user.
    pub(crate) fn new(error: impl Into<String>) -> Self {
        Self { error: error.into(), busy: None, stale: None }
    }

    /// States whether another try may succeed, since something is in use now.
    pub(crate) fn with_busy(self, busy: bool) -> Self {
        Self { busy: Some(busy), ..self }
    }

    /// Creates the refusal of a request that reached another disk, `name`, than the one it means.
    pub(crate) fn stale(name: &str) -> Self {
        let error = format!(
            "{name} is another disk by now, the one that was meant was renamed, removed or replaced: \
             nothing is done: ask again"
        );
        Self { stale: Some(true), ..Self::new(error) }
    }
}

impl From<String> for Refusal {
    fn from(error: String) -> Self {
        Self::new(error)
    }
}

/// The progress of a request, in bytes. Without numbers, only a sign of life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Progress {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) done: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) total: Option<u64>,
}

impl Progress {
    /// Creates a report that `done` of `total` bytes are done.
    pub(crate) fn new(done: u64, total: u64) -> Self {
        Self { done: Some(done), total: Some(total) }
    }
}

/// One line of a `ctl` file, as the daemon writes it.
#[derive(Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum AnswerLine<'a> {
    /// A request is in progress.
    Progress(Progress),
    /// A request was carried out.
    Ok(&'a Outcome),
    /// A request was refused.
    #[serde(untagged)]
    Refused(&'a Refusal),
}
