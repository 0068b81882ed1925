//! A size that changes below the kernel: by a revert or a reset, not by a truncation that comes through it.
//!
//! With `FUSE_WRITEBACK_CACHE` the kernel alone says how long a regular file is: as long as it has the
//! inode it ignores the size in every reply but that to a truncation (`fuse_change_attributes` in
//! fs/fuse/inode.c). What lies past the end that it knows it takes for a hole: a write of a part of
//! a page there would bring zeros for the rest. So the disk gets another inode number with its new
//! size, as a file that another one replaced:
//!
//! ```text
//!   gate: nobody has it open, or the change is refused ──▶ opens are held ──▶ the layers change
//!   gate open: another number ──▶ opens go on, by the new number only ──▶ the kernel drops the name
//! ```

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::Disk;
use super::operation_error::OperationError;
use crate::host::os_error;

/// How long handles that are being closed are waited for: RELEASE comes after close(2) has returned.
const RELEASE_TIMEOUT: Duration = Duration::from_millis(500);
/// Interval at which they are looked for.
const RELEASE_INTERVAL: Duration = Duration::from_millis(5);

/// When an operation may change the size of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeChange {
    /// At any time: the kernel takes the new size.
    Seen,
    /// Only while nobody has the disk open: the kernel keeps the size of an inode. Opens are refused
    /// until the disk has [another number](Disk::take_renumbering).
    Unseen,
}

impl Disk {
    /// Waits for handles that are being closed, where a change to `size` bytes needs that.
    pub(super) fn await_closed(&self, size: u64, change: SizeChange) {
        let until = Instant::now() + RELEASE_TIMEOUT;
        let is_in_the_way = || {
            change == SizeChange::Unseen
                && size != self.size()
                && self.references.handle_count() > 0
        };
        while is_in_the_way() && Instant::now() < until {
            std::thread::sleep(RELEASE_INTERVAL);
        }
    }

    /// Begins a change to `size` bytes, and holds opens if the kernel does not see it. The caller holds
    /// the gate exclusive.
    ///
    /// # Errors
    /// [`OperationError::OpenAtOldSize`]; [`OperationError::Busy`].
    pub(super) fn begin_size_change(
        &self,
        size: u64,
        change: SizeChange,
    ) -> Result<(), OperationError> {
        let from = self.size();
        if change == SizeChange::Seen || size == from {
            return Ok(());
        }
        if self.references.opens_are_held() {
            return Err(OperationError::Busy("another change of its size"));
        }
        match self.references.hold_opens() {
            true => Ok(()),
            false => Err(OperationError::OpenAtOldSize { from, to: size }),
        }
    }

    /// Whether the size has changed unseen, so that the caller is to give the disk another inode number
    /// (`Catalog::renumber`) and then to [release](Self::release_opens) opens. One caller is told so.
    #[must_use]
    pub fn take_renumbering(&self) -> bool {
        self.references.take_renumbering()
    }

    /// Allows opens again.
    pub fn release_opens(&self) {
        self.references.release_opens();
    }

    /// Gives the mounted file another inode number.
    pub(crate) fn set_ino(&self, ino: u64) {
        self.ino.store(ino, Ordering::SeqCst);
    }

    /// Checks that the kernel's inode `ino` may still change the size.
    ///
    /// # Errors
    /// `EBUSY` while opens are held; `ESTALE` when the disk has another inode number by now: the kernel
    /// looks the name up again then.
    pub(super) fn check_ino(&self, ino: u64) -> io::Result<()> {
        match (self.references.opens_are_held(), self.ino() == ino) {
            (true, _) => Err(os_error(libc::EBUSY)),
            (false, true) => Ok(()),
            (false, false) => Err(os_error(libc::ESTALE)),
        }
    }
}
