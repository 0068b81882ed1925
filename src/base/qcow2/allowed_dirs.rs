//! The directories below which the files that an image names may lie.
//!
//! The names may come from an attacker, and lead to any file of the host. A file is accepted only
//! below the directory of the first image, or one that the user named. It is found first, its real
//! path is taken from the file itself, and that file is opened: a directory that becomes a link
//! meanwhile leads nowhere.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::AtFlags;

use super::super::{BaseAccess, BaseError, BaseFile, BaseImage, open_located};
use super::chain_error::{ChainError, FileRole};
use crate::config::{DirectIo, Locking, Passthrough};
use crate::confined::PathHandle;
use crate::trust;
use crate::trusted_path::{self, open_dir};

/// The directories below which the images of a chain may name files.
pub(super) struct AllowedDirs {
    /// The directory of the first image: backing files may lie there, and below. `None` when the
    /// image has no path, or is on a server.
    image_dir: Option<PathBuf>,
    /// The directories that the user named: data files may lie there as well.
    user_dirs: Vec<PathBuf>,
    locking: Locking,
}

impl AllowedDirs {
    /// Creates the list for a chain whose first image is `image`.
    pub(super) fn for_image(image: &BaseImage, named: &[PathBuf], locking: Locking) -> Self {
        let file = image.file.as_ref().filter(|file| file.has_real_path);
        let dir_of = |path: &Path| path.parent().unwrap_or(Path::new("/")).to_owned();
        let image_dir = file.map(|file| dir_of(&file.real_path));
        let user_dirs = named.iter().filter_map(|dir| trusted_path::real_dir(dir).ok()).collect();
        Self { image_dir, user_dirs, locking }
    }

    /// Returns whether `image` may have the backing file `found`, which lies at `path`: a file below
    /// the directory of the first image that the author of `image` could have read. Whoever can write
    /// an image, or put one into its directory, can name any file there; unless only root and this
    /// user can do that, the backing file must belong to the owner of the image.
    fn is_backing_allowed(&self, image: &BaseImage, path: &Path, found: &Metadata) -> bool {
        let Some(image) = &image.file else { return false };
        self.image_dir.as_ref().is_some_and(|dir| path.starts_with(dir))
            && (is_trusted(image)
                || image.file.metadata().is_ok_and(|image| image.uid() == found.uid()))
    }

    /// Checks that `name`, which `image` names, can be that of a file of this host: beside an image
    /// on a server there are none, and only a full path into a directory that the user named leads
    /// to one.
    ///
    /// # Errors
    /// [`ChainError::NamedByServer`]; [`ChainError::NotAFileName`].
    pub(super) fn check_name(
        &self,
        image: &BaseImage,
        name: &str,
        role: FileRole,
    ) -> Result<(), ChainError> {
        let (path, owned_name) = (image.name.clone(), name.to_owned());
        if image.file.is_none() && (self.user_dirs.is_empty() || !name.starts_with('/')) {
            return Err(ChainError::NamedByServer { path, name: owned_name, role });
        }
        if role == FileRole::Backing && is_protocol(name) {
            return Err(ChainError::NotAFileName { path, name: owned_name });
        }
        Ok(())
    }

    /// Opens the file that `image` names as `name`, which was checked.
    ///
    /// # Errors
    /// [`ChainError::NotAllowed`]; [`ChainError::NeededFile`] when the file cannot be opened.
    pub(super) fn open(
        &self,
        image: &BaseImage,
        name: &str,
        role: FileRole,
    ) -> Result<BaseImage, ChainError> {
        let path = &image.name;
        let needed_error =
            |error| ChainError::NeededFile { path: path.to_owned(), error: Box::new(error) };
        let named = path.parent().unwrap_or(Path::new("/")).join(name);
        let missing = |error| needed_error(BaseError::from_io(&named, BaseAccess::Read, error));
        // The file is found first, judged by its real path, and opened itself: never again by its
        // path, which may lead elsewhere by then.
        let located = PathHandle::at(&named).map_err(missing)?;
        let needed = located.real_path().map_err(missing)?;
        let is_allowed = self.user_dirs.iter().any(|dir| needed.starts_with(dir))
            || (role == FileRole::Backing
                && self.is_backing_allowed(image, &needed, located.metadata()));
        if !is_allowed {
            return Err(ChainError::NotAllowed { path: path.to_owned(), needed });
        }
        let (passthrough, direct) = (Passthrough::Off, DirectIo::Off);
        let file =
            open_located(&located, &needed, BaseAccess::Read, self.locking, passthrough, direct)
                .map_err(needed_error)?;
        // The names in an image are followed from where it was found.
        Ok(BaseImage { name: needed, ..file.into() })
    }
}

/// Returns whether QEMU would take `name` for more than the name of a file: `json:`, `nbd:`, `http:`.
fn is_protocol(name: &str) -> bool {
    let before = name.split('/').next().unwrap_or_default();
    before.contains(':')
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
