//! The life cycle of a mount: opening the disks, mounting, serving requests, and a shutdown that
//! loses no data.
//!
//! ```text
//!   serve:  prepare the mountpoint -> open the disks -> mount(2) -> FUSE handshake -> "ready"
//!           workers answer until the mount disappears (umount, or a signal that unmounts it)
//!           stop the pools -> sync and close every disk -> exit code
//! ```
//!
//! `disks` opens the disks of a mount; `running` serves and shuts down the mount. `kernel` mounts
//! and unmounts, `daemon` forks, `signals` catches signals from the very start, `limits` checks that
//! the resource limits suffice, `notify` informs the service manager, and `openers` lists the
//! processes that have files of a mount open. Only this file and `fs` name `fuser`.

pub mod daemon;
mod disks;
pub mod kernel;
mod limits;
mod notify;
pub mod openers;
mod running;
mod signals;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::{self, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, SystemTime};

use fuser::{Config, Session, SessionACL};
use rustix::io::Errno;

use self::daemon::StartupReporter;
use self::disks::{open_disks, open_store};
use self::kernel::{AllowedContents, MountHandle, MountParams, UnmountMode};
use self::notify::{ServiceState, notify};
use self::running::{RunningMount, tick};
use self::signals::Signals;
use crate::catalog::Catalog;
use crate::config::{CacheMode, DiskSource, DiskSpec, Flow, MountOptions, SinkSpec};
use crate::confined;
use crate::control::{self, Control};
use crate::fs::{CowslipFs, Deadlines, FsContext, PageCache, kernel_invalidator};
use crate::logging::{self, LogTarget};
use crate::name::CONTROL_DIR;
use crate::pool::{Pool, run_cancellable};
use crate::process::{self, InheritedFds};
use crate::stream::sink::StdioMode;

/// Read-ahead of the mount in KiB. Cold sequential reads are twice as fast as with the kernel's
/// default of 128.
const READ_AHEAD_KIB: u32 = 1024;

/// Maximum number of attempts to unmount after a failed start, [`UNDO_INTERVAL`] apart: 2 s in all.
const UNDO_TRIES: u32 = 100;
/// Pause between two attempts to unmount after a failed start.
const UNDO_INTERVAL: Duration = Duration::from_millis(20);

/// Interval at which [`wait_for_workers`] checks whether all workers have started.
const WORKER_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Policy for a base that changed under its overlay.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnChangedBase {
    /// Refuse to open the disk.
    Refuse,
    /// Open the disk and log a warning.
    Accept,
}

/// Whether the mount runs in the background.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonMode {
    /// Run as a daemon.
    Background,
    /// Run in the caller's terminal, or under systemd (`-f`).
    Foreground,
}

/// Parameters of a mount.
pub struct MountPlan {
    /// The mountpoint; absolute.
    pub mountpoint: PathBuf,
    /// The source that the mount table shows.
    pub source: String,
    /// The disks given on the command line and in the TOML file.
    pub disks: Vec<DiskSpec>,
    /// The directory of the store; absolute.
    pub store: Option<PathBuf>,
    /// Directories below which an image may have its backing files; absolute.
    pub allow_backing: Vec<PathBuf>,
    /// Use of the kernel's page cache.
    pub cache: CacheMode,
    /// The mount options (`-o`).
    pub options: MountOptions,
    /// The log file (`--log`); absolute.
    pub log: Option<PathBuf>,
    /// Policy for a base that changed (`--force`).
    pub force: OnChangedBase,
    /// Foreground (`-f`) or background.
    pub mode: DaemonMode,
    /// Whether streams may use the caller's standard input and output: only with `-f`, and for
    /// `cowslip run`.
    pub stdio: StdioMode,
}

impl MountPlan {
    /// Returns whether a stream is written to standard output.
    #[must_use]
    pub fn has_stdout_sink(&self) -> bool {
        self.disks.iter().any(|disk| match &disk.source {
            DiskSource::Stream(stream) => stream.flow == Flow::Out(SinkSpec::Stdout),
            DiskSource::File(_) | DiskSource::Blank(_) => false,
        })
    }
}

/// Serves `plan` until it is unmounted, and reports notes, success or failure of the start through
/// `ready`. Returns the process's exit code: 0, or 1 when something failed.
///
/// A signal at any time leads to an orderly shutdown. With `-f`, a signal that arrives before the
/// mount is up ends the process by that signal, once everything is undone.
#[must_use]
pub fn serve(plan: &MountPlan, ready: StartupReporter) -> u8 {
    abort_on_panic();
    let inherited = InheritedFds::find();
    let signals = match Signals::listen() {
        Ok(signals) => signals,
        Err(error) => {
            ready.fail(1, &format!("cannot listen to signals: {error}"));
            return 1;
        }
    };
    let mount = match start(plan, &ready, &signals) {
        Ok(mount) => mount,
        Err(line) => {
            ready.fail(1, &line);
            if let Some(signal) = signals.received().filter(|_| plan.mode == DaemonMode::Foreground)
            {
                // The parent process sees from the wait status which signal ended this one.
                let _ = signal_hook::low_level::emulate_default_handler(signal);
            }
            return 1;
        }
    };
    signals.set_serving();
    match plan.mode {
        DaemonMode::Background => inherited.close(),
        DaemonMode::Foreground => notify(ServiceState::Ready),
    }
    if ready.succeed().is_err() {
        log::warn!("whoever asked for this mount is gone: it is taken away again");
        mount.unmount_lazily();
    }
    mount.run(signals)
}

/// Aborts the process on a panic: otherwise one worker would end silently, and the kernel would
/// wait forever for the replies it owes.
fn abort_on_panic() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        log::error!("{panic}");
        hook(panic);
        std::process::abort();
    }));
}

fn start(
    plan: &MountPlan,
    ready: &StartupReporter,
    signals: &Signals,
) -> Result<RunningMount, String> {
    let sink = open_log(plan)?;
    process::apply_daemon_limits();
    logging::start(sink);
    let reserve = limits::reserve_fds()?;
    limits::check(worker_count())?;
    let contents = if plan.options.nonempty { AllowedContents::Any } else { AllowedContents::None };
    let prepared = kernel::prepare_mountpoint(&plan.mountpoint, contents)
        .map_err(|error| error.to_string())?;
    let (mountpoint, directory) = (prepared.mountpoint, prepared.directory);
    if prepared.cleared > 0 {
        let line = format!("'{}': cleared a dead mount", mountpoint.display());
        ready.note(&line);
        log::info!("{line}");
    }
    let catalog = Arc::new(Catalog::new(&mountpoint, open_store(plan, &mountpoint)?));
    // A crafted image may take forever to open: stop on a signal, or when the waiting command has
    // exited.
    let wanted = signals.cancellable(ready.request());
    let opened = run_cancellable(wanted, || open_disks(plan, &catalog, signals));
    // An open that was cancelled failed only because of the signal, so report the signal.
    let opened = opened.map_err(|line| signals.check_interrupted().err().unwrap_or(line));
    let mounted = opened.and_then(|lines| {
        redirect_stdout(plan)?;
        // Check again, since the disks now hold their threads and descriptors.
        limits::check(worker_count())?;
        signals.check_interrupted()?;
        let mount = mount_and_spawn(plan, &mountpoint, directory, fs_context(plan, &catalog))?;
        Ok((mount, lines))
    });
    let (mount, lines) = mounted.inspect_err(|_| {
        drop(reserve);
        abandon_disks(&catalog);
    })?;
    lines.iter().for_each(|line| ready.note(line));
    mount.announce();
    log::info!("mounted at '{}'", mountpoint.display());
    Ok(mount)
}

/// Builds the state shared by the workers and the threads around them.
fn fs_context(plan: &MountPlan, catalog: &Arc<Catalog>) -> Arc<FsContext> {
    let control = Arc::new(Control {
        catalog: Arc::clone(catalog),
        source: plan.source.clone(),
        cache: plan.cache,
        draining: AtomicBool::new(false),
        device: OnceLock::new(),
        invalidator: OnceLock::new(),
        running_requests: AtomicUsize::new(0),
    });
    Arc::new(FsContext {
        catalog: Arc::clone(catalog),
        control,
        deadlines: Deadlines::new(Duration::from_secs(plan.options.io_timeout)),
        page_cache: Arc::new(PageCache::new(plan.cache)),
        pool: Arc::new(Pool::default()),
        control_pool: Arc::new(Pool::with_threads(control::REQUEST_THREADS)),
        owner: current_ids(),
        mounted_at: SystemTime::now(),
    })
}

/// Closes all disks after a failed start, and removes the overlays that were created for them.
fn abandon_disks(catalog: &Catalog) {
    for disk in catalog.disks() {
        disk.abandon();
    }
}

/// Redirects standard output to standard error once a stream owns it: nothing else may be written
/// into the stream, and its reader must see end-of-file when the stream ends.
fn redirect_stdout(plan: &MountPlan) -> Result<(), String> {
    if plan.mode == DaemonMode::Background || !plan.has_stdout_sink() {
        return Ok(());
    }
    // SAFETY: dup2 takes two numbers and touches no memory; std owns neither as an `OwnedFd`.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(format!("stdout: {}", io::Error::last_os_error()));
    }
    Ok(())
}

fn current_ids() -> (u32, u32) {
    (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw())
}

fn open_log(plan: &MountPlan) -> Result<LogTarget, String> {
    match (&plan.log, plan.mode) {
        (Some(path), _) => {
            let file = confined::open_append(path);
            file.map(LogTarget::File).map_err(|error| format!("log '{}': {error}", path.display()))
        }
        (None, DaemonMode::Foreground) => Ok(LogTarget::Stderr),
        (None, DaemonMode::Background) => Ok(LogTarget::System),
    }
}

fn mount_and_spawn(
    plan: &MountPlan,
    mountpoint: &Path,
    directory: OwnedFd,
    shared: Arc<FsContext>,
) -> Result<RunningMount, String> {
    let options = &plan.options;
    let mut flags = kernel::DEFAULT_FLAGS;
    let words = [
        (options.read_only, "ro"),
        (options.noexec, "noexec"),
        (options.noatime, "noatime"),
        (!options.nodev, "dev"),
        (!options.nosuid, "suid"),
    ];
    for (_, word) in words.into_iter().filter(|(is_set, _)| *is_set) {
        flags = kernel::with_option(flags, word).unwrap_or(flags);
    }
    let (access, acl) = if options.allow_other {
        (kernel::MountAccess::Everybody, SessionACL::All)
    } else {
        (kernel::MountAccess::Owner, SessionACL::Owner)
    };
    let source = &plan.source;
    let request = MountParams { mountpoint, directory: directory.as_fd(), source, access, flags };
    let device = kernel::mount(&request).map_err(|error| error.to_string())?;
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

/// The number of workers: one more than there are cores, so that no core idles while a worker
/// sleeps in the host.
fn worker_count() -> usize {
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
    style: DaemonMode,
    shared: Arc<FsContext>,
    session: Session<CowslipFs>,
    count: usize,
) -> io::Result<RunningMount> {
    let (end, ended) = mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
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
    Ok(RunningMount { shared, workers, mode: style, ended, stop, ticker })
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
        if started_workers().is_none_or(|there| there >= count) {
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

/// Returns the path of a mount's control directory.
#[must_use]
pub fn control_dir(mountpoint: &Path) -> PathBuf {
    mountpoint.join(CONTROL_DIR)
}
