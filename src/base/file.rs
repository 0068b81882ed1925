//! Opening the file or device of a base: examined before it is opened, opened without waiting, then
//! locked, and only then measured.

use std::fs::{File, FileType, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::error::BaseError;
use super::raw::{HostKind, RawBase};
use super::view::{self, RangeView};
use super::{BaseAccess, lock};
use crate::config::{DirectIo, Locking, Passthrough};
use crate::confined::{self, PathHandle};
use crate::host;
use crate::host::file_system::{FsKind, HostFs};
use crate::layer::WritableLayer;
use crate::remote::RemoteDisk;

/// A file or device of the host, open and locked.
pub struct BaseFile {
    /// The open file.
    pub(in crate::base) file: Arc<File>,
    /// The layer that reads and writes the file; the locks end with it.
    pub(in crate::base) raw: Arc<RawBase>,
    /// The canonical path.
    pub(in crate::base) real_path: PathBuf,
    /// Whether `real_path` leads to the file; otherwise `real_path` is the path that was given.
    pub(in crate::base) has_real_path: bool,
}

impl BaseFile {
    /// Returns the device and the inode, which distinguish the file from every other.
    pub(in crate::base) fn file_id(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// Returns the sector size of a device in bytes; `None` for a file, which has no sectors.
    pub(in crate::base) fn sector_size(&self) -> io::Result<Option<u64>> {
        match self.raw.kind() {
            HostKind::File => Ok(None),
            HostKind::BlockDevice => Ok(Some(rustix::fs::ioctl_blksszget(&*self.file)?.into())),
        }
    }
}

pub(super) fn open_base_file(
    path: &Path,
    access: BaseAccess,
    locking: Locking,
    passthrough: Passthrough,
    direct: DirectIo,
) -> Result<BaseFile, BaseError> {
    let located = PathHandle::at(path).map_err(|error| BaseError::from_io(path, access, error))?;
    open_located(&located, path, access, locking, passthrough, direct)
}

/// Opens and locks the file that was found at `path`; `path` is only for messages.
pub(super) fn open_located(
    located: &PathHandle,
    path: &Path,
    access: BaseAccess,
    locking: Locking,
    passthrough: Passthrough,
    direct: DirectIo,
) -> Result<BaseFile, BaseError> {
    let host_error = |error: io::Error| BaseError::from_io(path, access, error);
    // Checked before it is opened: opening a watchdog or a tape already has an effect.
    let kind = check_kind(path, located.metadata())?;
    let file = open_descriptor(located, path, kind, access)?;
    check_not_pseudo(path, &file).map_err(host_error)??;
    // Locked before its size and bytes are read: nobody changes them from then on.
    lock::lock(&file, path, access, locking).inspect_err(|_| lock::release(&file))?;
    let size = size_of(&file, kind).map_err(host_error)?;
    if size == 0 && kind == HostKind::BlockDevice {
        return Err(BaseError::EmptyDevice(path.to_owned()));
    }
    let file = Arc::new(file);
    // From here on the layer releases the locks when it is dropped.
    let raw = match (kind, passthrough) {
        (HostKind::File, Passthrough::On) => RawBase::whole(file.clone()),
        _ => RawBase::new(file.clone(), kind, size),
    };
    let mut raw = raw.map_err(host_error)?;
    if direct == DirectIo::On {
        let refused = |error| BaseError::NoDirect { path: path.to_owned(), error };
        raw = raw.with_direct_io().map_err(refused)?;
    }
    let found = confined::real_path(&*file).ok();
    let has_real_path = found.is_some();
    let real_path = found.unwrap_or_else(|| path.to_owned());
    Ok(BaseFile { file, raw: Arc::new(raw), real_path, has_real_path })
}

/// A base that a disk reads and that a commit now writes.
pub struct WritableBase {
    /// The layer that is written: only `view` of the base, if there is one.
    pub layer: Arc<dyn WritableLayer>,
    /// The same file or device, whole; `None` for an image on a server.
    pub file: Option<Arc<File>>,
    /// The byte range that is written; `None` for the whole base.
    pub view: Option<Range<u64>>,
    /// The image on a server that `layer` writes.
    pub server: Option<Arc<RemoteDisk>>,
    /// The file of the reading disk, whose locks keep all others out meanwhile.
    reader_file: Option<Arc<File>>,
}

impl WritableBase {
    /// Makes the base of `disk`, an image on a server, or of `view` of it.
    #[must_use]
    pub fn on_server(disk: Arc<RemoteDisk>, view: Option<Range<u64>>) -> Self {
        let layer: Arc<dyn WritableLayer> = match view.clone() {
            None => Arc::clone(&disk) as _,
            Some(view) => Arc::new(RangeView::new(Arc::clone(&disk), view)),
        };
        Self { layer, file: None, view, server: Some(disk), reader_file: None }
    }
}

impl Drop for WritableBase {
    fn drop(&mut self) {
        if let Some(reader) = &self.reader_file {
            lock::downgrade(reader);
        }
    }
}

/// Opens the base at `path`, which a disk reads through `reader`, for writing (only `view` of it, if
/// there is one), and locks all others out.
///
/// # Errors
/// [`BaseError`]: somebody else uses the base, it cannot be written, or `path` no longer leads to it.
pub fn open_writable(
    path: &Path,
    reader: &Arc<File>,
    view: Option<Range<u64>>,
    locking: Locking,
) -> Result<WritableBase, BaseError> {
    let host_error = |error: io::Error| BaseError::from_io(path, BaseAccess::Write, error);
    let meta = reader.metadata().map_err(host_error)?;
    let kind = check_kind(path, &meta)?;
    let located = PathHandle::at(path).map_err(host_error)?;
    let found = located.metadata();
    if (found.dev(), found.ino()) != (meta.dev(), meta.ino()) {
        return Err(host_error(Errno::STALE.into()));
    }
    let file = open_descriptor(&located, path, kind, BaseAccess::Write)?;
    if let Err(error) = lock::lock(reader, path, BaseAccess::Write, locking) {
        lock::downgrade(reader);
        return Err(error.into());
    }
    let file = Arc::new(file);
    let reader = Arc::clone(reader);
    let part = |error| BaseError::Part { path: path.to_owned(), error };
    let layer = size_of(&file, kind).map_err(host_error).and_then(|size| {
        view.as_ref().map_or(Ok(()), |view| view::check_inside(view, size)).map_err(part)?;
        RawBase::new(Arc::clone(&file), kind, size).map_err(host_error)
    });
    match layer {
        Ok(raw) => {
            let layer: Arc<dyn WritableLayer> = match view.clone() {
                None => Arc::new(raw),
                Some(view) => Arc::new(RangeView::new(Arc::new(raw), view)),
            };
            let (file, reader_file) = (Some(file), Some(reader));
            Ok(WritableBase { layer, file, view, server: None, reader_file })
        }
        Err(error) => {
            lock::downgrade(&reader);
            Err(error)
        }
    }
}

/// Opens a file without waiting; the descriptor itself is a blocking one.
fn open_descriptor(
    located: &PathHandle,
    path: &Path,
    kind: HostKind,
    access: BaseAccess,
) -> Result<File, BaseError> {
    let mut flags = match access {
        BaseAccess::Read => OFlags::RDONLY,
        BaseAccess::Write => OFlags::RDWR,
    };
    let claims = kind == HostKind::BlockDevice && access == BaseAccess::Write;
    if claims {
        // The kernel's own lock on devices: refused while the device is mounted, and it cannot be
        // mounted as long as this is open.
        flags |= OFlags::EXCL;
    }
    located.open(flags).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) if claims => BaseError::DeviceBusy(path.to_owned()),
        _ => BaseError::from_io(path, access, error),
    })
}

/// Refuses everything that is neither a file nor a block device.
fn check_kind(path: &Path, meta: &Metadata) -> Result<HostKind, BaseError> {
    let file_type: FileType = meta.file_type();
    let kind = if file_type.is_file() {
        return Ok(HostKind::File);
    } else if file_type.is_block_device() {
        return Ok(HostKind::BlockDevice);
    } else if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a FIFO"
    } else if file_type.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(BaseError::NotAFile { path: path.to_owned(), kind: kind.to_owned() })
}

/// Refuses files that the kernel generates: those of /proc have a size of 0 and other bytes at every
/// read.
fn check_not_pseudo(path: &Path, file: &File) -> io::Result<Result<(), BaseError>> {
    let fs = HostFs::of(file)?;
    if fs.kind != FsKind::Pseudo {
        return Ok(Ok(()));
    }
    Ok(Err(BaseError::NotAFile {
        path: path.to_owned(),
        kind: format!("a {} file of the kernel", fs.name),
    }))
}

/// Returns the size of a file or device in bytes.
fn size_of(file: &File, kind: HostKind) -> io::Result<u64> {
    match kind {
        HostKind::File => Ok(file.metadata()?.len()),
        HostKind::BlockDevice => host::file_size(file),
    }
}
