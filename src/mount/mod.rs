//! A mount from its beginning to its end: opening the disks, the kernel's side, the workers, and
//! an end that loses nothing.
//!
//! ```text
//!   serve:  prepare the mountpoint -> open the disks -> mount(2) -> FUSE hello -> "ready"
//!           workers answer until the mount is gone (umount, or a signal that takes it away)
//!           stop the pools -> sync and close every disk -> exit code
//! ```
//!
//! `disks` opens what is to be mounted, `running` is the life and the end of a mount. `kernel` mounts
//! and unmounts, `mountinfo` reads the mount table, `daemon` forks, `signals` are listened to from
//! the first moment on, `limits` looks whether the limits suffice, `notify` tells the service manager,
//! `openers` tells who has files of a mount open. Only this file and `fs` name `fuser`.

pub mod daemon;
mod disks;
pub mod kernel;
mod limits;
pub(crate) mod mountinfo;
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
use crate::fs::{CowslipFs, Deadlines, FsContext, kernel_invalidator};
use crate::logging::{self, LogTarget};
use crate::name::CONTROL_DIR;
use crate::pool::{Pool, run_cancellable};
use crate::process::{self, InheritedFds};
use crate::stream::sink::StdioMode;

/// Read-ahead of the mount in KiB: cold sequential reads are twice as fast as with the kernel's 128.
const READ_AHEAD_KIB: u32 = 1024;

/// How often it is tried to take a mount away that did not come about, and how long between: 2 s.
const UNDO_TRIES: u32 = 100;
const UNDO_INTERVAL: Duration = Duration::from_millis(20);

/// How often is looked whether all workers have started.
const WORKER_POLL_INTERVAL: Duration = Duration::from_millis(1);

/// Whether a base that changed under its overlay is used all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnChangedBase {
    /// It is refused.
    Refuse,
    /// It is used, and the log says so.
    Accept,
}

/// Whether the mount runs behind the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DaemonMode {
    /// As a daemon.
    Background,
    /// In the caller's terminal, or under systemd (`-f`).
    Foreground,
}

/// Everything a mount is to be.
pub struct MountPlan {
    /// Where; absolute.
    pub mountpoint: PathBuf,
    /// What the mount table shows.
    pub source: String,
    /// The disks given.
    pub disks: Vec<DiskSpec>,
    /// The store's directory; absolute.
    pub store: Option<PathBuf>,
    /// Directories below which files may lie that a base names; absolute.
    pub allow_backing: Vec<PathBuf>,
    /// How the kernel's cache is used.
    pub cache: CacheMode,
    /// `-o`.
    pub options: MountOptions,
    /// `--log`; absolute.
    pub log: Option<PathBuf>,
    /// `--force`.
    pub force: OnChangedBase,
    /// `-f`.
    pub mode: DaemonMode,
    /// Whether streams may have the caller's standard input and output: with `-f` and `running`.
    pub stdio: StdioMode,
}

impl MountPlan {
    /// Whether a stream goes to the standard output.
    #[must_use]
    pub fn has_stdout_sink(&self) -> bool {
        self.disks.iter().any(|disk| match &disk.source {
            DiskSource::Stream(stream) => stream.flow == Flow::Out(SinkSpec::Stdout),
            DiskSource::File(_) | DiskSource::Blank(_) => false,
        })
    }
}

/// Serves `plan` until it is unmounted, and tells `ready` what to print and when the mount is
/// there. Returns the process's exit code: 0, or 1 when something could not be done.
///
/// A signal at any moment ends it in good order; with `-f` one that comes before the mount is there
/// ends the process as signals do, once everything is undone.
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
                // Whoever started us sees why we ended.
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

/// A panic would take one worker away in silence; the kernel's queue would wait for it for ever.
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
    // What is opened may have been made to be read for ever: not once nobody waits for it.
    let wanted = signals.cancellable(ready.request());
    let opened = run_cancellable(wanted, || open_disks(plan, &catalog, signals));
    // What was given up has no other reason.
    let opened = opened.map_err(|line| signals.check_interrupted().err().unwrap_or(line));
    let mounted = opened.and_then(|lines| {
        redirect_stdout(plan)?;
        // Once more, now that the disks have taken what they need.
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

/// What the workers and everything around them share.
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
        notifier: OnceLock::new(),
        pool: Arc::new(Pool::default()),
        control_pool: Arc::new(Pool::with_threads(control::REQUEST_THREADS)),
        cache: plan.cache,
        owner: current_ids(),
        mounted_at: SystemTime::now(),
    })
}

/// The mount did not come about: what was opened is closed in good order, what was made goes.
fn abandon_disks(catalog: &Catalog) {
    for disk in catalog.disks() {
        disk.abandon();
    }
}

/// A stream has the standard output now: nothing else may get into it, and its reader must see
/// the end when the stream has ended.
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
    // Below the mount now, where it would keep the file system busy.
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
    let _ = shared.notifier.set(session.notifier());
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

/// One more than there are cores: a worker that sleeps in the host leaves none idle.
fn worker_count() -> usize {
    thread::available_parallelism().map_or(2, usize::from) + 1
}

/// Takes away a mount that nobody has seen yet. A user's goes by a program, which may have to wait
/// until the threads that were there for the mount have left room for it.
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
        // Nobody listens any more when the process is already leaving.
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

/// Waits until all workers are there. The session starts them in a thread of its own, and says only
/// by ending that it could not: by then the mount would have been announced.
fn wait_for_workers(
    session: JoinHandle<io::Result<()>>,
    ended: &mpsc::Receiver<()>,
    count: usize,
) -> io::Result<JoinHandle<io::Result<()>>> {
    loop {
        if ended.try_recv() != Err(TryRecvError::Empty) {
            // A panic in it has ended the process already.
            let result = session.join().unwrap_or(Ok(()));
            return Err(result.err().unwrap_or_else(|| io::Error::other("it ended at once")));
        }
        // Without /proc nothing works here; whether it is there is not for this to say.
        if started_workers().is_none_or(|there| there >= count) {
            return Ok(session);
        }
        thread::sleep(WORKER_POLL_INTERVAL);
    }
}

/// How many threads of this process answer requests, by the names that fuser gives them.
fn started_workers() -> Option<usize> {
    let names = fs::read_dir("/proc/self/task").ok()?.flatten();
    let names = names.filter_map(|task| fs::read(task.path().join("comm")).ok());
    Some(names.filter(|name| name.starts_with(b"fuser-")).count())
}

/// The path of a mount's control directory.
#[must_use]
pub fn control_dir(mountpoint: &Path) -> PathBuf {
    mountpoint.join(CONTROL_DIR)
}
