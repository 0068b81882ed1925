//! The messages of the control files: written on one side and read on the other by the same types.
//!
//! ```text
//!   command line                                              daemon
//!   ------------                                              ------
//!   MountRequest, DiskRequest  ---- one line, to a ctl ---->  parsed, carried out
//!   Progress                   <--- every second ------------ {"progress":{...}}
//!   Outcome or Refusal         <--- the last line ----------- {"ok":{...}} or {"error":"..."}
//!   MountStatus, DiskStatus    <--- a status file ----------- one document
//! ```
//!
//! Other programs read this JSON too, and the two sides may be of different versions. So keys are
//! never renamed, removed or given another type, and their order is that of the fields here. A new
//! key has a default for the side that misses it: the daemon refuses requests with unknown keys, and
//! the command line ignores unknown keys in what it reads. `tests/it/control_text.rs` holds the text.

mod answer;
mod request;
mod status;
mod words;

pub(crate) use self::answer::{
    Answer, AnswerLine, DiffBaseRecord, DifferenceFiles, Line, Lines, Outcome, Progress, Refusal,
    SnapshotList, SnapshotRecord,
};
pub(crate) use self::request::{
    DiskRequest, HydrateAction, MountRequest, encode_request, parse_disk_request,
};
pub(crate) use self::status::{
    BlockOverlayStatus, BufferStatus, DiskStatus, LayerStatus, MountStatus, NeededBuffers,
    OverlayStatus, PartitionStatus, PeerStatus, StatusDocument, StreamStatus, UsageStatus,
};
pub(crate) use self::words::{
    DiskState, HydrationState, MountState, OverlayKind, Recovery, StreamDirection, StreamState,
};
