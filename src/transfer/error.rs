//! The error of a transfer.

use std::io;
use std::path::{Path, PathBuf};

use crate::host::os_message;
use crate::part_file::PartFileError;

/// The reason why a transfer failed; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The request cannot be carried out; nothing was written.
    #[error("{0}")]
    Refused(String),
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
    /// The output stream cannot be written.
    #[error("cannot write the stream: {0}")]
    Output(String),
    /// The input stream is cut or damaged.
    #[error("{what}: {left}")]
    Broken {
        /// The defect and its position.
        what: String,
        /// The remains of the transfer, and what to do next.
        left: String,
    },
    /// The transfer failed after it had begun; the line describes what is left.
    #[error("{0}")]
    AfterStart(String),
}

impl TransferError {
    /// Creates the error for a failed `verb` on the file at `path`.
    pub(super) fn host(verb: &'static str, path: &Path, error: &io::Error) -> Self {
        Self::Host { verb, path: path.to_owned(), why: os_message(error) }
    }
}

impl From<PartFileError> for TransferError {
    fn from(error: PartFileError) -> Self {
        match error {
            PartFileError::Busy(path) => {
                let path = path.display();
                let line = format!("'{path}' is being received by another cowslip: wait for it");
                Self::Refused(line)
            }
            PartFileError::Host { verb, path, error } => Self::host(verb, &path, &error),
            error => Self::Refused(error.to_string()),
        }
    }
}
