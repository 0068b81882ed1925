//! The entry of the fuzz target `answer`: answers of a mount as the commands read and print them.

use serde_json::Value;

use super::client::{read_answer, read_document};
use super::progress::ProgressFormatter;
use super::{map, snapshot, status};
use crate::control::api::{DiskStatus, Lines, SnapshotList};

/// Renders a mount's `answer` to a request, the `status` of a mount or a disk, and a disk's `map`.
/// Returns the length of the output.
#[doc(hidden)]
#[must_use]
pub fn render_answers(answer: &[u8], status: &[u8], map: &[u8]) -> usize {
    let mut shown = 0;
    let mut formatter = ProgressFormatter::default();
    if let Ok(Lines { lines, failed }) =
        read_answer(answer, |progress| shown += formatter.text(progress).len())
    {
        shown += lines.len() + failed.map_or(0, |failed| failed.len());
    }
    if let Ok(SnapshotList { snapshots }) = read_answer::<SnapshotList<Vec<_>>>(answer, |_| {}) {
        shown += snapshot::snapshot_table(&snapshots).len();
    }
    if let Ok(document) = read_document::<Value>(status) {
        shown += status::render_document(document);
    }
    if let Ok(disk) = read_document::<DiskStatus>(status) {
        shown += map::draw_svg(map, &disk);
    }
    shown
}
