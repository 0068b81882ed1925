//! Names that are looked up, created, renamed and removed, and the count of lookups of each inode.
//!
//! The kernel counts the replies that gave it an inode, and forgets as many later. A disk without a
//! name stays in the catalog as long as that count, or an open handle, holds it. So a lookup is
//! counted before its reply, and taken back if there is none.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{Errno, Generation, RenameFlags, ReplyEmpty, ReplyEntry, Request};

use super::attr::{self, ATTR_TTL, NO_TTL, PERM_MASK, attr_ttl};
use super::context::{CowslipFs, FsContext};
use super::nodes::{FoundName, ROOT_INO, utf8_name};
use super::reply::ErrorReply;
use crate::catalog::RenameMode;
use crate::disk::{self, Disk, DiskFile, DiskOwner};
use crate::host::os_error;
use crate::layer::Wait;

/// A lookup counted for a reply that is yet to be sent. Dropping the guard takes the lookup back.
struct LookupGuard {
    shared: Arc<FsContext>,
    disk: Option<Arc<Disk>>,
}

impl LookupGuard {
    /// Keeps the lookup counted, because the reply is being sent.
    fn disarm(mut self) {
        self.disk = None;
    }
}

impl Drop for LookupGuard {
    fn drop(&mut self) {
        if let Some(disk) = &self.disk {
            forget_lookups(&self.shared, disk, 1);
        }
    }
}

/// Subtracts `count` lookups that the kernel has forgotten, and disposes of the disk when nobody
/// can reach it any more.
pub(super) fn forget_lookups(shared: &Arc<FsContext>, disk: &Arc<Disk>, count: u64) {
    disk.forget(count);
    if disk.is_orphan() {
        let (context, disk) = (Arc::clone(shared), Arc::clone(disk));
        shared.pool.run(Box::new(move || context.catalog.dispose(&disk)));
    }
}

impl CowslipFs {
    /// Looks up `name` in the directory `parent`.
    pub(super) fn lookup_name(&self, parent: u64, name: &OsStr, reply: ReplyEntry) {
        match self.nodes.look_up(parent, name) {
            Ok(FoundName::File(file)) => self.reply_entry(&file, reply),
            Ok(FoundName::Snapshot { slot, name }) => self.lookup_snapshot(slot, name, reply),
            Ok(FoundName::Control(node)) => match self.control_attr(node) {
                Some(attr) => reply.entry_with_ttls(&ATTR_TTL, &NO_TTL, &attr, Generation(0)),
                None => reply.error(Errno::ENOENT),
            },
            Err(error) => reply.error(error.into()),
        }
    }

    /// Answers a lookup of a name with `file`. For a whole disk the lookup has been
    /// [counted](Disk::add_lookup) already.
    fn reply_entry(&self, file: &DiskFile, reply: ReplyEntry) {
        let (ino, ttl, target) = (file.ino(), attr_ttl(file), file.clone());
        let disk = (!file.is_partition()).then(|| Arc::clone(file.disk()));
        let lookup = LookupGuard { shared: Arc::clone(&self.shared), disk };
        let work = move |_: &Disk, wait| target.attributes(wait);
        self.query_or_defer(file.disk(), reply, work, move |reply, found: disk::Attributes| {
            lookup.disarm();
            reply.entry(&ttl, &attr::of_disk(ino, &found), Generation(0));
        });
    }

    /// Looks up a snapshot's file, whose layers may have to be opened first.
    fn lookup_snapshot(&self, slot: u64, name: String, reply: ReplyEntry) {
        let work = move |shared: &FsContext| {
            let (_, entry) =
                shared.catalog.disk_by_slot(slot).ok_or_else(|| os_error(libc::ENOENT))?;
            let file = entry.disk.snapshot_file(&name)?;
            shared.catalog.index_snapshot(&file);
            let found = file.attributes(Wait::Yes)?;
            Ok((file.ino(), found))
        };
        self.run_on_mount_pool(reply, work, |reply, (ino, found): (u64, disk::Attributes)| {
            let attr = attr::of_disk(ino, &found);
            reply.entry_with_ttls(&ATTR_TTL, &NO_TTL, &attr, Generation(0));
        });
    }

    /// Creates the disk `name` and passes it to `send` for the reply.
    pub(super) fn create_disk<R: ErrorReply>(
        &self,
        request: &Request,
        parent: u64,
        name: &OsStr,
        mode: u32,
        reply: R,
        send: impl FnOnce(R, &Arc<Disk>, disk::Attributes) + Send + 'static,
    ) {
        let name = match utf8_name(name) {
            Ok(name) if parent == ROOT_INO => name.to_owned(),
            Ok(_) => return reply.reply_errno(Errno::EPERM),
            Err(error) => return reply.reply_errno(error.into()),
        };
        let perm = u16::try_from(mode & PERM_MASK).unwrap_or(0o600);
        let owner = DiskOwner { uid: request.uid(), gid: request.gid(), perm };
        let work = move |shared: &FsContext| {
            let disk = shared.catalog.create(&name, owner)?;
            let found = disk.attributes(Wait::Yes)?;
            Ok((disk, found))
        };
        self.run_on_mount_pool(reply, work, |reply, (disk, found)| send(reply, &disk, found));
    }

    /// Removes the disk `name` of the store.
    pub(super) fn unlink_disk(&self, parent: u64, name: &OsStr, reply: ReplyEmpty) {
        let name = match utf8_name(name) {
            Ok(name) if parent == ROOT_INO => name.to_owned(),
            _ => return reply.error(Errno::EPERM),
        };
        let work = move |shared: &FsContext| shared.catalog.unlink(&name);
        self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
    }

    /// Renames a disk of the store.
    pub(super) fn rename_disk(
        &self,
        (parent, name): (u64, &OsStr),
        (new_parent, new_name): (u64, &OsStr),
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        let (Ok(from), Ok(to)) = (utf8_name(name), utf8_name(new_name)) else {
            return reply.error(Errno::EINVAL);
        };
        if parent != ROOT_INO || new_parent != ROOT_INO {
            return reply.error(Errno::EPERM);
        }
        let mode = match flags {
            flags if flags.is_empty() => RenameMode::Replace,
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            _ => return reply.error(Errno::EINVAL),
        };
        let (from, to) = (from.to_owned(), to.to_owned());
        let work = move |shared: &FsContext| shared.catalog.rename(&from, &to, mode);
        self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
    }
}
