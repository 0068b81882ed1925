//! The formats of bases: how each is recognized, how it is opened, and what it can do.
//!
//! [`FORMATS`] has a row for each. Opening a base, refusing one, and all code that needs the bytes of
//! the disk to be those of its file ask that table. The names are those of
//! [`Format`].

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::error::BaseError;
use super::image::{BaseImage, OpenedImage};
use super::{BaseOptions, foreign, qcow2};
use crate::config::Format;
use crate::layer::{self, Layer};

/// Bytes read at the start and at the end of an image for its marks.
const MARK_AREA: u64 = 512;

/// A format of a base.
pub struct BaseFormat {
    /// The format.
    pub format: Format,
    /// The marks by which files of this format are recognized; one is enough.
    marks: &'static [Mark],
    support: Support,
}

/// Bytes that files of a format have, from qemu's `block/*.c`, cryptsetup's on-disk format for LUKS, and
/// the documentation of libewf and AFFLIB for forensic images.
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
    /// Only read, by a program that is locked in.
    Foreign,
    /// Refused: forensic images, for which there are programs that show them as raw ones.
    Forensic,
}

/// Opens an image, with the files that it needs.
type Opener = fn(BaseImage, &BaseOptions<'_>) -> Result<OpenedImage, BaseError>;

/// All formats. Where the marks of two fit, the first row counts; so `qcow` is before `qcow2`.
const FORMATS: &[BaseFormat] = &[
    BaseFormat { format: Format::Raw, marks: &[], support: Support::Bytes },
    BaseFormat {
        format: Format::Qcow,
        marks: &[Mark::Head(0, b"QFI\xfb\0\0\0\x01")],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Qcow2,
        marks: &[Mark::Head(0, b"QFI\xfb")],
        support: Support::Read(open_qcow2),
    },
    BaseFormat {
        format: Format::Qed,
        marks: &[Mark::Head(0, b"QED\0")],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Vmdk,
        marks: &[
            Mark::Head(0, b"KDMV"),
            Mark::Head(0, b"COWD"),
            Mark::Head(0, b"# Disk DescriptorFile"),
        ],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Vhdx,
        marks: &[Mark::Head(0, b"vhdxfile")],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Vhd,
        marks: &[Mark::Head(0, b"conectix"), Mark::Tail(b"conectix")],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Vdi,
        marks: &[Mark::Head(64, &0xbeda_107f_u32.to_le_bytes())],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Parallels,
        marks: &[Mark::Head(0, b"WithoutFreeSpace"), Mark::Head(0, b"WithouFreSpacExt")],
        support: Support::Foreign,
    },
    BaseFormat {
        format: Format::Luks,
        marks: &[Mark::Head(0, b"LUKS\xba\xbe")],
        support: Support::Encrypted,
    },
    BaseFormat { format: Format::Dmg, marks: &[Mark::Tail(b"koly")], support: Support::Foreign },
    BaseFormat {
        format: Format::Ewf,
        marks: &[
            Mark::Head(0, b"EVF\x09\x0d\x0a\xff\0"),
            Mark::Head(0, b"EVF2\x0d\x0a\x81\0"),
            Mark::Head(0, b"LVF\x09\x0d\x0a\xff\0"),
        ],
        support: Support::Forensic,
    },
    BaseFormat {
        format: Format::Aff,
        marks: &[Mark::Head(0, b"AFF10\x0d\x0a\0")],
        support: Support::Forensic,
    },
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
        matches!(self.support, Support::Bytes | Support::Read(_) | Support::Foreign)
    }

    /// Whether the bytes of the file are those of the disk. Only then is a base written, read past
    /// the host's cache, passed through, or shared by reflinks.
    #[must_use]
    pub fn is_plain(&self) -> bool {
        matches!(self.support, Support::Bytes)
    }

    /// Whether QEMU reads images of this format for us.
    #[must_use]
    pub fn is_foreign(&self) -> bool {
        matches!(self.support, Support::Foreign)
    }

    /// Opens `image`, of a format that was checked.
    ///
    /// # Errors
    /// The errors of the format's own reader.
    pub(super) fn open(
        &self,
        image: BaseImage,
        options: &BaseOptions<'_>,
    ) -> Result<OpenedImage, BaseError> {
        match self.support {
            Support::Read(open) => open(image, options),
            Support::Foreign => foreign::open(image, self.format, options),
            Support::Bytes | Support::Encrypted | Support::Forensic => {
                Ok(OpenedImage { layer: image.layer, needs: Vec::new() })
            }
        }
    }
}

fn open_qcow2(image: BaseImage, options: &BaseOptions<'_>) -> Result<OpenedImage, BaseError> {
    let chain = qcow2::open(image, options.allow_backing, options.locking)?;
    let needs = chain.needs().to_vec();
    Ok(OpenedImage { layer: Arc::new(chain), needs })
}

/// Finds the row of `format`. Refuses a format that is not read, and, when no format is given, an
/// image that does not look raw. `path` is for messages.
///
/// # Errors
/// The errno of `image` when it cannot be read.
pub(super) fn check_format(
    path: &Path,
    image: &dyn Layer,
    format: Option<Format>,
) -> io::Result<Result<&'static BaseFormat, BaseError>> {
    let found = match format {
        Some(format) => BaseFormat::of(format),
        None => detect(image)?,
    };
    let (path, looks) = (path.to_owned(), found.format);
    Ok(match found.support {
        Support::Read(_) | Support::Foreign if format.is_none() => {
            Err(BaseError::LooksLike { path, format: looks })
        }
        Support::Bytes | Support::Read(_) | Support::Foreign => Ok(found),
        Support::Encrypted => Err(BaseError::Encrypted(path)),
        Support::Forensic => Err(BaseError::Forensic { path, format: looks }),
    })
}

/// Detects the format of `image` by its marks; without any it is raw.
fn detect(image: &dyn Layer) -> io::Result<&'static BaseFormat> {
    let find = |has: &dyn Fn(&Mark) -> bool| FORMATS.iter().find(|row| row.marks.iter().any(has));
    let head = read_up_to(image, 0)?;
    let by_head = find(&|mark| match mark {
        Mark::Head(at, magic) => head.get(*at..).unwrap_or_default().starts_with(magic),
        Mark::Tail(_) => false,
    });
    if let Some(found) = by_head {
        return Ok(found);
    }
    let tail = read_up_to(image, image.size().saturating_sub(MARK_AREA))?;
    let by_tail = find(&|mark| match mark {
        Mark::Tail(magic) => tail.starts_with(magic),
        Mark::Head(..) => false,
    });
    Ok(by_tail.unwrap_or(BaseFormat::of(Format::Raw)))
}

/// Reads up to 512 bytes from `offset` on; fewer at the end of the image.
fn read_up_to(image: &dyn Layer, offset: u64) -> io::Result<Vec<u8>> {
    let len = image.size().saturating_sub(offset).min(MARK_AREA);
    let mut buf = vec![0; usize::try_from(len).unwrap_or(0)];
    layer::read_exact(image, &mut buf, offset)?;
    Ok(buf)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::testing::MemoryLayer;

    #[test]
    fn a_layer_is_detected_by_its_first_and_last_bytes_however_it_answers() {
        let tail = |len: usize| [&vec![0; len][..], b"koly", &[0; 508]].concat();
        for (bytes, format) in [
            (Vec::new(), Format::Raw),
            (b"QFI".to_vec(), Format::Raw),
            (b"QFI\xfb".to_vec(), Format::Qcow2),
            ([&[0; 64][..], &0xbeda_107f_u32.to_le_bytes()].concat(), Format::Vdi),
            (tail(0), Format::Dmg),
            (tail(70_000), Format::Dmg),
            ([tail(70_000), vec![0]].concat(), Format::Raw),
        ] {
            let layer = MemoryLayer::new(bytes).with_delay().with_short_answers(3);
            assert_eq!(detect(&layer).unwrap().format, format);
        }
        let layer = MemoryLayer::new(tail(70_000));
        layer.set_failure(Some((70_000..70_001, libc::ETIMEDOUT)));
        let Err(error) = check_format(Path::new("x"), &layer, None) else { panic!("detected") };
        assert_eq!(error.raw_os_error(), Some(libc::ETIMEDOUT));
        assert!(check_format(Path::new("x"), &layer, Some(Format::Raw)).unwrap().is_ok());
    }
}
