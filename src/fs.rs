//! The FUSE adapter: decodes a request, calls a disk, replies. Only this module and `mount` name
//! `fuser`.
//!
//! Each handler here decodes and passes on; the files below say how the reply comes about:
//!
//! ```text
//!   names, nodes, attr, setattr    names and inodes; `nodes` without FUSE
//!   opens, handles, passthrough    from open to release
//!   directories                    listings; the worker waits for none of them
//!   read, write, page_cache        bytes, and the kernel's copies of them
//!   control_files                  the files in `.cowslip`
//!   dispatch, reply                which thread does the work, and until when
//!   worker_limit, busy_poll        the workers
//!   context, negotiate, decode     the state, FUSE_INIT, numbers of the kernel
//! ```
//!
//! A worker calls a disk with [`Wait::No`](crate::layer::Wait::No). Work that would have to wait
//! goes to the disk's pool (`reply`), so a slow base holds no worker. Invalidations of the kernel's
//! cache are sent by pool threads as well, never from a handler: the kernel may need a free worker
//! to carry one out.

mod attr;
mod busy_poll;
mod context;
mod control_files;
mod decode;
mod directories;
mod dispatch;
mod handles;
mod names;
mod negotiate;
mod nodes;
mod opens;
mod page_cache;
mod passthrough;
mod read;
mod reply;
mod setattr;
mod worker_limit;
mod write;

use std::ffi::OsStr;
use std::io;
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, Generation,
    INodeNo, KernelConfig, LockOwner, OpenFlags, RenameFlags, ReplyAttr, ReplyCreate, ReplyData,
    ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite,
    Request, TimeOrNow, WriteFlags,
};

use self::attr::ATTR_TTL;
pub(crate) use self::context::{CowslipFs, FsContext};
use self::handles::Handle;
use self::names::forget_lookups;
use self::nodes::Node;
pub(crate) use self::page_cache::{PageCache, kernel_invalidator};
pub(crate) use self::reply::Deadlines;
use self::setattr::AttrChange;
use self::write::{WriteOrigin, WriteRequest};

impl Filesystem for CowslipFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        negotiate::negotiate(config, self.page_cache().mode());
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        self.lookup_name(parent.0, name, reply);
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        // Lookups of partition files are not counted.
        if let Some(disk) = self.shared.catalog.disk_once_of(ino.0) {
            forget_lookups(&self.shared, &disk, count);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.nodes.by_ino(ino.0) {
            Ok(Node::File(file)) => self.reply_attr(&file, reply),
            Ok(Node::Control(node)) => self.reply_control_attr(node, reply),
            Ok(Node::Root) => {
                reply.attr(&ATTR_TTL, &attr::of_root(&self.nodes, self.shared.mounted_at));
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn setattr(
        &self,
        _: &Request,
        ino: INodeNo,
        mode: Option<u32>,
        uid: Option<u32>,
        gid: Option<u32>,
        size: Option<u64>,
        atime: Option<TimeOrNow>,
        mtime: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        let file = match self.nodes.by_ino(ino.0) {
            Ok(Node::File(file)) => file,
            // A control file always has size 0 at open: the truncation of a shell's `>` changes
            // nothing.
            Ok(Node::Control(node)) if !node.is_directory() => {
                return self.reply_control_attr(node, reply);
            }
            Ok(Node::Root | Node::Control(_)) => return reply.error(Errno::EPERM),
            Err(error) => return reply.error(error.into()),
        };
        let old = file.disk().owner();
        let change = AttrChange::decode(old, (uid, gid, mode), size, (atime, mtime));
        self.change_attributes(&file, change, reply);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        match self.nodes.by_ino(ino.0) {
            Ok(Node::File(file)) => self.open_file(&file, flags, reply),
            Ok(Node::Control(node)) => self.open_control(self.requester(request), node, reply),
            Ok(Node::Root) => reply.error(Errno::EISDIR),
            Err(error) => reply.error(error.into()),
        }
    }

    fn read(
        &self,
        request: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        match self.handles.find(fh).as_deref() {
            Some(Handle::Disk { file, .. }) => {
                self.read_file(file, offset, size as usize, request.pid(), reply);
            }
            Some(handle) => self.read_control(handle, offset, size, reply),
            None => reply.error(Errno::EBADF),
        }
    }

    fn write(
        &self,
        request: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        data: &[u8],
        write_flags: WriteFlags,
        flags: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let handle = self.handles.find(fh);
        let file = match handle.as_deref() {
            Some(Handle::Disk { file, .. }) => file,
            Some(handle) => {
                return match self.write_control(self.requester(request), handle, data) {
                    Ok(len) => reply.written(len),
                    Err(error) => reply.error(error.into()),
                };
            }
            None => return reply.error(Errno::EBADF),
        };
        let origin = WriteOrigin::decode(write_flags);
        let write =
            WriteRequest { offset, origin, sync: decode::is_sync(flags), pid: request.pid() };
        self.write_file(file, data, write, reply);
    }

    fn flush(&self, _: &Request, _: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // No write is held back until close; but a failed disk reports its failure at close, too.
        match self.handles.find_file(fh) {
            Ok(file) if file.disk().is_failed() => reply.error(Errno::EIO),
            _ => reply.ok(),
        }
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let released = match self.handles.remove(fh).as_deref() {
            Some(Handle::Disk { file, access }) => Some((file.clone(), *access)),
            _ => None,
        };
        match released {
            Some((file, access)) => self.release_file(file, access, reply),
            None => reply.ok(),
        }
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.handles.find_file(fh) {
            Ok(file) if file.disk().is_quick_to_sync() => self.sync_now(file.disk(), reply),
            Ok(file) => self.defer_sync(file.disk(), reply),
            Err(error) => reply.error(error.into()),
        }
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        self.open_directory(self.requester(request), ino.0, reply);
    }

    fn readdir(
        &self,
        request: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        self.read_directory(self.requester(request), fh, offset, reply);
    }

    fn releasedir(&self, _: &Request, _: INodeNo, fh: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.handles.remove(fh);
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        // Names are durable before they are acknowledged.
        reply.ok();
    }

    fn statfs(&self, _: &Request, ino: INodeNo, reply: ReplyStatfs) {
        self.reply_space(ino.0, reply);
    }

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        // The mount has `default_permissions`: the kernel checks owner and mode itself.
        reply.ok();
    }

    fn create(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        flags: i32,
        reply: ReplyCreate,
    ) {
        self.create_file(request, (parent.0, name), mode, OpenFlags(flags), reply);
    }

    fn mknod(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        _: u32,
        _: u32,
        reply: ReplyEntry,
    ) {
        // Only regular files are disks.
        if !matches!(mode & libc::S_IFMT, libc::S_IFREG | 0) {
            return reply.error(Errno::EPERM);
        }
        self.create_disk(request, parent.0, name, mode, reply, move |reply, disk, found| {
            disk.add_lookup();
            reply.entry(&ATTR_TTL, &attr::of_disk(disk.ino(), &found), Generation(0));
        });
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(Errno::EPERM);
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(Errno::EPERM);
    }

    fn unlink(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEmpty) {
        self.unlink_disk(parent.0, name, reply);
    }

    fn rename(
        &self,
        _: &Request,
        parent: INodeNo,
        name: &OsStr,
        newparent: INodeNo,
        newname: &OsStr,
        flags: RenameFlags,
        reply: ReplyEmpty,
    ) {
        self.rename_disk((parent.0, name), (newparent.0, newname), flags, reply);
    }

    fn fallocate(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        let file = match self.handles.find_file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let Some((change, size_mode)) = decode::fallocate_mode(mode) else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        let Some(end) = offset.checked_add(length) else {
            return reply.error(Errno::EFBIG);
        };
        self.allocate(&file, offset..end, (change, size_mode), reply);
    }

    fn lseek(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: i64,
        whence: i32,
        reply: ReplyLseek,
    ) {
        let file = match self.handles.find_file(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let Some(whence) = decode::whence(whence) else {
            return reply.error(Errno::EINVAL);
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        self.seek_file(file, offset, whence, reply);
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        fh_in: FileHandle,
        offset_in: u64,
        _: INodeNo,
        fh_out: FileHandle,
        offset_out: u64,
        len: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        let (source, target) = match (self.handles.find_file(fh_in), self.handles.find_file(fh_out))
        {
            (Ok(source), Ok(target)) => (source, target),
            (Err(error), _) | (_, Err(error)) => return reply.error(error.into()),
        };
        if offset_in.checked_add(len).is_none() {
            return reply.error(Errno::EINVAL);
        }
        self.copy_file(source, (offset_in, len), &target, offset_out, reply);
    }
}
