//! The FUSE adapter: decodes a request, calls a disk, replies. Only this module and `mount` name
//! `fuser`.
//!
//! A worker calls a disk with [`Wait::No`]. Work that would have to wait goes to the disk's pool
//! (`reply`), so a slow base holds no worker. Invalidations of the kernel's cache are sent by pool
//! threads as well, never from a handler: the kernel may need a free worker to carry one out.

mod attr;
mod busy_poll;
mod handles;
mod invalidation;
mod ops;
mod page_cache;
mod passthrough;
mod reply;
mod worker_limit;

use std::cell::RefCell;
use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use fuser::{
    AccessFlags, BsdFileFlags, CopyFileRangeFlags, Errno, FileHandle, Filesystem, FopenFlags,
    Generation, INodeNo, InitFlags, KernelConfig, LockOwner, Notifier, OpenFlags, RenameFlags,
    ReplyAttr, ReplyCreate, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyLseek,
    ReplyOpen, ReplyStatfs, ReplyWrite, Request, TimeOrNow, WriteFlags,
};

use self::attr::{ATTR_TTL, NO_TTL};
use self::busy_poll::BusyPoll;
use self::handles::{Handle, Handles};
pub use self::invalidation::kernel_invalidator;
use self::ops::{
    WriteOrigin, WriteRequest, decode_fallocate, is_sync, open_disk, to_system_time, utf8_name,
    would_block,
};
use self::page_cache::{WHOLE_DISK, attr_ttl};
use self::passthrough::{OpenMode, PassthroughInodes};
pub use self::reply::Deadlines;
use self::reply::{Deadline, ErrorReply as _, PoolKind};
use self::worker_limit::WorkerLimit;
use crate::aligned::AlignedBuf;
use crate::catalog::{Catalog, RenameMode};
use crate::config::{CacheMode, DiskMode};
use crate::control::{Control, ControlNode};
use crate::disk::{self, Disk, DiskFile, DiskOwner, HandleAccess, Whence};
use crate::host::os_error;
use crate::layer::Wait;
use crate::name::{CONTROL_DIR, MAX_NAME_LEN};
use crate::pool::Pool;
use crate::stream::Stream;

/// Inode number of the mount's root directory.
const ROOT_INO: u64 = 1;
/// Largest request in bytes, 1 MiB: the kernel's limit of pages in one request.
const MAX_IO_SIZE: u32 = 1 << 20;
/// Requests that the kernel keeps in flight for read-ahead and asynchronous I/O, of all disks
/// together. Hundreds may wait for one stalled stream; the other disks must not wait with them.
const MAX_BACKGROUND: u16 = 4096;

/// Permission bits that a mode may set. Set-id bits are excluded: the mount is `nosuid`, and so a
/// write has none to clear.
const PERM_MASK: u32 = 0o1777;

thread_local! {
    /// Per-thread read buffer of workers and pool threads, reused across requests. Aligned, so that
    /// reads past the host's page cache (`O_DIRECT`) need no copy.
    static READ_BUFFER: RefCell<AlignedBuf> = const { RefCell::new(AlignedBuf::new()) };
}

/// State shared between the adapter and the mount.
pub struct FsContext {
    /// The disks and their names.
    pub catalog: Arc<Catalog>,
    /// The `.cowslip` directory.
    pub control: Arc<Control>,
    /// The requests with a deadline.
    pub deadlines: Deadlines,
    /// Sends invalidations; set once the kernel has initialized the connection (`FUSE_INIT`).
    pub notifier: OnceLock<Notifier>,
    /// Threads for work that belongs to no disk.
    pub pool: Arc<Pool>,
    /// Threads for requests to the control files, and for reads that wait for the answers.
    pub control_pool: Arc<Pool>,
    /// How the kernel's cache is used.
    pub cache: CacheMode,
    /// User id and group id of the user who mounted.
    pub owner: (u32, u32),
    /// The time of the mount.
    pub mounted_at: SystemTime,
}

/// The file system as the kernel sees it.
pub struct CowslipFs {
    shared: Arc<FsContext>,
    handles: Arc<Handles>,
    passthrough: PassthroughInodes,
    worker_limit: WorkerLimit,
    busy_poll: BusyPoll,
}

impl CowslipFs {
    /// Creates the adapter of a mount with `workers` threads. `device` is the connection to the
    /// kernel, polled for the next request.
    #[must_use]
    pub fn new(shared: Arc<FsContext>, workers: usize, device: Option<OwnedFd>) -> Self {
        Self {
            shared,
            handles: Arc::default(),
            passthrough: PassthroughInodes::default(),
            worker_limit: WorkerLimit::new(workers),
            busy_poll: BusyPoll::new(device),
        }
    }
}

impl Filesystem for CowslipFs {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted = vec![
            InitFlags::FUSE_ASYNC_DIO,
            InitFlags::FUSE_PARALLEL_DIROPS,
            InitFlags::FUSE_DIRECT_IO_ALLOW_MMAP,
            // Without it the kernel asks for `security.capability` at every buffered write.
            InitFlags::FUSE_HANDLE_KILLPRIV_V2,
        ];
        if self.shared.cache == CacheMode::Writeback {
            wanted.push(InitFlags::FUSE_WRITEBACK_CACHE);
        }
        // No READDIRPLUS: attributes that had to be waited for could only be invented, and a size
        // of 0 would end the reads of every process that has the file open.
        for flag in wanted {
            if config.add_capabilities(flag).is_err() {
                log::info!("this kernel's FUSE has no {flag:?}");
            }
        }
        // Each setter returns its limit when the value exceeds it.
        let _ = config.set_max_write(MAX_IO_SIZE);
        if let Err(most) = config.set_max_readahead(MAX_IO_SIZE) {
            let _ = config.set_max_readahead(most);
        }
        let _ = config.set_max_background(MAX_BACKGROUND);
        passthrough::negotiate(config, self.shared.cache);
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let Ok(name) = utf8_name(name) else {
            return reply.error(Errno::ENOENT);
        };
        if let Some(ControlNode::Snapshots(slot)) = ControlNode::from_ino(parent.0) {
            return self.lookup_snapshot(slot, name, reply);
        }
        if parent.0 != ROOT_INO || name == CONTROL_DIR {
            let node = match parent.0 {
                ROOT_INO => Some(ControlNode::Directory),
                parent => {
                    ControlNode::from_ino(parent).and_then(|node| node.child(name, self.catalog()))
                }
            };
            return match node.and_then(|node| self.node_attr(node)) {
                Some(attr) => reply.entry_with_ttls(&ATTR_TTL, &NO_TTL, &attr, Generation(0)),
                None => reply.error(Errno::ENOENT),
            };
        }
        if name.len() > MAX_NAME_LEN {
            return reply.error(Errno::ENAMETOOLONG);
        }
        match self.catalog().look_up(name) {
            Some(file) => self.reply_entry(&file, reply),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn forget(&self, _: &Request, ino: INodeNo, count: u64) {
        if let Some(file) = self.catalog().file_by_ino(ino.0).filter(|file| !file.is_partition()) {
            Self::forget_lookups(&self.shared, file.disk(), count);
        }
    }

    fn getattr(&self, _: &Request, ino: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if ino.0 == ROOT_INO {
            return reply.attr(&ATTR_TTL, &self.root_attr());
        }
        if let Some(node) = ControlNode::from_ino(ino.0) {
            return match self.node_attr(node) {
                Some(attr) => reply.attr(&ATTR_TTL, &attr),
                None => reply.error(Errno::ENOENT),
            };
        }
        let file = match self.file_by_ino(ino) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let (ttl, there) = (attr_ttl(&file), file.clone());
        let work = move |_: &Disk, wait| there.attributes(wait);
        self.query_or_defer(file.disk(), reply, work, move |reply, found: disk::Attributes| {
            reply.attr(&ttl, &attr::of_disk(ino.0, &found));
        });
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
        let file = match self.file_by_ino(ino) {
            Ok(file) => file,
            // A control file always has size 0 at open: the truncation of a shell's `>` changes
            // nothing.
            Err(_) if ControlNode::from_ino(ino.0).is_some_and(|node| !node.is_directory()) => {
                return self.getattr_of_node(ino, reply);
            }
            Err(_) if ino.0 == ROOT_INO || ControlNode::from_ino(ino.0).is_some() => {
                return reply.error(Errno::EPERM);
            }
            Err(error) => return reply.error(error.into()),
        };
        let old = file.disk().owner();
        let owner = DiskOwner {
            uid: uid.unwrap_or(old.uid),
            gid: gid.unwrap_or(old.gid),
            perm: mode.map_or(old.perm, |mode| u16::try_from(mode & PERM_MASK).unwrap_or(old.perm)),
        };
        let owner = (owner != old).then_some(owner);
        let times = (to_system_time(atime), to_system_time(mtime));
        let ttl = attr_ttl(&file);
        let send = move |reply: ReplyAttr, found: disk::Attributes| {
            reply.attr(&ttl, &attr::of_disk(ino.0, &found));
        };
        let there = file.clone();
        if owner.is_some() {
            // A new owner is written durably.
            let work = move |_: &Disk| Self::set_attributes(&there, owner, size, times, Wait::Yes);
            return self.defer(file.disk(), PoolKind::Work, reply, work, send);
        }
        if size == Some(0) && file.has_fixed_size() {
            // The kernel sees no new size and would keep its cached pages.
            let (shared, target) = (Arc::clone(&self.shared), file.clone());
            let work = move |_: &Disk| Self::set_attributes(&there, None, size, times, Wait::Yes);
            let send = move |reply, found| {
                Self::invalidate_others(&shared, &target, WHOLE_DISK);
                Self::invalidate_truncated(&shared, &target, || send(reply, found));
            };
            return self.defer(file.disk(), PoolKind::Invalidate, reply, work, send);
        }
        let range = if size.is_some() { WHOLE_DISK } else { 0..0 };
        let work = move |file: &DiskFile, wait| Self::set_attributes(file, None, size, times, wait);
        self.change_and_invalidate(&file, range, reply, work, send);
    }

    fn open(&self, request: &Request, ino: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if let Some(node) = ControlNode::from_ino(ino.0) {
            return self.open_control(self.requester(request), node, reply);
        }
        let file = match self.file_by_ino(ino) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let disk = file.disk();
        if disk.mode == DiskMode::ReadOnly && flags.0 & libc::O_ACCMODE != libc::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        let cache = self.shared.cache;
        let open_mode = self.passthrough.open(disk, cache, |file| reply.open_backing(file));
        let as_served = if matches!(open_mode, OpenMode::Direct) { CacheMode::None } else { cache };
        match (open_disk(&self.handles, as_served, file.clone(), flags), open_mode) {
            (Ok((handle, _)), OpenMode::Passthrough(backing)) => {
                reply.opened_passthrough(handle, FopenFlags::empty(), &backing);
            }
            (Ok((handle, flags)), OpenMode::Served | OpenMode::Direct) => {
                reply.opened(handle, flags);
            }
            (Err(error), _) => {
                self.passthrough.release(disk.ino());
                reply.error(error.into());
            }
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
        let Some(handle) = self.handles.find(fh) else {
            return reply.error(Errno::EBADF);
        };
        let Handle::Disk { file, .. } = &*handle else {
            return self.read_control(&handle, offset, size, reply);
        };
        let (len, disk) = (size as usize, file.disk());
        if let Some(Stream::Input { input, .. }) = disk.stream() {
            let send = move |result: io::Result<Vec<u8>>| match result {
                Ok(bytes) => reply.data(&bytes),
                Err(error) => reply.error(error.into()),
            };
            return input.read(offset, len, request.pid(), Box::new(send));
        }
        let left = READ_BUFFER.with_borrow_mut(|buffer| {
            let room = buffer.prepare(len);
            let result = file.read(room, offset, Wait::No);
            if would_block(&result) {
                return Some(reply);
            }
            match result {
                Ok(got) => reply.data(&room[..got]),
                Err(error) => reply.reply_error(error),
            }
            None
        });
        let Some(reply) = left else { return self.busy_poll.poll_request() };
        // The buffer is not borrowed here: where no thread can be started, this thread does the
        // work itself.
        let there = file.clone();
        let work = move || {
            // The thread's own buffer, kept for as long as the thread lives: new memory costs as
            // much as the copy.
            let mut buffer = READ_BUFFER.take();
            let got = there.read(buffer.prepare(len), offset, Wait::Yes)?;
            Ok((buffer, got))
        };
        let send = |reply: ReplyData, (buffer, got): (AlignedBuf, usize)| {
            reply.data(&buffer.as_slice()[..got]);
            READ_BUFFER.set(buffer);
        };
        self.shared.deadlines.defer(disk, PoolKind::Work, Deadline::IoTimeout, reply, work, send);
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
        let Some(handle) = self.handles.find(fh) else {
            return reply.error(Errno::EBADF);
        };
        let Handle::Disk { file, .. } = &*handle else {
            return match self.write_control(self.requester(request), &handle, data) {
                Ok(len) => reply.written(len),
                Err(error) => reply.error(error.into()),
            };
        };
        let disk = file.disk();
        let room = match file.writable_range(offset, data.len() as u64) {
            Ok(room) => room,
            Err(error) => return reply.error(error.into()),
        };
        // Shorter than `data` only at the end of a partition.
        let len = usize::try_from(room.end - room.start).unwrap_or(usize::MAX).min(data.len());
        let (offset, data) = (room.start, &data[..len]);
        let Ok(written) = u32::try_from(len) else {
            return reply.error(Errno::EINVAL);
        };
        if let Some(Stream::Output(output)) = disk.stream() {
            let send = move |result: io::Result<()>| match result {
                Ok(()) => reply.written(written),
                Err(error) => reply.error(error.into()),
            };
            let (pid, send) = (request.pid(), Box::new(send));
            // The write may wait for the host of a spill file.
            if let Some(permit) = self.worker_limit.acquire() {
                disk.stream_write(output, data, offset, pid, send);
                return drop(permit);
            }
            let (disk, data) = (Arc::clone(disk), data.to_vec());
            return Arc::clone(&disk.pools.sync).run(Box::new(move || {
                if let Some(Stream::Output(output)) = disk.stream() {
                    disk.stream_write(output, &data, offset, pid, send);
                }
            }));
        }
        // Bytes that come from the kernel's cache are in that cache already. Their page is locked
        // until the reply, so an invalidation would deadlock.
        let origin = match write_flags.contains(WriteFlags::FUSE_WRITE_CACHE) {
            true => WriteOrigin::PageCache,
            false => WriteOrigin::Client,
        };
        let cached = origin == WriteOrigin::Client
            && self.shared.cache == CacheMode::Auto
            && !file.is_partition()
            && disk.has_cached_readers();
        let write = WriteRequest {
            offset,
            len: written,
            has_cached_readers: cached,
            origin,
            sync: is_sync(flags),
        };
        if let Some(permit) = self.worker_limit.acquire() {
            write.run(&self.shared, file, data, reply);
            disk.prepare_sync(room);
            drop(permit);
            return self.busy_poll.poll_request();
        }
        let (shared, there, data) = (Arc::clone(&self.shared), file.clone(), data.to_vec());
        disk.pools.sync.run(Box::new(move || write.run(&shared, &there, &data, reply)));
    }

    fn flush(&self, _: &Request, _: INodeNo, fh: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        // No write is held back until close; but a failed disk reports its failure at close, too.
        match self.file_by_handle(fh) {
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
        if let Some(handle) = self.handles.remove(fh)
            && let Handle::Disk { file, access } = &*handle
        {
            let disk = file.disk();
            self.passthrough.release(disk.ino());
            file.release_handle(*access);
            if *access != HandleAccess::Read {
                disk.finish_after_last_writer();
            }
            if disk.is_orphan() {
                let disk = Arc::clone(disk);
                let work = move |shared: &FsContext| {
                    shared.catalog.dispose(&disk);
                    Ok(())
                };
                return self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
            }
        }
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, fh: FileHandle, _: bool, reply: ReplyEmpty) {
        match self.file_by_handle(fh) {
            Ok(file) if file.disk().is_quick_to_sync() => self.sync_now(file.disk(), reply),
            Ok(file) => self.defer_sync(file.disk(), reply),
            Err(error) => reply.error(error.into()),
        }
    }

    fn opendir(&self, request: &Request, ino: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        let permit = self.handles.permit(self.requester(request));
        match permit.and_then(|permit| Ok((permit, self.listing(ino.0)?))) {
            Ok((permit, entries)) => {
                let handle = self.handles.add_with_permit(permit, Handle::Directory(entries));
                reply.opened(handle, FopenFlags::empty());
            }
            Err(error) => reply.error(error.into()),
        }
    }

    fn readdir(
        &self,
        _: &Request,
        _: INodeNo,
        fh: FileHandle,
        offset: u64,
        mut reply: ReplyDirectory,
    ) {
        let Some(handle) = self.handles.find(fh) else {
            return reply.error(Errno::EBADF);
        };
        let Handle::Directory(entries) = &*handle else {
            return reply.error(Errno::ENOTDIR);
        };
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (at, (name, ino, kind)) in entries.iter().enumerate().skip(skip) {
            if reply.add(INodeNo(*ino), at as u64 + 1, *kind, name) {
                break;
            }
        }
        reply.ok();
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
        let disk = self.file_by_ino(ino).ok().map(|file| Arc::clone(file.disk()));
        let disk = disk.or_else(|| self.catalog().list().first().map(|(_, e)| Arc::clone(&e.disk)));
        let block = disk.as_ref().map_or(4096, |disk| disk.block());
        let work = move |shared: &FsContext| match disk {
            Some(disk) => disk.space(),
            None => attr::space_of(shared.catalog.store_dir()),
        };
        self.run_on_mount_pool(reply, work, move |reply, space| {
            let unit = u64::from(block);
            let files = 1 << 20;
            reply.statfs(
                space.total / unit,
                space.free / unit,
                space.available / unit,
                files,
                files,
                block,
                u32::try_from(MAX_NAME_LEN).unwrap_or(u32::MAX),
                block,
            );
        });
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
        let (handles, cache) = (Arc::clone(&self.handles), self.shared.cache);
        self.create_disk(request, parent, name, mode, reply, move |reply, disk, found| {
            let attr = attr::of_disk(disk.ino(), &found);
            match open_disk(&handles, cache, disk.clone().into(), OpenFlags(flags)) {
                Ok((handle, flags)) => {
                    disk.add_lookup();
                    reply.created(&ATTR_TTL, &attr, Generation(0), handle, flags);
                }
                Err(error) => reply.error(error.into()),
            }
        });
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
        self.create_disk(request, parent, name, mode, reply, move |reply, disk, found| {
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
        let name = match utf8_name(name) {
            Ok(name) if parent.0 == ROOT_INO => name.to_owned(),
            _ => return reply.error(Errno::EPERM),
        };
        let work = move |shared: &FsContext| shared.catalog.unlink(&name);
        self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
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
        let (Ok(from), Ok(to)) = (utf8_name(name), utf8_name(newname)) else {
            return reply.error(Errno::EINVAL);
        };
        if parent.0 != ROOT_INO || newparent.0 != ROOT_INO {
            return reply.error(Errno::EPERM);
        }
        let over = match flags {
            flags if flags.is_empty() => RenameMode::Replace,
            RenameFlags::RENAME_NOREPLACE => RenameMode::NoReplace,
            _ => return reply.error(Errno::EINVAL),
        };
        let (from, to) = (from.to_owned(), to.to_owned());
        let work = move |shared: &FsContext| shared.catalog.rename(&from, &to, over);
        self.run_on_mount_pool(reply, work, |reply, ()| reply.ok());
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
        let file = match self.file_by_handle(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let Some((change, keep)) = decode_fallocate(mode) else {
            return reply.error(Errno::EOPNOTSUPP);
        };
        let Some(end) = offset.checked_add(length) else {
            return reply.error(Errno::EFBIG);
        };
        let span = file.span(offset, length);
        let work = move |file: &DiskFile, wait| file.fallocate(offset..end, change, keep, wait);
        self.change_and_invalidate(&file, span, reply, work, |reply, ()| reply.ok());
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
        let file = match self.file_by_handle(fh) {
            Ok(file) => file,
            Err(error) => return reply.error(error.into()),
        };
        let disk = Arc::clone(file.disk());
        let whence = match whence {
            libc::SEEK_DATA => Whence::Data,
            libc::SEEK_HOLE => Whence::Hole,
            _ => return reply.error(Errno::EINVAL),
        };
        let Ok(offset) = u64::try_from(offset) else {
            return reply.error(Errno::ENXIO);
        };
        let send = |reply: ReplyLseek, found: u64| reply.offset(found.cast_signed());
        if self.may_have_dirty_pages(&disk) {
            // Pages written through a mapping have not reached this daemon yet.
            let shared = Arc::clone(&self.shared);
            let work = move || {
                Self::invalidate(&shared, file.disk(), WHOLE_DISK);
                file.seek(offset, whence, Wait::Yes)
            };
            return self.shared.deadlines.defer(
                &disk,
                PoolKind::Invalidate,
                Deadline::IoTimeout,
                reply,
                work,
                send,
            );
        }
        let work = move |_: &Disk, wait| file.seek(offset, whence, wait);
        self.query_or_defer(&disk, reply, work, send);
        self.busy_poll.poll_request();
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
        let (source, target) = match (self.file_by_handle(fh_in), self.file_by_handle(fh_out)) {
            (Ok(source), Ok(target)) => (source, target),
            (Err(error), _) | (_, Err(error)) => return reply.error(error.into()),
        };
        if offset_in.checked_add(len).is_none() {
            return reply.error(Errno::EINVAL);
        }
        let cached = target.disk().has_cached_readers() && self.shared.cache == CacheMode::Auto;
        let notice = cached || !target.disk().partition_files().is_empty();
        let shared = Arc::clone(&self.shared);
        let there = target.clone();
        let work = move || {
            let span = there.span(offset_out, len);
            if there.is_dirty_elsewhere(&span) {
                // Older dirty bytes of another file must not be written back after these.
                Self::invalidate_others(&shared, &there, span);
            }
            let copied = there.copy_from(&source, (offset_in, len), offset_out)?;
            let len = copied.end - copied.start;
            if notice && len > 0 {
                Self::invalidate(&shared, there.disk(), copied);
            }
            u32::try_from(len).map_err(|_| os_error(libc::EIO))
        };
        let pool = if notice { PoolKind::Invalidate } else { PoolKind::Work };
        let deadlines = &self.shared.deadlines;
        deadlines.defer(target.disk(), pool, Deadline::IoTimeout, reply, work, ReplyWrite::written);
    }
}
