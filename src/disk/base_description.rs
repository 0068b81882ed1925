//! The base of a disk as its overlay records it: the files and the part of them, or zeros.

use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Disk;
use crate::base::formats::BaseFormat;
use crate::base::{Base, BaseOptions};
use crate::config::{Format, RemoteAddress};
use crate::identity::Identity;
use crate::overlay::stack::{BaseRecord, FileRecord, view_fields};
use crate::remote::{RemoteImage, RemoteStatus};

/// A base that cannot be read for the identity by which it is recognised later.
#[derive(Debug, thiserror::Error)]
#[error("base '{}' cannot be read: {error}", path.display())]
pub struct UnreadableBase {
    /// The path or address of the base, or the path of a file that it needs.
    pub path: PathBuf,
    /// The host's error.
    pub error: io::Error,
}

/// Computes the identity of the open `file`, which is at `path`.
pub(super) fn identity_of(path: &Path, file: &File) -> Result<Identity, UnreadableBase> {
    Identity::of(file).map_err(|error| UnreadableBase { path: path.to_owned(), error })
}

/// Returns the identity of the image on a server.
pub(super) fn remote_identity(remote: &RemoteImage) -> Result<Identity, UnreadableBase> {
    let path = || PathBuf::from(remote.address().as_str());
    remote.identity().map_err(|error| UnreadableBase { path: path(), error })
}

/// The base of a disk, as its overlay records it. The layer that reads it is the `bottom` of a
/// [`LayerStack`](super::layers::LayerStack); the file of a snapshot has that layer, and `Blank` here.
pub(super) enum BaseDescription {
    /// A file or block device.
    File {
        path: PathBuf,
        file: Arc<File>,
        format: Format,
        /// The part of the file that the disk is based on, in bytes; `None` for all of it.
        view: Option<Range<u64>>,
        /// The other files that the base is read from, such as the backing files of a qcow2 image.
        needs: Vec<(PathBuf, Arc<File>)>,
        allow_backing: Vec<PathBuf>,
    },
    /// An image on a server.
    Remote {
        remote: RemoteImage,
        format: Format,
        /// As for a file.
        view: Option<Range<u64>>,
        /// The files of this host that the image needs.
        needs: Vec<(PathBuf, Arc<File>)>,
        allow_backing: Vec<PathBuf>,
    },
    /// Zeros, of this size in bytes.
    Blank(u64),
}

/// Returns the granularity in bytes at byte `start` of a file whose blocks have `unit` bytes: a
/// power of two, and at least a sector, which tools rely on.
pub(super) fn grain_at(start: u64, unit: u32) -> u32 {
    let unit = if unit.is_power_of_two() { unit } else { 512 };
    let start = u32::try_from(start & start.wrapping_neg()).unwrap_or(u32::MAX);
    if start == 0 { unit.max(512) } else { unit.min(start).max(512) }
}

impl BaseDescription {
    /// Describes `base`, which was opened with `options`.
    pub(super) fn of(base: &Base, options: BaseOptions<'_>) -> Self {
        let allow_backing = options.allow_backing.to_vec();
        let (format, needs) = (options.format.unwrap_or(Format::Raw), base.needs.clone());
        let view = base.view.clone();
        if let Some(remote) = &base.remote {
            let remote = remote.clone();
            return Self::Remote { remote, format, view, needs, allow_backing };
        }
        match (&base.path, &base.file) {
            (Some(path), Some(file)) => {
                let (path, file) = (path.clone(), Arc::clone(file));
                Self::File { path, file, format, view, needs, allow_backing }
            }
            _ => Self::Blank(base.size),
        }
    }

    /// The granularity of the holes in bytes: no hole begins or ends inside one such unit, unless
    /// the part of the file begins at no sector.
    pub(super) fn grain(&self) -> u32 {
        let (file, view) = match self {
            Self::File { file, view, .. } => (file, view),
            // A server tells holes in sectors.
            Self::Remote { .. } => return 512,
            Self::Blank(_) => return u32::MAX,
        };
        if let Self::File { format, .. } = self
            && BaseFormat::of(*format).is_foreign()
        {
            // QEMU tells holes in sectors.
            return 512;
        }
        let unit = file.metadata().map_or(0, |found| found.blksize());
        let start = view.as_ref().map_or(0, |view| view.start);
        grain_at(start, u32::try_from(unit).unwrap_or(u32::MAX))
    }

    /// Returns the record of this base for an overlay's `stack`.
    ///
    /// # Errors
    /// [`UnreadableBase`] when a file's identity cannot be read.
    pub(super) fn to_record(&self) -> Result<BaseRecord, UnreadableBase> {
        let record = |(path, file): &(PathBuf, Arc<File>)| {
            Ok(FileRecord { path: path.clone(), identity: identity_of(path, file)? })
        };
        match self {
            Self::Blank(size) => Ok(BaseRecord::Blank { size: *size }),
            Self::Remote { remote, format, view, needs, .. } => {
                let (offset, len) = view_fields(view.as_ref());
                Ok(BaseRecord::Remote {
                    address: remote.address().to_string(),
                    format: format.to_string(),
                    offset,
                    len,
                    identity: remote_identity(remote)?,
                    needs: needs.iter().map(record).collect::<Result<_, UnreadableBase>>()?,
                })
            }
            Self::File { path, file, format, view, needs, .. } => {
                let (offset, len) = view_fields(view.as_ref());
                Ok(BaseRecord::File {
                    path: path.clone(),
                    format: format.to_string(),
                    offset,
                    len,
                    identity: identity_of(path, file)?,
                    needs: needs.iter().map(record).collect::<Result<_, UnreadableBase>>()?,
                })
            }
        }
    }

    /// Whether this is the recorded file, or an image of the same size at the recorded address, whatever
    /// its contents are by now.
    ///
    /// # Errors
    /// [`UnreadableBase`].
    pub(super) fn is_recorded_file(&self, recorded: &BaseRecord) -> Result<bool, UnreadableBase> {
        match (self, recorded) {
            (Self::File { path, file, .. }, BaseRecord::File { identity, .. }) => {
                Ok(identity.file_difference(&identity_of(path, file)?).is_none())
            }
            (Self::Remote { remote, .. }, BaseRecord::Remote { address, identity, .. }) => {
                let is_same = remote.address().as_str() == address;
                Ok(is_same && remote_identity(remote)?.size == identity.size)
            }
            _ => Ok(false),
        }
    }

    /// The same base, read as `remote`; `None` for one that is on no server.
    pub(super) fn with_remote(&self, remote: RemoteImage) -> Option<Self> {
        let Self::Remote { format, view, needs, allow_backing, .. } = self else { return None };
        let (format, view) = (*format, view.clone());
        let (needs, allow_backing) = (needs.clone(), allow_backing.clone());
        Some(Self::Remote { remote, format, view, needs, allow_backing })
    }

    /// The path or the address, for messages; empty for zeros.
    pub(super) fn location(&self) -> PathBuf {
        match self {
            Self::File { path, .. } => path.clone(),
            Self::Remote { remote, .. } => PathBuf::from(remote.address().as_str()),
            Self::Blank(_) => PathBuf::new(),
        }
    }

    /// The format; `None` for zeros.
    pub(super) fn format(&self) -> Option<Format> {
        match self {
            Self::File { format, .. } | Self::Remote { format, .. } => Some(*format),
            Self::Blank(_) => None,
        }
    }

    /// The path; `None` for zeros, and for an image on a server.
    pub(super) fn path(&self) -> Option<&Path> {
        match self {
            Self::File { path, .. } => Some(path),
            Self::Remote { .. } | Self::Blank(_) => None,
        }
    }

    /// The open file; `None` for zeros, and for an image on a server.
    pub(super) fn file(&self) -> Option<&Arc<File>> {
        match self {
            Self::File { file, .. } => Some(file),
            Self::Remote { .. } | Self::Blank(_) => None,
        }
    }

    /// The image on a server; `None` for others.
    pub(super) fn remote(&self) -> Option<&RemoteImage> {
        match self {
            Self::Remote { remote, .. } => Some(remote),
            Self::File { .. } | Self::Blank(_) => None,
        }
    }

    /// Whether `base` is read from the same files, by device and inode, and from the same address.
    pub(super) fn is_same_files(&self, base: &Base) -> bool {
        let id = |file: &File| file.metadata().map(|found| (found.dev(), found.ino())).ok();
        let needed = base.needs.iter().map(|(_, file)| &**file);
        let others = base.file.as_deref().into_iter().chain(needed);
        let is_same_image = match (self.remote(), &base.remote) {
            (Some(mine), Some(other)) => mine.address().is_same_place(other.address()),
            (None, None) => true,
            _ => false,
        };
        is_same_image && self.files().map(id).eq(others.map(id))
    }

    /// All files of this host that the base is read from.
    pub(super) fn files(&self) -> impl Iterator<Item = &File> {
        let (file, needs) = match self {
            Self::File { file, needs, .. } => (Some(file), needs.as_slice()),
            Self::Remote { needs, .. } => (None, needs.as_slice()),
            Self::Blank(_) => (None, [].as_slice()),
        };
        file.into_iter().chain(needs.iter().map(|(_, file)| file)).map(AsRef::as_ref)
    }

    /// The other files of this host that the base is read from.
    pub(super) fn needs(&self) -> impl Iterator<Item = &File> {
        self.files().skip(usize::from(self.file().is_some()))
    }

    /// The directories that may contain the backing files.
    pub(super) fn allow_backing(&self) -> &[PathBuf] {
        match self {
            Self::File { allow_backing, .. } | Self::Remote { allow_backing, .. } => allow_backing,
            Self::Blank(_) => &[],
        }
    }

    /// The metadata of the file; `None` without a file, and when the host refuses.
    pub(super) fn metadata(&self) -> Option<Metadata> {
        match self {
            Self::File { file, .. } => file.metadata().ok(),
            Self::Remote { .. } | Self::Blank(_) => None,
        }
    }
}

/// The base as `status` shows it.
impl Disk {
    /// The path of the disk's base in `status`; `None` without a file.
    #[must_use]
    pub fn base_path(&self) -> Option<PathBuf> {
        self.described_base().path().map(Path::to_owned)
    }

    /// The address of the disk's base; `None` for a base on this host.
    #[must_use]
    pub fn base_address(&self) -> Option<RemoteAddress> {
        self.described_base().remote().map(|remote| remote.address().clone())
    }

    /// What was fetched of the disk's base; `None` for a base that is not fetched.
    #[must_use]
    pub fn remote_status(&self) -> Option<RemoteStatus> {
        self.described_base().remote().and_then(RemoteImage::status)
    }

    /// The bytes of the image below that do not match its bmap, once there are any.
    #[must_use]
    pub fn base_mismatch(&self) -> Option<Range<u64>> {
        self.described_base().remote().and_then(RemoteImage::mismatch).cloned()
    }

    /// Whether bytes do not match, which is told once: what the kernel has cached is not to be believed.
    #[must_use]
    pub fn take_base_mismatch(&self) -> bool {
        !self.is_mismatch_told.load(Ordering::Relaxed)
            && self.base_mismatch().is_some()
            && !self.is_mismatch_told.swap(true, Ordering::Relaxed)
    }

    /// Returns the format of the disk's base; `None` for zeros.
    #[must_use]
    pub fn base_format(&self) -> Option<Format> {
        self.described_base().format()
    }

    /// Describes the disk's base for `status`.
    #[must_use]
    pub fn base_description(&self) -> String {
        match (&*self.described_base(), self.hydration.is_detached()) {
            (BaseDescription::Blank(size), true) => format!("blank:{size}"),
            _ => self.source.clone(),
        }
    }
}
