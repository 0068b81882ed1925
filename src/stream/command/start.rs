//! Starting the programs of a pipeline: all of them, or none.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, kill_process_group};

use crate::config::Programs;
use crate::host::os_message;
use crate::process::restore_caller_limits;
use crate::program::guard::GuardProcess;
use crate::stream::fifo;

/// The end of the pipeline that the daemon holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PipeEnd {
    /// The daemon writes the input of the first program.
    Input,
    /// The daemon reads the output of the last program.
    Output,
}

/// Programs being started. Dropping this kills those still in it.
#[derive(Default)]
pub(super) struct StartingPrograms {
    children: Vec<Child>,
}

impl StartingPrograms {
    /// Returns the number of the process group, which is that of the first program.
    pub(super) fn group(&self) -> Option<Pid> {
        self.children.first().map(pid_of)
    }

    /// Returns the programs, which keep running.
    pub(super) fn into_children(mut self) -> Vec<Child> {
        std::mem::take(&mut self.children)
    }

    /// Starts `programs` in `dir`, joined by pipes. `first` is the input of the first program, `last`
    /// the output of the last, and `stderr` the error output of all.
    pub(super) fn spawn_all(
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
        let group = self.group().map_or(0, Pid::as_raw_pid);
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
        if let Some(group) = self.group() {
            let _ = kill_process_group(group, Signal::KILL);
        }
        for child in &mut self.children {
            let _ = child.wait();
        }
    }
}

/// Creates the pipe between us and the programs; returns our end and theirs.
pub(super) fn data_pipe(end: PipeEnd) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    let (ours, theirs) = match end {
        PipeEnd::Input => (writer, reader),
        PipeEnd::Output => (reader, writer),
    };
    // The two ends have separate flags: the programs' end stays blocking.
    let ours = crate::host::set_nonblocking(ours)?;
    fifo::enlarge(&ours);
    Ok((ours, theirs))
}

/// Starts the guard of `programs`, which holds a second descriptor of the `data` end.
pub(super) fn start_guard(
    program: &Path,
    group: Pid,
    data: &OwnedFd,
    programs: &Programs,
) -> Result<GuardProcess, String> {
    let guard = data.try_clone().and_then(|data| GuardProcess::start(program, group, data));
    guard.map_err(|error| format!("cannot start the guard of '{programs}': {}", os_message(&error)))
}

pub(super) fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

pub(super) fn program_name(words: &[OsString]) -> String {
    words.first().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

pub(super) fn pipe_error(error: &io::Error) -> String {
    format!("cannot make a pipe: {}", os_message(error))
}
