//! From a disk's spec to a disk: opening its base, finding or making its overlay.
//!
//! `persistent` is for overlays that stay, `stored` for disks of a store, `placed` for a disk that finds its
//! place later, or loses it.

mod error;
mod notes;
mod persistent;
mod placed;
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
pub(super) use self::persistent::{READ_ONLY, adopt_owner, in_overlay, new_stack};
use self::persistent::{open_persistent, settle};
pub use self::stored::{clone_stored, create_blank, create_stored, open_stored};
use super::bottom::Bottom;
use super::fetch::Hydration;
use super::life::Life;
use super::room::Room;
use super::{Disk, Home, Layers, Owner, Times, Top, mtime_of, now};
use crate::base::place;
use crate::base::{self, Access, BaseLayer, Opening};
use crate::layer::{Layer, Wait};
use crate::overlay::persist::{self, Place};
use crate::overlay::recover::Recovered;
use crate::overlay::sealed::Sealed;
use crate::overlay::shelf::Shelf;
use crate::overlay::tree::Tree;
use crate::overlay::{DEFAULT_BLOCK, Overlay, keep};
use crate::pool::Pool;
use crate::spec::{Direct, DiskSpec, Mode, Partitions, Source, format_size};
use crate::stream::sink::Inherit;

/// Threads that describe a disk at a time. Its map is asked for now and then.
const MAPPERS: usize = 2;

/// What a mount says of all its disks.
pub struct Setting<'a> {
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
    pub stdio: Inherit,
    /// Directories whose file system was looked at already.
    pub looked_at: Mutex<HashSet<PathBuf>>,
}

impl Setting<'static> {
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
            stdio: Inherit::Nothing,
            looked_at: Mutex::new(HashSet::new()),
        }
    }
}

/// A disk that was opened, and what its user should know.
pub struct Opened {
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
pub fn open(spec: &DiskSpec, setting: &Setting<'_>) -> Result<Opened, OpenError> {
    if let Source::Stream(stream) = &spec.source {
        return super::stream::open(spec, stream, setting);
    }
    let dir = spec.overlay.as_deref().map(|dir| persist::real_place(dir).map_err(in_overlay(dir)));
    let spec = &DiskSpec { overlay: dir.transpose()?, ..spec.clone() };
    let place = spec.overlay.as_deref().map(|dir| Place { dir, layers: None });
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
fn complete(spec: &DiskSpec, mut opened: Opened) -> Result<Opened, OpenError> {
    opened.disk.go_direct().inspect_err(|_| opened.disk.abandon())?;
    if spec.partitions == Partitions::Shown {
        let notes = opened.disk.show_partitions(&spec.name);
        opened.notes.extend(notes.inspect_err(|_| opened.disk.abandon())?);
    }
    Ok(opened)
}

fn open_layers(
    spec: &DiskSpec,
    place: Option<Place<'_>>,
    setting: &Setting<'_>,
    shelf: &Arc<Shelf>,
) -> Result<Opened, OpenError> {
    if let Source::File(path) = &spec.source {
        place::refuse_inside(path, setting.mountpoint, setting.mount_dev)?;
    }
    if let Some(Place { dir, .. }) = place {
        place::refuse_inside(dir, setting.mountpoint, setting.mount_dev)?;
    }
    let access = if spec.mode == Mode::ReadWrite { Access::Write } else { Access::Read };
    let how = Opening {
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
    let owner = first_owner(spec, &bottom, setting);
    let mut notes = notes_on_base(&base, setting);
    match (&base.layer, place) {
        (BaseLayer::Writer(layer), _) => {
            let bottom_layer = Arc::clone(layer) as Arc<dyn Layer>;
            let layers = Layers::new(Top::Base(Arc::clone(layer)), None, Some(bottom_layer));
            let path = bottom.path().unwrap_or(Path::new("")).display().to_string();
            let summary = format!("{}, writes go straight to '{path}'", format_size(base.size));
            let disk = assemble(spec, Uuid::new_v4(), layers, bottom, owner);
            Ok(Opened { disk, summary, notes })
        }
        (BaseLayer::Reader(layer), _) if spec.mode == Mode::ReadOnly => {
            let layers = Layers::new(Top::Nothing, None, Some(Arc::clone(layer)));
            let disk = assemble(spec, Uuid::new_v4(), layers, bottom, owner);
            Ok(Opened { disk, summary: format!("{}, read-only", format_size(base.size)), notes })
        }
        (BaseLayer::Reader(layer), None) => {
            let dir = keep::temporary_dir();
            let size = spec.size.unwrap_or(base.size);
            let block = spec.block.unwrap_or(DEFAULT_BLOCK);
            let limit = size.min(base.size);
            let overlay = keep::temporary(&dir, block, size, limit, spec.limit)
                .map_err(|error| OpenError::Temporary { dir: dir.clone(), error })?;
            notes.extend(notes_on_overlay(&dir, setting));
            let layers = stacked(overlay, Vec::new(), layer);
            let mut disk = assemble(spec, Uuid::new_v4(), layers, bottom, owner);
            disk.home =
                Mutex::new(Home::Temporary { tree: Tree::single(Uuid::new_v4(), block), dir });
            disk.life = Life::new((size, limit), spec.limit);
            let summary = format!(
                "{}, temporary overlay: changes end at umount ('cowslip keep' saves them)",
                format_size(size)
            );
            Ok(Opened { disk, summary, notes })
        }
        (BaseLayer::Reader(layer), Some(Place { dir, .. }))
            if super::reflink::is_meant(spec, dir)? =>
        {
            if spec.direct == Direct::On {
                let why = "is a reflink copy, whose bytes the kernel reads and writes itself: leave out direct";
                return Err(OpenError::Mismatch { dir: dir.to_owned(), why: why.to_owned() });
            }
            super::reflink::open(spec, dir, (bottom, Arc::clone(layer)), owner, setting, notes)
        }
        (BaseLayer::Reader(layer), Some(place)) => {
            let persistent = open_persistent(spec, place, &base, &bottom, owner, setting, shelf)?;
            notes.extend(notes_on_overlay(place.dir, setting));
            let layer = Arc::clone(layer);
            Ok(settle(spec, persistent, &layer, bottom, place.dir, notes))
        }
    }
}

fn stacked(overlay: Overlay, below: Vec<Arc<Overlay>>, base: &Arc<dyn Layer>) -> Layers {
    overlay.stand_on(&below);
    let sealed = Sealed::new(below).map(Arc::new);
    Layers::new(Top::Overlay(Arc::new(overlay)), sealed, Some(Arc::clone(base)))
}

/// The owner of a disk that was not mounted before: the one who mounts, and readable by whom the
/// base is readable.
pub(super) fn first_owner(spec: &DiskSpec, bottom: &Bottom, setting: &Setting<'_>) -> Owner {
    // What all files that it is read from allow: a backing file may be more private than its image.
    let modes = bottom.files().map(|file| file.metadata().map_or(0, |found| found.mode()));
    let readable = modes.reduce(|all, mode| all & mode).unwrap_or(0) & 0o044;
    let perm = if spec.mode == Mode::ReadOnly { 0o400 } else { 0o600 } | readable;
    let perm = u16::try_from(perm).unwrap_or(0o600);
    Owner {
        uid: spec.uid.unwrap_or(setting.uid),
        gid: spec.gid.unwrap_or(setting.gid),
        perm: spec.perm.unwrap_or(perm),
    }
}

pub(super) fn assemble(
    spec: &DiskSpec,
    uuid: Uuid,
    layers: Layers,
    bottom: Bottom,
    owner: Owner,
) -> Disk {
    let mtime = match (&layers.top, bottom.metadata()) {
        (Top::Overlay(_), _) | (_, None) => now(),
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
        line: Mutex::new(()),
        layers: RwLock::new(Arc::new(layers)),
        owner: Mutex::new(owner),
        times: Times::new(mtime, false, None),
        readers: AtomicU32::new(0),
        writers: AtomicU32::new(0),
        both: AtomicU32::new(0),
        allocated: Mutex::new(None),
        stale: false.into(),
        windows: OnceLock::new(),
        home: Mutex::new(Home::Nowhere),
        life: Life::new((0, 0), None),
        copy_up: spec.copy_up,
        hydration: Hydration::default(),
        stands_alone: false.into(),
        overlay_dir: Mutex::new(None),
        room: Room::default(),
        bottom: Mutex::new(Arc::new(bottom)),
        recovered: Recovered::Clean,
        stream: None,
        pool: Arc::new(Pool::default()),
        notices: Arc::new(Pool::default()),
        syncs: Arc::new(Pool::default()),
        maps: Arc::new(Pool::of(MAPPERS)),
        maintaining: false.into(),
        held: false.into(),
        closed: false.into(),
        leaving: false.into(),
        grain,
        nameless: false.into(),
        references: 0.into(),
    }
}
