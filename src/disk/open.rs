//! From a disk's spec to a disk: opening its base, finding or making its overlay.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};
use uuid::Uuid;

use super::bottom::{Bottom, Misfit, base_mismatch, check_base, over};
use super::fetch::Hydration;
use super::life::{Frozen, Life, LifeError};
use super::{Disk, Home, Layers, Owner, Times, Top, mtime_of, now};
use crate::base::place::{self, PlaceError};
use crate::base::{self, Access, Base, BaseError, BaseLayer, Opening};
use crate::layer::{Layer, Wait};
use crate::overlay::persist::{self, Found, New, Persistent, Place, Residence};
use crate::overlay::record::{Image, Nanos, Stamp};
use crate::overlay::recover::Recovered;
use crate::overlay::sealed::Sealed;
use crate::overlay::shelf::Shelf;
use crate::overlay::stack::{LayerRecord, Stack, StackError, VERSION, doing, open_dir};
use crate::overlay::tree::Tree;
use crate::overlay::{DEFAULT_BLOCK, LARGEST, Overlay, keep};
use crate::pool::Pool;
use crate::spec::{DiskSpec, Mode, OverlayKind, Source, format_size};
use crate::stream::Ending;
use crate::stream::output::Patience;
use crate::stream::sink::Inherit;

/// Why a disk cannot be mounted; each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Its base.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// A file of it lies where it would wait for itself.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// Its overlay.
    #[error("overlay '{}' {error}", dir.display())]
    Overlay {
        /// The overlay's directory.
        dir: PathBuf,
        /// What is wrong with it.
        error: StackError,
    },
    /// The overlay belongs to something else, or to something that has changed.
    #[error("overlay '{}' {why}", dir.display())]
    Mismatch {
        /// The overlay's directory.
        dir: PathBuf,
        /// What does not fit and what to do.
        why: String,
    },
    /// No file for a temporary overlay.
    #[error("no temporary overlay in '{}': {error}; set TMPDIR to a directory on a disk", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// The host's answer.
        error: io::Error,
    },
    /// The base could not be read to recognise it later.
    #[error("base '{}' cannot be read: {error}", path.display())]
    Unreadable {
        /// The base.
        path: PathBuf,
        /// The host's answer.
        error: io::Error,
    },
    /// Its sink or its source.
    #[error("{0}")]
    Stream(String),
    /// There is nothing to keep.
    #[error("{0}")]
    NothingToKeep(String),
}

impl OpenError {
    /// The host's errno behind it, if there is one.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Overlay { error: StackError::Io { error, .. }, .. }
            | Self::Temporary { error, .. }
            | Self::Unreadable { error, .. } => error.raw_os_error(),
            _ => None,
        }
    }
}

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
    let place = spec.overlay.as_deref().map(|dir| Place { dir, layers: None });
    let opened = open_layers(spec, place, setting, &Arc::default())?;
    if opened.disk.attributes(Wait::No).is_err() {
        // A base of another host: it is waited for now, so that no stat has to later.
        if let Err(error) = opened.disk.attributes(Wait::Yes) {
            log::debug!("{}: its extents are not known: {error}", spec.name);
        }
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
    let readable = bottom.metadata().map_or(0, |found| found.mode() & 0o044);
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
    Disk {
        uuid,
        mode: spec.mode,
        source,
        resize: spec.resize,
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
        home: Mutex::new(Home::Nowhere),
        life: Life::new((0, 0), None),
        copy_up: spec.copy_up,
        hydration: Hydration::default(),
        stands_alone: false.into(),
        overlay_dir: Mutex::new(None),
        bottom: Mutex::new(Arc::new(bottom)),
        recovered: Recovered::Clean,
        stream: None,
        pool: Arc::new(Pool::default()),
        notices: Arc::new(Pool::default()),
        syncs: Arc::new(Pool::default()),
        maintaining: false.into(),
        held: false.into(),
        closed: false.into(),
        leaving: false.into(),
    }
}

/// A new stack of one layer over `bottom`.
pub(super) fn new_stack(
    uuid: Uuid,
    bottom: &Bottom,
    owner: Owner,
    block: u32,
) -> Result<Stack, OpenError> {
    Ok(Stack {
        version: VERSION,
        uuid,
        uid: owner.uid,
        gid: owner.gid,
        perm: owner.perm,
        kind: OverlayKind::Blocks,
        base: bottom.record()?,
        layers: vec![LayerRecord { uuid: Uuid::new_v4(), block, parent: None }],
        snapshots: Vec::new(),
    })
}

/// The uuid for a new disk at `place`: in a store its directory is called so.
fn uuid_for(place: Place<'_>) -> Uuid {
    let name = place.layers.and_then(|_| place.dir.file_name()?.to_str());
    name.and_then(|name| Uuid::parse_str(name).ok()).unwrap_or_else(Uuid::new_v4)
}

pub(super) fn in_overlay(dir: &Path) -> impl FnOnce(StackError) -> OpenError {
    let dir = dir.to_owned();
    move |error| OpenError::Overlay { dir, error }
}

fn open_persistent(
    spec: &DiskSpec,
    place: Place<'_>,
    base: &Base,
    bottom: &Bottom,
    owner: Owner,
    setting: &Setting<'_>,
    shelf: &Shelf,
) -> Result<Persistent, OpenError> {
    let dir = place.dir;
    if !persist::exists(dir).map_err(in_overlay(dir))? {
        let size = spec.size.unwrap_or(base.size).min(LARGEST);
        let stack = new_stack(uuid_for(place), bottom, owner, spec.block.unwrap_or(DEFAULT_BLOCK))?;
        let image = &Image::new(size, size.min(base.size));
        let new = New { stack, image, limit: spec.limit };
        return persist::create(place, new).map_err(in_overlay(dir));
    }
    let found = persist::find(place).map_err(in_overlay(dir))?;
    let mismatch = |why| Err(OpenError::Mismatch { dir: dir.to_owned(), why });
    if let Some(why) = block_mismatch(spec, &found) {
        return mismatch(why);
    }
    // What it was is no more and what it will be not yet: the commit has to be finished.
    let is_changed = matches!(base_mismatch(&found.stack.base, bottom)?, Some(Misfit::Changed(_)));
    if !is_changed || !found.is_committing().map_err(in_overlay(dir))? {
        check_base(dir, &found.stack.base, bottom, setting)?;
    }
    if place.layers.is_none() {
        found.sweep();
    }
    let mut persistent = found.open(spec.limit, shelf).map_err(in_overlay(dir))?;
    let size = persistent.overlay.size();
    if let Some(wanted) = spec.size.filter(|wanted| *wanted != size) {
        let (has, wanted) = (format_size(size), format_size(wanted));
        return mismatch(format!(
            "presents {has}, not {wanted}: leave out size= and use truncate on the mounted file"
        ));
    }
    adopt_owner(spec, &mut persistent.home).map_err(in_overlay(dir))?;
    Ok(persistent)
}

/// What the spec says of the owner overrules what was kept, and is kept from now on.
pub(super) fn adopt_owner(spec: &DiskSpec, home: &mut Residence) -> Result<(), StackError> {
    let mut stack = home.stack.clone();
    stack.uid = spec.uid.unwrap_or(stack.uid);
    stack.gid = spec.gid.unwrap_or(stack.gid);
    stack.perm = spec.perm.unwrap_or(stack.perm);
    if stack == home.stack { Ok(()) } else { home.replace(stack) }
}

fn block_mismatch(spec: &DiskSpec, found: &Found) -> Option<String> {
    let wanted = spec.block.filter(|wanted| *wanted != found.block())?;
    let (has, wanted) = (format_size(found.block().into()), format_size(wanted.into()));
    Some(format!("has blocks of {has}, not {wanted}: leave out block=, it is fixed at creation"))
}

/// A disk over a persistent overlay, with the attributes that the overlay kept.
fn settle(
    spec: &DiskSpec,
    persistent: Persistent,
    base: &Arc<dyn Layer>,
    bottom: Bottom,
    dir: &Path,
    mut notes: Vec<String>,
) -> Opened {
    let Persistent { overlay, below, aside, recovered, home } = persistent;
    let stack = &home.stack;
    let owner = Owner { uid: stack.uid, gid: stack.gid, perm: stack.perm };
    let (mtime, chosen) = last_mtime(&overlay, recovered);
    let recorded = overlay.mtime().map(|(mtime, _)| mtime);
    // Exact for one layer; of several the most it can be, for finding out more takes time.
    let sealed: u64 = below.iter().map(|layer| layer.usage().data).sum();
    let changed = overlay.usage().data + sealed;
    let summary = format!(
        "{}, overlay '{}' ({} changed)",
        format_size(overlay.size()),
        dir.display(),
        format_size(changed)
    );
    match recovered {
        Recovered::New | Recovered::Clean => {}
        Recovered::All => notes.push("recovered: the daemon had died, nothing is lost".to_owned()),
        Recovered::Vouched { lost } => notes.push(format!(
            "recovered as after a power cut: the disk is as it was at its last sync ({lost} later changes of its map are gone)"
        )),
    }
    let chain = stack.tree().live();
    let uuid = stack.uuid;
    let layers = stacked(overlay, below.clone(), base);
    if let Top::Overlay(top) = &layers.top {
        let aside = aside.iter().map(|(_, layer)| Arc::clone(layer));
        top.stand_on(&below.iter().cloned().chain(aside).collect::<Vec<_>>());
    }
    let size = spec.size.unwrap_or(base.size());
    if layers.top.is_committing() {
        notes.push(
            "a commit into the base was cut short: reads are right, 'cowslip commit' finishes it"
                .to_owned(),
        );
    }
    let mut disk = assemble(spec, uuid, layers, bottom, owner);
    disk.life = Life::new((size, size.min(base.size())), spec.limit);
    disk.life.locking = Some(spec.locking);
    disk.life.note(&chain, &below, aside);
    disk.times = Times::new(mtime, chosen, recorded);
    disk.recovered = recovered;
    disk.home = Mutex::new(Home::Kept(home));
    disk.overlay_dir = Mutex::new(Some(dir.to_owned()));
    Opened { disk, summary, notes }
}

/// The modification time to go on with. After a crash the data file may know a later write than
/// the log does.
fn last_mtime(overlay: &Overlay, recovered: Recovered) -> (Nanos, bool) {
    let Some((mtime, stamp)) = overlay.mtime() else {
        return (now(), false);
    };
    let data = overlay.first_file().and_then(|file| file.metadata().ok());
    match (stamp, recovered, data) {
        (Stamp::Chosen, ..) => (mtime, true),
        (Stamp::Written, Recovered::All, Some(found)) => (mtime.max(mtime_of(&found)), false),
        (Stamp::Written, ..) => (mtime, false),
    }
}

/// Opens the disk `name` of a store, taking from `shelf` the layers that are open already.
///
/// # Errors
/// [`OpenError`].
pub fn open_stored(
    name: &str,
    place: Place<'_>,
    setting: &Setting<'_>,
    shelf: &Arc<Shelf>,
) -> Result<Opened, OpenError> {
    let stack = open_dir(place.dir).map_err(doing("opening it")).and_then(|dir| Stack::read(&dir));
    let stack = stack.map_err(in_overlay(place.dir))?;
    let spec = over(name, &stack.base).map_err(in_overlay(place.dir))?;
    open_layers(&spec, Some(place), setting, shelf).map_err(|error| match error {
        // The user did not name it, so it is not for the user to check the name.
        OpenError::Base(BaseError::Missing(base)) => OpenError::Mismatch {
            dir: place.dir.to_owned(),
            why: format!(
                "needs its base '{}', which is gone: put it back, or use cowslip rebase if it was moved",
                base.display()
            ),
        },
        error => error,
    })
}

/// Makes the disk that `spec` asks for in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_stored(
    spec: &DiskSpec,
    place: Place<'_>,
    setting: &Setting<'_>,
) -> Result<Opened, OpenError> {
    open_layers(spec, Some(place), setting, &Arc::default())
}

/// Makes an empty disk in a store.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn create_blank(
    name: &str,
    uuid: Uuid,
    place: Place<'_>,
    owner: Owner,
) -> Result<Opened, OpenError> {
    let stack = new_stack(uuid, &Bottom::Blank(0), owner, DEFAULT_BLOCK)?;
    let new = New { stack, image: &Image::new(0, 0), limit: None };
    let persistent = persist::create(place, new).map_err(in_overlay(place.dir))?;
    Ok(settle_stored(name, 0, persistent, place.dir))
}

fn settle_stored(name: &str, size: u64, persistent: Persistent, dir: &Path) -> Opened {
    let spec = DiskSpec::new(name.to_owned(), Source::Blank(size));
    let base: Arc<dyn Layer> = Arc::new(base::blank::Blank::new(size));
    settle(&spec, persistent, &base, Bottom::Blank(size), dir, Vec::new())
}

/// Makes a disk in a store that holds what `from`, another disk of it, holds now.
///
/// # Errors
/// [`OpenError`], [`LifeError`] as its text; nothing is left behind then.
pub fn clone_stored(
    from: &Disk,
    name: &str,
    place: Place<'_>,
    shelf: &Arc<Shelf>,
) -> Result<Opened, OpenError> {
    let refused = |error: LifeError| OpenError::NothingToKeep(error.to_string());
    let _turn = from.begin("a clone").map_err(refused)?;
    if from.is_latched() {
        return Err(refused(LifeError::Latched));
    }
    let Frozen { layer, size, stack: old } = from.freeze().map_err(refused)?;
    let spec = over(name, &old.base).map_err(in_overlay(place.dir))?;
    let bottom = from.bottom();
    let how = Opening {
        format: spec.format,
        part: spec.part,
        access: Access::Read,
        locking: spec.locking,
        allow_backing: bottom.allow_backing(),
    };
    let base = base::open(&spec.source, how)?;
    let mut tree = Tree { layers: old.tree().chain(layer), snapshots: Vec::new() };
    tree.layers.reverse();
    tree.grow(Uuid::new_v4(), Some(layer));
    let stack = Stack { uuid: uuid_for(place), ..old.with_tree(tree.clone()) };
    let image =
        Image { mtime: from.overlay().and_then(|top| top.mtime()), ..Image::new(size, size) };
    let new = New { stack, image: &image, limit: None };
    let alone = shelf.alone();
    if !from.is_on_disk() {
        // What it stood on may have gone with it.
        return Err(OpenError::NothingToKeep("it was removed meanwhile".to_owned()));
    }
    let mut made = persist::create(place, new).map_err(in_overlay(place.dir))?;
    drop(alone);
    for record in tree.live().iter().skip(1) {
        let layer = made.home.sealed(record.uuid, shelf).map_err(in_overlay(place.dir))?;
        made.below.push(layer);
    }
    let bottom = Bottom::of(&base, how);
    Ok(settle(&spec, made, &base.layer.reader(), bottom, place.dir, Vec::new()))
}

/// What the base's file system cannot do.
fn notes_on_base(base: &Base, setting: &Setting<'_>) -> Vec<String> {
    let (Some(path), Some(file)) = (&base.path, &base.file) else {
        return Vec::new();
    };
    let dir = path.parent().unwrap_or(Path::new("/")).to_owned();
    let is_file = file.metadata().is_ok_and(|found| found.is_file());
    if !is_file || !setting.looked_at.lock().insert(dir) {
        return Vec::new();
    }
    match place::shows_holes(file) {
        Ok(false) => {
            vec!["the base's file system cannot tell holes: all of it counts as data".to_owned()]
        }
        Ok(true) | Err(_) => Vec::new(),
    }
}

/// What the overlay's file system cannot do.
pub(super) fn notes_on_overlay(dir: &Path, setting: &Setting<'_>) -> Vec<String> {
    // The overlay's own directory, with a mark so that a base beside it is looked at as well.
    if !setting.looked_at.lock().insert(dir.join("overlay")) {
        return Vec::new();
    }
    let Ok(found) = place::abilities(dir) else {
        return Vec::new();
    };
    let line = |what| format!("'{}' is on {}: {what}", dir.display(), found.fs.name);
    found.missing().into_iter().map(line).collect()
}

impl Disk {
    /// What its bottom is called in `status`.
    #[must_use]
    pub fn base_path(&self) -> Option<PathBuf> {
        self.bottom().path().map(Path::to_owned)
    }

    /// Whether its overlay is still in its directory, and not removed.
    fn is_on_disk(&self) -> bool {
        self.home.lock().residence().is_some_and(|home| home.is_on_disk())
    }

    /// The mount did not come about: closes the disk in good order, and removes an overlay that
    /// was made for it.
    pub fn abandon(&self) {
        if self.stream().is_some() {
            if let Err(error) = self.settle(Ending::Abort, Patience::Endless) {
                log::warn!("{}: {error}", self.source);
            }
            return;
        }
        if let Err(error) = self.close(Duration::MAX) {
            log::warn!("{}: {error}", self.source);
        }
        if self.recovered == Recovered::New
            && let Some(dir) = self.overlay_dir()
            && let Err(error) = std::fs::remove_dir_all(&dir)
        {
            log::warn!("'{}' is left behind: {error}", dir.display());
        }
    }

    pub(super) fn keep_in(&self, place: Place<'_>) -> Result<(), OpenError> {
        let dir = place.dir;
        let nothing = |why: &str| Err(OpenError::NothingToKeep(why.to_owned()));
        if self.stream().is_some() {
            return nothing("the disk is a stream: what was written has left or will");
        }
        let _turn = self
            .begin("keeping it")
            .map_err(|error| OpenError::NothingToKeep(error.to_string()))?;
        // A change that hangs is not waited for: nobody else could do anything until it ends.
        let _gate =
            self.enter_to_switch().map_err(|error| OpenError::NothingToKeep(error.to_string()))?;
        let layers = self.layers();
        let Top::Overlay(overlay) = &layers.top else {
            if let Some(dir) = self.overlay_dir() {
                return nothing(&format!("the disk is kept already, in '{}'", dir.display()));
            }
            return nothing("the disk has no overlay: mode=ro and mode=rw have nothing to keep");
        };
        if let Some(dir) = self.overlay_dir() {
            return nothing(&format!("the disk is kept already, in '{}'", dir.display()));
        }
        if persist::exists(dir).map_err(in_overlay(dir))? {
            return Err(OpenError::Mismatch {
                dir: dir.to_owned(),
                why: "is there already: name a new directory".to_owned(),
            });
        }
        let block = u32::try_from(overlay.block()).unwrap_or(DEFAULT_BLOCK);
        let refused = |error: LifeError| OpenError::NothingToKeep(error.to_string());
        let tree = self.tree("changes to keep").map_err(refused)?;
        let stack = new_stack(self.uuid, &self.bottom(), self.owner(), block)?;
        self.record_mtime(overlay);
        let all = self.all_layers(&tree).map_err(refused)?;
        let kept = keep::keep(&all, place, stack.with_tree(tree.clone()));
        let Persistent { overlay, below, aside, home, .. } = kept.map_err(in_overlay(dir))?;
        self.life.note(&tree.live(), &below, aside);
        overlay.stand_on(&below);
        let sealed = Sealed::new(below).map(Arc::new);
        let top = Top::Overlay(Arc::new(overlay));
        *self.layers.write() = Arc::new(Layers::new(top, sealed, layers.bottom.clone()));
        *self.home.lock() = Home::Kept(home);
        *self.overlay_dir.lock() = Some(dir.to_owned());
        Ok(())
    }
}
