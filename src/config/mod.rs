//! The user's configuration: disk specs, sizes, ranges, mount options and the TOML file, parsed
//! into plain structs.
//!
//! ```text
//!   vm=/srv/vm.img,overlay=/srv/vm.d,block=64K      [[disk]]
//!   ^^ ^^^^^^^^^^^ ^^^^^^^^^^^^^^^^^ ^^^^^^^^^      name = "vm"
//!   |  source      key     value     another        source = "/srv/vm.img"
//!   name                                            overlay = "/srv/vm.d"
//! ```
//!
//! Both spellings become a name, a source and a list of keys, and share all code from there on.
//! Only the table in `keys/` knows a key, its type and the kinds of disks it applies to.
//!
//! Nothing here accesses a file. A relative path is joined to a directory given by the caller, and
//! not checked. The one question about the file system, whether a path with a comma in it exists
//! (so that the error can say how to write it), goes to a closure given by the caller.
//!
//! Every error is one line that says what is wrong, where, and what to write instead. Control
//! characters in the user's input are escaped.

mod command_line;
mod disk_parser;
mod error;
mod flow;
mod keys;
mod options;
mod raw_value;
mod remote;
mod server;
mod size;
mod stream;
mod toml_file;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub(crate) use command_line::{CommandLineError, split_command};
pub use disk_parser::{check_cache, check_names, parse_base, parse_disk};
pub use error::SpecError;
pub use options::{MountOptions, parse_mount_options};
pub(crate) use remote::without_queries;
pub use remote::{AuthSource, BmapSource, Protocol, RemoteAddress, RemoteSpec};
pub use server::ServerSpec;
pub use size::{MAX_SIZE, format_size, format_zeroed, is_block_size, parse_range, parse_size};
pub use stream::{
    DEFAULT_WINDOW, FinishWhen, Flow, Overwrite, Pad, Programs, SinkSpec, SourceSpec,
    SpillCompression, Spool, StreamFrames, StreamSpec,
};
pub use toml_file::{Config, parse_config};

/// The specification of one disk. `None` means that the key was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// Name of the file in the mount: 1 to 255 bytes, no `/`, no control character.
    pub name: String,
    /// Source of the disk's data.
    pub source: DiskSource,
    /// Destination of writes.
    pub mode: DiskMode,
    /// Format of the base. `None` means raw, unless the file looks like another format.
    pub format: Option<Format>,
    /// Part of the source that the disk shows. Only a file or an image on a server has parts.
    pub part: SourcePart,
    /// Whether the mount shows the disk's partitions as files.
    pub partitions: Partitions,
    /// Directory of the overlay; absolute. `None` means that the changes end with the mount.
    /// Requires [`DiskMode::Cow`], as do the six fields after this one.
    pub overlay: Option<PathBuf>,
    /// Storage of the changes in a new overlay.
    pub overlay_kind: OverlayKind,
    /// Block size of the overlay in bytes: a power of two from 512 to 2 MiB.
    pub block: Option<u32>,
    /// Maximum amount of data in the overlay, in bytes; a write beyond it fails with `ENOSPC`.
    pub limit: Option<u64>,
    /// Size of the disk in bytes; `None` takes the source's size.
    pub size: Option<u64>,
    /// Effect of a truncate.
    pub resize: Resize,
    /// Data that is copied up into the overlay without being written.
    pub copy_up: CopyUp,
    /// User ID that owns the file.
    pub uid: Option<u32>,
    /// Group ID that owns the file.
    pub gid: Option<u32>,
    /// Permission bits of the file, at most `0o777`.
    pub perm: Option<u16>,
    /// Whether the base is locked as qemu locks images.
    pub locking: Locking,
    /// Whether the kernel may read and write the file directly. Only without an overlay.
    pub passthrough: Passthrough,
    /// Whether I/O on the disk's files bypasses the host's page cache.
    pub direct: DirectIo,
}

impl DiskSpec {
    /// Creates the spec of the disk `name` with the data of `source`, all keys at their defaults.
    #[must_use]
    pub fn new(name: String, source: DiskSource) -> Self {
        Self {
            name,
            source,
            mode: DiskMode::Cow,
            format: None,
            part: SourcePart::Whole,
            partitions: Partitions::Hidden,
            overlay: None,
            overlay_kind: OverlayKind::Blocks,
            block: None,
            limit: None,
            size: None,
            resize: Resize::Follow,
            copy_up: CopyUp::default(),
            uid: None,
            gid: None,
            perm: None,
            locking: Locking::Qemu,
            passthrough: Passthrough::Off,
            direct: DirectIo::Off,
        }
    }
}

/// Part of its source that a disk shows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcePart {
    /// All of the source.
    #[default]
    Whole,
    /// A range of bytes of the source (`offset=`, `len=`).
    Bytes {
        /// Start of the range in bytes; a user's value is a multiple of 512.
        offset: u64,
        /// Length of the range in bytes, at least one; `None` means up to the end of the source.
        len: Option<u64>,
    },
    /// A partition by number, counted as Linux counts: logical partitions start at 5.
    Partition(u32),
}

/// Whether the partitions of a disk appear as files beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Partitions {
    /// Only the disk is visible.
    #[default]
    Hidden,
    /// Each partition is a file `NAME.pN` (`partitions`).
    Shown,
}

/// Data that is copied up into the overlay without being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyUp {
    /// Copy up data that is read (`cow-on-read`).
    pub read: bool,
    /// Copy up data that is prefetched (`cow-on-cache`).
    pub cache: bool,
}

/// Storage of the changes in an overlay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlayKind {
    /// A data file with the changed blocks, and a map of them.
    #[default]
    Blocks,
    /// A file with the whole disk, which shares the base's blocks on the host (a reflink copy).
    Reflink,
}

impl OverlayKind {
    /// Returns whether this is [`OverlayKind::Blocks`].
    #[must_use]
    pub fn is_blocks(&self) -> bool {
        *self == Self::Blocks
    }
}

/// Source of a disk's data.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A file or a block device, by absolute path.
    File(PathBuf),
    /// An image on a server.
    Remote(Box<RemoteSpec>),
    /// All zeros; the size in bytes.
    Blank(u64),
    /// No stored data: written data is streamed out, or the data read is streamed in.
    Stream(Box<StreamSpec>),
}

impl DiskSource {
    /// Returns the paths of this host that are opened for the source: the file, or the directory of
    /// what is fetched.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        match self {
            Self::File(path) => Some(path),
            Self::Remote(remote) => remote.read_cache.as_ref(),
            Self::Blank(_) | Self::Stream(_) => None,
        }
        .into_iter()
    }
}

/// Destination of writes to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskMode {
    /// Into an overlay; the base is never modified.
    #[default]
    Cow,
    /// Nowhere: writes are refused.
    ReadOnly,
    /// Directly into the base.
    ReadWrite,
}

impl DiskMode {
    /// Every mode with its spelling.
    const NAMES: &'static [(&'static str, Self)] =
        &[("cow", Self::Cow), ("ro", Self::ReadOnly), ("rw", Self::ReadWrite)];
}

impl fmt::Display for DiskMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cow => "cow",
            Self::ReadOnly => "ro",
            Self::ReadWrite => "rw",
        })
    }
}

/// Format of a base, under qemu's name for it. Module `base` decides which formats can be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// Plain bytes.
    Raw,
    /// qemu's own format, since 2008.
    Qcow2,
    /// The predecessor of qcow2.
    Qcow,
    /// QEMU enhanced disk.
    Qed,
    /// VMware's format.
    Vmdk,
    /// Hyper-V's format.
    Vhdx,
    /// Virtual PC's format; `vpc` is qemu's name for it, and `vhd` is accepted too.
    Vhd,
    /// VirtualBox's format.
    Vdi,
    /// Parallels' format.
    Parallels,
    /// Encrypted with LUKS.
    Luks,
    /// Apple's format.
    Dmg,
    /// Expert Witness, EnCase's format.
    Ewf,
    /// Advanced Forensic Format.
    Aff,
}

impl Format {
    /// Every format with its spellings; the first spelling is the one shown. The spellings are also
    /// the suffixes of such files.
    const NAMES: &'static [(&'static str, Self)] = &[
        ("raw", Self::Raw),
        ("qcow2", Self::Qcow2),
        ("qcow", Self::Qcow),
        ("qed", Self::Qed),
        ("vmdk", Self::Vmdk),
        ("vhdx", Self::Vhdx),
        ("vpc", Self::Vhd),
        ("vhd", Self::Vhd),
        ("vdi", Self::Vdi),
        ("parallels", Self::Parallels),
        ("luks", Self::Luks),
        ("dmg", Self::Dmg),
        ("ewf", Self::Ewf),
        ("e01", Self::Ewf),
        ("E01", Self::Ewf),
        ("aff", Self::Aff),
    ];
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let named = Self::NAMES.iter().find(|(_, format)| format == self);
        f.write_str(named.map_or("raw", |(name, _)| name))
    }
}

impl FromStr for Format {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        error::parse_choice("format", text, Self::NAMES)
    }
}

/// Caching of the disks' data by the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CacheMode {
    /// The mode that suits the disks.
    #[default]
    Auto,
    /// No cache: every read and write reaches cowslip.
    None,
    /// The kernel caches reads and writes, and delays writes.
    Writeback,
}

impl FromStr for CacheMode {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let names = [("auto", Self::Auto), ("none", Self::None), ("writeback", Self::Writeback)];
        error::parse_choice("cache", text, &names)
    }
}

/// Effect of a truncate on a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resize {
    /// The disk is resized, as a plain file would be.
    #[default]
    Follow,
    /// Other sizes are refused, and `O_TRUNC` discards the data (`resize=off`).
    Fixed,
}

/// Whether the kernel may read and write the file of a disk without an overlay directly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passthrough {
    /// Off: the daemon does the I/O, bounds every wait, and notices missing files.
    #[default]
    Off,
    /// On, where the kernel supports it: as fast as the file, but with no bound on waiting.
    On,
}

/// Whether I/O on a disk's files bypasses the host's page cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// Off: the host caches the data, as for any file.
    #[default]
    Off,
    /// On: data is read from and written to the device directly (`O_DIRECT`).
    On,
}

/// Whether the base is locked as qemu locks images.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// Locked, so that no virtual machine changes the base meanwhile.
    #[default]
    Qemu,
    /// Not locked (`lock=off`).
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn format_parses_every_spelling_and_displays_the_first() {
        for (name, format) in Format::NAMES {
            assert_eq!(name.parse::<Format>().unwrap(), *format);
            assert_eq!(format.to_string().parse::<Format>().unwrap(), *format);
        }
        assert_eq!(Format::Vhd.to_string(), "vpc");
    }

    #[test]
    fn mode_displays_as_it_is_spelled() {
        for (name, mode) in DiskMode::NAMES {
            assert_eq!(mode.to_string(), *name);
        }
    }

    #[test]
    fn unknown_format_error_suggests_the_nearest() {
        assert_eq!(
            "qcow3".parse::<Format>().unwrap_err().to_string(),
            "unknown format 'qcow3'; did you mean 'qcow2'?"
        );
    }
}
