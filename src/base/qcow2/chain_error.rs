//! The error of opening a chain of qcow2 images.

use std::fmt;
use std::path::{Path, PathBuf};

use super::super::BaseError;
use super::header::HeaderError;
use super::tables::MAX_TABLE_BYTES;

/// The most images of a chain.
pub(super) const MAX_BACKING_FILES: usize = 256;

/// The use of a file that an image names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileRole {
    /// The backing file, which may also lie below the directory of the first image.
    Backing,
    /// The external data file, which may lie only below a directory that the user named.
    Data,
}

impl fmt::Display for FileRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Backing => "backing file",
            Self::Data => "data file",
        })
    }
}

/// The reason why a chain is not opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum ChainError {
    /// The header of an image is damaged or not supported.
    #[error("'{}' {error}", path.display())]
    Header {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: HeaderError,
    },
    /// The name of a backing file is not a plain file name.
    #[error(
        "'{}' names '{name}' as its backing file, and only names of files are followed: put the path there with qemu-img rebase -u",
        path.display()
    )]
    NotAFileName {
        /// The image.
        path: PathBuf,
        /// The recorded name.
        name: String,
    },
    /// An image on a server names a file, and there are none beside it.
    #[error(
        "'{}' is on a server and names '{name}' as its {role}, which is not followed: make one image of the two with qemu-img convert -O qcow2{}",
        path.display(), local_remedy(name)
    )]
    NamedByServer {
        /// The image.
        path: PathBuf,
        /// The recorded name.
        name: String,
        /// The use of the named file.
        role: FileRole,
    },
    /// The image does not record the format of its backing file, as images of old versions of QEMU.
    #[error(
        "'{}' does not say which format its backing file '{name}' has: write it down with qemu-img rebase -u -F FORMAT -b '{name}' '{}'",
        path.display(), path.display()
    )]
    NoFormat {
        /// The image.
        path: PathBuf,
        /// Its backing file.
        name: String,
    },
    /// The backing file has a format that is not read here.
    #[error("'{}' has a backing file '{name}' in the format {format}: only raw and qcow2 are read", path.display())]
    UnsupportedFormat {
        /// The image.
        path: PathBuf,
        /// Its backing file.
        name: String,
        /// The recorded format.
        format: String,
    },
    /// A file that an image names is not below an allowed directory.
    #[error(
        "'{}' needs '{}', which is not below a directory that is allowed: add --allow-backing {} if you trust the image",
        path.display(), needed.display(), needed.parent().unwrap_or(Path::new("/")).display()
    )]
    NotAllowed {
        /// The image.
        path: PathBuf,
        /// The file that the image names.
        needed: PathBuf,
    },
    /// The image has its data in another file, whose name it does not record.
    #[error("'{}' has its data in another file and does not say in which", .0.display())]
    NoDataFile(PathBuf),
    /// The chain leads back to one of its images.
    #[error("'{}' is its own backing file, in the end", .0.display())]
    Loop(PathBuf),
    /// The chain is too long.
    #[error("'{}' has more than {MAX_BACKING_FILES} backing files below it", .0.display())]
    TooDeep(PathBuf),
    /// The tables of the image and of those above it exceed the memory budget.
    #[error(
        "'{}' brings the tables of the images to more than {} MiB: make the chain shorter, or its clusters larger, with qemu-img convert",
        .0.display(), MAX_TABLE_BYTES >> 20
    )]
    TooLarge(PathBuf),
    /// A file that an image names cannot be opened.
    #[error("'{}' needs another file: {error}", path.display())]
    NeededFile {
        /// The image.
        path: PathBuf,
        /// The reason.
        error: Box<BaseError>,
    },
}

/// Returns what also helps if `name` is the path of a file of this host, as the end of a line.
fn local_remedy(name: &str) -> String {
    match Path::new(name).parent() {
        Some(dir) if name.starts_with('/') => format!(
            ", or add --allow-backing {} if it is a file of this host and you trust the image",
            dir.display()
        ),
        _ => String::new(),
    }
}
