//! `cowslip run`: a private mount for the length of one command.
//!
//! The daemon is forked as for `mount`, on a directory that nobody else knows. COMMAND gets its
//! path in `$COWSLIP_MNT`. Whatever happens to COMMAND, and whatever signals arrive meanwhile, the
//! mount is ended and the directory removed. The exit code is COMMAND's own; 125 to 127 are those of
//! env(1), for failures of `run` itself.

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
use super::umount::{self, DrainRequest, EndMode};
use super::{CliError, EXIT_OK, EXIT_RUN_FAILED, signal_exit_code, warn};
use crate::config::{DiskSource, Flow, SinkSpec, SourceSpec};
use crate::host::stat_fields;
use crate::mount::kernel::MountHandle;
use crate::mount::{DaemonMode, MountPlan, daemon};
use crate::stream::UnmountPolicy;
use crate::stream::context::StdioMode;

/// Exit code: COMMAND exists and cannot be run.
const EXIT_CANNOT_RUN: u8 = 126;
/// Exit code: COMMAND does not exist.
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

/// Signals that end the run even while its streams are being finished.
const TERMINATING: [i32; 4] = [SIGINT, SIGQUIT, SIGTERM, SIGHUP];

pub(super) fn run(args: RunArgs) -> anyhow::Result<u8> {
    run_mounted(args).map_err(|error| match error.downcast_ref::<CliError>() {
        Some(failure) if matches!(failure.code, EXIT_CANNOT_RUN | EXIT_NOT_FOUND) => error,
        _ => CliError { code: EXIT_RUN_FAILED, line: format!("{error:#}") }.into(),
    })
}

fn run_mounted(args: RunArgs) -> anyhow::Result<u8> {
    let plan = plan_private_mount(args.disks, args.common)?;
    // Notes about the disks would get into COMMAND's output.
    let mount = match start_mount(&plan, &mut io::sink()) {
        // This is the daemon: the directory is the command's to remove.
        Ok(StartResult::Ended(code)) => return Ok(code),
        Ok(StartResult::Mounted) => PrivateMount::of(&plan),
        Ok(StartResult::Interrupted(signal)) => {
            let _ = fs::remove_dir(&plan.mountpoint);
            return Ok(signal_exit_code(signal));
        }
        Err(error) => {
            let _ = fs::remove_dir(&plan.mountpoint);
            return Err(error);
        }
    };
    // From before the command starts until all is cleaned up, so that no signal falls between.
    let signals =
        Signals::new([SIGCHLD, SIGINT, SIGQUIT, SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGALRM]);
    let mut signals = match signals {
        Ok(signals) => signals,
        Err(error) => {
            mount.end(UnmountPolicy::Abort)?;
            return Err(error).context("cannot handle signals");
        }
    };
    let claims = StdioClaims::of(&plan);
    let ended = run_command(&args.command, &plan.mountpoint, claims, &mut signals);
    let streams = match (&ended, claims.has_streams) {
        (Ok(EXIT_OK), true) => UnmountPolicy::Finish,
        (_, true) => UnmountPolicy::Abort,
        (_, false) => UnmountPolicy::Settle,
    };
    match (ended, mount.end_unless_signalled(streams, &mut signals)) {
        (Ok(EXIT_OK), cleaned) => cleaned.map(|()| EXIT_OK),
        (ended, Ok(())) => ended,
        (ended, Err(error)) => {
            // COMMAND's failure decides the exit code; ours is only printed.
            warn(&format!("{error:#}"));
            ended
        }
    }
}

/// Plans a mount on a new private directory. Signals are held back from here on.
fn plan_private_mount(disks: Vec<OsString>, common: CommonArgs) -> anyhow::Result<MountPlan> {
    let command = MountCommand {
        // Private, whatever the configuration says. The directory is created once all else is
        // right.
        mountpoint: Some(PathBuf::from("/")),
        source: None,
        disks,
        common,
        mode: DaemonMode::Background,
        stdio: StdioMode::Available,
    };
    let mut plan = command.into_plan(&current_dir()?)?;
    daemon::hold_signals().context("cannot hold signals back")?;
    plan.mountpoint = create_mountpoint()?;
    Ok(plan)
}

/// Creates a directory for the mount, with mode 0700. It does not remove itself, since that would
/// also remove what is mounted there.
fn create_mountpoint() -> anyhow::Result<PathBuf> {
    // Explicitly, whatever the umask.
    let mode = fs::Permissions::from_mode(0o700);
    let made = tempfile::Builder::new().prefix("cowslip-").permissions(mode).tempdir();
    let made = made.with_context(|| {
        let dir = std::env::temp_dir();
        format!("cannot make a mountpoint in '{}', set TMPDIR", dir.display())
    })?;
    let path = made.keep();
    Ok(path.canonicalize().unwrap_or(path))
}

/// Runs COMMAND to its end, and returns its exit code.
fn run_command(
    words: &[OsString],
    mountpoint: &Path,
    claims: StdioClaims,
    signals: &mut Signals,
) -> anyhow::Result<u8> {
    if let Some(signal) = daemon::received_signal() {
        return Ok(signal_exit_code(signal));
    }
    // clap requires one.
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

/// Forwards a signal to the command. The terminal has sent ^C and ^\ to it already.
fn forward_signal(signal: i32, child: &Child) {
    if matches!(signal, SIGINT | SIGQUIT) && is_in_foreground() {
        return;
    }
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    // The child has not been reaped, so its process ID is still its own.
    if let (Some(pid), Some(signal)) = (pid, Signal::from_named_raw(signal))
        && let Err(error) = rustix::process::kill_process(pid, signal)
    {
        log::debug!("cannot forward signal {signal:?}: {error}");
    }
}

/// Whether the terminal's signals reach this process: its group is in the terminal's foreground.
fn is_in_foreground() -> bool {
    fs::read("/proc/self/stat").is_ok_and(|stat| is_foreground_group(&stat))
}

/// Whether a stat file is that of a process in the foreground. After the name come state, ppid, pgrp,
/// session, tty_nr and tpgid.
fn is_foreground_group(stat: &[u8]) -> bool {
    let mut fields = stat_fields(stat).skip(2);
    let group = fields.next();
    group.is_some() && group == fields.nth(2)
}

fn status_exit_code(status: ExitStatus) -> u8 {
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    code.or_else(|| status.signal().map(signal_exit_code)).unwrap_or(EXIT_RUN_FAILED)
}

/// The mount of a run, on a directory of its own.
struct PrivateMount {
    mountpoint: PathBuf,
    /// Held open from the start, since COMMAND may rename directories. `None` if the mount has
    /// ended already.
    handle: Option<MountHandle>,
    /// Prefixes of the report lines of streams that only measure.
    measure_prefixes: Vec<String>,
}

impl PrivateMount {
    /// Holds the mount of `plan`, which has just been mounted.
    fn of(plan: &MountPlan) -> Self {
        Self {
            mountpoint: plan.mountpoint.clone(),
            handle: MountHandle::at(&plan.mountpoint).ok().flatten(),
            measure_prefixes: measure_prefixes(plan),
        }
    }

    /// Ends the mount like [`end`](Self::end). A signal ends it at once, and this process.
    fn end_unless_signalled(
        &self,
        streams: UnmountPolicy,
        signals: &mut Signals,
    ) -> anyhow::Result<()> {
        let stop = signals.handle();
        thread::scope(|scope| {
            let watch = || {
                for signal in signals.forever().filter(|signal| TERMINATING.contains(signal)) {
                    self.abort(signal);
                }
            };
            // Without the thread, the mount is ended all the same, but cannot be interrupted.
            if let Err(error) = thread::Builder::new().spawn_scoped(scope, watch) {
                log::debug!("signals are not watched at the end: {error}");
            }
            let ended = self.end(streams);
            stop.close();
            ended
        })
    }

    /// Ends the mount when its users have left, or after [`OPENERS_TIMEOUT`](super::in_use) whoever
    /// uses it, and removes the directory.
    fn end(&self, streams: UnmountPolicy) -> anyhow::Result<()> {
        let ended = self.handle.as_ref().map_or(Ok(()), |mount| self.unmount(mount, streams));
        let removed = fs::remove_dir(&self.mountpoint).with_context(|| {
            format!("cannot remove the mountpoint '{}'", self.mountpoint.display())
        });
        ended.and(removed)
    }

    fn unmount(&self, mount: &MountHandle, streams: UnmountPolicy) -> anyhow::Result<()> {
        match umount::end_when_unused(mount, streams) {
            Ok(ended) => {
                // Of all lines, only the result of a measurement is what a run is made for.
                let is_measured = |line: &&String| {
                    self.measure_prefixes.iter().any(|prefix| line.starts_with(prefix))
                };
                ended.lines.iter().filter(is_measured).for_each(|line| warn(line));
                ended.wait_default().and(ended.check_failures())
            }
            Err(error) => {
                log::debug!("unmounting all the same: {error:#}");
                let request = DrainRequest::new(UnmountPolicy::Abort);
                let ended = umount::end_mount(mount, EndMode::Lazy, Duration::ZERO, request)?;
                let shown = mount.mountpoint().display();
                warn(&format!("'{shown}' is still in use, and ends when its users have left"));
                match streams {
                    UnmountPolicy::Finish => Err(error.context("the streams are given up")),
                    _ => ended.check_failures(),
                }
            }
        }
    }

    /// Ends the mount at once and this process when `signal` arrives while streams are being
    /// finished: a sink may take for ever.
    fn abort(&self, signal: i32) {
        if let Some(mount) = &self.handle {
            let request = DrainRequest::new(UnmountPolicy::Abort);
            match umount::end_mount(mount, EndMode::Lazy, Duration::ZERO, request) {
                Ok(ended) => ended.lines.iter().for_each(|line| warn(line)),
                Err(error) => warn(&format!("{error:#}")),
            }
        }
        let _ = fs::remove_dir(&self.mountpoint);
        std::process::exit(signal_exit_code(signal).into());
    }
}

/// Returns the prefixes of the report lines of streams that only measure.
fn measure_prefixes(plan: &MountPlan) -> Vec<String> {
    let measures = |source: &DiskSource| matches!(source, DiskSource::Stream(stream) if stream.flow == Flow::Out(SinkSpec::Measure));
    let disks = plan.disks.iter().filter(|disk| measures(&disk.source));
    disks.map(|disk| format!("{}: ", disk.name)).collect()
}

/// The standard input and output that streams take from COMMAND.
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

    /// Gives COMMAND the standard streams that are left.
    fn apply_to(self, command: &mut Command) -> io::Result<()> {
        if self.stdin {
            command.stdin(Stdio::null());
        }
        if self.stdout {
            // COMMAND's output must not get into the image.
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
    fn exit_code_is_that_of_the_command() {
        assert_eq!(ran(&["sh", "-c", "exit 7"]).unwrap(), 7);
        assert_eq!(ran(&["sh", "-c", "test $COWSLIP_MNT = /private"]).unwrap(), 0);
        assert_eq!(ran(&["sh", "-c", "kill -9 $$"]).unwrap(), 137);
    }

    #[test]
    fn command_that_cannot_run_is_126_and_a_missing_one_127() {
        let code = |word: &str| super::super::exit_code(&ran(&[word]).unwrap_err());
        assert_eq!(code("/nowhere/no-such-command"), EXIT_NOT_FOUND);
        assert_eq!(code("/proc/self/stat"), EXIT_CANNOT_RUN);
    }

    #[test]
    fn foreground_group_is_found_in_the_stat_file() {
        assert!(is_foreground_group(b"9 (a) b) S 1 77 70 34816 77 4194304"));
        assert!(!is_foreground_group(b"9 (a) S 1 77 70 34816 78 4194304"));
        assert!(!is_foreground_group(b"9 (a) S 1 77 70 0 -1 4194304"));
        assert!(!is_foreground_group(b""));
    }
}
