//! Images in formats that QEMU reads: each by a `qemu-nbd` of its own, which is locked in.
//!
//! ```text
//!   ForeignBase ── ServedImage (remote/served.rs) ── NBD, a socket ── qemu-nbd ── vm.vmdk
//!     a layer for each disk      one for an image                      └── in a sandbox
//! ```
//!
//! QEMU's parsers are large, written in C, and may be taken over by an image. So the program that runs
//! them can do nothing but answer (`program.rs`): it reads the one file, which we have opened and
//! checked, and files below the directories that the user allows. Which of those it has opened is asked
//! of the kernel (`files.rs`): they are what the image needs, as the backing files of a qcow2 image are.

pub(super) mod error;
mod files;
mod program;

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

pub use self::error::ForeignError;
use self::files::OpenedFiles;
use self::program::Allowed;
use super::error::BaseError;
use super::file::BaseFile;
use super::image::{BaseImage, OpenedImage};
use super::{BaseAccess, BaseOptions, open_located};
use crate::config::{DirectIo, Format, Locking, Passthrough};
use crate::extents::Extent;
use crate::layer::{CopyFn, Layer, Wait};
use crate::remote::{self, ServedImage};

/// An image that a program reads.
struct ForeignImage {
    served: ServedImage,
    /// The other files that the program has open, locked as the image is.
    needs: Vec<BaseFile>,
}

/// What images must have in common to be one.
#[derive(PartialEq, Eq)]
struct ImageKey {
    /// Device, inode, size and time of last modification.
    file: (u64, u64, u64, (i64, i64)),
    format: Format,
    locking: Locking,
    allowed: Vec<PathBuf>,
}

/// An image that is open or being opened; locked while its program starts.
type OpenImage = Arc<Mutex<Weak<ForeignImage>>>;

/// The images that are open.
static OPEN: Mutex<Vec<(ImageKey, OpenImage)>> = Mutex::new(Vec::new());

/// Opens `image` in `format`; waits until the program has opened it.
///
/// # Errors
/// [`ForeignError`]; [`BaseError`] for a file that the image needs.
pub(super) fn open(
    image: BaseImage,
    format: Format,
    options: &BaseOptions<'_>,
) -> Result<OpenedImage, BaseError> {
    let BaseImage { name, file, .. } = image;
    let Some(file) = file else {
        return Err(ForeignError::OnServer { path: name, format }.into());
    };
    let allowed = Allowed::find(options.allow_backing);
    let unreadable = |error| BaseError::from_io(&name, BaseAccess::Read, error);
    let found = file.file.metadata().map_err(unreadable)?;
    let time = (found.mtime(), found.mtime_nsec());
    let key = ImageKey {
        file: (found.dev(), found.ino(), found.size(), time),
        format,
        locking: options.locking,
        allowed: allowed.dirs().to_vec(),
    };
    // Of two disks that begin at once, the second waits for the program of the first.
    let place = place_of(key);
    let mut place = place.lock();
    let image = match place.upgrade() {
        Some(image) => image,
        None => Arc::new(start(&name, &file, format, options.locking, &allowed)?),
    };
    *place = Arc::downgrade(&image);
    drop(place);
    let needs = image.needs.iter().map(|file| (file.real_path.clone(), Arc::clone(&file.file)));
    let needs = needs.collect();
    Ok(OpenedImage { layer: Arc::new(ForeignBase { image, _file: file }), needs })
}

/// Returns the place of the image that `key` describes. Waits for no program.
fn place_of(key: ImageKey) -> OpenImage {
    let is_used = |image: &OpenImage| {
        let is_open = |image: &Weak<ForeignImage>| image.strong_count() > 0;
        Arc::strong_count(image) > 1 || image.try_lock().is_none_or(|image| is_open(&image))
    };
    let mut open = OPEN.lock();
    open.retain(|(_, image)| is_used(image));
    if let Some((_, image)) = open.iter().find(|(other, _)| *other == key) {
        return Arc::clone(image);
    }
    let image = OpenImage::default();
    open.push((key, Arc::clone(&image)));
    image
}

/// Starts the program that reads `file`, which messages call `path`.
fn start(
    path: &Path,
    file: &BaseFile,
    format: Format,
    locking: Locking,
    allowed: &Allowed,
) -> Result<ForeignImage, BaseError> {
    let unreadable = |error| BaseError::from_io(path, BaseAccess::Read, error);
    let files = OpenedFiles::of(&file.file, allowed.dirs()).map_err(unreadable)?;
    let files = Arc::new(files);
    let program = program::make(path, file, format, locking, allowed, &files)?;
    let shown = format!("qemu-nbd of '{}'", path.display());
    let opened = remote::serve(program, &shown);
    let served = opened.map_err(|text| error::explain(path, format, &text, allowed.dirs()))?;
    let mut needs = Vec::new();
    for (path, located) in files.take_found() {
        let (passthrough, direct) = (Passthrough::Off, DirectIo::Off);
        let opened = open_located(&located, &path, BaseAccess::Read, locking, passthrough, direct)?;
        needs.push(BaseFile { real_path: path, ..opened });
    }
    Ok(ForeignImage { served, needs })
}

/// An image that a program reads, as the bottom of a disk.
struct ForeignBase {
    image: Arc<ForeignImage>,
    /// For its locks.
    _file: BaseFile,
}

impl Layer for ForeignBase {
    fn size(&self) -> u64 {
        self.image.served.size()
    }

    fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        self.image.served.extent_at(range, wait)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<Extent> {
        self.image.served.read_at(buf, offset, wait)
    }

    fn lend_at(
        &self,
        range: Range<u64>,
        wait: Wait,
        copy: CopyFn<'_>,
    ) -> io::Result<(Extent, Option<u64>)> {
        self.image.served.lend_at(range, wait, copy)
    }
}
