//! The directory of one layer: its files, their names, and the layer that they make.
//!
//! ```text
//!   layers/UUID/data, data.1 ...     the segments of the data; the lock is on the first
//!   layers/UUID/log, log.new         the durable map, and the one that is about to replace it
//!   layers/UUID/journal              syncs of few changes
//! ```
//!
//! Everything works on open directories, so renaming a directory above changes nothing.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation};
use rustix::io::Errno;
use uuid::Uuid;

use crate::confined::{self, FileAccess, entry_names, foreign_entry_error};
use crate::host::{LOCK_POLL_INTERVAL, os_error};
use crate::overlay::error::{LogError, OverlayError};
use crate::overlay::host_file::{Create, HostFile, LAST_SEGMENT, SEGMENT_LEN};
use crate::overlay::record::{BootTag, LayerMap};
use crate::overlay::record_log::{self, Log, LogDir, ReplacedLog};
use crate::overlay::recover::{self, LayerFiles, Recovered};
use crate::overlay::stack::LayerRecord;
use crate::overlay::storage::Storage;
use crate::overlay::tree::LayerTree;
use crate::overlay::{Overlay, boot_tag};
use crate::process::explain_size_error;

/// Time limit for whoever used a layer before to release it.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(1);

/// An open directory of a layer, in which its log can be replaced.
struct LayerDir {
    dir: File,
}

impl LogDir for LayerDir {
    fn replace_log(
        &self,
        fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<ReplacedLog> {
        let file = HostFile::single(confined::recreate_file(&self.dir, "log.new")?);
        let done = fill(&file)
            .and_then(|()| file.first().sync_all())
            .and_then(|()| Ok(rustix::fs::renameat(&self.dir, "log.new", &self.dir, "log")?));
        if let Err(error) = done {
            // Best effort: the next attempt truncates it anyway.
            let _ = rustix::fs::unlinkat(&self.dir, "log.new", AtFlags::empty());
            return Err(error);
        }
        Ok(ReplacedLog { file: Arc::new(file), dir_synced: self.dir.sync_all() })
    }

    fn journal(&self, create: Create) -> io::Result<Option<Arc<dyn Storage>>> {
        let file = match confined::open_file(&self.dir, "journal", FileAccess::AsAllowed) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => match create {
                Create::Never => return Ok(None),
                Create::IfMissing => create_durably(&self.dir, "journal")?,
            },
            found => found?,
        };
        Ok(Some(Arc::new(HostFile::single(file))))
    }
}

/// Creates the file `name` in `dir`, and makes its name durable.
///
/// # Errors
/// The host's errno. The file is removed in that case: the next attempt would take its name for
/// durable.
fn create_durably(dir: &File, name: &str) -> io::Result<File> {
    let file = confined::create_file(dir, name)?;
    if let Err(error) = dir.sync_all() {
        confined::remove_file(dir, name)?;
        return Err(error);
    }
    Ok(file)
}

/// Returns the name of segment `index` of a data file.
fn segment_name(index: usize) -> String {
    if index == 0 { "data".to_owned() } else { format!("data.{index}") }
}

/// Opens the segments after the first that are in `dir`.
fn segments_in(dir: &File) -> io::Result<Vec<(usize, File)>> {
    let mut found = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_str().ok();
        let index = name.and_then(|name| name.strip_prefix("data.")?.parse().ok());
        // A segment past the end of the largest disk is a foreign file, whatever its name.
        let is_segment = |index: &usize| {
            (1..=LAST_SEGMENT).contains(index) && name == Some(&*segment_name(*index))
        };
        if let Some(index) = index.filter(is_segment) {
            found.push((
                index,
                confined::open_file(dir, segment_name(index), FileAccess::AsAllowed)?,
            ));
        }
    }
    Ok(found)
}

/// Combines the segments in the directory `dir` of a layer, whose first segment is open already.
pub(in crate::overlay) fn data_file_in(dir: File, first: File) -> io::Result<HostFile> {
    let more = segments_in(&dir)?;
    Ok(HostFile::segmented(
        first,
        more,
        Box::new(move |index| {
            let name = segment_name(index);
            match confined::open_file(&dir, &name, FileAccess::ReadWrite) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                found => return found,
            }
            // The name must be durable before a record names blocks of this segment.
            create_durably(&dir, &name)
        }),
    ))
}

/// Links `file`, which may have no name yet, into `dir` as segment `index`.
pub(in crate::overlay) fn link_segment(file: &File, dir: &File, index: usize) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    let from = format!("/proc/self/fd/{}", file.as_raw_fd());
    let flags = AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(rustix::fs::CWD, from, dir, segment_name(index), flags)?;
    Ok(())
}

/// A layer's files and the descriptor that carries its lock.
pub(in crate::overlay) struct LockedLayer {
    pub(in crate::overlay) lock: File,
    pub(in crate::overlay) files: LayerFiles,
}

/// Opens the files of the layer `record` below the directory `layers_dir`. `lock` takes the lock on
/// the data before the log is opened, because the holder of the lock may replace the log.
///
/// # Errors
/// [`OverlayError`]: the host's errno, or the errors of `lock`.
pub(in crate::overlay) fn open_layer_files(
    layers_dir: &File,
    record: &LayerRecord,
    lock: impl FnOnce(&File) -> Result<(), OverlayError>,
) -> Result<LockedLayer, OverlayError> {
    let name = record.uuid.to_string();
    let open = |dir: &File, name: &str| confined::open_file(dir, name, FileAccess::AsAllowed);
    let dir =
        confined::open_subdir(layers_dir, &name).map_err(OverlayError::io("opening its layer"))?;
    let first = open(&dir, "data").map_err(OverlayError::io("opening its data"))?;
    lock(&first)?;
    let log = open(&dir, "log").map_err(OverlayError::io("opening its log"))?;
    let again = || dir.try_clone().map_err(OverlayError::io("opening its layer"));
    let locked = first.try_clone().map_err(OverlayError::io("opening its data"))?;
    let data = data_file_in(again()?, first).map_err(OverlayError::io("opening its data"))?;
    Ok(LockedLayer {
        lock: locked,
        files: LayerFiles {
            data: Arc::new(data),
            log: Arc::new(HostFile::single(log)),
            log_dir: Arc::new(LayerDir { dir: again()? }),
            uuid: record.uuid,
            block_size: record.block,
        },
    })
}

/// Creates an empty data file for a disk of `size` bytes. The file has its full length from the
/// start, so that later writes change only blocks and not the length.
pub(in crate::overlay) fn empty_data(dir: &File, size: u64) -> io::Result<HostFile> {
    let file = confined::create_file(dir, "data")?;
    file.set_len(size.min(SEGMENT_LEN)).map_err(explain_size_error)?;
    data_file_in(dir.try_clone()?, file)
}

/// Creates the files of a layer, durably, and locks the layer.
pub(super) fn make_layer(
    layers_dir: &File,
    record: &LayerRecord,
    map: &LayerMap,
    limit: Option<u64>,
    make_data: impl FnOnce(&File) -> io::Result<HostFile>,
) -> Result<(Overlay, File), OverlayError> {
    let dir = confined::create_dir(layers_dir, record.uuid.to_string())
        .map_err(OverlayError::io("making its layer"))?;
    let data = make_data(&dir).map_err(OverlayError::io("making its data"))?;
    data.sync().map_err(OverlayError::io("making its data durable"))?;
    let lock = data.first().try_clone().map_err(OverlayError::io("locking it"))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|error| OverlayError::io("locking it")(error.into()))?;
    let start = || -> io::Result<(Log, BootTag)> {
        let tag = boot_tag::current(&dir)?;
        let log_dir = Arc::new(LayerDir { dir: dir.try_clone()? });
        let log = Log::create(log_dir, record.uuid, u64::from(record.block), map, tag, 1)?;
        dir.sync_all()?;
        layers_dir.sync_all()?;
        Ok((log, tag))
    };
    let (log, tag) = start().map_err(OverlayError::io("writing its log"))?;
    let overlay = Overlay::new(record.block, Arc::new(data), map.clone(), Some(log), tag, limit);
    Ok((overlay, lock))
}

/// Opens a sealed layer of a disk whose layers are `tree`. A layer that was not closed is first
/// recovered, made durable and closed, by one process at a time. Layers below it must be opened
/// before.
pub(in crate::overlay) fn open_sealed(
    layers_dir: &File,
    tree: &LayerTree,
    record: &LayerRecord,
) -> Result<(Arc<Overlay>, Recovered), OverlayError> {
    let until = Instant::now() + RELEASE_TIMEOUT;
    loop {
        if let Some(opened) = try_open_sealed(layers_dir, tree, record)? {
            return Ok(opened);
        }
        if Instant::now() >= until {
            let busy = os_error(libc::EWOULDBLOCK);
            return Err(OverlayError::io("locking a layer to recover it")(busy));
        }
        thread::sleep(LOCK_POLL_INTERVAL);
    }
}

/// Does the same as [`open_sealed`]; `None` while another process holds the layer, which may change its
/// files meanwhile.
fn try_open_sealed(
    layers_dir: &File,
    tree: &LayerTree,
    record: &LayerRecord,
) -> Result<Option<(Arc<Overlay>, Recovered)>, OverlayError> {
    let in_log = |error| OverlayError::Log { uuid: record.uuid, error };
    let LockedLayer { lock, files } = open_layer_files(layers_dir, record, |_| Ok(()))?;
    let tag = boot_tag::current(layers_dir).map_err(OverlayError::io("reading the boot id"))?;
    let trusted = recover::examine(&files, tag).map_err(in_log)?;
    if trusted.recovered == Recovered::Clean {
        let map = recover::load_map(&files, &trusted).map_err(in_log)?;
        recover::check_data(&files, &map).map_err(in_log)?;
        let layer = Overlay::closed(record.block, Arc::clone(&files.data), map, tag);
        return Ok(Some((Arc::new(layer), Recovered::Clean)));
    }
    if is_settled_above(layers_dir, tree, record.uuid) {
        return Err(in_log(end_missing(trusted.scan.good)));
    }
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(None),
        locked => locked
            .map_err(|error| OverlayError::io("locking a layer to recover it")(error.into()))?,
    }
    let (layer, recovered) = Overlay::open(&files, tag, None, &[]).map_err(in_log)?;
    layer.close_sealed().map_err(OverlayError::io("closing the log of a recovered layer"))?;
    Ok(Some((Arc::new(layer), recovered)))
}

/// Returns whether the log of a layer above `uuid` shows that `uuid` was closed in good order.
fn is_settled_above(layers_dir: &File, tree: &LayerTree, uuid: Uuid) -> bool {
    tree.layers_above(uuid).any(|above| {
        // What is wrong with the layer above is told when that is opened.
        let opened = open_layer_files(layers_dir, above, |_| Ok(()));
        let scan = opened.map(|layer| record_log::scan(&*layer.files.log, &above.uuid));
        matches!(scan, Ok(Ok(scan)) if scan.is_settled)
    })
}

/// The error of a layer that has `records` good records and no `Close`, although a layer above it
/// was synced.
pub(in crate::overlay) fn end_missing(records: u64) -> LogError {
    let why = "it is missing: the layer was closed before those above it were synced";
    LogError::Damaged { record: records, why }
}

/// Removes the directory of the layer `uuid`, its `data` last because that file carries the lock. A
/// directory that holds anything but a layer's files stays unchanged.
///
/// # Errors
/// The host's errno; an error that names the foreign file.
pub(crate) fn remove_layer(layers_dir: &File, uuid: Uuid) -> io::Result<()> {
    let name = uuid.to_string();
    let dir = confined::open_subdir(layers_dir, &name)?;
    let files = entry_names(&dir)?;
    if let Some(other) = files.iter().find(|file| !is_layer_file(file)) {
        return Err(foreign_entry_error(&format!("layers/{name}"), other));
    }
    let before = files.iter().map(String::as_str).filter(|file| *file != "data");
    before.chain(["data"]).try_for_each(|file| confined::remove_file(&dir, file))?;
    Ok(rustix::fs::unlinkat(layers_dir, &name, AtFlags::REMOVEDIR)?)
}

/// Returns whether `name` is the name of a layer's file.
fn is_layer_file(name: &str) -> bool {
    let is_segment = |index: &str| index.parse::<usize>().is_ok();
    matches!(name, "data" | "log" | "log.new" | "journal")
        || name.strip_prefix("data.").is_some_and(is_segment)
}
