//! Changes of a file's attributes: owner and mode, size, times.

use std::io;
use std::sync::Arc;
use std::time::SystemTime;

use fuser::{ReplyAttr, TimeOrNow};

use super::attr::{self, PERM_MASK, attr_ttl};
use super::context::CowslipFs;
use super::decode;
use super::page_cache::WHOLE_DISK;
use super::reply::PoolKind;
use crate::config::DiskMode;
use crate::disk::{self, Disk, DiskFile, DiskOwner};
use crate::host::os_error;
use crate::layer::Wait;

/// The attributes to change; `None` leaves one as it is.
#[derive(Clone, Copy, Default)]
pub(super) struct AttrChange {
    pub(super) owner: Option<DiskOwner>,
    pub(super) size: Option<u64>,
    pub(super) atime: Option<SystemTime>,
    pub(super) mtime: Option<SystemTime>,
}

impl AttrChange {
    /// Decodes a request about a file whose owner is `old`.
    pub(super) fn decode(
        old: DiskOwner,
        (uid, gid, mode): (Option<u32>, Option<u32>, Option<u32>),
        size: Option<u64>,
        (atime, mtime): (Option<TimeOrNow>, Option<TimeOrNow>),
    ) -> Self {
        let perm = |mode| u16::try_from(mode & PERM_MASK).unwrap_or(old.perm);
        let owner = DiskOwner {
            uid: uid.unwrap_or(old.uid),
            gid: gid.unwrap_or(old.gid),
            perm: mode.map_or(old.perm, perm),
        };
        Self {
            owner: (owner != old).then_some(owner),
            size,
            atime: atime.map(decode::system_time),
            mtime: mtime.map(decode::system_time),
        }
    }

    /// Makes the change, and returns the attributes after it.
    ///
    /// # Errors
    /// `EROFS` for a new owner or size of a read-only disk; `EPERM` for a new owner of a partition
    /// file; `EAGAIN` if it would have to wait; the errors of [`DiskFile::set_size`] and
    /// [`Disk::set_owner`].
    pub(super) fn apply(self, file: &DiskFile, wait: Wait) -> io::Result<disk::Attributes> {
        let disk = file.disk();
        if disk.mode == DiskMode::ReadOnly && (self.owner.is_some() || self.size.is_some()) {
            return Err(os_error(libc::EROFS));
        }
        if file.is_partition() && self.owner.is_some() {
            // Owner and mode belong to the whole disk.
            return Err(os_error(libc::EPERM));
        }
        if let Some(size) = self.size {
            file.set_size(size, wait)?;
        }
        if let Some(owner) = self.owner {
            disk.set_owner(owner)?;
        }
        if self.atime.is_some() || self.mtime.is_some() {
            disk.set_times(self.atime, self.mtime);
        }
        file.attributes(wait)
    }
}

impl CowslipFs {
    /// Changes attributes of `file`, and replies with all of them.
    pub(super) fn change_attributes(&self, file: &DiskFile, change: AttrChange, reply: ReplyAttr) {
        let (ino, ttl) = (file.ino(), attr_ttl(file));
        let send = move |reply: ReplyAttr, found: disk::Attributes| {
            reply.attr(&ttl, &attr::of_disk(ino, &found));
        };
        let target = file.clone();
        if change.owner.is_some() {
            // A new owner is written durably.
            let work = move |_: &Disk| change.apply(&target, Wait::Yes);
            return self.defer(file.disk(), PoolKind::Work, reply, work, send);
        }
        if change.size == Some(0) && file.has_fixed_size() {
            // The kernel sees no new size and would keep its cached pages.
            let (cache, truncated) = (Arc::clone(self.page_cache()), file.clone());
            let work = move |_: &Disk| change.apply(&target, Wait::Yes);
            let send = move |reply, found| {
                cache.invalidate_truncated(&truncated, || send(reply, found));
            };
            return self.defer(file.disk(), PoolKind::Invalidate, reply, work, send);
        }
        let range = if change.size.is_some() { WHOLE_DISK } else { 0..0 };
        let work = move |file: &DiskFile, wait| change.apply(file, wait);
        self.change_and_invalidate(file, range, reply, work, send);
    }
}

#[cfg(test)]
mod tests {
    use super::super::nodes::testing::{file, mount_of_one_disk};
    use super::*;

    fn errno_of<T>(result: io::Result<T>) -> Option<i32> {
        result.err()?.raw_os_error()
    }

    #[test]
    fn a_change_keeps_what_was_not_asked_for_and_drops_set_id_bits() {
        let old = DiskOwner { uid: 1, gid: 2, perm: 0o600 };
        let decode = |ids| AttrChange::decode(old, ids, None, (None, None)).owner;
        assert_eq!(decode((None, None, None)), None);
        assert_eq!(decode((Some(1), Some(2), Some(0o100_600))), None);
        assert_eq!(decode((Some(3), None, None)), Some(DiskOwner { uid: 3, ..old }));
        assert_eq!(decode((None, None, Some(0o6755))), Some(DiskOwner { perm: 0o755, ..old }));
    }

    #[test]
    fn a_partition_file_keeps_its_owner_and_its_size() {
        let (nodes, _) = mount_of_one_disk(true);
        let (disk, part) = (file(&nodes, "d"), file(&nodes, "d.p1"));
        let owner = AttrChange { owner: Some(disk.disk().owner()), ..AttrChange::default() };
        assert_eq!(errno_of(owner.apply(&part, Wait::Yes)), Some(libc::EPERM));
        let size = AttrChange { size: Some(4096), ..AttrChange::default() };
        assert_eq!(errno_of(size.apply(&part, Wait::Yes)), Some(libc::EINVAL));
        assert_eq!(size.apply(&disk, Wait::Yes).unwrap().size, 4096);
    }
}
