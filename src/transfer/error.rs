//! Why a transfer did not come to its end.

use std::io;
use std::path::{Path, PathBuf};

use crate::host::os_message;
use crate::part_file::PartFileError;

/// Why a transfer failed; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// It cannot be done as asked; nothing was written.
    #[error("{0}")]
    Refused(String),
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
    /// The stream cannot be written.
    #[error("cannot write the stream: {0}")]
    Output(String),
    /// The stream is cut or damaged.
    #[error("{what}: {left}")]
    Broken {
        /// What is wrong with it, and where.
        what: String,
        /// What is left of it, and what to do.
        left: String,
    },
    /// It failed after the transfer had begun; the line says what is left.
    #[error("{0}")]
    AfterStart(String),
}

impl TransferError {
    /// The host refused to `verb` the file at `path`.
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
