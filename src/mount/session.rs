//! The FUSE session of a mount: mount(2), the handshake with the kernel, the workers.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc::{self, TryRecvError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use fuser::{Config, Session, SessionACL};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use super::kernel::{self, MountAccess, MountHandle, MountParams, UnmountMode};
use super::plan::{DaemonMode, MountPlan};
use super::running::{RunningMount, tick};
use crate::config::MountOptions;
use crate::fs::{CowslipFs, FsContext, kernel_invalidator};
use crate::pool::reserve;

/// Read-ahead of the mount in KiB. Cold sequential reads are twice as fast as with the kernel's
/// default of 128.
const READ_AHEAD_KIB: u32 = 1024;

/// Maximum number of attempts to unmount after a failed start, [`UNDO_INTERVAL`] apart: 2 s in all.
const UNDO_TRIES: u32 = 100;
/// Pause between two attempts to unmount after a failed start.
const UNDO_INTERVAL: Duration = Duration::from_millis(20);

/// Interval at which [`wait_for_workers`] checks whether all workers have started.
const WORKER_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Mounts on `directory`, which is at `mountpoint`, and starts the threads that answer. Returns
/// when the mount answers.
///
/// # Errors
/// A line for the user; nothing is mounted then, or the line says so.
pub(super) fn mount_and_spawn(
    plan: &MountPlan,
    mountpoint: &Path,
    directory: OwnedFd,
    shared: Arc<FsContext>,
) -> Result<RunningMount, String> {
    let (access, acl) = if plan.options.allow_other {
        (MountAccess::Everybody, SessionACL::All)
    } else {
        (MountAccess::Owner, SessionACL::Owner)
    };
    let device = kernel::mount(&MountParams {
        mountpoint,
        directory: directory.as_fd(),
        source: &plan.source,
        access,
        flags: mount_flags(&plan.options),
    })
    .map_err(|error| error.to_string())?;
    // This descriptor now lies below the mount, and would keep the file system busy.
    drop(directory);
    let held = MountHandle::at(mountpoint).ok().flatten();
    let mut config = Config::default();
    config.acl = acl;
    let workers = worker_count();
    config.n_threads = Some(workers);
    config.clone_fd = true;
    let undo = |error: io::Error| {
        let line = format!("FUSE at '{}': {error}", mountpoint.display());
        match undo_mount(held.as_ref()) {
            Ok(()) => line,
            Err(error) => format!("{line}; and it cannot be unmounted: {error}"),
        }
    };
    let fs = CowslipFs::new(Arc::clone(&shared), workers, device.try_clone().ok());
    let session = Session::from_fd(fs, device, acl, config).map_err(undo)?;
    shared.page_cache.connect(session.notifier());
    let _ = shared.control.invalidator.set(kernel_invalidator(session.notifier()));
    if let Some(held) = &held {
        let dev = held.entry().dev;
        let _ = shared.control.device.set(rustix::fs::makedev(dev.0, dev.1));
        if !kernel::raise_read_ahead(dev, READ_AHEAD_KIB) {
            log::info!("read-ahead stays at the kernel's default: only root can raise it");
        }
    }
    spawn_workers(plan.mode, shared, session, workers).map_err(undo)
}

/// The flags of a mount with `options`.
fn mount_flags(options: &MountOptions) -> MountFlags {
    let words = [
        (options.read_only, "ro"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
        (!options.nodev, "dev"),
        (!options.nosuid, "suid"),
    ];
    let set = words.into_iter().filter(|(is_set, _)| *is_set);
    set.fold(kernel::DEFAULT_FLAGS, |flags, (_, word)| {
        kernel::with_option(flags, word).unwrap_or(flags)
    })
}

/// The number of workers: one more than there are cores, so that no core idles while a worker
/// sleeps in the host.
pub(super) fn worker_count() -> usize {
    thread::available_parallelism().map_or(2, usize::from) + 1
}

/// Unmounts a mount that was not announced yet. Without root this starts `fusermount3`, which may
/// have to wait (`EAGAIN`) until the threads of the failed mount have exited.
fn undo_mount(held: Option<&MountHandle>) -> io::Result<()> {
    let Some(held) = held else { return Err(Errno::NOENT.into()) };
    let mut tries = 0;
    loop {
        match held.unmount(UnmountMode::Lazy) {
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) && tries < UNDO_TRIES => {
                tries += 1;
                thread::sleep(UNDO_INTERVAL);
            }
            done => return done,
        }
    }
}

fn spawn_workers(
    mode: DaemonMode,
    shared: Arc<FsContext>,
    session: Session<CowslipFs>,
    count: usize,
) -> io::Result<RunningMount> {
    let (end, ended) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    reserve::start()?;
    let workers = thread::Builder::new().name("cowslip-fuse".to_owned()).spawn(move || {
        let result = session.run();
        // The receiver is dropped when the process is already exiting.
        let _ = end.send(());
        result
    })?;
    let workers = wait_for_workers(workers, &ended, count)?;
    let ticker = thread::Builder::new().name("cowslip-tick".to_owned()).spawn({
        let (shared, stop) = (Arc::clone(&shared), Arc::clone(&stop));
        move || tick(&shared, &stop)
    })?;
    Ok(RunningMount { shared, workers, mode, ended, stop, ticker })
}

/// Waits until all workers have started. The session starts them in a thread of its own, and
/// reports a failure only by ending, by which time the mount would have been announced.
fn wait_for_workers(
    session: JoinHandle<io::Result<()>>,
    ended: &mpsc::Receiver<()>,
    count: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    loop {
        if ended.try_recv() != Err(TryRecvError::Empty) {
            // A panic in the session has already aborted the process.
            let result = session.join().unwrap_or(Ok(()));
            return Err(result.err().unwrap_or_else(|| io::Error::other("it ended at once")));
        }
        // Without /proc the number of workers is unknown; that is no reason to fail here.
        if started_workers().is_none_or(|started| started >= count) {
            return Ok(session);
        }
        thread::sleep(WORKER_POLL_INTERVAL);
    }
}

/// Counts the threads of this process that answer requests, by the names that fuser gives them.
fn started_workers() -> Option<usize> {
    let names = fs::read_dir("/proc/self/task").ok()?.flatten();
    let names = names.filter_map(|task| fs::read(task.path().join("comm")).ok());
    Some(names.filter(|name| name.starts_with(b"fuser-")).count())
}
