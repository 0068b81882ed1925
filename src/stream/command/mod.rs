//! A pipeline of programs at one end of a stream.
//!
//! ```text
//!   PipeEnd::Input:    daemon ══▶ zstd -c | ssh h ...  ──▶ stdout   (and a guard: see `guard.rs`)
//!   PipeEnd::Output:   /dev/null ──▶ curl ... | zstd -dc ══▶ daemon
//! ```
//!
//! The programs form one process group, so one signal ends all of them and their children. They run
//! in the caller's directory, without a shell. All write their stderr into one pipe, of which the
//! last 4 KiB are kept: its last line usually explains best why a program failed.
//!
//! A program that has ended stays a zombie until all have ended: its pid, which is also the number
//! of the group, cannot be reused while a signal may still be sent to it. For the same reason the
//! state lock is held while the group is killed and while the zombies are reaped; nothing waits
//! under it.

mod start;

use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rustix::event::Timespec;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};

pub use self::start::PipeEnd;
use self::start::{StartingPrograms, data_pipe, pid_of, pipe_error, program_name, start_guard};
use crate::config::Programs;
use crate::program::guard::{self, GuardProcess};
use crate::program::stderr::StderrTail;
use crate::program::stop::Stop;

/// The longest wait of `kill` for the killed programs. One that is stuck in the kernel ends later.
const KILL_TIMEOUT: Duration = Duration::from_secs(5);

/// The interval at which `wait_unless_stopped` checks whether the programs have ended; that wait
/// must react to a stop.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// Running programs. Dropping the last clone kills those that still run.
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
    /// The child processes; empty once they have been reaped and their pids are no longer ours.
    children: Vec<Child>,
    /// The result recorded when the programs were reaped.
    outcome: Option<Result<(), String>>,
}

/// The way a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgramExit {
    Exited(i32),
    Killed(i32),
    /// Unknown, because something else has reaped the program.
    Unknown,
}

impl Pipeline {
    /// Starts `programs` in `dir`, joined by pipes, and returns our end of the pipeline, which does
    /// not block.
    ///
    /// With [`PipeEnd::Input`] the last program gets `stdout`, and a guard is started if
    /// [`guard::enable_guards`] was called. With [`PipeEnd::Output`] `stdout` is not used, and the
    /// first program reads /dev/null.
    ///
    /// # Errors
    /// One line for the user. No program runs then.
    pub fn spawn(
        programs: &Programs,
        dir: &Path,
        end: PipeEnd,
        stdout: Stdio,
    ) -> Result<(Arc<Self>, OwnedFd), String> {
        Self::spawn_with(programs, dir, end, stdout, guard::program())
    }

    /// Starts `programs` as [`Self::spawn`] does, with `guard` as the program that guards a
    /// [`PipeEnd::Input`], if any.
    ///
    /// # Errors
    /// As for [`Self::spawn`].
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
        let mut started = StartingPrograms::default();
        started.spawn_all(programs, dir, first, last, &stderr_end)?;
        let Some(group) = started.group() else {
            return Err("there is no program to run".to_owned());
        };
        let guard = match guard.filter(|_| end == PipeEnd::Input) {
            Some(program) => Some(start_guard(program, group, &ours, programs)?),
            None => None,
        };
        let children = started.into_children();
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

    /// Returns the name of the program that reads our output.
    #[must_use]
    pub fn first_program(&self) -> &str {
        self.programs.first().map_or("", |program| &program.name)
    }

    /// Describes a program that has ended with a failure, if any; never waits.
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let state = self.state.lock();
        match &state.outcome {
            Some(outcome) => outcome.clone().err(),
            None => self.worst_failure(),
        }
    }

    /// Returns whether all programs have ended; never waits.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let state = self.state.lock();
        state.outcome.is_some() || self.programs.iter().all(|program| program.exit().is_some())
    }

    /// Waits until all programs have ended. They see the end of their input only after our end is
    /// closed, which must happen after [`Self::release_guard`].
    ///
    /// # Errors
    /// One line about a program that failed.
    pub fn wait(&self) -> Result<(), String> {
        for program in &self.programs {
            let flags = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            // ECHILD: reaped meanwhile by `kill`, whose outcome stands.
            let _ = rustix::io::retry_on_intr(|| waitid(WaitId::Pid(program.pid), flags));
        }
        self.reap()
    }

    /// Waits as [`Self::wait`] does, until `stop` is raised; the programs keep running then.
    ///
    /// # Errors
    /// As for [`Self::wait`]; also when it was stopped.
    pub fn wait_unless_stopped(&self, stop: &Stop) -> Result<(), String> {
        while !self.has_ended() {
            if stop.sleep(POLL_INTERVAL).is_err() {
                let first = self.first_program();
                return Err(format!("it was stopped before '{first}' had ended"));
            }
        }
        self.reap()
    }

    /// Kills the process group and reaps it; does nothing if that has happened already.
    pub fn kill(&self) {
        {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return;
            }
            let _ = kill_process_group(self.group, Signal::KILL);
            // Only after the kill: without the guard, the end of input would look intended.
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

    /// Tells the guard that the end of input is intended, and waits until the guard has closed its
    /// copy. Call this before closing the write end.
    pub fn release_guard(&self) {
        let guard = self.state.lock().guard.take();
        if let Some(guard) = guard {
            guard.release();
        }
    }

    /// Reaps the programs, all of which have ended, and returns the outcome.
    fn reap(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        if let Some(outcome) = &state.outcome {
            return outcome.clone();
        }
        // The guard knows the group only by its number, which is about to be released.
        state.guard = None;
        let outcome = self.worst_failure().map_or(Ok(()), Err);
        for mut child in state.children.drain(..) {
            let _ = child.wait();
        }
        state.outcome = Some(outcome.clone());
        outcome
    }

    /// Returns a descriptor for each program that becomes readable when the program ends; none for
    /// programs already reaped.
    #[must_use]
    pub fn pidfds(&self) -> Vec<OwnedFd> {
        // Under the lock no pid can be reused.
        let state = self.state.lock();
        let pids = state.children.iter().map(pid_of);
        pids.filter_map(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).collect()
    }

    /// Describes the most relevant failure of a program that has ended.
    fn worst_failure(&self) -> Option<String> {
        let bad = |ending: &ProgramExit| *ending != ProgramExit::Exited(0);
        let ended = self.programs.iter().filter_map(|program| {
            let ending = program.exit().filter(bad)?;
            Some((&program.name, ending))
        });
        // SIGPIPE is seldom the cause: the next program in the pipeline has ended before, or is
        // ending.
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
    /// Returns how the program ended, or `None` while it runs. It stays a zombie.
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

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};

    use rustix::fs::{OFlags, fcntl_getfl};
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
        // A zombie that init has not reaped yet counts as gone.
        match std::fs::read_to_string(format!("/proc/{pid}/stat")) {
            Ok(stat) => stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")),
            Err(_) => true,
        }
    }

    #[test]
    fn written_bytes_pass_through_all_programs() {
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
    fn any_failing_program_fails_wait_with_the_last_line_of_stderr() {
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
    fn a_program_killed_by_sigpipe_is_not_blamed_for_the_failure() {
        let (pipeline, fd) = spawn(&[&["yes"], &["sh", "-c", "exit 9"]], PipeEnd::Output).unwrap();
        drop(fd);
        assert_eq!(pipeline.wait().unwrap_err(), "'sh' exited with status 9");
    }

    #[test]
    fn failure_reports_an_ended_program_without_waiting_for_the_others() {
        let words: &[&[&str]] = &[&["sleep", "1000"], &["sh", "-c", "echo why >&2; kill -9 $$"]];
        let (pipeline, _fd) = spawn(words, PipeEnd::Input).unwrap();
        eventually(|| pipeline.failure().is_some());
        assert_eq!(pipeline.failure().unwrap(), "'sh' was killed by signal 9");
        assert!(!pipeline.has_ended());
    }

    #[test]
    fn a_program_that_cannot_be_started_causes_the_others_to_be_killed() {
        let dir = TempDir::new().unwrap();
        let words: &[&[&str]] = &[&["sh", "-c", "echo $$ > pid; exec sleep 1000"], &["zstdd"]];
        let started = Pipeline::spawn(&programs(words), dir.path(), PipeEnd::Input, Stdio::null());
        let line = "cannot run 'zstdd': No such file or directory";
        assert_eq!(started.unwrap_err(), line);
        // The program may have been killed before it could write its pid.
        if let Ok(pid) = std::fs::read_to_string(dir.path().join("pid")) {
            assert!(pid.is_empty() || is_gone(pid.trim()));
        }
        let absent = dir.path().join("absent");
        let started =
            Pipeline::spawn(&programs(&[&["cat"]]), &absent, PipeEnd::Input, Stdio::null());
        assert!(started.unwrap_err().ends_with("absent': no such directory"));
    }

    #[test]
    fn kill_and_drop_end_the_whole_process_group() {
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
    fn a_grandchild_that_holds_stderr_open_does_not_block_wait() {
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
    fn endless_output_on_stderr_does_not_block_wait() {
        let (pipeline, fd) =
            spawn(&[&["sh", "-c", "echo y >&2; yes >&2 & sleep 0.1; exit 1"]], PipeEnd::Input)
                .unwrap();
        let group = pipeline.group;
        drop(fd);
        assert_eq!(pipeline.wait().unwrap_err(), "'sh' exited with status 1: y");
        kill_process_group(group, Signal::KILL).unwrap();
    }

    #[test]
    fn stop_ends_a_wait() {
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
    fn our_pipe_end_is_non_blocking_and_the_programs_end_blocks() {
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
