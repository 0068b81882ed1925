//! What this process is to its host: signals of limits, what a daemon leaves behind of its caller,
//! and what programs that it starts get back of it.
//!
//! | of the caller | in the daemon | in programs it starts |
//! |---|---|---|
//! | descriptors from 3 on | closed once it serves; with `-f` kept | closed |
//! | umask | 077; files of streams and `--log` are made under the caller's | the caller's |
//! | soft `RLIMIT_NOFILE` | the hard limit | the caller's |
//! | soft `RLIMIT_CORE` | 0, and not dumpable: its memory holds what is in the disks | the caller's |
//! | environment | kept for those programs (keys, proxies, agents) | kept, but for `NOTIFY_SOCKET` |
//!
//! A limit that one request meets must be that request's error and not the end of all disks.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

use rustix::fs::Mode;
use rustix::io::FdFlags;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit, umask,
};

/// What the caller had and [`apply_daemon_limits`] took; what is started gets it back.
static CALLER: OnceLock<CallerLimits> = OnceLock::new();

#[derive(Debug)]
struct CallerLimits {
    umask: Mode,
    limits: [(Resource, Rlimit); 2],
}

/// Has a write past the limit of file sizes (`RLIMIT_FSIZE`) fail with `EFBIG`, as setrlimit(2)
/// has it for those who do not die of SIGXFSZ.
///
/// By a handler that does nothing: unlike a signal that is ignored, one with a handler is back at
/// its default in every program that this one starts. A signal that is ignored already stays so,
/// for them as well.
pub fn handle_sigxfsz() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: both structures are plain data that the calls read and fill; the handler touches
    // nothing, so it may run at any point of any thread.
    unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGXFSZ, std::ptr::null(), &raw mut old) != 0
            || old.sa_sigaction == libc::SIG_IGN
        {
            return;
        }
        let mut new: libc::sigaction = std::mem::zeroed();
        new.sa_sigaction = nothing as extern "C" fn(libc::c_int) as libc::sighandler_t;
        new.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGXFSZ, &raw const new, std::ptr::null_mut());
    }
}

/// The error of a file that could not get its size, with the remedy where that is a limit.
#[must_use]
pub fn explain_size_error(error: io::Error) -> io::Error {
    match error.raw_os_error() {
        Some(libc::EFBIG) => {
            let line = "it is larger than files may be here: raise the limit (ulimit -f), \
                        or take another file system";
            io::Error::new(io::ErrorKind::FileTooLarge, line)
        }
        _ => error,
    }
}

/// Makes this process a daemon to its host: see the table above. Once is enough; what the caller
/// had is remembered for [`restore_caller_limits`].
pub fn apply_daemon_limits() {
    let files = getrlimit(Resource::Nofile);
    let core = getrlimit(Resource::Core);
    // What is made is for its owner, whoever mounts; what is for others says so.
    let umask = umask(Mode::RWXG | Mode::RWXO);
    let limits = [(Resource::Nofile, files), (Resource::Core, core)];
    if CALLER.set(CallerLimits { umask, limits }).is_err() {
        return;
    }
    // A disk takes two descriptors and more; the usual soft limit of 1,024 is there for programs
    // that use select(2), which this one does not. Without it, opening a disk too many says what
    // is wrong.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files });
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), ..core });
    // No more than a precaution: where it fails, the limit above still holds.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// The mode that a file has which the caller makes without saying more; `None` where this
/// process's umask is the caller's, and does that itself.
#[must_use]
pub fn new_file_mode() -> Option<Mode> {
    let all = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
    CALLER.get().map(|callers| all - callers.umask)
}

/// Has `command` start with what the caller had; see the table above.
pub fn restore_caller_limits(command: &mut Command) {
    // A program that is started must not speak to the service manager for us.
    command.env_remove("NOTIFY_SOCKET");
    let Some(callers) = CALLER.get() else { return };
    let give_back = move || {
        umask(callers.umask);
        for (resource, limit) in callers.limits.iter().cloned() {
            setrlimit(resource, limit)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec it makes system calls and nothing else: no memory is
    // allocated, no lock is taken.
    unsafe { command.pre_exec(give_back) };
}

/// Descriptors that the caller left open for us, from 3 on. Programs that are started do not get
/// them; this process has them until they are closed, for a disk may be named by `/dev/fd/N`.
#[derive(Debug, Default)]
pub struct InheritedFds(Vec<RawFd>);

impl InheritedFds {
    /// Finds them. To be called before a helper is started that is meant to inherit something.
    #[must_use]
    pub fn find() -> Self {
        let names = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // All that we open is closed on exec; what came through one is not.
        let inherited =
            numbers.filter(|&number: &RawFd| number > 2 && set_cloexec(number).unwrap_or(false));
        Self(inherited.collect())
    }

    /// Closes them: nobody waits any more for a pipe to end or a lock to be free because of us.
    pub fn close(self) {
        for number in self.0 {
            use std::os::fd::FromRawFd;
            // SAFETY: it was open when this process began and nothing here has taken it over: what
            // we open has other numbers.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

/// Has `number` closed on exec; `false` when it was already.
fn set_cloexec(number: RawFd) -> io::Result<bool> {
    // SAFETY: it is in the list of open descriptors, and nothing else runs that could close it.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(fd)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Ok(false);
    }
    rustix::io::fcntl_setfd(fd, flags | FdFlags::CLOEXEC)?;
    Ok(true)
}
