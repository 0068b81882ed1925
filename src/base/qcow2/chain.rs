//! A qcow2 image and its backing files, opened as one layer.
//!
//! The names in an image may come from an attacker. Each is followed only as the plain name of a file
//! below an allowed directory (`allowed_dirs.rs`), and opened in the format that the image records
//! for it. The format is never guessed from the file's bytes: what a guest writes into a raw image
//! stays raw for ever.
//!
//! All headers are checked before the first table is read, so that a chain that is refused costs
//! little.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::super::{BaseAccess, BaseError, BaseImage, open_base_file};
use super::allowed_dirs::AllowedDirs;
use super::chain_error::{ChainError, FileRole, MAX_BACKING_FILES};
use super::header::{BackingRef, DataFile, Qcow2Header};
use super::l1_map::L1Map;
use super::tables::TableBudget;
use super::{Qcow2Layer, cluster_cache::ClusterCache};
use crate::config::{DirectIo, Format, Locking, Passthrough};
use crate::extents::{Extent, ExtentKind};
use crate::layer::{CopyFn, Layer, Wait};

/// A qcow2 image over its backing files.
pub struct BackingChain {
    /// Those of the images, top to bottom.
    layers: Vec<Arc<dyn Layer>>,
    size: u64,
    needs: Vec<(PathBuf, Arc<File>)>,
}

impl BackingChain {
    /// Returns the files of the host that the chain is read from besides the image itself.
    #[must_use]
    pub fn needs(&self) -> &[(PathBuf, Arc<File>)] {
        &self.needs
    }
}

/// One image of a chain that is being opened.
struct ChainImage {
    image: BaseImage,
    /// `None` for a raw image, which ends the chain.
    header: Option<Qcow2Header>,
    /// Which L2 tables it has.
    l2_tables: L1Map,
    /// The data file, if the image does not hold its data itself.
    data: Option<BaseImage>,
}

/// Opens the qcow2 image `image` and all backing files below it. Backing files must lie below the
/// directory of `image`, if it is a file of the host, or one of `allowed`; data files below one of
/// `allowed`.
///
/// # Errors
/// [`ChainError`].
pub fn open(
    image: BaseImage,
    allowed: &[PathBuf],
    locking: Locking,
) -> Result<BackingChain, ChainError> {
    let path = image.name.clone();
    let allowed = AllowedDirs::for_image(&image, allowed, locking);
    let mut seen = HashSet::new();
    let mut budget = TableBudget::default();
    let mut images = vec![ChainImage::read(image, "qcow2", &allowed)?];
    loop {
        let Some(last) = images.last() else { return Err(ChainError::Loop(path)) };
        // No image names one on a server.
        if let Some(file) = &last.image.file
            && !seen.insert(file.file_id().map_err(|error| last.unreadable(error))?)
        {
            return Err(ChainError::Loop(path));
        }
        last.charge_tables(&mut budget)?;
        let Some(backing) = last.header.as_ref().and_then(|header| header.backing.clone()) else {
            break;
        };
        if images.len() > MAX_BACKING_FILES {
            return Err(ChainError::TooDeep(path));
        }
        let next = last.open_backing(&backing, &allowed)?;
        images.push(next);
    }
    let top = images.first();
    let size = top.and_then(|top| top.header.as_ref()).map_or(0, |header| header.size);
    let own = usize::from(top.is_some_and(|top| top.image.file.is_some()));
    let needs = images.iter().flat_map(ChainImage::files).skip(own).collect();
    let cluster_cache = ClusterCache::new();
    let build = |image: ChainImage| image.into_layer(&budget, &cluster_cache);
    let layers = images.into_iter().map(build).collect::<Result<_, _>>()?;
    Ok(BackingChain { layers, size, needs })
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
    let image =
        open_base_file(path, BaseAccess::Read, Locking::Qemu, Passthrough::Off, DirectIo::Off)?;
    let image = image.into();
    let allowed = AllowedDirs::for_image(&image, allowed, Locking::Qemu);
    let top = ChainImage::read(image, "qcow2", &allowed)?;
    let mut budget = TableBudget::default();
    top.charge_tables(&mut budget)?;
    let backing = match top.header.as_ref().and_then(|header| header.backing.clone()) {
        None => None,
        Some(backing) => {
            let below = top.open_backing(&backing, &allowed)?;
            let format = if below.header.is_some() { Format::Qcow2 } else { Format::Raw };
            Some((below.image.name, format))
        }
    };
    Ok(TopImage { image: top.into_layer(&budget, &ClusterCache::new())?, backing })
}

impl ChainImage {
    /// Reads and checks the header of an image of the given format.
    fn read(image: BaseImage, format: &str, allowed: &AllowedDirs) -> Result<Self, ChainError> {
        if format == "raw" {
            let l2_tables = L1Map::default();
            return Ok(Self { image, header: None, l2_tables, data: None });
        }
        let header_error = |error| ChainError::Header { path: image.name.clone(), error };
        let header = Qcow2Header::read(&*image.layer).map_err(header_error)?;
        let l2_tables = header.check_l1(&*image.layer).map_err(header_error)?;
        let data = match &header.data_file {
            DataFile::Inside => None,
            DataFile::External(None) => return Err(ChainError::NoDataFile(image.name)),
            DataFile::External(Some(name)) => {
                allowed.check_name(&image, name, FileRole::Data)?;
                Some(allowed.open(&image, name, FileRole::Data)?)
            }
        };
        Ok(Self { image, header: Some(header), l2_tables, data })
    }

    /// Opens the backing file `backing` of this image.
    fn open_backing(
        &self,
        backing: &BackingRef,
        allowed: &AllowedDirs,
    ) -> Result<Self, ChainError> {
        allowed.check_name(&self.image, &backing.name, FileRole::Backing)?;
        let (path, name) = (self.image.name.clone(), backing.name.clone());
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
        let image = allowed.open(&self.image, &name, FileRole::Backing)?;
        Self::read(image, format, allowed)
    }

    /// Returns the files of the host that this image is read from, the image first.
    fn files(&self) -> impl Iterator<Item = (PathBuf, Arc<File>)> {
        std::iter::once(&self.image).chain(&self.data).filter_map(BaseImage::host_file)
    }

    fn unreadable(&self, error: io::Error) -> ChainError {
        ChainError::Header { path: self.image.name.clone(), error: error.into() }
    }

    /// Charges the memory of the image's tables to `budget`.
    fn charge_tables(&self, budget: &mut TableBudget) -> Result<(), ChainError> {
        match &self.header {
            Some(header) if !budget.charge(header) => {
                Err(ChainError::TooLarge(self.image.name.clone()))
            }
            _ => Ok(()),
        }
    }

    /// Builds the layer that reads the image.
    fn into_layer(
        self,
        budget: &TableBudget,
        cluster_cache: &Arc<ClusterCache>,
    ) -> Result<Arc<dyn Layer>, ChainError> {
        let own = Arc::clone(&self.image.layer);
        let Some(header) = &self.header else { return Ok(own) };
        let data = Arc::clone(&self.data.as_ref().unwrap_or(&self.image).layer);
        let (tables, cache) = (self.l2_tables.clone(), Arc::clone(cluster_cache));
        let layer = Qcow2Layer::new(own, data, header, tables, budget, cache);
        Ok(Arc::new(layer.map_err(|error| self.unreadable(error))?))
    }
}

impl Layer for BackingChain {
    fn size(&self) -> u64 {
        self.size
    }

    fn extent_at(&self, mut range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        for layer in &self.layers {
            let found = layer.extent_at(range, wait)?;
            if found.kind != ExtentKind::Lower {
                return Ok(found);
            }
            range = found.range;
        }
        Ok(Extent::new(range, ExtentKind::Hole))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        let mut range = offset..offset.saturating_add(buf.len() as u64);
        for layer in &self.layers {
            let len = usize::try_from(range.end - offset).unwrap_or(usize::MAX);
            let found = layer.read_at(&mut buf[..len], offset, wait)?;
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
        for layer in &self.layers {
            let found = layer.lend_at(range, wait, copy)?;
            if found.0.kind != ExtentKind::Lower {
                return Ok(found);
            }
            range = found.0.range;
        }
        Ok((Extent::new(range, ExtentKind::Hole), None))
    }
}
