//! Shared code of the handlers: replies given at once or by a pool, and the control files.

use std::ffi::OsStr;
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{
    Errno, FileHandle, FileType, FopenFlags, Generation, INodeNo, OpenFlags, ReplyData, ReplyEmpty,
    ReplyEntry, ReplyOpen, ReplyWrite, Request, TimeOrNow,
};

use super::handles::{Handle, Handles, Requester};
use super::reply::{Deadline, ErrorReply, PoolKind};
use super::{CowslipFs, FsContext, PERM_MASK, ROOT_INO, attr};
use crate::aligned::AlignedBuf;
use crate::catalog::Catalog;
use crate::config::{CacheMode, DiskMode};
use crate::control::{ControlNode, ControlSession, MapText, StatusAudience};
use crate::disk::{self, Disk, DiskFile, DiskOwner, FallocateMode, HandleAccess, SizeMode};
use crate::host::os_error;
use crate::layer::Wait;
use crate::logging;

/// Returns the name as text; no disk's name is anything else.
pub(super) fn utf8_name(name: &OsStr) -> io::Result<&str> {
    name.to_str().ok_or_else(|| os_error(libc::EINVAL))
}

pub(super) fn would_block<T>(result: &io::Result<T>) -> bool {
    result.as_ref().is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN))
}

pub(super) fn is_sync(flags: OpenFlags) -> bool {
    // O_SYNC includes the bit of O_DSYNC.
    flags.0 & libc::O_DSYNC != 0
}

impl CowslipFs {
    pub(super) fn catalog(&self) -> &Catalog {
        &self.shared.catalog
    }

    /// Looks up a snapshot's file, whose layers may have to be opened first.
    pub(super) fn lookup_snapshot(&self, slot: u64, name: &str, reply: ReplyEntry) {
        let name = name.to_owned();
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
            reply.entry_with_ttls(&attr::ATTR_TTL, &attr::NO_TTL, &attr, Generation(0));
        });
    }

    /// Creates the disk `name` and passes it to `send` for the reply.
    pub(super) fn create_disk<R: ErrorReply>(
        &self,
        request: &Request,
        parent: INodeNo,
        name: &OsStr,
        mode: u32,
        reply: R,
        send: impl FnOnce(R, &Arc<Disk>, disk::Attributes) + Send + 'static,
    ) {
        let name = match utf8_name(name) {
            Ok(name) if parent.0 == ROOT_INO => name.to_owned(),
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

    /// Subtracts `count` lookups that the kernel has forgotten, and disposes of the disk when
    /// nobody can reach it any more.
    pub(super) fn forget_lookups(shared: &Arc<FsContext>, disk: &Arc<Disk>, count: u64) {
        disk.forget(count);
        if disk.is_orphan() {
            let (there, disk) = (Arc::clone(shared), Arc::clone(disk));
            shared.pool.run(Box::new(move || there.catalog.dispose(&disk)));
        }
    }

    pub(super) fn file_by_handle(&self, handle: FileHandle) -> io::Result<DiskFile> {
        match self.handles.find(handle).as_deref() {
            Some(Handle::Disk { file, .. }) => Ok(file.clone()),
            Some(_) => Err(os_error(libc::EINVAL)),
            None => Err(os_error(libc::EBADF)),
        }
    }

    /// Answers a query: here if that needs no waiting, else in the disk's pool.
    pub(super) fn query_or_defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        reply: R,
        work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        try_or_defer(&self.shared, disk, reply, work, send);
    }

    /// Makes a change as [`query_or_defer`](Self::query_or_defer) answers a query. The last free
    /// worker leaves even the attempt to a pool thread that waits for no base.
    pub(super) fn change_or_defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        reply: R,
        work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        if let Some(_permit) = self.worker_limit.acquire() {
            return try_or_defer(&self.shared, disk, reply, work, send);
        }
        let (shared, there) = (Arc::clone(&self.shared), Arc::clone(disk));
        disk.pools.sync.run(Box::new(move || try_or_defer(&shared, &there, reply, work, send)));
    }

    /// Runs `work` in one of the disk's pools, without a deadline.
    pub(super) fn defer<R: ErrorReply, T: 'static>(
        &self,
        disk: &Arc<Disk>,
        pool: PoolKind,
        reply: R,
        work: impl FnOnce(&Disk) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let there = Arc::clone(disk);
        self.shared.deadlines.defer(
            disk,
            pool,
            Deadline::Unlimited,
            reply,
            move || work(&there),
            send,
        );
    }

    /// Syncs on the worker, for an fsync that takes as long as the device needs for a few blocks:
    /// handing the sync to another thread would cost as much. Only one worker syncs at a time;
    /// requests that arrive meanwhile share the next sync.
    pub(super) fn sync_now(&self, disk: &Arc<Disk>, reply: ReplyEmpty) {
        let Some(permit) = self.worker_limit.try_acquire_first() else {
            return self.defer_sync(disk, reply);
        };
        match disk.sync() {
            Ok(()) => reply.ok(),
            Err(error) => reply.reply_error(error),
        }
        drop(permit);
        self.busy_poll.poll_request();
    }

    /// Syncs in the pool for syncs, which may take its time.
    pub(super) fn defer_sync(&self, disk: &Arc<Disk>, reply: ReplyEmpty) {
        self.defer(disk, PoolKind::Sync, reply, Disk::sync, |reply, ()| reply.ok());
    }

    /// Whether the kernel may hold dirty pages of the disk that this daemon has not seen.
    pub(super) fn may_have_dirty_pages(&self, disk: &Disk) -> bool {
        let may =
            disk.may_be_mapped() || self.shared.cache == CacheMode::Writeback && disk.has_writers();
        may && !self.passthrough.is_active(disk.ino())
    }

    /// Returns the user who sent `request`.
    pub(super) fn requester(&self, request: &Request) -> Requester {
        let uid = request.uid();
        Requester { uid, is_trusted: uid == 0 || uid == self.shared.owner.0 }
    }

    /// Opens a control file. The kernel has checked the mode; but requests, and facts about the
    /// host, are only for root and the user who mounted, whatever mode a disk was given.
    pub(super) fn open_control(&self, requester: Requester, node: ControlNode, reply: ReplyOpen) {
        if !requester.is_trusted && node.is_private() {
            return reply.error(Errno::EACCES);
        }
        let permit = match self.handles.permit(requester) {
            Ok(permit) => permit,
            Err(error) => return reply.error(error.into()),
        };
        let handles = Arc::clone(&self.handles);
        let send = move |reply: ReplyOpen, handle| {
            reply.opened(handles.add_with_permit(permit, handle), FopenFlags::FOPEN_DIRECT_IO);
        };
        let handles = Arc::clone(&self.handles);
        let work = move |shared: &FsContext| open_node(shared, requester, node, &handles);
        if matches!(node, ControlNode::Status | ControlNode::DiskStatus(_)) {
            // A status may take a while, with many disks or on a slow host.
            return self.run_on_mount_pool(reply, work, send);
        }
        match work(&self.shared) {
            Ok(handle) => send(reply, handle),
            Err(error) => reply.error(error.into()),
        }
    }

    /// Answers a request that belongs to no disk in the mount's own pool.
    pub(super) fn run_on_mount_pool<R: ErrorReply, T: 'static>(
        &self,
        reply: R,
        work: impl FnOnce(&FsContext) -> io::Result<T> + Send + 'static,
        send: impl FnOnce(R, T) + Send + 'static,
    ) {
        let shared = Arc::clone(&self.shared);
        self.shared.pool.run(Box::new(move || match work(&shared) {
            Ok(value) => send(reply, value),
            Err(error) => reply.reply_error(error),
        }));
    }

    /// Answers a read of a control file.
    pub(super) fn read_control(&self, handle: &Handle, offset: u64, size: u32, reply: ReplyData) {
        let len = size as usize;
        match handle {
            Handle::Text(text) => {
                let start = usize::try_from(offset).unwrap_or(usize::MAX).min(text.len());
                reply.data(&text[start..text.len().min(start + len)]);
            }
            Handle::Log(start) => reply.data(&logging::read(start + offset, len)),
            Handle::Map { text, disk } => {
                let text = Arc::clone(text);
                let work = move || text.read(offset, len);
                let send = |reply: ReplyData, bytes: Vec<u8>| reply.data(&bytes);
                self.shared.deadlines.defer(
                    disk,
                    PoolKind::Map,
                    Deadline::IoTimeout,
                    reply,
                    work,
                    send,
                );
            }
            Handle::Ctl { session, .. } => {
                let session = Arc::clone(session);
                self.shared.control_pool.run(Box::new(move || match session.read(len) {
                    Ok(bytes) => reply.data(&bytes),
                    Err(error) => reply.error(error.into()),
                }));
            }
            Handle::Directory(_) | Handle::Disk { .. } => reply.error(Errno::EISDIR),
        }
    }

    /// Handles a write to a control file.
    pub(super) fn write_control(
        &self,
        requester: Requester,
        handle: &Handle,
        data: &[u8],
    ) -> io::Result<u32> {
        let Handle::Ctl { session, node } = handle else {
            return Err(os_error(libc::EACCES));
        };
        // A request is carried out with the daemon's rights, wherever its paths lead. So both the
        // opener of the file and the writer must be trusted: a privileged program can be tricked
        // into writing given text to a file that it was handed, and an open file can be handed on.
        if !requester.is_trusted {
            return Err(os_error(libc::EPERM));
        }
        let pool = &self.shared.control_pool;
        session.submit(&self.shared.control, *node, data, |job| pool.run(job))?;
        u32::try_from(data.len()).map_err(|_| os_error(libc::EINVAL))
    }

    /// Lists a directory's entries, without `.cowslip` itself.
    pub(super) fn listing(&self, ino: u64) -> io::Result<Vec<(String, u64, FileType)>> {
        let mut all = vec![
            (".".to_owned(), ino, FileType::Directory),
            ("..".to_owned(), ROOT_INO, FileType::Directory),
        ];
        if ino == ROOT_INO {
            for (name, entry) in self.catalog().list() {
                let parts = entry.disk.partition_files().iter();
                let parts: Vec<_> = parts
                    .map(|part| (part.name(&name), part.ino(), FileType::RegularFile))
                    .collect();
                all.push((name, entry.disk.ino(), FileType::RegularFile));
                all.extend(parts);
            }
            return Ok(all);
        }
        let node = ControlNode::from_ino(ino).filter(|node| node.is_directory());
        let node = node.ok_or_else(|| os_error(libc::ENOTDIR))?;
        let kind = |node: ControlNode| {
            if node.is_directory() { FileType::Directory } else { FileType::RegularFile }
        };
        if let ControlNode::Snapshots(slot) = node {
            let (_, entry) =
                self.catalog().disk_by_slot(slot).ok_or_else(|| os_error(libc::ENOENT))?;
            let names = entry.disk.snapshot_names().into_iter();
            // A client that wants the inode number looks the name up.
            all.extend(names.map(|name| (name, u64::MAX, FileType::RegularFile)));
            return Ok(all);
        }
        let children = node.children(self.catalog()).into_iter();
        all.extend(children.map(|(name, node)| (name, node.ino(), kind(node))));
        Ok(all)
    }

    pub(super) fn set_attributes(
        file: &DiskFile,
        owner: Option<DiskOwner>,
        size: Option<u64>,
        times: (Option<SystemTime>, Option<SystemTime>),
        wait: Wait,
    ) -> io::Result<disk::Attributes> {
        let disk = file.disk();
        if disk.mode == DiskMode::ReadOnly && (owner.is_some() || size.is_some()) {
            return Err(os_error(libc::EROFS));
        }
        if file.is_partition() && owner.is_some() {
            // Owner and mode belong to the whole disk.
            return Err(os_error(libc::EPERM));
        }
        if let Some(size) = size {
            file.set_size(size, wait)?;
        }
        if let Some(owner) = owner {
            disk.set_owner(owner)?;
        }
        if times != (None, None) {
            disk.set_times(times.0, times.1);
        }
        file.attributes(wait)
    }
}

/// Opens a control file for `requester`.
fn open_node(
    shared: &FsContext,
    requester: Requester,
    node: ControlNode,
    handles: &Handles,
) -> io::Result<Handle> {
    let gone = || os_error(libc::ENOENT);
    let control = &shared.control;
    Ok(match node {
        ControlNode::Status => Handle::Text(handles.share_text(control.status())),
        ControlNode::Log => Handle::Log(logging::oldest_offset()),
        ControlNode::DiskStatus(slot) => {
            let (name, entry) = shared.catalog.disk_by_slot(slot).ok_or_else(gone)?;
            let reader =
                if requester.is_trusted { StatusAudience::Trusted } else { StatusAudience::Other };
            Handle::Text(handles.share_text(control.disk_status(&name, &entry, reader)))
        }
        ControlNode::DiskMap(slot) => {
            let disk = Arc::clone(&shared.catalog.disk_by_slot(slot).ok_or_else(gone)?.1.disk);
            Handle::Map { text: Arc::new(MapText::new(Arc::clone(&disk))), disk }
        }
        ControlNode::DiskCtl(slot) if shared.catalog.disk_by_slot(slot).is_none() => {
            return Err(gone());
        }
        ControlNode::Ctl | ControlNode::DiskCtl(_) => {
            Handle::Ctl { session: Arc::new(ControlSession::default()), node }
        }
        ControlNode::Directory | ControlNode::Disk(_) | ControlNode::Snapshots(_) => {
            return Err(os_error(libc::EISDIR));
        }
    })
}

/// Runs `work` without waiting, or in the disk's pool if it would have to wait.
fn try_or_defer<R: ErrorReply, T: 'static>(
    shared: &FsContext,
    disk: &Arc<Disk>,
    reply: R,
    work: impl Fn(&Disk, Wait) -> io::Result<T> + Send + 'static,
    send: impl FnOnce(R, T) + Send + 'static,
) {
    let result = work(disk, Wait::No);
    if would_block(&result) {
        let there = Arc::clone(disk);
        let work = move || work(&there, Wait::Yes);
        shared.deadlines.defer(disk, PoolKind::Work, Deadline::IoTimeout, reply, work, send);
        return;
    }
    match result {
        Ok(value) => send(reply, value),
        Err(error) => reply.reply_error(error),
    }
}

/// The way by which the bytes of a write have come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum WriteOrigin {
    /// Directly from the client.
    Client,
    /// From the kernel's cache, where their page is locked until the reply.
    PageCache,
}

/// A write to a disk, without its bytes.
#[derive(Clone, Copy)]
pub(super) struct WriteRequest {
    /// Offset in the disk, in bytes.
    pub(super) offset: u64,
    /// Number of bytes, which the reply acknowledges.
    pub(super) len: u32,
    /// A handle reads through the kernel's cache, which must drop the range before the reply.
    pub(super) has_cached_readers: bool,
    pub(super) origin: WriteOrigin,
    /// The write must be durable before the reply (`O_DSYNC`).
    pub(super) sync: bool,
}

impl WriteRequest {
    /// Writes `data` without waiting, or in one of the disk's pools if that would have to wait.
    pub(super) fn run(
        self,
        shared: &Arc<FsContext>,
        file: &DiskFile,
        data: &[u8],
        reply: ReplyWrite,
    ) {
        let Self { offset, len: written, origin, sync, .. } = self;
        let range = self.range();
        // Older dirty bytes of another file must not be written back after these.
        let first = origin == WriteOrigin::Client && file.is_dirty_elsewhere(&range);
        let result = match first {
            false => file.disk().write(data, offset, Wait::No),
            true => Err(os_error(libc::EAGAIN)),
        };
        match result {
            Ok(()) if !self.must_invalidate(file) && (!sync || file.disk().is_quick_to_sync()) => {
                let durable = if sync { file.disk().sync() } else { Ok(()) };
                match durable {
                    Ok(()) => reply.written(written),
                    Err(error) => reply.reply_error(error),
                }
                return self.invalidate_after_reply(shared, file);
            }
            Err(error) if error.raw_os_error() != Some(libc::EAGAIN) => {
                return reply.reply_error(error);
            }
            Ok(()) | Err(_) => {}
        }
        let left = result.is_err().then(|| AlignedBuf::copy_of(data));
        let deadline = if sync { Deadline::Unlimited } else { Deadline::IoTimeout };
        let (there, notify) = (file.clone(), Arc::clone(shared));
        let work = move || {
            if first {
                CowslipFs::invalidate_others(&notify, &there, range);
            }
            if let Some(data) = left {
                there.disk().write(data.as_slice(), offset, Wait::Yes)?;
            }
            self.invalidate(&notify, &there);
            if sync { there.disk().sync() } else { Ok(()) }
        };
        let (late, notify) = (file.clone(), Arc::clone(shared));
        let send = move |reply: ReplyWrite, ()| {
            reply.written(written);
            self.invalidate_after_reply(&notify, &late);
        };
        shared.deadlines.defer(file.disk(), self.pool_kind(file), deadline, reply, work, send);
    }

    /// The range in bytes of the disk.
    fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.len.into())
    }

    /// Whether the kernel must drop pages before the reply. Valid only after the write.
    fn must_invalidate(&self, file: &DiskFile) -> bool {
        self.has_cached_readers
            || self.origin == WriteOrigin::Client && file.is_cached_elsewhere(&self.range())
    }

    /// Makes the kernel drop the stale pages of the range.
    fn invalidate(&self, shared: &FsContext, file: &DiskFile) {
        if self.has_cached_readers {
            CowslipFs::invalidate(shared, file.disk(), self.range());
        } else if self.must_invalidate(file) {
            CowslipFs::invalidate_others(shared, file, self.range());
        }
    }

    /// Makes the kernel drop the other files' pages of a range that it wrote back, after the reply.
    fn invalidate_after_reply(&self, shared: &Arc<FsContext>, file: &DiskFile) {
        if self.origin == WriteOrigin::PageCache {
            CowslipFs::invalidate_then_reply(shared, file, self.range(), || ());
        }
    }

    /// The pool that does the part of the write that has to wait.
    fn pool_kind(&self, file: &DiskFile) -> PoolKind {
        let may_tell =
            self.origin == WriteOrigin::Client && !file.disk().partition_files().is_empty();
        match (self.has_cached_readers || may_tell, self.sync) {
            (true, _) => PoolKind::Invalidate,
            (false, true) => PoolKind::Sync,
            (false, false) => PoolKind::Work,
        }
    }
}

/// Opens a disk: readers through the kernel's cache, writers past it. Returns `ESTALE` for a disk
/// that is being removed.
pub(super) fn open_disk(
    handles: &Handles,
    cache: CacheMode,
    file: DiskFile,
    flags: OpenFlags,
) -> io::Result<(FileHandle, FopenFlags)> {
    let access = match flags.0 & libc::O_ACCMODE {
        libc::O_RDONLY => HandleAccess::Read,
        libc::O_WRONLY => HandleAccess::Write,
        _ => HandleAccess::ReadWrite,
    };
    let cached = match cache {
        // A stream is never cached: its contents change as it flows.
        _ if file.disk().stream().is_some() => false,
        _ if file.is_partition() => false,
        CacheMode::Auto => access == HandleAccess::Read,
        CacheMode::None => false,
        CacheMode::Writeback => true,
    };
    file.open_handle(access)?;
    let is_alone = file.disk().partition_files().is_empty();
    let handle = handles.add(Handle::Disk { file, access });
    let direct = FopenFlags::FOPEN_DIRECT_IO | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES;
    let flags = match (cached, is_alone) {
        // Cached pages stay valid: every change comes through this mount.
        (true, true) => FopenFlags::FOPEN_KEEP_CACHE,
        // While the file is not open, the kernel is not told of changes through the other files.
        (true, false) => FopenFlags::empty(),
        (false, _) => direct,
    };
    Ok((handle, flags))
}

/// Decodes the mode of fallocate(2); `None` if unsupported.
pub(super) fn decode_fallocate(mode: i32) -> Option<(FallocateMode, SizeMode)> {
    let keep = if mode & libc::FALLOC_FL_KEEP_SIZE != 0 { SizeMode::Keep } else { SizeMode::Grow };
    match mode & !libc::FALLOC_FL_KEEP_SIZE {
        0 => Some((FallocateMode::Allocate, keep)),
        libc::FALLOC_FL_PUNCH_HOLE if keep == SizeMode::Keep => Some((FallocateMode::Punch, keep)),
        libc::FALLOC_FL_ZERO_RANGE => Some((FallocateMode::Zero, keep)),
        _ => None,
    }
}

pub(super) fn to_system_time(time: Option<TimeOrNow>) -> Option<SystemTime> {
    time.map(|time| match time {
        TimeOrNow::SpecificTime(time) => fix_pre_epoch(time),
        TimeOrNow::Now => SystemTime::now(),
    })
}

/// Recovers the time that the kernel sent from fuser's decoding. A time before 1970 is sent as
/// negative seconds and positive nanoseconds: half a second before is -1 and 500,000,000. fuser
/// (0.18) subtracts both from the epoch, so the fraction must be added back twice.
fn fix_pre_epoch(time: SystemTime) -> SystemTime {
    let Err(before) = time.duration_since(UNIX_EPOCH) else { return time };
    let fraction = Duration::from_nanos(before.duration().subsec_nanos().into());
    time.checked_add(2 * fraction).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Decodes a time as fuser 0.18 does.
    fn decoded(secs: i64, nanos: u32) -> SystemTime {
        match u64::try_from(secs) {
            Ok(secs) => UNIX_EPOCH + Duration::new(secs, nanos),
            Err(_) => UNIX_EPOCH - Duration::new(secs.unsigned_abs(), nanos),
        }
    }

    #[test]
    fn times_before_1970_match_what_the_kernel_sent() {
        for (secs, nanos) in
            [(-1, 750_000_000), (-2, 500_000_000), (-2, 0), (-1, 1), (0, 5), (7, 9)]
        {
            let time = fix_pre_epoch(decoded(secs, nanos));
            let meant = i128::from(secs) * 1_000_000_000 + i128::from(nanos);
            let found = match time.duration_since(UNIX_EPOCH) {
                Ok(after) => after.as_nanos().cast_signed(),
                Err(before) => -before.duration().as_nanos().cast_signed(),
            };
            assert_eq!(found, meant, "{secs} s and {nanos} ns");
        }
    }
}
