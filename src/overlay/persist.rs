//! Making and opening persistent overlays, one process at a time.
//!
//! A new overlay is built under a temporary name beside its place and renamed into it when all
//! of it is durable, so there is never half an overlay to be found. The lock is on the inode of the
//! top layer's `data`: hard links, bind mounts and renames cannot fool it. The file `holder` only
//! tells people who has the lock.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, OFlags};
use serde::{Deserialize, Serialize};

use super::data::{HostFile, Storage};
use super::log::Log;
use super::record::{Image, Tag};
use super::recover::{self, Files, Recovered, Trusted};
use super::stack::{
    LayerDir, LayerRecord, Stack, StackError, create_at, data_in, doing, layer_files, make_dir_at,
    open_at, open_dir,
};
use super::{Overlay, life};

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
    /// The layer.
    pub overlay: Overlay,
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
    /// Unlocked when the last descriptor of this open file is closed.
    _lock: File,
}

impl Residence {
    /// Replaces the `stack`, durably.
    ///
    /// # Errors
    /// The host's errno; the old one is in place then.
    pub fn replace(&mut self, stack: Stack) -> Result<(), StackError> {
        stack.write(&self.dir)?;
        self.stack = stack;
        Ok(())
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
}

/// What is to be made.
pub struct New<'a> {
    /// The disk's stack, with one layer.
    pub stack: Stack,
    /// Its layer's first map.
    pub image: &'a Image,
    /// The most bytes of data it may hold.
    pub limit: Option<u64>,
}

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

/// Makes an empty overlay.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn create(place: Place<'_>, new: New<'_>) -> Result<Persistent, StackError> {
    let size = new.image.size;
    build(place, new, |layer| {
        let file = create_at(layer, "data")?;
        // A length from the start: later writes then change blocks only, not the file's size.
        file.set_len(size.min(super::data::SEGMENT))?;
        data_in(layer.try_clone()?, file)
    })
}

/// Builds an overlay whose data file `put_data` makes in the directory of the layer.
///
/// # Errors
/// [`StackError`]; nothing is left behind then.
pub fn build(
    place: Place<'_>,
    new: New<'_>,
    put_data: impl FnOnce(&File) -> io::Result<HostFile>,
) -> Result<Persistent, StackError> {
    let parent = place.dir.parent().unwrap_or(Path::new("/"));
    if !parent.is_dir() {
        return Err(StackError::NoParent(parent.to_owned()));
    }
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
    let record = new.stack.layers.last().cloned().ok_or(StackError::Layers(0))?;
    let made = build_in(&dir, &layers, &record, &new, put_data).and_then(|made| {
        let placed =
            std::fs::rename(temp.path(), place.dir).and_then(|()| open_dir(parent)?.sync_all());
        placed.map_err(doing("putting it in its place"))?;
        Ok(made)
    });
    match made {
        Ok((overlay, lock)) => {
            let _ = temp.keep();
            let home = Residence { stack: new.stack, dir, _lock: lock };
            Ok(Persistent { overlay, recovered: Recovered::New, home })
        }
        Err(error) => {
            if let Some(layers) = place.layers {
                // Not below the temporary directory, which removes itself.
                let _ = std::fs::remove_dir_all(layers.join(record.uuid.to_string()));
            }
            Err(error)
        }
    }
}

fn build_in(
    dir: &File,
    layers: &File,
    record: &LayerRecord,
    new: &New<'_>,
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
        let log = Log::create(home, record.uuid, u64::from(record.block), new.image, tag, 1)?;
        layer.sync_all()?;
        layers.sync_all()?;
        Ok((log, tag))
    };
    let (log, tag) = start().map_err(doing("writing its log"))?;
    new.stack.write(dir)?;
    let image = new.image.clone();
    let overlay = Overlay::new(record.block, Arc::new(data), image, Some(log), tag, new.limit);
    Ok((overlay, lock))
}

/// A persistent overlay found in its place, its lock taken, its log not read yet.
pub struct Found {
    /// What makes the disk.
    pub stack: Stack,
    dir: File,
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
    let layers = match place.layers {
        None => open_at(&dir, "layers", OFlags::RDONLY | OFlags::DIRECTORY),
        Some(path) => open_dir(path),
    };
    let layers = layers.map_err(doing("opening its layers"))?;
    loop {
        let record = top_layer(&Stack::read(&dir)?)?;
        let layer = layer_files(&layers, &record, |data| lock(&dir, data))?;
        // Once more under the lock: its last holder may have changed it.
        let stack = Stack::read(&dir)?;
        if top_layer(&stack)? == record {
            return Ok(Found { stack, dir, lock: layer.lock, files: layer.files, record });
        }
    }
}

/// The layer that is written to; the only one in this version.
fn top_layer(stack: &Stack) -> Result<LayerRecord, StackError> {
    match &stack.layers[..] {
        [record] => Ok(record.clone()),
        layers => Err(StackError::Layers(layers.len())),
    }
}

/// Takes the lock; a daemon that is draining is waited for.
fn lock(dir: &File, data: &File) -> Result<(), StackError> {
    let start = Instant::now();
    loop {
        match rustix::fs::flock(data, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(error) => return Err(doing("locking it")(error.into())),
        }
        let holder = read_holder(dir);
        let is_leaving = holder.as_ref().is_some_and(|holder| holder.draining);
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

    /// Reads the log and decides what counts, without changing anything.
    ///
    /// # Errors
    /// [`StackError::Log`].
    pub fn examine(&self) -> Result<(Trusted, Image), StackError> {
        let tag = life::tag(&self.dir).map_err(doing("reading the boot id"))?;
        let trusted = recover::examine(&self.files, tag).map_err(self.log_error())?;
        let image = recover::load(&self.files, &trusted).map_err(self.log_error())?;
        Ok((trusted, image))
    }

    /// The layer's data file.
    #[must_use]
    pub fn data(&self) -> &dyn Storage {
        &*self.files.data
    }

    /// Opens it for use. `limit` caps the bytes of data it may hold.
    ///
    /// # Errors
    /// [`StackError::Log`].
    pub fn open(self, limit: Option<u64>) -> Result<Persistent, StackError> {
        let tag = life::tag(&self.dir).map_err(doing("reading the boot id"))?;
        let (overlay, recovered) =
            Overlay::open(&self.files, tag, limit).map_err(self.log_error())?;
        let home = Residence { stack: self.stack, dir: self.dir, _lock: self.lock };
        Ok(Persistent { overlay, recovered, home })
    }
}
