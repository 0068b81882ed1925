//! Other processes, as `/proc` describes them.

use std::fs;
use std::path::Path;

/// Returns the process of the thread `tid`; `tid` itself if that cannot be determined.
#[must_use]
pub fn process_of_thread(tid: u32) -> u32 {
    let status = read_status(&Path::new("/proc").join(tid.to_string()));
    let process = status.lines().find_map(|line| line.strip_prefix("Tgid:")?.trim().parse().ok());
    process.unwrap_or(tid)
}

/// Whether the process `pid` (0: unknown) is being killed or is exiting with all its threads, and
/// so will never see a reply. The requesting thread may have exited already: the kernel waits for
/// asynchronous requests in the last thread of a process.
#[must_use]
pub fn is_being_killed(pid: u32) -> bool {
    if pid == 0 {
        return false;
    }
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut ending = tasks.map(|task| is_thread_exiting(&task.path())).peekable();
    ending.peek().is_some() && ending.all(|is_ending| is_ending)
}

/// Whether a thread has SIGKILL pending or is exiting. `task` is its procfs directory.
fn is_thread_exiting(task: &Path) -> bool {
    /// SIGKILL in the signal masks of proc_pid_status(5).
    const KILL: u64 = 1 << (libc::SIGKILL - 1);
    /// `PF_EXITING` (linux/sched.h): the kernel waits for the outstanding requests of the process.
    const EXITING: u64 = 0x4;
    let status = read_status(task);
    let pending = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    if pending.fold(0, |all, mask| all | mask) & KILL != 0 {
        return true;
    }
    // A thread that has exited meanwhile does not wait either.
    let Ok(stat) = fs::read(task.join("stat")) else {
        return true;
    };
    // `flags` is the seventh field after the name.
    let flags = stat_fields(&stat).nth(6).and_then(|flags| flags.parse::<u64>().ok());
    flags.is_some_and(|flags| flags & EXITING != 0)
}

/// Reads the status file of a process or thread, whose name may be any bytes; empty when that cannot
/// be read.
fn read_status(dir: &Path) -> String {
    let status = fs::read(dir.join("status")).unwrap_or_default();
    String::from_utf8_lossy(&status).into_owned()
}

/// Splits a stat file into the fields after the name, from `state` on (proc_pid_stat(5)); none for
/// an empty file. The name is in parentheses and may be any bytes, parentheses too.
pub fn stat_fields(stat: &[u8]) -> impl Iterator<Item = &str> {
    let after = stat.rsplit(|byte| *byte == b')').next().filter(|after| after.len() < stat.len());
    str::from_utf8(after.unwrap_or_default()).unwrap_or_default().split_ascii_whitespace()
}

#[cfg(test)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    #[test]
    fn a_thread_belongs_to_its_process_and_is_not_being_killed() {
        let process = std::process::id();
        // A test runs in a thread of its own.
        let thread = rustix::thread::gettid().as_raw_nonzero().get().cast_unsigned();
        assert_eq!(process_of_thread(thread), process);
        assert_eq!(process_of_thread(u32::MAX), u32::MAX);
        assert!(!is_being_killed(process) && !is_being_killed(0) && !is_being_killed(u32::MAX));
    }

    #[test]
    fn a_process_is_known_whatever_bytes_its_name_has() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join(OsStr::from_bytes(b"odd \xff) S"));
        fs::copy("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program).arg("100").spawn().unwrap();
        let stat = fs::read(format!("/proc/{}/stat", child.id())).unwrap();
        let found = (process_of_thread(child.id()), is_being_killed(child.id()));
        let parent = std::process::id().to_string();
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(stat_fields(&stat).nth(1), Some(parent.as_str()));
        assert_eq!(found, (child.id(), false));
        assert_eq!(stat_fields(b"").next(), None);
    }

    #[test]
    fn a_killed_process_that_was_not_reaped_is_being_killed() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        assert!(!is_being_killed(child.id()));
        child.kill().unwrap();
        let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while !is_being_killed(child.id()) {
            assert!(std::time::Instant::now() < until);
        }
        child.wait().unwrap();
    }
}
