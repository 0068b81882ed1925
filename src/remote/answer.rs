//! Requests to a transport that a thread waits for.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;

use super::transport::Transport;
use crate::arrival::Arrival;
use crate::host::os_error;

/// The answer to one request, to be waited for.
pub(super) struct Answer<T> {
    arrival: Arrival,
    value: Arc<Mutex<Option<T>>>,
}

/// Begins a request with `begin`, which gets the receiver of its answer.
pub(super) fn answer_of<T: Send + 'static>(
    begin: impl FnOnce(Box<dyn FnOnce(io::Result<T>) + Send>),
) -> Answer<T> {
    let (arrival, value) = (Arrival::default(), Arc::new(Mutex::new(None)));
    let (told, kept) = (arrival.clone(), Arc::clone(&value));
    begin(Box::new(move |result| match result {
        Ok(value) => {
            *kept.lock() = Some(value);
            told.complete(Ok(()));
        }
        Err(error) => told.complete(Err(error.raw_os_error().unwrap_or(libc::EIO))),
    }));
    Answer { arrival, value }
}

impl<T> Answer<T> {
    /// Waits for the answer.
    ///
    /// # Errors
    /// The errno of the request.
    pub(super) fn wait(self) -> io::Result<T> {
        self.arrival.wait()?;
        self.value.lock().take().ok_or_else(|| os_error(libc::EIO))
    }
}

/// Reads `range` of an image, aligned or not and inside its size, and waits for all of it.
///
/// # Errors
/// The errno of the first request that failed.
pub(super) fn read_range(transport: &dyn Transport, range: &Range<u64>) -> io::Result<Vec<u8>> {
    let limits = transport.limits();
    let alignment = u64::from(limits.alignment.max(1));
    let outer = range.start - range.start % alignment
        ..range.end.next_multiple_of(alignment).min(transport.size());
    let max_len = u64::from(limits.max_len).max(alignment);
    let step = max_len - max_len % alignment;
    let starts = (outer.start..outer.end).step_by(usize::try_from(step).unwrap_or(usize::MAX));
    let parts: Vec<_> = starts
        .map(|at| {
            let part = at..outer.end.min(at + step);
            answer_of(|done| transport.read(part, done))
        })
        .collect();
    let mut bytes = Vec::new();
    for part in parts {
        bytes.extend(part.wait()?);
    }
    bytes.truncate(usize::try_from(range.end - outer.start).unwrap_or(usize::MAX));
    bytes.drain(..usize::try_from(range.start - outer.start).unwrap_or(usize::MAX));
    Ok(bytes)
}

/// Whether the server did not answer in time, or has another image by now.
pub(super) fn is_outage(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIMEDOUT | libc::ESTALE))
}

/// Returns the error that users of the disk get: `EIO` for an outage, as of any disk.
pub(super) fn as_told(error: &io::Error) -> io::Error {
    os_error(if is_outage(error) { libc::EIO } else { error.raw_os_error().unwrap_or(libc::EIO) })
}
