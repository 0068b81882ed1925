//! What keeps a killed daemon's half image from being taken for a whole one.
//!
//! A command that reads a stream knows that it is complete by the end of its input, and the kernel
//! closes the pipe of a daemon that is killed just as a finished one's. So a process of its own
//! holds a second write end, and lets go of it only on a word from the daemon:
//!
//! ```text
//!   daemon ═══ data ═══▶ zstd | ssh ...        (one process group)
//!      │          ▲             ▲
//!      └─control─▶ guard ───────┘ a byte: let go, the end is meant
//!                                 the end without a byte: SIGKILL to the group
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

/// The hidden subcommand that a guard runs as.
pub const SUBCOMMAND: &str = "__guard";

/// How long a guard that was told to go may take before it is killed.
const RELEASE_TIMEOUT: Duration = Duration::from_secs(2);

/// The program that has the subcommand, once it said so.
static GUARD_PROGRAM: OnceLock<PathBuf> = OnceLock::new();

/// Says that this very program has the subcommand. Without it nothing is guarded: another program
/// that uses the library would be started with arguments it does not know.
pub fn enable_guards() {
    GUARD_PROGRAM.get_or_init(|| "/proc/self/exe".into());
}

/// The program to start guards from.
pub(super) fn program() -> Option<&'static Path> {
    GUARD_PROGRAM.get().map(PathBuf::as_path)
}

/// A running guard; dropped, it is killed and its process group left alone.
#[derive(Debug)]
pub(super) struct GuardProcess {
    child: Child,
    control: Option<OwnedFd>,
}

impl GuardProcess {
    /// Starts `program` as the guard of the process group `group`; it holds `data`.
    pub(super) fn start(program: &Path, group: Pid, data: OwnedFd) -> io::Result<Self> {
        let (reader, control) = pipe_with(PipeFlags::CLOEXEC)?;
        let child = Command::new(program)
            .arg0("cowslip")
            .args([OsStr::new(SUBCOMMAND), OsStr::new(&group.as_raw_pid().to_string())])
            .stdin(Stdio::from(reader))
            .stdout(Stdio::from(data))
            .stderr(Stdio::null())
            // It may outlive the daemon, and must hold no directory of anybody's.
            .current_dir("/")
            .process_group(0)
            .spawn()?;
        Ok(Self { child, control: Some(control) })
    }

    /// Tells it that the end of input is meant, and waits until it has let go.
    pub(super) fn release(mut self) {
        if let Some(control) = self.control.take() {
            // EPIPE: it is gone already, and its write end with it.
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
        // Before the control pipe closes: the end of it would have the group killed, and by then
        // its number may be another group's. (One that was waited for is not killed again.)
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The guard itself: returns once told that the end is meant; kills `group` when `control` ends
/// without that word.
///
/// # Errors
/// The errno of read(2), after the group was killed, or of kill(2). `EINVAL` when `group` is no
/// process group that could be killed.
pub fn run_guard(control: impl AsFd, group: i32) -> io::Result<()> {
    // 0 and 1 would be our own group and every process there is.
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

/// A service manager sends its signals to every process at once; the daemon decides what they
/// mean, and a guard that went first would let go.
fn ignore_termination_signals() {
    for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT] {
        // SAFETY: sets a disposition that runs no code of ours and touches no memory.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}
