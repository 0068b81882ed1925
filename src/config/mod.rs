//! What the user asked for: disk specs, sizes, ranges, mount options and the TOML file, as plain
//! structs.
//!
//! ```text
//!   vm=/srv/vm.img,overlay=/srv/vm.d,block=64K      [[disk]]
//!   ^^ ^^^^^^^^^^^ ^^^^^^^^^^^^^^^^^ ^^^^^^^^^      name = "vm"
//!   |  source      key     value     another        source = "/srv/vm.img"
//!   name                                            overlay = "/srv/vm.d"
//! ```
//!
//! Both spellings become a name, a source and a list of keys, and from there on they share the
//! code: the table in `keys/` is the only place that knows a key, its type and the disks it is
//! for.
//!
//! Nothing here touches a file. A relative path is joined to the directory the caller names and
//! is not looked at. The one question about the outside, whether a path with a comma in it exists
//! (so that the error can say how to write it), is a closure the caller gives.
//!
//! Every error is one line that says what is wrong, where, and what to write instead; what the
//! user typed is shown with its control characters escaped.

mod command_line;
mod disk;
mod error;
mod flow;
mod keys;
mod options;
mod size;
mod stream;
mod toml_file;

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use disk::{check_cache, check_names, parse_disk};
pub use error::SpecError;
pub use options::{MountOptions, parse_mount_options};
pub use size::{MAX_SIZE, format_size, format_zeroed, parse_range, parse_size};
pub use stream::{
    DEFAULT_WINDOW, FinishWhen, Flow, Overwrite, Pad, Programs, SinkSpec, SourceSpec,
    SpillCompression, Spool, StreamFrames, StreamSpec,
};
pub use toml_file::{CacheMode, Config, parse_config};

/// One disk, as asked for. `None` means the key was not given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskSpec {
    /// The name of the file in the mount: 1 to 255 bytes, no `/`, no control character.
    pub name: String,
    /// What is under the disk.
    pub source: DiskSource,
    /// What becomes of writes.
    pub mode: DiskMode,
    /// The format of the base; `None`: raw, unless it looks like another.
    pub format: Option<Format>,
    /// How much of the source it is. Only a file has parts.
    pub part: SourcePart,
    /// Whether its partitions are files beside it.
    pub partitions: Partitions,
    /// Where the changes are kept (absolute); `None`: they end with the mount. Only with
    /// [`DiskMode::Cow`], as are the five after it.
    pub overlay: Option<PathBuf>,
    /// How a new overlay keeps its changes.
    pub overlay_kind: OverlayKind,
    /// The overlay's block size in bytes: a power of two from 512 to 2 MiB.
    pub block: Option<u32>,
    /// The most the overlay may hold, in bytes; a write beyond is `ENOSPC`.
    pub limit: Option<u64>,
    /// The size to present instead of the source's, in bytes.
    pub size: Option<u64>,
    /// What a truncate does.
    pub resize: Resize,
    /// What is copied up into the overlay without being written.
    pub copy_up: CopyUp,
    /// The owner of the file.
    pub uid: Option<u32>,
    /// The group of the file.
    pub gid: Option<u32>,
    /// The permission bits of the file, at most `0o777`.
    pub perm: Option<u16>,
    /// Whether qemu's locks are taken on the base.
    pub locking: Locking,
    /// Whether the kernel may go straight to the file. Only without an overlay.
    pub passthrough: Passthrough,
    /// Whether its bytes pass by the host's page cache.
    pub direct: DirectIo,
}

impl DiskSpec {
    /// The disk `name` over `source`, no key given.
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

/// How much of its source a disk is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SourcePart {
    /// All of it.
    #[default]
    Whole,
    /// A run of its bytes (`offset=`, `len=`).
    Bytes {
        /// Where it begins; a multiple of 512, as written by a user.
        offset: u64,
        /// How many there are, at least one; `None`: all to the end.
        len: Option<u64>,
    },
    /// What its partition table calls so, counted as Linux counts: logical ones from 5 on.
    Partition(u32),
}

/// Whether the partitions of a disk are files beside it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Partitions {
    /// Only the disk is seen.
    #[default]
    Hidden,
    /// Each is `NAME.pN` (`partitions`).
    Shown,
}

/// What a disk copies up into its overlay without being written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CopyUp {
    /// What is read (`cow-on-read`).
    pub read: bool,
    /// What is prefetched (`cow-on-cache`).
    pub cache: bool,
}

/// How an overlay keeps the changes of its disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlayKind {
    /// The changed blocks in a file of their own, and a map of them.
    #[default]
    Blocks,
    /// The whole disk, in a file that shares the base's blocks on the host (a reflink copy).
    Reflink,
}

impl OverlayKind {
    /// Whether it is a block map.
    #[must_use]
    pub fn is_blocks(&self) -> bool {
        *self == Self::Blocks
    }
}

/// What is under a disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DiskSource {
    /// A file or a block device, by its absolute path.
    File(PathBuf),
    /// Nothing but zeros, this many bytes.
    Blank(u64),
    /// Nothing is under it: what is written flows away, or what is read flows in.
    Stream(Box<StreamSpec>),
}

/// What becomes of writes to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskMode {
    /// They go to an overlay; the base is never touched.
    #[default]
    Cow,
    /// They are refused.
    ReadOnly,
    /// They go straight to the base.
    ReadWrite,
}

impl DiskMode {
    /// Every mode and how it is written.
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

/// The format of a base, under qemu's names. Which of them can be opened is `base`'s to say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The bytes as they are.
    Raw,
    /// qemu's own, since 2008.
    Qcow2,
    /// Its predecessor.
    Qcow,
    /// qemu's enhanced disk.
    Qed,
    /// VMware's.
    Vmdk,
    /// Hyper-V's.
    Vhdx,
    /// Virtual PC's; qemu calls it `vpc`, and `vhd` is understood.
    Vhd,
    /// VirtualBox's.
    Vdi,
    /// Parallels'.
    Parallels,
    /// Encrypted.
    Luks,
    /// Apple's.
    Dmg,
}

impl Format {
    /// Every format and how it is written; the first name of each is the one shown. They are
    /// the suffixes of such files too.
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
    ];
}

impl Format {
    /// Whether this version reads images of it.
    #[must_use]
    pub fn is_supported(self) -> bool {
        matches!(self, Self::Raw | Self::Qcow2)
    }
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

/// What a truncate does to a disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resize {
    /// It resizes the disk, as it would a plain file.
    #[default]
    Follow,
    /// Other sizes are refused, and `O_TRUNC` discards (`resize=off`).
    Fixed,
}

/// Who reads and writes the file that a disk without an overlay is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Passthrough {
    /// The daemon, which bounds every wait and notices what is missing.
    #[default]
    Off,
    /// The kernel, where it can: as fast as the file, and as patient.
    On,
}

/// How the host keeps the bytes of a disk's files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectIo {
    /// In its page cache, as those of any file.
    #[default]
    Off,
    /// Not at all: they are read from the device and written to it (`O_DIRECT`).
    On,
}

/// Whether qemu's locks are taken on a base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Locking {
    /// They are, so that no virtual machine changes the base meanwhile.
    #[default]
    Qemu,
    /// They are not (`lock=off`).
    Off,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_of_a_format_is_read_and_the_first_is_shown() {
        for (name, format) in Format::NAMES {
            assert_eq!(name.parse::<Format>().unwrap(), *format);
            assert_eq!(format.to_string().parse::<Format>().unwrap(), *format);
        }
        assert_eq!(Format::Vhd.to_string(), "vpc");
    }

    #[test]
    fn every_mode_is_shown_as_it_is_written() {
        for (name, mode) in DiskMode::NAMES {
            assert_eq!(mode.to_string(), *name);
        }
    }

    #[test]
    fn an_unknown_format_is_refused_with_the_nearest() {
        assert_eq!(
            "qcow3".parse::<Format>().unwrap_err().to_string(),
            "unknown format 'qcow3'; did you mean 'qcow2'?"
        );
    }
}
