//! `cowslip remove`: removes a disk from a mount that stays.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::client::{AskError, Endpoint};
use super::progress::{ProgressDisplay, Verbosity};
use super::stream::describe_openers;
use super::umount::{OPENERS_POLL_INTERVAL, OPENERS_TIMEOUT, string_list};
use super::{EXIT_OK, print_line, timeout};

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// How long to wait for users of the disk (5s): 10s, 2m
    #[arg(long, value_name = "T", value_parser = timeout::parse)]
    timeout: Option<Duration>,
    /// The mounted disk
    file: PathBuf,
}

pub(super) fn run(args: &RemoveArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let done = remove(&place, args.timeout.unwrap_or(OPENERS_TIMEOUT))?;
    string_list(&done["lines"]).iter().for_each(|line| print_line(line));
    let failed = string_list(&done["failed"]);
    if !failed.is_empty() {
        anyhow::bail!("'{}' is removed, but {}", args.file.display(), failed.join("; "));
    }
    Ok(EXIT_OK)
}

/// Repeats the request until the disk is no longer in use, for at most `grace`.
fn remove(place: &Endpoint, grace: Duration) -> anyhow::Result<Value> {
    let mount = Endpoint::mount(&place.mountpoint);
    let name = place.disk.as_deref().unwrap_or_default();
    let request = json!({ "op": "remove", "name": name, "inode": place.inode()? });
    let deadline = Instant::now() + grace;
    let mut progress = ProgressDisplay::new(Verbosity::default());
    let done = loop {
        let done = mount.ask(&request, |now| progress.show(now));
        match done {
            Err(AskError::Busy(_)) if Instant::now() < deadline => {
                thread::sleep(OPENERS_POLL_INTERVAL);
            }
            done => break done,
        }
    };
    progress.end();
    done.map_err(|error| match error {
        AskError::Busy(said) => {
            anyhow::anyhow!("{said}: {}: close it there", describe_openers(place))
        }
        error => error.into(),
    })
}
