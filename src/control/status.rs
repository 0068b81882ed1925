//! The text of the `status` files.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::Ordering;

use super::api::{
    BlockOverlayStatus, BmapStatus, BufferStatus, DiskState, DiskStatus, HydrationState,
    LayerStatus, MountState, MountStatus, NeededBuffers, OverlayKindWord, OverlayStatus,
    PartitionStatus, PeerStatus, Recovery, RemoteBaseStatus, StatusDocument, StreamDirection,
    StreamState, StreamStatus, UsageStatus,
};
use super::{Control, json_line};
use crate::catalog::CatalogEntry;
use crate::disk::{Disk, HydrationPhase, LayerUsage, OverlayDirState, PartitionFile};
use crate::overlay::Usage;
use crate::overlay::recover::Recovered;
use crate::remote::RemoteStatus;
use crate::stream::Stream;
use crate::stream::input::Input;
use crate::stream::monitor::Monitor;
use crate::stream::output::{BufferUse, OutputStatus};

/// The reader of a disk's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusAudience {
    /// Root or the user who mounted.
    Trusted,
    /// A user who may read the disk but need not know its surroundings: paths on the host, commands
    /// (which may contain passwords) and messages about either are withheld.
    Other,
}

impl Control {
    /// Generates the text of `.cowslip/status`.
    #[must_use]
    pub fn status(&self) -> Vec<u8> {
        let disks = self.catalog.list();
        let disks = disks.iter().map(|(name, entry)| self.describe_disk(name, entry));
        let mount = MountStatus {
            mountpoint: self.catalog.mountpoint.to_string_lossy().into_owned(),
            source: self.source.clone(),
            pid: Some(std::process::id()),
            state: match self.draining.load(Ordering::SeqCst) {
                true => MountState::Draining,
                false => MountState::Ready,
            },
            error: None,
            disks: disks.collect(),
        };
        json_line(&StatusDocument::new(vec![mount]))
    }

    /// Generates the text of `.cowslip/DISK/status`.
    #[must_use]
    pub fn disk_status(&self, name: &str, entry: &CatalogEntry, reader: StatusAudience) -> Vec<u8> {
        let mut status = self.describe_disk(name, entry);
        if reader == StatusAudience::Other {
            redact(&mut status);
        }
        json_line(&status)
    }

    fn describe_disk(&self, name: &str, entry: &CatalogEntry) -> DiskStatus {
        let disk = &entry.disk;
        let (state, error) = disk_state(disk);
        DiskStatus {
            name: name.to_owned(),
            inode: disk.ino(),
            path: self.catalog.mountpoint.join(name).to_string_lossy().into_owned(),
            size: disk.size(),
            mode: disk.mode.to_string(),
            state,
            error,
            warning: disk.no_space_status(),
            openers: disk.handle_count().into(),
            base: Some(disk.base_description()),
            format: disk.base_format().map(|format| format.to_string()),
            remote: disk.remote_status().map(RemoteBaseStatus::from),
            overlay: block_overlay_status(disk).or_else(|| reflink_status(disk)),
            stream: disk.stream().map(stream_status),
            partitions: disk
                .partition_files()
                .iter()
                .map(|one| partition_status(name, one))
                .collect(),
        }
    }
}

impl From<RemoteStatus> for RemoteBaseStatus {
    fn from(status: RemoteStatus) -> Self {
        Self {
            size: status.size,
            fetched: status.fetched,
            cached: status.cached,
            hits: status.hits,
            misses: status.misses,
            requests: status.requests,
            failures: status.failures,
            waiting: status.waiting.map(|since| since.as_secs()),
            outage: status.outage,
            bmap: status.sums.map(|sums| BmapStatus {
                ranges: sums.ranges,
                verified: sums.verified,
                mismatch: sums.mismatch.map(|bytes| format!("{}-{}", bytes.start, bytes.end - 1)),
            }),
        }
    }
}

/// Returns the state of a disk, and why the disk is not well.
fn disk_state(disk: &Disk) -> (DiskState, Option<String>) {
    if disk.is_latched() {
        let reason = "a sync failed: nothing written since is safe, see the log";
        return (DiskState::ReadOnly, Some(reason.to_owned()));
    }
    if disk.overlay_dir_state() == Some(OverlayDirState::Removed) {
        let reason =
            "its overlay was removed while it is in use: what is in it ends with the mount";
        return (DiskState::Lost, Some(reason.to_owned()));
    }
    if let Some(bytes) = disk.base_mismatch() {
        let last = bytes.end - 1;
        let reason = format!(
            "bytes {} to {last} of its base do not match what its bmap says: reads of the base fail",
            bytes.start
        );
        return (DiskState::Failed, Some(reason));
    }
    match disk.stream().and_then(Stream::failure) {
        Some(reason) => (DiskState::Failed, Some(reason)),
        None => (DiskState::Ok, None),
    }
}

/// Removes the facts that are not for every reader of the disk.
fn redact(disk: &mut DiskStatus) {
    if let Some(error) = &mut disk.error {
        "whoever mounted it can see why".clone_into(error);
    }
    disk.base = None;
    if let Some(remote) = &mut disk.remote {
        remote.outage = None;
    }
    if let Some(overlay) = &mut disk.overlay {
        overlay.path = None;
        for layer in overlay.blocks.iter_mut().flat_map(|blocks| &mut blocks.chain) {
            layer.uuid = None;
        }
    }
    if let Some(stream) = &mut disk.stream {
        for peer in stream.sink.iter_mut().chain(&mut stream.source) {
            (peer.description, peer.status) = (None, None);
        }
    }
}

/// Describes the overlay of changed blocks of a disk, if it has one.
fn block_overlay_status(disk: &Disk) -> Option<OverlayStatus> {
    let overlay = disk.overlay()?;
    let chain = disk.layer_usages();
    let since = chain.last().map_or_else(|| overlay.usage(), |lowest| lowest.since);
    let (done, total) = disk.progress();
    Some(OverlayStatus {
        temporary: overlay.is_temporary(),
        path: overlay_path(disk),
        block: overlay.block_size(),
        changed: since.data,
        zeroed: since.zero,
        allocated: overlay.data_file().map_or(0, |file| allocated_on_host(&file)),
        free: free_on_host(disk),
        recovered: match disk.recovered() {
            Recovered::New | Recovered::Clean => None,
            Recovered::All => Some(Recovery::All),
            Recovered::Damaged => Some(Recovery::Damaged),
            Recovered::Vouched { .. } => Some(Recovery::Vouched),
        },
        blocks: Some(BlockOverlayStatus {
            doing: disk.operation().map(str::to_owned),
            committing: overlay.is_committing(),
            hydration: disk.hydration_phase().map(HydrationState::from),
            done,
            total,
            limit: disk.limit(),
            chain: chain.into_iter().map(LayerStatus::from).collect(),
        }),
        kind: OverlayKindWord::Blocks,
    })
}

/// Describes the reflink overlay of a disk, if it has one.
fn reflink_status(disk: &Disk) -> Option<OverlayStatus> {
    let reflink = disk.reflink()?;
    Some(OverlayStatus {
        temporary: false,
        path: overlay_path(disk),
        block: disk.block_size().into(),
        changed: reflink.estimate_changed().unwrap_or(disk.size()),
        zeroed: 0,
        allocated: allocated_on_host(reflink.data()),
        free: free_on_host(disk),
        recovered: None,
        blocks: None,
        kind: OverlayKindWord::Reflink,
    })
}

fn overlay_path(disk: &Disk) -> Option<String> {
    disk.overlay_dir().map(|dir| dir.to_string_lossy().into_owned())
}

/// Returns the space left on the host for an overlay, in bytes.
fn free_on_host(disk: &Disk) -> u64 {
    disk.space().map_or(0, |space| space.available)
}

/// Returns the bytes that a file takes on the host.
fn allocated_on_host(file: &File) -> u64 {
    file.metadata().map_or(0, |found| found.blocks() * 512)
}

impl From<HydrationPhase> for HydrationState {
    fn from(phase: HydrationPhase) -> Self {
        match phase {
            HydrationPhase::Running => Self::Running,
            HydrationPhase::Paused => Self::Paused,
        }
    }
}

impl From<LayerUsage> for LayerStatus {
    fn from(layer: LayerUsage) -> Self {
        Self {
            name: layer.name,
            uuid: Some(layer.uuid),
            changed: layer.usage.data,
            zeroed: layer.usage.zero,
            since: layer.since.into(),
        }
    }
}

impl From<Usage> for UsageStatus {
    fn from(usage: Usage) -> Self {
        Self { changed: usage.data, zeroed: usage.zero }
    }
}

impl From<BufferUse> for BufferStatus {
    fn from(buffer: BufferUse) -> Self {
        Self { size: buffer.size, used: buffer.used }
    }
}

fn stream_status(stream: &Stream) -> StreamStatus {
    match stream {
        Stream::Output(output) => output_status(output.status()),
        Stream::Input { input, monitor } => input_status(input, monitor),
    }
}

fn output_status(status: OutputStatus) -> StreamStatus {
    let state = StreamState::from(status.state);
    StreamStatus {
        direction: StreamDirection::Out,
        frontier: status.frontier,
        highest: status.highest,
        accepted: status.accepted,
        window: status.window.into(),
        spill: status.spill.into(),
        needed: NeededBuffers { window: status.needed.window, spill: status.needed.spill },
        sink: Some(PeerStatus {
            kind: status.kind.to_owned(),
            description: Some(status.sink),
            status: Some(status.error.unwrap_or_else(|| state.as_str().to_owned())),
        }),
        source: None,
        state,
    }
}

fn input_status(input: &Input, monitor: &Monitor) -> StreamStatus {
    let status = crate::stream::input_status(input, monitor);
    let state = StreamState::from(status.state);
    StreamStatus {
        direction: StreamDirection::In,
        frontier: status.arrived,
        highest: status.highest,
        accepted: status.arrived,
        window: BufferStatus { size: Some(status.window), used: status.used },
        spill: BufferStatus { size: None, used: status.spooled },
        needed: NeededBuffers { window: status.needed, spill: 0 },
        sink: None,
        source: Some(PeerStatus {
            kind: monitor.kind().to_owned(),
            description: Some(monitor.describe()),
            status: Some(status.error.unwrap_or_else(|| state.as_str().to_owned())),
        }),
        state,
    }
}

fn partition_status(disk: &str, partition: &PartitionFile) -> PartitionStatus {
    let range = partition.range();
    PartitionStatus {
        number: partition.number(),
        name: partition.name(disk),
        offset: range.start,
        size: range.end - range.start,
    }
}
