//! Bases: the bottom of a disk, which nobody changes; and the one place that opens one.
//!
//! ```text
//!   spec::Source::File(path)          spec::Source::Blank(size)
//!        │ what is there? (never opens what is no file)
//!        │ open, look again, lock (lock.rs)
//!        │ which format? (by its first and last bytes)
//!        ▼                                   ▼
//!     RawBase (raw.rs)                    Blank (blank.rs)
//!        │ all of it, or a part?
//!        ▼
//!     View (view.rs), by bytes or as partitions/ says
//! ```
//!
//! `identity.rs` notices a base that changed under an overlay, and `place.rs` one that lies in the
//! mount it would serve, so that it would wait for itself.
//!
//! Invariants: a base opened with [`Access::Read`] is never written, for its descriptor cannot;
//! its locks are held until its layer is dropped; what cannot be told is refused
//! here, with the line the user needs, and never guessed.

pub mod blank;
pub mod identity;
pub mod lock;
pub mod partitions;
pub mod place;
pub mod qcow2;
pub mod raw;
pub mod view;

use std::fs::{File, FileType, Metadata};
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use self::blank::Blank;
use self::identity::Identity;
use self::lock::LockError;
use self::place::{HostFs, Manner};
use self::qcow2::ChainError;
use self::raw::{HostKind, RawBase};
use self::view::{PartError, View};
use crate::layer::{Layer, WritableLayer};
use crate::spec::{Format, Locking, Part, Source};

/// What a base is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To be the bottom of a disk.
    Read,
    /// To be changed itself: `mode=rw`, and commit.
    Write,
}

/// How a base is opened.
#[derive(Clone, Copy, Debug)]
pub struct Opening<'a> {
    /// Its format; `None`: raw, unless it looks like something else.
    pub format: Option<Format>,
    /// How much of it is served.
    pub part: Part,
    /// What for.
    pub access: Access,
    /// Whether QEMU's locks are taken.
    pub locking: Locking,
    /// Directories below which files may lie that an image names, besides its own.
    pub allow_backing: &'a [PathBuf],
}

/// An open base.
pub struct Base {
    /// What answers.
    pub layer: BaseLayer,
    /// Where it is, canonical; none for a blank.
    pub path: Option<PathBuf>,
    /// Bytes, when it was opened; of the part that is served.
    pub size: u64,
    /// Where that part is, in bytes; none for all of it.
    pub view: Option<Range<u64>>,
    /// The file or device, to be locked further or looked at; none for a blank.
    pub file: Option<Arc<File>>,
    /// The files it is read from besides, the nearest first.
    pub needs: Vec<(PathBuf, Arc<File>)>,
}

/// A base's layer, by what it was opened for.
#[derive(Clone)]
pub enum BaseLayer {
    /// For [`Access::Read`].
    Reader(Arc<dyn Layer>),
    /// For [`Access::Write`].
    Writer(Arc<dyn WritableLayer>),
}

impl BaseLayer {
    /// The layer, to be read.
    #[must_use]
    pub fn reader(&self) -> Arc<dyn Layer> {
        match self {
            Self::Reader(layer) => layer.clone(),
            Self::Writer(layer) => layer.clone(),
        }
    }
}

impl Base {
    /// Who it is now; `None` for a blank, which has nothing that could change.
    ///
    /// # Errors
    /// As [`Identity::of`].
    pub fn identity(&self) -> io::Result<Option<Identity>> {
        self.file.as_deref().map(Identity::of).transpose()
    }
}

/// Why a base cannot be opened; each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// Nothing is there.
    #[error("base '{}' does not exist: check the path", .0.display())]
    Missing(PathBuf),
    /// The host forbids it.
    #[error(
        "no permission to {} base '{}': check its owner and mode, and those of its directories",
        verb(*access), path.display()
    )]
    Denied {
        /// As it was given.
        path: PathBuf,
        /// What was asked.
        access: Access,
    },
    /// It is no file and no block device.
    #[error("base '{}' is {what}: name a file or a block device", path.display())]
    NoFile {
        /// As it was given.
        path: PathBuf,
        /// With its article: `a directory`.
        what: String,
    },
    /// A device with nothing in it.
    #[error("base '{}' is an empty block device: put a medium in, or attach it first", .0.display())]
    EmptyDevice(PathBuf),
    /// A device that somebody has claimed.
    #[error(
        "'{}' is in use (mounted, or part of LVM, RAID or swap) and cannot be written: free it first, or add ,lock=off",
        .0.display()
    )]
    DeviceBusy(PathBuf),
    /// It has the marks of another format than raw.
    #[error(
        "'{}' looks like a {format} image: add ,format={format} (or ,format=raw for the bytes)",
        path.display()
    )]
    LooksLike {
        /// As it was given.
        path: PathBuf,
        /// What it looks like.
        format: Format,
    },
    /// It is encrypted, by its marks or by the user's word.
    #[error(
        "'{}' looks like a luks image: open it with cryptsetup and name the /dev/mapper device (or add ,format=raw for the encrypted bytes)",
        .0.display()
    )]
    Encrypted(PathBuf),
    /// The format is not read by this version.
    #[error(
        "'{}': format={format} is not read by this version: convert it with {} (or add ,format=raw for the bytes)",
        path.display(), convert_line(path, *format)
    )]
    Unread {
        /// As it was given.
        path: PathBuf,
        /// What the user called it.
        format: Format,
    },
    /// What is written into a qcow2 image is QEMU's to do.
    #[error(
        "'{}' is a qcow2 image, which is only read: keep the changes in an overlay, and bring them in with cowslip diff and qemu-img commit",
        .0.display()
    )]
    OnlyRead(PathBuf),
    /// A qcow2 image, or one that it needs.
    #[error(transparent)]
    Chain(#[from] ChainError),
    /// It has no such part.
    #[error("'{}' {error}", path.display())]
    Part {
        /// As it was given.
        path: PathBuf,
        /// What is wrong.
        error: PartError,
    },
    /// A stream has no base.
    #[error("a stream has no base")]
    Stream,
    /// A blank cannot be written to.
    #[error("blank: holds nothing that could be written: leave mode=rw away")]
    BlankWritten,
    /// Somebody else uses it.
    #[error(transparent)]
    Locked(#[from] LockError),
    /// Anything else the host says.
    #[error("cannot {} base '{}': {error}", verb(*access), path.display())]
    Host {
        /// As it was given.
        path: PathBuf,
        /// What was asked.
        access: Access,
        /// What the host said.
        error: io::Error,
    },
}

impl BaseError {
    /// What the host's answer to a use of `path` means.
    fn host(path: &Path, access: Access, error: io::Error) -> Self {
        let path = path.to_owned();
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR) => Self::Missing(path),
            Some(libc::EACCES | libc::EPERM) => Self::Denied { path, access },
            Some(libc::ENOMEDIUM) => Self::EmptyDevice(path),
            _ => Self::Host { path, access, error },
        }
    }
}

fn verb(access: Access) -> &'static str {
    match access {
        Access::Read => "read",
        Access::Write => "write",
    }
}

/// Opens what is under a disk. Nothing waits on the way: not for a FIFO's other end, not for a lock.
///
/// # Errors
/// [`BaseError`], for the user.
pub fn open(source: &Source, how: Opening<'_>) -> Result<Base, BaseError> {
    let access = how.access;
    match source {
        Source::File(path) => open_file(path, how),
        Source::Blank(size) if access == Access::Read => Ok(Base {
            layer: BaseLayer::Reader(Arc::new(Blank::new(*size))),
            path: None,
            size: *size,
            view: None,
            file: None,
            needs: Vec::new(),
        }),
        Source::Blank(_) => Err(BaseError::BlankWritten),
        Source::Stream(_) => Err(BaseError::Stream),
    }
}

fn open_file(path: &Path, how: Opening<'_>) -> Result<Base, BaseError> {
    let Opening { format, part, access, locking, allow_backing } = how;
    let host = open_host_file(path, access, locking)?;
    let unreadable = |error: io::Error| BaseError::host(path, access, error);
    check_format(path, &host, format).map_err(unreadable)??;
    let real = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let (file, raw) = (Arc::clone(&host.file), Arc::clone(&host.raw));
    let sector = host.sector().map_err(unreadable)?;
    let mut needs = Vec::new();
    let whole: Arc<dyn Layer> = match (access, format) {
        (Access::Read, Some(Format::Qcow2)) => {
            let chain = qcow2::open(&real, host, allow_backing, locking)?;
            needs.extend_from_slice(chain.needs());
            Arc::new(chain)
        }
        (Access::Write, Some(Format::Qcow2)) => return Err(BaseError::OnlyRead(path.to_owned())),
        _ => host.raw,
    };
    let view = view::find(part, &*whole, sector)
        .map_err(|error| BaseError::Part { path: path.to_owned(), error })?;
    let size = view.as_ref().map_or(whole.size(), |view| view.end - view.start);
    let layer = match (access, view.clone()) {
        (Access::Read, None) => BaseLayer::Reader(whole),
        (Access::Read, Some(view)) => BaseLayer::Reader(Arc::new(View::new(whole, view))),
        (Access::Write, None) => BaseLayer::Writer(raw),
        (Access::Write, Some(view)) => BaseLayer::Writer(Arc::new(View::new(raw, view))),
    };
    Ok(Base { layer, path: Some(real), size, view, file: Some(file), needs })
}

/// A file or device of the host, open and locked.
pub struct Host {
    /// It.
    file: Arc<File>,
    /// Its bytes; the locks end with it.
    raw: Arc<RawBase>,
    /// How many there are.
    size: u64,
}

impl Host {
    /// What tells it from every other.
    fn key(&self) -> io::Result<(u64, u64)> {
        let meta = self.file.metadata()?;
        Ok((meta.dev(), meta.ino()))
    }

    /// The bytes of a device's sectors. A file has none of its own.
    fn sector(&self) -> io::Result<Option<u64>> {
        match self.raw.kind() {
            HostKind::File => Ok(None),
            HostKind::BlockDevice => Ok(Some(rustix::fs::ioctl_blksszget(&*self.file)?.into())),
        }
    }
}

fn open_host_file(path: &Path, access: Access, locking: Locking) -> Result<Host, BaseError> {
    let host = |error: io::Error| BaseError::host(path, access, error);
    // Looked at before it is opened: opening a watchdog or a tape already does something.
    let kind = host_kind(path, &std::fs::metadata(path).map_err(host)?)?;
    let file = open_host(path, kind, access, locking)?;
    let meta = file.metadata().map_err(host)?;
    if host_kind(path, &meta)? != kind {
        // Replaced between the two looks.
        return Err(host(Errno::STALE.into()));
    }
    refuse_pseudo(path, &file).map_err(host)??;
    // Locked before its size and bytes are looked at: nobody changes them from then on.
    lock::lock(&file, path, access, locking).inspect_err(|_| lock::release(&file))?;
    let size = match kind {
        HostKind::File => file.metadata().map_err(host)?.len(),
        HostKind::BlockDevice => {
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| host(error.into()))?
        }
    };
    if size == 0 && kind == HostKind::BlockDevice {
        return Err(BaseError::EmptyDevice(path.to_owned()));
    }
    let file = Arc::new(file);
    // From here on it releases the locks when it goes.
    let raw = Arc::new(RawBase::new(file.clone(), kind, size).map_err(host)?);
    Ok(Host { file, raw, size })
}

/// A base that is served to be read and now written as well: a commit.
pub struct Writable {
    /// To be written; nothing but `view`, if there is one.
    pub layer: Box<dyn WritableLayer>,
    /// The same file or device, whole.
    pub file: Arc<File>,
    /// What of it is written; none for all of it.
    pub view: Option<Range<u64>>,
    /// Its reader, whose locks forbid all others to use it meanwhile.
    reader: Arc<File>,
}

impl Drop for Writable {
    fn drop(&mut self) {
        lock::downgrade(&self.reader);
    }
}

/// Opens the base at `path`, which `reader` serves, to be written too (only `view` of it, if there
/// is one), and shuts all others out.
///
/// # Errors
/// [`BaseError`]: somebody else uses it, it cannot be written, it is not there any more.
pub fn open_writable(
    path: &Path,
    reader: &Arc<File>,
    view: Option<Range<u64>>,
    locking: Locking,
) -> Result<Writable, BaseError> {
    let host = |error: io::Error| BaseError::host(path, Access::Write, error);
    let meta = reader.metadata().map_err(host)?;
    let kind = host_kind(path, &meta)?;
    let file = open_host(path, kind, Access::Write, locking)?;
    let found = file.metadata().map_err(host)?;
    if (found.dev(), found.ino()) != (meta.dev(), meta.ino()) {
        return Err(host(Errno::STALE.into()));
    }
    if let Err(error) = lock::lock(reader, path, Access::Write, locking) {
        lock::downgrade(reader);
        return Err(error.into());
    }
    let size = match kind {
        HostKind::File => found.len(),
        HostKind::BlockDevice => {
            rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| host(error.into()))?
        }
    };
    let file = Arc::new(file);
    let reader = Arc::clone(reader);
    let part = |error| BaseError::Part { path: path.to_owned(), error };
    let layer = view.as_ref().map_or(Ok(()), |view| view::check_inside(view, size)).map_err(part);
    let layer = layer.and_then(|()| RawBase::new(Arc::clone(&file), kind, size).map_err(host));
    match layer {
        Ok(raw) => {
            let layer: Box<dyn WritableLayer> = match view.clone() {
                None => Box::new(raw),
                Some(view) => Box::new(View::new(Arc::new(raw), view)),
            };
            Ok(Writable { layer, file, view, reader })
        }
        Err(error) => {
            lock::downgrade(&reader);
            Err(error)
        }
    }
}

/// Opens without waiting, and leaves a descriptor that waits as others do.
fn open_host(
    path: &Path,
    kind: HostKind,
    access: Access,
    locking: Locking,
) -> Result<File, BaseError> {
    let mut flags = OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    flags |= match access {
        Access::Read => OFlags::RDONLY,
        Access::Write => OFlags::RDWR,
    };
    let claims =
        kind == HostKind::BlockDevice && access == Access::Write && locking == Locking::Qemu;
    if claims {
        // The kernel's own lock on devices: refused while mounted, and not to be mounted then.
        flags |= OFlags::EXCL;
    }
    let fd = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(Errno::BUSY) if claims => return Err(BaseError::DeviceBusy(path.to_owned())),
        Err(error) => return Err(BaseError::host(path, access, error.into())),
        Ok(fd) => fd,
    };
    rustix::fs::fcntl_getfl(&fd)
        .and_then(|flags| rustix::fs::fcntl_setfl(&fd, flags - OFlags::NONBLOCK))
        .map_err(|error| BaseError::host(path, access, error.into()))?;
    Ok(fd.into())
}

/// Refuses all that is neither file nor block device.
fn host_kind(path: &Path, meta: &Metadata) -> Result<HostKind, BaseError> {
    let kind: FileType = meta.file_type();
    let what = if kind.is_file() {
        return Ok(HostKind::File);
    } else if kind.is_block_device() {
        return Ok(HostKind::BlockDevice);
    } else if kind.is_dir() {
        "a directory"
    } else if kind.is_fifo() {
        "a FIFO"
    } else if kind.is_socket() {
        "a socket"
    } else {
        "a character device"
    };
    Err(BaseError::NoFile { path: path.to_owned(), what: what.to_owned() })
}

/// Refuses the kernel's own words: files of /proc have a size of 0 and other bytes at every read.
fn refuse_pseudo(path: &Path, file: &File) -> io::Result<Result<(), BaseError>> {
    let fs = HostFs::of(file)?;
    if fs.manner != Manner::Pseudo {
        return Ok(Ok(()));
    }
    Ok(Err(BaseError::NoFile {
        path: path.to_owned(),
        what: format!("a {} file of the kernel", fs.name),
    }))
}

/// Refuses what is not read, and what does not look raw and is not said to be anything.
fn check_format(
    path: &Path,
    host: &Host,
    format: Option<Format>,
) -> io::Result<Result<(), BaseError>> {
    let path = path.to_owned();
    Ok(match format {
        Some(Format::Raw | Format::Qcow2) => Ok(()),
        Some(Format::Luks) => Err(BaseError::Encrypted(path)),
        Some(format) => Err(BaseError::Unread { path, format }),
        None => match detect(&host.file, host.size)? {
            None => Ok(()),
            Some(Format::Luks) => Err(BaseError::Encrypted(path)),
            Some(format) => Err(BaseError::LooksLike { path, format }),
        },
    })
}

/// The marks at the start of a file, each at its offset: from qemu's `block/*.c`, and cryptsetup's
/// on-disk format for LUKS.
const MAGICS: &[(usize, &[u8], Format)] = &[
    (0, b"QFI\xfb\0\0\0\x01", Format::Qcow),
    (0, b"QFI\xfb", Format::Qcow2),
    (0, b"QED\0", Format::Qed),
    (0, b"KDMV", Format::Vmdk),
    (0, b"COWD", Format::Vmdk),
    (0, b"# Disk DescriptorFile", Format::Vmdk),
    (0, b"vhdxfile", Format::Vhdx),
    (0, b"conectix", Format::Vhd),
    (64, &0xbeda_107f_u32.to_le_bytes(), Format::Vdi),
    (0, b"WithoutFreeSpace", Format::Parallels),
    (0, b"WithouFreSpacExt", Format::Parallels),
    (0, b"LUKS\xba\xbe", Format::Luks),
];

/// The marks of the last 512 bytes.
const TRAILERS: &[(&[u8], Format)] = &[(b"conectix", Format::Vhd), (b"koly", Format::Dmg)];

/// What `file` of `size` bytes looks like, unless it is raw.
fn detect(file: &File, size: u64) -> io::Result<Option<Format>> {
    let head = read_up_to(file, 0)?;
    let magic = MAGICS.iter().find(|(at, magic, _)| {
        let there = head.get(*at..).unwrap_or_default();
        there.starts_with(magic)
    });
    if let Some((_, _, format)) = magic {
        return Ok(Some(*format));
    }
    let tail = read_up_to(file, size.saturating_sub(512))?;
    let trailer = TRAILERS.iter().find(|(magic, _)| tail.starts_with(magic));
    Ok(trailer.map(|(_, format)| *format))
}

/// Up to 512 bytes from `offset` on; fewer where the file ends.
fn read_up_to(file: &File, offset: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; 512];
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(got) => done += got,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buf.truncate(done);
    Ok(buf)
}

/// The command that makes a raw image of `path`, to be pasted into a shell.
fn convert_line(path: &Path, format: Format) -> String {
    let suffix = if path.extension().is_some_and(|suffix| suffix == "img") { "raw" } else { "img" };
    let output = path.with_extension(suffix);
    let (input, output) = (shell_quoted(path), shell_quoted(&output));
    format!("qemu-img convert -f {format} -O raw {input} {output}")
}

/// `path` as one word of a POSIX shell.
fn shell_quoted(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%=".contains(c);
    if text.chars().all(is_plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
pub(crate) mod testing {
    //! Real devices for the tests of this folder; they need root.

    use std::ffi::OsStr;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    /// Runs a program that must succeed; answers its output.
    pub(crate) fn run(program: &str, args: &[impl AsRef<OsStr>]) -> String {
        let out = Command::new(program).args(args).output().unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert!(out.status.success(), "{program}: {said}");
        String::from_utf8_lossy(&out.stdout).trim().to_owned()
    }

    /// A loop device, attached until it is dropped.
    pub(crate) struct Loop(PathBuf);

    impl Loop {
        pub(crate) fn new(file: &Path, flags: &[&str]) -> Self {
            let mut args = ["-f", "--show"].map(OsStr::new).to_vec();
            args.extend(flags.iter().map(OsStr::new));
            args.push(file.as_os_str());
            Self(run("losetup", &args).into())
        }

        pub(crate) fn path(&self) -> &Path {
            &self.0
        }
    }

    impl Drop for Loop {
        fn drop(&mut self) {
            run("losetup", &[Path::new("-d"), &self.0]);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::ops::Range;
    use std::os::unix::net::UnixListener;

    use super::testing::{Loop, run};
    use super::*;
    use crate::extents::Kind;
    use crate::layer::{ReadBelow, Wait};

    fn how(format: Option<Format>, access: Access) -> Opening<'static> {
        Opening { format, part: Part::Whole, access, locking: Locking::Qemu, allow_backing: &[] }
    }

    fn open_path(path: &Path, format: Option<Format>) -> Result<Base, BaseError> {
        let source = Source::File(path.to_owned());
        open(&source, how(format, Access::Read))
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
    fn the_descriptor_waits_again_once_it_is_open() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let base = open_path(file.path(), None).unwrap();
        let flags = rustix::fs::fcntl_getfl(&**base.file.as_ref().unwrap()).unwrap();
        assert!(!flags.contains(OFlags::NONBLOCK));
    }

    #[test]
    fn a_blank_is_a_hole_and_cannot_be_written() {
        let source = Source::Blank(1 << 40);
        let base = open(&source, how(None, Access::Read)).unwrap();
        assert_eq!((base.size, base.identity().unwrap()), (1 << 40, None));
        let written = open(&source, how(None, Access::Write));
        assert!(matches!(written, Err(BaseError::BlankWritten)));
    }

    #[test]
    fn what_is_no_file_is_refused_at_once() {
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
    fn a_host_error_is_told_for_what_it_is() {
        let denied = BaseError::host(Path::new("/x"), Access::Write, Errno::ACCESS.into());
        assert_eq!(
            denied.to_string(),
            "no permission to write base '/x': check its owner and mode, and those of its directories"
        );
        let broken = BaseError::host(Path::new("/x"), Access::Read, Errno::IO.into());
        assert!(broken.to_string().starts_with("cannot read base '/x': Input/output error"));
    }

    #[test]
    fn other_formats_are_known_by_their_bytes() {
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
            let want = format!(
                "'{}' looks like a {format} image: add ,format={format} (or ,format=raw for the bytes)",
                path.display()
            );
            assert_eq!(refusal(&path), want);
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
    fn what_qemu_img_makes_is_known() {
        let dir = dir();
        for format in ["qcow2", "qcow", "qed", "vmdk", "vhdx", "vpc", "vdi", "parallels"] {
            let path = dir.path().join(format);
            run("qemu-img", &["create", "-q", "-f", format, path.to_str().unwrap(), "8M"]);
            assert!(refusal(&path).contains(&format!("looks like a {format} image")));
        }
    }

    #[test]
    fn a_format_we_cannot_read_comes_with_the_line_that_converts() {
        let dir = dir();
        let path = dir.path().join("my vm.vhdx");
        fs::write(&path, b"vhdxfile").unwrap();
        let Err(error) = open_path(&path, Some(Format::Vhdx)) else {
            panic!("it was opened");
        };
        let place = dir.path().display();
        let want = format!(
            "'{place}/my vm.vhdx': format=vhdx is not read by this version: convert it with \
             qemu-img convert -f vhdx -O raw '{place}/my vm.vhdx' '{place}/my vm.img' \
             (or add ,format=raw for the bytes)"
        );
        assert_eq!(error.to_string(), want);
        let line = convert_line(Path::new("/p/x.img"), Format::Vdi);
        assert_eq!(line, "qemu-img convert -f vdi -O raw /p/x.img /p/x.raw");
    }

    #[test]
    fn two_readers_share_a_base_and_a_writer_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let source = Source::File(file.path().to_owned());
        let open = |access| open(&source, how(None, access));
        let _readers = (open(Access::Read).unwrap(), open(Access::Read).unwrap());
        assert!(matches!(open(Access::Write), Err(BaseError::Locked(LockError::Used(_)))));
    }

    struct Nothing;

    impl ReadBelow for Nothing {
        fn read_below(&self, _: &mut [u8], _: u64, _: Wait) -> io::Result<()> {
            unreachable!("a raw base has nothing below")
        }
        fn is_zero_below(&self, _: Range<u64>, _: Wait) -> io::Result<bool> {
            unreachable!("a raw base has nothing below")
        }
    }

    #[test]
    fn a_block_device_is_data_of_a_fixed_size_that_takes_zeros_and_holes() {
        let dir = dir();
        let image = dir.path().join("image");
        fs::write(&image, vec![7; 1 << 20]).unwrap();
        let looped = Loop::new(&image, &[]);
        let source = Source::File(looped.path().to_owned());
        let base = open(&source, how(None, Access::Write)).unwrap();
        assert_eq!(base.size, 1 << 20);
        let identity = base.identity().unwrap().unwrap();
        assert_eq!((identity.size, identity.mtime, identity.inode), (1 << 20, None, None));
        let BaseLayer::Writer(layer) = &base.layer else {
            panic!("not a writer");
        };
        let extent = layer.extent_at(0..2 << 20, Wait::No).unwrap();
        assert_eq!((extent.range, extent.kind), (0..1 << 20, Kind::Data));

        layer.write_at(&[1; 100], 5000, &Nothing, Wait::No).unwrap();
        let inline = layer.zero(1..5, &Nothing, Wait::No).unwrap_err();
        assert_eq!(inline.raw_os_error(), Some(libc::EAGAIN));
        layer.zero(100..5050, &Nothing, Wait::Yes).unwrap();
        layer.punch_hole(8192..65_536 + 1, &Nothing, Wait::Yes).unwrap();
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
        let looped = Loop::new(&image, &[]);
        run("mkfs.ext4", &[Path::new("-q"), looped.path()]);
        run("mount", &[looped.path(), dir.path()]);
        let source = Source::File(looped.path().to_owned());
        let read = open(&source, how(None, Access::Read)).err();
        let write = open(&source, how(None, Access::Write)).err();
        run("umount", &[dir.path()]);
        assert!(read.is_none(), "{read:?}");
        assert!(matches!(write, Some(BaseError::DeviceBusy(_))), "{write:?}");
    }

    #[test]
    fn a_device_without_a_medium_is_refused() {
        let empty = tempfile::NamedTempFile::new().unwrap();
        let looped = Loop::new(empty.path(), &[]);
        let want = format!(
            "base '{}' is an empty block device: put a medium in, or attach it first",
            looped.path().display()
        );
        assert_eq!(refusal(looped.path()), want);
    }
}
