//! A program that becomes the server, by socket activation (sd_listen_fds(3)).
//!
//! ```text
//!   daemon ── connect ──▶ a socket that listens ── descriptor 3 ──▶ qemu-nbd | nbdkit ...
//! ```
//!
//! The socket has its name only until the program is started: nobody else can connect, and nothing is
//! left behind. It is reached through a descriptor of its file.
//!
//! The program ends with the daemon, however that ends: its process group is killed when the client
//! is dropped, the kernel kills the program when our thread ends (PR_SET_PDEATHSIG), and the guard of
//! `program/guard.rs` kills the whole group when the daemon is killed. A program that ends by itself
//! is an outage: it is started again with the next connection.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use crate::host::os_message;
use crate::printable;
use crate::process::restore_caller_limits;
use crate::program::guard::{self, GuardProcess};
use crate::program::stderr::StderrTail;

/// Makes the socket, which comes as the standard input, descriptor 3, and tells the program so. Only
/// the process itself knows its number for LISTEN_PID.
const ACTIVATE: &str = "LISTEN_PID=$$ LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; \
                        unset LISTEN_FDNAMES; exec \"$@\" 3<&0 </dev/null";

/// Connections that wait until the program takes them.
const BACKLOG: i32 = 16;

/// The time that a program has to end by itself after a SIGTERM, before it is killed.
const TERM_TIMEOUT: Duration = Duration::from_secs(2);

/// The time that a program has to end after its connection broke, so that its last words are told.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// A server that is started when it is needed.
#[derive(Debug)]
pub(super) struct ExecServer {
    words: Vec<OsString>,
    dir: PathBuf,
    running: Option<Running>,
}

/// A program, running or a zombie. Dropping it ends it and all of its process group.
#[derive(Debug)]
struct Running {
    child: Child,
    /// The file of the socket.
    socket: OwnedFd,
    stderr: StderrTail,
    guard: Option<GuardProcess>,
    /// Lives as long as the program, which is killed when it ends.
    parent: Option<JoinHandle<()>>,
}

impl ExecServer {
    /// Names the program `words`, to be run in `dir`.
    pub(super) fn new(words: Vec<OsString>, dir: &Path) -> Self {
        Self { words, dir: dir.to_owned(), running: None }
    }

    fn name(&self) -> String {
        let name = self.words.first().map(|name| name.to_string_lossy()).unwrap_or_default();
        printable::line(&name).into_owned()
    }

    /// Returns a path of the socket, after starting the program unless it runs.
    ///
    /// # Errors
    /// One line for the user.
    pub(super) fn start(&mut self) -> Result<PathBuf, String> {
        if self.running.as_ref().is_none_or(Running::has_ended) {
            self.running = None;
            let running = Running::start(&self.words, &self.dir);
            let failed =
                |error: io::Error| format!("cannot run '{}': {}", self.name(), os_message(&error));
            self.running = Some(running.map_err(failed)?);
        }
        let socket = self.running.as_ref().map_or(-1, |running| running.socket.as_raw_fd());
        Ok(format!("/proc/self/fd/{socket}").into())
    }

    /// Describes how the program ended, when it has, or is about to.
    pub(super) fn failure(&self) -> Option<String> {
        let running = self.running.as_ref()?;
        let until = Instant::now() + LAST_WORDS;
        while !running.has_ended() {
            if Instant::now() >= until {
                return None;
            }
            thread::sleep(Duration::from_millis(5));
        }
        let name = self.name();
        let line = running.stderr.last_line();
        let line = line.map_or_else(String::new, |line| format!(": {line}"));
        Some(match running.exit() {
            (Some(status), _) => format!("'{name}' exited with status {status}{line}"),
            (None, Some(signal)) => format!("'{name}' was killed by signal {signal}{line}"),
            (None, None) => format!("'{name}' has ended{line}"),
        })
    }
}

impl Running {
    fn start(words: &[OsString], dir: &Path) -> io::Result<Self> {
        let (listener, socket) = private_socket()?;
        let (stderr, stderr_end) = StderrTail::new()?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", ACTIVATE, "sh"]).args(words).current_dir(dir).process_group(0);
        command.stdin(listener).stdout(Stdio::null()).stderr(stderr_end);
        restore_caller_limits(&mut command);
        kill_with_parent(&mut command);
        let (child, parent) = spawn_on_thread(command)?;
        let group = Pid::from_child(&child);
        let mut running = Self { child, socket, stderr, guard: None, parent: Some(parent) };
        if let Some(program) = guard::program() {
            let nothing = OwnedFd::from(std::fs::File::open("/dev/null")?);
            running.guard = Some(GuardProcess::start(program, group, nothing)?);
        }
        Ok(running)
    }

    /// Returns the status or the signal with which the program ended; it stays a zombie.
    fn exit(&self) -> (Option<i32>, Option<i32>) {
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let pid = WaitId::Pid(Pid::from_child(&self.child));
        match rustix::io::retry_on_intr(|| waitid(pid.clone(), flags)) {
            Ok(Some(status)) => (status.exit_status(), status.terminating_signal()),
            _ => (None, None),
        }
    }

    fn has_ended(&self) -> bool {
        self.exit() != (None, None)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // The number of the group is ours until the program is reaped.
        let group = Pid::from_child(&self.child);
        let _ = kill_process_group(group, Signal::TERM);
        let until = Instant::now() + TERM_TIMEOUT;
        while !self.has_ended() && Instant::now() < until {
            thread::sleep(Duration::from_millis(2));
        }
        let _ = kill_process_group(group, Signal::KILL);
        self.guard = None;
        // Its thread waits for it too, without reaping it.
        if let Some(parent) = self.parent.take() {
            let _ = parent.join();
        }
        let _ = self.child.wait();
    }
}

/// Makes a socket that listens, and whose file has no name any more. Returns it, and the file.
fn private_socket() -> io::Result<(OwnedFd, OwnedFd)> {
    let dir = tempfile::Builder::new().prefix("cowslip-nbd-").tempdir()?;
    // Through its descriptor the name is short, wherever temporary files are (unix(7): 108 bytes).
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir_fd = rustix::fs::open(dir.path(), flags, Mode::empty())?;
    let path = format!("/proc/self/fd/{}/socket", dir_fd.as_raw_fd());
    let listener =
        socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(path.as_str())?)?;
    listen(&listener, BACKLOG)?;
    let file =
        rustix::fs::openat(&dir_fd, "socket", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    dir.close()?;
    Ok((listener, file))
}

/// Makes the kernel kill the program when the thread that starts it ends (PR_SET_PDEATHSIG(2const)).
fn kill_with_parent(command: &mut Command) {
    let parent = rustix::process::getpid();
    let set = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have ended before that.
        match rustix::process::getppid() == Some(parent) {
            true => Ok(()),
            false => Err(io::Error::from_raw_os_error(libc::ESRCH)),
        }
    };
    // SAFETY: between fork and exec the closure makes only system calls: no memory is allocated, no
    // lock is taken.
    unsafe { command.pre_exec(set) };
}

/// Starts `command` on a thread that lives until the program has ended.
fn spawn_on_thread(mut command: Command) -> io::Result<(Child, JoinHandle<()>)> {
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        let started = command.spawn();
        // Our copies of what the program has: the socket would outlive it here.
        drop(command);
        let pid = started.as_ref().ok().map(Pid::from_child);
        let _ = sender.send(started);
        if let Some(pid) = pid {
            let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let _ = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(pid), flags));
        }
    };
    let parent = thread::Builder::new().name("cowslip-nbd-exec".to_owned()).spawn(work)?;
    let gone = || io::Error::from_raw_os_error(libc::ESRCH);
    let started = receiver.recv().map_err(|_| gone())??;
    Ok((started, parent))
}
