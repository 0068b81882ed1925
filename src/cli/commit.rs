//! `cowslip commit`: writes an overlay's changes into its base.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde_json::json;

use super::client::Endpoint;
use super::long_request::LongRequest;
use super::mount::current_dir;
use super::plan::TrustArgs;
use super::progress::{ProgressDisplay, Verbosity};
use super::snapshot::ask_long;
use super::target::{is_in_store, is_store};
use super::{EXIT_OK, print_line};
use crate::config::{format_size, format_zeroed};
use crate::disk::{self, Disk, Force, OpenContext};
use crate::host::mountinfo;
use crate::overlay::stack::{BaseRecord, Stack};
use crate::overlay::{Usage, persist};

/// Time limit for running requests when the disk is closed; there are none.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which the progress is checked.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Debug, Args)]
pub(super) struct CommitArgs {
    /// The mounted disk, or the directory of an overlay that is not mounted
    #[arg(value_name = "FILE|OVERLAY")]
    target: PathBuf,
    /// Also while it is open for writing
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    trust: TrustArgs,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(args: &CommitArgs) -> anyhow::Result<u8> {
    args.trust.allow(&current_dir()?)?;
    if !args.target.join("stack").is_file() {
        let place = mounted_disk(&args.target)?;
        if let Some(base) =
            place.status().ok().and_then(|disk| Some(disk["base"].as_str()?.to_owned()))
        {
            print_base(&place.disk.clone().unwrap_or_default(), &base);
        }
        let request = json!({ "op": "commit", "force": args.force });
        return ask_long(&place, &request, LongRequest::Commit, args.verbosity);
    }
    let dir = current_dir()?.join(&args.target);
    let dir = dir.canonicalize().with_context(|| format!("overlay '{}'", dir.display()))?;
    if is_in_store(&dir) {
        anyhow::bail!(
            "'{}' is a disk of a store: mount the store, and commit the mounted disk",
            args.target.display()
        );
    }
    commit_offline(&dir, args.verbosity)
}

/// Returns the endpoint of the mounted disk at `path`.
fn mounted_disk(path: &Path) -> anyhow::Result<Endpoint> {
    let shown = path.display();
    if is_store(path) {
        anyhow::bail!("'{shown}' is a store: mount it, and name a mounted disk");
    }
    match Endpoint::of(path) {
        // For a path in a mount, this error is the more precise one.
        Ok(_) => Endpoint::of_disk(path),
        Err(error) if mountinfo::enclosing_mount(path).is_some() => Err(error),
        Err(_) => anyhow::bail!(
            "'{shown}' is no overlay and no mounted disk: name the file in its mount, or the directory of an overlay"
        ),
    }
}

/// Announces the base that a commit is about to write to.
fn print_base(what: &str, base: &str) {
    print_line(&format!("{what}: its changes go into '{base}'"));
}

/// Commits the overlay in `dir`, which is not mounted.
fn commit_offline(dir: &Path, verbosity: Verbosity) -> anyhow::Result<u8> {
    let stack = persist::open_overlay_dir(dir).and_then(|dir| Stack::read(&dir));
    let stack = stack.map_err(|error| anyhow::anyhow!("overlay '{}' {error}", dir.display()))?;
    let BaseRecord::File { path: base, .. } = &stack.base else {
        anyhow::bail!(
            "overlay '{}': its base is blank: there is nothing to commit to",
            dir.display()
        );
    };
    let name = dir.file_name().map_or("overlay".into(), |name| name.to_string_lossy());
    let spec = disk::spec_over(&name, &stack.base);
    let mut spec = spec.map_err(|error| anyhow::anyhow!("overlay '{}' {error}", dir.display()))?;
    spec.overlay = Some(dir.to_owned());
    // The commit itself refuses a base that changed, even with force.
    let setting = OpenContext { force: true, ..OpenContext::unmounted() };
    let disk = disk::open(&spec, &setting)?.disk;
    print_base(&dir.display().to_string(), &base.display().to_string());
    let done = commit_with_progress(&disk, verbosity);
    let closed = disk.close(CLOSE_TIMEOUT);
    let done = done?;
    closed.with_context(|| format!("overlay '{}'", dir.display()))?;
    let (data, zeroed) = (format_size(done.data), format_zeroed(done.zero));
    print_line(&format!("{}: {data}{zeroed} are in its base now", dir.display()));
    Ok(EXIT_OK)
}

/// Commits `disk` with a progress display, and returns the number of bytes committed.
fn commit_with_progress(disk: &Disk, verbosity: Verbosity) -> anyhow::Result<Usage> {
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).context("signals")?;
    }
    let ended = AtomicBool::new(false);
    let committed = thread::scope(|scope| {
        let show = || {
            let mut progress = ProgressDisplay::new(verbosity);
            let mut looks = 0u32;
            while !ended.load(Ordering::SeqCst) {
                thread::park_timeout(POLL_INTERVAL);
                looks += 1;
                let (done, total) = disk.progress();
                if looks.is_multiple_of(10) {
                    progress.show(&json!({ "done": done, "total": total }));
                }
            }
            progress.end();
        };
        // If no thread can be started, no progress is shown.
        let shower = thread::Builder::new().name("progress".into()).spawn_scoped(scope, show);
        let committed = disk.commit(Force::No, &|| stop.load(Ordering::SeqCst));
        ended.store(true, Ordering::SeqCst);
        if let Ok(shower) = shower {
            shower.thread().unpark();
        }
        committed
    });
    let path = disk.overlay_dir().unwrap_or_default();
    let committed =
        committed.map_err(|error| anyhow::anyhow!("overlay '{}': {error}", path.display()))?;
    Ok(committed.committed)
}
