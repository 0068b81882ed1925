//! The daemon's end of the channel to the command that waits for it.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;

use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::set_parent_process_death_signal;

use super::frames::{FrameKind, print_line, send_frame};
use crate::pool::Cancellable;

/// Reports how the start of a mount goes, and ends with [`succeed`](Self::succeed) or
/// [`fail`](Self::fail). When it is dropped without either, the command reports that the daemon
/// died.
#[derive(Debug)]
pub(crate) struct StartupReporter {
    channel: ReportChannel,
}

#[derive(Debug)]
enum ReportChannel {
    /// A command waits at the other end.
    Parent(UnixStream),
    /// No command waits (`-f`): lines are printed at once.
    Foreground(NoteOutput),
}

/// Where notes go in the foreground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NoteOutput {
    /// To stdout.
    Stdout,
    /// To stderr: a stream has stdout.
    Stderr,
}

/// The command that waits for the daemon; `None` in the foreground.
struct WaitingCommand(Option<UnixStream>);

impl Cancellable for WaitingCommand {
    fn is_cancelled(&self) -> bool {
        let Some(parent) = &self.0 else { return false };
        // The command sends nothing: there is an end of file to be read, or nothing.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(rustix::net::recv(parent, &mut [0; 1], flags), Ok((_, 0)) | Err(Errno::CONNRESET))
    }

    fn hold(&self) -> bool {
        !self.is_cancelled()
    }

    fn release(&self) {}
}

impl StartupReporter {
    /// Creates the reporter of a mount in the foreground (`-f`): no parent waits, lines are printed
    /// at once, and stdio stays.
    pub(crate) fn foreground(notes: NoteOutput) -> Self {
        Self { channel: ReportChannel::Foreground(notes) }
    }

    /// Creates the reporter to the command at the other end of `parent`.
    pub(super) fn to_parent(parent: UnixStream) -> Self {
        Self { channel: ReportChannel::Parent(parent) }
    }

    /// Prints `line` on the user's stdout.
    pub(crate) fn note(&self, line: &str) {
        // A user who does not listen any more does not miss the line.
        let _ = match &self.channel {
            ReportChannel::Parent(parent) => send_frame(parent, FrameKind::Note, line.as_bytes()),
            ReportChannel::Foreground(NoteOutput::Stdout) => {
                print_line(&mut io::stdout(), line.as_bytes())
            }
            ReportChannel::Foreground(NoteOutput::Stderr) => {
                print_line(&mut io::stderr(), line.as_bytes())
            }
        };
    }

    /// Returns the start as a request of the command that waits: cancelled once that command is
    /// gone. In the foreground it is never cancelled: the user's signals end this process.
    pub(crate) fn request(&self) -> impl Cancellable + 'static {
        WaitingCommand(match &self.channel {
            ReportChannel::Parent(parent) => parent.try_clone().ok(),
            ReportChannel::Foreground(_) => None,
        })
    }

    /// Reports that the mount answers: the daemon leaves the caller's directory and stdio, and the
    /// command returns. In the foreground it leaves the directory only.
    ///
    /// # Errors
    /// `EPIPE` when the command is gone (the user interrupted it): the caller should undo the
    /// mount. The errno of chdir(2) and dup2(2).
    pub(crate) fn succeed(self) -> io::Result<()> {
        let ReportChannel::Parent(parent) = &self.channel else {
            return Ok(rustix::process::chdir("/")?);
        };
        rustix::process::chdir("/")?;
        set_parent_process_death_signal(None)?;
        let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
        for stdio in [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO] {
            // SAFETY: dup2 takes two numbers and touches no memory; std owns neither 0, 1 nor 2
            // as an `OwnedFd`, and prints to /dev/null from now on.
            if unsafe { libc::dup2(null.as_raw_fd(), stdio) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // Last: once the command has returned, its pipes must have no writer left.
        send_frame(parent, FrameKind::Serving, b"")
    }

    /// Reports that the start failed: the command prints `line` and exits with `code`, after this
    /// process has ended. In the foreground the line goes to stderr. To be called when everything
    /// is cleaned up and only exiting is left to do.
    pub(crate) fn fail(self, code: u8, line: &str) {
        let _ = match &self.channel {
            ReportChannel::Parent(parent) => {
                let text = [&[code], line.as_bytes()].concat();
                send_frame(parent, FrameKind::Failed, &text)
            }
            ReportChannel::Foreground(_) => print_line(&mut io::stderr(), line.as_bytes()),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_given_up_once_the_command_that_waits_is_gone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let request = StartupReporter::to_parent(theirs).request();
        assert!(!request.is_cancelled() && request.hold());
        drop(ours);
        assert!(request.is_cancelled() && !request.hold());
        assert!(!StartupReporter::foreground(NoteOutput::Stdout).request().is_cancelled());
    }
}
