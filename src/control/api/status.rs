//! The documents in the `status` files. Sizes and offsets are in bytes.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::words::{
    DiskState, HydrationState, MountState, OverlayKindWord, Recovery, StreamDirection, StreamState,
};

/// The document in `.cowslip/status`, and that of `cowslip status --json`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StatusDocument<M> {
    /// 1.
    pub(crate) schema: u32,
    /// The mount itself, or all mounts that were asked.
    pub(crate) mounts: Vec<M>,
}

impl<M> StatusDocument<M> {
    pub(crate) fn new(mounts: Vec<M>) -> Self {
        Self { schema: 1, mounts }
    }
}

/// A mount.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct MountStatus {
    pub(crate) mountpoint: String,
    /// The source in the mount table.
    pub(crate) source: String,
    /// The daemon's process ID.
    pub(crate) pid: Option<u32>,
    pub(crate) state: MountState,
    /// The reason why the mount reports no more; only from `cowslip status`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
    pub(crate) disks: Vec<DiskStatus>,
}

/// A disk: the document in its `status` file, and its part in that of the mount.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct DiskStatus {
    pub(crate) name: String,
    /// The inode number of the mounted file.
    pub(crate) inode: u64,
    /// The mounted file.
    pub(crate) path: String,
    pub(crate) size: u64,
    /// A value of the key `mode`.
    pub(crate) mode: String,
    pub(crate) state: DiskState,
    /// The reason why the state is not `Ok`.
    pub(crate) error: Option<String>,
    /// A problem that is no failure.
    pub(crate) warning: Option<String>,
    /// The number of open handles.
    pub(crate) openers: u64,
    pub(crate) base: Option<String>,
    /// The format of the base, a value of the key `format`; left out for a blank disk and for a stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) format: Option<String>,
    /// What was fetched of a base on a server; left out for other disks.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remote: Option<RemoteBaseStatus>,
    pub(crate) overlay: Option<OverlayStatus>,
    pub(crate) stream: Option<StreamStatus>,
    pub(crate) partitions: Vec<PartitionStatus>,
}

/// What was fetched of a base on a server.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RemoteBaseStatus {
    /// The size of the whole image.
    pub(crate) size: u64,
    /// Bytes that were fetched.
    pub(crate) fetched: u64,
    /// Bytes that are kept on this host.
    pub(crate) cached: u64,
    /// Reads that were answered from what is kept.
    pub(crate) hits: u64,
    /// Reads that had to wait for the server.
    pub(crate) misses: u64,
    /// Requests for bytes.
    pub(crate) requests: u64,
    /// Requests that failed.
    pub(crate) failures: u64,
    /// Seconds since which the oldest request has been waiting for the server; `None` when none is.
    pub(crate) waiting: Option<u64>,
    /// The reason why there is no connection to the server.
    pub(crate) outage: Option<String>,
    /// The checksums of its bmap; left out where there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) bmap: Option<BmapStatus>,
}

/// Which ranges of an image match the checksums of its bmap.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BmapStatus {
    /// The number of ranges that have a checksum.
    pub(crate) ranges: u64,
    /// The number of those that match, as they are kept.
    pub(crate) verified: u64,
    /// The bytes that do not match, as `FIRST-LAST`: every read of the image fails.
    pub(crate) mismatch: Option<String>,
}

/// The overlay of a disk.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct OverlayStatus {
    /// Whether the overlay ends with the mount.
    pub(crate) temporary: bool,
    /// The directory of a persistent overlay.
    pub(crate) path: Option<String>,
    /// The size of a block.
    pub(crate) block: u64,
    /// Bytes of data in which the disk differs from its base.
    pub(crate) changed: u64,
    /// Bytes of zeros in which the disk differs from its base.
    pub(crate) zeroed: u64,
    /// Space that the overlay's data takes on the host.
    pub(crate) allocated: u64,
    /// Space that is left on the host.
    pub(crate) free: u64,
    /// The recovery of an overlay that had not been closed.
    pub(crate) recovered: Option<Recovery>,
    /// `None` for a reflink overlay.
    #[serde(flatten)]
    pub(crate) blocks: Option<BlockOverlayStatus>,
    pub(crate) kind: OverlayKindWord,
}

/// The part of an overlay's status that only overlays of changed blocks have.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BlockOverlayStatus {
    /// The operation on the disk as a whole that is in progress, as a noun: `a commit`.
    pub(crate) doing: Option<String>,
    /// Whether a commit has begun that is not complete, in progress or not.
    pub(crate) committing: bool,
    /// The state of the hydration that is in progress.
    pub(crate) hydration: Option<HydrationState>,
    /// Bytes done by the operation in progress.
    pub(crate) done: u64,
    /// Bytes that the operation in progress has to do; 0: not known.
    pub(crate) total: u64,
    /// The most bytes that all layers together may hold.
    pub(crate) limit: Option<u64>,
    /// The layers, top to bottom.
    pub(crate) chain: Vec<LayerStatus>,
}

/// A layer of an overlay.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct LayerStatus {
    /// The name of the layer's snapshot; `None` for the top and for an unnamed layer.
    pub(crate) name: Option<String>,
    /// `None` for a reader who may not know.
    pub(crate) uuid: Option<Uuid>,
    /// Bytes of data that the layer holds.
    pub(crate) changed: u64,
    /// Bytes of zeros that the layer holds.
    pub(crate) zeroed: u64,
    /// Bytes changed by this layer and the layers above it.
    pub(crate) since: UsageStatus,
}

/// Bytes that differ from an earlier state.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct UsageStatus {
    /// Bytes of data.
    pub(crate) changed: u64,
    /// Bytes of zeros.
    pub(crate) zeroed: u64,
}

/// A stream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct StreamStatus {
    pub(crate) direction: StreamDirection,
    pub(crate) state: StreamState,
    /// The first byte of an output stream that can still be changed; the bytes of an input stream
    /// that have arrived.
    pub(crate) frontier: u64,
    /// The end of the highest write, or of the highest read.
    pub(crate) highest: u64,
    /// Bytes that the sink has accepted, or that have arrived.
    pub(crate) accepted: u64,
    /// Memory for bytes that may still be rewritten, or read again.
    pub(crate) window: BufferStatus,
    /// Space on the host for more of them.
    pub(crate) spill: BufferStatus,
    /// The buffers that the writes or reads so far would have needed.
    pub(crate) needed: NeededBuffers,
    /// The sink of an output stream.
    pub(crate) sink: Option<PeerStatus>,
    /// The source of an input stream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<PeerStatus>,
}

/// A buffer of a stream.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct BufferStatus {
    /// `None`: without limit.
    pub(crate) size: Option<u64>,
    pub(crate) used: u64,
}

/// Buffer sizes that a stream would have needed so far.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct NeededBuffers {
    /// The window, without a spill.
    pub(crate) window: u64,
    /// The spill, with the window as it is.
    pub(crate) spill: u64,
}

/// The sink or the source of a stream.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PeerStatus {
    /// `file`, `cmd` and the like.
    pub(crate) kind: String,
    /// The sink or source as the user wrote it; `None` for a reader who may not know.
    pub(crate) description: Option<String>,
    /// The reason for the failure, or else the stream's state; `None` for a reader who may not
    /// know.
    pub(crate) status: Option<String>,
}

/// A partition of a disk, which is a file beside it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct PartitionStatus {
    pub(crate) number: u32,
    /// The name of the file.
    pub(crate) name: String,
    pub(crate) offset: u64,
    pub(crate) size: u64,
}
