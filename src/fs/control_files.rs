//! The files in `.cowslip`: opening, reading and writing them.
//!
//! The kernel checks owner and mode. Beyond that, requests, and facts about the host, are only for
//! root and the user who mounted, whatever mode a disk was given.

use std::io;
use std::sync::Arc;

use fuser::{Errno, FopenFlags, ReplyData, ReplyOpen, Request};

use super::context::{CowslipFs, FsContext};
use super::handles::{Handle, Handles, Requester};
use super::reply::{Deadline, PoolKind};
use crate::control::{ControlNode, ControlSession, MapText, StatusAudience};
use crate::host::os_error;
use crate::logging;

impl CowslipFs {
    /// Returns the user who sent `request`.
    pub(super) fn requester(&self, request: &Request) -> Requester {
        let uid = request.uid();
        Requester { uid, is_trusted: self.nodes.is_trusted(uid) }
    }

    /// Opens a control file.
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
                let deadlines = &self.shared.deadlines;
                deadlines.defer(disk, PoolKind::Map, Deadline::IoTimeout, reply, work, send);
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

    /// Takes a write to a control file, and returns its length.
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
}

/// Opens a control file for `requester`.
fn open_node(
    shared: &FsContext,
    requester: Requester,
    node: ControlNode,
    handles: &Handles,
) -> io::Result<Handle> {
    let not_found = || os_error(libc::ENOENT);
    let control = &shared.control;
    Ok(match node {
        ControlNode::Status => Handle::Text(handles.share_text(control.status())),
        ControlNode::Log => Handle::Log(logging::oldest_offset()),
        ControlNode::DiskStatus(slot) => {
            let (name, entry) = shared.catalog.disk_by_slot(slot).ok_or_else(not_found)?;
            let audience =
                if requester.is_trusted { StatusAudience::Trusted } else { StatusAudience::Other };
            Handle::Text(handles.share_text(control.disk_status(&name, &entry, audience)))
        }
        ControlNode::DiskMap(slot) => {
            let (_, entry) = shared.catalog.disk_by_slot(slot).ok_or_else(not_found)?;
            let disk = Arc::clone(&entry.disk);
            Handle::Map { text: Arc::new(MapText::new(Arc::clone(&disk))), disk }
        }
        ControlNode::DiskCtl(slot) if shared.catalog.disk_by_slot(slot).is_none() => {
            return Err(not_found());
        }
        ControlNode::Ctl | ControlNode::DiskCtl(_) => {
            Handle::Ctl { session: Arc::new(ControlSession::default()), node }
        }
        ControlNode::Directory | ControlNode::Disk(_) | ControlNode::Snapshots(_) => {
            return Err(os_error(libc::EISDIR));
        }
    })
}
