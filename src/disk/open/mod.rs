//! From a disk's spec to a disk: opening its base, finding or making its overlay.
//!
//! `persistent` is for overlays that stay, `stored` for disks of a store, `keep_in_dir` for a disk that finds its
//! place later, or loses it.

mod error;
mod keep_in_dir;
mod notes;
mod persistent;
mod stored;

use std::collections::HashSet;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

pub use self::error::OpenError;
use self::notes::notes_on_base;
pub(super) use self::notes::notes_on_overlay;
pub(super) use self::persistent::{READ_ONLY_NOTE, adopt_owner, new_stack, overlay_error};
use self::persistent::{apply_spec, assemble_persistent, open_persistent};
pub use self::stored::{clone_stored, create_blank, create_stored, open_stored};
use super::bottom::Bottom;
use super::fetch::HydrationState;
use super::history::History;
use super::space_failures::SpaceFailures;
use super::{Disk, DiskOwner, LayerStack, OverlayLocation, Times, Top, coarse_now, mtime_of};
use crate::base::self_reference;
use crate::base::{self, BaseAccess, BaseLayer, BaseOptions};
use crate::config::{DirectIo, DiskMode, DiskSource, DiskSpec, Partitions, format_size};
use crate::layer::{Layer, Wait};
use crate::overlay::layer_cache::LayerCache;
use crate::overlay::persist::{self, OverlayPath};
use crate::overlay::recover::Recovered;
use crate::overlay::sealed::Sealed;
use crate::overlay::tree::LayerTree;
use crate::overlay::{DEFAULT_BLOCK_SIZE, Overlay, keep};
use crate::pool::Pool;
use crate::stream::sink::StdioMode;

/// Threads that describe a disk at a time. Its map is asked for now and then.
const MAP_THREADS: usize = 2;

/// What a mount says of all its disks.
pub struct OpenContext<'a> {
    /// Canonical.
    pub mountpoint: &'a Path,
    /// The mount's device number, once it is mounted.
    pub mount_dev: Option<u64>,
    /// Who mounts: the owner of disks that do not say otherwise.
    pub uid: u32,
    /// The group of who mounts.
    pub gid: u32,
    /// Use a base that changed under its overlay.
    pub force: bool,
    /// Directories below which files may lie that a base names, besides its own.
    pub allow_backing: Vec<PathBuf>,
    /// Whether streams may have the caller's standard input and output.
    pub stdio: StdioMode,
    /// Directories whose file system was looked at already.
    pub probed_dirs: Mutex<HashSet<PathBuf>>,
}

impl OpenContext<'static> {
    /// For a disk that is opened without being mounted, by who runs this.
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

/// A disk that was opened, and what its user should know.
pub struct OpenedDisk {
    /// The disk.
    pub disk: Disk,
    /// What `mount` prints of it, after its name.
    pub summary: String,
    /// Notes: what was recovered, what the file systems cannot do.
    pub notes: Vec<String>,
}

/// Opens the disk that `spec` asks for.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn open(spec: &DiskSpec, setting: &OpenContext<'_>) -> Result<OpenedDisk, OpenError> {
    if let DiskSource::Stream(stream) = &spec.source {
        return super::stream::open(spec, stream, setting);
    }
    let dir = spec
        .overlay
        .as_deref()
        .map(|dir| persist::resolve_overlay_path(dir).map_err(overlay_error(dir)));
    let spec = &DiskSpec { overlay: dir.transpose()?, ..spec.clone() };
    let place = spec.overlay.as_deref().map(|dir| OverlayPath { dir, layers: None });
    let opened = complete(spec, open_layers(spec, place, setting, &Arc::default())?)?;
    if opened.disk.attributes(Wait::No).is_err() {
        // A base of another host: it is waited for now, so that no stat has to later.
        if let Err(error) = opened.disk.attributes(Wait::Yes) {
            log::debug!("{}: its extents are not known: {error}", spec.name);
        }
    }
    Ok(opened)
}

/// Has the layers of a disk pass by the host's cache if they are to, and finds the partitions of
/// one that is to show them.
fn complete(spec: &DiskSpec, mut opened: OpenedDisk) -> Result<OpenedDisk, OpenError> {
    opened.disk.go_direct().inspect_err(|_| opened.disk.abandon())?;
    if spec.partitions == Partitions::Shown {
        let notes = opened.disk.show_partitions(&spec.name);
        opened.notes.extend(notes.inspect_err(|_| opened.disk.abandon())?);
    }
    Ok(opened)
}

fn open_layers(
    spec: &DiskSpec,
    place: Option<OverlayPath<'_>>,
    setting: &OpenContext<'_>,
    shelf: &Arc<LayerCache>,
) -> Result<OpenedDisk, OpenError> {
    if let DiskSource::File(path) = &spec.source {
        self_reference::check_self_reference(path, setting.mountpoint, setting.mount_dev)?;
    }
    if let Some(OverlayPath { dir, .. }) = place {
        self_reference::check_self_reference(dir, setting.mountpoint, setting.mount_dev)?;
    }
    let access =
        if spec.mode == DiskMode::ReadWrite { BaseAccess::Write } else { BaseAccess::Read };
    let how = BaseOptions {
        format: spec.format,
        part: spec.part,
        access,
        locking: spec.locking,
        passthrough: spec.passthrough,
        direct: spec.direct,
        allow_backing: &setting.allow_backing,
    };
    let base = base::open(&spec.source, how)?;
    let bottom = Bottom::of(&base, how);
    let owner = initial_owner(spec, &bottom, setting);
    let mut notes = notes_on_base(&base, setting);
    match (&base.layer, place) {
        (BaseLayer::Writer(layer), _) => {
            let bottom_layer = Arc::clone(layer) as Arc<dyn Layer>;
            let layers = LayerStack::new(Top::Base(Arc::clone(layer)), None, Some(bottom_layer));
            let path = bottom.path().unwrap_or(Path::new("")).display().to_string();
            let summary = format!("{}, writes go straight to '{path}'", format_size(base.size));
            let disk = new_disk(spec, Uuid::new_v4(), layers, bottom, owner);
            Ok(OpenedDisk { disk, summary, notes })
        }
        (BaseLayer::Reader(layer), _) if spec.mode == DiskMode::ReadOnly => {
            let layers = LayerStack::new(Top::Nothing, None, Some(Arc::clone(layer)));
            let disk = new_disk(spec, Uuid::new_v4(), layers, bottom, owner);
            Ok(OpenedDisk {
                disk,
                summary: format!("{}, read-only", format_size(base.size)),
                notes,
            })
        }
        (BaseLayer::Reader(layer), None) => {
            let dir = keep::temporary_dir();
            let size = spec.size.unwrap_or(base.size);
            let block = spec.block.unwrap_or(DEFAULT_BLOCK_SIZE);
            let limit = size.min(base.size);
            let overlay = keep::temporary(&dir, block, size, limit, spec.limit)
                .map_err(|error| OpenError::Temporary { dir: dir.clone(), error })?;
            notes.extend(notes_on_overlay(&dir, setting));
            let layers = overlay_layers(overlay, Vec::new(), layer);
            let mut disk = new_disk(spec, Uuid::new_v4(), layers, bottom, owner);
            disk.overlay_location = Mutex::new(OverlayLocation::Temporary {
                tree: LayerTree::single(Uuid::new_v4(), block),
                dir,
            });
            disk.history = History::new((size, limit), spec.limit);
            let summary = format!(
                "{}, temporary overlay: changes end at umount ('cowslip keep' saves them)",
                format_size(size)
            );
            Ok(OpenedDisk { disk, summary, notes })
        }
        (BaseLayer::Reader(layer), Some(OverlayPath { dir, .. }))
            if super::reflink::uses_reflink(spec, dir)? =>
        {
            if spec.direct == DirectIo::On {
                let why = "is a reflink copy, whose bytes the kernel reads and writes itself: leave out direct";
                return Err(OpenError::Mismatch { dir: dir.to_owned(), why: why.to_owned() });
            }
            super::reflink::open(spec, dir, (bottom, Arc::clone(layer)), owner, setting, notes)
        }
        (BaseLayer::Reader(layer), Some(place)) => {
            let mut persistent =
                open_persistent(spec, place, &base, &bottom, owner, setting, shelf)?;
            let applied = apply_spec(spec, place.dir, &mut persistent);
            notes.extend(notes_on_overlay(place.dir, setting));
            let layer = Arc::clone(layer);
            let opened = assemble_persistent(spec, persistent, &layer, bottom, place.dir, notes);
            applied.inspect_err(|_| opened.disk.abandon())?;
            Ok(opened)
        }
    }
}

fn overlay_layers(overlay: Overlay, below: Vec<Arc<Overlay>>, base: &Arc<dyn Layer>) -> LayerStack {
    overlay.set_lower_layers(&below);
    let sealed = Sealed::new(below).map(Arc::new);
    LayerStack::new(Top::Overlay(Arc::new(overlay)), sealed, Some(Arc::clone(base)))
}

/// The owner of a disk that was not mounted before: the one who mounts, and readable by whom the
/// base is readable.
pub(super) fn initial_owner(
    spec: &DiskSpec,
    bottom: &Bottom,
    setting: &OpenContext<'_>,
) -> DiskOwner {
    // What all files that it is read from allow: a backing file may be more private than its image.
    let modes = bottom.files().map(|file| file.metadata().map_or(0, |found| found.mode()));
    let readable = modes.reduce(|all, mode| all & mode).unwrap_or(0) & 0o044;
    let perm = if spec.mode == DiskMode::ReadOnly { 0o400 } else { 0o600 } | readable;
    let perm = u16::try_from(perm).unwrap_or(0o600);
    DiskOwner {
        uid: spec.uid.unwrap_or(setting.uid),
        gid: spec.gid.unwrap_or(setting.gid),
        perm: spec.perm.unwrap_or(perm),
    }
}

pub(super) fn new_disk(
    spec: &DiskSpec,
    uuid: Uuid,
    layers: LayerStack,
    bottom: Bottom,
    owner: DiskOwner,
) -> Disk {
    let mtime = match (&layers.top, bottom.metadata()) {
        (Top::Overlay(_), _) | (_, None) => coarse_now(),
        (_, Some(found)) => mtime_of(&found),
    };
    let source = match bottom.path() {
        Some(path) => path.display().to_string(),
        None => format!("blank:{}", layers.size()),
    };
    let grain = bottom.grain();
    Disk {
        uuid,
        mode: spec.mode,
        source,
        resize: spec.resize,
        passthrough: spec.passthrough,
        direct: spec.direct,
        gate: RwLock::new(()),
        gate_queue: Mutex::new(()),
        layers: RwLock::new(Arc::new(layers)),
        owner: Mutex::new(owner),
        times: Times::new(mtime, false, None),
        read_opens: AtomicU32::new(0),
        write_opens: AtomicU32::new(0),
        read_write_opens: AtomicU32::new(0),
        allocated_cache: Mutex::new(None),
        allocated_is_stale: false.into(),
        partition_files: OnceLock::new(),
        overlay_location: Mutex::new(OverlayLocation::NoOverlay),
        history: History::new((0, 0), None),
        copy_up: spec.copy_up,
        hydration: HydrationState::default(),
        is_detached: false.into(),
        overlay_dir: Mutex::new(None),
        space_failures: SpaceFailures::default(),
        bottom: Mutex::new(Arc::new(bottom)),
        recovered: Recovered::Clean,
        stream: None,
        io_pool: Arc::new(Pool::default()),
        notify_pool: Arc::new(Pool::default()),
        sync_pool: Arc::new(Pool::default()),
        map_pool: Arc::new(Pool::with_threads(MAP_THREADS)),
        maintaining: false.into(),
        in_long_operation: false.into(),
        closed: false.into(),
        is_retired: false.into(),
        grain,
        is_unlinked: false.into(),
        lookup_count: 0.into(),
    }
}
