//! `cowslip send`: sends a file, a device or a pipe to stdout; holes take no space.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::client::{AskError, Endpoint, check_answers};
use super::meter::TransferMeter;
use super::point_in_time::PointInTime;
use super::progress::Verbosity;
use super::{CliError, EXIT_OK, restore_sigpipe, warn};
use crate::config::parse_size;
use crate::export;
use crate::transfer::{Changes, SendPlan, TransferFormat, TransferSource, ZeroDetection, send};

/// Size of the pipe in bytes: 1 MiB, the most that any user may set, so that the ends wait less for
/// each other.
const PIPE_SIZE: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct SendArgs {
    /// The file or block device, mounted or not (- is stdin)
    file: PathBuf,
    /// Begin at this byte: what 'cowslip recv --resume-offset' says
    #[arg(long, value_name = "OFFSET", value_parser = parse_size)]
    from: Option<u64>,
    /// What goes over the wire: rbd (data and holes as records), raw (plain bytes) or android-sparse
    #[arg(long, value_name = "FRAMES", default_value = "rbd")]
    frames: TransferFormat,
    /// Send blocks that hold only zeros as holes
    #[arg(long)]
    detect_zeroes: bool,
    /// Only what changed since this snapshot of a mounted disk: for 'cowslip recv --onto'
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<String>,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(args: &SendArgs) -> anyhow::Result<u8> {
    restore_sigpipe();
    let stdout = io::stdout();
    if stdout.is_terminal() {
        return Err(CliError::usage(
            "an image is not for a terminal: cowslip send FILE | cowslip recv NAME",
        ));
    }
    if args.since.is_some() && args.frames != TransferFormat::Rbd {
        return Err(CliError::usage("--since needs --frames rbd: only records say since when"));
    }
    if args.frames == TransferFormat::AndroidSparse && (args.from.is_some() || args.detect_zeroes) {
        return Err(CliError::usage(
            "--from and --detect-zeroes need --frames rbd: an Android sparse image begins with \
             all that it holds",
        ));
    }
    // Avoid `Stdout`, which scans for line ends.
    let out = File::from(stdout.as_fd().try_clone_to_owned().context("cannot use stdout")?);
    // Ignore errors: stdout may be no pipe, and a smaller pipe works too.
    let _ = rustix::pipe::fcntl_setpipe_size(&out, PIPE_SIZE);
    let (source, changes) = open_source(&args.file, args.since.as_deref(), args.verbosity)?;
    let plan = SendPlan {
        from: args.from.unwrap_or(0),
        frames: args.frames,
        detect: if args.detect_zeroes { ZeroDetection::Always } else { ZeroDetection::AsNeeded },
        changes,
    };
    let mut meter = TransferMeter::new("sent", source.data_estimate(), args.verbosity);
    let sent = send(&source, out, &plan, &mut |told| meter.show(told));
    meter.end();
    if sent?.has_changed {
        warn(&format!(
            "'{}' was written to while it was sent: what arrives is no one moment of it; \
             a snapshot would be",
            args.file.display()
        ));
    }
    Ok(EXIT_OK)
}

/// Opens the source. A mounted disk is frozen at a point in time, if its mount can do that.
fn open_source(
    file: &Path,
    since: Option<&str>,
    verbosity: Verbosity,
) -> anyhow::Result<(TransferSource, Option<Changes>)> {
    if file != Path::new("-") {
        check_answers(file)?;
    }
    let place = match Endpoint::of_disk(file) {
        Ok(place) if file != Path::new("-") => place,
        Err(error) if since.is_some() => return Err(error),
        _ => return Ok((TransferSource::open(file)?, None)),
    };
    let mut changes = None;
    let frozen = TransferSource::open_frozen(file, || {
        let moment = PointInTime::freeze(&place, file, since, None, verbosity)?;
        if let Some(since) = since {
            let ranges = changed_ranges(&moment).with_context(|| cannot_read(file))?;
            changes = Some(Changes { since: since.to_owned(), ranges });
        }
        Ok::<_, anyhow::Error>(moment.file)
    });
    match frozen {
        // A disk without a block overlay, or one the user may only read, is sent like any other
        // file.
        Err(error) if since.is_none() && is_freeze_refused(&error) => {
            Ok((TransferSource::open(file)?, None))
        }
        frozen => Ok((frozen?, changes)),
    }
}

/// Returns the ranges that changed.
fn changed_ranges(moment: &PointInTime) -> io::Result<Vec<Range<u64>>> {
    let size = moment.file.metadata()?.len();
    let runs = export::find_runs(&moment.file, Some(&moment.changed), size)?;
    Ok(runs.into_iter().map(|run| run.range).collect())
}

/// Returns whether the mount answered but refused to freeze the disk.
fn is_freeze_refused(error: &anyhow::Error) -> bool {
    use AskError::{Busy, Denied, NoDisk, ReadOnly, Refused};
    let asked = error.downcast_ref::<AskError>();
    matches!(asked, Some(Denied(_) | ReadOnly(_) | NoDisk { .. } | Busy(_) | Refused(_)))
}

fn cannot_read(file: &Path) -> String {
    format!("cannot read '{}'", file.display())
}
