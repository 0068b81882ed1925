//! `cowslip mount`: forks the daemon and returns once the mount answers.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::client::Endpoint;
use super::plan::{CommonArgs, MountCommand};
use super::{CliError, EXIT_OK, signal_exit_code, warn};
use crate::host::mountinfo;
use crate::mount::daemon::{self, ForkSide, NoteOutput, StartOutcome, StartupReporter};
use crate::mount::kernel::{MountHandle, MountHealth, UnmountMode};
use crate::mount::{self, DaemonMode, MountPlan};
use crate::stream::sink::StdioMode;

#[derive(Debug, Args)]
pub(super) struct MountArgs {
    /// The directory to mount on
    #[arg(required_unless_present = "config")]
    mountpoint: Option<PathBuf>,
    /// What to show there, each [NAME=]SOURCE[,KEY[=VALUE]]... with SOURCE a path, blank:SIZE or stream:SIZE
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
    let wish = MountCommand {
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
    Ok(start_mount(&wish.into_plan(&dir)?, &mut io::stdout())?.into_exit_code())
}

/// The caller's directory, where relative paths start. Of one that was removed it is what the kernel
/// calls it, `/a/b (deleted)`: absolute paths need none, and of a relative one it says what is wrong.
pub(super) fn current_dir() -> anyhow::Result<PathBuf> {
    let removed = |error| match fs::read_link("/proc/self/cwd") {
        Ok(path) => Ok(path),
        Err(_) => Err(error),
    };
    std::env::current_dir()
        .or_else(removed)
        .context("cannot tell the current directory: change to one that exists")
}

/// How far [`start_mount`] has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StartResult {
    /// This is the command, and the mount answers.
    Mounted,
    /// This was the daemon, which has served and ended with this exit code.
    Ended(u8),
    /// This is the command, and this signal came: nothing is mounted.
    Interrupted(i32),
}

impl StartResult {
    /// What to exit with; after a signal this process ends as signals end one, so that a shell
    /// sees why.
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

/// Mounts. No thread may exist yet. What the daemon has to say goes to `notes` and to stderr.
///
/// # Errors
/// The daemon's own line when it could not mount; what the mount said when it does not answer.
pub(super) fn start_mount(plan: &MountPlan, notes: &mut dyn Write) -> anyhow::Result<StartResult> {
    if plan.mode == DaemonMode::Foreground {
        let notes = match plan.has_stdout_sink() {
            true => NoteOutput::Stderr,
            false => NoteOutput::Stdout,
        };
        return Ok(StartResult::Ended(mount::serve(plan, StartupReporter::foreground(notes))));
    }
    let mountpoint = plan.mountpoint.clone();
    let waiting = match daemon::fork().context("cannot start the daemon")? {
        ForkSide::Child(ready) => return Ok(StartResult::Ended(mount::serve(plan, ready))),
        ForkSide::Parent(waiting) => waiting,
    };
    match waiting.wait(notes) {
        StartOutcome::Serving => {}
        StartOutcome::Interrupted { signal } => {
            clear_what_died(&mountpoint);
            return Ok(StartResult::Interrupted(signal));
        }
        StartOutcome::Failed { code, line } => {
            clear_what_died(&mountpoint);
            return Err(CliError { code, line }.into());
        }
    }
    // The daemon says that it serves; only an answer through the kernel shows it.
    Endpoint::mount(&mountinfo::resolve(&mountpoint)?).status()?;
    Ok(StartResult::Mounted)
}

/// Unmounts what a daemon left that was killed while it started, by a memory limit for one. Before it
/// started nothing dead was mounted there.
fn clear_what_died(mountpoint: &Path) {
    let found = mountinfo::resolve(mountpoint).and_then(|path| MountHandle::at(&path));
    if let Ok(Some(held)) = found
        && held.entry().is_cowslip()
        && held.health() == MountHealth::Dead
        && let Err(error) = held.unmount(UnmountMode::Lazy)
    {
        warn(&format!("the dead mount at '{}' is left behind: {error}", mountpoint.display()));
    }
}

/// Refuses a disk in the place of the mountpoint, with the command that was meant.
fn check_order(first: &Path, rest: &[OsString]) -> anyhow::Result<()> {
    // A mountpoint is not asked what it is: it may be dead, or hang.
    if mountinfo::entry_at(first).is_some() || !looks_like_disk(first) {
        return Ok(());
    }
    let meant = rest.split_last().filter(|(last, _)| Path::new(last).is_dir());
    let (mountpoint, others) =
        meant.map_or((OsStr::new("m"), rest), |(last, others)| (last.as_os_str(), others));
    let words = [mountpoint, first.as_os_str()].into_iter();
    let words = words.chain(others.iter().map(OsString::as_os_str));
    let words: Vec<_> = words.map(OsStr::to_string_lossy).collect();
    let line = format!("MOUNTPOINT comes first: cowslip mount {}", words.join(" "));
    Err(CliError::usage(line))
}

/// A file, or something with a disk's punctuation; not a directory.
fn looks_like_disk(path: &Path) -> bool {
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
    fn a_disk_in_the_place_of_the_mountpoint_is_told_where_it_goes() {
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
    fn a_directory_may_be_called_anything() {
        let dir = tempfile::tempdir().unwrap();
        let odd = dir.path().join("a=b,c");
        std::fs::create_dir(&odd).unwrap();
        assert_eq!(refused(odd.to_str().unwrap(), &["vm.img"]), None);
        // Missing: that is the daemon's to say.
        assert_eq!(refused("/nowhere/m", &["vm.img"]), None);
    }
}
