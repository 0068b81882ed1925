//! `cowslip finish` and `cowslip abort`: the end of a stream.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::client::{AskError, Endpoint};
use super::long_request::{self, LongRequest};
use super::progress::Verbosity;
use super::{EXIT_OK, print_line, timeout};
use crate::disk::split_name;
use crate::host::mountinfo;
use crate::mount::openers;

#[derive(Debug, Args)]
pub(super) struct FinishArgs {
    /// How long to wait for the sink (as long as it takes): 10s, 2m
    #[arg(long, value_name = "T", value_parser = timeout::parse)]
    timeout: Option<Duration>,
    /// The mounted stream
    file: PathBuf,
    #[command(flatten)]
    verbosity: Verbosity,
}

#[derive(Debug, Args)]
pub(super) struct AbortArgs {
    /// The mounted stream
    file: PathBuf,
}

/// Completes a stream.
pub(super) fn finish(args: &FinishArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let milliseconds = args.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let request = json!({ "op": "finish", "timeout_ms": milliseconds });
    let done = long_request::ask(&place, &request, LongRequest::Finish, args.verbosity);
    print_result(&done.map_err(|error| name_openers(&place, error))?)
}

/// Gives a stream up.
pub(super) fn abort(args: &AbortArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    print_result(&place.ask(&json!({ "op": "abort" }), |_| {})?)
}

fn print_result(done: &Value) -> anyhow::Result<u8> {
    if let Some(line) = done["line"].as_str() {
        print_line(line);
    }
    Ok(EXIT_OK)
}

/// A stream that is still written to is told with its writers.
fn name_openers(place: &Endpoint, error: anyhow::Error) -> anyhow::Error {
    match error.downcast_ref() {
        Some(AskError::Busy(said)) => {
            anyhow::anyhow!(
                "{said}: {}: close it there, then finish again",
                describe_openers(place)
            )
        }
        _ => error,
    }
}

/// Who has the disk at `place`, in words.
pub(super) fn describe_openers(place: &Endpoint) -> String {
    let name = place.disk.as_deref().unwrap_or_default();
    let mount = mountinfo::entry_at(&place.mountpoint);
    let users = mount.map(|mount| openers::find_openers(&mount)).unwrap_or_default().into_iter();
    // A bind mount keeps the mount, but no disk of it: only who has opened the file does.
    let is_of_disk = |path: &Path| {
        let file = path.to_string_lossy();
        file == name || split_name(&file).is_some_and(|(disk, _)| disk == name)
    };
    let users = users.filter(|user| user.path().is_some_and(is_of_disk));
    let named: Vec<String> = users.map(|user| user.to_string()).collect();
    match named.is_empty() {
        true => "processes that you may not see: ask as root".to_owned(),
        false => named.join("; "),
    }
}
