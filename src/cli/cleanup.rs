//! Removal of incomplete output when a signal ends a command.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// Number of tries to remove a directory in which this process may still create files.
const REMOVE_TRIES: usize = 10;

/// Removes `path`, a file or a directory, when a signal ends this process. Complete output is renamed
/// away from `path` before. An ignored signal stays ignored.
///
/// # Errors
/// The host's errno.
pub(super) fn remove_on_signal(path: PathBuf) -> io::Result<()> {
    let fatal =
        [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(|signal| !is_ignored(*signal));
    let mut signals = Signals::new(fatal)?;
    thread::Builder::new().name("cowslip-cleanup".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            remove_path(&path);
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
