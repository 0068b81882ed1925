//! The reason why a transfer ends, by the end that failed.

use std::io;

use super::error::TransferError;
use super::source::TransferSource;
use crate::host::os_message;

/// The end of the transfer that failed.
pub(super) enum SendError {
    Source(io::Error),
    Output(io::Error),
}

impl SendError {
    /// Returns the error for the user, of a transfer from `source`.
    pub(super) fn explain(self, source: &TransferSource) -> TransferError {
        match self {
            Self::Output(error) => TransferError::Output(os_message(&error)),
            Self::Source(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                source.shrunk_error()
            }
            Self::Source(error) => TransferError::host("read", source.path(), &error),
        }
    }
}
