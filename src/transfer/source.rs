//! The source of a transfer: a file or a device with random access, or a pipe.

use std::fs::{self, File, Metadata};
use std::io;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, OFlags, SeekFrom, fadvise};
use rustix::io::Errno;
use uuid::Uuid;
use xxhash_rust::xxh3::xxh3_64;

use super::TransferError;
use super::target_writer::device_size;
use crate::extents::ExtentKind;
use crate::formats::RunContent;
use crate::host;
use crate::host::file_system::{FsKind, HostFs};

/// Bytes that the source is read ahead: 4 MiB. The kernel's own read-ahead is 128 KiB.
const READ_AHEAD: u64 = 4 << 20;

/// Whether data is searched for zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZeroDetection {
    /// Only where the source cannot report holes.
    AsNeeded,
    /// Always (`--detect-zeroes`).
    Always,
}

/// An open source.
#[derive(Debug)]
pub struct TransferSource {
    file: File,
    path: PathBuf,
    /// The size in bytes; `None` for a pipe, whose end is not known.
    size: Option<u64>,
    /// Whether the source can report its holes.
    knows_holes: bool,
    /// An upper bound of the bytes of data, according to the file system.
    data_estimate: Option<u64>,
    opened_stamp: Option<FileStamp>,
    /// A number that distinguishes this state of the file from others; 0 for pipes and devices,
    /// whose changes cannot be detected.
    version_id: u64,
}

/// The metadata that changes when a file is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct FileStamp {
    inode: u64,
    size: u64,
    mtime: (i64, i64),
}

impl FileStamp {
    fn of(file: &File) -> io::Result<Self> {
        Ok(Self::from(&file.metadata()?))
    }

    fn version_id(&self) -> u64 {
        let mut bytes = Vec::with_capacity(32);
        bytes.extend(self.inode.to_le_bytes());
        bytes.extend(self.size.to_le_bytes());
        bytes.extend(self.mtime.0.to_le_bytes());
        bytes.extend(self.mtime.1.to_le_bytes());
        xxh3_64(&bytes).max(1)
    }
}

impl From<&Metadata> for FileStamp {
    fn from(meta: &Metadata) -> Self {
        let mtime = (meta.mtime(), meta.mtime_nsec());
        Self { inode: meta.ino(), size: meta.len(), mtime }
    }
}

impl TransferSource {
    /// Opens `path`; `-` means the standard input.
    ///
    /// # Errors
    /// A line for the user if `path` cannot be read or is not a file, block device or pipe.
    pub fn open(path: &Path) -> Result<Self, TransferError> {
        let failed = |error: io::Error| TransferError::host("read", path, &error);
        let file = if path == Path::new("-") {
            use std::os::fd::AsFd;
            File::from(io::stdin().as_fd().try_clone_to_owned().map_err(failed)?)
        } else {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
            let fd = rustix::fs::open(path, flags, rustix::fs::Mode::empty());
            File::from(fd.map_err(|error| failed(error.into()))?)
        };
        Self::from_file(file, path)
    }

    /// Opens the disk at `path` as of one moment: `freeze` returns a file with the disk's content
    /// at that moment, which never changes.
    ///
    /// # Errors
    /// The errors of `freeze`; a line for the user if the file cannot be read.
    pub fn open_frozen<E: From<TransferError>>(
        path: &Path,
        freeze: impl FnOnce() -> Result<File, E>,
    ) -> Result<Self, E> {
        let stamp = || fs::metadata(path).ok().map(|meta| FileStamp::from(&meta));
        // Another transfer may resume this one only if the disk has not changed since.
        let before = stamp();
        let file = freeze()?;
        let version_id = match before {
            Some(before) if stamp() == Some(before) => before.version_id(),
            // The disk was being written: no other moment has the same content.
            _ => Uuid::new_v4().as_u64_pair().0.max(1),
        };
        Ok(Self { version_id, ..Self::from_file(file, path)? })
    }

    fn from_file(file: File, path: &Path) -> Result<Self, TransferError> {
        let failed = |error: io::Error| TransferError::host("read", path, &error);
        let meta = file.metadata().map_err(failed)?;
        let (kind, path) = (meta.file_type(), path.to_owned());
        if kind.is_fifo() || kind.is_socket() {
            return Ok(Self {
                file,
                path,
                size: None,
                knows_holes: false,
                data_estimate: None,
                opened_stamp: None,
                version_id: 0,
            });
        }
        if !kind.is_file() && !kind.is_block_device() {
            let what = if kind.is_dir() { "a directory" } else { "no file" };
            return Err(TransferError::Refused(format!(
                "'{}' is {what}: name a file or a block device",
                path.display()
            )));
        }
        check_length(&file, &meta, &path)?;
        // Faster read-ahead; this is only advice, so errors do not matter.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        if !kind.is_file() {
            let size = Some(device_size(&file, &path)?);
            let (knows_holes, before, version_id) = (false, None, 0);
            return Ok(Self {
                file,
                path,
                size,
                knows_holes,
                data_estimate: size,
                opened_stamp: before,
                version_id,
            });
        }
        let before = FileStamp::from(&meta);
        let allocated = meta.blocks().saturating_mul(512);
        let size = meta.len();
        let knows_holes = reports_holes(&file, size, allocated);
        let data = Some(allocated.min(size));
        let (size, version_id) = (Some(size), before.version_id());
        Ok(Self {
            file,
            path,
            size,
            knows_holes,
            data_estimate: data,
            opened_stamp: Some(before),
            version_id,
        })
    }

    /// Returns the size in bytes; `None` for a pipe.
    #[must_use]
    pub fn size(&self) -> Option<u64> {
        self.size
    }

    /// Returns an estimate of the bytes of data, if known.
    #[must_use]
    pub fn data_estimate(&self) -> Option<u64> {
        self.data_estimate
    }

    /// Returns the path, for messages.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns a number that distinguishes this state of the file from others; 0 for pipes and
    /// devices, whose changes cannot be detected. Checkpoints contain it as `identity`.
    #[must_use]
    pub fn version_id(&self) -> u64 {
        self.version_id
    }

    /// Returns whether the file has been written to since it was opened.
    #[must_use]
    pub fn has_changed(&self) -> bool {
        self.opened_stamp
            .is_some_and(|before| FileStamp::of(&self.file).is_ok_and(|now| now != before))
    }

    /// Returns the open file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Returns whether the data of this source is searched for zeros.
    pub(super) fn looks_for_zeros(&self, detect: ZeroDetection) -> bool {
        detect == ZeroDetection::Always || !self.knows_holes
    }

    /// Returns the kind of a prefix of `range`, according to the map of holes alone.
    pub(super) fn extent_at(&self, range: &Range<u64>) -> io::Result<(Range<u64>, RunContent)> {
        if !self.knows_holes {
            return Ok((range.clone(), RunContent::Data));
        }
        Ok(match host::extent_at(&self.file, range.clone())? {
            Some(found) if found.kind == ExtentKind::Data => (found.range, RunContent::Data),
            Some(found) => (found.range, RunContent::Zeros),
            None => (range.clone(), RunContent::Zeros),
        })
    }

    /// Fills `buf` from `offset`; returns `UnexpectedEof` if the file has become too short.
    pub(super) fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        use std::os::unix::fs::FileExt;
        if offset.is_multiple_of(READ_AHEAD) {
            // The disk reads on while this piece is hashed and written; this is only advice.
            let _ = fadvise(
                &self.file,
                offset + READ_AHEAD,
                NonZeroU64::new(READ_AHEAD),
                Advice::WillNeed,
            );
        }
        self.file.read_exact_at(buf, offset)
    }

    /// Fills `buf` from a pipe, or as much of it as there is before the end.
    pub(super) fn read_pipe(&self, buf: &mut [u8]) -> io::Result<usize> {
        host::read_full(&self.file, buf)
    }

    /// Returns the error for a source that has become shorter.
    pub(super) fn shrunk_error(&self) -> TransferError {
        TransferError::AfterStart(format!(
            "'{}' got shorter while it was sent: send it when nobody writes to it, or a snapshot \
             of it",
            self.path.display()
        ))
    }

    /// Returns whether the file is shorter than when it was opened.
    pub(super) fn has_shrunk(&self) -> bool {
        let now = FileStamp::of(&self.file);
        self.opened_stamp.is_some_and(|before| now.is_ok_and(|now| now.size < before.size))
    }
}

/// Checks that a regular file has as many bytes as its metadata says: files of the kernel, and of
/// some FUSE servers, say 0 and have some.
fn check_length(file: &File, meta: &Metadata, path: &Path) -> Result<(), TransferError> {
    use std::os::unix::fs::FileExt;
    if !meta.is_file() {
        return Ok(());
    }
    let failed = |error: io::Error| TransferError::host("read", path, &error);
    let path = path.display();
    let fs = HostFs::of(file).map_err(failed)?;
    if fs.kind == FsKind::Pseudo {
        return Err(TransferError::Refused(format!(
            "'{path}' is a {} file of the kernel: name a file or a block device",
            fs.name
        )));
    }
    if meta.len() == 0 && file.read_at(&mut [0], 0).map_err(failed)? > 0 {
        return Err(TransferError::Refused(format!(
            "'{path}' has bytes although its size is 0: send it through a pipe, cat FILE | cowslip \
             send -"
        )));
    }
    Ok(())
}

/// Returns whether the file system reports the holes of `file`. One that cannot report them says
/// that there are none, even if the file occupies less space than its length.
fn reports_holes(file: &File, size: u64, allocated: u64) -> bool {
    match rustix::fs::seek(file, SeekFrom::Hole(0)) {
        Ok(hole) => hole < size || allocated >= size,
        // The file is empty.
        Err(Errno::NXIO) => true,
        Err(_) => false,
    }
}
