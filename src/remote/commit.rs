//! Commit into an image on a server: the image is written over the connections by which it is read.
//!
//! ```text
//!   RemoteBase ──── begin_commit ───▶ RemoteDisk ──── end_commit ───▶ RemoteBase
//!   kept on this host                 asks the server                 a new identity, and nothing kept yet
//! ```
//!
//! What was kept on this host is discarded first, durably: whoever opens the image later must not take
//! it for what the image holds by then. A commit that fails leaves the RemoteDisk in place, and the next
//! one goes on with it.

use std::sync::Arc;

use super::base::RemoteBase;
use super::error::RemoteError;
use super::image::RemoteImage;
use super::open::{base_over, count_users, discard, lock_for_change, replace_open, unreadable};
use super::samples::{check_identity, identity_of};
use super::writable::RemoteDisk;
use super::writer_guard::WriterGuard;
use crate::config::{Protocol, RemoteAddress};

fn refused(address: &RemoteAddress, why: impl Into<String>) -> RemoteError {
    RemoteError::Refused { address: address.clone(), why: why.into() }
}

impl RemoteImage {
    /// Returns the disk that writes to this image, and that reads it from now on. No other disk of this
    /// process may use the image.
    ///
    /// # Errors
    /// [`RemoteError`], for the user.
    pub fn begin_commit(&self) -> Result<Arc<RemoteDisk>, RemoteError> {
        let base = match self {
            Self::Cached(shared) => shared.base(),
            Self::Direct(disk) => return Ok(Arc::clone(disk)),
        };
        let address = base.address();
        let read_only = match address.protocol() {
            Protocol::Nbd => "its server exports it read-only: have it exported for writing",
            Protocol::Http => {
                "an image behind HTTP is only read: copy the disk out, or rebase the overlay to a \
                 file or an NBD server that has the same image"
            }
        };
        let transport = base.writable().ok_or_else(|| refused(address, read_only))?;
        let guard = WriterGuard::new(address)?;
        if count_users(address) > 1 {
            let why = "another disk of this mount has it as its base too: remove that disk first";
            return Err(refused(address, why));
        }
        let mut place = base.place_lock().lock();
        if let Some(lock) = &*place {
            lock_for_change(base.spec(), lock)?;
        }
        discard(base.spec(), base.cache())?;
        let disk = RemoteDisk::new(base.spec().clone(), Arc::clone(transport), Some(guard))
            .map_err(|error| unreadable(address, &error))?;
        disk.hold_place(place.take());
        transport.set_identity_check(disk.identity_check());
        Ok(Arc::new(disk))
    }
}

impl RemoteDisk {
    /// Returns the base that reads the image after a commit, and keeps what it reads on this host.
    ///
    /// # Errors
    /// [`RemoteError`], for the user.
    pub fn end_commit(&self) -> Result<Arc<RemoteBase>, RemoteError> {
        let transport = self.transport();
        let identity =
            identity_of(&**transport).map_err(|error| unreadable(self.address(), &error))?;
        transport.set_identity_check(check_identity(&**transport, &identity));
        self.hold_place(None);
        let base = base_over(self.spec(), identity, Arc::clone(transport) as _, None)?;
        let base = Arc::new(base.with_writable(Some(Arc::clone(transport))));
        replace_open(self.spec(), &base);
        Ok(base)
    }
}
