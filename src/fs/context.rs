//! The state of the adapter: its own, and the part that it shares with the mount around it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::SystemTime;

use super::busy_poll::BusyPoll;
use super::handles::Handles;
use super::nodes::Nodes;
use super::page_cache::PageCache;
use super::passthrough::PassthroughInodes;
use super::reply::Deadlines;
use super::worker_limit::WorkerLimit;
use crate::catalog::Catalog;
use crate::control::Control;
use crate::pool::Pool;

/// State shared between the adapter and the mount.
pub(crate) struct FsContext {
    /// The disks and their names.
    pub catalog: Arc<Catalog>,
    /// The `.cowslip` directory.
    pub control: Arc<Control>,
    /// The requests with a deadline.
    pub deadlines: Deadlines,
    /// The kernel's page cache.
    pub page_cache: Arc<PageCache>,
    /// Threads for work that belongs to no disk.
    pub pool: Arc<Pool>,
    /// Threads for requests to the control files, and for reads that wait for the answers.
    pub control_pool: Arc<Pool>,
    /// User id and group id of the user who mounted.
    pub owner: (u32, u32),
    /// The time of the mount.
    pub mounted_at: SystemTime,
}

/// The file system as the kernel sees it.
pub(crate) struct CowslipFs {
    pub(super) shared: Arc<FsContext>,
    pub(super) nodes: Arc<Nodes>,
    pub(super) handles: Arc<Handles>,
    pub(super) passthrough: PassthroughInodes,
    pub(super) worker_limit: WorkerLimit,
    pub(super) busy_poll: BusyPoll,
}

impl CowslipFs {
    /// Creates the adapter of a mount with `workers` threads. `device` is the connection to the
    /// kernel, polled for the next request.
    #[must_use]
    pub(crate) fn new(shared: Arc<FsContext>, workers: usize, device: Option<OwnedFd>) -> Self {
        Self {
            nodes: Arc::new(Nodes::new(Arc::clone(&shared.catalog), shared.owner)),
            shared,
            handles: Arc::default(),
            passthrough: PassthroughInodes::default(),
            worker_limit: WorkerLimit::new(workers),
            busy_poll: BusyPoll::new(device),
        }
    }

    pub(super) fn page_cache(&self) -> &Arc<PageCache> {
        &self.shared.page_cache
    }
}
