//! `cowslip finish` and `cowslip abort`: the end of a stream.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use serde_json::{Value, json};

use super::client::{AskError, Place};
use super::progress::Progress;
use super::table::printable;
use super::{DONE, say, timeout};
use crate::mount::who;

#[derive(Debug, Args)]
pub(super) struct FinishArgs {
    /// How long to wait for the sink (as long as it takes): 10s, 2m
    #[arg(long, value_name = "T", value_parser = timeout::parse)]
    timeout: Option<Duration>,
    /// The mounted stream
    file: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct AbortArgs {
    /// The mounted stream
    file: PathBuf,
}

/// Completes a stream.
pub(super) fn finish(args: &FinishArgs) -> anyhow::Result<u8> {
    let place = Place::of_disk(&args.file)?;
    let milliseconds = args.timeout.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
    let mut progress = Progress::new();
    let done = place.ask(&json!({ "op": "finish", "timeout_ms": milliseconds }), |now| {
        progress.show(now);
    });
    progress.end();
    report(&done.map_err(|error| explain(&place, error))?)
}

/// Gives a stream up.
pub(super) fn abort(args: &AbortArgs) -> anyhow::Result<u8> {
    let place = Place::of_disk(&args.file)?;
    report(&place.ask(&json!({ "op": "abort" }), |_| {})?)
}

fn report(done: &Value) -> anyhow::Result<u8> {
    if let Some(line) = done["line"].as_str() {
        say(&printable(line));
    }
    Ok(DONE)
}

/// A stream that is still written to is told with its writers.
fn explain(place: &Place, error: AskError) -> anyhow::Error {
    let AskError::Busy(said) = error else {
        return error.into();
    };
    anyhow::anyhow!("{said}: {}: close it there, then finish again", users(place))
}

/// Who has the disk at `place`, in words.
pub(super) fn users(place: &Place) -> String {
    let name = place.disk.as_deref().unwrap_or_default();
    let users = who::openers(&place.mountpoint).into_iter();
    let users = users.filter(|user| user.path().is_none_or(|path| path == Path::new(name)));
    let named: Vec<String> = users.map(|user| printable(&user.to_string())).collect();
    match named.is_empty() {
        true => "processes that you may not see: ask as root".to_owned(),
        false => named.join("; "),
    }
}
