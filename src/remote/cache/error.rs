//! Why there is no cache; each displays as one line for the user.

use std::io;
use std::path::PathBuf;

use crate::trust::TrustError;

/// The reason why a cache cannot be opened.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CacheError {
    /// The host's directory for temporary files takes none.
    #[error("no read cache can be made in '{}': {error}: set TMPDIR, or use read-cache=DIR", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// A system call on the host failed, or something else is in the place of a file.
    #[error("read cache '{}': {error}", dir.display())]
    Dir {
        /// The directory of the caches, or that of an image in it.
        dir: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// The directory is no cache, and not empty.
    #[error("'{}' is no read cache and not empty: name an empty or a new directory", .0.display())]
    NotACache(PathBuf),
    /// Another user could have written to the directory.
    #[error("read cache '{}' {error}", dir.display())]
    Untrusted {
        /// The directory of the caches, or that of an image in it.
        dir: PathBuf,
        /// The reason for the distrust.
        error: TrustError,
    },
    /// The directory has the format of another version.
    #[error("read cache '{}' was made by another version of cowslip: name another directory, or remove it", .0.display())]
    Version(PathBuf),
}
