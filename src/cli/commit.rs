//! `cowslip commit`: writes an overlay's changes into its base.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;

use super::client::{AskError, Endpoint};
use super::long_request::LongRequest;
use super::mount::current_dir;
use super::plan::{ServerArgs, TrustArgs};
use super::progress::{ProgressDisplay, Verbosity};
use super::request::ask_long;
use super::{EXIT_OK, print_line};
use crate::config::{format_size, format_zeroed};
use crate::control::api::{DiskRequest, Progress};
use crate::host::mountinfo;
use crate::offline::commit::OfflineCommit;
use crate::offline::{is_in_store, is_store};
use crate::overlay::Usage;
use crate::overlay::persist;

/// Interval at which the progress is shown.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(1);

#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// The mounted disk, or the directory of an overlay that is not mounted
    #[arg(value_name = "FILE|OVERLAY")]
    target: PathBuf,
    /// Also while it is open for writing
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    servers: ServerArgs,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(args: &CommitArgs) -> anyhow::Result<u8> {
    args.trust.allow(&current_dir()?)?;
    args.servers.apply(&current_dir()?)?;
    // The mount table first: a call into a mount may hang with it.
    if let Some(place) = mounted_disk(&args.target)? {
        match place.disk_status() {
            Ok(disk) => {
                let name = place.disk.clone().unwrap_or_default();
                disk.base.iter().for_each(|base| print_base(&name, base));
            }
            // The request would not be answered either.
            Err(error @ AskError::Silent(_)) => return Err(error.into()),
            Err(_) => {}
        }
        let request = DiskRequest::Commit { force: args.force };
        return ask_long(&place, &request, LongRequest::Commit, args.verbosity);
    }
    let dir = current_dir()?.join(&args.target);
    let dir = persist::resolve_overlay_path(&dir)
        .map_err(|error| anyhow::anyhow!("overlay '{}' {error}", dir.display()))?;
    if is_in_store(&dir) {
        anyhow::bail!(
            "'{}' is a disk of a store: mount the store, and commit the mounted disk",
            args.target.display()
        );
    }
    commit_offline(&dir, args.verbosity)
}

/// Returns the endpoint of the mounted disk at `path`; `None` for an overlay that is not mounted.
fn mounted_disk(path: &Path) -> anyhow::Result<Option<Endpoint>> {
    if mountinfo::enclosing_mount(path).is_some() {
        return Endpoint::of_disk(path).map(Some);
    }
    if path.join("stack").is_file() {
        return Ok(None);
    }
    let shown = path.display();
    if is_store(path) {
        anyhow::bail!("'{shown}' is a store: mount it, and name a mounted disk");
    }
    anyhow::bail!(
        "'{shown}' is no overlay and no mounted disk: name the file in its mount, or the directory of an overlay"
    )
}

/// Announces the base that a commit is about to write to.
fn print_base(what: &str, base: &str) {
    print_line(&format!("{what}: its changes go into '{base}'"));
}

/// Commits the overlay in `dir`, which is not mounted.
fn commit_offline(dir: &Path, verbosity: Verbosity) -> anyhow::Result<u8> {
    let shown = dir.display();
    let commit = OfflineCommit::open(dir)?;
    print_base(&shown.to_string(), &commit.base().display().to_string());
    let committed = commit_with_progress(&commit, verbosity);
    let closed = commit.close();
    let committed = committed.with_context(|| format!("overlay '{shown}'"))?;
    closed.with_context(|| format!("overlay '{shown}'"))?;
    let (data, zeroed) = (format_size(committed.data), format_zeroed(committed.zero));
    print_line(&format!("{shown}: {data}{zeroed} are in its base now"));
    Ok(EXIT_OK)
}

/// Commits with a progress display until a signal ends it, and returns the number of bytes
/// committed.
fn commit_with_progress(commit: &OfflineCommit, verbosity: Verbosity) -> anyhow::Result<Usage> {
    let is_stopped = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&is_stopped)).context("signals")?;
    }
    let has_ended = AtomicBool::new(false);
    let committed = thread::scope(|scope| {
        let show = || {
            let mut progress = ProgressDisplay::new(verbosity);
            loop {
                thread::park_timeout(PROGRESS_INTERVAL);
                if has_ended.load(Ordering::SeqCst) {
                    break;
                }
                let (done, total) = commit.progress();
                progress.show(Progress::new(done, total));
            }
            progress.end();
        };
        // If no thread can be started, no progress is shown.
        let display = thread::Builder::new().name("progress".into()).spawn_scoped(scope, show);
        let committed = commit.run(&|| is_stopped.load(Ordering::SeqCst));
        has_ended.store(true, Ordering::SeqCst);
        if let Ok(display) = display {
            display.thread().unpark();
        }
        committed
    });
    Ok(committed?)
}
