//! `cowslip prefetch` and `cowslip hydrate`: read data of a disk in advance.

use std::ops::Range;
use std::path::PathBuf;

use clap::Args;

use super::client::Endpoint;
use super::long_request::LongRequest;
use super::progress::Verbosity;
use super::request::ask_long;
use crate::config::{parse_range, parse_size};
use crate::control::api::{DiskRequest, HydrateAction};

#[derive(Debug, Args)]
pub(super) struct PrefetchArgs {
    /// The mounted disk
    file: PathBuf,
    /// What to bring in, as 1G..2G (all of it)
    #[arg(value_parser = parse_range)]
    range: Option<Range<u64>>,
    /// Copy it up into the overlay, instead of reading it into the host's cache
    #[arg(long)]
    copy: bool,
    #[command(flatten)]
    verbosity: Verbosity,
}

#[derive(Debug, Args)]
pub(super) struct HydrateArgs {
    /// The mounted disk
    file: PathBuf,
    /// At most so many bytes a second: 100M
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with_all = ["pause", "cancel"])]
    rate: Option<u64>,
    /// Return at once: cowslip status shows how far it is
    #[arg(long, conflicts_with_all = ["pause", "cancel"])]
    background: bool,
    /// Let it stand still, until hydrate is asked for again
    #[arg(long, conflicts_with = "cancel")]
    pause: bool,
    /// End it; what was copied stays in the overlay
    #[arg(long)]
    cancel: bool,
    #[command(flatten)]
    verbosity: Verbosity,
}

/// Prefetches data of a disk.
pub(super) fn prefetch(args: &PrefetchArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let range = args.range.clone().unwrap_or(0..u64::MAX);
    let (start, end) = (range.start, range.end);
    let request = DiskRequest::Prefetch { start, end, copy: args.copy };
    ask_long(&place, &request, LongRequest::Prefetch, args.verbosity)
}

/// Hydrates a disk: fills its overlay until the base is no longer needed.
pub(super) fn hydrate(args: &HydrateArgs) -> anyhow::Result<u8> {
    let place = Endpoint::of_disk(&args.file)?;
    let action = match args {
        HydrateArgs { pause: true, .. } => HydrateAction::Pause,
        HydrateArgs { cancel: true, .. } => HydrateAction::Cancel,
        HydrateArgs { background: true, .. } => HydrateAction::Start,
        _ => HydrateAction::Wait,
    };
    let request = DiskRequest::Hydrate { rate: args.rate.unwrap_or(0), action };
    ask_long(&place, &request, LongRequest::Hydrate, args.verbosity)
}
