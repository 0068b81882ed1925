//! Which layers make a persistent disk: the `stack` file and the directories around it.
//!
//! ```text
//!   vm1.cow/                        STORE/
//!     stack                           disks/UUID/stack
//!     layers/UUID/data                layers/UUID/data
//!     layers/UUID/log                 layers/UUID/log
//! ```
//!
//! `stack` is TOML behind a line with a checksum of the rest. It is only ever replaced whole:
//! write, fsync, rename, fsync of the directory. Everything here works on open directories, so a
//! rename of what holds them changes nothing.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::FORMAT_VERSION;
use super::error::{OverlayError, doing};
use super::tree::LayerTree;
pub use super::tree::{LayerRecord, SnapshotRecord};
use crate::base::identity::Identity;
use crate::config::{OverlayKind, SourcePart};
use crate::confined;

/// The longest `stack` in bytes: some ten thousand layers.
const MAX_STACK_LEN: u64 = 4 << 20;

/// The contents of a `stack` file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stack {
    /// The format's version; another one is refused.
    pub version: u32,
    /// The disk's own uuid; its inode number comes from it.
    pub uuid: Uuid,
    /// The owner of the mounted file.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its permission bits.
    pub perm: u16,
    /// How its changes are kept; block maps, which were there first, need not say so.
    #[serde(default, skip_serializing_if = "OverlayKind::is_blocks")]
    pub kind: OverlayKind,
    /// What lies at the bottom.
    pub base: BaseRecord,
    /// The overlay's layers, each after the one below it; the last one is written to.
    pub layers: Vec<LayerRecord>,
    /// Its snapshots, in the order they were taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotRecord>,
}

/// The base of a disk, as its overlay remembers it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "source", rename_all = "lowercase", deny_unknown_fields)]
pub enum BaseRecord {
    /// A file or block device.
    File {
        /// Its absolute path.
        path: PathBuf,
        /// How it is read.
        format: String,
        /// Where the part of it begins that is the base, in bytes; `None`: all of it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        offset: Option<u64>,
        /// How many bytes that part has.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        len: Option<u64>,
        /// What it was when the overlay was made; the whole of it.
        identity: Identity,
        /// The files it is read from besides: backing files of a qcow2 image, the nearest first,
        /// and data files.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        needs: Vec<FileRecord>,
    },
    /// Nothing but zeros.
    Blank {
        /// Its size in bytes.
        size: u64,
    },
}

impl BaseRecord {
    /// How much of its file the base is.
    #[must_use]
    pub fn part(&self) -> SourcePart {
        match self {
            Self::Blank { .. } | Self::File { offset: None, len: None, .. } => SourcePart::Whole,
            Self::File { offset, len, .. } => {
                SourcePart::Bytes { offset: offset.unwrap_or(0), len: *len }
            }
        }
    }
}

/// The fields `offset` and `len` of a base that is `view` of its file.
#[must_use]
pub fn view_fields(view: Option<&Range<u64>>) -> (Option<u64>, Option<u64>) {
    (view.map(|view| view.start), view.map(|view| view.end - view.start))
}

/// A file that a base needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its absolute path.
    pub path: PathBuf,
    /// What it was when the overlay was made.
    pub identity: Identity,
}

impl Stack {
    /// Its layers and their names.
    #[must_use]
    pub fn tree(&self) -> LayerTree {
        LayerTree { layers: self.layers.clone(), snapshots: self.snapshots.clone() }
    }

    /// The same disk with other layers.
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
        let crc = crc32c::crc32c(body.as_bytes());
        Ok(format!("checksum = \"crc32c:{crc:08x}\"\n{body}").into_bytes())
    }

    /// Reads the file's bytes.
    fn decode(bytes: &[u8]) -> Result<Self, OverlayError> {
        let text = std::str::from_utf8(bytes).map_err(|_| OverlayError::Damaged)?;
        let (head, body) = text.split_once('\n').ok_or(OverlayError::Damaged)?;
        let crc = crc32c::crc32c(body.as_bytes());
        if head != format!("checksum = \"crc32c:{crc:08x}\"") {
            return Err(OverlayError::Damaged);
        }
        // The version first: what a later one holds is not ours to judge.
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
        let is_block = |block: u32| block.is_power_of_two() && (512..=2 << 20).contains(&block);
        match stack.layers.iter().find(|layer| !is_block(layer.block)) {
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
    /// [`OverlayError`]: missing, damaged, of another version.
    pub fn read(dir: &File) -> Result<Self, OverlayError> {
        match confined::read_file(dir, "stack", MAX_STACK_LEN) {
            Ok(bytes) => Self::decode(&bytes),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(OverlayError::NotAnOverlay)
            }
            Err(error) => Err(doing("reading its 'stack'")(error)),
        }
    }

    /// Replaces the `stack` in `dir`, durably.
    ///
    /// # Errors
    /// The host's errno; the old one is in place then.
    pub fn write(&self, dir: &File) -> Result<(), OverlayError> {
        let bytes = self.encode()?;
        if bytes.len() as u64 > MAX_STACK_LEN {
            // It could not be read again.
            return Err(doing("writing its 'stack'")(io::Error::from_raw_os_error(libc::EFBIG)));
        }
        confined::replace_file(dir, "stack", "stack.new", &bytes)
            .map_err(doing("writing its 'stack'"))
    }
}

/// The inode number of the disk `uuid`: the same at every mount of a persistent disk.
#[must_use]
pub fn inode_of(uuid: &Uuid) -> u64 {
    // Above the few numbers of the mount's own files, and positive as a signed number.
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
    fn a_stack_survives_its_file() {
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
    fn a_part_of_a_base_is_remembered_and_a_whole_one_is_as_it_ever_was() {
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
    fn a_base_with_a_key_that_is_unknown_is_not_mounted_without_it() {
        let text = String::from_utf8(over_a_file(Some(&(0..512))).encode().unwrap()).unwrap();
        let body = text.split_once('\n').unwrap().1.replace("\nlen = ", "\nwidth = ");
        let crc = crc32c::crc32c(body.as_bytes());
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
        let crc = crc32c::crc32c(body.as_bytes());
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
