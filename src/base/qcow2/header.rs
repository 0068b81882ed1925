//! The header of a qcow2 image, parsed and checked before any other part is used.
//!
//! The header may come from an attacker, so every field that sizes a buffer, opens a file or refers
//! to another place of the image is checked here, against the format (`docs/interop/qcow2.rst` of
//! QEMU) and against the image's size in bytes. A header that passes needs little memory and refers
//! to nothing outside the image.

use std::io;

use crate::layer::{self, Layer};

use super::l1_map::L1Map;

/// The signature of qcow2: `QFI\xfb`.
const MAGIC: &[u8] = b"QFI\xfb";
/// Lengths in bytes of the fixed part of the header, in version 2 and in version 3.
const V2_LEN: usize = 72;
const V3_LEN: usize = 104;
/// Binary logarithm of the cluster size: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Largest L1 table in bytes that QEMU opens (`QCOW_MAX_L1_SIZE`): 32 MiB.
const MAX_L1_LEN: u64 = 32 << 20;
/// Longest name of a backing file in bytes.
const MAX_BACKING_NAME: u32 = 1023;
/// Mask of the offset in an L1 entry: bits 9 to 55.
const L1_OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// Bits of the incompatible features.
const INCOMPAT_DIRTY: u64 = 1 << 0;
const INCOMPAT_CORRUPT: u64 = 1 << 1;
const INCOMPAT_DATA_FILE: u64 = 1 << 2;
const INCOMPAT_COMPRESSION: u64 = 1 << 3;
const INCOMPAT_EXTENDED_L2: u64 = 1 << 4;

/// Types of header extensions.
const EXT_END: u32 = 0;
const EXT_BACKING_FORMAT: u32 = 0xe279_2aca;
const EXT_DATA_FILE: u32 = 0x4441_5441;

/// The reason why an image is refused, as the end of a line that names it.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// The host failed.
    #[error("cannot be read: {0}")]
    Io(#[from] io::Error),
    /// The file is no qcow2 image, or a damaged one.
    #[error("is no sound qcow2 image: {0}")]
    Damaged(String),
    /// The image is intact but not supported.
    #[error("{0}")]
    Refused(&'static str),
}

fn damaged<T>(why: impl Into<String>) -> Result<T, HeaderError> {
    Err(HeaderError::Damaged(why.into()))
}

/// The file that holds the data of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataFile {
    /// The image itself.
    Inside,
    /// A file of its own, by its name; `None` if the image records no name.
    External(Option<String>),
}

/// The contents of a qcow2 header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Qcow2Header {
    /// The version of the format: 2 or 3.
    pub version: u32,
    /// Size of the disk in bytes.
    pub size: u64,
    /// Cluster size in bytes: 512 to 2 MiB.
    pub cluster_size: u64,
    /// The backing file.
    pub backing: Option<BackingRef>,
    /// The file that holds the data.
    pub data_file: DataFile,
    /// The byte range of the L1 table that maps the disk, for [`check_l1`](Self::check_l1).
    l1: std::ops::Range<u64>,
    /// Length in bytes of the whole L1 table, all of which is kept in memory.
    l1_len: u64,
}

/// The backing file as recorded in the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingRef {
    /// The file's name.
    pub name: String,
    /// The file's format, as QEMU names it; old images record none.
    pub format: Option<String>,
}

impl Qcow2Header {
    /// Reads and checks the header of the image whose bytes `image` reads.
    ///
    /// # Errors
    /// [`HeaderError`] for a header that is damaged or not supported.
    pub fn read(image: &dyn Layer) -> Result<Self, HeaderError> {
        let image_size = image.size();
        // The header and its extensions end within the first cluster; those QEMU writes are short.
        let mut head = vec![0; usize::try_from(image_size.min(64 << 10)).unwrap_or(0)];
        layer::read_exact(image, &mut head, 0)?;
        let fields = HeaderBytes(&head);
        if head.len() < V2_LEN || !head.starts_with(MAGIC) {
            return damaged("it has no header");
        }
        let version = fields.u32(4)?;
        if !(2..=3).contains(&version) {
            return damaged(format!("version {version} is not known"));
        }
        let cluster_bits = fields.u32(20)?;
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return damaged(format!("clusters of 2^{cluster_bits} bytes"));
        }
        if fields.u32(32)? != 0 {
            return Err(HeaderError::Refused(
                "is encrypted: decrypt it with qemu-img convert first",
            ));
        }
        let features = if version == 3 { fields.u64(72)? } else { 0 };
        check_features(features)?;
        let cluster = 1 << cluster_bits;
        let size = fields.u64(24)?;
        let l1 = l1_range(&fields, size, cluster_bits, image_size)?;
        let l1_len = u64::from(fields.u32(36)?) * 8;
        let header_len = if version == 3 { fields.u32(100)? as usize } else { V2_LEN };
        if version == 3 && (header_len < V3_LEN || header_len as u64 > cluster) {
            return damaged(format!("a header of {header_len} bytes"));
        }
        let first_cluster = HeaderBytes(&head[..head.len().min(1 << cluster_bits)]);
        let found = read_extensions(&first_cluster, header_len)?;
        let backing = read_backing_name(&first_cluster)?
            .map(|name| BackingRef { name, format: found.backing_format });
        let data_file = match features & INCOMPAT_DATA_FILE {
            0 => DataFile::Inside,
            _ => DataFile::External(found.data_file),
        };
        Ok(Self { version, size, cluster_size: cluster, backing, data_file, l1, l1_len })
    }

    /// Length in bytes of the L1 table, all of which is kept in memory.
    #[must_use]
    pub fn l1_len(&self) -> u64 {
        self.l1_len
    }

    /// Bytes of the disk that one L2 table maps: a cluster of entries of 8 bytes each.
    #[must_use]
    pub fn bytes_per_l2(&self) -> u64 {
        self.cluster_size * (self.cluster_size / 8)
    }

    /// Checks that all L2 tables lie inside `image` and do not overlap the header or the L1 table, and
    /// returns which there are.
    ///
    /// # Errors
    /// [`HeaderError`] for an L2 table elsewhere.
    pub(super) fn check_l1(&self, image: &dyn Layer) -> Result<L1Map, HeaderError> {
        let image_size = image.size();
        let mut tables = L1Map::new(self.bytes_per_l2());
        let mut buf = vec![0; 1 << 16];
        let mut at = self.l1.start;
        while at < self.l1.end {
            let left = usize::try_from(self.l1.end - at).unwrap_or(usize::MAX);
            let piece = buf.len().min(left);
            layer::read_exact(image, &mut buf[..piece], at)?;
            let first = (at - self.l1.start) / 8;
            for (index, entry) in (first..).zip(buf[..piece].as_chunks().0) {
                let offset = u64::from_be_bytes(*entry) & L1_OFFSET;
                if offset == 0 {
                    continue;
                }
                let end = offset + self.cluster_size;
                let is_over =
                    offset < self.cluster_size || (offset < self.l1.end && end > self.l1.start);
                if !offset.is_multiple_of(self.cluster_size) || is_over || end > image_size {
                    return damaged(format!("an L2 table at {offset}"));
                }
                tables.add(index);
            }
            at += piece as u64;
        }
        Ok(tables)
    }
}

/// Refuses features that are unknown or not supported.
fn check_features(features: u64) -> Result<(), HeaderError> {
    let refuse = |line| Err(HeaderError::Refused(line));
    if features & INCOMPAT_CORRUPT != 0 {
        return refuse("is marked as corrupt: repair it with qemu-img check -r all");
    }
    if features & INCOMPAT_COMPRESSION != 0 {
        return refuse(
            "is compressed with zstd, which is not read: convert it with qemu-img convert -O qcow2",
        );
    }
    if features & INCOMPAT_EXTENDED_L2 != 0 {
        return refuse(
            "has extended L2 entries, which are not read: convert it with qemu-img convert -O qcow2",
        );
    }
    if features & INCOMPAT_DIRTY != 0 {
        return refuse("was not closed properly: repair it with qemu-img check -r all");
    }
    let unknown = features & !INCOMPAT_DATA_FILE;
    if unknown != 0 {
        return damaged(format!("unknown incompatible features {unknown:#x}"));
    }
    Ok(())
}

/// Finds and checks the byte range of the L1 table.
fn l1_range(
    fields: &HeaderBytes<'_>,
    size: u64,
    cluster_bits: u32,
    image_size: u64,
) -> Result<std::ops::Range<u64>, HeaderError> {
    let (entries, start) = (u64::from(fields.u32(36)?), fields.u64(40)?);
    let mapped_by_one = 1_u64 << (cluster_bits + cluster_bits - 3);
    let needed = size.div_ceil(mapped_by_one);
    if entries * 8 > MAX_L1_LEN || needed * 8 > MAX_L1_LEN || i64::try_from(size).is_err() {
        return damaged(format!("an L1 table of {} entries for {size} bytes", entries.max(needed)));
    }
    if entries < needed {
        return damaged(format!("an L1 table of {entries} entries, and {needed} are needed"));
    }
    let end = start.checked_add(entries * 8);
    match end {
        Some(end) if end <= image_size && start.is_multiple_of(1 << cluster_bits) => {
            if start == 0 && entries > 0 {
                return damaged("its L1 table lies over its header");
            }
            // QEMU may have made the table longer than the disk needs: the rest maps nothing.
            Ok(start..start + needed * 8)
        }
        _ => damaged(format!("an L1 table at {start}, outside the file")),
    }
}

/// The header extensions that are used.
#[derive(Default)]
struct HeaderExtensions {
    backing_format: Option<String>,
    data_file: Option<String>,
}

fn read_extensions(
    fields: &HeaderBytes<'_>,
    mut at: usize,
) -> Result<HeaderExtensions, HeaderError> {
    let mut found = HeaderExtensions::default();
    // Version 2 has them as well, unless the name of the backing file follows the header directly.
    let name_at = usize::try_from(fields.u64(8)?).unwrap_or(usize::MAX);
    let end = if name_at == 0 { fields.0.len() } else { name_at.min(fields.0.len()) };
    while at + 8 <= end {
        let (kind, len) = (fields.u32(at)?, fields.u32(at + 4)? as usize);
        if kind == EXT_END {
            break;
        }
        let text = || -> Result<String, HeaderError> {
            let bytes = fields.bytes(at + 8, len)?;
            let text = String::from_utf8(bytes.to_vec());
            text.or_else(|_| damaged("a name that is no text"))
        };
        match kind {
            EXT_BACKING_FORMAT => found.backing_format = Some(text()?),
            EXT_DATA_FILE => found.data_file = Some(text()?),
            _ => drop(fields.bytes(at + 8, len)?),
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(found)
}

fn read_backing_name(fields: &HeaderBytes<'_>) -> Result<Option<String>, HeaderError> {
    let (at, len) = (fields.u64(8)?, fields.u32(16)?);
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if len > MAX_BACKING_NAME {
        return damaged(format!("a backing file whose name has {len} bytes"));
    }
    let name = String::from_utf8(fields.bytes(at, len as usize)?.to_vec());
    name.map(Some).or_else(|_| damaged("a backing file whose name is no text"))
}

/// Access to big-endian fields of a buffer.
struct HeaderBytes<'a>(&'a [u8]);

impl<'a> HeaderBytes<'a> {
    fn bytes(&self, at: usize, len: usize) -> Result<&'a [u8], HeaderError> {
        let end = at.checked_add(len);
        match end.and_then(|end| self.0.get(at..end)) {
            Some(bytes) => Ok(bytes),
            None => damaged("its header is cut short"),
        }
    }

    fn array<const N: usize>(&self, at: usize) -> Result<[u8; N], HeaderError> {
        let bytes = self.bytes(at, N)?;
        bytes.try_into().or_else(|_| damaged("its header is cut short"))
    }

    fn u32(&self, at: usize) -> Result<u32, HeaderError> {
        self.array(at).map(u32::from_be_bytes)
    }

    fn u64(&self, at: usize) -> Result<u64, HeaderError> {
        self.array(at).map(u64::from_be_bytes)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::layer::testing::MemoryLayer;

    /// Creates a valid image of 64 MiB with one L2 table, a backing file and its format.
    fn sample() -> Vec<u8> {
        let mut image = vec![0; 5 << 16];
        let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(4, &3_u32.to_be_bytes());
        put(8, &512_u64.to_be_bytes());
        put(16, &8_u32.to_be_bytes());
        put(20, &16_u32.to_be_bytes());
        put(24, &(64_u64 << 20).to_be_bytes());
        put(36, &1_u32.to_be_bytes());
        put(40, &(3_u64 << 16).to_be_bytes());
        put(100, &104_u32.to_be_bytes());
        put(104, &EXT_BACKING_FORMAT.to_be_bytes());
        put(108, &3_u32.to_be_bytes());
        put(112, b"raw");
        put(512, b"base.img");
        put(3 << 16, &(1 << 63 | 4_u64 << 16).to_be_bytes());
        image
    }

    fn read(image: &[u8]) -> Result<Qcow2Header, HeaderError> {
        let image = MemoryLayer::new(image.to_vec());
        let header = Qcow2Header::read(&image)?;
        header.check_l1(&image).map(|_| header)
    }

    #[test]
    fn a_valid_header_is_parsed() {
        let header = read(&sample()).unwrap();
        let backing = BackingRef { name: "base.img".to_owned(), format: Some("raw".to_owned()) };
        assert_eq!(header.backing, Some(backing));
        assert_eq!((header.size, header.cluster_size), (64 << 20, 1 << 16));
        assert_eq!(header.l1, 3 << 16..(3 << 16) + 8);
    }

    proptest! {
        #[test]
        fn any_header_is_parsed_safely_or_refused(
            changes in proptest::collection::vec((0..600_usize, any::<u8>()), 1..8),
            table in any::<u64>(), len in 0..6_usize << 16,
        ) {
            let mut image = sample();
            for (at, byte) in changes {
                image[at] = byte;
            }
            image[3 << 16..][..8].copy_from_slice(&table.to_be_bytes());
            image.truncate(len);
            if let Ok(header) = read(&image) {
                // An accepted header refers to nothing outside the file, and needs little memory.
                prop_assert!(header.l1.end <= len as u64 && header.l1.end - header.l1.start <= MAX_L1_LEN);
                prop_assert!((512..=2 << 20).contains(&header.cluster_size));
            }
        }
    }
}
