//! What is asked for of a stream: where it goes or comes from, and how far back it can be changed.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

/// The window when none is given: 16 MiB.
pub const DEFAULT_WINDOW: u64 = 16 << 20;

/// A stream, as asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// The size of the disk in bytes.
    pub size: u64,
    /// The caller's directory (absolute): commands run there.
    pub dir: PathBuf,
    /// Which way it flows.
    pub flow: Flow,
    /// How many bytes from the frontier on can be rewritten.
    pub window: u64,
    /// How many bytes before the frontier can still be read.
    pub read_window: u64,
    /// The most that is held beyond the window, in bytes; `None`: not given, which is nothing,
    /// and no limit for a stream that only measures.
    pub spill: Option<u64>,
    /// What becomes of spilled data in its file.
    pub compress: SpillCompression,
    /// When an output stream is complete.
    pub finish: FinishWhen,
    /// Where it ends.
    pub pad: Pad,
    /// What goes over the wire.
    pub frames: StreamFrames,
}

impl StreamSpec {
    /// A stream of `size` bytes, no key given; whoever makes it says which way it flows.
    pub(super) fn new(size: u64, dir: PathBuf) -> Self {
        Self {
            size,
            dir,
            flow: Flow::Out(SinkSpec::Measure),
            window: DEFAULT_WINDOW,
            read_window: 0,
            spill: None,
            compress: SpillCompression::default(),
            finish: FinishWhen::default(),
            pad: Pad::default(),
            frames: StreamFrames::default(),
        }
    }
}

impl FinishWhen {
    /// Every word and what it means.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("explicit", Self::Explicit), ("umount", Self::Umount), ("close", Self::Close)];
}

impl StreamFrames {
    /// Every word and what it means.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("raw", Self::Raw), ("rbd", Self::Rbd)];
}

impl SpillCompression {
    /// Every word and what it means.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("on", Self::Lz4), ("off", Self::Off), ("lz4", Self::Lz4)];
}

/// Which way a stream flows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    /// What is written leaves for the target.
    Out(SinkSpec),
    /// What is read comes from the supply.
    In {
        /// Where from.
        source: SourceSpec,
        /// Whether all of it is kept.
        spool: Spool,
    },
}

/// Where an output stream goes. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkSpec {
    /// A named pipe, made if it is missing.
    Fifo(PathBuf),
    /// A file or a block device.
    File {
        /// Where.
        path: PathBuf,
        /// What becomes of a file that is there.
        overwrite: Overwrite,
    },
    /// The input of a command.
    Command(Programs),
    /// The standard output of cowslip.
    Stdout,
    /// Nowhere: only what it needs is found out.
    Measure,
}

/// Where an input stream comes from. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A named pipe.
    Fifo(PathBuf),
    /// A file or a device, from its beginning.
    File(PathBuf),
    /// The output of a command.
    Command(Programs),
    /// The standard input of cowslip.
    Stdin,
}

/// The programs of a pipe, each with its arguments; neither is ever empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs(pub Vec<Vec<OsString>>);

/// Whether an existing file may be replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// It is refused.
    #[default]
    No,
    /// It is replaced when the stream is complete.
    Yes,
}

/// Whether an input stream keeps everything, for random access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spool {
    /// Only its read-window.
    #[default]
    Off,
    /// All of it, in an unlinked sparse file.
    On,
}

/// What becomes of spilled data in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpillCompression {
    /// It is stored as it is.
    #[default]
    Off,
    /// It is compressed with LZ4.
    Lz4,
}

/// When an output stream is complete.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FinishWhen {
    /// When `cowslip finish` says so.
    #[default]
    Explicit,
    /// At unmount.
    Umount,
    /// When the last writer has released it.
    Close,
}

/// Where an output stream ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pad {
    /// At the size of the disk.
    #[default]
    Size,
    /// At the end of the highest write (`pad=off`).
    Highest,
}

/// What goes over the wire.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamFrames {
    /// The bytes of the disk, in order.
    #[default]
    Raw,
    /// The records of an rbd diff, version 2.
    Rbd,
}

/// A word as it would have to be written.
fn shell_quoted(word: &OsStr) -> String {
    let text = word.to_string_lossy();
    let is_plain = |c: char| c.is_alphanumeric() || "-_./:=,+@%^~".contains(c);
    match text.chars().all(is_plain) && !text.is_empty() {
        true => text.into_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

impl fmt::Display for Programs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, words) in self.0.iter().enumerate() {
            if number > 0 {
                f.write_str(" | ")?;
            }
            let words: Vec<String> = words.iter().map(|word| shell_quoted(word)).collect();
            f.write_str(&words.join(" "))?;
        }
        Ok(())
    }
}
