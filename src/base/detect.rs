//! Format detection by the first and last bytes of a file.

use std::fs::File;
use std::io;
use std::path::Path;

use super::error::BaseError;
use super::file::BaseFile;
use crate::config::Format;
use crate::host;
use crate::layer::Wait;

/// Refuses a format that is not supported, and a file that does not look raw when no format is
/// given.
pub(super) fn check_format(
    path: &Path,
    host: &BaseFile,
    format: Option<Format>,
) -> io::Result<Result<(), BaseError>> {
    let path = path.to_owned();
    Ok(match format {
        Some(Format::Raw | Format::Qcow2) => Ok(()),
        Some(Format::Luks) => Err(BaseError::Encrypted(path)),
        Some(format) => Err(BaseError::UnsupportedFormat { path, format }),
        None => match detect(&host.file, host.size)? {
            None => Ok(()),
            Some(Format::Luks) => Err(BaseError::Encrypted(path)),
            Some(Format::Qcow2) => Err(BaseError::LooksLike { path, format: Format::Qcow2 }),
            Some(format) => Err(BaseError::UnsupportedFormat { path, format }),
        },
    })
}

/// Signatures at the start of a file, each with its offset: from qemu's `block/*.c`, and
/// cryptsetup's on-disk format for LUKS.
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

/// Signatures at the start of the last 512 bytes.
const TRAILERS: &[(&[u8], Format)] = &[(b"conectix", Format::Vhd), (b"koly", Format::Dmg)];

/// Detects the format of `file`, which has `size` bytes; `None` means raw.
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

/// Reads up to 512 bytes from `offset` on; fewer at the end of the file.
fn read_up_to(file: &File, offset: u64) -> io::Result<Vec<u8>> {
    let mut buf = vec![0; 512];
    let done = host::read_at(file, &mut buf, offset, Wait::Yes)?;
    buf.truncate(done);
    Ok(buf)
}
