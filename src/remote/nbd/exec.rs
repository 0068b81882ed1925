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
//!
//! A program that is locked in has the image as descriptor 4 as well, opened with `O_PATH`: neither a
//! new name nor a lock gets at another file. It is ended, too, when it does not answer a handshake.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with,
};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::error::NbdError;
use crate::confined::PathHandle;
use crate::host::os_message;
use crate::printable;
use crate::process::restore_caller_limits;
use crate::program::guard::{self, GuardProcess};
use crate::program::stderr::StderrTail;
use crate::sandbox::Sandbox;

/// Makes the socket, which comes as the standard input, descriptor 3, and tells the program so. Only
/// the process itself knows its number for LISTEN_PID.
const ACTIVATE: &str = "LISTEN_PID=$$ LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; \
                        unset LISTEN_FDNAMES; exec \"$@\" 3<&0 </dev/null";

/// The same, where the image comes as the standard output: descriptor 4.
const ACTIVATE_WITH_IMAGE: &str = "LISTEN_PID=$$ LISTEN_FDS=1; export LISTEN_PID LISTEN_FDS; \
                                   exec \"$@\" 3<&0 4<&1 </dev/null >&2";

/// The path at which a program that is locked in opens the image.
pub(crate) const IMAGE_PATH: &str = "/proc/self/fd/4";

/// What a program needs that is locked in to be started: the shell sets the number of the process.
pub(crate) const SHELL: &str = "/bin/sh";

/// Connections that wait until the program takes them.
const BACKLOG: i32 = 16;

/// The time that a program has to end by itself after a SIGTERM, before it is killed.
const TERM_TIMEOUT: Duration = Duration::from_secs(2);

/// The time that a program has to end after its connection broke, so that its last words are told.
const LAST_WORDS: Duration = Duration::from_millis(300);

/// Judges the files that a program has open once it serves the image: text to follow "the image is
/// another one by now" when they are not what they were.
pub(crate) type FilesCheck = Arc<dyn Fn(Vec<PathHandle>) -> Result<(), String> + Send + Sync>;

/// A program that becomes the server.
#[derive(Clone)]
pub(crate) struct ServerProgram {
    /// The program; `None` finds the first of `words` as a shell does.
    pub(crate) file: Option<PathBuf>,
    /// The name of the program, which messages show, and its arguments.
    pub(crate) words: Vec<OsString>,
    /// Its working directory.
    pub(crate) dir: PathBuf,
    /// What locks it in; `None` for one that the user named.
    pub(crate) jail: Option<Arc<Jail>>,
}

/// What locks a program in, and what it has there.
pub(crate) struct Jail {
    pub(crate) sandbox: Sandbox,
    /// The image, opened with `O_PATH`.
    pub(crate) image: OwnedFd,
    pub(crate) check: FilesCheck,
}

/// A server that is started when it is needed.
pub(super) struct ExecServer {
    program: ServerProgram,
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
    /// Names the program, which is not started yet.
    pub(super) fn new(program: ServerProgram) -> Self {
        Self { program, running: None }
    }

    fn name(&self) -> String {
        let name = self.program.words.first().map(|name| name.to_string_lossy());
        printable::line(&name.unwrap_or_default()).into_owned()
    }

    /// Returns a path of the socket, after starting the program unless it runs.
    ///
    /// # Errors
    /// One line for the user.
    pub(super) fn start(&mut self) -> Result<PathBuf, String> {
        if self.running.as_ref().is_none_or(Running::has_ended) {
            self.running = None;
            let running = Running::start(&self.program);
            let failed =
                |error: io::Error| format!("cannot run '{}': {}", self.name(), os_message(&error));
            self.running = Some(running.map_err(failed)?);
        }
        let socket = self.running.as_ref().map_or(-1, |running| running.socket.as_raw_fd());
        Ok(format!("/proc/self/fd/{socket}").into())
    }

    /// Checks the files of a program that is locked in and runs.
    ///
    /// # Errors
    /// [`NbdError::Changed`] with the text of the check; [`NbdError::Program`] when they cannot be seen.
    pub(super) fn check_files(&self) -> Result<(), NbdError> {
        let (Some(jail), Some(running)) = (&self.program.jail, &self.running) else {
            return Ok(());
        };
        let files = open_files(running.child.id()).map_err(|error| {
            let (name, why) = (self.name(), os_message(&error));
            NbdError::Program(format!("the files that '{name}' has open cannot be seen: {why}"))
        })?;
        (jail.check)(files).map_err(NbdError::Changed)
    }

    /// Ends a program that is locked in and does not answer: one that works on a hostile image for ever
    /// would never do so.
    pub(super) fn end_if_locked_in(&mut self) {
        if self.program.jail.is_some() {
            self.running = None;
        }
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
    fn start(program: &ServerProgram) -> io::Result<Self> {
        let (listener, socket) = private_socket()?;
        let (stderr, stderr_end) = StderrTail::new()?;
        let mut command = Command::new(SHELL);
        let script = if program.jail.is_some() { ACTIVATE_WITH_IMAGE } else { ACTIVATE };
        command.args(["-c", script, "sh"]);
        match &program.file {
            Some(file) => command.arg(file).args(program.words.iter().skip(1)),
            None => command.args(&program.words),
        };
        command.current_dir(&program.dir).process_group(0);
        command.stdin(listener).stdout(Stdio::null()).stderr(stderr_end);
        restore_caller_limits(&mut command);
        if let Some(jail) = &program.jail {
            jail.apply(&mut command)?;
        }
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

impl Jail {
    /// Makes `command` start with the image, and locked in.
    fn apply(self: &Arc<Self>, command: &mut Command) -> io::Result<()> {
        command.stdout(self.image.try_clone()?);
        // Messages are read, so they must not be translated.
        command.env_clear().env("LC_ALL", "C").env("PATH", "/usr/bin:/bin");
        // Else glibc keeps 64 MiB of addresses for each thread, of which there are not that many.
        command.env("MALLOC_ARENA_MAX", "1");
        let jail = Arc::clone(self);
        // SAFETY: between fork and exec the closure makes only system calls: no memory is allocated,
        // no lock is taken.
        unsafe { command.pre_exec(move || jail.sandbox.enter()) };
        Ok(())
    }
}

/// Finds the files that the process `pid` has open.
fn open_files(pid: u32) -> io::Result<Vec<PathHandle>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        match PathHandle::at(&entry?.path()) {
            Ok(file) => files.push(file),
            // It was closed meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(files)
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
