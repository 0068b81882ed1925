//! `cowslip finish` and `cowslip abort`: the end of a stream.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::client::Endpoint;
use super::long_request::LongRequest;
use super::progress::Verbosity;
use super::request::{ask_and_print, ask_long};
use super::timeout;
use crate::control::api::DiskRequest;

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
    let disk = Endpoint::of_disk(&args.file)?;
    let request = DiskRequest::Finish { timeout_ms: args.timeout.map(timeout::to_millis) };
    ask_long(&disk, &request, LongRequest::Finish, args.verbosity)
}

/// Aborts a stream.
pub(super) fn abort(args: &AbortArgs) -> anyhow::Result<u8> {
    let disk = Endpoint::of_disk(&args.file)?;
    ask_and_print(&disk, &DiskRequest::Abort)
}
