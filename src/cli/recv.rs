//! `cowslip recv`: receives the output of `cowslip send` from stdin into a file.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;

use super::client::check_answers;
use super::meter::TransferMeter;
use super::progress::Verbosity;
use super::{CliError, EXIT_OK, print, print_line, warn};
use crate::config::{Overwrite, format_size, parse_size};
use crate::transfer::{ReceivePlan, ReceiveStart, TransferFormat, receive, resume_offset};

#[derive(Debug, Args)]
pub(super) struct RecvArgs {
    /// The file; it is FILE.part until all of it is there
    file: PathBuf,
    /// Go on with what arrived before
    #[arg(long)]
    resume: bool,
    /// Print where 'cowslip send --from' has to begin for --resume, and do nothing else
    #[arg(long, conflicts_with_all = ["resume", "overwrite", "frames", "onto", "limit"])]
    resume_offset: bool,
    /// Replace the file, or write to the device
    #[arg(long)]
    overwrite: bool,
    /// What comes over the wire: rbd (data and holes as records), raw (plain bytes) or android-sparse
    #[arg(long, value_name = "FRAMES", default_value = "rbd")]
    frames: TransferFormat,
    /// What does not arrive is as in this file, which stays as it is: for 'cowslip send --since',
    /// the file that holds that snapshot
    #[arg(long, value_name = "OLD")]
    onto: Option<PathBuf>,
    /// Write no more data than this, what an Android sparse image only repeats included (no limit)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    limit: Option<u64>,
    #[command(flatten)]
    verbosity: Verbosity,
}

pub(super) fn run(args: &RecvArgs) -> anyhow::Result<u8> {
    [Some(&args.file), args.onto.as_ref()]
        .into_iter()
        .flatten()
        .try_for_each(|path| check_answers(path))?;
    if args.resume_offset {
        print(&format!("{}\n", resume_offset(&args.file)?))?;
        return Ok(EXIT_OK);
    }
    let stdin = io::stdin();
    if stdin.is_terminal() {
        return Err(CliError::usage(
            "nobody types an image: cowslip send FILE | cowslip recv NAME",
        ));
    }
    let is_raw = args.frames == TransferFormat::Raw;
    if args.resume && args.frames != TransferFormat::Rbd {
        return Err(CliError::usage(
            "--resume needs --frames rbd: nothing else says what is right",
        ));
    }
    if args.onto.is_some() && is_raw {
        return Err(CliError::usage("--onto needs other --frames: plain bytes have no gaps"));
    }
    // Avoid `Stdin`, which has a buffer of its own.
    let input = File::from(stdin.as_fd().try_clone_to_owned().context("cannot use stdin")?);
    let plan = ReceivePlan {
        path: args.file.clone(),
        overwrite: if args.overwrite { Overwrite::Yes } else { Overwrite::No },
        start: if args.resume { ReceiveStart::Resume } else { ReceiveStart::New },
        frames: args.frames,
        onto: args.onto.clone(),
        limit: args.limit.unwrap_or(u64::MAX),
    };
    let mut meter = TransferMeter::new("received", None, args.verbosity);
    let received = receive(input, &plan, &mut |told| meter.show(told));
    meter.end();
    let received = received?;
    let file = args.file.display();
    if args.frames == TransferFormat::Rbd && !received.is_verified {
        warn(&format!("the sender of '{file}' sends no checksums: nothing verified what arrived"));
    }
    let told = received.progress;
    let [size, data, holes] = [told.size.unwrap_or(0), told.data, told.holes].map(format_size);
    print_line(&format!("{file}: {size}, received {data} of data and {holes} of holes"));
    Ok(EXIT_OK)
}
