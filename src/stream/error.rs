//! Why a sink or a source cannot be opened.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::lock::LockError;
use crate::base::self_reference::SelfReferenceError;
use crate::host::os_message;

/// Why a sink or a source cannot be opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum StreamOpenError {
    /// It lies in the mount that would need it.
    #[error(transparent)]
    SelfReference(#[from] SelfReferenceError),
    /// A disk uses what is to be replaced.
    #[error(transparent)]
    InUse(#[from] LockError),
    /// There is a file already.
    #[error("'{}' exists: add overwrite to replace it, or name another file", .0.display())]
    Exists(PathBuf),
    /// Another stream writes there.
    #[error("'{}' is being written by another stream: name another file", .0.display())]
    Busy(PathBuf),
    /// It is not what such a stream can use.
    #[error("'{}' is {what}: {remedy}", path.display())]
    WrongKind {
        /// Where.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A device is smaller than the disk.
    #[error(
        "'{}' has {size} bytes, and the stream {needed}: use a larger device, or a smaller stream",
        path.display()
    )]
    TooSmall {
        /// The device.
        path: PathBuf,
        /// Its bytes.
        size: u64,
        /// The bytes of the stream.
        needed: u64,
    },
    /// The host refuses.
    #[error("cannot {verb} '{}': {why}", path.display())]
    Host {
        /// What was tried.
        verb: &'static str,
        /// On what.
        path: PathBuf,
        /// What the host says.
        why: String,
    },
    /// A command cannot be started.
    #[error("{0}")]
    Command(String),
    /// A daemon has no standard input or output.
    #[error("{0} needs -f or run: a mount in the background has none")]
    NoStdio(&'static str),
    /// Images are not for terminals.
    #[error("{0} is a terminal: redirect it, or name a file")]
    Terminal(&'static str),
    /// The standard input or output cannot be used.
    #[error("cannot use {what}: {why}")]
    Stdio {
        /// Which, as asked for.
        what: &'static str,
        /// What the host says.
        why: String,
    },
}

impl StreamOpenError {
    pub(super) fn host(verb: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::Host { verb, path: path.to_owned(), why: os_message(error) }
    }

    pub(super) fn wrong_kind(path: &Path, what: &'static str, remedy: &'static str) -> Self {
        Self::WrongKind { path: path.to_owned(), what, remedy }
    }

    pub(super) fn stdio(what: &'static str, error: &io::Error) -> Self {
        Self::Stdio { what, why: os_message(error) }
    }
}
