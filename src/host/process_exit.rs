//! Waiting for the end of a process that is no child.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::procfs::stat_fields;

/// The state of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessState {
    /// The process has exited, or never existed.
    Exited,
    /// The process is still running.
    Running,
}

/// Interval at which `/proc` is read where the kernel has no pidfd_open.
const EXIT_POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Waits until the process `pid` has exited, at most for `timeout`. A process that has exited but
/// was not reaped yet counts as exited. The process need not be a child.
///
/// # Errors
/// `EINVAL` for a number that is no process ID; otherwise the host's errno.
pub fn wait_for_exit(pid: u32, timeout: Duration) -> io::Result<ProcessState> {
    let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(Errno::INVAL)?;
    let deadline = Instant::now() + timeout;
    match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
        Ok(process) => wait_on_pidfd(&process, deadline),
        Err(Errno::SRCH) => Ok(ProcessState::Exited),
        // ENOSYS: an old kernel. EPERM: a sandbox that does not know the call.
        Err(Errno::NOSYS | Errno::PERM) => Ok(wait_by_polling(pid, deadline)),
        Err(error) => Err(error.into()),
    }
}

fn wait_on_pidfd(process: &OwnedFd, deadline: Instant) -> io::Result<ProcessState> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout that does not fit is as good as infinite.
        let left = Timespec::try_from(left)
            .unwrap_or(Timespec { tv_sec: i64::from(i32::MAX), tv_nsec: 0 });
        let mut fds = [PollFd::new(process, PollFlags::IN)];
        match rustix::event::poll(&mut fds, Some(&left)) {
            Ok(0) => return Ok(ProcessState::Running),
            Ok(_) => return Ok(ProcessState::Exited),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_by_polling(pid: u32, deadline: Instant) -> ProcessState {
    loop {
        let stat = fs::read(format!("/proc/{pid}/stat")).unwrap_or_default();
        if has_ended(&stat) {
            return ProcessState::Exited;
        }
        if Instant::now() >= deadline {
            return ProcessState::Running;
        }
        thread::sleep(EXIT_POLL_INTERVAL);
    }
}

/// Returns whether the process with this stat file has exited: no file, a zombie or dead.
fn has_ended(stat: &[u8]) -> bool {
    matches!(stat_fields(stat).next(), None | Some("Z" | "X"))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn wait_for_exit_counts_a_zombie_as_exited() {
        let mut child = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let short = Duration::from_millis(30);
        assert_eq!(wait_for_exit(child.id(), short).unwrap(), ProcessState::Running);
        assert_eq!(wait_by_polling(child.id(), Instant::now() + short), ProcessState::Running);
        drop(child.stdin.take());
        let long = Duration::from_secs(60);
        assert_eq!(wait_for_exit(child.id(), long).unwrap(), ProcessState::Exited);
        assert_eq!(wait_by_polling(child.id(), Instant::now() + long), ProcessState::Exited);
        child.wait().unwrap();
        assert_eq!(wait_for_exit(child.id(), long).unwrap(), ProcessState::Exited);
        assert_eq!(wait_by_polling(child.id(), Instant::now() + long), ProcessState::Exited);
    }

    #[test]
    fn parentheses_in_a_process_name_do_not_hide_the_state() {
        assert!(has_ended(b"7 (a) Z (b) Z 1 7"));
        assert!(!has_ended(b"7 (a) Z (b) S 1 7"));
        assert!(has_ended(b""));
    }

    #[test]
    fn invalid_process_id_is_refused() {
        for pid in [0, u32::MAX] {
            let error = wait_for_exit(pid, Duration::ZERO).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }
}
