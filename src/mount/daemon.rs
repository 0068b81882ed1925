//! From the command that was typed to the daemon that serves: one fork, and a line between both.
//!
//! ```text
//!   cowslip mount ──fork──┬── child: setsid, open the disks, mount, serve ... chdir /, no stdio
//!                         │            │ note, warn            │ succeed | fail
//!                         └── parent:  print them as they come └ exit with that code
//! ```
//!
//! The command returns when the mount answers, and not before: that is what the line is for. It
//! is a socket pair, because a socket can be written without the risk of SIGPIPE when the parent
//! was interrupted. On it run frames: a kind (1 byte), a length (4 bytes, little-endian), a text.
//!
//! The fork comes before any thread exists: the child of a threaded process may do nothing but
//! exec. With `-f` there is no fork, and [`StartupReporter::foreground`] prints straight.
//!
//! A signal that ends the command while it waits has the daemon undo what it began: the parent
//! passes it on, waits for that, and says so by [`StartOutcome::Interrupted`]. A parent that is killed
//! cannot; the daemon gets SIGTERM from the kernel then, until it serves.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{
    Pid, Signal, WaitOptions, WaitStatus, kill_process, set_parent_process_death_signal,
};

use super::openers;
use super::signals::{SignalMask, TERMINATING_SIGNALS, set_signal_mask};
use crate::pool::Cancellable;
use crate::printable;

/// Which side of the fork this is.
#[derive(Debug)]
pub enum ForkSide {
    /// The command: it waits, prints and exits.
    Parent(StartupWaiter),
    /// The daemon to be.
    Child(StartupReporter),
}

/// How starting the daemon ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StartOutcome {
    /// It serves, and goes on without us.
    Serving,
    /// It does not.
    Failed {
        /// What to exit with.
        code: u8,
        /// The one line to print.
        line: String,
    },
    /// A signal has ended it: everything is undone.
    Interrupted {
        /// Its number.
        signal: i32,
    },
}

/// What a frame says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FrameKind {
    /// A line for stdout.
    Note,
    /// A line for stderr.
    Warning,
    /// The last frame: it serves.
    Serving,
    /// The last frame: the exit code (1 byte) and the line.
    Failed,
}

/// How long a thread that was joined may still show in `/proc/self/task`: the kernel wakes the
/// joiner before it takes the entry away.
const THREAD_EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the parent waits for a child that said it failed to clean up and end.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(10);

/// Has signals that end a mount wait until [`fork`] has the parent note them: for a parent that makes
/// something before, which must not be left behind.
///
/// # Errors
/// The errno of pthread_sigmask(3).
pub fn hold_signals() -> io::Result<()> {
    set_signal_mask(SignalMask::Blocked)
}

/// Splits off the daemon: a session of its own, stdio as it was until [`StartupReporter::succeed`].
///
/// # Errors
/// A line that says so when this process already has threads; the errno of socketpair(2) and
/// fork(2). There is no child then.
pub fn fork() -> io::Result<ForkSide> {
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
    // What waits in a buffer would be printed by both.
    io::stdout().flush()?;
    let parent = rustix::process::getpid();
    // Neither side may be ended by a signal before it listens to it: the child goes on blocking
    // them until it does.
    set_signal_mask(SignalMask::Blocked)?;
    // SAFETY: no other thread exists (`fork` looked), so the child's memory is whole, no lock is
    // held for ever, and it may do whatever a process may.
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
                // It was killed before the kernel could have told us.
                kill_process(rustix::process::getpid(), Signal::TERM)?;
            }
            Ok(ForkSide::Child(StartupReporter { channel: ReportChannel::Parent(theirs) }))
        }
        Some(child) => {
            let asked = record_signals();
            set_signal_mask(SignalMask::Unblocked)?;
            Ok(ForkSide::Parent(StartupWaiter {
                channel: ours,
                child,
                signalled: asked?,
                term_sent: false,
            }))
        }
    }
}

/// The last signal that came to the parent; 0 while none has.
static LAST_SIGNAL: OnceLock<Arc<AtomicUsize>> = OnceLock::new();

/// The signal that came to the parent since the fork, if one did. From the fork on none of those
/// that end a mount ends the parent.
#[must_use]
pub fn received_signal() -> Option<i32> {
    let signal = LAST_SIGNAL.get()?.load(Ordering::SeqCst);
    i32::try_from(signal).ok().filter(|signal| *signal != 0)
}

/// Notes signals from now on; gives what becomes readable with each.
fn record_signals() -> io::Result<UnixStream> {
    let (asked, tell) = UnixStream::pair()?;
    asked.set_nonblocking(true)?;
    let number = LAST_SIGNAL.get_or_init(Arc::default);
    for signal in TERMINATING_SIGNALS {
        let value = usize::try_from(signal).map_err(|_| Errno::INVAL)?;
        // In this order: who is woken finds the number.
        signal_hook::flag::register_usize(signal, Arc::clone(number), value)?;
        signal_hook::low_level::pipe::register(signal, tell.try_clone()?)?;
    }
    Ok(asked)
}

/// The parent's end.
#[derive(Debug)]
pub struct StartupWaiter {
    channel: UnixStream,
    child: Pid,
    /// Readable when a signal has come.
    signalled: UnixStream,
    /// Whether the child was told of it.
    term_sent: bool,
}

impl StartupWaiter {
    /// Prints what the child says, line by line, until it serves or has failed. A failed child is
    /// reaped; it gets 10 seconds to end.
    ///
    /// Waits as long as the child works on it: recovery may take its time, and the user can
    /// interrupt. The first signal is passed on; after the second, nothing is waited for.
    pub fn wait(mut self, stdout: &mut dyn Write, stderr: &mut dyn Write) -> StartOutcome {
        loop {
            self.wait_for_frame();
            let printed = match read_frame(&mut self.channel) {
                Ok(Some((FrameKind::Note, text))) => print_line(stdout, &text),
                Ok(Some((FrameKind::Warning, text))) => print_line(stderr, &text),
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

    /// Until the child has said something, or has ended; signals are passed on meanwhile.
    fn wait_for_frame(&mut self) {
        loop {
            let (channel, asked) = (&self.channel, &self.signalled);
            let mut fds = [PollFd::new(channel, PollFlags::IN), PollFd::new(asked, PollFlags::IN)];
            match rustix::event::poll(&mut fds, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                // Then reading waits, too.
                Err(_) => return,
            }
            let [said, signalled] = fds.map(|fd| !fd.revents().is_empty());
            if signalled {
                self.forward_signal();
            }
            if said {
                return;
            }
        }
    }

    /// Has the child undo what it began. A second signal ends this process as signals do.
    fn forward_signal(&mut self) {
        let mut word = [0; 64];
        if self.signalled.read(&mut word).unwrap_or(0) == 0 {
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
            // It has not been reaped, so the number is still its own.
            let _ = kill_process(self.child, Signal::TERM);
        }
    }

    /// What has become of it if a signal came: the child was told, and has ended or soon will.
    fn interrupted(&mut self) -> Option<StartOutcome> {
        let signal = received_signal()?;
        self.terminate_child();
        self.reap();
        Some(StartOutcome::Interrupted { signal })
    }

    fn died(&self) -> StartOutcome {
        let how =
            match self.reap().map(|status| (status.exit_status(), status.terminating_signal())) {
                Some((Some(code), _)) => format!(": exit status {code}"),
                Some((_, Some(signal))) => format!(": killed by signal {signal}"),
                _ => String::new(),
            };
        StartOutcome::Failed { code: 1, line: format!("the daemon died while starting{how}") }
    }

    fn reap(&self) -> Option<WaitStatus> {
        let pid = u32::try_from(self.child.as_raw_pid()).ok()?;
        openers::wait_for_exit(pid, CLEANUP_TIMEOUT).ok()?;
        // NOHANG: it may still be there, and is then left to init.
        let reaped = rustix::process::waitpid(Some(self.child), WaitOptions::NOHANG).ok()??;
        Some(reaped.1)
    }
}

/// Prints what the daemon says; paths and names in it may be anybody's.
fn print_line(to: &mut dyn Write, text: &[u8]) -> io::Result<()> {
    to.write_all(printable::line(&String::from_utf8_lossy(text)).as_bytes())?;
    to.write_all(b"\n")?;
    to.flush()
}

/// The daemon's end: says how the start goes, and ends with [`succeed`](Self::succeed) or
/// [`fail`](Self::fail). Dropped without either, the parent reports that the daemon died.
#[derive(Debug)]
pub struct StartupReporter {
    channel: ReportChannel,
}

#[derive(Debug)]
enum ReportChannel {
    Parent(UnixStream),
    Foreground(NoteOutput),
}

/// Where notes go in the foreground.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoteOutput {
    /// To stdout.
    Stdout,
    /// To stderr: a stream has stdout.
    Stderr,
}

/// Whether the command that waits for the daemon is still there.
struct WaitingCommand(Option<UnixStream>);

impl Cancellable for WaitingCommand {
    fn is_cancelled(&self) -> bool {
        let Some(parent) = &self.0 else { return false };
        // It never says anything: there is an end to be read, or nothing.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        matches!(rustix::net::recv(parent, &mut [0; 1], flags), Ok((_, 0)) | Err(Errno::CONNRESET))
    }

    fn hold(&self) -> bool {
        !self.is_cancelled()
    }

    fn release(&self) {}
}

impl StartupReporter {
    /// For `-f`: no parent waits, lines are printed at once, and stdio stays.
    pub fn foreground(notes: NoteOutput) -> Self {
        Self { channel: ReportChannel::Foreground(notes) }
    }

    /// A line for the user's stdout.
    pub fn note(&self, line: &str) {
        // Whoever does not listen any more does not miss it.
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

    /// A line for the user's stderr.
    pub fn warn(&self, line: &str) {
        let _ = match &self.channel {
            ReportChannel::Parent(parent) => {
                send_frame(parent, FrameKind::Warning, line.as_bytes())
            }
            ReportChannel::Foreground(_) => print_line(&mut io::stderr(), line.as_bytes()),
        };
    }

    /// A request by the command that waits: given up once that is gone. With `-f` nobody waits but
    /// the user, whose signals end this process.
    pub fn request(&self) -> impl Cancellable + 'static {
        WaitingCommand(match &self.channel {
            ReportChannel::Parent(parent) => parent.try_clone().ok(),
            ReportChannel::Foreground(_) => None,
        })
    }

    /// The mount answers: the daemon leaves the caller's directory and stdio, and the parent
    /// returns. With `-f` it leaves the directory only.
    ///
    /// # Errors
    /// `EPIPE` when the parent is gone (the user interrupted it): the caller should undo the
    /// mount. The errno of chdir(2) and dup2(2).
    pub fn succeed(self) -> io::Result<()> {
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
        // Last: once the parent has returned, its pipes must have no writer left.
        send_frame(parent, FrameKind::Serving, b"")
    }

    /// The start failed: the parent prints `line` and exits with `code`, after this process has
    /// ended. With `-f` the line goes to stderr. Clean up first; only exiting is left to do.
    pub fn fail(self, code: u8, line: &str) {
        let _ = match &self.channel {
            ReportChannel::Parent(parent) => {
                let text = [&[code], line.as_bytes()].concat();
                send_frame(parent, FrameKind::Failed, &text)
            }
            ReportChannel::Foreground(_) => print_line(&mut io::stderr(), line.as_bytes()),
        };
    }
}

fn send_frame(to: &UnixStream, kind: FrameKind, text: &[u8]) -> io::Result<()> {
    let len = u32::try_from(text.len()).map_err(|_| Errno::MSGSIZE)?;
    let mut frame = vec![kind.byte()];
    frame.extend(len.to_le_bytes());
    frame.extend(text);
    let mut rest = &frame[..];
    while !rest.is_empty() {
        let sent = rustix::io::retry_on_intr(|| rustix::net::send(to, rest, SendFlags::NOSIGNAL))?;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

/// The next frame; `None` at the end.
fn read_frame(from: &mut impl Read) -> io::Result<Option<(FrameKind, Vec<u8>)>> {
    let mut head = [0; 5];
    match from.read_exact(&mut head) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let [kind, len @ ..] = head;
    let kind = FrameKind::ALL.into_iter().find(|known| known.byte() == kind);
    let kind = kind.ok_or(io::ErrorKind::InvalidData)?;
    let len = u32::from_le_bytes(len);
    // By `take`, so that memory grows with what is really there.
    let mut text = Vec::new();
    from.take(len.into()).read_to_end(&mut text)?;
    match u32::try_from(text.len()) == Ok(len) {
        true => Ok(Some((kind, text))),
        false => Ok(None),
    }
}

impl FrameKind {
    const ALL: [Self; 4] = [Self::Note, Self::Warning, Self::Serving, Self::Failed];

    const fn byte(self) -> u8 {
        match self {
            Self::Note => b'n',
            Self::Warning => b'w',
            Self::Serving => b'o',
            Self::Failed => b'f',
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Output};

    /// Names the part that [`helper`] plays.
    const TEST_PART_ENV: &str = "COWSLIP_TEST_DAEMON";

    #[test]
    fn a_request_is_given_up_once_the_command_that_waits_is_gone() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ready = StartupReporter { channel: ReportChannel::Parent(theirs) };
        let request = ready.request();
        assert!(!request.is_cancelled() && request.hold());
        drop(ours);
        assert!(request.is_cancelled() && !request.hold());
        assert!(!StartupReporter::foreground(NoteOutput::Stdout).request().is_cancelled());
    }

    /// Not a test of its own but the process that the tests below start: tests run in threads,
    /// and this one forks. It does nothing without its variable.
    #[test]
    #[ignore = "run by the other tests"]
    fn helper() {
        let Ok(part) = std::env::var(TEST_PART_ENV) else {
            return;
        };
        // `fork_unchecked`, since even a lone test has its runner's thread beside it; that one only waits.
        match fork_unchecked().unwrap() {
            ForkSide::Parent(waiting) => {
                let outcome = waiting.wait(&mut io::stdout(), &mut io::stderr());
                println!("{outcome:?}");
                std::process::exit(0);
            }
            ForkSide::Child(ready) => play(&part, ready),
        }
    }

    fn play(part: &str, ready: StartupReporter) -> ! {
        ready.note("vm1.img: 20 GiB");
        ready.warn("tmpfs is RAM");
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
        let (stdout, stderr) =
            (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(stdout.contains("vm1.img: 20 GiB\n"), "{stdout}");
        assert!(stderr.contains("tmpfs is RAM\n"), "{stderr}");
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

    #[test]
    fn frames_arrive_as_they_were_sent() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        send_frame(&writer, FrameKind::Note, b"a\nb").unwrap();
        send_frame(&writer, FrameKind::Failed, b"").unwrap();
        assert_eq!(read_frame(&mut reader).unwrap(), Some((FrameKind::Note, b"a\nb".to_vec())));
        assert_eq!(read_frame(&mut reader).unwrap(), Some((FrameKind::Failed, Vec::new())));
        drop(writer);
        assert_eq!(read_frame(&mut reader).unwrap(), None);
    }

    #[test]
    fn a_cut_frame_is_the_end_and_a_strange_one_an_error() {
        assert_eq!(read_frame(&mut &b"n\x05\0\0\0abc"[..]).unwrap(), None);
        assert_eq!(read_frame(&mut &b"n\x05"[..]).unwrap(), None);
        assert!(read_frame(&mut &b"?\0\0\0\0"[..]).is_err());
    }

    #[test]
    fn success_without_a_parent_is_an_error_not_a_signal() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        drop(ours);
        let error = send_frame(&theirs, FrameKind::Serving, b"").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EPIPE));
    }
}
