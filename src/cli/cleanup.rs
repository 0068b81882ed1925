//! Signals that end a command: incomplete output is removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// Number of tries to remove a directory in which this process may still create files.
const REMOVE_TRIES: usize = 10;

/// How long a signal waits for the work that it interrupts, which may hang in a read.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Work that a signal interrupts, which then removes by itself what it has made so far. Once the result
/// gets its name, the work is done to its end.
pub(super) struct Interruptible(Arc<(Mutex<Phase>, Condvar)>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// A signal interrupts it.
    Working,
    /// This signal has interrupted it.
    Interrupted(i32),
    /// The result gets its name.
    Naming,
    /// The work has ended.
    Ended,
}

impl Interruptible {
    /// Begins the work, which makes the directory `part` first. Work that hangs does not remove that itself:
    /// the signal does it then. An ignored signal stays ignored.
    ///
    /// # Errors
    /// The host's errno.
    pub(super) fn begin(part: PathBuf) -> io::Result<Self> {
        let shared = Arc::new((Mutex::new(Phase::Working), Condvar::new()));
        let work = Self(Arc::clone(&shared));
        on_signal(move |signal| {
            let (phase, ended) = &*shared;
            let mut phase = phase.lock();
            if *phase == Phase::Working {
                *phase = Phase::Interrupted(signal);
            }
            ended.wait_while_for(&mut phase, |phase| *phase != Phase::Ended, STOP_TIMEOUT);
            if matches!(*phase, Phase::Interrupted(_)) {
                remove_path(&part);
            }
        })?;
        Ok(work)
    }

    /// Whether a signal came: the work has to stop.
    pub(super) fn is_interrupted(&self) -> bool {
        matches!(*self.0.0.lock(), Phase::Interrupted(_))
    }

    /// Begins to give the result its name; false when a signal came before.
    pub(super) fn begin_naming(&self) -> bool {
        let mut phase = self.0.0.lock();
        let may_begin = *phase == Phase::Working;
        if may_begin {
            *phase = Phase::Naming;
        }
        may_begin
    }

    /// Ends the work; ends this process, too, when a signal has interrupted it.
    pub(super) fn end(self) {
        let (phase, ended) = &*self.0;
        let phase = std::mem::replace(&mut *phase.lock(), Phase::Ended);
        if let Phase::Interrupted(signal) = phase {
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        ended.notify_all();
    }
}

/// Removes the file `path` when a signal ends this process. Complete output is renamed away from `path`
/// before. An ignored signal stays ignored.
///
/// # Errors
/// The host's errno.
pub(super) fn remove_on_signal(path: PathBuf) -> io::Result<()> {
    on_signal(move |_| remove_path(&path))
}

/// Calls `prepare` in a thread of its own when a signal ends this process, just before. An ignored signal
/// stays ignored.
fn on_signal(prepare: impl FnOnce(i32) + Send + 'static) -> io::Result<()> {
    let fatal =
        [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(|signal| !is_ignored(*signal));
    let mut signals = Signals::new(fatal)?;
    thread::Builder::new().name("cowslip-cleanup".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            prepare(signal);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    })?;
    Ok(())
}

/// Removes the file or the directory at `path`. Errors are ignored.
pub(super) fn remove_path(path: &Path) {
    for _ in 0..REMOVE_TRIES {
        let removed = match fs::symlink_metadata(path) {
            Ok(found) if found.is_dir() => fs::remove_dir_all(path),
            Ok(_) => fs::remove_file(path),
            Err(error) => Err(error),
        };
        if !removed.is_err_and(|error| error.kind() == io::ErrorKind::DirectoryNotEmpty) {
            return;
        }
    }
}

/// Whether `signal` is ignored, as in a program started by nohup(1).
fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros is a valid sigaction, which the call fills in.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: no action is set, and `action` is valid for the write.
    let result = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut action) };
    result == 0 && action.sa_sigaction == libc::SIG_IGN
}
