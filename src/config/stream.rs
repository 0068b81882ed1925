//! The specification of a stream: where it goes or comes from, and how far back it can be changed.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::PathBuf;

/// Default window in bytes: 16 MiB.
pub const DEFAULT_WINDOW: u64 = 16 << 20;

/// The specification of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StreamSpec {
    /// Size of the disk in bytes.
    pub size: u64,
    /// The caller's directory, where commands run; absolute.
    pub dir: PathBuf,
    /// Direction of the stream, with its sink or source.
    pub flow: Flow,
    /// Number of bytes from the frontier on that can be rewritten.
    pub window: u64,
    /// Number of bytes before the frontier that can still be read.
    pub read_window: u64,
    /// Maximum number of bytes held beyond the window. `None` means that the key was not given:
    /// nothing is held, and a stream that only measures has no limit.
    pub spill: Option<u64>,
    /// Compression of spilled data in its file.
    pub compress: SpillCompression,
    /// Event that completes an output stream.
    pub finish: FinishWhen,
    /// End of the output.
    pub pad: Pad,
    /// Format of the output.
    pub frames: StreamFrames,
}

impl StreamSpec {
    /// Creates a stream of `size` bytes with defaults; the caller sets the direction.
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
    /// Every word with its meaning.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("explicit", Self::Explicit), ("umount", Self::Umount), ("close", Self::Close)];
}

impl StreamFrames {
    /// Every word with its meaning.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("raw", Self::Raw), ("rbd", Self::Rbd)];
}

impl SpillCompression {
    /// Every word with its meaning.
    pub(super) const NAMES: &'static [(&'static str, Self)] =
        &[("on", Self::Lz4), ("off", Self::Off), ("lz4", Self::Lz4)];
}

/// Direction of a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Output: written data goes to a sink.
    Out(SinkSpec),
    /// Input: the data read comes from a source.
    In {
        /// The source.
        source: SourceSpec,
        /// Whether the stream keeps all data.
        spool: Spool,
    },
}

/// The sink of an output stream. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkSpec {
    /// A named pipe, created if it is missing.
    Fifo(PathBuf),
    /// A file or a block device.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Whether an existing file is replaced.
        overwrite: Overwrite,
    },
    /// Standard input of a command.
    Command(Programs),
    /// Standard output of cowslip.
    Stdout,
    /// No sink: the stream only measures what it would need.
    Measure,
}

/// The source of an input stream. Paths are absolute.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceSpec {
    /// A named pipe.
    Fifo(PathBuf),
    /// A file or a device, from its start.
    File(PathBuf),
    /// Standard output of a command.
    Command(Programs),
    /// Standard input of cowslip.
    Stdin,
}

/// The programs of a pipeline, each with its arguments; there is at least one program, and each has
/// at least a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Programs(pub Vec<Vec<OsString>>);

/// Whether an existing file may be replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// The file is kept, and what would replace it is refused.
    #[default]
    No,
    /// The file is replaced once the new one is complete.
    Yes,
}

/// Whether an input stream keeps all data, for random access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Spool {
    /// Keep only the read window.
    #[default]
    Off,
    /// Keep all data, in an unlinked sparse file.
    On,
}

/// Compression of spilled data in its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpillCompression {
    /// Uncompressed.
    #[default]
    Off,
    /// Compressed with LZ4.
    Lz4,
}

/// Event that completes an output stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FinishWhen {
    /// The command `cowslip finish`.
    #[default]
    Explicit,
    /// Unmount.
    Umount,
    /// Close of the file by the last writer.
    Close,
}

/// End of an output stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Pad {
    /// At the size of the disk.
    #[default]
    Size,
    /// At the end of the highest write (`pad=off`).
    Highest,
}

/// Format of an output stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StreamFrames {
    /// The bytes of the disk, in order.
    #[default]
    Raw,
    /// The records of an rbd diff, version 2.
    Rbd,
}

/// Quotes a word as a shell needs it.
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
