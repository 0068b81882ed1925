//! Temporary overlays, and making one persistent while it is in use.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};

use super::Overlay;
use super::error::OverlayError;
use super::host_file::HostFile;
use super::persist::{
    self, NewLayer, OpenedOverlay, OverlayPath, data_file_in, empty_data, link_segment,
};
use super::record::{BootTag, LayerMap};
use super::stack::Stack;
use super::state::{BlockIndex, BlockState};
use super::storage::Storage;
use crate::host;
use crate::layer::Wait;

/// Creates an overlay of `size` bytes whose changes are lost when it is dropped. The layers below
/// are visible up to `lower_limit` (bytes); `limit` caps the bytes of data.
///
/// # Errors
/// The host's errno from creating an unnamed file in `dir`.
pub fn temporary(
    dir: &Path,
    block_size: u32,
    size: u64,
    lower_limit: u64,
    limit: Option<u64>,
) -> io::Result<Overlay> {
    let first = unnamed_file(dir)?;
    let more = dir.to_owned();
    let data = HostFile::segmented(first, Vec::new(), Box::new(move |_| unnamed_file(&more)));
    let map = LayerMap::new(size, lower_limit);
    Ok(Overlay::new(block_size, Arc::new(data), map, None, BootTag([0; 2]), limit))
}

/// Creates a file without a name, to which `keep` can give one.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // Without O_TMPFILE the file is created and unlinked; `keep` then has to copy it.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => tempfile::tempfile_in(dir),
        Err(error) => Err(error.into()),
    }
}

/// Creates a persistent overlay at `path` from `layers`, durably: bottom to top, one for each layer of
/// `stack`.
/// The caller holds the gate exclusive and uses the new layers from then on.
///
/// On the same file system the data files are only linked; otherwise their data is copied.
///
/// # Errors
/// [`OverlayError`]; the layers are unchanged and nothing is left behind in that case.
pub fn keep(
    layers: &[Arc<Overlay>],
    path: OverlayPath<'_>,
    stack: Stack,
) -> Result<OpenedOverlay, OverlayError> {
    let Some((top, sealed)) = layers.split_last() else {
        return Err(OverlayError::Syntax("it has no layer".to_owned()));
    };
    for layer in sealed {
        // Space must not stay queued for freeing there: a sealed layer is never changed.
        layer.close_sealed().map_err(OverlayError::io("giving space back"))?;
    }
    let limit = top.limit.map(|blocks| blocks * top.block_size);
    let parts = stack.layers.iter().zip(layers).map(|(record, layer)| {
        let map = layer.clone_map();
        NewLayer {
            record: record.clone(),
            map: map.clone(),
            make_data: Box::new(move |dir| link_or_copy(layer, &map, dir)),
        }
    });
    let parts = parts.collect();
    let kept = persist::build(path, stack, parts, limit)?;
    // Space that was queued for freeing in the old top is queued again in the new one.
    kept.overlay.reclaim();
    kept.overlay.continue_revision(top);
    Ok(kept)
}

/// Links or copies the data of a temporary layer into the directory `dir`.
fn link_or_copy(layer: &Overlay, map: &LayerMap, dir: &File) -> io::Result<HostFile> {
    let file = layer.data.host_file().ok_or_else(|| host::os_error(libc::EOPNOTSUPP))?;
    match link_data(file, dir) {
        Err(error) if needs_copy(&error) => copy_data(layer, map, dir),
        linked => linked,
    }
}

fn needs_copy(error: &io::Error) -> bool {
    // ENOENT: the file was created and unlinked, so it cannot get a name again.
    matches!(
        error.raw_os_error(),
        Some(libc::EXDEV | libc::ENOENT | libc::EOPNOTSUPP | libc::EPERM)
    )
}

/// Links the segments of `file` under their names in `dir`.
fn link_data(file: &HostFile, dir: &File) -> io::Result<HostFile> {
    if file.first().metadata()?.dev() != dir.metadata()?.dev() {
        return Err(host::os_error(libc::EXDEV));
    }
    let mut first = None;
    for (index, segment) in file.segments()? {
        link_segment(&segment, dir, index)?;
        first = first.or(Some(segment));
    }
    dir.sync_all()?;
    let first = first.ok_or_else(|| host::os_error(libc::EIO))?;
    data_file_in(dir.try_clone()?, first)
}

/// Copies every Data block into a new data file in `dir`.
fn copy_data(overlay: &Overlay, map: &LayerMap, dir: &File) -> io::Result<HostFile> {
    let to = empty_data(dir, map.size)?;
    let mut buf = Vec::new();
    let all = BlockIndex(0)..BlockIndex(map.size.div_ceil(overlay.block_size));
    for run in map.blocks.runs(all).filter(|run| run.state == BlockState::Data) {
        let bytes = overlay.bytes_of(&run.range);
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(host::COPY_CHUNK as u64);
            buf.resize(usize::try_from(len).map_err(|_| host::os_error(libc::EFBIG))?, 0);
            overlay.data.read_at(&mut buf, at, Wait::Yes)?;
            to.write_at(&[IoSlice::new(&buf)], at)?;
            at += len;
        }
    }
    Ok(to)
}
