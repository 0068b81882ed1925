//! `cowslip run`: a private mount for the length of one command.
//!
//! The daemon is forked as for `mount`, on a directory that nobody else knows. COMMAND gets its
//! path in `$COWSLIP_MNT`. Whatever happens to COMMAND, and whatever signals arrive meanwhile, the
//! mount is ended and the directory removed. The exit status is COMMAND's own; 125 to 127 are
//! ours, as env(1) has them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::iterator::Signals;

use super::mount::{Started, current_dir, start};
use super::plan::{Common, Wish};
use super::umount::{self, How, Request, Streams};
use super::{DONE, Failure, RUN_FAILED, killed_by, warn};
use crate::mount::kernel::Held;
use crate::mount::{Plan, Style, daemon};
use crate::spec::{Flow, Source, Supply, Target};
use crate::stream::sink::Inherit;

/// COMMAND is there and cannot be run.
const CANNOT_RUN: u8 = 126;
/// COMMAND is not there.
const NOT_FOUND: u8 = 127;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// What to mount, each [NAME=]SOURCE[,KEY[=VALUE]]...
    #[arg(value_name = "DISK")]
    pub(super) disks: Vec<OsString>,
    #[command(flatten)]
    common: Common,
    /// The command; the mountpoint is in $COWSLIP_MNT
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<OsString>,
}

pub(super) fn run(args: RunArgs) -> anyhow::Result<u8> {
    inside(args).map_err(|error| match error.downcast_ref::<Failure>() {
        Some(failure) if matches!(failure.code, CANNOT_RUN | NOT_FOUND) => error,
        _ => Failure { code: RUN_FAILED, line: format!("{error:#}") }.into(),
    })
}

fn inside(args: RunArgs) -> anyhow::Result<u8> {
    let wish = Wish {
        // Private, whatever the configuration says; its place is known once all else is right.
        mountpoint: Some(PathBuf::from("/")),
        source: None,
        disks: args.disks,
        common: args.common,
        style: Style::Background,
        stdio: Inherit::Stdout,
    };
    let mut plan = wish.plan(&current_dir()?)?;
    daemon::hold_signals().context("cannot hold signals back")?;
    let private = private_directory()?;
    plan.mountpoint.clone_from(&private);
    // Notes about the disks would get into COMMAND's output.
    let started = start(&plan, &mut io::sink());
    match started {
        // The daemon: the directory is the command's to remove.
        Ok(Started::Ended(code)) => return Ok(code),
        Ok(Started::Mounted) => {}
        Ok(Started::Interrupted(signal)) => {
            let _ = fs::remove_dir(&private);
            return Ok(killed_by(signal));
        }
        Err(error) => {
            let _ = fs::remove_dir(&private);
            return Err(error);
        }
    }
    // Held from now on: COMMAND may rename what it likes.
    let held = Held::at(&private).ok().flatten();
    let claims = Claims::of(&plan);
    let ended = command(&args.command, &private, claims);
    let streams = match (&ended, claims.any) {
        (Ok(DONE), true) => Streams::Finish,
        (_, true) => Streams::Abort,
        (_, false) => Streams::Settle,
    };
    let cleaned = clean_up(&private, held.as_ref(), streams, &measured(&plan));
    match (ended, cleaned) {
        (Ok(DONE), cleaned) => cleaned.map(|()| DONE),
        (ended, Ok(())) => ended,
        (ended, Err(error)) => {
            // COMMAND's failure is the answer; ours is told beside it.
            warn(&format!("{error:#}"));
            ended
        }
    }
}

/// How the lines of streams that only measure begin.
fn measured(plan: &Plan) -> Vec<String> {
    let measures = |source: &Source| matches!(source, Source::Stream(stream) if stream.flow == Flow::Out(Target::Measure));
    let disks = plan.disks.iter().filter(|disk| measures(&disk.source));
    disks.map(|disk| format!("{}: ", disk.name)).collect()
}

/// A new directory for the mount, mode 0700. Not one that removes itself: it would take what is
/// mounted there with it.
fn private_directory() -> anyhow::Result<PathBuf> {
    // Also where there is no umask that would see to it.
    let mode = fs::Permissions::from_mode(0o700);
    let made = tempfile::Builder::new().prefix("cowslip-").permissions(mode).tempdir();
    let made = made.with_context(|| {
        let dir = std::env::temp_dir();
        format!("cannot make a mountpoint in '{}', set TMPDIR", dir.display())
    })?;
    let path = made.keep();
    Ok(path.canonicalize().unwrap_or(path))
}

/// Runs COMMAND to its end.
fn command(words: &[OsString], mountpoint: &Path, claims: Claims) -> anyhow::Result<u8> {
    // Before the command starts, so that no signal falls between.
    let mut signals = Signals::new([SIGCHLD, SIGINT, SIGQUIT, SIGTERM, SIGHUP])
        .context("cannot handle signals")?;
    if let Some(signal) = daemon::signal_so_far() {
        return Ok(killed_by(signal));
    }
    // clap sees to it that there is one.
    let (program, args) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(args).env("COWSLIP_MNT", mountpoint);
    claims.leave(&mut command).context("cannot give the command our stderr")?;
    let mut child = command.spawn().map_err(|error| Failure {
        code: match error.kind() {
            io::ErrorKind::NotFound => NOT_FOUND,
            _ => CANNOT_RUN,
        },
        line: format!("cannot run '{}': {error}", program.to_string_lossy()),
    })?;
    for signal in signals.forever() {
        if let Some(status) = child.try_wait().context("cannot wait for the command")? {
            return Ok(exit_code(status));
        }
        if signal != SIGCHLD {
            pass_on(signal, &child);
        }
    }
    anyhow::bail!("signals ended before the command did")
}

/// Gives a signal that we got to the command. The terminal's ^C and ^\ went to it already.
fn pass_on(signal: i32, child: &Child) {
    if matches!(signal, SIGINT | SIGQUIT) && is_in_foreground() {
        return;
    }
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // It has not been reaped, so the number is still its own.
    if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal))
        && let Err(error) = rustix::process::kill_process(pid, signal)
    {
        log::debug!("cannot pass signal {signal:?} on: {error}");
    }
}

/// Whether the terminal's signals reach this process: its group is the terminal's foreground.
fn is_in_foreground() -> bool {
    fs::read_to_string("/proc/self/stat").is_ok_and(|stat| owns_the_terminal(&stat))
}

/// From a stat file (proc_pid_stat(5)): behind the name in parentheses come the state, ppid,
/// pgrp, session, tty_nr and tpgid.
fn owns_the_terminal(stat: &str) -> bool {
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let mut fields = fields.split_ascii_whitespace().skip(2);
    let group = fields.next();
    group.is_some() && group == fields.nth(2)
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.or_else(|| status.signal().map(killed_by)).unwrap_or(RUN_FAILED)
}

/// Ends the mount: when its users have left, or after the grace without asking them.
fn clean_up(
    mountpoint: &Path,
    held: Option<&Held>,
    streams: Streams,
    measured: &[String],
) -> anyhow::Result<()> {
    let finished = held.map_or(Ok(()), |held| end(held, streams, measured));
    let removed = fs::remove_dir(mountpoint)
        .with_context(|| format!("cannot remove the mountpoint '{}'", mountpoint.display()));
    finished.and(removed)
}

fn end(held: &Held, streams: Streams, measured: &[String]) -> anyhow::Result<()> {
    match umount::end_politely(held, streams) {
        Ok(ended) => {
            // What a stream that only measures has to say is all that it is for.
            let told = |line: &&String| measured.iter().any(|start| line.starts_with(start));
            ended.lines.iter().filter(told).for_each(|line| warn(line));
            ended.wait_usual().and(ended.verdict())
        }
        Err(error) => {
            log::debug!("unmounting all the same: {error:#}");
            let request = Request::new(Streams::Abort);
            let ended = umount::end(held, How::Lazily, Duration::ZERO, request)?;
            let shown = held.mountpoint().display();
            warn(&format!("'{shown}' is still in use, and ends when its users have left"));
            match streams {
                Streams::Finish => Err(error.context("the streams are given up")),
                _ => ended.verdict(),
            }
        }
    }
}

/// What streams do with the standard input and output that COMMAND would have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Claims {
    any: bool,
    stdin: bool,
    stdout: bool,
}

impl Claims {
    fn of(plan: &Plan) -> Self {
        let mut claims = Self::default();
        for disk in &plan.disks {
            if let Source::Stream(stream) = &disk.source {
                claims.any = true;
                claims.stdout |= stream.flow == Flow::Out(Target::Stdout);
                claims.stdin |= matches!(stream.flow, Flow::In { supply: Supply::Stdin, .. });
            }
        }
        claims
    }

    /// Leaves COMMAND what no stream has.
    fn leave(self, command: &mut Command) -> io::Result<()> {
        if self.stdin {
            command.stdin(Stdio::null());
        }
        if self.stdout {
            // What COMMAND has to say must not get into the image.
            command.stdout(io::stderr().as_fd().try_clone_to_owned()?);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ran(words: &[&str]) -> anyhow::Result<u8> {
        let words: Vec<OsString> = words.iter().map(OsString::from).collect();
        command(&words, Path::new("/private"), Claims::default())
    }

    #[test]
    fn the_commands_own_status_comes_back() {
        assert_eq!(ran(&["sh", "-c", "exit 7"]).unwrap(), 7);
        assert_eq!(ran(&["sh", "-c", "test $COWSLIP_MNT = /private"]).unwrap(), 0);
        assert_eq!(ran(&["sh", "-c", "kill -9 $$"]).unwrap(), 137);
    }

    #[test]
    fn a_command_that_cannot_run_is_126_and_a_missing_one_127() {
        let code = |word: &str| super::super::exit_code(&ran(&[word]).unwrap_err());
        assert_eq!(code("/nowhere/no-such-command"), NOT_FOUND);
        assert_eq!(code("/proc/self/stat"), CANNOT_RUN);
    }

    #[test]
    fn the_foreground_group_gets_the_terminals_signals_itself() {
        assert!(owns_the_terminal("9 (a) b) S 1 77 70 34816 77 4194304"));
        assert!(!owns_the_terminal("9 (a) S 1 77 70 34816 78 4194304"));
        assert!(!owns_the_terminal("9 (a) S 1 77 70 0 -1 4194304"));
        assert!(!owns_the_terminal(""));
    }
}
