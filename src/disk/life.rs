//! The life of an overlay: snapshots, going back to one, deleting one, starting anew.
//!
//! All of them come down to one replacement of the `stack`. What takes time, the merging of layers
//! that no name holds apart any more, is done in the background afterwards (`tidy`), and gives way
//! to whoever wants something of the disk.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex, RwLockWriteGuard};
use uuid::Uuid;

use super::{Disk, Home, Layers, Owner, Top};
use crate::base::raw::{HostKind, RawBase};
use crate::host::errno;
use crate::layer::{Layer, WritableLayer};
use crate::overlay::record::Image;
use crate::overlay::reflink::{self, Reflink, ReflinkError};
use crate::overlay::sealed::Sealed;
use crate::overlay::shelf::Shelf;
use crate::overlay::stack::{LayerRecord, SnapshotRecord, Stack, StackError};
use crate::overlay::tree::{self, Tree};
use crate::overlay::{Overlay, Usage, keep};
use crate::spec::{DiskSpec, Locking, Mode, Source};

/// How long requests that change the disk are waited for before its layers change.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long work in the background may take to give way.
const GIVE_WAY: Duration = Duration::from_secs(60);
/// What the top may hold while it is merged with all writers waiting: 16 MiB.
const LITTLE: u64 = 16 << 20;
/// How often the top is sealed and merged before what is left is merged with writers waiting.
const ROUNDS: u32 = 4;

/// Why an operation on a disk's layers was not done; one line each. Nothing has changed then.
#[derive(Debug, thiserror::Error)]
pub enum LifeError {
    /// `mode=ro`, `mode=rw`, a stream.
    #[error("it has no overlay: only copy-on-write disks have {0}")]
    NoOverlay(&'static str),
    /// A name that cannot be a snapshot's.
    #[error("'{name}' {why}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// There is one already.
    #[error("there is a snapshot '{0}' already: take another name, or delete that one first")]
    Exists(String),
    /// There is none.
    #[error("there is no snapshot '{0}': cowslip snapshot --list shows those there are")]
    Unknown(String),
    /// Somebody may be writing.
    #[error("it is open for writing")]
    Writers,
    /// One thing at a time.
    #[error("{0} is going on: wait for its end")]
    Busy(&'static str),
    /// A sync has failed.
    #[error("it is read-only since a sync failed: unmount it and see the log")]
    Latched,
    /// Its base is neither old nor new.
    #[error("a commit of it was cut short: cowslip commit finishes it, then try again")]
    Unfinished,
    /// A writer does not come back.
    #[error("a change still waits for the base or the host: try again")]
    Stuck,
    /// The mount ends, or nobody waits for it any more.
    #[error("interrupted: nothing is lost, run it again")]
    Interrupted,
    /// Its files.
    #[error(transparent)]
    Stack(#[from] StackError),
    /// Its reflink overlay.
    #[error("it {0}")]
    Reflink(#[from] ReflinkError),
    /// The host said no.
    #[error("{what}: {error}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// The host's answer.
        error: io::Error,
    },
    /// It cannot be done to this disk; what, and what to do.
    #[error("{0}")]
    Refused(String),
}

impl LifeError {
    /// Names what was being done when the host said no.
    pub(super) fn host(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |error| match error.raw_os_error() {
            Some(libc::EINTR) => Self::Interrupted,
            _ => Self::Host { what, error },
        }
    }
}

/// Whether it is done although somebody may be writing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Force {
    /// It is refused then.
    No,
    /// It is done.
    Yes,
}

/// Tells which layers the disks other than the given one stand on.
pub type Others = Arc<dyn Fn(&Uuid) -> io::Result<HashSet<Uuid>> + Send + Sync>;

/// What a disk knows about its layers beyond those it reads through.
pub(super) struct Life {
    /// What is being done to the disk as a whole, and whether it has to give way.
    doing: Mutex<Option<Doing>>,
    done: Condvar,
    /// Work that takes long is to stop: the mount ends.
    pub(super) ending: AtomicBool,
    /// There may be layers to merge.
    untidy: AtomicBool,
    /// Sealed layers of this disk, those it does not read through included.
    sealed: Mutex<HashMap<Uuid, Arc<Overlay>>>,
    /// Sealed layers open in this process.
    shelf: Mutex<Arc<Shelf>>,
    /// Who else may stand on them; `None`: nobody.
    others: Mutex<Option<Others>>,
    /// The files of snapshots that were looked up, by their layer.
    files: Mutex<HashMap<Uuid, Arc<Disk>>>,
    /// The size of a new overlay over the base, and how much of the base it shows.
    pub(super) fresh: Mutex<(u64, u64)>,
    /// How a commit locks the base.
    pub(super) locking: Option<Locking>,
    /// How far what is being done has come, in bytes, and of how many.
    pub(super) done_bytes: AtomicU64,
    pub(super) all_bytes: AtomicU64,
    /// What all its layers may hold together, in bytes.
    pub(super) limit: Option<u64>,
    /// What the layers were last found to show, under which revision of the top.
    shown: Mutex<Option<(u64, Uuid, Vec<Usage>)>>,
}

#[derive(Clone, Copy)]
struct Doing {
    what: &'static str,
    /// It is nobody's request, so it stops when there is one.
    background: bool,
    stop: bool,
}

impl Life {
    /// `fresh`: the size of a new overlay, and how much of the base it shows.
    pub(super) fn new(fresh: (u64, u64), limit: Option<u64>) -> Self {
        Self {
            doing: Mutex::default(),
            done: Condvar::new(),
            ending: AtomicBool::new(false),
            untidy: AtomicBool::new(true),
            sealed: Mutex::default(),
            shelf: Mutex::default(),
            others: Mutex::default(),
            files: Mutex::default(),
            fresh: Mutex::new(fresh),
            locking: None,
            done_bytes: AtomicU64::new(0),
            all_bytes: AtomicU64::new(0),
            limit,
            shown: Mutex::default(),
        }
    }

    /// The sealed layers open in this process.
    pub(super) fn shelf(&self) -> Arc<Shelf> {
        Arc::clone(&self.shelf.lock())
    }

    /// Notes the sealed layers `below`, top to bottom, of the stack whose layers are `chain`.
    pub(super) fn note(&self, chain: &[LayerRecord], below: &[Arc<Overlay>]) {
        let mut sealed = self.sealed.lock();
        for (record, layer) in chain.iter().skip(1).zip(below) {
            sealed.insert(record.uuid, Arc::clone(layer));
        }
    }
}

/// What a clone stands on.
pub(super) struct Frozen {
    /// The sealed layer.
    pub(super) layer: Uuid,
    /// The size of the disk in it, in bytes.
    pub(super) size: u64,
    /// The stack it belongs to.
    pub(super) stack: Stack,
}

/// One operation on a disk as a whole, until it is dropped.
pub(super) struct Turn<'a>(&'a Life);

impl Turn<'_> {
    /// Whether work that takes long has to stop.
    pub(super) fn must_stop(&self) -> bool {
        self.0.ending.load(Ordering::SeqCst) || self.0.doing.lock().is_some_and(|doing| doing.stop)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.done_bytes.store(0, Ordering::Relaxed);
        self.0.all_bytes.store(0, Ordering::Relaxed);
        *self.0.doing.lock() = None;
        self.0.done.notify_all();
    }
}

/// What is seen of a snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotInfo {
    /// Its name.
    pub name: String,
    /// When it was taken, in seconds since the epoch.
    pub taken: i64,
    /// The disk's size then, in bytes.
    pub size: u64,
    /// What its own layer holds: the changes between the snapshot before it and itself. `None`
    /// for a reflink overlay, whose snapshots are whole files.
    pub usage: Option<Usage>,
    /// What has changed since; `None` when the disk does not stand on it.
    pub since: Option<Usage>,
}

/// A layer that a disk reads through, for `status`.
#[derive(Clone, Debug)]
pub struct Since {
    /// The snapshot it is; `None` for the top and for a layer without a name.
    pub name: Option<String>,
    /// Its uuid.
    pub uuid: Uuid,
    /// What it holds.
    pub usage: Usage,
    /// What it and the layers above it have changed.
    pub since: Usage,
}

fn add(one: Usage, other: Usage) -> Usage {
    Usage { data: one.data + other.data, zero: one.zero + other.zero }
}

/// How far layers were merged.
enum Tidied {
    All,
    Some,
}

/// Above what a new top is put.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Above {
    /// The old top, which is sealed by that.
    Top,
    /// A sealed layer.
    Layer(Uuid),
    /// The base.
    Base,
}

/// A top that is made and not yet in its place.
struct NewTop {
    uuid: Uuid,
    overlay: Overlay,
    lock: Option<File>,
}

impl Disk {
    /// Begins an operation on the disk as a whole.
    pub(super) fn begin(&self, what: &'static str) -> Result<Turn<'_>, LifeError> {
        self.begin_as(what, false)
    }

    fn begin_as(&self, what: &'static str, background: bool) -> Result<Turn<'_>, LifeError> {
        let life = &self.life;
        if life.ending.load(Ordering::SeqCst) {
            return Err(LifeError::Interrupted);
        }
        let mut doing = life.doing.lock();
        if let Some(now) = &mut *doing {
            if background || !now.background {
                return Err(LifeError::Busy(now.what));
            }
            now.stop = true;
            life.done.wait_while_for(&mut doing, |doing| doing.is_some(), GIVE_WAY);
            if let Some(now) = &*doing {
                return Err(LifeError::Busy(now.what));
            }
        }
        *doing = Some(Doing { what, background, stop: false });
        Ok(Turn(life))
    }

    /// What is being done to the disk as a whole, for `status`.
    #[must_use]
    pub fn doing(&self) -> Option<&'static str> {
        self.life.doing.lock().map(|doing| doing.what)
    }

    /// Makes work that takes long stop, and waits for it.
    pub(super) fn end_life(&self, patience: Duration) {
        self.life.ending.store(true, Ordering::SeqCst);
        let mut doing = self.life.doing.lock();
        self.life.done.wait_while_for(&mut doing, |doing| doing.is_some(), patience);
        drop(doing);
        self.life.files.lock().clear();
    }

    /// Handles that its snapshots' files have.
    pub(super) fn snapshot_openers(&self) -> u32 {
        self.life.files.lock().values().map(|file| file.openers()).sum()
    }

    /// The disk's layers and their names; `what` is for the error.
    pub(super) fn tree(&self, what: &'static str) -> Result<Tree, LifeError> {
        if self.reflink().is_some() {
            return Err(LifeError::Refused(format!(
                "its overlay is a reflink copy of the base: only block maps have {what}"
            )));
        }
        self.home.lock().tree().ok_or(LifeError::NoOverlay(what))
    }

    /// The gate, for a change of the layers. What waits behind it has no deadline meanwhile.
    pub(super) fn enter_to_switch(&self) -> Result<RwLockWriteGuard<'_, ()>, LifeError> {
        let gate = self.gate.try_write_for(PATIENCE).ok_or(LifeError::Stuck)?;
        if self.closed.load(Ordering::SeqCst) { Err(LifeError::Interrupted) } else { Ok(gate) }
    }

    pub(super) fn check_writers(&self, force: Force) -> Result<(), LifeError> {
        if force == Force::No && self.has_writers() {
            return Err(LifeError::Writers);
        }
        Ok(())
    }

    /// Takes a snapshot. It is there, and what was written before it is in it, when this returns;
    /// that all of that is durable only a sync promises.
    ///
    /// # Errors
    /// [`LifeError`]; nothing has changed then.
    pub fn snapshot(&self, name: Option<&str>) -> Result<String, LifeError> {
        let _turn = self.begin("a snapshot")?;
        let taken = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
        let names = self.snapshot_names();
        let name = name.map_or_else(|| free_name(&names, taken), str::to_owned);
        if let Some(reflink) = self.reflink() {
            let _gate = self.enter_to_switch()?;
            reflink.snapshot(&name)?;
            return Ok(name);
        }
        let tree = self.tree("snapshots")?;
        if let Err(why) = tree::check_name(&name) {
            return Err(LifeError::Name { name, why });
        }
        if tree.snapshot(&name).is_some() {
            return Err(LifeError::Exists(name));
        }
        if self.is_latched() {
            return Err(LifeError::Latched);
        }
        self.seal(Some((&name, taken.cast_signed())))?;
        Ok(name)
    }

    /// Freezes the top and puts an empty one above it.
    fn seal(&self, name: Option<(&str, i64)>) -> Result<(), LifeError> {
        self.put_top(Above::Top, Force::Yes, |tree, old| {
            let named = |(name, taken): (&str, i64)| SnapshotRecord {
                name: name.to_owned(),
                layer: old,
                taken,
            };
            tree.snapshots.extend(name.map(named));
        })
    }

    /// Makes the disk what it was at snapshot `name`. What was changed since is gone, unless
    /// another snapshot holds it.
    ///
    /// # Errors
    /// [`LifeError`]; nothing has changed then.
    pub fn revert(&self, name: &str, force: Force) -> Result<(), LifeError> {
        let _turn = self.begin("a revert")?;
        if let Some(reflink) = self.reflink() {
            return self.switch_reflink(force, || reflink.revert(name));
        }
        let tree = self.tree("snapshots")?;
        let unknown = || LifeError::Unknown(name.to_owned());
        let layer = tree.snapshot(name).ok_or_else(unknown)?.layer;
        self.check_writers(force)?;
        self.put_top(Above::Layer(layer), force, |_, _| {})
    }

    /// Makes the disk what its base is. Its snapshots stay.
    ///
    /// # Errors
    /// [`LifeError`]; nothing has changed then.
    pub fn reset(&self, force: Force) -> Result<(), LifeError> {
        let _turn = self.begin("a reset")?;
        if let Some(reflink) = self.reflink() {
            return self.switch_reflink(force, || reflink.reset());
        }
        self.tree("changes to reset")?;
        self.check_writers(force)?;
        self.put_top(Above::Base, force, |_, _| {})
    }

    /// Has the one file of a reflink overlay become another.
    fn switch_reflink(
        &self,
        force: Force,
        switch: impl FnOnce() -> Result<(), ReflinkError>,
    ) -> Result<(), LifeError> {
        self.check_writers(force)?;
        let _gate = self.enter_to_switch()?;
        self.check_writers(force)?;
        Ok(switch()?)
    }

    /// Opens the layer `uuid` and all below it, top to bottom.
    fn open_chain(&self, tree: &Tree, uuid: Uuid) -> Result<Vec<Arc<Overlay>>, LifeError> {
        let mut chain = Vec::new();
        // The lowest first: what stands on it is read only once it is as it will stay.
        for record in tree.chain(uuid).iter().rev() {
            let known = self.life.sealed.lock().get(&record.uuid).cloned();
            let layer = match (known, &mut *self.home.lock()) {
                (Some(layer), _) => layer,
                (None, Home::Kept(home)) => home.sealed(record.uuid, &self.life.shelf())?,
                (None, _) => return Err(LifeError::host("opening a layer")(errno(libc::ENOENT))),
            };
            self.life.sealed.lock().insert(record.uuid, Arc::clone(&layer));
            chain.push(layer);
        }
        chain.reverse();
        Ok(chain)
    }

    /// Makes an empty layer for this disk, which no stack names yet.
    fn make_layer(
        &self,
        tree: &Tree,
        parent: Option<Uuid>,
        image: &Image,
        limit: Option<u64>,
    ) -> Result<NewTop, LifeError> {
        let uuid = Uuid::new_v4();
        let block = tree.top().map_or(crate::overlay::DEFAULT_BLOCK, |top| top.block);
        let record = LayerRecord { uuid, block, parent };
        let (overlay, lock) = match &mut *self.home.lock() {
            Home::Kept(home) => {
                let (overlay, lock) = home.add_layer(&record, image, limit)?;
                (overlay, Some(lock))
            }
            Home::Temporary { dir, .. } => {
                let made = keep::temporary(dir, block, image.size, image.lower_limit, limit);
                (made.map_err(LifeError::host("making a file for a layer"))?, None)
            }
            Home::Nowhere => return Err(LifeError::NoOverlay("layers")),
        };
        Ok(NewTop { uuid, overlay, lock })
    }

    /// Removes a layer that did not come into a stack.
    fn unmake(&self, uuid: Uuid) {
        if let Some(home) = self.home.lock().residence() {
            home.remove_layer(uuid);
        }
    }

    /// What a top above `below` may hold, in bytes of data.
    fn limit_above(&self, below: &[Arc<Overlay>]) -> Option<u64> {
        let held: u64 = below.iter().map(|layer| layer.usage().data).sum();
        self.life.limit.map(|limit| limit.saturating_sub(held))
    }

    /// Puts an empty top in place. `change` is given the new tree and the old top.
    fn put_top(
        &self,
        above: Above,
        force: Force,
        change: impl FnOnce(&mut Tree, Uuid),
    ) -> Result<(), LifeError> {
        let tree = self.tree("layers")?;
        let old = tree.top().map(|top| top.uuid).ok_or(LifeError::NoOverlay("layers"))?;
        let Some(top) = self.overlay() else { return Err(LifeError::NoOverlay("layers")) };
        if top.is_committing() {
            return Err(LifeError::Unfinished);
        }
        let parent = match above {
            Above::Top => Some(old),
            Above::Layer(layer) => Some(layer),
            Above::Base => None,
        };
        let mut below = match above {
            Above::Top => self.layers().sealed.as_ref().map_or(Vec::new(), |s| s.layers().to_vec()),
            Above::Layer(layer) => self.open_chain(&tree, layer)?,
            Above::Base => Vec::new(),
        };
        if above == Above::Top {
            below.insert(0, Arc::clone(&top));
        }
        let limit = self.limit_above(&below);
        let size = below.first().map_or(0, |layer| layer.size());
        let fresh = *self.life.fresh.lock();
        let image = |top: &Overlay| match above {
            Above::Base => Image::new(fresh.0, fresh.1),
            Above::Top => Image::new(top.size(), top.size()),
            Above::Layer(_) => Image::new(size, size),
        };
        // Made before the gate is taken: writers wait for the switch alone.
        let mut new = self.make_layer(&tree, parent, &image(&top), limit)?;
        let mut uuid = new.uuid;
        let shelf = self.life.shelf();
        let _alone = shelf.alone();
        let switch = || -> Result<Tree, LifeError> {
            let _gate = self.enter_to_switch()?;
            self.check_writers(force)?;
            if above == Above::Top {
                if top.size() != new.overlay.size() {
                    self.unmake(uuid);
                    new = self.make_layer(&tree, parent, &image(&top), limit)?;
                    uuid = new.uuid;
                }
                self.record_mtime(&top);
                shelf.put(old, &top);
                self.life.sealed.lock().insert(old, Arc::clone(&top));
            }
            let mut next = tree.clone();
            next.grow(uuid, parent);
            change(&mut next, old);
            next.prune();
            self.install(&next, new, below)?;
            if above != Above::Top {
                self.touch(&self.layers().top);
            }
            Ok(next)
        };
        match switch() {
            Ok(next) => {
                self.drop_layers(&tree, &next);
                Ok(())
            }
            Err(error) => {
                self.unmake(uuid);
                Err(error)
            }
        }
    }

    /// Makes `new` the top, above `below`, and `next` the disk's tree. The gate is the caller's.
    fn install(&self, next: &Tree, new: NewTop, below: Vec<Arc<Overlay>>) -> Result<(), LifeError> {
        let layers = self.layers();
        let NewTop { overlay, lock, .. } = new;
        overlay.stand_on(&below);
        if let Top::Overlay(old) = &layers.top {
            overlay.follow(old);
        }
        self.times.recorded.store(i64::MIN, Ordering::SeqCst);
        self.record_mtime(&overlay);
        self.replace_stack(next, lock)?;
        let top = Top::Overlay(Arc::new(overlay));
        let layers = Layers::new(top, Sealed::new(below).map(Arc::new), layers.bottom.clone());
        *self.layers.write() = Arc::new(layers);
        Ok(())
    }

    /// Makes `next` the disk's tree, durably when it is kept.
    pub(super) fn replace_stack(&self, next: &Tree, lock: Option<File>) -> Result<(), LifeError> {
        match &mut *self.home.lock() {
            Home::Nowhere => Err(LifeError::NoOverlay("layers")),
            Home::Temporary { tree, .. } => {
                *tree = next.clone();
                Ok(())
            }
            Home::Kept(home) => {
                let stack = home.stack.with_tree(next.clone());
                let replaced = match lock {
                    Some(lock) => home.replace_top(stack, lock),
                    None => home.replace(stack),
                };
                if replaced.is_err()
                    && home.is_torn()
                    && let Some(overlay) = self.overlay()
                {
                    overlay.give_up();
                }
                Ok(replaced?)
            }
        }
    }

    /// Lets go of the layers that were in `old` and are not in `next`. The caller holds the
    /// shelf alone.
    pub(super) fn drop_layers(&self, old: &Tree, next: &Tree) {
        let gone = |uuid: &Uuid| next.layer(*uuid).is_none();
        self.life.sealed.lock().retain(|uuid, _| !gone(uuid));
        self.life.files.lock().retain(|uuid, _| !gone(uuid));
        let dropped: Vec<Uuid> = old.layers.iter().map(|layer| layer.uuid).filter(gone).collect();
        if dropped.is_empty() {
            return;
        }
        match self.layers_of_others() {
            Ok(needed) => {
                dropped.into_iter().filter(|uuid| !needed.contains(uuid)).for_each(|uuid| {
                    self.unmake(uuid);
                });
            }
            Err(error) => log::warn!("{}: layers are left behind: {error}", self.source),
        }
    }

    /// The layers that other disks stand on.
    fn layers_of_others(&self) -> io::Result<HashSet<Uuid>> {
        let others = self.life.others.lock().clone();
        others.map_or_else(|| Ok(HashSet::new()), |others| others(&self.uuid))
    }

    /// Deletes a snapshot: its name goes at once. What only it needed is given back in the
    /// background; what others stand on stays.
    ///
    /// # Errors
    /// [`LifeError`]; nothing has changed then.
    pub fn delete_snapshot(&self, name: &str) -> Result<(), LifeError> {
        let _turn = self.begin("the deletion of a snapshot")?;
        if let Some(reflink) = self.reflink() {
            self.life.files.lock().remove(&snapshot_uuid(&self.uuid, name));
            return Ok(reflink.delete(name)?);
        }
        let tree = self.tree("snapshots")?;
        if tree.snapshot(name).is_none() {
            return Err(LifeError::Unknown(name.to_owned()));
        }
        let mut next = tree.clone();
        next.snapshots.retain(|snapshot| snapshot.name != name);
        next.prune();
        let shelf = self.life.shelf();
        let _alone = shelf.alone();
        self.replace_stack(&next, None)?;
        self.drop_layers(&tree, &next);
        self.life.untidy.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// A layer that no name holds apart from the only one that stands on it.
    fn untidy(&self) -> Option<(Tree, Uuid, Uuid)> {
        let tree = self.home.lock().tree()?;
        tree.mergeable(|_| false)?;
        let shared = self.layers_of_others().ok()?;
        let (lower, upper) = tree.mergeable(|uuid| shared.contains(&uuid))?;
        Some((tree, lower, upper))
    }

    /// Whether no snapshot and no other disk holds its layers apart.
    pub(super) fn is_mergeable(&self) -> bool {
        let is_nameless = self.home.lock().tree().is_some_and(|tree| tree.snapshots.is_empty());
        is_nameless && !self.life.ending.load(Ordering::SeqCst) && self.untidy().is_some()
    }

    /// Whether `tidy` would have something to do.
    #[must_use]
    pub fn is_untidy(&self) -> bool {
        self.life.untidy.load(Ordering::SeqCst)
            && self.life.doing.lock().is_none()
            && !self.is_latched()
    }

    /// Merges the layers that no name holds apart any more. It gives way to whoever wants
    /// something of the disk, and is then done later.
    ///
    /// # Errors
    /// [`LifeError`]; the disk reads the same whatever happens.
    pub fn tidy(&self) -> Result<(), LifeError> {
        self.life.untidy.store(false, Ordering::SeqCst);
        let done = self.tidy_all();
        if !matches!(done, Ok(Tidied::All)) {
            self.life.untidy.store(true, Ordering::SeqCst);
        }
        done.map(|_| ())
    }

    fn tidy_all(&self) -> Result<Tidied, LifeError> {
        loop {
            // Before it is found out what to merge: a request would make something else of it.
            let Ok(turn) = self.begin_as("the merging of layers", true) else {
                return Ok(Tidied::Some);
            };
            let Some((tree, lower, upper)) = self.untidy() else {
                return Ok(Tidied::All);
            };
            let done = match tree.top() {
                Some(top) if top.uuid == upper => self.merge_into_top(&turn, lower),
                _ => self.merge(&turn, lower, upper),
            };
            match done {
                Err(LifeError::Interrupted | LifeError::Stuck) => return Ok(Tidied::Some),
                done => done?,
            }
        }
    }

    /// Makes one sealed layer of `lower` and `upper`, which stands on it alone.
    fn merge(&self, turn: &Turn<'_>, lower: Uuid, upper: Uuid) -> Result<(), LifeError> {
        let tree = self.tree("layers")?;
        let both = self.both(&tree, lower, upper)?;
        let new = self.merged(&tree, lower, &both, turn)?;
        let (uuid, layer) = (new.uuid, Arc::new(new.overlay));
        let done = || -> Result<Tree, LifeError> {
            layer.settle().map_err(LifeError::host("closing a merged layer"))?;
            let mut next = tree.clone();
            next.replace(upper, lower, uuid);
            self.replace_stack(&next, None)?;
            Ok(next)
        };
        let shelf = self.life.shelf();
        let _alone = shelf.alone();
        let next = done().inspect_err(|_| self.unmake(uuid))?;
        shelf.put(uuid, &layer);
        self.life.sealed.lock().insert(uuid, layer);
        let below = match next.top().and_then(|top| top.parent) {
            Some(parent) => self.open_chain(&next, parent)?,
            None => Vec::new(),
        };
        {
            // The bytes are the same: nobody has to wait.
            let mut layers = self.layers.write();
            if let Top::Overlay(top) = &layers.top {
                top.stand_on(&below);
                let top = Top::Overlay(Arc::clone(top));
                let sealed = Sealed::new(below).map(Arc::new);
                *layers = Arc::new(Layers::new(top, sealed, layers.bottom.clone()));
            }
        }
        self.drop_layers(&tree, &next);
        Ok(())
    }

    /// The layers `upper` and `lower`, looked up as one.
    fn both(&self, tree: &Tree, lower: Uuid, upper: Uuid) -> Result<Sealed, LifeError> {
        let gone = LifeError::NoOverlay("layers");
        let mut chain = self.open_chain(tree, upper)?;
        let depth = tree.chain(upper).iter().position(|layer| layer.uuid == lower);
        chain.truncate(depth.ok_or(gone)? + 1);
        Sealed::new(chain).ok_or(LifeError::NoOverlay("layers"))
    }

    /// A new layer in the place of `lower` that holds what `both` hold.
    fn merged(
        &self,
        tree: &Tree,
        lower: Uuid,
        both: &Sealed,
        turn: &Turn<'_>,
    ) -> Result<NewTop, LifeError> {
        let (Some(record), Some(bottom)) = (tree.layer(lower), both.layers().last()) else {
            return Err(LifeError::NoOverlay("layers"));
        };
        let parent = record.parent;
        let image = Image::new(bottom.size(), bottom.lower_limit());
        let new = self.make_layer(tree, parent, &image, None)?;
        let absorbed = new.overlay.absorb(both, &|| turn.must_stop());
        if let Err(error) = absorbed {
            self.unmake(new.uuid);
            return Err(LifeError::host("merging two layers")(error));
        }
        if let Some((mtime, stamp)) = both.layers().first().and_then(|layer| layer.mtime()) {
            // Best effort, as everywhere: it is recorded again when the mount ends.
            let _ = new.overlay.record_mtime(mtime, stamp);
        }
        Ok(new)
    }

    /// Makes one layer of the top and `lower`, on which only the top stands. The top is sealed
    /// and merged with writers going on, until so little is new that they can wait for the rest.
    fn merge_into_top(&self, turn: &Turn<'_>, lower: Uuid) -> Result<(), LifeError> {
        self.seal(None)?;
        let tree = self.tree("layers")?;
        let parent = |tree: &Tree| tree.top().and_then(|top| top.parent);
        let sealed = parent(&tree).ok_or(LifeError::NoOverlay("layers"))?;
        let new = self.merged(&tree, lower, &self.both(&tree, lower, sealed)?, turn)?;
        let uuid = new.uuid;
        self.finish_top(turn, lower, new).inspect_err(|_| self.unmake(uuid))
    }

    fn finish_top(&self, turn: &Turn<'_>, lower: Uuid, mut new: NewTop) -> Result<(), LifeError> {
        let absorb = |layer: Arc<Overlay>| -> Result<(), LifeError> {
            let layer = Sealed::new(vec![layer]).ok_or(LifeError::NoOverlay("layers"))?;
            let done = new.overlay.absorb(&layer, &|| turn.must_stop());
            done.map_err(LifeError::host("merging the newest changes"))
        };
        let sync = || {
            let synced = new.overlay.sync();
            synced.map_err(LifeError::host("making a merged layer durable"))
        };
        for _ in 0..ROUNDS {
            sync()?;
            let Some(top) = self.overlay() else { return Err(LifeError::NoOverlay("layers")) };
            if top.usage().data <= LITTLE {
                break;
            }
            self.seal(None)?;
            absorb(top)?;
        }
        let shelf = self.life.shelf();
        let _alone = shelf.alone();
        let tree = self.tree("layers")?;
        let below = match tree.layer(lower).and_then(|layer| layer.parent) {
            Some(parent) => self.open_chain(&tree, parent)?,
            None => Vec::new(),
        };
        let mut next = tree.clone();
        {
            let _gate = self.enter_to_switch()?;
            let old = tree.top().map(|top| top.uuid).ok_or(LifeError::NoOverlay("layers"))?;
            let Some(top) = self.overlay() else { return Err(LifeError::NoOverlay("layers")) };
            absorb(top)?;
            sync()?;
            // Only now: what was there may be more than a limit that was lowered since.
            new.overlay.set_limit(self.limit_above(&below));
            next.replace(old, lower, new.uuid);
            self.install(&next, new, below)?;
        }
        self.drop_layers(&tree, &next);
        Ok(())
    }

    /// Freezes what the disk holds for a clone, unless it is frozen already.
    pub(super) fn freeze(&self) -> Result<Frozen, LifeError> {
        let layers = self.layers();
        let Top::Overlay(top) = &layers.top else { return Err(LifeError::NoOverlay("clones")) };
        let usage = top.usage();
        let is_same = layers.sealed.as_ref().is_some_and(|sealed| sealed.size() == top.size());
        if !is_same || usage != (Usage { data: 0, zero: 0 }) || top.lower_limit() != top.size() {
            self.seal(None)?;
        }
        let layer = self.tree("clones")?.top().and_then(|top| top.parent);
        // Not the size of the disk, which may have been resized since.
        let size = self.layers().sealed.as_ref().map(|sealed| sealed.size());
        match (&mut *self.home.lock(), layer, size) {
            (Home::Kept(home), Some(layer), Some(size)) => {
                Ok(Frozen { layer, size, stack: home.stack.clone() })
            }
            _ => Err(LifeError::NoOverlay("clones")),
        }
    }

    /// Makes the disk one of a store: its sealed layers may be those of other disks as well.
    pub fn join(&self, shelf: &Arc<Shelf>, others: Others) {
        // Who else needs its layers is asked when something of it was deleted, not at every mount.
        self.life.untidy.store(false, Ordering::SeqCst);
        *self.life.shelf.lock() = Arc::clone(shelf);
        *self.life.others.lock() = Some(others);
    }

    /// Notes that layers wait to be merged, if they do; `shared` are those of several disks.
    pub fn note_untidy(&self, shared: &HashSet<Uuid>) {
        let tree = self.home.lock().tree();
        if tree.is_some_and(|tree| tree.mergeable(|layer| shared.contains(&layer)).is_some()) {
            self.life.untidy.store(true, Ordering::SeqCst);
        }
    }

    /// The disk's snapshots, oldest first.
    ///
    /// # Errors
    /// [`LifeError`].
    pub fn snapshots(&self) -> Result<Vec<SnapshotInfo>, LifeError> {
        if let Some(reflink) = self.reflink() {
            let info = |snapshot: reflink::Snapshot| SnapshotInfo {
                name: snapshot.name,
                taken: super::from_time(snapshot.made) / 1_000_000_000,
                size: snapshot.size,
                usage: None,
                since: None,
            };
            return Ok(reflink.list()?.into_iter().map(info).collect());
        }
        loop {
            let tree = self.tree("snapshots")?;
            match self.snapshots_in(&tree) {
                // Layers were merged meanwhile: what the tree named is gone.
                Err(_) if self.tree("snapshots")? != tree => {}
                found => return found,
            }
        }
    }

    fn snapshots_in(&self, tree: &Tree) -> Result<Vec<SnapshotInfo>, LifeError> {
        let live = self.chain();
        let mut infos = Vec::new();
        for SnapshotRecord { name, layer, taken } in &tree.snapshots {
            let opened = self.open_chain(tree, *layer)?;
            let Some(top) = opened.first() else { continue };
            // What the layers above it have changed.
            let at = live.iter().position(|since| since.uuid == *layer);
            let since = at.and_then(|at| live.get(at.checked_sub(1)?)).map(|above| above.since);
            infos.push(SnapshotInfo {
                name: name.clone(),
                taken: *taken,
                size: top.size(),
                usage: Some(top.usage()),
                since,
            });
        }
        Ok(infos)
    }

    /// The overlay's layers that the disk reads through, top to bottom, with what each holds and
    /// what has changed since the one below it. Empty without an overlay.
    #[must_use]
    pub fn chain(&self) -> Vec<Since> {
        let Some(tree) = self.home.lock().tree() else {
            return Vec::new();
        };
        let layers = self.layers();
        let Top::Overlay(top) = &layers.top else {
            return Vec::new();
        };
        let mut all = vec![Arc::clone(top)];
        all.extend(layers.sealed.iter().flat_map(|sealed| sealed.layers().to_vec()));
        let live = tree.live();
        let shown = self.shown(top, live.first().map(|top| top.uuid), &all);
        let mut since = Usage { data: 0, zero: 0 };
        let entries = live.iter().zip(all.iter().zip(shown));
        let describe = |(record, (layer, shown)): (&LayerRecord, (&Arc<Overlay>, Usage))| {
            since = add(since, shown);
            let name = tree.name_of(record.uuid).map(str::to_owned);
            Since { name, uuid: record.uuid, usage: layer.usage(), since }
        };
        entries.map(describe).collect()
    }

    /// What each of `all` shows, found out again when the top has changed.
    fn shown(&self, top: &Overlay, uuid: Option<Uuid>, all: &[Arc<Overlay>]) -> Vec<Usage> {
        if all.len() == 1 {
            return vec![top.usage()];
        }
        let (revision, uuid) = (top.revision(), uuid.unwrap_or_default());
        let known = self.life.shown.lock().clone();
        if let Some((at, of, shown)) = known
            && (at, of, shown.len()) == (revision, uuid, all.len())
        {
            return shown;
        }
        let shown = Sealed::new(all.to_vec()).map_or_else(Vec::new, |all| all.shown());
        *self.life.shown.lock() = Some((revision, uuid, shown.clone()));
        shown
    }

    /// The disk as it was at snapshot `name`, to be read.
    ///
    /// # Errors
    /// `ENOENT`; the host's errno.
    pub fn snapshot_file(&self, name: &str) -> io::Result<Arc<Self>> {
        let missing = || errno(libc::ENOENT);
        if let Some(reflink) = self.reflink() {
            return self.snapshot_of_reflink(&reflink, name);
        }
        loop {
            let tree = self.home.lock().tree().ok_or_else(missing)?;
            match self.snapshot_file_in(&tree, name) {
                // Layers were merged meanwhile: what the tree named is gone.
                Err(_) if self.home.lock().tree().as_ref() != Some(&tree) => {}
                found => return found,
            }
        }
    }

    fn snapshot_file_in(&self, tree: &Tree, name: &str) -> io::Result<Arc<Self>> {
        let record = tree.snapshot(name).ok_or_else(|| errno(libc::ENOENT))?;
        if let Some(file) = self.life.files.lock().get(&record.layer) {
            return Ok(Arc::clone(file));
        }
        let chain = self.open_chain(tree, record.layer).map_err(|error| {
            log::error!("{}: snapshot '{name}' cannot be opened: {error}", self.source);
            errno(libc::EIO)
        })?;
        let time = chain.first().and_then(|layer| layer.mtime()).map(|(mtime, _)| mtime);
        let bottom = self.layers().bottom.clone();
        let layers = Layers::new(Top::Nothing, Sealed::new(chain).map(Arc::new), bottom);
        let time = time.unwrap_or(record.taken.saturating_mul(1_000_000_000));
        Ok(self.show_snapshot(name, record.layer, layers, time))
    }

    fn snapshot_of_reflink(&self, reflink: &Reflink, name: &str) -> io::Result<Arc<Self>> {
        let uuid = snapshot_uuid(&self.uuid, name);
        if let Some(file) = self.life.files.lock().get(&uuid) {
            return Ok(Arc::clone(file));
        }
        let file = reflink
            .open_snapshot(name)
            .map_err(|error| errno(error.errno().unwrap_or(libc::ENOENT)))?;
        let found = file.metadata()?;
        let raw = RawBase::new(Arc::new(file), HostKind::File, found.len())?;
        let layers = Layers::new(Top::Nothing, None, Some(Arc::new(raw)));
        Ok(self.show_snapshot(name, uuid, layers, super::mtime_of(&found)))
    }

    /// Makes a disk that is only read of the layers of a snapshot.
    fn show_snapshot(&self, name: &str, uuid: Uuid, layers: Layers, mtime: i64) -> Arc<Self> {
        let mut spec = DiskSpec::new(name.to_owned(), Source::Blank(layers.size()));
        spec.mode = Mode::ReadOnly;
        let owner = self.owner();
        let owner = Owner { perm: owner.perm & 0o444, ..owner };
        let bottom = super::open::Bottom::Blank(layers.size());
        let mut disk = super::open::assemble(&spec, uuid, layers, bottom, owner);
        disk.times = super::Times::new(mtime, false, None);
        disk.source = format!("snapshot '{name}' of {}", self.source);
        let disk = Arc::new(disk);
        Arc::clone(self.life.files.lock().entry(uuid).or_insert(disk))
    }

    /// What all its layers may hold together, in bytes.
    #[must_use]
    pub fn limit(&self) -> Option<u64> {
        self.life.limit
    }

    /// The names of its snapshots, oldest first.
    #[must_use]
    pub fn snapshot_names(&self) -> Vec<String> {
        if let Some(reflink) = self.reflink() {
            let listed = reflink.list().unwrap_or_default();
            return listed.into_iter().map(|snapshot| snapshot.name).collect();
        }
        let tree = self.home.lock().tree();
        tree.map_or_else(Vec::new, |tree| {
            tree.snapshots.into_iter().map(|snapshot| snapshot.name).collect()
        })
    }

    /// All its layers, each after the one below it, to be kept in a directory.
    pub(super) fn all_layers(&self, tree: &Tree) -> Result<Vec<Arc<Overlay>>, LifeError> {
        let top = tree.top().map(|top| top.uuid);
        let open = |record: &LayerRecord| -> Result<Arc<Overlay>, LifeError> {
            let missing = || LifeError::NoOverlay("layers");
            if Some(record.uuid) == top {
                return self.overlay().ok_or_else(missing);
            }
            self.open_chain(tree, record.uuid)?.into_iter().next().ok_or_else(missing)
        };
        tree.layers.iter().map(open).collect()
    }
}

/// What stands for a snapshot that has no layer of its own.
fn snapshot_uuid(disk: &Uuid, name: &str) -> Uuid {
    let mut hasher = DefaultHasher::new();
    name.hash(&mut hasher);
    Uuid::from_u64_pair(disk.as_u64_pair().0 ^ hasher.finish(), disk.as_u64_pair().1)
}

/// A name for a snapshot that was given none: when it was taken.
fn free_name(taken_names: &[String], taken: u64) -> String {
    let time = jiff::Timestamp::from_second(taken.cast_signed()).unwrap_or_default();
    let name = time.strftime("%Y-%m-%d_%H%M%S").to_string();
    let mut names = std::iter::once(name.clone()).chain((2..).map(|n| format!("{name}-{n}")));
    names.find(|name| !taken_names.contains(name)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::{Setting, open};
    use super::*;
    use crate::layer::Wait;
    use crate::stream::sink::Inherit;

    fn disk(dir: &Path) -> Disk {
        let mut spec = DiskSpec::new("d".to_owned(), Source::Blank(8 << 20));
        spec.overlay = Some(dir.to_owned());
        let setting = Setting {
            mountpoint: Path::new("/nowhere"),
            mount_dev: None,
            uid: 0,
            gid: 0,
            force: false,
            stdio: Inherit::Nothing,
            looked_at: Mutex::new(HashSet::new()),
        };
        open(&spec, &setting).map_err(|error| error.to_string()).unwrap().disk
    }

    #[test]
    fn a_revert_just_before_layers_are_merged_keeps_what_the_snapshot_showed() {
        let room = tempfile::tempdir().unwrap();
        let disk = Arc::new(disk(&room.path().join("ov")));
        disk.write(b"kept", 4096, Wait::Yes).unwrap();
        disk.snapshot(Some("a")).unwrap();
        disk.write(b"more", 8192, Wait::Yes).unwrap();
        disk.snapshot(Some("b")).unwrap();
        disk.write(b"last", 8192, Wait::Yes).unwrap();
        disk.delete_snapshot("b").unwrap();
        // It is asked who else needs the layers when they are about to be merged: then comes a
        // request.
        let came = Arc::new(Mutex::new(None));
        let (seen, weak) = (Arc::clone(&came), Arc::downgrade(&disk));
        let shelf = disk.life.shelf();
        disk.join(
            &shelf,
            Arc::new(move |_| {
                if let Some(disk) = weak.upgrade().filter(|_| seen.lock().is_none()) {
                    let other = std::thread::spawn(move || disk.revert("a", Force::Yes));
                    // Who has to wait for the merging is not waited for.
                    let until = std::time::Instant::now() + Duration::from_millis(300);
                    while !other.is_finished() && std::time::Instant::now() < until {
                        std::thread::sleep(Duration::from_millis(5));
                    }
                    *seen.lock() = Some(other);
                }
                Ok(HashSet::new())
            }),
        );
        disk.tidy().unwrap();
        // The lock is let go of first: the revert asks who else needs the layers as well.
        let other = came.lock().take().unwrap();
        other.join().unwrap().unwrap();
        let mut found = [0; 4];
        disk.read(&mut found, 8192, Wait::Yes).unwrap();
        assert_eq!(found, [0; 4]);
        disk.read(&mut found, 4096, Wait::Yes).unwrap();
        assert_eq!(&found, b"kept");
    }
}
