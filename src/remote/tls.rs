//! The files of TLS: the authorities to trust, and our own certificate.

use std::path::PathBuf;

#[cfg(feature = "network")]
mod load;

#[cfg(feature = "network")]
pub(super) use load::TlsFileError;

/// The files of TLS, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct TlsFiles {
    /// The authorities that are trusted; `None` for those of the system.
    pub(crate) authorities: Option<PathBuf>,
    /// Our certificate, with those between it and the authority, and its key.
    pub(crate) identity: Option<(PathBuf, PathBuf)>,
}
