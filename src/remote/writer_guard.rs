//! The images that this process writes to (`mode=rw`, commit), which no other of its disks may use
//! meanwhile: NBD has no locks.

use parking_lot::Mutex;

use super::error::RemoteError;
use crate::config::RemoteAddress;

/// The images that are written to.
static WRITTEN: Mutex<Vec<RemoteAddress>> = Mutex::new(Vec::new());

/// Refuses an image that another disk of this process writes to.
///
/// # Errors
/// [`RemoteError::Refused`].
pub(super) fn check_not_written(address: &RemoteAddress) -> Result<(), RemoteError> {
    match WRITTEN.lock().iter().any(|other| other.is_same_place(address)) {
        true => Err(is_written(address)),
        false => Ok(()),
    }
}

fn is_written(address: &RemoteAddress) -> RemoteError {
    let why = "another disk of this mount writes to it (mode=rw, or a commit)".to_owned();
    RemoteError::Refused { address: address.clone(), why }
}

/// Keeps other disks from an image that is written to.
pub(super) struct WriterGuard(RemoteAddress);

impl WriterGuard {
    /// Keeps other disks from the image at `address`.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] when another disk writes to it.
    pub(super) fn new(address: &RemoteAddress) -> Result<Self, RemoteError> {
        let mut written = WRITTEN.lock();
        if written.iter().any(|other| other.is_same_place(address)) {
            return Err(is_written(address));
        }
        written.push(address.clone());
        Ok(Self(address.clone()))
    }
}

impl Drop for WriterGuard {
    fn drop(&mut self) {
        let mut written = WRITTEN.lock();
        if let Some(at) = written.iter().position(|address| *address == self.0) {
            written.swap_remove(at);
        }
    }
}
