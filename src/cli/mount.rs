//! `cowslip mount`: forks the daemon and returns once the mount answers.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde::de::IgnoredAny;

use super::client::Endpoint;
use super::plan::{CommonArgs, MountCommand};
use super::{CliError, EXIT_OK, signal_exit_code, warn};
use crate::config::without_queries;
use crate::host::mountinfo;
use crate::mount::daemon::{self, ForkSide, NoteOutput, StartOutcome, StartupReporter};
use crate::mount::kernel::{MountHandle, MountHealth, UnmountMode};
use crate::mount::{self, DaemonMode, MountPlan};
use crate::stream::context::StdioMode;

#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// The directory to mount on
    #[arg(required_unless_present = "config")]
    mountpoint: Option<PathBuf>,
    /// What to show there, each [NAME=]SOURCE[,KEY[=VALUE]]... with SOURCE a path, the address of an image on a server (nbd://HOST/EXPORT, https://HOST/PATH), blank:SIZE or stream:SIZE
    #[arg(value_name = "DISK")]
    disks: Vec<OsString>,
    /// Stay in the foreground, log to stderr
    #[arg(short = 'f')]
    foreground: bool,
    #[command(flatten)]
    common: CommonArgs,
}

pub(super) fn run(args: MountArgs) -> anyhow::Result<u8> {
    if let Some(first) = &args.mountpoint {
        check_order(first, &args.disks)?;
    }
    let command = MountCommand {
        mountpoint: args.mountpoint,
        source: None,
        disks: args.disks,
        common: args.common,
        stdio: match args.foreground {
            true => StdioMode::Available,
            false => StdioMode::Unavailable,
        },
        mode: match args.foreground {
            true => DaemonMode::Foreground,
            false => DaemonMode::Background,
        },
    };
    let dir = current_dir()?;
    Ok(start_mount(&command.into_plan(&dir)?, &mut io::stdout())?.into_exit_code())
}

/// Returns the current directory, where relative paths start. If it was removed, this is the name that
/// the kernel gives it, `/a/b (deleted)`: absolute paths do not need it, and the error for a relative
/// path shows the cause.
pub(super) fn current_dir() -> anyhow::Result<PathBuf> {
    let removed = |error| match fs::read_link("/proc/self/cwd") {
        Ok(path) => Ok(path),
        Err(_) => Err(error),
    };
    std::env::current_dir()
        .or_else(removed)
        .context("cannot tell the current directory: change to one that exists")
}

/// The result of [`start_mount`], in the command or in the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartResult {
    /// In the command: the mount answers.
    Mounted,
    /// In the daemon: it has served, and ends with this exit code.
    Ended(u8),
    /// In the command: this signal arrived, and nothing is mounted.
    Interrupted(i32),
}

impl StartResult {
    /// Returns the exit code. After a signal, ends this process by that signal instead, so that a
    /// shell sees the cause.
    pub(super) fn into_exit_code(self) -> u8 {
        match self {
            Self::Mounted => EXIT_OK,
            Self::Ended(code) => code,
            Self::Interrupted(signal) => {
                let _ = signal_hook::low_level::emulate_default_handler(signal);
                signal_exit_code(signal)
            }
        }
    }
}

/// Mounts. No thread may exist yet. The daemon's notes about the disks go to `notes`, its warnings to
/// stderr.
///
/// # Errors
/// The daemon's own line when it could not mount; [`AskError`](super::client::AskError) when the mount
/// does not answer.
pub(super) fn start_mount(plan: &MountPlan, notes: &mut dyn Write) -> anyhow::Result<StartResult> {
    if plan.mode == DaemonMode::Foreground {
        let notes = match plan.has_stdout_sink() {
            true => NoteOutput::Stderr,
            false => NoteOutput::Stdout,
        };
        return Ok(StartResult::Ended(mount::serve(plan, StartupReporter::foreground(notes))));
    }
    let mountpoint = plan.mountpoint.clone();
    let starting = match daemon::fork().context("cannot start the daemon")? {
        ForkSide::Child(ready) => return Ok(StartResult::Ended(mount::serve(plan, ready))),
        ForkSide::Parent(starting) => starting,
    };
    match starting.wait(notes) {
        StartOutcome::Serving => {}
        StartOutcome::Interrupted { signal } => {
            clear_dead_mount(&mountpoint);
            return Ok(StartResult::Interrupted(signal));
        }
        StartOutcome::Failed { code, line } => {
            clear_dead_mount(&mountpoint);
            return Err(CliError { code, line }.into());
        }
    }
    // The daemon reports that it serves; only an answer through the kernel proves it.
    let _: IgnoredAny = Endpoint::mount(&mountinfo::resolve(&mountpoint)?).status()?;
    Ok(StartResult::Mounted)
}

/// Unmounts the dead mount of a daemon that was killed while it started, for example by a memory limit.
/// There was no dead mount at `mountpoint` before.
fn clear_dead_mount(mountpoint: &Path) {
    let found = mountinfo::resolve(mountpoint).and_then(|path| MountHandle::at(&path));
    if let Ok(Some(mount)) = found
        && mount.entry().is_cowslip()
        && mount.health() == MountHealth::Dead
        && let Err(error) = mount.unmount(UnmountMode::Lazy)
    {
        warn(&format!("the dead mount at '{}' is left behind: {error}", mountpoint.display()));
    }
}

/// Rejects a disk in the place of the mountpoint, and shows the command that was meant.
fn check_order(first: &Path, rest: &[OsString]) -> anyhow::Result<()> {
    // No call is made into a mountpoint: the mount may be dead, or hang.
    if mountinfo::entry_at(first).is_some() || !looks_like_disk(first) {
        return Ok(());
    }
    let is_dir = |path: &Path| {
        mountinfo::entry_at(path).is_some()
            || mountinfo::enclosing_mount(path).is_none() && path.is_dir()
    };
    let meant = rest.split_last().filter(|(last, _)| is_dir(Path::new(last)));
    let (mountpoint, others) =
        meant.map_or((OsStr::new("m"), rest), |(last, others)| (last.as_os_str(), others));
    let words = [mountpoint, first.as_os_str()].into_iter();
    let words = words.chain(others.iter().map(OsString::as_os_str));
    let shown = |word: &OsStr| without_queries(&word.to_string_lossy()).into_owned();
    let words: Vec<_> = words.map(shown).collect();
    let line = format!("MOUNTPOINT comes first: cowslip mount {}", words.join(" "));
    Err(CliError::usage(line))
}

/// Whether `path` is a file, or does not exist and has the punctuation of a disk.
fn looks_like_disk(path: &Path) -> bool {
    if mountinfo::enclosing_mount(path).is_some() {
        // All that people name there are disks.
        return true;
    }
    match path.metadata() {
        Ok(found) => !found.is_dir(),
        Err(_) => path.as_os_str().as_bytes().iter().any(|byte| b"=,".contains(byte)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(first: &str, rest: &[&str]) -> Option<String> {
        let rest: Vec<OsString> = rest.iter().map(OsString::from).collect();
        let error = check_order(Path::new(first), &rest).err()?;
        Some(error.to_string())
    }

    #[test]
    fn disk_in_the_place_of_the_mountpoint_is_rejected_with_the_right_order() {
        let dir = tempfile::tempdir().unwrap();
        let (m, img) = (dir.path().join("mnt"), dir.path().join("vm.img"));
        std::fs::create_dir(&m).unwrap();
        std::fs::write(&img, "x").unwrap();
        let (m, img) = (m.to_str().unwrap(), img.to_str().unwrap());
        assert_eq!(
            refused(img, &[m]).unwrap(),
            format!("MOUNTPOINT comes first: cowslip mount {m} {img}")
        );
        assert_eq!(
            refused(img, &["b=blank:1G"]).unwrap(),
            format!("MOUNTPOINT comes first: cowslip mount m {img} b=blank:1G")
        );
        assert_eq!(
            refused("b=blank:1G", &[]).unwrap(),
            "MOUNTPOINT comes first: cowslip mount m b=blank:1G"
        );
    }

    #[test]
    fn directory_may_have_any_name() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a=b,c");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(refused(odd.to_str().unwrap(), &["vm.img"]), None);
        // The daemon reports a missing mountpoint.
        assert_eq!(refused("/nowhere/m", &["vm.img"]), None);
    }
}
