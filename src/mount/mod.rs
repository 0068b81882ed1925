//! The life cycle of a mount: opening the disks, mounting, serving requests, and a shutdown that
//! loses no data.
//!
//! ```text
//!   serve:  prepare the mountpoint -> open the disks -> mount(2) -> FUSE handshake -> "ready"
//!           workers answer until the mount disappears (umount, or a signal that unmounts it)
//!           stop the pools -> sync and close every disk -> exit code
//! ```
//!
//! `plan` has the parameters, `disks` opens the disks of a mount, `session` mounts and starts the
//! workers, `running` serves and shuts down. `kernel` mounts and unmounts, `daemon` forks, `signals`
//! catches signals from the very start, `limits` checks that the resource limits suffice, `notify`
//! informs the service manager, and `openers` lists the processes that have files of a mount open.
//! Only `session` and `fs` name `fuser`.

pub(crate) mod daemon;
mod disks;
pub(crate) mod kernel;
mod limits;
mod log_file;
mod notify;
pub(crate) mod openers;
mod plan;
mod running;
mod session;
mod signals;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use parking_lot::RwLock;

use self::daemon::StartupReporter;
use self::disks::{open_disks, open_store};
use self::kernel::AllowedContents;
use self::notify::{ServiceState, notify};
use self::plan::current_ids;
pub(crate) use self::plan::{DaemonMode, MountPlan, OnChangedBase};
use self::running::RunningMount;
use self::session::{mount_and_spawn, worker_count};
use self::signals::Signals;
use crate::catalog::Catalog;
use crate::control::{self, Control};
use crate::fs::{Deadlines, FsContext, PageCache};
use crate::logging::{self, LogTarget};
use crate::pool::{Pool, reserve, run_cancellable};
use crate::process::{self, InheritedFds};

/// Serves `plan` until it is unmounted, and reports notes, success or failure of the start through
/// `ready`. Returns the process's exit code: 0, or 1 when something failed.
///
/// A signal at any time leads to an orderly shutdown. With `-f`, a signal that arrives before the
/// mount is up ends the process by that signal, once everything is undone.
#[must_use]
pub(crate) fn serve(plan: &MountPlan, ready: StartupReporter) -> u8 {
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
        log::warn!("the command that started this mount is gone: unmounting");
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
    let reserve = limits::reserve_fds(worker_count())?;
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
    let request = signals.cancellable(ready.request());
    let opened = run_cancellable(request, || open_disks(plan, &catalog, signals));
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
        catalog.abandon();
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
        summarised: RwLock::default(),
    });
    Arc::new(FsContext {
        catalog: Arc::clone(catalog),
        control,
        deadlines: Deadlines::new(Duration::from_secs(plan.options.io_timeout)),
        page_cache: Arc::new(PageCache::new(plan.cache)),
        pool: Arc::new(Pool::default()),
        control_pool: Arc::new(Pool::with_reserve(control::REQUEST_THREADS, &reserve::REQUESTS)),
        owner: current_ids(),
        mounted_at: SystemTime::now(),
    })
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

fn open_log(plan: &MountPlan) -> Result<LogTarget, String> {
    match (&plan.log, plan.mode) {
        (Some(path), _) => log_file::open(path, plan).map(LogTarget::File),
        (None, DaemonMode::Foreground) => Ok(LogTarget::Stderr),
        (None, DaemonMode::Background) => Ok(LogTarget::System),
    }
}
