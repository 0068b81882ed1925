//! Making and opening persistent overlays, one process at a time.
//!
//! A new overlay is built under a temporary name beside its place and renamed into it when all
//! of it is durable, so there is never half an overlay to be found. The lock is on the inode of the
//! top layer's `data`: hard links, bind mounts and renames cannot fool it. The file `holder` only
//! tells people who has the lock.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, OFlags};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::data::{HostFile, Storage};
use super::log::Log;
use super::record::{Image, Tag};
use super::recover::{self, Files, Recovered};
use super::shelf::Shelf;
use super::stack::{
    LayerDir, LayerFiles, LayerRecord, Stack, StackError, create_at, data_in, doing, layer_files,
    make_dir_at, open_at, open_dir, place_of_new,
};
use super::{Overlay, life};
use crate::spec::OverlayKind;

/// How long a daemon that is draining is waited for.
const PATIENCE: Duration = Duration::from_secs(10);

/// Where a persistent overlay lies.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    /// The directory with its `stack`.
    pub dir: &'a Path,
    /// The directory of its layers; `None`: `layers` inside `dir`.
    pub layers: Option<&'a Path>,
}

/// Who has an overlay open, as its `holder` file tells people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// The daemon's process id.
    pub pid: u32,
    /// Where it is mounted.
    pub mountpoint: String,
    /// It is on its way out: worth waiting for.
    pub draining: bool,
}

/// A persistent overlay that is open.
pub struct Persistent {
    /// The layer that takes the writes.
    pub overlay: Overlay,
    /// The sealed layers below it, top to bottom.
    pub below: Vec<Arc<Overlay>>,
    /// The sealed layers that only snapshots beside it stand on.
    pub aside: Vec<(Uuid, Arc<Overlay>)>,
    /// How it was found.
    pub recovered: Recovered,
    /// The files that stay with it.
    pub home: Residence,
}

/// The open directory of a persistent overlay, its `stack` and its lock.
pub struct Residence {
    /// What makes the disk.
    pub stack: Stack,
    dir: File,
    layers: File,
    /// Unlocked when the last descriptor of this open file is closed.
    lock: File,
    torn: bool,
}

impl Residence {
    /// The overlay in the open directory `dir`, whose lock `lock` carries.
    /// Layers, which a reflink overlay has none of, would lie right in it.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn new(stack: Stack, dir: File, lock: File) -> io::Result<Self> {
        Ok(Self { stack, layers: dir.try_clone()?, dir, lock, torn: false })
    }

    /// Replaces the `stack`, durably.
    ///
    /// # Errors
    /// The host's errno; the old one is in place then.
    pub fn replace(&mut self, stack: Stack) -> Result<(), StackError> {
        if let Err(error) = stack.write(&self.dir) {
            // It may have come into its place without that being durable.
            let is_old = || Stack::read(&self.dir).is_ok_and(|found| found == self.stack);
            if !is_old()
                && let Err(again) = self.stack.write(&self.dir)
            {
                log::error!("the old 'stack' could not be put back: {again}");
                self.torn = true;
            }
            return Err(error);
        }
        self.stack = stack;
        Ok(())
    }

    /// Whether the `stack` in the directory may be another than this one: nothing may be
    /// acknowledged any more then.
    #[must_use]
    pub fn is_torn(&self) -> bool {
        self.torn
    }

    /// Whether the directory still holds this `stack`, and was not removed.
    #[must_use]
    pub fn is_on_disk(&self) -> bool {
        Stack::read(&self.dir).is_ok_and(|found| found == self.stack)
    }

    /// As [`replace`](Self::replace), with another top, whose lock is `lock`.
    ///
    /// # Errors
    /// As [`replace`](Self::replace).
    pub fn replace_top(&mut self, stack: Stack, lock: File) -> Result<(), StackError> {
        self.replace(stack)?;
        self.lock = lock;
        Ok(())
    }

    /// Makes a layer that no stack names yet, durably, and locks it.
    ///
    /// # Errors
    /// [`StackError`]; nothing is left behind then.
    pub fn add_layer(
        &self,
        record: &LayerRecord,
        image: &Image,
        limit: Option<u64>,
    ) -> Result<(Overlay, File), StackError> {
        make_layer(&self.layers, record, image, limit, |layer| empty_data(layer, image.size))
            .inspect_err(|_| self.remove_layer(record.uuid))
    }

    /// Opens the sealed layer `uuid` of this disk, or takes it from `shelf`.
    ///
    /// # Errors
    /// [`StackError`].
    pub fn sealed(&self, uuid: Uuid, shelf: &Shelf) -> Result<Arc<Overlay>, StackError> {
        let record = self.stack.layers.iter().find(|layer| layer.uuid == uuid);
        let record = record.ok_or_else(|| {
            doing("opening its layer")(io::Error::from_raw_os_error(libc::ENOENT))
        })?;
        shelf.get(uuid, || open_sealed(&self.layers, record).map(|(layer, _)| layer))
    }

    /// Removes the files of a layer that no stack names any more. Best effort: what is left is
    /// swept when the overlay is opened the next time.
    pub fn remove_layer(&self, uuid: Uuid) {
        if self.torn {
            return; // Nobody knows what the stack names.
        }
        if let Err(error) = remove_layer(&self.layers, uuid) {
            log::debug!("the files of layer {uuid} are left behind: {error}");
        }
    }

    /// Tells others who has it. Best effort: the lock is what counts.
    pub fn announce(&self, holder: &Holder) {
        let write = || -> io::Result<()> {
            let bytes = serde_json::to_vec(holder)?;
            create_at(&self.dir, "holder.new")?.write_all(&bytes)?;
            rustix::fs::renameat(&self.dir, "holder.new", &self.dir, "holder")?;
            Ok(())
        };
        if let Err(error) = write() {
            log::debug!("the holder file is not written: {error}");
        }
    }

    /// Nobody has it any more.
    pub fn withdraw(&self) {
        let _ = rustix::fs::unlinkat(&self.dir, "holder", AtFlags::empty());
    }

    /// Lets others have it at once, while this process lives on: a child that was forked a moment
    /// ago shares the open file until it executes its program. Nothing of ours may use it any more.
    pub fn unlock(self) {
        self.withdraw();
        if let Err(error) = rustix::fs::flock(&self.lock, FlockOperation::Unlock) {
            log::debug!("an overlay is unlocked only when it is closed: {error}");
        }
    }
}

/// Removes the directory of the layer `uuid`, its `data` last: that carries the lock.
pub(super) fn remove_layer(layers: &File, uuid: Uuid) -> io::Result<()> {
    let name = uuid.to_string();
    let dir = open_at(layers, &name, OFlags::RDONLY | OFlags::DIRECTORY)?;
    for entry in rustix::fs::Dir::read_from(&dir)? {
        let entry = entry?;
        if !matches!(entry.file_name().to_bytes(), b"." | b".." | b"data") {
            rustix::fs::unlinkat(&dir, entry.file_name(), AtFlags::empty())?;
        }
    }
    match rustix::fs::unlinkat(&dir, "data", AtFlags::empty()) {
        Ok(()) | Err(rustix::io::Errno::NOENT) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::unlinkat(layers, &name, AtFlags::REMOVEDIR)?)
}

/// What is to be made.
pub struct New<'a> {
    /// The disk's stack.
    pub stack: Stack,
    /// The first map of its top.
    pub image: &'a Image,
    /// The most bytes of data it may hold.
    pub limit: Option<u64>,
}

/// A layer to be made in a new overlay, perhaps of one that exists elsewhere.
pub struct Part<'a> {
    /// Its place in the stack.
    pub record: LayerRecord,
    /// Its map.
    pub image: Image,
    /// Makes its data file in the directory of the layer.
    pub put_data: PutData<'a>,
}

/// Makes the data file of a layer in the layer's directory.
pub type PutData<'a> = Box<dyn FnOnce(&File) -> io::Result<HostFile> + 'a>;

/// Whether something is at `dir` already, and has to be opened rather than made.
///
/// # Errors
/// [`StackError::NotAnOverlay`] when it is something else.
pub fn exists(dir: &Path) -> Result<bool, StackError> {
    match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => Err(StackError::NotAnOverlay),
        Err(error) => Err(doing("opening it")(error)),
        Ok(mut entries) => match dir.join("stack").try_exists() {
            Ok(true) => Ok(true),
            Ok(false) if entries.next().is_none() => Ok(false),
            Ok(false) => Err(StackError::NotAnOverlay),
            Err(error) => Err(doing("opening its 'stack'")(error)),
        },
    }
}

/// Makes an overlay with an empty top; all layers below that exist already.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn create(place: Place<'_>, new: New<'_>) -> Result<Persistent, StackError> {
    let New { stack, image, limit } = new;
    let part = Part {
        record: top_layer(&stack)?,
        image: image.clone(),
        put_data: Box::new(|layer: &File| empty_data(layer, image.size)),
    };
    build(place, stack, vec![part], limit)
}

/// An empty data file for a disk of `size` bytes. It has its length from the start: later writes
/// then change blocks only, not the file's size.
fn empty_data(layer: &File, size: u64) -> io::Result<HostFile> {
    let file = create_at(layer, "data")?;
    file.set_len(size.min(super::data::SEGMENT))?;
    data_in(layer.try_clone()?, file)
}

/// Builds an overlay and `parts` of its layers, the top among them; all others exist already.
/// `limit` caps the bytes of data that the top may hold.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn build(
    place: Place<'_>,
    stack: Stack,
    parts: Vec<Part<'_>>,
    limit: Option<u64>,
) -> Result<Persistent, StackError> {
    let parent = match place.layers {
        None => place_of_new(place.dir)?,
        Some(_) => place.dir.parent().unwrap_or(Path::new("/")),
    };
    let temp = tempfile::Builder::new()
        .prefix(".cowslip-")
        .tempdir_in(parent)
        .map_err(doing("making a directory beside it"))?;
    let dir = open_dir(temp.path()).map_err(doing("making a directory beside it"))?;
    let layers = match place.layers {
        None => make_dir_at(&dir, "layers"),
        Some(path) => open_dir(path),
    };
    let layers = layers.map_err(doing("making its layers"))?;
    let uuids: Vec<Uuid> = parts.iter().map(|part| part.record.uuid).collect();
    let made = build_in(&dir, &layers, &stack, parts, limit).and_then(|made| {
        let placed =
            std::fs::rename(temp.path(), place.dir).and_then(|()| open_dir(parent)?.sync_all());
        placed.map_err(doing("putting it in its place"))?;
        Ok(made)
    });
    match made {
        Ok((overlay, below, lock)) => {
            let _ = temp.keep();
            let home = Residence { stack, dir, layers, lock, torn: false };
            let aside = Vec::new();
            Ok(Persistent { overlay, below, aside, recovered: Recovered::New, home })
        }
        Err(error) => {
            if place.layers.is_some() {
                // Not below the temporary directory, which removes itself.
                uuids.into_iter().for_each(|uuid| {
                    let _ = remove_layer(&layers, uuid);
                });
            }
            Err(error)
        }
    }
}

/// The layers that were built: the top one, those below it, and the lock.
type Built = (Overlay, Vec<Arc<Overlay>>, File);

fn build_in(
    dir: &File,
    layers: &File,
    stack: &Stack,
    parts: Vec<Part<'_>>,
    limit: Option<u64>,
) -> Result<Built, StackError> {
    let mut sealed = HashMap::new();
    let mut top = None;
    for Part { record, image, put_data } in parts {
        let is_top = Some(&record) == stack.layers.last();
        let limit = limit.filter(|_| is_top);
        let (layer, lock) = make_layer(layers, &record, &image, limit, put_data)?;
        if is_top {
            top = Some((layer, lock));
        } else {
            layer.settle().map_err(doing("closing its log"))?;
            sealed.insert(record.uuid, Arc::new(layer));
        }
    }
    let no_layer = || StackError::Syntax("it has no layer".to_owned());
    let (overlay, lock) = top.ok_or_else(no_layer)?;
    stack.write(dir)?;
    let below = stack.tree().live().into_iter().skip(1);
    let below = below.filter_map(|record| sealed.get(&record.uuid).cloned()).collect();
    Ok((overlay, below, lock))
}

/// Makes the files of a layer durably, and locks it.
fn make_layer(
    layers: &File,
    record: &LayerRecord,
    image: &Image,
    limit: Option<u64>,
    put_data: impl FnOnce(&File) -> io::Result<HostFile>,
) -> Result<(Overlay, File), StackError> {
    let layer = make_dir_at(layers, record.uuid.to_string()).map_err(doing("making its layer"))?;
    let data = put_data(&layer).map_err(doing("making its data"))?;
    data.sync().map_err(doing("making its data durable"))?;
    let lock = data.first().try_clone().map_err(doing("locking it"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| doing("locking it")(error.into()))?;
    let start = || -> io::Result<(Log, Tag)> {
        let tag = life::tag(&layer)?;
        let home = Arc::new(LayerDir::new(layer.try_clone()?));
        let log = Log::create(home, record.uuid, u64::from(record.block), image, tag, 1)?;
        layer.sync_all()?;
        layers.sync_all()?;
        Ok((log, tag))
    };
    let (log, tag) = start().map_err(doing("writing its log"))?;
    let image = image.clone();
    let overlay = Overlay::new(record.block, Arc::new(data), image, Some(log), tag, limit);
    Ok((overlay, lock))
}

/// A persistent overlay found in its place, its lock taken, its log not read yet.
pub struct Found {
    /// What makes the disk.
    pub stack: Stack,
    pub(super) dir: File,
    pub(super) layers: File,
    lock: File,
    files: Files,
    record: LayerRecord,
}

/// Finds the overlay at `place` and takes its lock.
///
/// # Errors
/// [`StackError`]: not there, damaged, of another version, in use.
pub fn find(place: Place<'_>) -> Result<Found, StackError> {
    let dir = open_dir(place.dir).map_err(|error| match error.kind() {
        io::ErrorKind::NotADirectory => StackError::NotAnOverlay,
        _ => doing("opening it")(error),
    })?;
    // Before its layers: a reflink overlay has none.
    let mut record = top_layer(&Stack::read(&dir)?)?;
    let layers = match place.layers {
        None => open_at(&dir, "layers", OFlags::RDONLY | OFlags::DIRECTORY),
        Some(path) => open_dir(path),
    };
    let layers = layers.map_err(doing("opening its layers"))?;
    loop {
        let layer = layer_files(&layers, &record, |data| lock(&dir, data))?;
        // Once more under the lock: its last holder may have changed it.
        let stack = Stack::read(&dir)?;
        let top = top_layer(&stack)?;
        if top == record {
            let (lock, files) = (layer.lock, layer.files);
            return Ok(Found { stack, dir, layers, lock, files, record });
        }
        record = top;
    }
}

/// The layer that is written to.
fn top_layer(stack: &Stack) -> Result<LayerRecord, StackError> {
    if stack.kind == OverlayKind::Reflink {
        return Err(StackError::Reflink);
    }
    let top = stack.layers.last().cloned();
    top.ok_or_else(|| StackError::Syntax("it has no layer".to_owned()))
}

/// Opens a sealed layer. One that was not closed is recovered, made durable and closed first, by
/// one process alone.
pub(super) fn open_sealed(
    layers: &File,
    record: &LayerRecord,
) -> Result<(Arc<Overlay>, Recovered), StackError> {
    let in_log = |error| StackError::Log { uuid: record.uuid, error };
    let LayerFiles { lock, files } = layer_files(layers, record, |_| Ok(()))?;
    let tag = life::tag(layers).map_err(doing("reading the boot id"))?;
    let trusted = recover::examine(&files, tag).map_err(in_log)?;
    if trusted.recovered == Recovered::Clean {
        let image = recover::load(&files, &trusted).map_err(in_log)?;
        let layer = Overlay::closed(record.block, Arc::clone(&files.data), image, tag);
        return Ok((Arc::new(layer), Recovered::Clean));
    }
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| doing("locking a layer to recover it")(error.into()))?;
    let (layer, recovered) = Overlay::open(&files, tag, None).map_err(in_log)?;
    layer.settle().map_err(doing("closing the log of a recovered layer"))?;
    Ok((Arc::new(layer), recovered))
}

/// Takes the lock; a daemon that is draining is waited for, and the kernel, while it clears up
/// after one that has died.
pub(super) fn lock(dir: &File, data: &File) -> Result<(), StackError> {
    let start = Instant::now();
    loop {
        match rustix::fs::flock(data, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(doing("locking it")(error.into())),
        }
        let holder = read_holder(dir);
        let is_leaving = holder.as_ref().is_some_and(|holder| {
            holder.draining || !Path::new("/proc").join(holder.pid.to_string()).exists()
        });
        if !is_leaving || start.elapsed() > PATIENCE {
            let (pid, mountpoint) =
                holder.map_or((0, "unknown".to_owned()), |holder| (holder.pid, holder.mountpoint));
            return Err(StackError::InUse { pid, mountpoint });
        }
        thread::sleep(Duration::from_millis(20));
    }
}

fn read_holder(dir: &File) -> Option<Holder> {
    let mut bytes = Vec::new();
    open_at(dir, "holder", OFlags::RDONLY).ok()?.take(1 << 16).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

impl Found {
    /// The block size in bytes.
    #[must_use]
    pub fn block(&self) -> u32 {
        self.record.block
    }

    fn log_error(&self) -> impl Fn(recover::LogError) -> StackError + use<> {
        let uuid = self.record.uuid;
        move |error| StackError::Log { uuid, error }
    }

    /// Whether a commit into the base was begun and not finished.
    ///
    /// # Errors
    /// [`StackError::Log`].
    pub fn is_committing(&self) -> Result<bool, StackError> {
        let tag = life::tag(&self.dir).map_err(doing("reading the boot id"))?;
        let trusted = recover::examine(&self.files, tag).map_err(self.log_error())?;
        let image = recover::load(&self.files, &trusted).map_err(self.log_error())?;
        Ok(image.is_committing)
    }

    /// Opens it for use, taking from `shelf` the sealed layers that are open already. `limit` caps
    /// the bytes of data that all its layers may hold together.
    ///
    /// # Errors
    /// [`StackError`].
    pub fn open(self, limit: Option<u64>, shelf: &Shelf) -> Result<Persistent, StackError> {
        let tag = life::tag(&self.dir).map_err(doing("reading the boot id"))?;
        let mut recovered = Recovered::Clean;
        let mut below = Vec::new();
        // The lowest first: what stands on it is read only once it is as it will stay.
        for record in self.stack.tree().live().iter().skip(1).rev() {
            below.push(shelf.get(record.uuid, || {
                let (layer, found) = open_sealed(&self.layers, record)?;
                recovered = recovered.and(found);
                Ok::<_, StackError>(layer)
            })?);
        }
        below.reverse();
        let aside = self.open_aside(shelf);
        let held: u64 = below.iter().map(|layer| layer.usage().data).sum();
        let limit = limit.map(|limit| limit.saturating_sub(held));
        let (overlay, found) = Overlay::open(&self.files, tag, limit).map_err(self.log_error())?;
        let Self { stack, dir, layers, lock, .. } = self;
        let home = Residence { stack, dir, layers, lock, torn: false };
        Ok(Persistent { overlay, below, aside, recovered: recovered.and(found), home })
    }

    /// Opens the layers that the disk does not read through: they are its to make durable, too.
    fn open_aside(&self, shelf: &Shelf) -> Vec<(Uuid, Arc<Overlay>)> {
        let tree = self.stack.tree();
        let live: Vec<Uuid> = tree.live().iter().map(|layer| layer.uuid).collect();
        // A layer stands behind the one it stands on.
        let aside = tree.layers.iter().filter(|layer| !live.contains(&layer.uuid));
        let open = |record: &LayerRecord| {
            let opened = shelf
                .get(record.uuid, || open_sealed(&self.layers, record).map(|(layer, _)| layer));
            match opened {
                Ok(layer) => Some((record.uuid, layer)),
                Err(error) => {
                    log::warn!("layer {}, of a snapshot, cannot be opened: {error}", record.uuid);
                    None
                }
            }
        };
        aside.filter_map(open).collect()
    }

    /// Removes the layers that the stack does not name: what an operation that was cut short left
    /// behind. Only for an overlay that has its layers to itself.
    pub fn sweep(&self) {
        for layer in self.unused().unwrap_or_default() {
            if let Err(error) = self.remove_unused(layer) {
                let uuid = layer.uuid;
                log::warn!("layer {uuid}, which nothing needs, is left behind: {error}");
            }
        }
    }

    /// Its directory, locked, for who changes the `stack` and reads no layer.
    #[must_use]
    pub fn into_home(self) -> Residence {
        let Self { stack, dir, layers, lock, .. } = self;
        Residence { stack, dir, layers, lock, torn: false }
    }
}
