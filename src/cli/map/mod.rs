//! `cowslip map`: what a mounted disk holds where.
//!
//! ```text
//!   .cowslip/DISK/map ──pieces──> each piece ──┬──> the table, a line each
//!   .cowslip/DISK/status ──layers──┐           └──> picture ──> svg, strip
//!                                  └─ names ───────────────────────^
//! ```
//!
//! A map may have a million pieces and more: they are counted or printed as they come.

mod layers;
mod picture;
pub(super) mod pieces;
mod save;
mod strip;
mod svg;

use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::path::PathBuf;

use anyhow::Context as _;
use clap::Args;
use serde_json::Value;

use self::layers::LayerNames;
use self::picture::{KindSums, Picture};
use self::pieces::{MapPiece, each_piece};
use self::strip::Strip;
use super::client::Endpoint;
use super::{EXIT_OK, restore_sigpipe};
use crate::config::{Overwrite, format_size};
use crate::printable;

/// How much of a map is read and printed at a time: what the mount is asked for.
const READ_CHUNK: usize = 128 << 10;

#[derive(Debug, Args)]
pub(super) struct MapArgs {
    /// The mounted disk
    file: PathBuf,
    /// One JSON array with qemu-img's keys and `kind`
    #[arg(long)]
    json: bool,
    /// Draw the disk, layer by layer, into the file OUT (- is stdout)
    #[arg(long, value_name = "OUT", conflicts_with = "json")]
    svg: Option<PathBuf>,
    /// Replace OUT if it is there
    #[arg(long, requires = "svg")]
    overwrite: bool,
}

pub(super) fn run(args: &MapArgs) -> anyhow::Result<u8> {
    restore_sigpipe();
    let place = Endpoint::of_disk(&args.file)?;
    if args.json {
        copy_json(&place)?;
    } else if let Some(out) = &args.svg {
        let status = place.status()?;
        let name = place.disk.clone().unwrap_or_default();
        let layers = LayerNames::of(&status);
        let picture = build_picture(&place, &status, &layers, svg::PLOT_COLUMNS)?;
        let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
        save::save(out, &svg::draw(&name, &picture, &layers.rows()), overwrite)?;
    } else {
        show_table(&place)?;
    }
    Ok(EXIT_OK)
}

/// The map as the daemon tells it.
fn copy_json(place: &Endpoint) -> anyhow::Result<()> {
    let mut feed = place.open("map")?;
    let mut stdout = io::stdout().lock();
    let mut piece = vec![0; READ_CHUNK];
    // Not `io::copy_json`: when printing fails, that must not be blamed on the mount.
    loop {
        let len = feed.read(&mut piece).map_err(|error| feed.ask_error(error))?;
        if len == 0 {
            return stdout.flush().context("cannot print");
        }
        // It is ASCII; what is not, nobody has to see as it is.
        let text = String::from_utf8_lossy(&piece[..len]);
        stdout.write_all(printable::json(&text).as_bytes()).context("cannot print")?;
    }
}

/// The picture of a disk.
fn build_picture(
    place: &Endpoint,
    status: &Value,
    layers: &LayerNames,
    columns: usize,
) -> anyhow::Result<Picture> {
    let size = status["size"].as_u64().unwrap_or(0);
    let mut picture = Picture::new(size, columns, layers.rows().len());
    for_each_piece(place, |piece| {
        picture.add(layers.row(piece.depth), &piece);
        Ok(())
    })?;
    Ok(picture)
}

/// Calls `each` with every piece of the disk.
fn for_each_piece(
    place: &Endpoint,
    each: impl FnMut(MapPiece) -> io::Result<()>,
) -> anyhow::Result<()> {
    let mut feed = place.open("map")?;
    match each_piece(&mut feed, each) {
        Ok(()) => Ok(()),
        Err(error) => Err(feed.ask_error(error).into()),
    }
}

/// Draws what `map` tells of a disk with that `status`, however little of it makes sense.
pub(super) fn draw_svg(map: &[u8], status: &Value) -> usize {
    let layers = LayerNames::of(status);
    let (size, rows) = (status["size"].as_u64().unwrap_or(0), layers.rows());
    let mut picture = Picture::new(size, svg::PLOT_COLUMNS, rows.len());
    let _ = each_piece(map, |piece| {
        picture.add(layers.row(piece.depth), &piece);
        Ok(())
    });
    svg::draw("disk", &picture, &rows).len()
}

/// The table, and on a terminal the strip above it. Both need the whole map, which is asked for
/// twice: at a terminal nobody reads so many pieces that it matters.
fn show_table(place: &Endpoint) -> anyhow::Result<()> {
    let status = place.status()?;
    let layers = LayerNames::of(&status);
    let stdout = io::stdout();
    let strip = stdout.is_terminal().then(|| Strip::of_terminal(&stdout, &layers.rows())).flatten();
    let mut stdout = BufWriter::new(stdout.lock());
    if let Some(strip) = strip {
        let picture = build_picture(place, &status, &layers, strip.columns())?;
        stdout.write_all(strip.draw(&picture).as_bytes()).context("cannot print")?;
    }
    let mut table = MapTable::new(&status, &layers);
    table.head(&mut stdout).context("cannot print")?;
    // Printing fails here, too, and must not be blamed on the mount.
    let mut printed = Ok(());
    for_each_piece(place, |piece| {
        if printed.is_ok() {
            printed = table.piece(&piece, &mut stdout);
        }
        Ok(())
    })?;
    let printed = printed.and_then(|()| table.end(&mut stdout)).and_then(|()| stdout.flush());
    printed.context("cannot print")
}

/// A line for each piece, in bytes and for people, and the sums. Not a `Table`: of a million
/// pieces each would be kept as text.
struct MapTable<'a> {
    layers: &'a LayerNames,
    /// How wide the columns of numbers are.
    digits: usize,
    sums: KindSums,
}

impl<'a> MapTable<'a> {
    fn new(status: &Value, layers: &'a LayerNames) -> Self {
        // No number in it is larger than the disk.
        let digits = status["size"].as_u64().unwrap_or(0).to_string().len().max(6);
        Self { layers, digits, sums: KindSums::default() }
    }

    fn head(&self, to: &mut impl Write) -> io::Result<()> {
        let digits = self.digits;
        writeln!(to, "{:>digits$}  {:>digits$}  {:>10}  KIND  FROM", "START", "LENGTH", "")
    }

    fn piece(&mut self, piece: &MapPiece, to: &mut impl Write) -> io::Result<()> {
        let MapPiece { start, length, depth, kind } = *piece;
        self.sums.add(kind, length);
        let digits = self.digits;
        let (size, kind) = (format_size(length), kind.name());
        let from = printable::line(self.layers.name(depth));
        writeln!(to, "{start:>digits$}  {length:>digits$}  {size:>10}  {kind:<4}  {from}")
    }

    fn end(&self, to: &mut impl Write) -> io::Result<()> {
        let KindSums { data, zero, hole } = self.sums;
        let [data, zero, hole] = [data, zero, hole].map(format_size);
        writeln!(to, "data {data}, zero {zero}, hole {hole}")
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::pieces::PieceKind;
    use super::*;

    #[test]
    fn a_map_is_a_line_a_piece_and_the_sums() {
        let status = json!({ "size": 1_114_112, "overlay": {} });
        let layers = LayerNames::of(&status);
        let mut lines = MapTable::new(&status, &layers);
        let mut out = Vec::new();
        lines.head(&mut out).unwrap();
        let data = MapPiece { start: 0, length: 65536, depth: 0, kind: PieceKind::Data };
        let hole = MapPiece { start: 65536, length: 1 << 20, depth: 1, kind: PieceKind::Hole };
        lines.piece(&data, &mut out).unwrap();
        lines.piece(&hole, &mut out).unwrap();
        lines.end(&mut out).unwrap();
        assert_eq!(
            String::from_utf8(out).unwrap(),
            "  START   LENGTH              KIND  FROM\n\
             \x20     0    65536      64 KiB  data  overlay\n\
             \x20 65536  1048576       1 MiB  hole  base\n\
             data 64 KiB, zero 0 bytes, hole 1 MiB\n"
        );
    }
}
