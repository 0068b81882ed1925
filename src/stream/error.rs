//! The error of opening a sink or a source.

use std::io;
use std::path::{Path, PathBuf};

use crate::base::lock::LockError;
use crate::base::self_reference::SelfReferenceError;
use crate::host::os_message;

/// The reason why a sink or a source cannot be opened; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum StreamOpenError {
    /// The path lies in the mount that would need it.
    #[error(transparent)]
    SelfReference(#[from] SelfReferenceError),
    /// A disk uses the file that is to be replaced, or the device that is to be written.
    #[error(transparent)]
    InUse(#[from] LockError),
    /// The file exists already.
    #[error("'{}' exists: add overwrite to replace it, or name another file", .0.display())]
    Exists(PathBuf),
    /// Another stream writes to the file.
    #[error("'{}' is being written by another stream: name another file", .0.display())]
    Busy(PathBuf),
    /// The path names something that such a stream cannot use.
    #[error("'{}' is {what}: {remedy}", path.display())]
    WrongKind {
        /// The path.
        path: PathBuf,
        /// The kind of file found there.
        what: &'static str,
        /// What to do instead.
        remedy: &'static str,
    },
    /// A device is smaller than the disk.
    #[error(
        "'{}' has {size} bytes, and the stream {needed}: use a larger device, or a smaller stream",
        path.display()
    )]
    TooSmall {
        /// The path of the device.
        path: PathBuf,
        /// The size of the device in bytes.
        size: u64,
        /// The size of the stream in bytes.
        needed: u64,
    },
    /// The host returned an error.
    #[error("cannot {verb} '{}': {why}", path.display())]
    Host {
        /// The operation that failed, as a verb for the message.
        verb: &'static str,
        /// The path the operation was for.
        path: PathBuf,
        /// The host's message.
        why: String,
    },
    /// A command cannot be started.
    #[error("{0}")]
    Command(String),
    /// The daemon has no standard input and output.
    #[error("{0} needs -f or run: a mount in the background has none")]
    NoStdio(&'static str),
    /// Standard input or output is a terminal.
    #[error("{0} is a terminal: redirect it, or name a file")]
    Terminal(&'static str),
    /// Standard input or output cannot be used.
    #[error("cannot use {what}: {why}")]
    Stdio {
        /// The key and its value, `to=stdout` or `from=stdin`.
        what: &'static str,
        /// The reason.
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
