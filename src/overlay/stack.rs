//! The `stack` file, which lists the base, the layers and the snapshots of a persistent disk.
//!
//! ```text
//!   vm1.cow/                        STORE/
//!     stack                           disks/UUID/stack
//!     layers/UUID/data                layers/UUID/data
//!     layers/UUID/log                 layers/UUID/log
//! ```
//!
//! `stack` is TOML after a first line with a checksum of the rest. It is only ever replaced whole:
//! write, fsync, rename, fsync of the directory. It is read and written in an open directory, so
//! renaming a directory above changes nothing.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FORMAT_VERSION;
use super::checksummed;
use super::error::OverlayError;
use super::tree::LayerTree;
pub use super::tree::{LayerRecord, SnapshotRecord};
use crate::config::{OverlayKind, SourcePart, is_block_size};
use crate::confined;
use crate::host::mountinfo;
use crate::identity::Identity;

/// The longest `stack` in bytes: some ten thousand layers.
const MAX_STACK_LEN: u64 = 4 << 20;

/// The contents of a `stack` file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stack {
    /// The format's version; another one is refused.
    pub version: u32,
    /// The disk's own uuid, from which its inode number is derived.
    pub uuid: Uuid,
    /// The user id of the mounted file's owner.
    pub uid: u32,
    /// The group id of the mounted file.
    pub gid: u32,
    /// The permission bits of the mounted file.
    pub perm: u16,
    /// The way in which changes are stored. Absent for a block map, the first kind that existed.
    #[serde(default, skip_serializing_if = "OverlayKind::is_blocks")]
    pub kind: OverlayKind,
    /// The base, at the bottom of the disk.
    pub base: BaseRecord,
    /// The overlay's layers, each after the one below it; the last one takes the writes.
    pub layers: Vec<LayerRecord>,
    /// The snapshots, in the order they were taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotRecord>,
}

/// The base of a disk, and the identity by which a change of it is noticed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "lowercase", deny_unknown_fields)]
pub enum BaseRecord {
    /// A file or block device.
    File {
        /// The absolute path.
        path: PathBuf,
        /// The name of the format by which the base is read.
        format: String,
        /// The offset in bytes at which the base begins in the file; `None` when the base is the
        /// whole file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// The length of that part in bytes; `None` when it reaches to the end of the file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        len: Option<u64>,
        /// The identity that the whole file must have.
        identity: Identity,
        /// The other files from which the base is read: backing files of a qcow2 image, the nearest
        /// first, and data files.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        needs: Vec<FileRecord>,
    },
    /// An image on a server.
    Remote {
        /// The address, without secrets.
        address: String,
        /// The name of the format by which the base is read.
        format: String,
        /// As for a file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// As for a file.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        len: Option<u64>,
        /// The identity that the whole image must have.
        identity: Identity,
        /// The files of this host that a qcow2 image needs.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        needs: Vec<FileRecord>,
    },
    /// Nothing but zeros.
    Blank {
        /// The size in bytes.
        size: u64,
    },
}

impl BaseRecord {
    /// Returns what is recorded of a base with bytes of its own; `None` for a blank disk.
    #[must_use]
    pub fn source(&self) -> Option<RecordedSource<'_>> {
        let (location, format, offset, len, identity, needs) = match self {
            Self::File { path, format, offset, len, identity, needs } => {
                (SourceLocation::File(path), format, offset, len, identity, needs)
            }
            Self::Remote { address, format, offset, len, identity, needs } => {
                (SourceLocation::Remote(address), format, offset, len, identity, needs)
            }
            Self::Blank { .. } => return None,
        };
        Some(RecordedSource { location, format, part: (*offset, *len), identity, needs })
    }

    /// Returns the size of a blank disk in bytes; 0 for others.
    #[must_use]
    pub fn blank_size(&self) -> u64 {
        match self {
            Self::Blank { size } => *size,
            Self::File { .. } | Self::Remote { .. } => 0,
        }
    }

    /// Returns the part of its file or image that the base is.
    #[must_use]
    pub fn part(&self) -> SourcePart {
        match self {
            Self::Blank { .. }
            | Self::File { offset: None, len: None, .. }
            | Self::Remote { offset: None, len: None, .. } => SourcePart::Whole,
            Self::File { offset, len, .. } | Self::Remote { offset, len, .. } => {
                SourcePart::Bytes { offset: offset.unwrap_or(0), len: *len }
            }
        }
    }
}

/// A recorded base that has bytes of its own.
#[derive(Debug)]
pub struct RecordedSource<'a> {
    /// The place of the bytes.
    pub location: SourceLocation<'a>,
    /// The name of the format by which the base is read.
    pub format: &'a str,
    /// The start and the length in bytes of the part that the base is, as in the record.
    pub part: (Option<u64>, Option<u64>),
    /// The identity of the whole.
    pub identity: &'a Identity,
    /// The other files from which the base is read.
    pub needs: &'a [FileRecord],
}

/// The place of a base's bytes; displays in quotes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceLocation<'a> {
    /// A file or a device, by its path.
    File(&'a Path),
    /// An image on a server, by its address.
    Remote(&'a str),
}

impl SourceLocation<'_> {
    /// Returns the path or the address, without quotes.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Remote(address) => (*address).to_owned(),
        }
    }

    /// Returns whether the path leads to `file`, by device and inode.
    #[must_use]
    pub fn leads_to(&self, file: Option<&File>) -> bool {
        let (Self::File(path), Some(file)) = (self, file) else { return false };
        let there = mountinfo::open_recorded(path).and_then(|there| there.metadata());
        let (Ok(there), Ok(here)) = (there, file.metadata()) else {
            return false;
        };
        (there.dev(), there.ino()) == (here.dev(), here.ino())
    }

    /// Returns whether nothing has this path any more, or another user's FUSE mount has it. A server is not
    /// asked.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::File(path) if mountinfo::open_recorded(path).is_err())
    }
}

impl fmt::Display for SourceLocation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "'{}'", path.display()),
            Self::Remote(address) => write!(f, "'{address}'"),
        }
    }
}

/// Returns the fields `offset` and `len` of a base that is the part `view` (bytes) of its file.
#[must_use]
pub fn view_fields(view: Option<&Range<u64>>) -> (Option<u64>, Option<u64>) {
    (view.map(|view| view.start), view.map(|view| view.end - view.start))
}

/// Another file from which a base is read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// The absolute path.
    pub path: PathBuf,
    /// The identity that the file must have.
    pub identity: Identity,
}

impl Stack {
    /// Returns the layers and the snapshots.
    #[must_use]
    pub fn tree(&self) -> LayerTree {
        LayerTree { layers: self.layers.clone(), snapshots: self.snapshots.clone() }
    }

    /// Returns the stack of the same disk with other layers.
    #[must_use]
    pub fn with_tree(&self, tree: LayerTree) -> Self {
        Self { layers: tree.layers, snapshots: tree.snapshots, ..self.clone() }
    }

    /// Returns the record of the layer that takes the writes.
    ///
    /// # Errors
    /// [`OverlayError::Reflink`]; [`OverlayError::Syntax`] when there is no layer.
    pub(super) fn top_layer(&self) -> Result<LayerRecord, OverlayError> {
        if self.kind == OverlayKind::Reflink {
            return Err(OverlayError::Reflink);
        }
        let top = self.layers.last().cloned();
        top.ok_or_else(|| OverlayError::Syntax("it has no layer".to_owned()))
    }

    /// Returns the contents of the file.
    fn encode(&self) -> Result<Vec<u8>, OverlayError> {
        let body =
            toml::to_string(self).map_err(|error| OverlayError::Syntax(error.to_string()))?;
        Ok(checksummed::encode(&body))
    }

    /// Parses the contents of the file.
    fn decode(bytes: &[u8]) -> Result<Self, OverlayError> {
        let body = checksummed::decode(bytes).ok_or(OverlayError::Damaged)?;
        // The version first: the rest of a later version may have another shape.
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let syntax = |error: toml::de::Error| OverlayError::Syntax(error.message().to_owned());
        let Version { version } = toml::from_str(body).map_err(syntax)?;
        if version != FORMAT_VERSION {
            return Err(OverlayError::Version(version));
        }
        let stack: Self = toml::from_str(body).map_err(syntax)?;
        if let Some(fault) = stack.tree().fault()
            && stack.kind == OverlayKind::Blocks
        {
            return Err(OverlayError::Syntax(fault));
        }
        match stack.layers.iter().find(|layer| !is_block_size(layer.block)) {
            None => Ok(stack),
            Some(layer) => Err(OverlayError::Syntax(format!(
                "blocks of {} bytes: a power of two from 512 to 2M is needed",
                layer.block
            ))),
        }
    }

    /// Reads the `stack` in the open directory `dir`.
    ///
    /// # Errors
    /// [`OverlayError`]: the file is missing, damaged, or of another version.
    pub fn read(dir: &File) -> Result<Self, OverlayError> {
        match confined::read_file(dir, "stack", MAX_STACK_LEN) {
            Ok(bytes) => Self::decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(OverlayError::NotAnOverlay)
            }
            Err(error) => Err(OverlayError::io("reading its 'stack'")(error)),
        }
    }

    /// Replaces the `stack` in `dir`, durably.
    ///
    /// # Errors
    /// The host's errno. The old `stack` is in place in that case, unless only the last sync failed.
    pub fn write(&self, dir: &File) -> Result<(), OverlayError> {
        let bytes = self.encode()?;
        if bytes.len() as u64 > MAX_STACK_LEN {
            // Such a file could not be read again.
            return Err(OverlayError::io("writing its 'stack'")(io::Error::from_raw_os_error(
                libc::EFBIG,
            )));
        }
        confined::replace_file(dir, "stack", "stack.new", &bytes)
            .map_err(OverlayError::io("writing its 'stack'"))
    }
}

/// Returns the inode number of the disk `uuid`, the same at every mount of a persistent disk.
#[must_use]
pub fn inode_of(uuid: &Uuid) -> u64 {
    // Above the numbers of the mount's own files, and positive as a signed number.
    uuid.as_u64_pair().0 >> 1 | 1 << 62
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trusted_path::open_dir;

    fn sample() -> Stack {
        Stack {
            version: FORMAT_VERSION,
            uuid: Uuid::from_u128(7),
            uid: 1,
            gid: 2,
            perm: 0o640,
            kind: OverlayKind::Blocks,
            base: BaseRecord::Blank { size: 1 << 30 },
            layers: vec![LayerRecord { uuid: Uuid::from_u128(8), block: 4096, parent: None }],
            snapshots: Vec::new(),
        }
    }

    #[test]
    fn a_stack_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let dir = open_dir(dir.path()).unwrap();
        sample().write(&dir).unwrap();
        assert_eq!(Stack::read(&dir).unwrap(), sample());
    }

    fn over_a_file(view: Option<&Range<u64>>) -> Stack {
        let file = tempfile::tempfile().unwrap();
        file.set_len(9000).unwrap();
        let identity = Identity::of(&file).unwrap();
        let (offset, len) = view_fields(view);
        let needs = vec![FileRecord { path: "/b".into(), identity: identity.clone() }];
        let (path, format) = ("/a".into(), "qcow2".to_owned());
        let base = BaseRecord::File { path, format, offset, len, identity, needs };
        Stack { base, ..sample() }
    }

    #[test]
    fn only_a_part_of_a_base_has_an_offset_and_a_length() {
        let whole = over_a_file(None);
        let text = String::from_utf8(whole.encode().unwrap()).unwrap();
        assert!(!text.contains("offset") && !text.contains("len"), "{text}");
        assert_eq!(Stack::decode(text.as_bytes()).unwrap(), whole);
        assert_eq!(whole.base.part(), SourcePart::Whole);
        let part = over_a_file(Some(&(512..8192)));
        assert_eq!(Stack::decode(&part.encode().unwrap()).unwrap(), part);
        assert_eq!(part.base.part(), SourcePart::Bytes { offset: 512, len: Some(7680) });
    }

    #[test]
    fn a_base_with_an_unknown_key_is_refused() {
        let text = String::from_utf8(over_a_file(Some(&(0..512))).encode().unwrap()).unwrap();
        let body = text.split_once('\n').unwrap().1.replace("\nlen = ", "\nwidth = ");
        let crc = crate::checksum::crc32c(body.as_bytes());
        let text = format!("checksum = \"crc32c:{crc:08x}\"\n{body}");
        assert!(matches!(Stack::decode(text.as_bytes()), Err(OverlayError::Syntax(_))));
    }

    #[test]
    fn any_changed_byte_is_noticed() {
        let bytes = sample().encode().unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x10;
            assert!(Stack::decode(&changed).is_err(), "byte {at}");
        }
        assert!(Stack::decode(&bytes[..bytes.len() - 1]).is_err());
    }

    #[test]
    fn a_later_version_is_refused_even_when_its_keys_are_unknown() {
        let body = "version = 2\nshape = \"round\"\n";
        let crc = crate::checksum::crc32c(body.as_bytes());
        let text = format!("checksum = \"crc32c:{crc:08x}\"\n{body}");
        assert!(matches!(Stack::decode(text.as_bytes()), Err(OverlayError::Version(2))));
    }

    #[test]
    fn a_directory_without_a_stack_is_no_overlay() {
        let dir = tempfile::tempdir().unwrap();
        let dir = open_dir(dir.path()).unwrap();
        assert!(matches!(Stack::read(&dir), Err(OverlayError::NotAnOverlay)));
    }
}
