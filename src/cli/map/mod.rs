//! `cowslip map`: where a mounted disk has data, zeros and holes.
//!
//! ```text
//!   .cowslip/DISK/map ──pieces──> each piece ──┬──> the table, a line each
//!   .cowslip/DISK/status ──layers──┐           └──> picture ──> svg, strip
//!                                  └─ names ───────────────────────^
//! ```
//!
//! A map may have millions of pieces: they are counted or printed as they arrive.

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

use self::layers::LayerNames;
use self::picture::{KindSums, Picture};
use self::pieces::{MapPiece, each_piece};
use self::strip::Strip;
use super::client::Endpoint;
use super::{EXIT_OK, restore_sigpipe};
use crate::config::{Overwrite, format_size};
use crate::control::api::DiskStatus;
use crate::printable;

/// Number of bytes of a map that are read and printed at a time: as much as the mount is asked for.
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
    let disk = Endpoint::of_disk(&args.file)?;
    if args.json {
        copy_json(&disk)?;
    } else if let Some(out) = &args.svg {
        let status = disk.disk_status()?;
        let name = disk.disk.clone().unwrap_or_default();
        let layers = LayerNames::of(&status);
        let picture = build_picture(&disk, status.size, &layers, svg::PLOT_COLUMNS)?;
        let overwrite = if args.overwrite { Overwrite::Yes } else { Overwrite::No };
        save::save(out, &svg::draw(&name, &picture, &layers.rows()), overwrite)?;
    } else {
        show_table(&disk)?;
    }
    Ok(EXIT_OK)
}

/// Prints the map as the daemon sends it.
fn copy_json(disk: &Endpoint) -> anyhow::Result<()> {
    let mut map = disk.open("map")?;
    let mut stdout = io::stdout().lock();
    let mut chunk = vec![0; READ_CHUNK];
    // Not `io::copy`: a failure to print must not be blamed on the mount.
    loop {
        let len = map.read(&mut chunk).map_err(|error| disk.ask_error(error))?;
        if len == 0 {
            return stdout.flush().context("cannot print");
        }
        // A map is ASCII; other text of a hostile mount may be mangled.
        let text = String::from_utf8_lossy(&chunk[..len]);
        stdout.write_all(printable::json(&text).as_bytes()).context("cannot print")?;
    }
}

/// Builds the picture of a disk of `size` bytes.
fn build_picture(
    disk: &Endpoint,
    size: u64,
    layers: &LayerNames,
    columns: usize,
) -> anyhow::Result<Picture> {
    let mut picture = Picture::new(size, columns, layers.rows().len());
    for_each_piece(disk, |piece| {
        picture.add(layers.row(piece.depth), &piece);
        Ok(())
    })?;
    Ok(picture)
}

/// Calls `each` with every piece of the disk.
fn for_each_piece(
    disk: &Endpoint,
    each: impl FnMut(MapPiece) -> io::Result<()>,
) -> anyhow::Result<()> {
    each_piece(disk.open("map")?, each).map_err(|error| disk.ask_error(error).into())
}

/// Draws the picture of a disk from the text of its map, up to the first error. Returns the length of
/// the SVG; for the fuzz target.
pub(super) fn draw_svg(map: &[u8], status: &DiskStatus) -> usize {
    let layers = LayerNames::of(status);
    let rows = layers.rows();
    let mut picture = Picture::new(status.size, svg::PLOT_COLUMNS, rows.len());
    let _ = each_piece(map, |piece| {
        picture.add(layers.row(piece.depth), &piece);
        Ok(())
    });
    svg::draw("disk", &picture, &rows).len()
}

/// Prints the table, and on a terminal the strip above it. Both need the whole map, which is read
/// twice: at a terminal, nobody reads so many pieces that it matters.
fn show_table(disk: &Endpoint) -> anyhow::Result<()> {
    let status = disk.disk_status()?;
    let layers = LayerNames::of(&status);
    let stdout = io::stdout();
    let strip = stdout.is_terminal().then(|| Strip::of_terminal(&stdout, &layers.rows())).flatten();
    let mut stdout = BufWriter::new(stdout.lock());
    if let Some(strip) = strip {
        let picture = build_picture(disk, status.size, &layers, strip.columns())?;
        stdout.write_all(strip.draw(&picture).as_bytes()).context("cannot print")?;
    }
    let mut table = MapTable::new(status.size, &layers);
    table.head(&mut stdout).context("cannot print")?;
    // A failure to print must not be blamed on the mount.
    let mut printed = Ok(());
    for_each_piece(disk, |piece| {
        if printed.is_ok() {
            printed = table.piece(&piece, &mut stdout);
        }
        Ok(())
    })?;
    let printed = printed.and_then(|()| table.end(&mut stdout)).and_then(|()| stdout.flush());
    printed.context("cannot print")
}

/// A table with a line for each piece, and the sums. Not a [`Table`](super::table::Table), which would
/// hold the text of a million pieces in memory.
struct MapTable<'a> {
    layers: &'a LayerNames,
    /// Width of the columns of numbers.
    digits: usize,
    sums: KindSums,
}

impl<'a> MapTable<'a> {
    fn new(size: u64, layers: &'a LayerNames) -> Self {
        // No number is larger than the size of the disk.
        let digits = size.to_string().len().max(6);
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
    use super::pieces::PieceKind;
    use super::*;
    use crate::control::api::OverlayStatus;

    #[test]
    fn table_has_a_line_per_piece_and_the_sums() {
        let overlay = Some(OverlayStatus::default());
        let layers = LayerNames::of(&DiskStatus { overlay, ..DiskStatus::default() });
        let mut lines = MapTable::new(1_114_112, &layers);
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
