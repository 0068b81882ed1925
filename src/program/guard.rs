//! A guard process that keeps the half image of a killed daemon from being taken for a complete
//! one.
//!
//! A command that reads a stream takes the end of its input for the end of the image, and the
//! kernel closes the pipe of a killed daemon just like that of one that has finished. So a separate
//! process holds a second write end, and closes it only on a message from the daemon:
//!
//! ```text
//!   daemon ═══ data ═══▶ zstd | ssh ...        (one process group)
//!      │          ▲             ▲
//!      └─control─▶ guard ───────┘ a byte: close the write end, the end is intended
//!                                 end of file without a byte: SIGKILL to the group
//! ```

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process_group};

/// The hidden subcommand that runs a guard.
pub const SUBCOMMAND: &str = "__guard";

/// The time that a released guard has to exit before it is killed.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// The program that implements the subcommand, once it has called [`enable_guards`].
static GUARD_PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Declares that the running program implements the subcommand. Without this call nothing is
/// guarded: another program that uses the library would be started with arguments it does not know.
pub fn enable_guards() {
    GUARD_PROGRAM.get_or_init(|| "/proc/self/exe".into());
}

/// Returns the program to start guards from.
pub(crate) fn program() -> Option<&'static Path> {
    GUARD_PROGRAM.get().map(PathBuf::as_path)
}

/// A running guard. Dropping it kills the guard and leaves the guarded process group alone.
#[derive(Debug)]
pub(crate) struct GuardProcess {
    child: Child,
    control: Option<OwnedFd>,
}

impl GuardProcess {
    /// Starts `program` as the guard of the process group `group`; the guard holds `data` open.
    pub(crate) fn start(program: &Path, group: Pid, data: OwnedFd) -> io::Result<Self> {
        let (reader, control) = pipe_with(PipeFlags::CLOEXEC)?;
        let child = Command::new(program)
            .arg0("cowslip")
            .args([OsStr::new(SUBCOMMAND), OsStr::new(&group.as_raw_pid().to_string())])
            .stdin(Stdio::from(reader))
            .stdout(Stdio::from(data))
            .stderr(Stdio::null())
            // The guard may outlive the daemon, and must not keep any directory busy.
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        Ok(Self { child, control: Some(control) })
    }

    /// Tells the guard that the end of input is intended, and waits until it has closed its copy.
    pub(crate) fn release(mut self) {
        if let Some(control) = self.control.take() {
            // EPIPE: the guard has already exited, and its write end is closed.
            let _ = rustix::io::retry_on_intr(|| rustix::io::write(&control, b"."));
            let until = Instant::now() + RELEASE_TIMEOUT;
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < until {
                thread::sleep(Duration::from_millis(1));
            }
        }
    }
}

impl Drop for GuardProcess {
    fn drop(&mut self) {
        // Kill before the control pipe closes: its end would make the guard kill the group, whose
        // number may belong to another group by then. (A guard that was waited for is not killed
        // again.)
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs the guard itself: returns once told that the end is intended; kills `group` when `control`
/// ends without that message.
///
/// # Errors
/// The errno of read(2), after the group was killed, or that of kill(2). `EINVAL` if `group` is not
/// a process group that may be killed.
pub fn run_guard(control: impl AsFd, group: i32) -> io::Result<()> {
    // 0 and 1 would mean our own group and every process.
    let group = Some(group).filter(|group| *group > 1).and_then(Pid::from_raw);
    let group = group.ok_or(Errno::INVAL)?;
    ignore_termination_signals();
    let mut word = [0; 1];
    let heard = rustix::io::retry_on_intr(|| rustix::io::read(&control, &mut word));
    if matches!(heard, Ok(1)) {
        return Ok(());
    }
    let killed = match kill_process_group(group, Signal::KILL) {
        Err(Errno::SRCH) => Ok(()),
        done => done,
    };
    Ok(heard.and(killed)?)
}

/// Ignores termination signals. A service manager sends them to every process at once; the daemon
/// decides what they mean, and a guard that exited first would close its write end.
fn ignore_termination_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: sets a signal disposition that runs no code of ours and touches no memory.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
