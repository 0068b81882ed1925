//! The command line: one file per command, with the clap struct beside the code that runs it.
//!
//! ```text
//!   mount, run ──plan──> mount::serve, in a daemon       (no thread before the fork)
//!   umount, status, add, map, ... ──client──> MNT/.cowslip/...        (every wait bounded)
//!   check, rebase ──> overlay::persist, offline
//!   send, recv ──> transfer, no mount needed
//! ```
//!
//! Nothing here knows how disks work: a command parses, calls the library, and prints. An error is
//! one line. Exit codes are 0, 1 for failure, 2 for a usage error, 3 for an answer that reports an
//! unhealthy state, and COMMAND's own for `run`. Under the names of mount(8)'s helpers
//! (`mount.cowslip` and the like) the program parses its arguments as those do.

mod add;
mod check;
mod cleanup;
mod client;
mod commit;
mod diff;
mod fetch;
pub mod fuzzing;
mod guard;
mod helper;
mod import;
mod in_use;
mod keep;
mod log;
mod long_request;
mod map;
mod meter;
mod mount;
mod output;
mod plan;
mod point_in_time;
mod progress;
mod rebase;
mod recv;
mod remove;
mod request;
mod run;
mod send;
mod snapshot;
mod status;
mod stream;
mod table;
mod timeout;
mod umount;

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};

pub use self::output::print_error;
use self::output::{print, print_json, print_line, warn};
use crate::program::guard::{SUBCOMMAND as GUARD, enable_guards};

/// Exit code: success.
const EXIT_OK: u8 = 0;
/// Exit code: failure; the error message says why.
const EXIT_FAILED: u8 = 1;
/// Exit code: usage error.
const EXIT_USAGE: u8 = 2;
/// Exit code: success, but the answer is bad: damage, a failed disk, a dead mount.
const EXIT_UNHEALTHY: u8 = 3;
/// Exit code of `run` when cowslip failed, not COMMAND; the same as in env(1).
const EXIT_RUN_FAILED: u8 = 125;
/// Base of the exit code of a command ended by a signal; the signal's number is added, as in
/// shells.
const EXIT_SIGNAL_BASE: u8 = 128;

/// Returns the exit code for a command ended by `signal`.
fn signal_exit_code(signal: i32) -> u8 {
    u8::try_from(i32::from(EXIT_SIGNAL_BASE) + signal).unwrap_or(EXIT_FAILED)
}

/// Mounts virtual disks as plain files: copy-on-write overlays, exact holes.
#[derive(Debug, Parser)]
#[command(name = "cowslip", version, max_term_width = 100)]
enum Cli {
    /// Mount disks: cowslip mount MOUNTPOINT [NAME=]SOURCE[,KEY=VALUE]...
    Mount(mount::MountArgs),
    /// Mount disks privately, run a command with $COWSLIP_MNT set, unmount
    Run(run::RunArgs),
    /// End a mount, and say what was discarded
    Umount(umount::UmountArgs),
    /// Mount another disk in a mount that is there
    Add(add::AddArgs),
    /// Let a disk go while its mount goes on
    Remove(remove::RemoveArgs),
    /// Show mounts and their disks
    Status(status::StatusArgs),
    /// Show what a mounted disk holds where: data, zeros, holes
    Map(map::MapArgs),
    /// Show a mount's log
    Log(log::LogArgs),
    /// Keep the changes of a temporary overlay in a directory
    Keep(keep::KeepArgs),
    /// Freeze what a disk holds under a name; list and delete such snapshots
    Snapshot(snapshot::SnapshotArgs),
    /// Make a disk what it was at a snapshot; what was changed since is gone
    Revert(snapshot::RevertArgs),
    /// Make a disk what its base is; all that was changed is gone
    Reset(snapshot::ResetArgs),
    /// Make another disk of the store that holds the same, at once
    Clone(snapshot::CloneArgs),
    /// Merge a disk's changes down into its base
    Commit(commit::CommitArgs),
    /// Write what has changed in a disk as an image or a diff that other tools take
    Diff(diff::DiffArgs),
    /// Make an overlay of the changes that a qcow2 image holds
    Import(import::ImportArgs),
    /// Bring a disk's bytes into the host's cache, or up into its overlay
    Prefetch(fetch::PrefetchArgs),
    /// Fill a disk's overlay until it needs its base no more
    Hydrate(fetch::HydrateArgs),
    /// Complete a stream: send what is held, close its sink, wait for it
    Finish(stream::FinishArgs),
    /// Give a stream up: its command is killed, its file stays unfinished
    Abort(stream::AbortArgs),
    /// Send a file or a device to stdout, holes as holes: cowslip send FILE | cowslip recv NAME
    Send(send::SendArgs),
    /// Receive from stdin what cowslip send sends
    Recv(recv::RecvArgs),
    /// Check an overlay or a store that is not mounted
    Check(check::CheckArgs),
    /// Tell an overlay that is not mounted where its base is now
    Rebase(rebase::RebaseArgs),
    /// Guard the commands of a stream: cowslip runs this itself
    #[command(name = GUARD, hide = true)]
    Guard(guard::GuardArgs),
}

/// An error with its own exit code; other errors exit with 1.
#[derive(Debug, thiserror::Error)]
#[error("{line}")]
struct CliError {
    code: u8,
    line: String,
}

impl CliError {
    /// Creates a usage error.
    fn usage(line: impl Into<String>) -> anyhow::Error {
        let (code, line) = (EXIT_USAGE, line.into());
        Self { code, line }.into()
    }
}

/// Returns the exit code for an error of [`run()`].
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<CliError>().map_or(EXIT_FAILED, |failure| failure.code)
}

/// Runs the command line `args`, whose first item is the program's name, and returns the exit code.
///
/// In `mount` and `run` this function returns twice: in the caller, and in the daemon when it has
/// ended.
///
/// # Errors
/// One line for the user; [`exit_code`] gives its exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> anyhow::Result<u8> {
    let args: Vec<OsString> = args.into_iter().collect();
    enable_guards();
    if let Some((role, rest)) = helper::helper_kind(&args) {
        return helper::run(role, rest);
    }
    let Some(cli) = parse(&args)? else {
        return Ok(EXIT_OK);
    };
    match cli {
        Cli::Mount(args) => mount::run(args),
        Cli::Run(args) => run::run(args),
        Cli::Umount(args) => umount::run(&args),
        Cli::Add(args) => add::run(&args),
        Cli::Remove(args) => remove::run(&args),
        Cli::Status(args) => status::run(&args),
        Cli::Map(args) => map::run(&args),
        Cli::Log(args) => log::run(&args),
        Cli::Keep(args) => keep::run(&args),
        Cli::Snapshot(args) => snapshot::snapshot(&args),
        Cli::Revert(args) => snapshot::revert(&args),
        Cli::Reset(args) => snapshot::reset(&args),
        Cli::Clone(args) => snapshot::clone(&args),
        Cli::Commit(args) => commit::run(&args),
        Cli::Diff(args) => diff::run(&args),
        Cli::Import(args) => import::run(&args),
        Cli::Prefetch(args) => fetch::prefetch(&args),
        Cli::Hydrate(args) => fetch::hydrate(&args),
        Cli::Finish(args) => stream::finish(&args),
        Cli::Abort(args) => stream::abort(&args),
        Cli::Send(args) => send::run(&args),
        Cli::Recv(args) => recv::run(&args),
        Cli::Check(args) => check::run(&args),
        Cli::Rebase(args) => rebase::run(&args),
        Cli::Guard(args) => guard::run(&args),
    }
}

/// Parses the arguments; returns `None` when help was requested, which has been printed then.
fn parse(args: &[OsString]) -> anyhow::Result<Option<Cli>> {
    let matches = Cli::command().try_get_matches_from(args);
    let error = match matches.and_then(|matches| Cli::from_arg_matches(&matches)) {
        Ok(cli) => return Ok(Some(cli)),
        Err(error) => error,
    };
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        let _ = error.print();
        return Ok(None);
    }
    let command = args.get(1).map(|arg| arg.to_string_lossy().into_owned());
    let command = command.filter(|name| Cli::command().find_subcommand(name).is_some());
    let failure = CliError {
        code: match command.as_deref() {
            Some("run") => EXIT_RUN_FAILED,
            _ => EXIT_USAGE,
        },
        line: usage_line(&error, command.as_deref()),
    };
    Err(failure.into())
}

/// Shortens clap's message to one line: the problem, the nearest match, and where to read on.
fn usage_line(error: &clap::Error, command: Option<&str>) -> String {
    let name = command.map_or("cowslip".to_owned(), |name| format!("cowslip {name}"));
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return format!("no command: see {name} --help");
    }
    let text = error.to_string();
    let lines: Vec<&str> = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more"))
        // Drop clap's tip to pass the argument as a value: a value hardly starts with a dash.
        .filter(|line| !line.is_empty() && !line.starts_with("tip: to pass"))
        .collect();
    let line = lines.join(" ").replace(" tip: ", ": ");
    let line = line.strip_prefix("error: ").unwrap_or(&line);
    format!("{line}: see {name} --help")
}

/// Lets a closed stdout end this process silently, as other tools do (`cowslip map | head`). For
/// commands that only read.
fn restore_sigpipe() {
    // SAFETY: restores the signal's default action and accesses no memory. Rust's runtime ignores
    // SIGPIPE; nothing of ours depends on that in a command that calls this.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(args: &[&str]) -> (u8, String) {
        let args: Vec<OsString> = args.iter().map(Into::into).collect();
        let error = parse(&args).unwrap_err();
        (exit_code(&error), error.to_string())
    }

    #[test]
    fn command_definitions_are_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn usage_error_is_one_line() {
        let (code, line) = refused(&["cowslip", "umount", "--lazily", "m"]);
        assert_eq!(code, EXIT_USAGE);
        assert!(line.starts_with("unexpected argument '--lazily' found"), "{line}");
        assert!(line.ends_with(": see cowslip umount --help"), "{line}");
        assert!(!line.contains('\n'), "{line}");
        let (code, line) = refused(&["cowslip", "mont", "m"]);
        assert_eq!(code, EXIT_USAGE);
        assert!(line.contains("'mount'") && !line.contains('\n'), "{line}");
        let (_, line) = refused(&["cowslip", "check", "o", "--json"]);
        assert_eq!(line, "unexpected argument '--json' found: see cowslip check --help");
        let (_, line) = refused(&["cowslip", "check", "o", "--repai"]);
        assert!(line.contains("found: a similar argument exists: '--repair': see"), "{line}");
    }

    #[test]
    fn snapshot_accepts_json_only_for_a_list() {
        for other in [["n", "--json"].as_slice(), &["--delete", "n", "--json"], &["--json"]] {
            let args = [&["cowslip", "snapshot", "m/d"], other].concat();
            let (code, line) = refused(&args);
            assert!(code == EXIT_USAGE && line.contains("--"), "{args:?}: {line}");
        }
    }

    #[test]
    fn missing_command_is_a_usage_error() {
        let no_command = (EXIT_USAGE, "no command: see cowslip --help".to_owned());
        assert_eq!(refused(&["cowslip"]), no_command);
    }

    #[test]
    fn usage_error_of_run_has_its_own_exit_code() {
        assert_eq!(refused(&["cowslip", "run", "vm.img"]).0, EXIT_RUN_FAILED);
    }

    #[test]
    fn words_after_two_dashes_are_the_command() {
        let args = ["cowslip", "run", "vm.img", "b=blank:1G", "-o", "ro", "--", "ls", "-l"];
        let args: Vec<OsString> = args.iter().map(Into::into).collect();
        let Some(Cli::Run(run)) = parse(&args).unwrap() else {
            panic!("not run");
        };
        assert_eq!(run.command, ["ls", "-l"]);
        assert_eq!(run.disks, ["vm.img", "b=blank:1G"]);
    }

    #[test]
    fn error_without_its_own_code_exits_with_1() {
        assert_eq!(exit_code(&anyhow::anyhow!("no")), EXIT_FAILED);
        let inner = CliError::usage("no").context("in m");
        assert_eq!((exit_code(&inner), format!("{inner:#}").as_str()), (EXIT_USAGE, "in m: no"));
    }
}
