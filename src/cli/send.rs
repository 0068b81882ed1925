//! `cowslip send`: a file, a device or a pipe to stdout, as large as its data.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::ops::Range;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use super::client::Place;
use super::map::pieces::each_piece;
use super::meter::Meter;
use super::table::printable;
use super::{DONE, Failure, die_of_a_closed_pipe};
use crate::spec::{Frames, parse_size};
use crate::transfer::{Changes, Detect, SendPlan, Source, send};

/// 1 MiB: what anybody may make a pipe, so that the two ends wait less for each other.
const PIPE: usize = 1 << 20;

#[derive(Debug, Args)]
pub(super) struct SendArgs {
    /// The file or block device, mounted or not (- is stdin)
    file: PathBuf,
    /// Begin at this byte: what 'cowslip recv --resume-offset' says
    #[arg(long, value_name = "OFFSET", value_parser = size)]
    from: Option<u64>,
    /// What goes over the wire: rbd (data and holes as records), or raw (plain bytes)
    #[arg(long, value_name = "rbd|raw", default_value = "rbd", value_parser = frames)]
    frames: Frames,
    /// Send blocks that hold only zeros as holes
    #[arg(long)]
    detect_zeroes: bool,
    /// Only what changed since this snapshot of a mounted disk: for 'cowslip recv --onto'
    #[arg(long, value_name = "SNAPSHOT")]
    since: Option<String>,
}

fn size(text: &str) -> Result<u64, String> {
    parse_size(text).map_err(|error| error.to_string())
}

/// Reads the value of `--frames`.
pub(super) fn frames(text: &str) -> Result<Frames, String> {
    match text {
        "rbd" => Ok(Frames::Rbd),
        "raw" => Ok(Frames::Raw),
        _ => Err("write rbd or raw".to_owned()),
    }
}

pub(super) fn run(args: &SendArgs) -> anyhow::Result<u8> {
    die_of_a_closed_pipe();
    let stdout = io::stdout();
    if stdout.is_terminal() {
        return Err(Failure::usage(
            "an image is not for a terminal: cowslip send FILE | cowslip recv NAME",
        ));
    }
    if args.since.is_some() && args.frames == Frames::Raw {
        return Err(Failure::usage("--since needs --frames rbd: plain bytes have no gaps"));
    }
    // Not `Stdout`, which looks for line ends.
    let out = File::from(stdout.as_fd().try_clone_to_owned().context("cannot use stdout")?);
    // What is no pipe cannot be one, and a smaller one works as well.
    let _ = rustix::pipe::fcntl_setpipe_size(&out, PIPE);
    let changes = args.since.as_deref().map(|since| changes(&args.file, since)).transpose()?;
    let source = Source::open(&args.file)?;
    let plan = SendPlan {
        from: args.from.unwrap_or(0),
        frames: args.frames,
        detect: if args.detect_zeroes { Detect::Always } else { Detect::AsNeeded },
        changes,
    };
    let mut meter = Meter::new(source.data());
    let sent = send(&source, out, &plan, &mut |told| meter.show(told));
    meter.end();
    if sent?.has_changed {
        let _ = writeln!(
            io::stderr(),
            "cowslip: '{}' was written to while it was sent: what arrives is no one moment of it; \
             a snapshot would be",
            args.file.display()
        );
    }
    Ok(DONE)
}

/// What changed in the mounted disk `file` since its snapshot `since`: what layers above the
/// snapshot's provide.
fn changes(file: &Path, since: &str) -> anyhow::Result<Changes> {
    let place = Place::of_disk(file)?;
    let before = place.status()?;
    let depth = depth(&before, since).with_context(|| {
        let (file, since) = (file.display(), printable(since));
        format!("'{file}' has no snapshot '{since}' below it: cowslip snapshot {file} --list")
    })?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    let mut feed = place.open("map");
    let read = each_piece(&mut feed, |piece| {
        let end = piece.start.saturating_add(piece.length);
        if piece.depth < depth {
            match ranges.last_mut() {
                Some(last) if last.end == piece.start => last.end = end,
                _ => ranges.push(piece.start..end),
            }
        }
        Ok(())
    });
    read.map_err(|error| feed.explain(error))?;
    // Meanwhile a snapshot may have come or gone, and the depths with it.
    if chain(&place.status()?) != chain(&before) {
        anyhow::bail!("the layers of '{}' changed meanwhile: try again", file.display());
    }
    Ok(Changes { since: since.to_owned(), ranges })
}

/// The layers of a disk, top to bottom, by what stays the same while they are there.
fn chain(status: &Value) -> Vec<(&Value, &Value)> {
    let chain = status["overlay"]["chain"].as_array();
    chain.into_iter().flatten().map(|layer| (&layer["uuid"], &layer["name"])).collect()
}

/// How many layers lie above the snapshot `name`; `None` when the disk does not stand on it.
fn depth(status: &Value, name: &str) -> Option<usize> {
    // The top one is no snapshot, whatever its name.
    chain(status).iter().skip(1).position(|(_, layer)| *layer == name).map(|above| above + 1)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_snapshot_lies_below_the_layers_above_it() {
        let layer = |name: Option<&str>| json!({ "name": name, "uuid": "u" });
        let chain = [layer(Some("now")), layer(Some("b")), layer(None), layer(Some("a"))];
        let status = json!({ "overlay": { "chain": chain } });
        assert_eq!(depth(&status, "b"), Some(1));
        assert_eq!(depth(&status, "a"), Some(3));
        assert_eq!((depth(&status, "now"), depth(&status, "c")), (None, None));
        assert_eq!(depth(&json!({ "overlay": null }), "a"), None);
    }
}
