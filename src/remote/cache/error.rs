//! Why there is no cache; each displays as one line for the user.

use std::io;
use std::path::PathBuf;

/// The reason why a cache cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The host's directory for temporary files takes none.
    #[error("no read cache can be made in '{}': {error}: set TMPDIR, or use read-cache=DIR", dir.display())]
    Temporary {
        /// The directory.
        dir: PathBuf,
        /// The host's error.
        error: io::Error,
    },
}
