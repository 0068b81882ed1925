//! `cowslip map`: what a mounted disk holds where.

use std::io::{self, BufReader, BufWriter, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use serde::Deserialize;
use serde_json::Value;

use super::client::Place;
use super::{DONE, die_of_a_closed_pipe};
use crate::spec::format_size;

#[derive(Debug, Args)]
pub(super) struct MapArgs {
    /// The mounted disk
    file: PathBuf,
    /// One JSON array with qemu-img's keys and `kind`
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &MapArgs) -> anyhow::Result<u8> {
    die_of_a_closed_pipe();
    let place = Place::of_disk(&args.file)?;
    let mut feed = place.open("map");
    let mut stdout = BufWriter::new(io::stdout().lock());
    if args.json {
        if let Err(error) = io::copy(&mut feed, &mut stdout) {
            return Err(feed.explain(error).into());
        }
    } else {
        let layers = Layers::of(&place.status()?);
        let pieces: Vec<Piece> =
            match serde_json::from_reader::<_, Vec<Piece>>(BufReader::new(&mut feed)) {
                Ok(pieces) => pieces,
                Err(error) => return Err(feed.explain(error.into()).into()),
            };
        print(&pieces, layers, &mut stdout).context("cannot print")?;
    }
    stdout.flush().context("cannot print")?;
    Ok(DONE)
}

/// One element of the array.
#[derive(Clone, Debug, Deserialize)]
struct Piece {
    start: u64,
    length: u64,
    depth: u32,
    kind: String,
}

/// What a disk is made of, top to bottom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layers {
    /// An overlay over the base.
    Overlaid,
    /// The base alone.
    Bare,
}

impl Layers {
    /// From the disk's status.
    fn of(status: &Value) -> Self {
        match status["overlay"].is_object() {
            true => Self::Overlaid,
            false => Self::Bare,
        }
    }

    fn name(self, depth: u32) -> &'static str {
        match (self, depth) {
            (Self::Overlaid, 0) => "overlay",
            _ => "base",
        }
    }
}

/// A line for each piece, in bytes and for people, and the sums. Not a `Table`: of a million
/// pieces each would be kept as text.
fn print(pieces: &[Piece], layers: Layers, to: &mut impl Write) -> io::Result<()> {
    let digits = |number: u64| number.to_string().len();
    let starts = pieces.last().map_or(0, |piece| digits(piece.start)).max(5);
    let lengths = pieces.iter().map(|piece| digits(piece.length)).max();
    let lengths = lengths.unwrap_or(0).max(6);
    writeln!(to, "{:>starts$}  {:>lengths$}  {:>10}  KIND  FROM", "START", "LENGTH", "")?;
    let mut sums = [("data", 0), ("zero", 0), ("hole", 0)];
    for piece in pieces {
        let Piece { start, length, depth, kind } = piece;
        let size = format_size(*length);
        let from = layers.name(*depth);
        writeln!(to, "{start:>starts$}  {length:>lengths$}  {size:>10}  {kind:<4}  {from}")?;
        if let Some((_, sum)) = sums.iter_mut().find(|(name, _)| name == kind) {
            *sum += length;
        }
    }
    let sums = sums.map(|(kind, sum)| format!("{kind} {}", format_size(sum)));
    writeln!(to, "{}", sums.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_a_line_a_piece_and_the_sums() {
        let text = r#"[{ "start": 0, "length": 65536, "depth": 0, "present": true, "zero": false, "data": true, "kind": "data"},
 { "start": 65536, "length": 1048576, "depth": 1, "present": true, "zero": true, "data": false, "kind": "hole"}]"#;
        let pieces: Vec<Piece> = serde_json::from_str(text).unwrap();
        let mut out = Vec::new();
        print(&pieces, Layers::Overlaid, &mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "START   LENGTH              KIND  FROM\n\
             \x20   0    65536      64 KiB  data  overlay\n\
             65536  1048576       1 MiB  hole  base\n\
             data 64 KiB, zero 0 bytes, hole 1 MiB\n"
        );
    }

    #[test]
    fn a_disk_without_an_overlay_is_all_base() {
        assert_eq!(Layers::of(&serde_json::json!({ "overlay": null })), Layers::Bare);
        assert_eq!(Layers::Bare.name(0), "base");
        assert_eq!(Layers::of(&serde_json::json!({ "overlay": {} })), Layers::Overlaid);
        assert_eq!(Layers::Overlaid.name(1), "base");
    }
}
