//! Temporary overlays, and how one becomes persistent while it is in use.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{Mode, OFlags};

use super::blocks::{BlockIndex, State};
use super::data::{Create, HostFile, Storage};
use super::persist::{self, New, Persistent, Place};
use super::record::{Image, Tag};
use super::stack::{Stack, StackError, data_in, link_segment};
use super::{Overlay, stack};
use crate::host;
use crate::layer::Wait;

/// Data is copied across file systems in pieces of 1 MiB.
const PIECE: u64 = 1 << 20;

/// The directory for temporary overlays: `$TMPDIR`, else `/var/tmp`, which is on a disk.
#[must_use]
pub fn temporary_dir() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or("/var/tmp".into(), PathBuf::from)
}

/// An overlay of `size` bytes that is gone when it is dropped. Lower is seen up to `lower_limit`.
///
/// # Errors
/// The host's errno from making a file without a name in `dir`.
pub fn temporary(
    dir: &Path,
    block: u32,
    size: u64,
    lower_limit: u64,
    limit: Option<u64>,
) -> io::Result<Overlay> {
    let first = nameless(dir)?;
    let more = dir.to_owned();
    let open = move |_, create| match create {
        Create::IfMissing => nameless(&more).map(Some),
        Create::Never => Ok(None),
    };
    let data = HostFile::segmented(first, Vec::new(), Box::new(open));
    let image = Image::new(size, lower_limit);
    Ok(Overlay::new(block, Arc::new(data), image, None, Tag([0; 2]), limit))
}

/// A file without a name, which `keep` can give one.
fn nameless(dir: &Path) -> io::Result<File> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(dir, flags, Mode::RUSR | Mode::WUSR) {
        Ok(fd) => Ok(File::from(fd)),
        // A file system without O_TMPFILE: made and unlinked; `keep` copies it then.
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => tempfile::tempfile_in(dir),
        Err(error) => Err(error.into()),
    }
}

/// Makes a persistent overlay at `place` that holds what `overlay` holds, durable when it
/// returns. The caller holds the gate exclusive and uses the new one from then on.
///
/// On one file system the data file only gets a name; else its data is copied.
///
/// # Errors
/// [`StackError`]; `overlay` is as it was and nothing is left behind then.
pub fn keep(overlay: &Overlay, place: Place<'_>, stack: Stack) -> Result<Persistent, StackError> {
    let image = overlay.image();
    let limit = overlay.limit.map(|blocks| blocks * overlay.block);
    let new = New { stack, image: &image, limit };
    let kept = persist::build(place, new, |layer| {
        let file = overlay.data.host_file().ok_or_else(|| host::errno(libc::EOPNOTSUPP))?;
        match link(file, layer) {
            Ok(data) => Ok(data),
            Err(error) if is_elsewhere(&error) => copy(overlay, &image, layer),
            Err(error) => Err(error),
        }
    })?;
    // What waited to be given back there waits here.
    kept.overlay.reclaim();
    // And what was learnt from the old map must not be taken for the new one's.
    kept.overlay.revision.store(overlay.revision() + 1, Ordering::Release);
    Ok(kept)
}

fn is_elsewhere(error: &io::Error) -> bool {
    // ENOENT: the file was unlinked by its maker, so it cannot get a name again.
    matches!(
        error.raw_os_error(),
        Some(libc::EXDEV | libc::ENOENT | libc::EOPNOTSUPP | libc::EPERM)
    )
}

/// Gives the segments of `file` their names in `layer`.
fn link(file: &HostFile, layer: &File) -> io::Result<HostFile> {
    if file.first().metadata()?.dev() != layer.metadata()?.dev() {
        return Err(host::errno(libc::EXDEV));
    }
    let mut first = None;
    for (index, segment) in file.segments()? {
        link_segment(&segment, layer, index)?;
        first = first.or(Some(segment));
    }
    layer.sync_all()?;
    let first = first.ok_or_else(|| host::errno(libc::EIO))?;
    data_in(layer.try_clone()?, first)
}

/// Copies every Data block into a new data file in `layer`.
fn copy(overlay: &Overlay, image: &Image, layer: &File) -> io::Result<HostFile> {
    let first = stack::create_at(layer, "data")?;
    first.set_len(image.size.min(super::data::SEGMENT))?;
    let to = data_in(layer.try_clone()?, first)?;
    let mut buf = Vec::new();
    let all = BlockIndex(0)..BlockIndex(image.size.div_ceil(overlay.block));
    for run in image.blocks.runs(all).filter(|run| run.state == State::Data) {
        let bytes = overlay.bytes_of(&run.range);
        let mut at = bytes.start;
        while at < bytes.end {
            let len = (bytes.end - at).min(PIECE);
            buf.resize(usize::try_from(len).map_err(|_| host::errno(libc::EFBIG))?, 0);
            overlay.data.read_at(&mut buf, at, Wait::Yes)?;
            to.write_at(&[IoSlice::new(&buf)], at)?;
            at += len;
        }
    }
    Ok(to)
}
