//! What a command that is ended by a signal leaves behind: nothing that is only half there.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::thread;

use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

/// How often a directory is removed in which this process may still make files.
const REMOVE_TRIES: usize = 10;

/// From now on a signal that ends this process removes `path` first, a file or a directory: until
/// then it has another name than what it becomes. A signal that is ignored stays so.
///
/// # Errors
/// The host's errno.
pub(super) fn remove_on_signal(path: PathBuf) -> io::Result<()> {
    let deadly =
        [SIGINT, SIGTERM, SIGHUP, SIGQUIT].into_iter().filter(|signal| !is_ignored(*signal));
    let mut signals = Signals::new(deadly)?;
    thread::Builder::new().name("cowslip-tidy".to_owned()).spawn(move || {
        if let Some(signal) = signals.forever().next() {
            remove_path(&path);
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
    })?;
    Ok(())
}

/// Removes it, whatever it is.
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

/// Whether `signal` is ignored, as nohup(1) and shells have it.
fn is_ignored(signal: i32) -> bool {
    // SAFETY: all zeros is a valid sigaction, which the call fills in.
    let mut now: libc::sigaction = unsafe { std::mem::zeroed() };
    // SAFETY: nothing is changed, and `now` is there to be written to.
    let asked = unsafe { libc::sigaction(signal, std::ptr::null(), &raw mut now) };
    asked == 0 && now.sa_sigaction == libc::SIG_IGN
}
