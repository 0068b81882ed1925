//! A pipe of programs at one end of a stream.
//!
//! ```text
//!   End::Input:    daemon ══▶ zstd -c | ssh h ...  ──▶ stdout     (and a guard: see `guard.rs`)
//!   End::Output:   /dev/null ──▶ curl ... | zstd -dc ══▶ daemon
//! ```
//!
//! The programs are one process group, so one signal ends all of them and whatever they started.
//! They run in the caller's directory, without a shell. All write their stderr into one pipe, of
//! which the last 4 KiB are kept: its last line says best why a program failed.
//!
//! A program that has ended stays a zombie until all have: its number, which is the group's, can
//! not become another's as long as a signal may still be sent to it. For the same reason the state
//! lock is held while the group is killed, and while the zombies are collected; no waiting is done
//! under it.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::Timespec;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};

use super::guard::{self, GuardProcess};
use super::stderr::StderrTail;
use super::stop::Stop;
use crate::config::Programs;
use crate::host::os_message;
use crate::process::restore_caller_limits;

/// As much as an unprivileged process may ask for: 1 MiB. It evens out who waits for whom.
pub(super) const PIPE_SIZE: usize = 1 << 20;

/// How long killed programs are waited for. One that is stuck in the kernel goes later.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// How often it is looked whether a program has ended, where that wait must end on a word.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// Which end of the pipe of programs is ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipeEnd {
    /// We write what the first program reads.
    Input,
    /// We read what the last program writes.
    Output,
}

/// Running programs; when the last clone is dropped, those that still run are killed.
#[derive(Debug)]
pub struct Pipeline {
    programs: Vec<Program>,
    group: Pid,
    state: Mutex<PipelineState>,
    stderr: StderrTail,
}

#[derive(Debug)]
struct Program {
    name: String,
    pid: Pid,
}

#[derive(Debug)]
struct PipelineState {
    guard: Option<GuardProcess>,
    /// Empty once all have been collected: the pids are not ours any more.
    children: Vec<Child>,
    /// What was to be said when they were collected.
    outcome: Option<Result<(), String>>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgramExit {
    Exited(i32),
    Killed(i32),
    /// Somebody else has collected it.
    Unknown,
}

impl Pipeline {
    /// Starts `programs` in `dir`, joined by pipes; gives our end of theirs, which does not block.
    ///
    /// With [`PipeEnd::Input`] the last program gets `stdout`, and a guard is started (where
    /// [`guard::offer`] was called). With [`PipeEnd::Output`] `stdout` is not used, and the first
    /// program reads /dev/null.
    ///
    /// # Errors
    /// One line. Nothing runs then.
    pub fn spawn(
        programs: &Programs,
        dir: &Path,
        end: PipeEnd,
        stdout: Stdio,
    ) -> Result<(Arc<Self>, OwnedFd), String> {
        Self::spawn_with(programs, dir, end, stdout, guard::program())
    }

    /// [`Self::spawn`] with the program that guards an [`PipeEnd::Input`], if any.
    ///
    /// # Errors
    /// As there.
    pub fn spawn_with(
        programs: &Programs,
        dir: &Path,
        end: PipeEnd,
        stdout: Stdio,
        guard: Option<&Path>,
    ) -> Result<(Arc<Self>, OwnedFd), String> {
        if !dir.is_dir() {
            return Err(format!("cannot run commands in '{}': no such directory", dir.display()));
        }
        let (stderr, stderr_end) = StderrTail::new().map_err(|error| pipe_error(&error))?;
        let (ours, theirs) = data_pipe(end).map_err(|error| pipe_error(&error))?;
        let (first, last) = match end {
            PipeEnd::Input => (Stdio::from(theirs), stdout),
            PipeEnd::Output => (Stdio::null(), Stdio::from(theirs)),
        };
        let mut started = StartingPrograms { children: Vec::new() };
        started.spawn_all(programs, dir, first, last, &stderr_end)?;
        let Some(group) = started.children.first().map(pid_of) else {
            return Err("there is no program to run".to_owned());
        };
        let guard = match guard.filter(|_| end == PipeEnd::Input) {
            Some(program) => Some(start_guard(program, group, &ours, programs)?),
            None => None,
        };
        let children = std::mem::take(&mut started.children);
        let named = programs.0.iter().zip(&children);
        let programs =
            named.map(|(words, child)| Program { name: program_name(words), pid: pid_of(child) });
        let pipeline = Self {
            programs: programs.collect(),
            group,
            state: Mutex::new(PipelineState { guard, children, outcome: None }),
            stderr,
        };
        Ok((Arc::new(pipeline), ours))
    }

    /// The name of the program that reads what we write.
    #[must_use]
    pub fn first_program(&self) -> &str {
        self.programs.first().map_or("", |program| &program.name)
    }

    /// A program that has ended badly, in words; never waits.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let state = self.state.lock();
        match &state.outcome {
            Some(outcome) => outcome.clone().err(),
            None => self.worst_failure(),
        }
    }

    /// Whether all programs have ended; never waits.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let state = self.state.lock();
        state.outcome.is_some() || self.programs.iter().all(|program| program.exit().is_some())
    }

    /// Waits until all programs have ended. Our end has to be closed (after [`Self::release_guard`]) for
    /// them to see the end of input.
    ///
    /// # Errors
    /// One line about a program whose status is not 0.
    pub fn wait(&self) -> Result<(), String> {
        for program in &self.programs {
            let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            // ECHILD: collected by a `kill` meanwhile, whose outcome stands.
            let _ = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(program.pid), flags));
        }
        self.reap()
    }

    /// [`Self::wait`] that `stop` ends; the programs go on then.
    ///
    /// # Errors
    /// As there; also when it was stopped.
    pub fn wait_unless_stopped(&self, stop: &Stop) -> Result<(), String> {
        while !self.has_ended() {
            if stop.sleep(POLL_INTERVAL).is_err() {
                let first = self.first_program();
                return Err(format!("it was stopped before '{first}' had ended"));
            }
        }
        self.reap()
    }

    /// Kills the whole group and collects it; nothing happens when that is done already.
    pub fn kill(&self) {
        {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            let _ = kill_process_group(self.group, Signal::KILL);
            // Now, not before: without its guard the end of input would look meant.
            state.guard = None;
        }
        let until = Instant::now() + KILL_TIMEOUT;
        while !self.has_ended() {
            if Instant::now() >= until {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = self.reap();
    }

    /// Tells the guard that the end of input is meant, and waits until it has let go; to be called
    /// before the write end is closed.
    pub fn release_guard(&self) {
        let guard = self.state.lock().guard.take();
        if let Some(guard) = guard {
            guard.release();
        }
    }

    /// Collects the programs, which have all ended, and says how.
    fn reap(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        if let Some(outcome) = &state.outcome {
            return outcome.clone();
        }
        // It knows the group only by its number, which is about to be given up.
        state.guard = None;
        let outcome = self.worst_failure().map_or(Ok(()), Err);
        for mut child in state.children.drain(..) {
            let _ = child.wait();
        }
        state.outcome = Some(outcome.clone());
        outcome
    }

    /// A descriptor for each program that becomes readable when that ends; none for those that were
    /// collected.
    #[must_use]
    pub fn pidfds(&self) -> Vec<OwnedFd> {
        // Under the lock no pid becomes another's.
        let state = self.state.lock();
        let pids = state.children.iter().map(pid_of);
        pids.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
    }

    /// The worst that can be said of a program that has ended.
    fn worst_failure(&self) -> Option<String> {
        let bad = |ending: &ProgramExit| *ending != ProgramExit::Exited(0);
        let ended = self.programs.iter().filter_map(|program| {
            let ending = program.exit().filter(bad)?;
            Some((&program.name, ending))
        });
        // SIGPIPE is seldom the cause: the program behind it went first, or is going now.
        let is_pipe = |ending: ProgramExit| ending == ProgramExit::Killed(libc::SIGPIPE);
        let (name, ending) = ended.min_by_key(|(_, ending)| is_pipe(*ending))?;
        if is_pipe(ending) && self.programs.iter().any(|program| program.exit().is_none()) {
            return None;
        }
        Some(match ending {
            ProgramExit::Exited(status) => match self.stderr.last_line() {
                Some(line) => format!("'{name}' exited with status {status}: {line}"),
                None => format!("'{name}' exited with status {status}"),
            },
            ProgramExit::Killed(signal) => format!("'{name}' was killed by signal {signal}"),
            ProgramExit::Unknown => format!("'{name}' has ended, and nobody knows how"),
        })
    }
}

impl Drop for Pipeline {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Program {
    /// How it ended, if it has. It stays a zombie.
    fn exit(&self) -> Option<ProgramExit> {
        let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        match rustix::io::retry_on_intr(|| waitid(WaitId::Pid(self.pid), flags)) {
            Ok(None) => None,
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(status), _) => Some(ProgramExit::Exited(status)),
                (_, Some(signal)) => Some(ProgramExit::Killed(signal)),
                _ => None,
            },
            Err(_) => Some(ProgramExit::Unknown),
        }
    }
}

/// Programs that are being started; those that are still here when it is dropped are killed.
struct StartingPrograms {
    children: Vec<Child>,
}

impl StartingPrograms {
    fn spawn_all(
        &mut self,
        programs: &Programs,
        dir: &Path,
        first: Stdio,
        last: Stdio,
        stderr: &OwnedFd,
    ) -> Result<(), String> {
        let (mut stdin, mut last) = (first, Some(last));
        for (number, words) in programs.0.iter().enumerate() {
            let (stdout, next) = match last.take_if(|_| number + 1 == programs.0.len()) {
                Some(last) => (last, Stdio::null()),
                None => {
                    let (reader, writer) =
                        pipe_with(PipeFlags::CLOEXEC).map_err(|error| pipe_error(&error.into()))?;
                    (Stdio::from(writer), Stdio::from(reader))
                }
            };
            let stderr = stderr.try_clone().map_err(|error| pipe_error(&error))?;
            self.spawn_one(words, dir, [stdin, stdout, Stdio::from(stderr)])?;
            stdin = next;
        }
        Ok(())
    }

    fn spawn_one(
        &mut self,
        words: &[OsString],
        dir: &Path,
        stdio: [Stdio; 3],
    ) -> Result<(), String> {
        let (program, args) = words.split_first().ok_or("there is a pipe without a program")?;
        let [stdin, stdout, stderr] = stdio;
        let group = self.children.first().map_or(0, |child| pid_of(child).as_raw_pid());
        let mut command = Command::new(program);
        command.args(args).stdin(stdin).stdout(stdout).stderr(stderr);
        command.current_dir(dir).process_group(group);
        restore_caller_limits(&mut command);
        let child = command.spawn().map_err(|error| {
            format!("cannot run '{}': {}", program_name(words), os_message(&error))
        })?;
        self.children.push(child);
        Ok(())
    }
}

impl Drop for StartingPrograms {
    fn drop(&mut self) {
        if let Some(first) = self.children.first() {
            let _ = kill_process_group(pid_of(first), Signal::KILL);
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// The pipe between us and the programs: our end, and theirs.
fn data_pipe(end: PipeEnd) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = match end {
        PipeEnd::Input => (writer, reader),
        PipeEnd::Output => (reader, writer),
    };
    // The two ends have flags of their own: the programs' end goes on blocking.
    fcntl_setfl(&ours, fcntl_getfl(&ours)? | OFlags::NONBLOCK)?;
    // The user's limit on pipes may be used up; a small one is only slower.
    let _: Result<usize, Errno> = fcntl_setpipe_size(&ours, PIPE_SIZE);
    Ok((ours, theirs))
}

/// Starts the guard of `programs`, which holds a second `data` end.
fn start_guard(
    program: &Path,
    group: Pid,
    data: &OwnedFd,
    programs: &Programs,
) -> Result<GuardProcess, String> {
    let guard = data.try_clone().and_then(|data| GuardProcess::start(program, group, data));
    guard.map_err(|error| format!("cannot start the guard of '{programs}': {}", os_message(&error)))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

fn program_name(words: &[OsString]) -> String {
    words.first().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

fn pipe_error(error: &io::Error) -> String {
    format!("cannot make a pipe: {}", os_message(error))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use tempfile::TempDir;

    use super::*;
    use crate::stream::sink::tests::programs;

    type Started = Result<(Arc<Pipeline>, OwnedFd), String>;

    fn spawn(words: &[&[&str]], end: PipeEnd) -> Started {
        Pipeline::spawn(&programs(words), Path::new("/"), end, Stdio::null())
    }

    fn eventually(what: impl Fn() -> bool) {
        let until = Instant::now() + Duration::from_secs(20);
        while !what() {
            assert!(Instant::now() < until, "it never came");
            thread::sleep(Duration::from_millis(2));
        }
    }

    fn is_gone(pid: &str) -> bool {
        // A zombie that init has not collected yet is gone too.
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")),
            Err(_) => true,
        }
    }

    #[test]
    fn what_is_written_goes_through_all_programs() {
        let dir = TempDir::new().unwrap();
        let words: &[&[&str]] = &[&["tr", "a", "b"], &["sh", "-c", "cat > out"]];
        let (pipeline, fd) =
            Pipeline::spawn(&programs(words), dir.path(), PipeEnd::Input, Stdio::null()).unwrap();
        File::from(fd).write_all(b"banana").unwrap();
        pipeline.release_guard();
        pipeline.wait().unwrap();
        assert_eq!(pipeline.failure(), None);
        assert_eq!(std::fs::read(dir.path().join("out")).unwrap(), b"bbnbnb");
    }

    #[test]
    fn every_status_counts_and_the_last_line_of_stderr_is_told() {
        let script = "cat; echo first >&2; printf 'no \\033 room\\rat all\\n\\n' >&2; exit 4";
        let (pipeline, fd) = spawn(&[&["sh", "-c", script], &["cat"]], PipeEnd::Input).unwrap();
        drop(fd);
        let said = Err("'sh' exited with status 4: at all".to_owned());
        assert_eq!(pipeline.wait(), said);
        assert_eq!(pipeline.wait(), said);
        assert_eq!(pipeline.failure(), said.err());
        let (pipeline, fd) = spawn(&[&["cat"], &["false"]], PipeEnd::Input).unwrap();
        drop(fd);
        assert_eq!(pipeline.wait().unwrap_err(), "'false' exited with status 1");
    }

    #[test]
    fn the_program_that_died_of_a_closed_pipe_is_not_the_one_to_blame() {
        let (pipeline, fd) = spawn(&[&["yes"], &["sh", "-c", "exit 9"]], PipeEnd::Output).unwrap();
        drop(fd);
        assert_eq!(pipeline.wait().unwrap_err(), "'sh' exited with status 9");
    }

    #[test]
    fn failure_tells_of_a_program_that_has_ended_and_does_not_wait_for_the_others() {
        let words: &[&[&str]] = &[&["sleep", "1000"], &["sh", "-c", "echo why >&2; kill -9 $$"]];
        let (pipeline, _fd) = spawn(words, PipeEnd::Input).unwrap();
        eventually(|| pipeline.failure().is_some());
        assert_eq!(pipeline.failure().unwrap(), "'sh' was killed by signal 9");
        assert!(!pipeline.has_ended());
    }

    #[test]
    fn a_program_that_cannot_be_started_takes_the_others_with_it() {
        let dir = TempDir::new().unwrap();
        let words: &[&[&str]] = &[&["sh", "-c", "echo $$ > pid; exec sleep 1000"], &["zstdd"]];
        let started = Pipeline::spawn(&programs(words), dir.path(), PipeEnd::Input, Stdio::null());
        let line = "cannot run 'zstdd': No such file or directory";
        assert_eq!(started.unwrap_err(), line);
        // It may have been killed before it could write that.
        if let Ok(pid) = std::fs::read_to_string(dir.path().join("pid")) {
            assert!(pid.is_empty() || is_gone(pid.trim()));
        }
        let absent = dir.path().join("absent");
        let started =
            Pipeline::spawn(&programs(&[&["cat"]]), &absent, PipeEnd::Input, Stdio::null());
        assert!(started.unwrap_err().ends_with("absent': no such directory"));
    }

    #[test]
    fn a_kill_takes_the_whole_group_and_so_does_a_drop() {
        for how in [Pipeline::kill, |_: &Pipeline| ()] {
            let script = "sleep 1000 & echo $!; wait";
            let (pipeline, fd) =
                spawn(&[&["sh", "-c", script], &["cat"]], PipeEnd::Output).unwrap();
            let mut pid = String::new();
            eventually(|| {
                let mut byte = [0; 1];
                while let Ok(1) = rustix::io::read(&fd, &mut byte) {
                    if byte == *b"\n" {
                        return true;
                    }
                }
                false
            });
            let stat = std::fs::read_to_string(format!(
                "/proc/{}/task/{0}/children",
                pipeline.group.as_raw_pid()
            ));
            pid.push_str(stat.unwrap().trim());
            assert!(!is_gone(&pid));
            how(&pipeline);
            drop(pipeline);
            eventually(|| is_gone(&pid));
        }
    }

    #[test]
    fn a_grandchild_that_keeps_stderr_keeps_nobody() {
        let script = "sleep 1000 & echo gone >&2; exit 1";
        let (pipeline, fd) = spawn(&[&["sh", "-c", script]], PipeEnd::Input).unwrap();
        drop(fd);
        let group = pipeline.group;
        let begun = Instant::now();
        assert_eq!(pipeline.wait().unwrap_err(), "'sh' exited with status 1: gone");
        drop(pipeline);
        assert!(begun.elapsed() < Duration::from_secs(100), "somebody waited for the grandchild");
        kill_process_group(group, Signal::KILL).unwrap();
    }

    #[test]
    fn a_program_that_never_stops_complaining_is_not_listened_to_for_ever() {
        let (pipeline, fd) =
            spawn(&[&["sh", "-c", "echo y >&2; yes >&2 & sleep 0.1; exit 1"]], PipeEnd::Input)
                .unwrap();
        let group = pipeline.group;
        drop(fd);
        assert_eq!(pipeline.wait().unwrap_err(), "'sh' exited with status 1: y");
        kill_process_group(group, Signal::KILL).unwrap();
    }

    #[test]
    fn a_wait_is_ended_by_its_stop() {
        let (pipeline, _fd) = spawn(&[&["sleep", "1000"]], PipeEnd::Input).unwrap();
        let stop = Stop::new().unwrap();
        let (other, until) = (Arc::clone(&pipeline), stop.clone());
        let waiting = thread::spawn(move || other.wait_unless_stopped(&until));
        thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        stop.stop();
        let said = waiting.join().unwrap().unwrap_err();
        assert_eq!(said, "it was stopped before 'sleep' had ended");
        pipeline.kill();
        assert_eq!(pipeline.wait().unwrap_err(), "'sleep' was killed by signal 9");
    }

    #[test]
    fn our_end_does_not_block_and_theirs_does() {
        let (_pipeline, fd) = spawn(&[&["sleep", "1000"]], PipeEnd::Input).unwrap();
        assert!(fcntl_getfl(&fd).unwrap().contains(OFlags::NONBLOCK));
        let (pipeline, fd) =
            spawn(&[&["sed", "-n", "s/^flags:\\s*//p", "/proc/self/fdinfo/1"]], PipeEnd::Output)
                .unwrap();
        let stop = Stop::new().unwrap();
        pipeline.wait_unless_stopped(&stop).unwrap();
        let mut flags = String::new();
        File::from(fd).read_to_string(&mut flags).unwrap();
        let flags = u32::from_str_radix(flags.trim(), 8).unwrap();
        assert_eq!(flags & OFlags::NONBLOCK.bits(), 0);
    }
}
