//! The command's end of the channel to the daemon that it has forked.
//!
//! A signal that would end the command while it waits makes the daemon undo what it began: the
//! command passes the signal on, waits for that, and reports [`StartOutcome::Interrupted`].

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus, kill_process};

use super::frames::{FrameKind, print_line, read_frame};
use crate::host::wait_for_exit;
use crate::mount::signals::TERMINATING_SIGNALS;

/// How long a child that reported a failure may take to clean up and end.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Outcome of starting the daemon.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum StartOutcome {
    /// The mount answers, and the daemon goes on without this process.
    Serving,
    /// The mount did not come about.
    Failed {
        /// Exit code of the command.
        code: u8,
        /// Line to print.
        line: String,
    },
    /// A signal ended the start, and everything is undone.
    Interrupted {
        /// Number of the signal.
        signal: i32,
    },
}

/// Number of the last signal that this process received; 0 while there is none.
static LAST_SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// Returns the last signal that this process received since the fork. From the fork on, none of
/// those that end a mount ends this process.
#[must_use]
pub(crate) fn received_signal() -> Option<i32> {
    let signal = LAST_SIGNAL.get()?.load(Ordering::SeqCst);
    i32::try_from(signal).ok().filter(|signal| *signal != 0)
}

/// Records signals from now on; the returned socket becomes readable with each.
fn record_signals() -> io::Result<UnixStream> {
    let (signalled, notify) = UnixStream::pair()?;
    signalled.set_nonblocking(true)?;
    let number = LAST_SIGNAL.get_or_init(Arc::default);
    for signal in TERMINATING_SIGNALS {
        let value = usize::try_from(signal).map_err(|_| Errno::INVAL)?;
        // The number first: a reader that is woken must find it.
        signal_hook::flag::register_usize(signal, Arc::clone(number), value)?;
        signal_hook::low_level::pipe::register(signal, notify.try_clone()?)?;
    }
    Ok(signalled)
}

/// Waits for the daemon, in the command that has forked it.
#[derive(Debug)]
pub(crate) struct StartupWaiter {
    channel: UnixStream,
    child: Pid,
    /// Readable when a signal has come.
    signalled: UnixStream,
    /// The child was sent SIGTERM.
    term_sent: bool,
}

impl StartupWaiter {
    /// Creates the waiter for `child`, which reports through `channel`, and records signals from
    /// now on.
    ///
    /// # Errors
    /// The host's errno: no descriptors.
    pub(super) fn new(channel: UnixStream, child: Pid) -> io::Result<Self> {
        Ok(Self { channel, child, signalled: record_signals()?, term_sent: false })
    }

    /// Prints the lines that the child reports until the child serves or has failed. A failed child
    /// is reaped, for which it gets 10 seconds to end.
    ///
    /// Waits as long as the child works: recovery may take its time, and the user can interrupt.
    /// The first signal is passed on; the second ends this process.
    pub(crate) fn wait(mut self, stdout: &mut dyn Write) -> StartOutcome {
        loop {
            self.wait_for_frame();
            let printed = match read_frame(&mut self.channel) {
                Ok(Some((FrameKind::Note, text))) => print_line(stdout, &text),
                Ok(Some((FrameKind::Serving, _))) => {
                    return self.interrupted().unwrap_or(StartOutcome::Serving);
                }
                Ok(Some((FrameKind::Failed, text))) => {
                    if let Some(interrupted) = self.interrupted() {
                        return interrupted;
                    }
                    self.reap();
                    let (&code, line) = text.split_first().unwrap_or((&1, &[]));
                    let line = String::from_utf8_lossy(line).into_owned();
                    return StartOutcome::Failed { code, line };
                }
                Ok(None) | Err(_) => return self.interrupted().unwrap_or_else(|| self.died()),
            };
            if let Err(error) = printed {
                // A closed stdout is no reason to leave the daemon half started.
                log::debug!("cannot print what the daemon says: {error}");
            }
        }
    }

    /// Waits until the child has sent something or has ended, and passes signals on meanwhile.
    fn wait_for_frame(&mut self) {
        loop {
            let (channel, signalled) = (&self.channel, &self.signalled);
            let mut fds =
                [PollFd::new(channel, PollFlags::IN), PollFd::new(signalled, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                // Reading the channel waits as well.
                Err(_) => return,
            }
            let [has_frame, has_signal] = fds.map(|fd| !fd.revents().is_empty());
            if has_signal {
                self.forward_signal();
            }
            if has_frame {
                return;
            }
        }
    }

    /// Makes the child undo what it began. A second signal ends this process as signals do.
    fn forward_signal(&mut self) {
        let mut buf = [0; 64];
        if self.signalled.read(&mut buf).unwrap_or(0) == 0 {
            return;
        }
        if self.term_sent
            && let Some(signal) = received_signal()
        {
            let _ = signal_hook::low_level::emulate_default_handler(signal);
        }
        self.terminate_child();
    }

    fn terminate_child(&mut self) {
        if !self.term_sent {
            self.term_sent = true;
            // The child has not been reaped, so no other process has its number.
            let _ = kill_process(self.child, Signal::TERM);
        }
    }

    /// Returns the outcome if a signal came; the child was sent SIGTERM then, and has ended or soon
    /// will.
    fn interrupted(&mut self) -> Option<StartOutcome> {
        let signal = received_signal()?;
        self.terminate_child();
        self.reap();
        Some(StartOutcome::Interrupted { signal })
    }

    fn died(&self) -> StartOutcome {
        let status = self.reap();
        let cause = match status.map(|it| (it.exit_status(), it.terminating_signal())) {
            Some((Some(code), _)) => format!(": exit status {code}"),
            Some((_, Some(signal))) => format!(": killed by signal {signal}"),
            _ => String::new(),
        };
        StartOutcome::Failed { code: 1, line: format!("the daemon died while starting{cause}") }
    }

    fn reap(&self) -> Option<WaitStatus> {
        let pid = u32::try_from(self.child.as_raw_pid()).ok()?;
        wait_for_exit(pid, CLEANUP_TIMEOUT).ok()?;
        // NOHANG: a child that is still there is left to init.
        let reaped = rustix::process::waitpid(Some(self.child), WaitOptions::NOHANG).ok()??;
        Some(reaped.1)
    }
}
