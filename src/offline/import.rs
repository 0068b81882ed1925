//! Import: converts an image with changes into an overlay over its backing file.
//!
//! The overlay is made under the name of a part and renamed once it is complete: a partial overlay
//! would be mounted like a complete one.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, rename, renameat_with};
use rustix::io::Errno;

use super::{CLOSE_TIMEOUT, OfflineError};
use crate::base::qcow2::{self, TopImage};
use crate::config::{DiskSource, DiskSpec, Format};
use crate::disk::{self, Disk, FallocateMode, OpenContext, OverlayDirState, SizeMode};
use crate::extents::ExtentKind;
use crate::host::{COPY_CHUNK, os_error, sync_parent_dir};
use crate::layer::{Layer, Wait};
use crate::overlay::{Usage, persist};
use crate::part_file::part_path;

/// An import that can begin: the image is open, and the path of the overlay is free.
pub(crate) struct Import {
    image: TopImage,
    allow_backing: Vec<PathBuf>,
    /// Absolute path of the overlay.
    dir: PathBuf,
    /// Path of the overlay until it is complete.
    part: PathBuf,
}

/// An overlay that was imported.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Imported {
    /// The base of the overlay and its format, unless the base is blank.
    pub base: Option<(PathBuf, Format)>,
    /// Size of the disk in bytes.
    pub size: u64,
    /// The changes, in bytes.
    pub changes: Usage,
}

impl Import {
    /// Opens the qcow2 image at `image` for an import into a new overlay at `dir`, both absolute.
    /// Backing files must lie in the directory of the image or below one of `allow_backing`.
    ///
    /// # Errors
    /// [`OfflineError`].
    pub(crate) fn prepare(
        image: &Path,
        dir: &Path,
        allow_backing: Vec<PathBuf>,
    ) -> Result<Self, OfflineError> {
        // Without a trailing `/`, which would not be part of the name.
        let dir: PathBuf = dir.components().collect();
        if dir.exists() {
            return Err(OfflineError::Exists(dir));
        }
        let dir = persist::resolve_overlay_path(&dir).map_err(OfflineError::overlay(&dir))?;
        let part = part_path(&dir);
        if part.symlink_metadata().is_ok() {
            return Err(OfflineError::Leftover(part));
        }
        let image = qcow2::open_top(image, &allow_backing)?;
        Ok(Self { image, allow_backing, dir, part })
    }

    /// Path of the overlay until it is complete.
    pub(crate) fn part(&self) -> &Path {
        &self.part
    }

    /// Creates the overlay. `is_interrupted` is asked again and again until the overlay is complete;
    /// `begin_naming` is asked once, before the overlay gets its name.
    ///
    /// # Errors
    /// [`OfflineError`], with `EINTR` when one of both says so; nothing is left behind, unless only the
    /// last sync of the directory fails: the overlay has its name then.
    pub(crate) fn run(
        self,
        is_interrupted: &dyn Fn() -> bool,
        begin_naming: &dyn Fn() -> bool,
    ) -> Result<Imported, OfflineError> {
        let failed = || OfflineError::host(format!("overlay '{}'", self.dir.display()));
        let size = self.image.image.size();
        let base = self.image.backing.as_ref();
        let source = match base {
            Some((path, _)) => DiskSource::File(path.clone()),
            None => DiskSource::Blank(size),
        };
        let mut spec = DiskSpec::new("import".to_owned(), source);
        spec.format = base.map(|(_, format)| *format);
        spec.overlay = Some(self.part.clone());
        let context =
            OpenContext { allow_backing: self.allow_backing.clone(), ..OpenContext::unmounted() };
        let disk = disk::open(&spec, &context)?.disk;
        // The file opened must be the file that was checked: the path may lead elsewhere by now.
        let copied = match base {
            Some((path, _)) if disk.base_path().as_ref() != Some(path) => Err(io::Error::other(
                format!("'{}' changed its place meanwhile: try again", path.display()),
            )),
            _ => copy_changes(&disk, self.image.image.as_ref(), is_interrupted),
        };
        let changes = match copied {
            Ok(changes) => changes,
            Err(error) => {
                // A partial overlay is useless, and was created here: `abandon` removes it.
                disk.abandon();
                return Err(failed()(error));
            }
        };
        let named = disk.close(CLOSE_TIMEOUT).and_then(|()| {
            if disk.overlay_dir_state() != Some(OverlayDirState::InPlace) {
                let part = self.part.display();
                return Err(io::Error::other(format!("'{part}' was moved or replaced meanwhile")));
            }
            if !begin_naming() {
                return Err(os_error(libc::EINTR));
            }
            rename_new(&self.part, &self.dir)
        });
        if let Err(error) = named {
            // It was closed, or cannot be closed any better.
            disk.remove_new_overlay();
            return Err(failed()(error));
        }
        sync_parent_dir(&self.dir).map_err(failed())?;
        Ok(Imported { base: self.image.backing, size, changes })
    }
}

/// Renames the directory `part` to `dir`, which must not exist.
fn rename_new(part: &Path, dir: &Path) -> io::Result<()> {
    match renameat_with(CWD, part, CWD, dir, RenameFlags::NOREPLACE) {
        // The file system does not support NOREPLACE; the directory did not exist before.
        Err(Errno::INVAL | Errno::NOSYS) => Ok(rename(part, dir)?),
        renamed => Ok(renamed?),
    }
}

/// Copies the changes in `image` itself to `disk`, and returns the number of bytes; `EINTR` when
/// `is_interrupted` says so.
fn copy_changes(
    disk: &Disk,
    image: &dyn Layer,
    is_interrupted: &dyn Fn() -> bool,
) -> io::Result<Usage> {
    let size = image.size();
    disk.set_size(size, Wait::Yes)?;
    let mut buf = vec![0; COPY_CHUNK];
    let (mut at, mut copied) = (0, Usage { data: 0, zero: 0 });
    while at < size {
        if is_interrupted() {
            return Err(os_error(libc::EINTR));
        }
        let mut found = image.extent_at(at..size, Wait::Yes)?;
        if found.kind == ExtentKind::Data {
            let len = usize::try_from(found.len()).map_or(COPY_CHUNK, |len| len.min(COPY_CHUNK));
            found = image.read_at(&mut buf[..len], at, Wait::Yes)?;
        }
        let (range, bytes) = (found.range.clone(), found.len());
        match found.kind {
            ExtentKind::Data => {
                let len = usize::try_from(bytes).unwrap_or(0);
                disk.write(&buf[..len], at, Wait::Yes)?;
                copied.data += bytes;
            }
            ExtentKind::Zero => {
                disk.fallocate(range, FallocateMode::Punch, SizeMode::Keep, Wait::Yes)?;
                copied.zero += bytes;
            }
            ExtentKind::Hole | ExtentKind::Lower => {}
        }
        at = found.range.end;
    }
    disk.sync()?;
    Ok(copied)
}
