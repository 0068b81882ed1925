//! The formats of bases: how each is recognized, how it is opened, and what it can do.
//!
//! [`FORMATS`] has a row for each. Opening a base, refusing one, and all code that needs the bytes of
//! the disk to be those of its file ask that table. The names are those of
//! [`Format`].

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::error::BaseError;
use super::file::BaseFile;
use super::{BaseOptions, qcow2};
use crate::config::Format;
use crate::host;
use crate::layer::{Layer, Wait};

/// Bytes read at the start and at the end of a file for its marks.
const MARK_AREA: usize = 512;

/// A format of a base.
pub struct BaseFormat {
    /// The format.
    pub format: Format,
    /// The marks by which files of this format are recognized; one is enough.
    marks: &'static [Mark],
    support: Support,
}

/// Bytes that files of a format have, from qemu's `block/*.c`, and cryptsetup's on-disk format for
/// LUKS.
enum Mark {
    /// At this offset, within the first 512 bytes.
    Head(usize, &'static [u8]),
    /// At the start of the last 512 bytes.
    Tail(&'static [u8]),
}

/// What this version does with a format.
enum Support {
    /// The bytes of the file are those of the disk: read and written, in place.
    Bytes,
    /// Only read, by this function. Changes of the base are left to QEMU.
    Read(Opener),
    /// Refused, since only its key opens it.
    Encrypted,
    /// Refused: qemu-img converts it.
    No,
}

/// Opens the image in a file, with the files that it needs.
type Opener = fn(BaseFile, &BaseOptions<'_>) -> Result<OpenedImage, BaseError>;

/// An image that was opened.
pub(super) struct OpenedImage {
    /// The layer that reads it.
    pub(super) layer: Arc<dyn Layer>,
    /// The other files that it is read from, the nearest first.
    pub(super) needs: Vec<(PathBuf, Arc<File>)>,
}

/// All formats. Where the marks of two fit, the first row counts; so `qcow` is before `qcow2`.
const FORMATS: &[BaseFormat] = &[
    BaseFormat { format: Format::Raw, marks: &[], support: Support::Bytes },
    BaseFormat {
        format: Format::Qcow,
        marks: &[Mark::Head(0, b"QFI\xfb\0\0\0\x01")],
        support: Support::No,
    },
    BaseFormat {
        format: Format::Qcow2,
        marks: &[Mark::Head(0, b"QFI\xfb")],
        support: Support::Read(open_qcow2),
    },
    BaseFormat { format: Format::Qed, marks: &[Mark::Head(0, b"QED\0")], support: Support::No },
    BaseFormat {
        format: Format::Vmdk,
        marks: &[
            Mark::Head(0, b"KDMV"),
            Mark::Head(0, b"COWD"),
            Mark::Head(0, b"# Disk DescriptorFile"),
        ],
        support: Support::No,
    },
    BaseFormat { format: Format::Vhdx, marks: &[Mark::Head(0, b"vhdxfile")], support: Support::No },
    BaseFormat {
        format: Format::Vhd,
        marks: &[Mark::Head(0, b"conectix"), Mark::Tail(b"conectix")],
        support: Support::No,
    },
    BaseFormat {
        format: Format::Vdi,
        marks: &[Mark::Head(64, &0xbeda_107f_u32.to_le_bytes())],
        support: Support::No,
    },
    BaseFormat {
        format: Format::Parallels,
        marks: &[Mark::Head(0, b"WithoutFreeSpace"), Mark::Head(0, b"WithouFreSpacExt")],
        support: Support::No,
    },
    BaseFormat {
        format: Format::Luks,
        marks: &[Mark::Head(0, b"LUKS\xba\xbe")],
        support: Support::Encrypted,
    },
    BaseFormat { format: Format::Dmg, marks: &[Mark::Tail(b"koly")], support: Support::No },
];

impl BaseFormat {
    /// Returns the row of `format`.
    #[must_use]
    pub fn of(format: Format) -> &'static Self {
        const { assert!(matches!(FORMATS[0].support, Support::Bytes)) };
        FORMATS.iter().find(|row| row.format == format).unwrap_or(&FORMATS[0])
    }

    /// Whether this version reads images of this format.
    #[must_use]
    pub fn is_read(&self) -> bool {
        matches!(self.support, Support::Bytes | Support::Read(_))
    }

    /// Whether the bytes of the file are those of the disk. Only then is a base written, read past
    /// the host's cache, passed through, or shared by reflinks.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.support, Support::Bytes)
    }

    /// Opens the image in `file`, of a format that was checked.
    ///
    /// # Errors
    /// The errors of the format's own reader.
    pub(super) fn open(
        &self,
        file: BaseFile,
        options: &BaseOptions<'_>,
    ) -> Result<OpenedImage, BaseError> {
        match self.support {
            Support::Read(open) => open(file, options),
            Support::Bytes | Support::Encrypted | Support::No => {
                Ok(OpenedImage { layer: file.raw, needs: Vec::new() })
            }
        }
    }
}

fn open_qcow2(file: BaseFile, options: &BaseOptions<'_>) -> Result<OpenedImage, BaseError> {
    let chain = qcow2::open(file, options.allow_backing, options.locking)?;
    let needs = chain.needs().to_vec();
    Ok(OpenedImage { layer: Arc::new(chain), needs })
}

/// Finds the row of `format`. Refuses a format that is not read, and, when no format is given, a file
/// that does not look raw.
///
/// # Errors
/// The host's errno when the file cannot be read.
pub(super) fn check_format(
    path: &Path,
    file: &BaseFile,
    format: Option<Format>,
) -> io::Result<Result<&'static BaseFormat, BaseError>> {
    let found = match format {
        Some(format) => BaseFormat::of(format),
        None => detect(&file.file, file.size)?,
    };
    let (path, looks) = (path.to_owned(), found.format);
    Ok(match found.support {
        Support::Read(_) if format.is_none() => Err(BaseError::LooksLike { path, format: looks }),
        Support::Bytes | Support::Read(_) => Ok(found),
        Support::Encrypted => Err(BaseError::Encrypted(path)),
        Support::No => Err(BaseError::UnsupportedFormat { path, format: looks }),
    })
}

/// Detects the format of `file`, which has `size` bytes, by its marks; without any it is raw.
fn detect(file: &File, size: u64) -> io::Result<&'static BaseFormat> {
    let find = |has: &dyn Fn(&Mark) -> bool| FORMATS.iter().find(|row| row.marks.iter().any(has));
    let head = read_up_to(file, 0)?;
    let by_head = find(&|mark| match mark {
        Mark::Head(at, magic) => head.get(*at..).unwrap_or_default().starts_with(magic),
        Mark::Tail(_) => false,
    });
    if let Some(found) = by_head {
        return Ok(found);
    }
    let tail = read_up_to(file, size.saturating_sub(MARK_AREA as u64))?;
    let by_tail = find(&|mark| match mark {
        Mark::Tail(magic) => tail.starts_with(magic),
        Mark::Head(..) => false,
    });
    Ok(by_tail.unwrap_or(BaseFormat::of(Format::Raw)))
}

/// Reads up to 512 bytes from `offset` on; fewer at the end of the file.
fn read_up_to(file: &File, offset: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; MARK_AREA];
    let done = host::read_at(file, &mut buf, offset, Wait::Yes)?;
    buf.truncate(done);
    Ok(buf)
}
