//! Bases: the read-only bottom of a disk, and the one function that opens a base.
//!
//! ```text
//!   config::DiskSource::File(path)        config::DiskSource::Blank(size)
//!        │ what is there? (only regular files and block devices are opened)
//!        │ open, look again (file.rs), lock (lock.rs)
//!        │ which format? (formats.rs: as given, or by its first and last bytes)
//!        ▼                                   ▼
//!     RawBase (raw/), qcow2/, foreign/    Blank (blank.rs)
//!        │ all of it, or a part?
//!        ▼
//!     RangeView (view.rs), by bytes or as partitions/ says
//! ```
//!
//! `crate::identity` notices a base that changed under an overlay. `self_reference.rs` notices a base
//! that lies in the mount it would serve and so would wait for itself.
//!
//! Invariants: a base opened with [`BaseAccess::Read`] is never written, since its descriptor is
//! read-only; the locks of a base are held until its layer is dropped; an ambiguous base is refused
//! here with the remedy for the user, never guessed at.

pub mod advice;
pub mod blank;
mod error;
mod file;
mod foreign;
pub mod formats;
mod image;
pub mod lock;
pub mod partitions;
pub mod qcow2;
pub mod raw;
pub mod self_reference;
pub mod view;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use self::blank::Blank;
pub use self::error::BaseError;
pub use self::file::{BaseFile, WritableBase, open_writable};
use self::file::{open_base_file, open_located};
pub use self::foreign::ForeignError;
use self::formats::check_format;
pub use self::image::BaseImage;
use self::image::OpenedImage;
use self::view::RangeView;
use crate::config::{DirectIo, DiskSource, Format, Locking, Passthrough, RemoteSpec, SourcePart};
use crate::identity::Identity;
use crate::layer::{Layer, WritableLayer};
use crate::remote::{self, RemoteImage};

/// The purpose a base is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BaseAccess {
    /// Read-only, as the bottom of a disk.
    Read,
    /// To be changed: `mode=rw`, and commit.
    Write,
}

/// Options for opening a base.
#[derive(Clone, Copy, Debug)]
pub struct BaseOptions<'a> {
    /// The format. `None` means raw, unless the bytes look like another format.
    pub format: Option<Format>,
    /// The part of the base that is served.
    pub part: SourcePart,
    /// The purpose.
    pub access: BaseAccess,
    /// Whether QEMU's locks are taken.
    pub locking: Locking,
    /// Whether the kernel may read and write the base directly (passthrough).
    pub passthrough: Passthrough,
    /// Whether I/O bypasses the host's page cache; only a raw base can do that.
    pub direct: DirectIo,
    /// Further directories in which backing files named by an image may lie, besides the image's
    /// own.
    pub allow_backing: &'a [PathBuf],
}

/// An open base.
pub struct Base {
    /// The layer that reads, and for [`BaseAccess::Write`] writes, the base.
    pub layer: BaseLayer,
    /// The canonical path; `None` for a blank, and for an image on a server.
    pub path: Option<PathBuf>,
    /// The image on a server; `None` for other bases.
    pub remote: Option<RemoteImage>,
    /// The size in bytes of the served part when the base was opened.
    pub size: u64,
    /// The byte range of the served part; `None` for the whole base.
    pub view: Option<Range<u64>>,
    /// The file or device, for further locks and checks; `None` as for `path`.
    pub file: Option<Arc<File>>,
    /// The other files that the base is read from: backing files, the nearest first, and data files.
    pub needs: Vec<(PathBuf, Arc<File>)>,
}

/// A base's layer, by the access the base was opened with.
#[derive(Clone)]
pub enum BaseLayer {
    /// The layer of a base opened with [`BaseAccess::Read`].
    Reader(Arc<dyn Layer>),
    /// The layer of a base opened with [`BaseAccess::Write`].
    Writer(Arc<dyn WritableLayer>),
}

impl BaseLayer {
    /// The layer as a reader.
    #[must_use]
    pub fn reader(&self) -> Arc<dyn Layer> {
        match self {
            Self::Reader(layer) => layer.clone(),
            Self::Writer(layer) => layer.clone(),
        }
    }
}

impl Base {
    /// Returns the base's current identity; `None` for a blank, which cannot change.
    ///
    /// # Errors
    /// The errors of [`Identity::of`] and of [`RemoteImage::identity`].
    pub fn identity(&self) -> io::Result<Option<Identity>> {
        match &self.remote {
            Some(remote) => remote.identity().map(Some),
            None => self.file.as_deref().map(Identity::of).transpose(),
        }
    }
}

/// Opens the base of a disk. Nothing here waits, neither for a FIFO's other end nor for a lock, but
/// an image on a server waits for the server.
///
/// # Errors
/// [`BaseError`], worded for the user.
pub fn open(source: &DiskSource, options: BaseOptions<'_>) -> Result<Base, BaseError> {
    let access = options.access;
    match source {
        DiskSource::File(path) => open_file(path, &options),
        DiskSource::Remote(spec) => open_remote(spec, &options),
        DiskSource::Blank(size) if access == BaseAccess::Read => Ok(Base {
            layer: BaseLayer::Reader(Arc::new(Blank::new(*size))),
            path: None,
            remote: None,
            size: *size,
            view: None,
            file: None,
            needs: Vec::new(),
        }),
        DiskSource::Blank(_) => Err(BaseError::BlankIsReadOnly),
        DiskSource::Stream(_) => Err(BaseError::Stream),
    }
}

fn open_file(path: &Path, options: &BaseOptions<'_>) -> Result<Base, BaseError> {
    let BaseOptions { part, access, locking, passthrough, direct, .. } = *options;
    let base_file = open_base_file(path, access, locking, passthrough, direct)?;
    let unreadable = |error: io::Error| BaseError::from_io(path, access, error);
    let format = check_format(path, &*base_file.raw, options.format).map_err(unreadable)??;
    if access == BaseAccess::Write && !format.is_plain() {
        return Err(BaseError::ReadOnlyFormat { path: path.to_owned(), format: format.format });
    }
    let real = base_file.real_path.clone();
    let (file, raw) = (Arc::clone(&base_file.file), Arc::clone(&base_file.raw));
    let sector = base_file.sector_size().map_err(unreadable)?;
    let OpenedImage { layer: whole, needs } = format.open(base_file.into(), options)?;
    if passthrough == Passthrough::On && (!format.is_plain() || sector.is_some()) {
        return Err(BaseError::NoPassthrough(path.to_owned()));
    }
    let writer = (access == BaseAccess::Write).then_some(raw as Arc<dyn WritableLayer>);
    let (layer, size, view) = take_part(path, part, sector, whole, writer)?;
    Ok(Base { layer, path: Some(real), remote: None, size, view, file: Some(file), needs })
}

fn open_remote(spec: &RemoteSpec, options: &BaseOptions<'_>) -> Result<Base, BaseError> {
    let (remote, image, writer) = match options.access {
        BaseAccess::Read => {
            let remote = remote::open(spec)?;
            let image = remote.layer();
            (remote, image, None)
        }
        BaseAccess::Write => {
            let disk = remote::open_writable(spec)?;
            let writer = Arc::clone(&disk) as Arc<dyn WritableLayer>;
            (RemoteImage::Direct(Arc::clone(&disk)), disk as Arc<dyn Layer>, Some(writer))
        }
    };
    let name = Path::new(spec.address.as_str());
    let unreadable = |error: io::Error| BaseError::from_io(name, options.access, error);
    let format = check_format(name, &*image, options.format).map_err(unreadable)??;
    if writer.is_some() && !format.is_plain() {
        return Err(BaseError::ReadOnlyFormat { path: name.to_owned(), format: format.format });
    }
    let image = BaseImage::on_server(image, spec.address.as_str());
    let OpenedImage { layer: whole, needs } = format.open(image, options)?;
    let (layer, size, view) = take_part(name, options.part, None, whole, writer)?;
    Ok(Base { layer, path: None, remote: Some(remote), size, view, file: None, needs })
}

/// Returns the layer of `part` of a base, its size, and its range in bytes unless it is all of the
/// base. `writer` is the layer that writes the base, if it is to be written.
fn take_part(
    path: &Path,
    part: SourcePart,
    sector: Option<u64>,
    whole: Arc<dyn Layer>,
    writer: Option<Arc<dyn WritableLayer>>,
) -> Result<(BaseLayer, u64, Option<Range<u64>>), BaseError> {
    let view = view::resolve_part(part, &*whole, sector)
        .map_err(|error| BaseError::Part { path: path.to_owned(), error })?;
    let size = view.as_ref().map_or(whole.size(), |view| view.end - view.start);
    let layer = match (writer, view.clone()) {
        (None, None) => BaseLayer::Reader(whole),
        (None, Some(view)) => BaseLayer::Reader(Arc::new(RangeView::new(whole, view))),
        (Some(writer), None) => BaseLayer::Writer(writer),
        (Some(writer), Some(view)) => BaseLayer::Writer(Arc::new(RangeView::new(writer, view))),
    };
    Ok((layer, size, view))
}

#[cfg(test)]
pub(crate) mod testing {
    //! The layers below a base: none.

    use std::io;
    use std::ops::Range;

    use crate::layer::{ReadBelow, Wait};

    /// For writes to a raw base, which never reads what is below.
    pub(crate) struct UnreachableBelow;

    impl ReadBelow for UnreachableBelow {
        fn read_below(&self, _: &mut [u8], _: u64, _: Wait) -> io::Result<()> {
            unreachable!("a raw base has nothing below")
        }
        fn is_zero_below(&self, _: Range<u64>, _: Wait) -> io::Result<bool> {
            unreachable!("a raw base has nothing below")
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener;

    use super::testing::UnreachableBelow;
    use super::*;
    use crate::base::advice::convert_command;
    use crate::base::lock::LockError;
    use crate::extents::ExtentKind;
    use crate::host::testing::{LoopDevice, run};
    use crate::layer::Wait;
    use rustix::fs::OFlags;
    use rustix::io::Errno;

    fn options(format: Option<Format>, access: BaseAccess) -> BaseOptions<'static> {
        let (part, locking, passthrough) = (SourcePart::Whole, Locking::Qemu, Passthrough::Off);
        let direct = DirectIo::Off;
        BaseOptions { format, part, access, locking, passthrough, direct, allow_backing: &[] }
    }

    fn open_path(path: &Path, format: Option<Format>) -> Result<Base, BaseError> {
        let source = DiskSource::File(path.to_owned());
        open(&source, options(format, BaseAccess::Read))
    }

    fn refusal(path: impl AsRef<Path>) -> String {
        match open_path(path.as_ref(), None) {
            Ok(_) => panic!("{} was opened", path.as_ref().display()),
            Err(error) => error.to_string(),
        }
    }

    fn dir() -> tempfile::TempDir {
        tempfile::tempdir_in("/var/tmp").unwrap()
    }

    #[test]
    fn a_raw_file_opens_by_its_canonical_path() {
        let dir = dir();
        let path = dir.path().join("vm.img");
        fs::write(&path, [1; 5000]).unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("vm.img", &link).unwrap();
        let base = open_path(&link, None).unwrap();
        assert_eq!(base.path.as_deref(), Some(path.canonicalize().unwrap().as_path()));
        assert_eq!((base.size, base.layer.reader().size()), (5000, 5000));
        assert_eq!(base.identity().unwrap().unwrap().size, 5000);
    }

    #[test]
    fn an_open_base_has_a_blocking_descriptor() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let base = open_path(file.path(), None).unwrap();
        let flags = rustix::fs::fcntl_getfl(&**base.file.as_ref().unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_blank_is_a_hole_and_cannot_be_written() {
        let source = DiskSource::Blank(1 << 40);
        let base = open(&source, options(None, BaseAccess::Read)).unwrap();
        assert_eq!((base.size, base.identity().unwrap()), (1 << 40, None));
        let written = open(&source, options(None, BaseAccess::Write));
        assert!(matches!(written, Err(BaseError::BlankIsReadOnly)));
    }

    #[test]
    fn open_rejects_everything_but_files_and_block_devices_at_once() {
        let dir = dir();
        let path = |name: &str| dir.path().join(name);
        let at = |name: &str| path(name).display().to_string();
        run("mkfifo", &[path("fifo")]);
        let _socket = UnixListener::bind(path("socket")).unwrap();
        let hint = "name a file or a block device";
        for (path, want) in [
            (at("no"), format!("base '{}' does not exist: check the path", at("no"))),
            (at("fifo/x"), format!("base '{}' does not exist: check the path", at("fifo/x"))),
            (at(""), format!("base '{}' is a directory: {hint}", at(""))),
            (at("fifo"), format!("base '{}' is a FIFO: {hint}", at("fifo"))),
            (at("socket"), format!("base '{}' is a socket: {hint}", at("socket"))),
            ("/dev/null".into(), format!("base '/dev/null' is a character device: {hint}")),
            ("/dev/ptmx".into(), format!("base '/dev/ptmx' is a character device: {hint}")),
            ("/dev/tty".into(), format!("base '/dev/tty' is a character device: {hint}")),
            (
                "/proc/version".into(),
                format!("base '/proc/version' is a proc file of the kernel: {hint}"),
            ),
            (
                "/sys/kernel/mm/transparent_hugepage/enabled".into(),
                format!(
                    "base '/sys/kernel/mm/transparent_hugepage/enabled' is a sysfs file of the kernel: {hint}"
                ),
            ),
        ] {
            assert_eq!(refusal(path), want);
        }
    }

    #[test]
    fn an_error_of_the_host_is_reported_by_its_cause() {
        let denied = BaseError::from_io(Path::new("/x"), BaseAccess::Write, Errno::ACCESS.into());
        assert_eq!(
            denied.to_string(),
            "no permission to write base '/x': check its owner and mode, and those of its directories"
        );
        let broken = BaseError::from_io(Path::new("/x"), BaseAccess::Read, Errno::IO.into());
        assert!(broken.to_string().starts_with("cannot read base '/x': Input/output error"));
    }

    /// Whether `line` names `format` and says what to do with such an image.
    fn is_told_as(line: &str, format: &str) -> bool {
        let what = format!("looks like a {format} image: add ,format={format} (or ,format=raw");
        line.contains(&what) && !line.contains('\n')
    }

    #[test]
    fn other_formats_are_detected_by_their_bytes() {
        let dir = dir();
        let path = dir.path().join("image");
        let vdi = [&[0; 64][..], &[0x7f, 0x10, 0xda, 0xbe]].concat();
        let vhd = [&[0; 4096][..], b"conectix", &[0; 504]].concat();
        let dmg = [&[0; 4096][..], b"koly", &[0; 508]].concat();
        for (bytes, format) in [
            (&b"QFI\xfb\0\0\0\x03"[..], "qcow2"),
            (b"QFI\xfb\0\0\0\x01", "qcow"),
            (b"QED\0", "qed"),
            (b"KDMV\x01", "vmdk"),
            (b"COWD", "vmdk"),
            (b"# Disk DescriptorFile\nversion=1", "vmdk"),
            (b"vhdxfile", "vhdx"),
            (b"conectix", "vpc"),
            (&vhd, "vpc"),
            (&vdi, "vdi"),
            (b"WithoutFreeSpace", "parallels"),
            (&dmg, "dmg"),
        ] {
            fs::write(&path, bytes).unwrap();
            let line = refusal(&path);
            assert!(is_told_as(&line, format), "{line}");
            assert!(line.starts_with(&format!("'{}'", path.display())), "{line}");
            open_path(&path, Some(Format::Raw)).unwrap();
        }
        fs::write(&path, b"LUKS\xba\xbe\0\x02").unwrap();
        assert!(refusal(&path).contains("cryptsetup"));
        for raw in [&b""[..], b"QFI", b"conecti", &[0; 67]] {
            fs::write(&path, raw).unwrap();
            open_path(&path, None).unwrap();
        }
    }

    #[test]
    fn images_of_qemu_img_are_detected() {
        let dir = dir();
        for format in ["qcow2", "qcow", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels"] {
            let path = dir.path().join(format);
            run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "8M"]);
            let line = refusal(&path);
            assert!(is_told_as(&line, format), "{line}");
        }
    }

    #[test]
    fn a_forensic_image_is_refused_with_the_program_that_shows_it() {
        let dir = dir();
        let path = dir.path().join("my disk.E01");
        let shown = path.display();
        for (bytes, format, program) in [
            (&b"EVF\x09\x0d\x0a\xff\0\x01"[..], Format::Ewf, "ewfmount"),
            (b"EVF2\x0d\x0a\x81\0\x02", Format::Ewf, "ewfmount"),
            (b"AFF10\x0d\x0a\0", Format::Aff, "affuse"),
        ] {
            fs::write(&path, bytes).unwrap();
            let want = format!(
                "'{shown}': {format} images are not read: let {program} '{shown}' DIR show it as a \
                 raw image, and name that (or add ,format=raw for the bytes)"
            );
            assert_eq!(refusal(&path), want);
            let error = open_path(&path, Some(format)).err().unwrap();
            assert_eq!(error.to_string(), want);
            open_path(&path, Some(Format::Raw)).unwrap();
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_with_the_command_that_converts_it() {
        let line = convert_command(Path::new("/p/x.img"), Format::Vdi);
        assert_eq!(line, "qemu-img convert -f vdi -O raw /p/x.img /p/x.raw");
        let (path, format) = (PathBuf::from("/p/my vm.vhdx"), Format::Vhdx);
        let missing = ForeignError::NoProgram { path, format }.to_string();
        let want = "install qemu-utils, or convert the image with qemu-img convert -f vhdx -O raw \
                    '/p/my vm.vhdx' '/p/my vm.img'";
        assert!(missing.ends_with(want), "{missing}");
    }

    #[test]
    fn two_readers_share_a_base_and_a_writer_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = DiskSource::File(file.path().to_owned());
        let open = |access| open(&source, options(None, access));
        let _readers = (open(BaseAccess::Read).unwrap(), open(BaseAccess::Read).unwrap());
        assert!(matches!(
            open(BaseAccess::Write),
            Err(BaseError::Locked(LockError::HasReaders(_)))
        ));
    }

    #[test]
    fn a_block_device_is_data_of_a_fixed_size_that_takes_zeros_and_holes() {
        let dir = dir();
        let image = dir.path().join("image");
        fs::write(&image, vec![7; 1 << 20]).unwrap();
        let looped = LoopDevice::new(&image, &[]);
        let source = DiskSource::File(looped.path().to_owned());
        let base = open(&source, options(None, BaseAccess::Write)).unwrap();
        assert_eq!(base.size, 1 << 20);
        let identity = base.identity().unwrap().unwrap();
        assert_eq!((identity.size, identity.mtime), (1 << 20, None));
        let told_by = identity.inode.unwrap();
        assert!(
            told_by.starts_with("loop/backing_file ") && told_by.ends_with("/image"),
            "{told_by}"
        );
        let BaseLayer::Writer(layer) = &base.layer else {
            panic!("not a writer");
        };
        let extent = layer.extent_at(0..2 << 20, Wait::No).unwrap();
        assert_eq!((extent.range, extent.kind), (0..1 << 20, ExtentKind::Data));

        layer.write_at(&[1; 100], 5000, &UnreachableBelow, Wait::No).unwrap();
        let inline = layer.zero(1..5, &UnreachableBelow, Wait::No).unwrap_err();
        assert_eq!(inline.raw_os_error(), Some(libc::EAGAIN));
        layer.zero(100..5050, &UnreachableBelow, Wait::Yes).unwrap();
        layer.punch_hole(8192..65_536 + 1, &UnreachableBelow, Wait::Yes).unwrap();
        layer.sync().unwrap();
        let mut want = vec![7; 1 << 20];
        want[5000..5100].fill(1);
        want[100..5050].fill(0);
        want[8192..65_536 + 1].fill(0);
        let mut got = vec![0; 1 << 20];
        layer.read_at(&mut got, 0, Wait::Yes).unwrap();
        assert!(got == want);
        assert!(fs::read(&image).unwrap() == want);

        layer.set_size(1 << 20).unwrap();
        let other = layer.set_size(1 << 21).unwrap_err();
        assert_eq!(other.raw_os_error(), Some(libc::EINVAL));
        layer.allocate(0..1 << 20, Wait::Yes).unwrap();
    }

    #[test]
    fn a_mounted_device_may_be_read_but_not_written() {
        let dir = dir();
        let image = dir.path().join("image");
        File::create(&image).unwrap().set_len(16 << 20).unwrap();
        let looped = LoopDevice::new(&image, &[]);
        run("mkfs.ext4", &[Path::new("-q"), looped.path()]);
        run("mount", &[looped.path(), dir.path()]);
        let source = DiskSource::File(looped.path().to_owned());
        let read = open(&source, options(None, BaseAccess::Read)).err();
        let write = open(&source, options(None, BaseAccess::Write)).err();
        run("umount", &[dir.path()]);
        assert!(read.is_none(), "{read:?}");
        assert!(matches!(write, Some(BaseError::DeviceBusy(_))), "{write:?}");
    }

    #[test]
    fn a_device_without_a_medium_is_refused() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        let looped = LoopDevice::new(empty.path(), &[]);
        let want = format!(
            "base '{}' is an empty block device: put a medium in, or attach it first",
            looped.path().display()
        );
        assert_eq!(refusal(looped.path()), want);
    }
}
