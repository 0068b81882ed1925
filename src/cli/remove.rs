//! `cowslip remove`: removes a disk from a mount that stays.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;

use super::client::{AskError, Endpoint};
use super::in_use::{OPENERS_POLL_INTERVAL, OPENERS_TIMEOUT, name_openers};
use super::progress::{ProgressDisplay, Verbosity};
use super::{EXIT_OK, print_line, timeout};
use crate::control::api::{Lines, MountRequest};

#[derive(Debug, Args)]
pub(super) struct RemoveArgs {
    /// How long to wait for users of the disk (5s): 10s, 2m
    #[arg(long, value_name = "T", value_parser = timeout::parse)]
    timeout: Option<Duration>,
    /// The mounted disk
    file: PathBuf,
}

pub(super) fn run(args: &RemoveArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    let Lines { lines, failed } = remove(&disk, args.timeout.unwrap_or(OPENERS_TIMEOUT))?;
    lines.iter().for_each(|line| print_line(line));
    let failed = failed.unwrap_or_default();
    if !failed.is_empty() {
        anyhow::bail!("'{}' is removed, but {}", args.file.display(), failed.join("; "));
    }
    Ok(EXIT_OK)
}

/// Repeats the request until the disk is no longer in use, for at most `timeout`.
fn remove(disk: &Endpoint, timeout: Duration) -> anyhow::Result<Lines> {
    let mount = Endpoint::mount(&disk.mountpoint);
    let name = disk.disk.clone().unwrap_or_default();
    let request = MountRequest::Remove { name, inode: disk.inode()? };
    let deadline = Instant::now() + timeout;
    let mut display = ProgressDisplay::new(Verbosity::default());
    let answer = loop {
        match mount.ask(&request, |progress| display.show(progress)) {
            Err(AskError::Busy(_)) if Instant::now() < deadline => {
                thread::sleep(OPENERS_POLL_INTERVAL);
            }
            answer => break answer,
        }
    };
    display.end();
    answer.map_err(|error| name_openers(disk, error.into(), "close it there"))
}
