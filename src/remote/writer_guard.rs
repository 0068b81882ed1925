//! The images that this process writes to (`mode=rw`, commit), which no other of its disks may use
//! meanwhile: NBD has no locks.

use parking_lot::Mutex;

use super::error::RemoteError;
use super::nbd::NbdTarget;
use crate::config::RemoteAddress;

/// The images that are written to, by their places.
static WRITTEN: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Returns the place of an image, the same for all spellings of its address. Two names of one host are two
/// places.
pub(super) fn place_of(address: &RemoteAddress) -> String {
    let target = NbdTarget::parse(std::ffi::OsStr::new(address.as_str()));
    target.map_or_else(|_| address.to_string(), |target| target.place())
}

/// Refuses an image that another disk of this process writes to.
///
/// # Errors
/// [`RemoteError::Refused`].
pub(super) fn check_not_written(address: &RemoteAddress) -> Result<(), RemoteError> {
    match WRITTEN.lock().contains(&place_of(address)) {
        true => Err(is_written(address)),
        false => Ok(()),
    }
}

fn is_written(address: &RemoteAddress) -> RemoteError {
    let why = "another disk of this mount writes to it (mode=rw, or a commit)".to_owned();
    RemoteError::Refused { address: address.clone(), why }
}

/// Keeps other disks from an image that is written to.
pub(super) struct WriterGuard(String);

impl WriterGuard {
    /// Keeps other disks from the image at `address`.
    ///
    /// # Errors
    /// [`RemoteError::Refused`] when another disk writes to it.
    pub(super) fn new(address: &RemoteAddress) -> Result<Self, RemoteError> {
        let place = place_of(address);
        let mut written = WRITTEN.lock();
        if written.contains(&place) {
            return Err(is_written(address));
        }
        written.push(place.clone());
        Ok(Self(place))
    }
}

impl Drop for WriterGuard {
    fn drop(&mut self) {
        let mut written = WRITTEN.lock();
        if let Some(at) = written.iter().position(|place| *place == self.0) {
            written.swap_remove(at);
        }
    }
}
