//! The start of a daemon: one fork, and a channel between the command that was typed and the daemon
//! that serves.
//!
//! ```text
//!   cowslip mount ──fork──┬── child: setsid, open the disks, mount, serve ... chdir /, no stdio
//!                         │            │ note                  │ succeed | fail
//!                         └── parent:  print them as they come └ exit with that code
//! ```
//!
//! The command returns when the mount answers, and not before: that is the purpose of the channel
//! (`frames`). `reporter` is the daemon's end of it, `waiter` the command's.
//!
//! The fork comes before any thread exists: the child of a threaded process may do nothing but
//! exec. With `-f` there is no fork, and [`StartupReporter::foreground`] prints directly.
//!
//! A command that is interrupted passes the signal on. A command that is killed cannot; the kernel
//! sends the daemon SIGTERM then, until it serves.

mod frames;
mod reporter;
mod waiter;

use std::fs;
use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, set_parent_process_death_signal};

pub(crate) use self::reporter::{NoteOutput, StartupReporter};
pub(crate) use self::waiter::{StartOutcome, StartupWaiter, received_signal};
use super::signals::{SignalMask, set_signal_mask};

/// A side of the fork.
#[derive(Debug)]
pub(crate) enum ForkSide {
    /// The command, which waits, prints and exits.
    Parent(StartupWaiter),
    /// The process that becomes the daemon.
    Child(StartupReporter),
}

/// How long a thread that was joined may still show in `/proc/self/task`: the kernel wakes the
/// joiner before it takes the entry away.
const THREAD_EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// Blocks the signals that end a mount until [`fork`] makes the parent record them: for a parent
/// that makes something before, which must not be left behind.
///
/// # Errors
/// The errno of pthread_sigmask(3).
pub(crate) fn hold_signals() -> io::Result<()> {
    set_signal_mask(SignalMask::Blocked)
}

/// Forks the daemon: a session of its own, stdio unchanged until [`StartupReporter::succeed`].
///
/// # Errors
/// A line for the user when this process already has threads; the errno of socketpair(2) and
/// fork(2). There is no child then.
pub(crate) fn fork() -> io::Result<ForkSide> {
    if !is_single_threaded()? {
        return Err(io::Error::other("cannot become a daemon: this process has threads already"));
    }
    fork_unchecked()
}

fn is_single_threaded() -> io::Result<bool> {
    let deadline = Instant::now() + THREAD_EXIT_TIMEOUT;
    loop {
        if fs::read_dir("/proc/self/task")?.count() == 1 {
            return Ok(true);
        }
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(1));
    }
}

fn fork_unchecked() -> io::Result<ForkSide> {
    let (ours, theirs) = UnixStream::pair()?;
    // Both processes would print what is still buffered.
    io::stdout().flush()?;
    let parent = rustix::process::getpid();
    // No signal may end either side before it handles signals; the child goes on blocking them
    // until then.
    set_signal_mask(SignalMask::Blocked)?;
    // SAFETY: no other thread exists (checked by `fork`), so the child's memory is consistent, no
    // lock is held for ever, and the child may do whatever a process may.
    let pid = unsafe { libc::fork() };
    if pid < 0 {
        let error = io::Error::last_os_error();
        set_signal_mask(SignalMask::Unblocked)?;
        return Err(error);
    }
    match Pid::from_raw(pid) {
        None => {
            drop(ours);
            rustix::process::setsid()?;
            set_parent_process_death_signal(Some(Signal::TERM))?;
            if rustix::process::getppid() != Some(parent) {
                // The parent was killed before the line above took effect.
                kill_process(rustix::process::getpid(), Signal::TERM)?;
            }
            Ok(ForkSide::Child(StartupReporter::to_parent(theirs)))
        }
        Some(child) => {
            let waiter = StartupWaiter::new(ours, child);
            set_signal_mask(SignalMask::Unblocked)?;
            Ok(ForkSide::Parent(waiter?))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Output};

    /// Variable with the part that [`helper`] plays.
    const TEST_PART_ENV: &str = "COWSLIP_TEST_DAEMON";

    /// The process that the tests below start, no test of its own: tests run in threads, and this
    /// one forks. Without its variable it does nothing.
    #[test]
    #[ignore = "run by the other tests"]
    fn helper() {
        let Ok(part) = std::env::var(TEST_PART_ENV) else {
            return;
        };
        // `fork_unchecked`, since even a lone test has its runner's thread beside it; that one only waits.
        match fork_unchecked().unwrap() {
            ForkSide::Parent(waiting) => {
                let outcome = waiting.wait(&mut io::stdout());
                println!("{outcome:?}");
                std::process::exit(0);
            }
            ForkSide::Child(ready) => play(&part, ready),
        }
    }

    fn play(part: &str, ready: StartupReporter) -> ! {
        ready.note("vm1.img: 20 GiB");
        match part {
            "succeed" => {
                ready.succeed().unwrap();
                // Its stdio is gone, so this ends nowhere; and the parent does not wait for it.
                println!("printed by the daemon");
                thread::sleep(Duration::from_secs(2));
            }
            "fail" => {
                ready.fail(3, "no /dev/fuse");
                std::process::exit(9);
            }
            "exit" => std::process::exit(9),
            _ => std::process::abort(),
        }
        std::process::exit(0);
    }

    fn run(part: &str) -> Output {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let name = format!("{}::helper", module_path!().split_once("::").unwrap().1);
        command.args(["--exact", &name, "--ignored", "--nocapture"]);
        command.env(TEST_PART_ENV, part).output().unwrap()
    }

    fn assert_says(output: &Output, outcome: &str) {
        let stdout = String::from_utf8_lossy(&output.stdout);
        assert!(stdout.contains("vm1.img: 20 GiB\n"), "{stdout}");
        assert!(stdout.contains(outcome), "{stdout}");
    }

    #[test]
    fn the_parent_returns_when_the_child_serves_and_its_pipes_close() {
        let begin = Instant::now();
        let output = run("succeed");
        // `output` waits for the last writer of both pipes, and the child lives 2 s longer.
        assert!(begin.elapsed() < Duration::from_millis(1900));
        assert_says(&output, "Serving");
        assert!(!String::from_utf8_lossy(&output.stdout).contains("printed by the daemon"));
    }

    #[test]
    fn a_failure_brings_its_code_and_its_line() {
        assert_says(&run("fail"), r#"Failed { code: 3, line: "no /dev/fuse" }"#);
    }

    #[test]
    fn a_child_that_ends_in_silence_is_reported() {
        let died = "the daemon died while starting";
        assert_says(&run("exit"), &format!(r#"code: 1, line: "{died}: exit status 9""#));
        assert_says(&run("abort"), &format!(r#"code: 1, line: "{died}: killed by signal 6""#));
    }

    #[test]
    fn a_process_with_threads_is_not_forked() {
        let error = fork().unwrap_err();
        assert!(error.to_string().contains("has threads"), "{error}");
    }
}
