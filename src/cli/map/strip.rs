//! The picture on a terminal: a line for the whole disk and one for each layer.
//!
//! ```text
//!   the disk  ██▁▁·····▂···········█
//!   overlay    ▁     ▁      ▁
//!   base      ██  █······
//!             |0     |256 MiB      |512 MiB
//!   █ base data 49.5 MiB  █ overlay data 16.1 MiB  █ zero 0 bytes  · hole 974.5 MiB
//! ```
//!
//! A cell shows two kinds: the lower one as high as its share, in eighths, the other in the
//! colour behind it. Without colours the shapes still tell data, zeros and holes apart.

use std::env;
use std::fmt::Write as _;
use std::os::fd::AsFd;

use super::picture::{Picture, stack_heights, tick_label, ticks};
use crate::config::format_size;
use crate::printable;

/// Width in columns of a terminal that does not report its size.
const DEFAULT_WIDTH: usize = 80;
/// Minimum number of cells in a row: fewer show nothing.
const MIN_COLUMNS: usize = 16;
/// Maximum width of a name, in columns.
const MAX_NAME_WIDTH: usize = 16;
/// Maximum number of layers shown, so that the table stays in sight.
const MAX_ROWS: usize = 12;
/// Width reserved for a label of the axis, in columns.
const LABEL_WIDTH: usize = 12;

/// Whether the terminal shows colours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Colors {
    /// 256 colours.
    Many,
    /// The terminal shows none, or the user wants none (`NO_COLOR`).
    None,
}

/// The kind of a part of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paint {
    Base,
    Overlay,
    Zero,
    Hole,
    /// Provided by another layer.
    Nothing,
}

impl Paint {
    /// Returns the number of the colour among the 256. Blue and orange can be told apart also by the
    /// colour-blind, and from black and white.
    fn color(self) -> Option<u8> {
        match self {
            Self::Base => Some(32),
            Self::Overlay => Some(208),
            Self::Zero | Self::Hole => Some(245),
            Self::Nothing => None,
        }
    }
}

/// The layout of a strip.
#[derive(Clone, Debug)]
pub(super) struct Strip {
    names: Vec<String>,
    /// Width of the names, in columns of the terminal.
    name_width: usize,
    /// Width of the terminal, in columns.
    width: usize,
    /// Number of cells in a row.
    columns: usize,
    colors: Colors,
}

impl Strip {
    /// Lays out a strip for the terminal `fd`, with the rows `names`; `None` if the terminal is too
    /// narrow.
    pub(super) fn of_terminal(fd: impl AsFd, names: &[String]) -> Option<Self> {
        let size = rustix::termios::tcgetwinsize(fd).ok();
        let width = size.map(|size| usize::from(size.ws_col)).filter(|width| *width > 0);
        let is_set = |name: &str| env::var_os(name).is_some_and(|value| !value.is_empty());
        let is_dumb = env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
        let colors = if is_set("NO_COLOR") || is_dumb { Colors::None } else { Colors::Many };
        Self::new(width.unwrap_or(DEFAULT_WIDTH), colors, names)
    }

    fn new(width: usize, colors: Colors, names: &[String]) -> Option<Self> {
        let names: Vec<String> =
            names.iter().map(|name| truncate_name(&printable::line(name))).collect();
        let longest = names.iter().map(|name| name.chars().count()).max().unwrap_or(0);
        let name_width = longest.max("the disk".len());
        // A cell in the last column would make some terminals wrap.
        let columns =
            width.checked_sub(name_width + 3).filter(|columns| *columns >= MIN_COLUMNS)?;
        Some(Self { names, name_width, width, columns, colors })
    }

    /// Returns the maximum number of columns of the picture.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Draws the strip, followed by an empty line.
    pub(super) fn draw(&self, picture: &Picture) -> String {
        if picture.columns() == 0 {
            return String::new();
        }
        let mut to = String::new();
        let parts = |column: usize| {
            let cell = picture.disk_cell(column);
            let data = [(Paint::Overlay, cell.overlay), (Paint::Base, cell.base)];
            [data[0], data[1], (Paint::Zero, cell.zero), (Paint::Hole, cell.hole)]
        };
        self.row(&mut to, "the disk", picture, parts);
        self.layers(&mut to, picture);
        self.axis(&mut to, picture);
        self.legend(&mut to, picture);
        to.push('\n');
        to
    }

    /// Draws a row for each layer that provides something, up to [`MAX_ROWS`].
    fn layers(&self, to: &mut String, picture: &Picture) {
        let last = picture.rows() - 1;
        if last == 0 {
            return;
        }
        let busy: Vec<usize> = (0..last).filter(|row| picture.sums(*row).total() > 0).collect();
        let shown = busy.len().min(MAX_ROWS);
        for row in busy[..shown].iter().copied().chain([last]) {
            let data = if row == last { Paint::Base } else { Paint::Overlay };
            let parts = |column: usize| {
                let (cell, range) = (picture.cell(row, column), picture.column(column));
                let rest = (range.end - range.start).saturating_sub(cell.total());
                let kinds = [(data, cell.data), (Paint::Zero, cell.zero)];
                [kinds[0], kinds[1], (Paint::Hole, cell.hole), (Paint::Nothing, rest)]
            };
            if row == last && shown < busy.len() {
                let hidden = busy.len() - shown;
                let _ = writeln!(to, "{hidden} more layers: --svg OUT draws them all");
            }
            self.row(to, &self.names[row], picture, parts);
        }
    }

    fn row(
        &self,
        to: &mut String,
        name: &str,
        picture: &Picture,
        parts: impl Fn(usize) -> [(Paint, u64); 4],
    ) {
        let mut pen = Pen { to, colors: self.colors, current: (None, None) };
        let gap = self.name_width - name.chars().count();
        pen.to.push_str(name);
        pen.to.extend(std::iter::repeat_n(' ', gap + 2));
        for index in 0..self.columns {
            // A disk of a few bytes has fewer columns than there are cells.
            pen.draw_cell(parts(index * picture.columns() / self.columns));
        }
        pen.end();
    }

    fn axis(&self, to: &mut String, picture: &Picture) {
        let ticks = ticks(picture.size(), (self.columns / LABEL_WIDTH) as u64);
        let mut line = " ".repeat(self.name_width + 2);
        let start = line.len();
        for tick in ticks {
            let at = u128::from(tick) * (self.columns as u128) / u128::from(picture.size());
            let at = start + usize::try_from(at).unwrap_or(usize::MAX).min(self.columns - 1);
            let label = tick_label(tick);
            // The last label may fit only to the left of its tick.
            let (at, text) = match at + 1 + label.len() > self.width - 1 {
                true => (at.saturating_sub(label.len()), format!("{label}|")),
                false => (at, format!("|{label}")),
            };
            if at >= line.len() {
                line += &" ".repeat(at - line.len());
                line += &text;
            }
        }
        to.push_str(&line);
        to.push('\n');
    }

    fn legend(&self, to: &mut String, picture: &Picture) {
        let sums = picture.disk_sums();
        let below = self.names.last().map_or("base", String::as_str);
        let is_bare = picture.rows() < 2;
        let items = [
            (Paint::Base, format!("{below} data"), sums.base),
            (Paint::Overlay, "overlay data".to_owned(), sums.overlay),
            (Paint::Zero, "zero".to_owned(), sums.zero),
            (Paint::Hole, "hole".to_owned(), sums.hole),
        ];
        let mut used = 0;
        for (paint, text, len) in items {
            if is_bare && paint == Paint::Overlay {
                continue;
            }
            let text = format!(" {text} {}", format_size(len));
            let wide = 1 + text.chars().count();
            match used {
                0 => {}
                used if used + 3 + wide < self.width => to.push_str("   "),
                _ => {
                    to.push('\n');
                    used = 0;
                }
            }
            used += wide + if used == 0 { 0 } else { 3 };
            let mut pen = Pen { to, colors: self.colors, current: (None, None) };
            pen.draw_cell([
                (paint, 1),
                (Paint::Nothing, 0),
                (Paint::Nothing, 0),
                (Paint::Nothing, 0),
            ]);
            pen.reset_colors();
            to.push_str(&text);
        }
        to.push('\n');
    }
}

/// Truncates a name to [`MAX_NAME_WIDTH`].
fn truncate_name(name: &str) -> String {
    match name.chars().count() > MAX_NAME_WIDTH {
        true => name.chars().take(MAX_NAME_WIDTH - 1).chain(['…']).collect(),
        false => name.to_owned(),
    }
}

/// A pen that draws cells, and sends colours only where they change.
struct Pen<'a> {
    to: &'a mut String,
    colors: Colors,
    /// The colours of foreground and background; `None`: the default of the terminal.
    current: (Option<u8>, Option<u8>),
}

impl Pen<'_> {
    /// Draws a cell: the first part that is not empty from below, and behind it the largest of the
    /// others.
    fn draw_cell(&mut self, parts: [(Paint, u64); 4]) {
        let whole: u64 = parts.iter().map(|(_, len)| len).sum();
        let mut present = parts.into_iter().filter(|(_, len)| *len > 0);
        let (lower, len) = present.next().unwrap_or((Paint::Nothing, 0));
        let upper = present.max_by_key(|(_, len)| *len).map(|(paint, _)| paint);
        let [eighths, _] = stack_heights([len, whole - len], whole, 8, 1);
        let glyph = match lower {
            Paint::Nothing => ' ',
            Paint::Hole => '·',
            // Without colours, only the shape tells zeros from data.
            Paint::Zero if self.colors == Colors::None => '░',
            _ => "▁▂▃▄▅▆▇█".chars().nth(eighths.max(1) as usize - 1).unwrap_or('█'),
        };
        // A hole is drawn as a dot, and not behind another kind.
        let upper = upper.filter(|upper| lower != Paint::Hole && *upper != Paint::Hole);
        self.set_colors(lower.color(), upper.and_then(Paint::color));
        self.to.push(glyph);
    }

    fn set_colors(&mut self, foreground: Option<u8>, background: Option<u8>) {
        if self.colors == Colors::None || self.current == (foreground, background) {
            return;
        }
        self.to.push_str("\x1b[0");
        if let Some(color) = foreground {
            let _ = write!(self.to, ";38;5;{color}");
        }
        if let Some(color) = background {
            let _ = write!(self.to, ";48;5;{color}");
        }
        self.to.push('m');
        self.current = (foreground, background);
    }

    /// Returns to the default colours of the terminal.
    fn reset_colors(&mut self) {
        self.set_colors(None, None);
    }

    fn end(mut self) {
        self.reset_colors();
        self.to.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::super::pieces::{MapPiece, PieceKind};
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    /// 32 columns of 4 KiB over a base with data, zeros and holes.
    fn picture(columns: usize) -> Picture {
        let mut picture = Picture::new(128 << 10, columns, 2);
        let mut add = |row: usize, start: u64, length: u64, kind: PieceKind| {
            picture
                .add(row, &MapPiece { start: start << 10, length: length << 10, depth: row, kind });
        };
        add(1, 0, 32, PieceKind::Data);
        add(0, 32, 2, PieceKind::Data);
        add(1, 34, 30, PieceKind::Hole);
        add(0, 64, 32, PieceKind::Zero);
        add(1, 96, 31, PieceKind::Hole);
        add(0, 127, 1, PieceKind::Data);
        picture
    }

    #[test]
    fn shapes_tell_data_zeros_and_holes_apart_without_colors() {
        let strip = Strip::new(43, Colors::None, &names(&["overlay", "base"])).unwrap();
        assert_eq!(strip.columns(), 32);
        let text = strip.draw(&picture(32));
        assert_eq!(
            text,
            "the disk  ████████▄·······░░░░░░░░·······▂\n\
             overlay           ▄       ░░░░░░░░       ▂\n\
             base      ████████········        ········\n\
             \x20         |0              |64 KiB 128 KiB|\n\
             █ base data 32 KiB   █ overlay data 3 KiB\n\
             ░ zero 32 KiB   · hole 61 KiB\n\n"
        );
    }

    #[test]
    fn colors_are_reset_at_the_end_of_every_line() {
        let strip = Strip::new(43, Colors::Many, &names(&["overlay", "base"])).unwrap();
        let text = strip.draw(&picture(32));
        for line in text.lines().filter(|line| line.contains('\x1b')) {
            let last = line.rsplit('\x1b').next().unwrap();
            assert!(last.starts_with("[0m"), "{line:?}");
        }
        assert!(text.contains("\x1b[0;38;5;32m████████\x1b[0;38;5;208m▄"), "{text:?}");
    }

    #[test]
    fn no_line_is_wider_than_the_terminal() {
        for width in 0..200 {
            let names = names(&["a name that is much too long for it", "base"]);
            let Some(strip) = Strip::new(width, Colors::None, &names) else {
                assert!(width < 40, "{width}");
                continue;
            };
            for line in strip.draw(&picture(strip.columns())).lines() {
                let used = line.chars().count();
                assert!(used < width.max(40), "{width}: {line}");
            }
        }
    }

    #[test]
    fn layers_beyond_the_maximum_are_counted() {
        let mut picture = Picture::new(1 << 20, 40, 31);
        for row in 0..30 {
            let start = row as u64 * 4096;
            picture.add(row, &MapPiece { start, length: 4096, depth: row, kind: PieceKind::Data });
        }
        let names: Vec<String> = (0..31).map(|row| format!("s{row}")).collect();
        let text = Strip::new(80, Colors::None, &names).unwrap().draw(&picture);
        assert!(text.contains("18 more layers: --svg OUT draws them all\n"), "{text}");
        assert!(text.lines().count() < 20, "{text}");
    }

    #[test]
    fn empty_disk_has_no_strip() {
        let strip = Strip::new(80, Colors::Many, &names(&["base"])).unwrap();
        assert_eq!(strip.draw(&Picture::new(0, strip.columns(), 1)), "");
    }
}
