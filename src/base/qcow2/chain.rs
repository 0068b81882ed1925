//! A qcow2 image and its backing files, opened as one layer.
//!
//! The names in an image may come from an attacker. Each is followed only as the plain name of a file
//! below an allowed directory (that of the first image, and those that the user named), and opened
//! in the format that the image records for it. The format is never guessed from the file's bytes:
//! what a guest writes into a raw image stays raw for ever. A file is found first, its real path is
//! taken from the file itself, and that file is opened: a directory that becomes a link meanwhile
//! leads nowhere.
//!
//! All headers are checked before the first table is read, so that a chain that is refused costs
//! little.

use std::collections::HashSet;
use std::fs::{File, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::AtFlags;

use super::super::{BaseAccess, BaseError, BaseFile, open_base_file, open_located};
use super::header::{BackingRef, HeaderError, Qcow2Header};
use super::tables::{MAX_TABLE_BYTES, TableBudget};
use super::{Qcow2Layer, cluster_cache::ClusterCache};
use crate::config::{DirectIo, Format, Locking, Passthrough};
use crate::confined::PathHandle;
use crate::extents::{Extent, ExtentKind};
use crate::layer::{CopyFn, Layer, Wait};
use crate::trust;
use crate::trusted_path::{self, open_dir};

/// The most images of a chain.
const MAX_BACKING_FILES: usize = 256;

/// The reason why a chain is not opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The header of an image is damaged or not supported.
    #[error("'{}' {error}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: HeaderError,
    },
    /// The name of a backing file is not a plain file name.
    #[error(
        "'{}' names '{name}' as its backing file, and only names of files are followed: put the path there with qemu-img rebase -u",
        path.display()
    )]
    NotAFileName {
        /// The image.
        path: PathBuf,
        /// The recorded name.
        name: String,
    },
    /// The image does not record the format of its backing file, as images of old versions of QEMU.
    #[error(
        "'{}' does not say which format its backing file '{name}' has: write it down with qemu-img rebase -u -F FORMAT -b '{name}' '{}'",
        path.display(), path.display()
    )]
    NoFormat {
        /// The image.
        path: PathBuf,
        /// Its backing file.
        name: String,
    },
    /// The backing file has a format that is not read here.
    #[error("'{}' has a backing file '{name}' in the format {format}: only raw and qcow2 are read", path.display())]
    UnsupportedFormat {
        /// The image.
        path: PathBuf,
        /// Its backing file.
        name: String,
        /// The recorded format.
        format: String,
    },
    /// A file that an image names is not below an allowed directory.
    #[error(
        "'{}' needs '{}', which is not below a directory that is allowed: add --allow-backing {} if you trust the image",
        path.display(), needed.display(), needed.parent().unwrap_or(Path::new("/")).display()
    )]
    NotAllowed {
        /// The image.
        path: PathBuf,
        /// The file that the image names.
        needed: PathBuf,
    },
    /// The image has its data in another file, whose name it does not record.
    #[error("'{}' has its data in another file and does not say in which", .0.display())]
    NoDataFile(PathBuf),
    /// The chain leads back to one of its images.
    #[error("'{}' is its own backing file, in the end", .0.display())]
    Loop(PathBuf),
    /// The chain is too long.
    #[error("'{}' has more than {MAX_BACKING_FILES} backing files below it", .0.display())]
    TooDeep(PathBuf),
    /// The tables of the image and of those above it exceed the memory budget.
    #[error(
        "'{}' brings the tables of the images to more than {} MiB: make the chain shorter, or its clusters larger, with qemu-img convert",
        .0.display(), MAX_TABLE_BYTES >> 20
    )]
    TooLarge(PathBuf),
    /// A file that an image names cannot be opened.
    #[error("'{}' needs another file: {error}", path.display())]
    NeededFile {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: Box<BaseError>,
    },
}

/// A qcow2 image over its backing files.
pub struct BackingChain {
    /// The images, top to bottom.
    images: Vec<Arc<dyn Layer>>,
    size: u64,
    needs: Vec<(PathBuf, Arc<File>)>,
}

impl BackingChain {
    /// Returns the files that the chain is read from besides the image itself.
    #[must_use]
    pub fn needs(&self) -> &[(PathBuf, Arc<File>)] {
        &self.needs
    }
}

/// One image of a chain that is being opened.
struct ChainImage {
    path: PathBuf,
    file: BaseFile,
    /// `None` for a raw image, which ends the chain.
    header: Option<Qcow2Header>,
    /// The data file, if the image does not hold its data itself.
    data: Option<(PathBuf, BaseFile)>,
}

/// Opens the qcow2 image `host` and all backing files below it. Backing files must lie below the directory
/// of `host` or one of `allowed`, data files below one of `allowed`.
///
/// # Errors
/// [`ChainError`].
pub fn open(
    host: BaseFile,
    allowed: &[PathBuf],
    locking: Locking,
) -> Result<BackingChain, ChainError> {
    let path = host.real_path.clone();
    let allowed = AllowedDirs::for_image(&host, allowed, locking);
    let mut seen = HashSet::new();
    let mut budget = TableBudget::default();
    let mut members = vec![ChainImage::read(path.clone(), host, "qcow2", &allowed)?];
    loop {
        let Some(last) = members.last() else { return Err(ChainError::Loop(path)) };
        if !seen.insert(last.file.file_id().map_err(|error| last.unreadable(error))?) {
            return Err(ChainError::Loop(path));
        }
        last.charge_tables(&mut budget)?;
        let Some(backing) = last.header.as_ref().and_then(|header| header.backing.clone()) else {
            break;
        };
        if members.len() > MAX_BACKING_FILES {
            return Err(ChainError::TooDeep(path));
        }
        let next = last.open_backing(&backing, &allowed)?;
        members.push(next);
    }
    let size = members.first().and_then(|top| top.header.as_ref()).map_or(0, |top| top.size);
    let needs = members.iter().flat_map(ChainImage::files).skip(1).collect();
    let inflated = ClusterCache::new();
    let build = |member: ChainImage| member.into_layer(&budget, &inflated);
    let images = members.into_iter().map(build).collect::<Result<_, _>>()?;
    Ok(BackingChain { images, size, needs })
}

/// One image alone, and its backing file.
pub struct TopImage {
    /// The layer of the image alone: [`ExtentKind::Lower`] where the image holds nothing.
    pub image: Arc<dyn Layer>,
    /// The backing file and its format.
    pub backing: Option<(PathBuf, Format)>,
}

/// Opens the qcow2 image at `path` without its backing file, which must be allowed all the same.
///
/// # Errors
/// [`BaseError`].
pub fn open_top(path: &Path, allowed: &[PathBuf]) -> Result<TopImage, BaseError> {
    let host =
        open_base_file(path, BaseAccess::Read, Locking::Qemu, Passthrough::Off, DirectIo::Off)?;
    let real = host.real_path.clone();
    let allowed = AllowedDirs::for_image(&host, allowed, Locking::Qemu);
    let top = ChainImage::read(real, host, "qcow2", &allowed)?;
    let mut budget = TableBudget::default();
    top.charge_tables(&mut budget)?;
    let backing = match top.header.as_ref().and_then(|header| header.backing.clone()) {
        None => None,
        Some(backing) => {
            let below = top.open_backing(&backing, &allowed)?;
            let format = if below.header.is_some() { Format::Qcow2 } else { Format::Raw };
            Some((below.path, format))
        }
    };
    Ok(TopImage { image: top.into_layer(&budget, &ClusterCache::new())?, backing })
}

/// The directories below which the images of a chain may name files.
struct AllowedDirs {
    /// The directory of the first image: backing files may lie there, and below. `None` when the
    /// image has no path.
    image_dir: Option<PathBuf>,
    /// The directories that the user named: data files may lie there as well.
    user_dirs: Vec<PathBuf>,
    locking: Locking,
}

impl AllowedDirs {
    /// Creates the list for a chain whose first image is `image`.
    fn for_image(image: &BaseFile, named: &[PathBuf], locking: Locking) -> Self {
        let dir = image.real_path.parent().unwrap_or(Path::new("/")).to_owned();
        let image_dir = image.has_real_path.then_some(dir);
        let user_dirs = named.iter().filter_map(|dir| trusted_path::real_dir(dir).ok()).collect();
        Self { image_dir, user_dirs, locking }
    }

    /// Returns whether `image` may have the backing file `found`, which lies at `path`: a file below
    /// the directory of the first image that the author of `image` could have read. Whoever can write
    /// an image, or put one into its directory, can name any file there; unless only root and this
    /// user can do that, the backing file must belong to the owner of the image.
    fn is_backing_allowed(&self, image: &BaseFile, path: &Path, found: &Metadata) -> bool {
        self.image_dir.as_ref().is_some_and(|dir| path.starts_with(dir))
            && (is_trusted(image)
                || image.file.metadata().is_ok_and(|image| image.uid() == found.uid()))
    }

    /// Opens the file `name` that `image`, which lies at `path`, names. `may_be_own` allows the
    /// directory of the first image as well, for backing files.
    fn open(
        &self,
        image: &BaseFile,
        path: &Path,
        name: &str,
        may_be_own: bool,
    ) -> Result<(PathBuf, BaseFile), ChainError> {
        let of_needed =
            |error| ChainError::NeededFile { path: path.to_owned(), error: Box::new(error) };
        let named = path.parent().unwrap_or(Path::new("/")).join(name);
        let missing = |error| of_needed(BaseError::from_io(&named, BaseAccess::Read, error));
        // The file is found first, judged by its real path, and opened itself: never again by its
        // path, which may lead elsewhere by then.
        let located = PathHandle::at(&named).map_err(missing)?;
        let needed = located.real_path().map_err(missing)?;
        let is_allowed = self.user_dirs.iter().any(|dir| needed.starts_with(dir))
            || (may_be_own && self.is_backing_allowed(image, &needed, located.metadata()));
        if !is_allowed {
            return Err(ChainError::NotAllowed { path: path.to_owned(), needed });
        }
        let (passthrough, direct) = (Passthrough::Off, DirectIo::Off);
        let host =
            open_located(&located, &needed, BaseAccess::Read, self.locking, passthrough, direct)
                .map_err(of_needed)?;
        Ok((needed, host))
    }
}

/// Returns whether only root and this user can have written `image` or put it where it is.
fn is_trusted(image: &BaseFile) -> bool {
    let (Some(dir), Some(name)) = (image.real_path.parent(), image.real_path.file_name()) else {
        return false;
    };
    let is_there = |dir: &File| {
        let found = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        let image = image.file.metadata().ok()?;
        Some((found.st_dev, found.st_ino) == (image.dev(), image.ino()))
    };
    open_dir(dir).is_ok_and(|dir| {
        is_there(&dir) == Some(true)
            && trust::check(&dir).is_ok()
            && trust::check_file(&image.file, &dir).is_ok()
    })
}

impl ChainImage {
    /// Reads and checks the header of an image of the given format.
    fn read(
        path: PathBuf,
        host: BaseFile,
        format: &str,
        allowed: &AllowedDirs,
    ) -> Result<Self, ChainError> {
        if format == "raw" {
            return Ok(Self { path, file: host, header: None, data: None });
        }
        let wrong = |error| ChainError::Header { path: path.clone(), error };
        let header = Qcow2Header::read(&host.file, host.size).map_err(wrong)?;
        header.check_l1(&host.file, host.size).map_err(wrong)?;
        let data = match &header.data_file {
            None => None,
            Some(None) => return Err(ChainError::NoDataFile(path)),
            Some(Some(name)) => Some(allowed.open(&host, &path, name, false)?),
        };
        Ok(Self { path, file: host, header: Some(header), data })
    }

    /// Opens the backing file `backing` of this image.
    fn open_backing(
        &self,
        backing: &BackingRef,
        allowed: &AllowedDirs,
    ) -> Result<Self, ChainError> {
        let (path, name) = (self.path.clone(), backing.name.clone());
        if is_protocol(&name) {
            return Err(ChainError::NotAFileName { path, name });
        }
        let format = match backing.format.as_deref() {
            None => return Err(ChainError::NoFormat { path, name }),
            Some(format @ ("raw" | "qcow2")) => format,
            Some(format) => {
                return Err(ChainError::UnsupportedFormat {
                    path,
                    name,
                    format: format.to_owned(),
                });
            }
        };
        let (needed, host) = allowed.open(&self.file, &path, &name, true)?;
        Self::read(needed, host, format, allowed)
    }

    /// Returns the files that this image is read from, the image first.
    fn files(&self) -> impl Iterator<Item = (PathBuf, Arc<File>)> {
        let data = self.data.iter().map(|(path, data)| (path.clone(), Arc::clone(&data.file)));
        std::iter::once((self.path.clone(), Arc::clone(&self.file.file))).chain(data)
    }

    fn unreadable(&self, error: io::Error) -> ChainError {
        ChainError::Header { path: self.path.clone(), error: error.into() }
    }

    /// Charges the memory of the image's tables to `budget`.
    fn charge_tables(&self, budget: &mut TableBudget) -> Result<(), ChainError> {
        match &self.header {
            Some(header) if !budget.charge(header) => Err(ChainError::TooLarge(self.path.clone())),
            _ => Ok(()),
        }
    }

    /// Builds the layer that reads the image.
    fn into_layer(
        self,
        budget: &TableBudget,
        inflated: &Arc<ClusterCache>,
    ) -> Result<Arc<dyn Layer>, ChainError> {
        let Some(header) = &self.header else { return Ok(self.file.raw) };
        let data = self.data.as_ref().map_or(&self.file, |(_, data)| data);
        let (own, data) = (Arc::clone(&self.file.raw), Arc::clone(&data.raw));
        let image = Qcow2Layer::new(
            Arc::clone(&self.file.file),
            own,
            data,
            header,
            budget,
            Arc::clone(inflated),
        );
        Ok(Arc::new(image.map_err(|error| self.unreadable(error))?))
    }
}

/// Returns whether QEMU would take `name` for more than the name of a file: `json:`, `nbd:`, `http:`.
fn is_protocol(name: &str) -> bool {
    let before = name.split('/').next().unwrap_or_default();
    before.contains(':')
}

impl Layer for BackingChain {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, mut range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        for image in &self.images {
            let found = image.extent_at(range, wait)?;
            if found.kind != ExtentKind::Lower {
                return Ok(found);
            }
            range = found.range;
        }
        Ok(Extent::new(range, ExtentKind::Hole))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let mut range = offset..offset.saturating_add(buf.len() as u64);
        for image in &self.images {
            let len = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
            let found = image.read_at(&mut buf[..len], offset, wait)?;
            if found.kind != ExtentKind::Lower {
                return Ok(found);
            }
            range = found.range;
        }
        Ok(Extent::new(range, ExtentKind::Hole))
    }

    fn lend_at(
        &self,
        mut range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        for image in &self.images {
            let found = image.lend_at(range, wait, copy)?;
            if found.0.kind != ExtentKind::Lower {
                return Ok(found);
            }
            range = found.0.range;
        }
        Ok((Extent::new(range, ExtentKind::Hole), None))
    }
}
