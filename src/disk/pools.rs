//! The threads of a disk. Each disk has its own, so a host that hangs holds only its own disks.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::pool::{MAX_THREADS, Pool, reserve};

/// Number of threads that read a disk's map, which is asked for now and then.
const MAP_THREADS: usize = 2;

/// The thread pools of a disk, by what their work may wait for.
pub struct Pools {
    /// Work that waits for the host.
    pub io: Arc<Pool>,
    /// Requests to the kernel to drop its cache. They may wait for the work of `io`.
    pub notify: Arc<Pool>,
    /// Syncs, which wait for the device.
    pub sync: Arc<Pool>,
    /// Descriptions of the disk's map, so that reading a map takes no thread from reads of the
    /// disk.
    pub map: Arc<Pool>,
}

impl Default for Pools {
    fn default() -> Self {
        Self {
            io: Arc::default(),
            notify: Arc::new(Pool::with_reserve(MAX_THREADS, &reserve::KERNEL_WAITS)),
            sync: Arc::default(),
            map: Arc::new(Pool::with_threads(MAP_THREADS)),
        }
    }
}

impl Pools {
    /// Lets all threads finish their work. Returns whether they did within `timeout`.
    pub fn stop(&self, timeout: Duration) -> bool {
        let until = Instant::now() + timeout;
        let left = || until.saturating_duration_since(Instant::now());
        // Every pool is stopped, even after one has timed out.
        let pools = [&self.notify, &self.io, &self.sync, &self.map];
        pools.map(|pool| pool.stop(left())) == [true; 4]
    }
}
