//! Process attributes: what the daemon changes of the attributes inherited from its caller, and
//! what the programs that it starts get back.
//!
//! | of the caller | in the daemon | in programs it starts |
//! |---|---|---|
//! | descriptors from 3 on | closed once it serves; with `-f` kept | closed |
//! | umask | 077; files of streams and `--log` are created under the caller's | the caller's |
//! | soft `RLIMIT_NOFILE` | the hard limit | the caller's |
//! | soft `RLIMIT_CPU` | the hard limit, less what a good end takes: SIGXCPU ends a mount as SIGTERM does | the caller's |
//! | soft `RLIMIT_CORE` | 0, and not dumpable: its memory contains data of the disks | the caller's |
//! | environment | kept for those programs (keys, proxies, agents) | kept, but for `NOTIFY_SOCKET` |
//!
//! A resource limit that one request hits must fail that request only, and not end the whole mount.

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

/// The caller's attributes that [`apply_daemon_limits`] changed, for programs that are started.
static CALLER: OnceLock<CallerLimits> = OnceLock::new();

#[derive(Debug)]
struct CallerLimits {
    umask: Mode,
    limits: [(Resource, Rlimit); 3],
}

/// CPU time in seconds that is left to end a mount in good order when its time is up: SIGXCPU comes
/// at the soft limit, SIGKILL at the hard one.
const CPU_RESERVE: u64 = 10;

/// Makes a write beyond the file size limit (`RLIMIT_FSIZE`) fail with `EFBIG` instead of killing
/// the process with SIGXFSZ (setrlimit(2)).
///
/// Installs a handler that does nothing: unlike an ignored signal, a handled one is back at its
/// default in every program that this process starts. If the signal is ignored already, it stays
/// so, for those programs too.
pub fn handle_sigxfsz() {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: both structures are plain data that the calls read and fill; the handler accesses
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

/// Explains the error of a file that could not be extended, with the remedy if a limit is the
/// cause.
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

/// Changes this process's attributes to those of a daemon: see the table above. Only the first call
/// has an effect; the caller's attributes are saved for [`restore_caller_limits`].
pub fn apply_daemon_limits() {
    let files = getrlimit(Resource::Nofile);
    let core = getrlimit(Resource::Core);
    let cpu = getrlimit(Resource::Cpu);
    // New files are for their owner only, whoever mounts; files for others get an explicit mode.
    let umask = umask(Mode::RWXG | Mode::RWXO);
    let limits = [(Resource::Nofile, files), (Resource::Core, core), (Resource::Cpu, cpu)];
    if CALLER.set(CallerLimits { umask, limits }).is_err() {
        return;
    }
    // Every disk takes two descriptors or more. The usual soft limit of 1,024 protects programs
    // that use select(2), which this one does not. If raising it fails, opening one disk too many
    // reports why.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files });
    // A mount works for everybody who has its disks open, for as long as they have them.
    let cpu_time = cpu.maximum.map(|most| most - CPU_RESERVE.min(most / 2));
    let _ = setrlimit(Resource::Cpu, Rlimit { current: cpu_time, ..cpu });
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), ..core });
    // Only a precaution: if it fails, the core limit above still holds.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Returns the mode of a new file under the caller's umask; `None` where this process still has the
/// caller's umask, so that the kernel applies it.
#[must_use]
pub fn new_file_mode() -> Option<Mode> {
    let all = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::WGRP | Mode::ROTH | Mode::WOTH;
    CALLER.get().map(|callers| all - callers.umask)
}

/// Makes `command` start with the caller's attributes; see the table above.
pub fn restore_caller_limits(command: &mut Command) {
    // A started program must not notify the service manager in our name.
    command.env_remove("NOTIFY_SOCKET");
    let Some(callers) = CALLER.get() else { return };
    let give_back = move || {
        umask(callers.umask);
        for (resource, limit) in callers.limits.iter().cloned() {
            setrlimit(resource, limit)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes only system calls: no memory is allocated, no
    // lock is taken.
    unsafe { command.pre_exec(give_back) };
}

/// Descriptors that the caller left open for this process, from 3 on. Started programs do not
/// inherit them. This process keeps them until [`close`](Self::close), because a disk may be named
/// by `/dev/fd/N`.
#[derive(Debug, Default)]
pub struct InheritedFds(Vec<RawFd>);

impl InheritedFds {
    /// Finds the inherited descriptors. Must be called before a helper is started that is to
    /// inherit some.
    #[must_use]
    pub fn find() -> Self {
        let names = fs::read_dir("/proc/self/fd").into_iter().flatten().flatten();
        let numbers = names.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        // Everything opened by this process is close-on-exec; inherited descriptors are not.
        let inherited =
            numbers.filter(|&number: &RawFd| number > 2 && set_cloexec(number).unwrap_or(false));
        Self(inherited.collect())
    }

    /// Closes the descriptors, so that nobody waits for a pipe or a lock held only by this process.
    pub fn close(self) {
        for number in self.0 {
            use std::os::fd::FromRawFd;
            // SAFETY: the descriptor was open when this process started, and nothing here has taken
            // it over: everything opened by this process has other numbers.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
    }
}

/// Sets close-on-exec for `number`; returns `false` if it was set already.
fn set_cloexec(number: RawFd) -> io::Result<bool> {
    // SAFETY: the number is in the list of open descriptors, and nothing else runs that could close
    // it.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    let flags = rustix::io::fcntl_getfd(fd)?;
    if flags.contains(FdFlags::CLOEXEC) {
        return Ok(false);
    }
    rustix::io::fcntl_setfd(fd, flags | FdFlags::CLOEXEC)?;
    Ok(true)
}
