//! Disks that are opened, created and released.

use std::ffi::OsStr;
use std::sync::Arc;

use fuser::{
    Errno, FopenFlags, Generation, OpenFlags, ReplyCreate, ReplyEmpty, ReplyOpen, Request,
};

use super::attr::{self, ATTR_TTL};
use super::context::{CowslipFs, FsContext};
use super::decode;
use super::page_cache::DIRECT;
use super::passthrough::OpenMode;
use crate::config::DiskMode;
use crate::disk::{DiskFile, HandleAccess};

impl CowslipFs {
    /// Opens `file`: served by this daemon or passed through.
    pub(super) fn open_file(&self, file: &DiskFile, flags: OpenFlags, reply: ReplyOpen) {
        let (disk, access) = (file.disk(), decode::access_mode(flags));
        if disk.mode == DiskMode::ReadOnly && access != HandleAccess::Read {
            return reply.error(Errno::EROFS);
        }
        let cache = self.page_cache();
        let open_mode = self.passthrough.open(disk, cache.mode(), |file| reply.open_backing(file));
        let handle = match self.handles.add_file(file.clone(), access) {
            Ok(handle) => handle,
            Err(error) => {
                self.passthrough.release(disk.ino());
                return reply.error(error.into());
            }
        };
        match open_mode {
            OpenMode::Served => reply.opened(handle, cache.open_flags(file, access)),
            OpenMode::Direct => reply.opened(handle, DIRECT),
            OpenMode::Passthrough(backing) => {
                reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
            }
        }
    }

    /// Creates a disk and opens it.
    pub(super) fn create_file(
        &self,
        request: &Request,
        (parent, name): (u64, &OsStr),
        mode: u32,
        flags: OpenFlags,
        reply: ReplyCreate,
    ) {
        let (handles, cache) = (Arc::clone(&self.handles), Arc::clone(self.page_cache()));
        let access = decode::access_mode(flags);
        self.create_disk(request, parent, name, mode, reply, move |reply, disk, found| {
            let attr = attr::of_disk(disk.ino(), &found);
            let file = DiskFile::from(Arc::clone(disk));
            match handles.add_file(file.clone(), access) {
                Ok(handle) => {
                    disk.add_lookup();
                    let flags = cache.open_flags(&file, access);
                    reply.created(&ATTR_TTL, &attr, Generation(0), handle, flags);
                }
                Err(error) => reply.error(error.into()),
            }
        });
    }

    /// Releases a handle of `file` that was opened for `access`. Nothing here holds the disk any more
    /// when the reply is sent, unless the disk has to be disposed of first.
    pub(super) fn release_file(&self, file: DiskFile, access: HandleAccess, reply: ReplyEmpty) {
        let disk = file.disk();
        self.passthrough.release(disk.ino());
        file.release_handle(access);
        if access != HandleAccess::Read {
            disk.finish_after_last_writer();
        }
        if !disk.is_orphan() {
            drop(file);
            return reply.ok();
        }
        let disk = Arc::clone(disk);
        let work = move |shared: &FsContext| {
            shared.catalog.dispose(&disk);
            Ok(())
        };
        self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
    }
}
