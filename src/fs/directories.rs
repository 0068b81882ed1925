//! Directories: opening and reading them.
//!
//! A directory is listed from memory, on the worker. Only the snapshots of a disk are listed in the
//! mount's pool: their names are under a lock that is held while the host makes the `stack` durable,
//! or are files in a directory of the host.

use std::io;
use std::sync::Arc;

use fuser::{Errno, FileHandle, FopenFlags, INodeNo, ReplyDirectory, ReplyOpen};

use super::attr;
use super::context::CowslipFs;
use super::handles::{DirectoryHandle, Handle, Handles, Listing, Requester};
use super::nodes::Nodes;
use super::reply::ErrorReply;
use crate::host::os_error;

/// Lists the directory `ino` for `requester`.
///
/// # Errors
/// The errors of [`Nodes::list`] and [`Handles::share_listing`].
fn list(
    nodes: &Nodes,
    handles: &Handles,
    requester: Requester,
    ino: u64,
) -> io::Result<Arc<Listing>> {
    handles.share_listing(requester, ino, nodes.list(ino)?)
}

/// Fills `reply` with the entries of `listing` from number `offset` on.
fn reply_entries(mut reply: ReplyDirectory, listing: &Listing, offset: u64) {
    let skip = usize::try_from(offset).unwrap_or(usize::MAX);
    for (at, entry) in listing.entries.iter().enumerate().skip(skip) {
        let kind = attr::file_type(entry.is_directory);
        if reply.add(INodeNo(entry.ino), at as u64 + 1, kind, &entry.name) {
            break;
        }
    }
    reply.ok();
}

impl CowslipFs {
    /// Opens the directory `ino`.
    pub(super) fn open_directory(&self, requester: Requester, ino: u64, reply: ReplyOpen) {
        let permit = match self.handles.permit(requester) {
            Ok(permit) => permit,
            Err(error) => return reply.error(error.into()),
        };
        let (nodes, handles) = (Arc::clone(&self.nodes), Arc::clone(&self.handles));
        let work = move || list(&nodes, &handles, requester, ino);
        let handles = Arc::clone(&self.handles);
        self.run_listing(ino, reply, work, move |reply, listing| {
            let handle = Handle::Directory(DirectoryHandle::new(ino, listing));
            let handle = handles.add_with_permit(permit, handle);
            reply.opened(handle, FopenFlags::empty());
        });
    }

    /// Answers a read of an open directory.
    pub(super) fn read_directory(
        &self,
        requester: Requester,
        fh: FileHandle,
        offset: u64,
        reply: ReplyDirectory,
    ) {
        let Some(handle) = self.handles.find(fh) else {
            return reply.error(Errno::EBADF);
        };
        let Handle::Directory(directory) = &*handle else {
            return reply.error(Errno::ENOTDIR);
        };
        let ino = directory.ino();
        let (nodes, handles) = (Arc::clone(&self.nodes), Arc::clone(&self.handles));
        let work = move || match &*handle {
            Handle::Directory(directory) => {
                directory.read(offset, |ino| list(&nodes, &handles, requester, ino))
            }
            _ => Err(os_error(libc::ENOTDIR)),
        };
        self.run_listing(ino, reply, work, move |reply, listing| {
            reply_entries(reply, &listing, offset);
        });
    }

    /// Runs `work`, which lists the directory `ino`: here, or in the mount's pool if it may wait for
    /// the host.
    fn run_listing<R: ErrorReply>(
        &self,
        ino: u64,
        reply: R,
        work: impl FnOnce() -> io::Result<Arc<Listing>> + Send + 'static,
        send: impl FnOnce(R, Arc<Listing>) + Send + 'static,
    ) {
        if Nodes::waits_to_list(ino) {
            return self.run_on_mount_pool(reply, move |_| work(), send);
        }
        match work() {
            Ok(listing) => send(reply, listing),
            Err(error) => reply.reply_error(error),
        }
    }
}
