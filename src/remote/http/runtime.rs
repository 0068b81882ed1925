//! The threads on which all requests run.

use std::sync::LazyLock;

use tokio::runtime::{Builder, Handle, Runtime};

use super::error::HttpError;
use crate::host::os_message;

/// Threads that read answers, and store what was fetched. With TLS one does some 1 GB/s.
const WORKERS: usize = 2;
/// The most threads that look up names or run commands for credentials: the system's resolver may
/// wait for long, and many at a time only wait for the same answer.
const MAX_BLOCKING: usize = 8;

/// Started with the first image, and so after the daemon's fork. It lives as long as the process.
static RUNTIME: LazyLock<Result<Runtime, HttpError>> = LazyLock::new(|| {
    Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(MAX_BLOCKING)
        .thread_name("cowslip-http")
        .enable_all()
        .build()
        .map_err(|error| HttpError::Threads(os_message(&error)))
});

/// Returns the threads, started if they are not yet.
///
/// # Errors
/// [`HttpError::Threads`].
pub(super) fn handle() -> Result<Handle, HttpError> {
    match &*RUNTIME {
        Ok(runtime) => Ok(runtime.handle().clone()),
        Err(error) => Err(error.clone()),
    }
}
