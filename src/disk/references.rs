//! The users of a disk: open handles, lookups of the kernel, and its name. They decide when a disk
//! may go.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::host::os_error;

/// How an open handle uses the kernel's page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandleAccess {
    /// Reads, through the cache.
    Read,
    /// Writes only.
    Write,
    /// Reads and writes, so the handle may also map the file shared and writable.
    ReadWrite,
}

/// The reason why a disk cannot be removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InUse {
    /// A handle is open.
    Open,
    /// An operation of unbounded length is running.
    Busy,
}

/// Counts of the users of a disk.
#[derive(Default)]
pub(super) struct References {
    read_opens: AtomicU32,
    write_opens: AtomicU32,
    read_write_opens: AtomicU32,
    /// Lookups that the kernel has been answered and has not forgotten yet. While there are any,
    /// the kernel may open the disk even after it was unlinked.
    lookups: AtomicU64,
    /// Set once the disk has no name.
    is_unlinked: AtomicBool,
    /// Set once the disk is being removed: opens are refused.
    is_retired: AtomicBool,
    /// Set while the disk, which nobody has open, changes to a size that the kernel does not take.
    opens_are_held: AtomicBool,
    /// Set with `opens_are_held`, until somebody gives the disk another inode number.
    needs_number: AtomicBool,
    /// Set while an operation of unbounded length (`keep`) holds the gate: requests then wait without
    /// a deadline.
    deadlines_suspended: AtomicBool,
}

impl References {
    /// Counts a handle as opened.
    ///
    /// # Errors
    /// `ESTALE` once the disk is being removed; `EBUSY` while opens are [held](Self::hold_opens).
    pub(super) fn open(&self, access: HandleAccess) -> io::Result<()> {
        // Counted before the check: either this call sees the mark of `retire` or `hold_opens`, or
        // that one sees the count.
        self.open_counter(access).fetch_add(1, Ordering::SeqCst);
        let refusal = match (self.is_retired.load(Ordering::SeqCst), self.opens_are_held()) {
            (true, _) => libc::ESTALE,
            (false, true) => libc::EBUSY,
            (false, false) => return Ok(()),
        };
        self.release(access);
        Err(os_error(refusal))
    }

    /// Refuses opens until [`release_opens`](Self::release_opens). Returns false, and does not, while
    /// a handle is open.
    pub(super) fn hold_opens(&self) -> bool {
        self.opens_are_held.store(true, Ordering::SeqCst);
        if self.handle_count() > 0 {
            self.release_opens();
            return false;
        }
        self.needs_number.store(true, Ordering::SeqCst);
        true
    }

    /// Whether the caller is to give the disk another inode number, and then to
    /// [release](Self::release_opens) opens: one caller for each time that they are held.
    pub(super) fn take_renumbering(&self) -> bool {
        self.needs_number.swap(false, Ordering::SeqCst)
    }

    /// Whether opens are held.
    pub(super) fn opens_are_held(&self) -> bool {
        self.opens_are_held.load(Ordering::SeqCst)
    }

    /// Allows opens again.
    pub(super) fn release_opens(&self) {
        self.opens_are_held.store(false, Ordering::SeqCst);
    }

    /// Counts a handle as released.
    pub(super) fn release(&self, access: HandleAccess) {
        self.open_counter(access).fetch_sub(1, Ordering::SeqCst);
    }

    fn open_counter(&self, access: HandleAccess) -> &AtomicU32 {
        match access {
            HandleAccess::Read => &self.read_opens,
            HandleAccess::Write => &self.write_opens,
            HandleAccess::ReadWrite => &self.read_write_opens,
        }
    }

    /// Number of open handles.
    pub(super) fn handle_count(&self) -> u32 {
        let counters = [&self.read_opens, &self.write_opens, &self.read_write_opens];
        counters.iter().map(|counter| counter.load(Ordering::SeqCst)).sum()
    }

    /// Whether a handle reads through the kernel's cache.
    pub(super) fn has_readers(&self) -> bool {
        self.read_opens.load(Ordering::SeqCst) > 0
    }

    /// Whether a handle may write.
    pub(super) fn has_writers(&self) -> bool {
        self.write_opens.load(Ordering::SeqCst) > 0 || self.may_be_mapped()
    }

    /// Whether a handle may have mapped the disk shared and writable.
    pub(super) fn may_be_mapped(&self) -> bool {
        self.read_write_opens.load(Ordering::SeqCst) > 0
    }

    /// The number of names of the disk.
    pub(super) fn nlink(&self) -> u32 {
        (!self.is_unlinked.load(Ordering::SeqCst)).into()
    }

    /// Records that the disk has lost its name.
    pub(super) fn mark_unlinked(&self) {
        self.is_unlinked.store(true, Ordering::SeqCst);
    }

    /// Counts one more lookup answered to the kernel.
    pub(super) fn add_lookup(&self) {
        self.lookups.fetch_add(1, Ordering::SeqCst);
    }

    /// Subtracts `count` lookups that the kernel has forgotten.
    pub(super) fn forget(&self, count: u64) {
        let less = |lookups: u64| Some(lookups.saturating_sub(count));
        let _ = self.lookups.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less);
    }

    /// Whether the disk has no name and the kernel has forgotten every lookup.
    pub(super) fn is_forgotten(&self) -> bool {
        self.nlink() == 0 && self.lookups.load(Ordering::SeqCst) == 0
    }

    /// Marks the disk as being removed; `handle_count` counts the open handles after the mark.
    ///
    /// # Errors
    /// [`InUse`] when the disk is in use; the mark is gone then.
    pub(super) fn retire(&self, handle_count: impl FnOnce() -> u32) -> Result<(), InUse> {
        self.is_retired.store(true, Ordering::SeqCst);
        let used = match (handle_count(), self.deadlines_suspended()) {
            (0, false) => return Ok(()),
            (0, true) => InUse::Busy,
            _ => InUse::Open,
        };
        self.is_retired.store(false, Ordering::SeqCst);
        Err(used)
    }

    /// Whether requests wait without a deadline, for an operation of unbounded length.
    pub(super) fn deadlines_suspended(&self) -> bool {
        self.deadlines_suspended.load(Ordering::SeqCst)
    }

    /// Runs `operation`, which may hold the gate for any length of time: requests wait for it without
    /// a deadline. Returns `None` once the disk is being removed.
    pub(super) fn with_deadlines_suspended<T>(&self, operation: impl FnOnce() -> T) -> Option<T> {
        self.deadlines_suspended.store(true, Ordering::SeqCst);
        // Marked before the check: either this call sees the mark of `retire`, or `retire` sees
        // this one.
        let done = (!self.is_retired.load(Ordering::SeqCst)).then(operation);
        self.deadlines_suspended.store(false, Ordering::SeqCst);
        done
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::thread;

    use super::*;

    #[test]
    fn one_of_a_concurrent_open_and_retire_fails() {
        let references = References::default();
        let start = Barrier::new(2);
        let (mut opened, mut retired) = (0, 0);
        for _ in 0..20_000 {
            let (open, retire) = thread::scope(|scope| {
                let other = scope.spawn(|| {
                    start.wait();
                    references.retire(|| references.handle_count()).is_ok()
                });
                start.wait();
                let open = references.open(HandleAccess::Read).is_ok();
                (open, other.join().unwrap())
            });
            assert!(!(open && retire), "a disk that somebody has is gone");
            assert_eq!(references.handle_count(), u32::from(open));
            if open {
                references.release(HandleAccess::Read);
            }
            references.is_retired.store(false, Ordering::SeqCst);
            opened += u32::from(open);
            retired += u32::from(retire);
        }
        assert!(opened > 0 && retired > 0, "no race: {opened} opened, {retired} retired");
    }

    #[test]
    fn opens_are_held_only_while_nobody_has_the_disk_open() {
        let references = References::default();
        references.open(HandleAccess::Read).unwrap();
        assert!(!references.hold_opens() && !references.opens_are_held());
        references.release(HandleAccess::Read);
        assert!(!references.take_renumbering() && references.hold_opens());
        let refused = references.open(HandleAccess::Write).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::EBUSY));
        assert_eq!(references.handle_count(), 0);
        assert!(references.take_renumbering() && !references.take_renumbering());
        references.release_opens();
        references.open(HandleAccess::Write).unwrap();
    }

    #[test]
    fn a_disk_with_suspended_deadlines_does_not_retire() {
        let references = References::default();
        let retire = || references.retire(|| references.handle_count());
        references.with_deadlines_suspended(|| {
            assert_eq!(retire(), Err(InUse::Busy));
            references.open(HandleAccess::Write).unwrap();
            assert_eq!(retire(), Err(InUse::Open));
            references.release(HandleAccess::Write);
        });
        assert_eq!(retire(), Ok(()));
        let refused = references.open(HandleAccess::Read).unwrap_err();
        assert_eq!(refused.raw_os_error(), Some(libc::ESTALE));
        assert_eq!(references.with_deadlines_suspended(|| ()), None);
    }
}
