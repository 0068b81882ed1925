//! Requests to a transport that a thread waits for.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

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
