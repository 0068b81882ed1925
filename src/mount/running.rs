//! A mount in service: periodic work, signals, and the shutdown.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use super::kernel::{MountHandle, UnmountMode};
use super::notify::{ServiceState, notify};
use super::plan::DaemonMode;
use super::signals::{Signals, signal_name};
use crate::disk::Disk;
use crate::fs::FsContext;
use crate::stream::UnmountPolicy;
use crate::stream::output::DrainTimeout;

/// Seconds between two rounds of maintenance; the longest time until changes are synced to the
/// device.
const MAINTENANCE_SECS: u32 = 5;

/// Time limit for open handles to be closed after a signal.
const HANDLE_TIMEOUT: Duration = Duration::from_secs(5);

/// Time limit at shutdown for all threads that wait for a base, together.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Time without progress of a sink after which a stream that ends with its mount is aborted.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Runs until `stop` is set. Every second, answers requests past their deadline; every
/// [`MAINTENANCE_SECS`] seconds, starts merges and syncs of the disks.
pub(super) fn tick(shared: &Arc<FsContext>, stop: &AtomicBool) {
    let mut seconds = 0;
    while !stop.load(Ordering::SeqCst) {
        thread::park_timeout(Duration::from_secs(1));
        shared.deadlines.expire();
        let disks = shared.catalog.disks();
        for disk in &disks {
            disk.tick_stream();
            disk.release_expired();
            drop_unmatched_pages(shared, disk);
        }
        seconds += 1;
        if seconds < MAINTENANCE_SECS {
            continue;
        }
        seconds = 0;
        for disk in disks {
            if disk.is_merge_due() {
                let target = Arc::clone(&disk);
                let merge = move || {
                    match target.merge_layers() {
                        // The disk has told it.
                        Err(error) if error.is_out_of_space() => {}
                        Err(error) => {
                            log::warn!("{}: layers are not merged: {error}", target.source);
                        }
                        Ok(()) => {}
                    }
                };
                let thread = thread::Builder::new().name("cowslip-tidy".to_owned());
                if let Err(error) = thread.spawn(merge) {
                    log::warn!("{}: layers are merged later: {error}", disk.source);
                }
            }
            if disk.needs_maintenance() {
                let pool = Arc::clone(&disk.pools.sync);
                pool.run(Box::new(move || {
                    if let Err(error) = disk.maintain() {
                        log::error!("{}: background sync: {error}", disk.source);
                    }
                }));
            }
        }
    }
}

/// Drops what the kernel has cached of a disk whose base was found not to match its bmap, and of its
/// snapshots: some of it was answered before.
fn drop_unmatched_pages(shared: &Arc<FsContext>, disk: &Arc<Disk>) {
    if disk.take_base_mismatch() {
        let (cache, target) = (Arc::clone(&shared.page_cache), Arc::clone(disk));
        let drop_pages = move || {
            cache.drop_all(&target);
            target.snapshot_files().iter().for_each(|file| cache.drop_all(file));
        };
        disk.pools.notify.run(Box::new(drop_pages));
    }
}

/// A mount in service.
pub(super) struct RunningMount {
    pub(super) shared: Arc<FsContext>,
    pub(super) workers: JoinHandle<io::Result<()>>,
    pub(super) mode: DaemonMode,
    /// Receives a message when the workers have ended.
    pub(super) ended: mpsc::Receiver<()>,
    pub(super) stop: Arc<AtomicBool>,
    pub(super) ticker: JoinHandle<()>,
}

impl RunningMount {
    /// Tells other processes that want one of the overlays about this daemon.
    pub(super) fn announce(&self) {
        let holder = self.shared.control.holder();
        for disk in self.shared.catalog.disks() {
            disk.write_holder(&holder);
        }
    }

    /// Unmounts lazily, even though files may be open.
    pub(super) fn unmount_lazily(&self) {
        self.shared.control.draining.store(true, Ordering::SeqCst);
        self.announce();
        let mountpoint = &self.shared.catalog.mountpoint;
        let is_ours = |held: &MountHandle| {
            let (major, minor) = held.entry().dev;
            self.shared.control.device.get() == Some(&rustix::fs::makedev(major, minor))
        };
        // A mount without a handle is gone already, or lies in a directory closed to us.
        let held = MountHandle::at(mountpoint).ok().flatten().filter(is_ours);
        if let Some(Err(error)) = held.map(|held| held.unmount(UnmountMode::Lazy)) {
            log::warn!("'{}' is not unmounted: {error}", mountpoint.display());
        }
    }

    /// Serves until the mount ends, then closes everything. Returns the exit code.
    pub(super) fn run(self, signals: Signals) -> u8 {
        self.wait(&signals);
        if self.mode == DaemonMode::Foreground {
            notify(ServiceState::Stopping);
        }
        let code = self.close();
        signals.close();
        code
    }

    /// Waits until the workers have ended, or until [`HANDLE_TIMEOUT`] after a signal.
    fn wait(&self, signals: &Signals) {
        loop {
            if let Some(signal) = signals.received() {
                log::info!("{}: leaving", signal_name(signal));
                self.unmount_lazily();
                if self.ended.recv_timeout(HANDLE_TIMEOUT) == Err(RecvTimeoutError::Timeout) {
                    log::warn!("files are still open: they will get errors from now on");
                }
                return;
            }
            match self.ended.recv_timeout(Duration::from_millis(200)) {
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Makes all data durable and closes all logs. Returns 1 when something failed, otherwise 0.
    fn close(self) -> u8 {
        self.shared.control.draining.store(true, Ordering::SeqCst);
        self.announce();
        self.stop.store(true, Ordering::SeqCst);
        self.ticker.thread().unpark();
        let mut code = 0;
        let until = Instant::now() + STOP_TIMEOUT;
        let left = || until.saturating_duration_since(Instant::now());
        let disks = self.shared.catalog.disks();
        for disk in &disks {
            if !disk.pools.stop(left()) {
                log::warn!("{}: a request is still waiting for its base", disk.source);
            }
        }
        for disk in disks.iter().filter(|disk| disk.stream().is_none()) {
            if let Err(error) = disk.close(left()) {
                log::error!("{}: not all of it could be made durable: {error}", disk.source);
                code = 1;
            }
        }
        // Streams come last: a slow sink must not delay the durability of the other disks.
        for (name, entry) in self.shared.catalog.list() {
            if let Err(line) = end_stream_on_unmount(&entry.disk) {
                log::error!("{name}: {line}");
                code = 1;
            }
        }
        self.shared.pool.stop(left());
        if self.workers.is_finished()
            && let Ok(Err(error)) = self.workers.join()
        {
            log::error!("FUSE: {error}");
            code = 1;
        }
        // The ticker waits for nothing after `Pools::stop`, and holds nothing that must be closed.
        let _ = self.ticker.join();
        log::info!("unmounted");
        code
    }
}

/// Finishes a stream that ends with its mount, for as long as its sink makes progress, and aborts
/// other unfinished streams.
fn end_stream_on_unmount(disk: &Disk) -> Result<(), String> {
    let line = disk.end_stream(UnmountPolicy::Settle, DrainTimeout::Stalled(STALL_TIMEOUT))?;
    if let Some(line) = line {
        log::info!("{line}");
    }
    Ok(())
}
