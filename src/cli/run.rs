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
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use rustix::process::{Pid, Signal};
use signal_hook::consts::{SIGALRM, SIGCHLD, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::Signals;

use super::mount::{StartResult, current_dir, start_mount};
use super::plan::{CommonArgs, MountCommand};
use super::umount::{self, DrainRequest, EndMode, UnfinishedStreams};
use super::{CliError, EXIT_OK, EXIT_RUN_FAILED, signal_exit_code, warn};
use crate::config::{DiskSource, Flow, SinkSpec, SourceSpec};
use crate::mount::kernel::MountHandle;
use crate::mount::{DaemonMode, MountPlan, daemon};
use crate::stream::sink::StdioMode;

/// COMMAND is there and cannot be run.
const EXIT_CANNOT_RUN: u8 = 126;
/// COMMAND is not there.
const EXIT_NOT_FOUND: u8 = 127;

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// What to mount, each [NAME=]SOURCE[,KEY[=VALUE]]...
    #[arg(value_name = "DISK")]
    pub(super) disks: Vec<OsString>,
    #[command(flatten)]
    common: CommonArgs,
    /// The command; the mountpoint is in $COWSLIP_MNT
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(super) command: Vec<OsString>,
}

/// The signals that end a run while its streams are finished.
const TERMINATING: [i32; 4] = [SIGINT, SIGQUIT, SIGTERM, SIGHUP];

pub(super) fn run(args: RunArgs) -> anyhow::Result<u8> {
    run_mounted(args).map_err(|error| match error.downcast_ref::<CliError>() {
        Some(failure) if matches!(failure.code, EXIT_CANNOT_RUN | EXIT_NOT_FOUND) => error,
        _ => CliError { code: EXIT_RUN_FAILED, line: format!("{error:#}") }.into(),
    })
}

fn run_mounted(args: RunArgs) -> anyhow::Result<u8> {
    let wish = MountCommand {
        // Private, whatever the configuration says; its place is known once all else is right.
        mountpoint: Some(PathBuf::from("/")),
        source: None,
        disks: args.disks,
        common: args.common,
        mode: DaemonMode::Background,
        stdio: StdioMode::Available,
    };
    let mut plan = wish.into_plan(&current_dir()?)?;
    daemon::hold_signals().context("cannot hold signals back")?;
    let private = create_mountpoint()?;
    plan.mountpoint.clone_from(&private);
    // Notes about the disks would get into COMMAND's output.
    let started = start_mount(&plan, &mut io::sink());
    match started {
        // The daemon: the directory is the command's to remove.
        Ok(StartResult::Ended(code)) => return Ok(code),
        Ok(StartResult::Mounted) => {}
        Ok(StartResult::Interrupted(signal)) => {
            let _ = fs::remove_dir(&private);
            return Ok(signal_exit_code(signal));
        }
        Err(error) => {
            let _ = fs::remove_dir(&private);
            return Err(error);
        }
    }
    // Held from now on: COMMAND may rename what it likes.
    let held = MountHandle::at(&private).ok().flatten();
    let claims = StdioClaims::of(&plan);
    // From before the command starts until all is cleaned up, so that no signal falls between.
    let signals =
        Signals::new([SIGCHLD, SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM]);
    let mut signals = match signals {
        Ok(signals) => signals,
        Err(error) => {
            clean_up(&private, held.as_ref(), UnfinishedStreams::Abort, &[])?;
            return Err(error).context("cannot handle signals");
        }
    };
    let ended = run_command(&args.command, &private, claims, &mut signals);
    let streams = match (&ended, claims.has_streams) {
        (Ok(EXIT_OK), true) => UnfinishedStreams::Finish,
        (_, true) => UnfinishedStreams::Abort,
        (_, false) => UnfinishedStreams::Settle,
    };
    let stop = signals.handle();
    let cleaned = thread::scope(|scope| {
        let watch = || {
            for signal in signals.forever().filter(|signal| TERMINATING.contains(signal)) {
                give_up(&private, held.as_ref(), signal);
            }
        };
        // Without a thread the end is only not interruptible.
        if let Err(error) = thread::Builder::new().spawn_scoped(scope, watch) {
            log::debug!("signals are not watched at the end: {error}");
        }
        let cleaned = clean_up(&private, held.as_ref(), streams, &measure_prefixes(&plan));
        stop.close();
        cleaned
    });
    match (ended, cleaned) {
        (Ok(EXIT_OK), cleaned) => cleaned.map(|()| EXIT_OK),
        (ended, Ok(())) => ended,
        (ended, Err(error)) => {
            // COMMAND's failure is the answer; ours is told beside it.
            warn(&format!("{error:#}"));
            ended
        }
    }
}

/// How the lines of streams that only measure begin.
fn measure_prefixes(plan: &MountPlan) -> Vec<String> {
    let measures = |source: &DiskSource| matches!(source, DiskSource::Stream(stream) if stream.flow == Flow::Out(SinkSpec::Measure));
    let disks = plan.disks.iter().filter(|disk| measures(&disk.source));
    disks.map(|disk| format!("{}: ", disk.name)).collect()
}

/// A new directory for the mount, mode 0700. Not one that removes itself: it would take what is
/// mounted there with it.
fn create_mountpoint() -> anyhow::Result<PathBuf> {
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
fn run_command(
    words: &[OsString],
    mountpoint: &Path,
    claims: StdioClaims,
    signals: &mut Signals,
) -> anyhow::Result<u8> {
    if let Some(signal) = daemon::received_signal() {
        return Ok(signal_exit_code(signal));
    }
    // clap sees to it that there is one.
    let (program, args) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(args).env("COWSLIP_MNT", mountpoint);
    claims.apply_to(&mut command).context("cannot give the command our stderr")?;
    let mut child = command.spawn().map_err(|error| CliError {
        code: match error.kind() {
            io::ErrorKind::NotFound => EXIT_NOT_FOUND,
            _ => EXIT_CANNOT_RUN,
        },
        line: format!("cannot run '{}': {error}", program.to_string_lossy()),
    })?;
    for signal in signals.forever() {
        if let Some(status) = child.try_wait().context("cannot wait for the command")? {
            return Ok(status_exit_code(status));
        }
        if signal != SIGCHLD {
            forward_signal(signal, &child);
        }
    }
    anyhow::bail!("signals ended before the command did")
}

/// Gives a signal that we got to the command. The terminal's ^C and ^\ went to it already.
fn forward_signal(signal: i32, child: &Child) {
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
    fs::read_to_string("/proc/self/stat").is_ok_and(|stat| is_foreground_group(&stat))
}

/// From a stat file (proc_pid_stat(5)): behind the name in parentheses come the state, ppid,
/// pgrp, session, tty_nr and tpgid.
fn is_foreground_group(stat: &str) -> bool {
    let Some((_, fields)) = stat.rsplit_once(')') else {
        return false;
    };
    let mut fields = fields.split_ascii_whitespace().skip(2);
    let group = fields.next();
    group.is_some() && group == fields.nth(2)
}

fn status_exit_code(status: ExitStatus) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.or_else(|| status.signal().map(signal_exit_code)).unwrap_or(EXIT_RUN_FAILED)
}

/// Ends the mount and this process when `signal` comes while the streams are finished: a sink may take
/// for ever.
fn give_up(mountpoint: &Path, held: Option<&MountHandle>, signal: i32) {
    if let Some(held) = held {
        let request = DrainRequest::new(UnfinishedStreams::Abort);
        match umount::end_mount(held, EndMode::Lazy, Duration::ZERO, request) {
            Ok(ended) => ended.lines.iter().for_each(|line| warn(line)),
            Err(error) => warn(&format!("{error:#}")),
        }
    }
    let _ = fs::remove_dir(mountpoint);
    std::process::exit(signal_exit_code(signal).into());
}

/// Ends the mount: when its users have left, or after the grace without asking them.
fn clean_up(
    mountpoint: &Path,
    held: Option<&MountHandle>,
    streams: UnfinishedStreams,
    measured: &[String],
) -> anyhow::Result<()> {
    let finished = held.map_or(Ok(()), |held| end_mount(held, streams, measured));
    let removed = fs::remove_dir(mountpoint)
        .with_context(|| format!("cannot remove the mountpoint '{}'", mountpoint.display()));
    finished.and(removed)
}

fn end_mount(
    held: &MountHandle,
    streams: UnfinishedStreams,
    measured: &[String],
) -> anyhow::Result<()> {
    match umount::end_when_unused(held, streams) {
        Ok(ended) => {
            // What a stream that only measures has to say is all that it is for.
            let told = |line: &&String| measured.iter().any(|start| line.starts_with(start));
            ended.lines.iter().filter(told).for_each(|line| warn(line));
            ended.wait_default().and(ended.check_failures())
        }
        Err(error) => {
            log::debug!("unmounting all the same: {error:#}");
            let request = DrainRequest::new(UnfinishedStreams::Abort);
            let ended = umount::end_mount(held, EndMode::Lazy, Duration::ZERO, request)?;
            let shown = held.mountpoint().display();
            warn(&format!("'{shown}' is still in use, and ends when its users have left"));
            match streams {
                UnfinishedStreams::Finish => Err(error.context("the streams are given up")),
                _ => ended.check_failures(),
            }
        }
    }
}

/// What streams do with the standard input and output that COMMAND would have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct StdioClaims {
    has_streams: bool,
    stdin: bool,
    stdout: bool,
}

impl StdioClaims {
    fn of(plan: &MountPlan) -> Self {
        let mut claims = Self::default();
        for disk in &plan.disks {
            if let DiskSource::Stream(stream) = &disk.source {
                claims.has_streams = true;
                claims.stdout |= stream.flow == Flow::Out(SinkSpec::Stdout);
                claims.stdin |= matches!(stream.flow, Flow::In { source: SourceSpec::Stdin, .. });
            }
        }
        claims
    }

    /// Leaves COMMAND what no stream has.
    fn apply_to(self, command: &mut Command) -> io::Result<()> {
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
        let mut signals = Signals::new([SIGCHLD])?;
        run_command(&words, Path::new("/private"), StdioClaims::default(), &mut signals)
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
        assert_eq!(code("/nowhere/no-such-command"), EXIT_NOT_FOUND);
        assert_eq!(code("/proc/self/stat"), EXIT_CANNOT_RUN);
    }

    #[test]
    fn the_foreground_group_gets_the_terminals_signals_itself() {
        assert!(is_foreground_group("9 (a) b) S 1 77 70 34816 77 4194304"));
        assert!(!is_foreground_group("9 (a) S 1 77 70 34816 78 4194304"));
        assert!(!is_foreground_group("9 (a) S 1 77 70 0 -1 4194304"));
        assert!(!is_foreground_group(""));
    }
}
