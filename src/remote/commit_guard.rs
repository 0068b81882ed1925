//! The images that a commit of this process writes to, which no disk may open meanwhile.

use parking_lot::Mutex;

use super::error::RemoteError;
use crate::config::RemoteAddress;

/// The images that a commit writes to.
static COMMITTED: Mutex<Vec<RemoteAddress>> = Mutex::new(Vec::new());

/// Refuses to open an image while a commit writes to it.
///
/// # Errors
/// [`RemoteError::Refused`].
pub(super) fn check_not_committed(address: &RemoteAddress) -> Result<(), RemoteError> {
    match COMMITTED.lock().contains(address) {
        true => Err(in_commit(address)),
        false => Ok(()),
    }
}

fn in_commit(address: &RemoteAddress) -> RemoteError {
    let why = "a commit writes to it: wait for its end".to_owned();
    RemoteError::Refused { address: address.clone(), why }
}

/// Keeps other disks from an image that a commit writes to.
pub(super) struct CommitGuard(RemoteAddress);

impl CommitGuard {
    /// Keeps other disks from the image at `address`.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] when another commit writes to it.
    pub(super) fn new(address: &RemoteAddress) -> Result<Self, RemoteError> {
        let mut committed = COMMITTED.lock();
        if committed.contains(address) {
            return Err(in_commit(address));
        }
        committed.push(address.clone());
        Ok(Self(address.clone()))
    }
}

impl Drop for CommitGuard {
    fn drop(&mut self) {
        COMMITTED.lock().retain(|address| *address != self.0);
    }
}
