//! The picture as SVG: the whole disk, an axis in bytes, and a row for each layer.
//!
//! ```text
//!   vm.img  1 GiB                                     title
//!   [] base data 49.5 MiB  [] overlay data ...        legend, with the sums
//!   the disk  |##===#.......................#|
//!             0      256 MiB   512 MiB   ...          axis; its lines go down through all rows
//!   now       |  =      =                    | 16.1 MiB data
//!   base      |##  # .....                   | 49.5 MiB data, 974.5 MiB hole
//! ```
//!
//! In each column, the height of a kind is in proportion to its bytes, data at the bottom; even one
//! block can be seen. Each kind of a row is one path, whose upper edge is drawn in steps: a picture of
//! 64 layers stays below 1 MiB whatever the disk holds.

use std::fmt::Write as _;

use super::picture::{Picture, stack_heights, tick_label, ticks};
use crate::config::format_size;
use crate::printable;

/// Number of columns of a picture: one per pixel of the plot, so that none is blurred.
pub(super) const PLOT_COLUMNS: usize = 1000;

/// Horizontal limits of the plot, and margin on the left, in pixels.
const PLOT_LEFT: usize = 150;
const PLOT_RIGHT: usize = PLOT_LEFT + PLOT_COLUMNS;
const MARGIN: usize = 16;
/// Width of the picture, with the sums to the right of the plot.
const PICTURE_WIDTH: usize = PLOT_RIGHT + 290;
/// Vertical offset and height of the row of the whole disk.
const DISK_ROW_TOP: usize = 84;
const DISK_ROW_HEIGHT: usize = 64;
/// Height shared by the rows of the layers, and limits of the height of each.
const LAYERS_HEIGHT: usize = 560;
const MIN_ROW_HEIGHT: usize = 10;
const MAX_ROW_HEIGHT: usize = 40;
/// Maximum height of a row that provides nothing.
const IDLE_ROW_HEIGHT: usize = 14;
/// Height of a row below which its text is small.
const SMALL_ROW_HEIGHT: usize = 14;
/// Maximum width of the disk's name, in narrow characters.
const MAX_TITLE_WIDTH: usize = 60;
/// Maximum number of isolated columns in a row that are drawn wider: a single pixel is easily
/// overlooked.
const MAX_LONE_COLUMNS: usize = 40;
/// Maximum number of steps on the axis: as many labels as fit side by side.
const MAX_AXIS_STEPS: u64 = 8;

/// Style sheet. Blue and orange can be told apart also by the colour-blind, and from both backgrounds.
/// Zeros are grey, and holes hatched.
const STYLE: &str = "\
text{font:13px system-ui,'DejaVu Sans',sans-serif;fill:#24292f}\
.h{font-size:18px}.e{font-size:11px}.s{font-size:10px}.h,.t{font-weight:600}.m{fill:#6a727b}.n{font-weight:400}\
.bg{fill:#fff}.row{fill:#f1f3f5}.f{fill:none;stroke:#9aa2ab}.g{stroke:#9aa2ab;stroke-opacity:.45}\
.b{fill:#2a6db5}.o{fill:#ee8a12}.z{fill:#98a0aa}.hb{fill:#fff}.hl{stroke:#b9c0c8}\
@media (prefers-color-scheme:dark){text{fill:#e6e9ec}.m{fill:#9aa2ab}.bg{fill:#14181d}\
.row{fill:#1e242b}.f{stroke:#6a727b}.b{fill:#4c93dd}.o{fill:#f5a33c}.z{fill:#7b848f}\
.hb{fill:#14181d}.hl{stroke:#4a525c}}";

/// Draws the disk `name`; `rows` are the names of the picture's rows.
pub(super) fn draw(name: &str, picture: &Picture, rows: &[String]) -> String {
    let is_bare = rows.len() < 2;
    // The row of a base alone would repeat that of the disk.
    let layers = if is_bare { Vec::new() } else { row_layouts(picture) };
    let bottom = layers
        .last()
        .map_or(DISK_ROW_TOP + DISK_ROW_HEIGHT + 28, |layout| layout.y + layout.height + 8);
    let has_second_axis = bottom > DISK_ROW_TOP + DISK_ROW_HEIGHT + 400;
    let height = bottom + if has_second_axis { 28 } else { 12 };
    let mut to = String::new();
    head(&mut to, name, picture, height);
    legend(&mut to, picture, rows);
    grid(&mut to, picture, bottom);
    disk_row(&mut to, picture);
    for (row, layout) in layers.iter().enumerate() {
        layer_row(&mut to, picture, row, &rows[row], layout);
    }
    axis(&mut to, picture, DISK_ROW_TOP + DISK_ROW_HEIGHT + 18);
    if has_second_axis {
        axis(&mut to, picture, bottom + 14);
    }
    to += "</svg>\n";
    to
}

/// The position of a row, in pixels.
struct RowLayout {
    y: usize,
    height: usize,
}

/// Lays out the rows of the layers: the more there are, the lower is each.
fn row_layouts(picture: &Picture) -> Vec<RowLayout> {
    let full = (LAYERS_HEIGHT / picture.rows()).clamp(MIN_ROW_HEIGHT, MAX_ROW_HEIGHT);
    let gap = if full < SMALL_ROW_HEIGHT { 2 } else { 6 };
    let mut y = DISK_ROW_TOP + DISK_ROW_HEIGHT + 34;
    let layout = |row: usize| {
        let is_idle = picture.sums(row).total() == 0;
        let height = if is_idle { full.min(IDLE_ROW_HEIGHT) } else { full };
        let layout = RowLayout { y, height };
        y += height + gap;
        layout
    };
    (0..picture.rows()).map(layout).collect()
}

/// Draws everything up to the title. (Writing to a `String` cannot fail, here and below.)
fn head(to: &mut String, name: &str, picture: &Picture, height: usize) {
    let (full, size) = (printable::line(name), format_size(picture.size()));
    let (name, full) = (escape_xml(&shorten(&full, MAX_TITLE_WIDTH)), escape_xml(&full));
    let _ = write!(
        to,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {PICTURE_WIDTH} {height}" width="{PICTURE_WIDTH}" height="{height}" role="img">
<title>{full}, {size}</title>
<style>{STYLE}</style>
<defs><pattern id="hole" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><rect class="hb" width="6" height="6"/><path class="hl" d="M1 0v6"/></pattern></defs>
<rect class="bg" width="{PICTURE_WIDTH}" height="{height}"/>
<text class="h" x="{MARGIN}" y="34">{name} <tspan class="m n">{size}</tspan></text>
"##
    );
    if picture.columns() > 0 {
        let column = picture.column(picture.columns() - 1);
        let column = format_size(column.end - column.start);
        let x = PICTURE_WIDTH - MARGIN;
        let _ = writeln!(
            to,
            r#"<text class="m" x="{x}" y="34" text-anchor="end">each column is {column} wide and filled by share; even one block leaves a mark</text>"#
        );
    }
}

/// Draws the legend: the meaning of the colours, with the sum of each.
fn legend(to: &mut String, picture: &Picture, rows: &[String]) {
    let sums = picture.disk_sums();
    let below = rows.last().map_or("base", String::as_str);
    let mut items = vec![("b", format!("{below} data"), sums.base)];
    if rows.len() > 1 {
        items.push(("o", "overlay data".to_owned(), sums.overlay));
    }
    items.push(("z", "zeros, allocated".to_owned(), sums.zero));
    items.push(("hole", "holes".to_owned(), sums.hole));
    for (index, (class, text, len)) in items.into_iter().enumerate() {
        let x = PLOT_LEFT + index * 250;
        let fill = match class {
            "hole" => r#"class="f" style="fill:url(#hole)""#.to_owned(),
            class => format!(r#"class="{class}""#),
        };
        let (text, len) = (escape_xml(&text), format_size(len));
        let _ = writeln!(
            to,
            r#"<rect {fill} x="{x}" y="54" width="13" height="13"/><text x="{}" y="65">{text} <tspan class="m">{len}</tspan></text>"#,
            x + 20
        );
    }
}

/// Draws a line from each tick of the axis down through all rows.
fn grid(to: &mut String, picture: &Picture, bottom: usize) {
    let mut path = String::new();
    for tick in ticks(picture.size(), MAX_AXIS_STEPS) {
        let _ = write!(path, "M{:.1} {DISK_ROW_TOP}V{bottom}", x_of(picture, tick));
    }
    let _ = writeln!(to, r#"<path class="g" d="{path}"/>"#);
}

/// Draws the labels of the axis, with their baseline at `y`.
fn axis(to: &mut String, picture: &Picture, y: usize) {
    for tick in ticks(picture.size(), MAX_AXIS_STEPS) {
        let (x, label) = (x_of(picture, tick), tick_label(tick));
        let _ = writeln!(
            to,
            r#"<text class="m" x="{x:.1}" y="{y}" text-anchor="middle">{label}</text>"#
        );
    }
}

/// Returns the horizontal position of an offset in the disk.
fn x_of(picture: &Picture, offset: u64) -> f64 {
    let scaled =
        u128::from(offset) * 1000 * PLOT_COLUMNS as u128 / u128::from(picture.size().max(1));
    pixels_f64(PLOT_LEFT) + f64::from(u32::try_from(scaled).unwrap_or(u32::MAX)) / 1000.0
}

/// Converts a number of pixels for arithmetic.
fn pixels_f64(len: usize) -> f64 {
    f64::from(pixels(len))
}

/// Draws the row of the whole disk.
fn disk_row(to: &mut String, picture: &Picture) {
    let edges = |column: usize| {
        let (cell, range) = (picture.disk_cell(column), picture.column(column));
        let parts = [cell.base, cell.overlay, cell.zero, cell.hole];
        stack_heights(
            parts,
            range.end - range.start,
            pixels(DISK_ROW_HEIGHT),
            pixels(DISK_ROW_HEIGHT / 8),
        )
    };
    let y = DISK_ROW_TOP + DISK_ROW_HEIGHT / 2 + 5;
    let _ = writeln!(to, r#"<text x="{MARGIN}" y="{y}" class="t">the disk</text>"#);
    let layout = RowLayout { y: DISK_ROW_TOP, height: DISK_ROW_HEIGHT };
    bars(to, picture, &layout, ["b", "o", "z", "hole"], edges);
}

/// Draws the row of a layer.
fn layer_row(to: &mut String, picture: &Picture, row: usize, name: &str, layout: &RowLayout) {
    let RowLayout { y, height } = *layout;
    let edges = |column: usize| {
        let (cell, range) = (picture.cell(row, column), picture.column(column));
        let mark = pixels((height / 6).clamp(2, 8));
        stack_heights(
            [cell.data, cell.zero, cell.hole],
            range.end - range.start,
            pixels(height),
            mark,
        )
    };
    let data = if row + 1 == picture.rows() { "b" } else { "o" };
    let sums = picture.sums(row);
    let (size, drop) = if height < SMALL_ROW_HEIGHT { (" s", 4) } else { ("", 5) };
    let muted = if sums.total() == 0 { "m" } else { "n" };
    let (y_text, x_sums) = (y + height / 2 + drop, PLOT_RIGHT + 10);
    let full = printable::line(name);
    let name = escape_xml(&shorten(&full, if height < SMALL_ROW_HEIGHT { 22 } else { 17 }));
    let (full, sums) = (escape_xml(&full), sums.show());
    let _ = writeln!(
        to,
        r#"<g><title>{full}: {sums}</title><text class="{muted}{size}" x="{MARGIN}" y="{y_text}">{name}</text><text class="m e{size}" x="{x_sums}" y="{y_text}">{sums}</text>"#
    );
    bars(to, picture, layout, [data, "z", "hole"], edges);
    to.push_str("</g>\n");
}

/// Draws the bars of a row: its kinds one behind the other, each up to its edge, and a frame around
/// them.
fn bars<const KINDS: usize>(
    to: &mut String,
    picture: &Picture,
    layout: &RowLayout,
    classes: [&str; KINDS],
    edges: impl Fn(usize) -> [u32; KINDS],
) {
    let RowLayout { y, height } = *layout;
    let _ = write!(
        to,
        r#"<rect class="row" x="{PLOT_LEFT}" y="{y}" width="{PLOT_COLUMNS}" height="{height}" fill-opacity=".6"/>"#
    );
    let columns: Vec<[u32; KINDS]> = (0..picture.columns()).map(edges).collect();
    // A disk of a few bytes has fewer columns than there are pixels.
    let scale = match picture.columns() {
        0 | PLOT_COLUMNS => String::new(),
        few => format!(" scale({:.6} 1)", pixels_f64(PLOT_COLUMNS) / pixels_f64(few)),
    };
    let _ = write!(
        to,
        r#"<g transform="translate({PLOT_LEFT} {y}){scale}" shape-rendering="crispEdges">"#
    );
    for kind in (0..KINDS).rev() {
        let below = |edges: &[u32; KINDS]| kind.checked_sub(1).map_or(0, |below| edges[below]);
        if columns.iter().all(|edges| edges[kind] == below(edges)) {
            continue;
        }
        let fill = match classes[kind] {
            "hole" => r#"fill="url(#hole)""#.to_owned(),
            class => format!(r#"class="{class}""#),
        };
        let path = area_path(height, columns.iter().map(|edges| edges[kind]));
        let _ = write!(to, r#"<path {fill} d="{path}"/>"#);
    }
    for (kind, class) in classes.iter().enumerate().filter(|(_, class)| **class != "hole") {
        if let Some(path) = lone_columns_path(height, &columns, kind) {
            let _ = write!(to, r#"<path class="{class}" d="{path}"/>"#);
        }
    }
    let _ = writeln!(
        to,
        r#"</g><rect class="f" x="{PLOT_LEFT}" y="{y}" width="{PLOT_COLUMNS}" height="{height}" stroke-opacity=".6"/>"#
    );
}

/// Builds the path of an area from the bottom of a row up to `edges`, one per column.
fn area_path(height: usize, edges: impl Iterator<Item = u32>) -> String {
    let mut path = format!("M0 {height}");
    let (mut now, mut run) = (0, 0_usize);
    for edge in edges {
        if edge != now {
            if run > 0 {
                let _ = write!(path, "h{run}");
            }
            let _ = write!(path, "v{}", i64::from(now) - i64::from(edge));
            (now, run) = (edge, 0);
        }
        run += 1;
    }
    let _ = write!(path, "h{run}V{height}z");
    path
}

/// Builds the path of the isolated columns of a kind, whose neighbours have none of it, one column
/// wider on either side; `None` if there are none, or too many to be overlooked.
fn lone_columns_path<const KINDS: usize>(
    height: usize,
    columns: &[[u32; KINDS]],
    kind: usize,
) -> Option<String> {
    let foot = |edges: &[u32; KINDS]| kind.checked_sub(1).map_or(0, |below| edges[below]);
    let len = |at: usize| columns.get(at).map_or(0, |edges| edges[kind] - foot(edges));
    let is_lone = |at: &usize| {
        len(*at) > 0 && at.checked_sub(1).is_none_or(|left| len(left) == 0) && len(at + 1) == 0
    };
    let lone: Vec<usize> = (0..columns.len()).filter(is_lone).take(MAX_LONE_COLUMNS + 1).collect();
    // The columns of a small disk are wide enough.
    if lone.is_empty() || lone.len() > MAX_LONE_COLUMNS || columns.len() < PLOT_COLUMNS {
        return None;
    }
    let mut path = String::new();
    for at in lone {
        let (left, right) = (at.saturating_sub(1), (at + 2).min(columns.len()));
        let (y, len) = (pixels(height) - foot(&columns[at]), len(at));
        let _ = write!(path, "M{left} {y}H{right}v-{len}H{left}z");
    }
    Some(path)
}

/// Converts a number of pixels.
fn pixels(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

/// Truncates `name` to a width of `width` narrow characters.
fn shorten(name: &str, width: usize) -> String {
    let char_width = |c: char| if c.is_ascii() { 1 } else { 2 };
    if name.chars().map(char_width).sum::<usize>() <= width {
        return name.to_owned();
    }
    let mut left = width - 1;
    let fits = |c: &char| {
        let fits = left >= char_width(*c);
        left = left.saturating_sub(char_width(*c));
        fits
    };
    name.chars().take_while(fits).chain(['…']).collect()
}

/// Escapes `text` for XML. Control characters are escaped already; two other characters are not
/// allowed in XML.
fn escape_xml(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped += "&amp;",
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '"' => escaped += "&quot;",
            '\u{FFFE}' | '\u{FFFF}' => escaped.push('\u{FFFD}'),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::pieces::{MapPiece, PieceKind};
    use super::*;

    const KINDS: [PieceKind; 3] = [PieceKind::Data, PieceKind::Zero, PieceKind::Hole];

    fn add(picture: &mut Picture, row: usize, start: u64, length: u64, kind: PieceKind) {
        picture.add(row, &MapPiece { start, length, depth: row, kind });
    }

    fn names(rows: usize) -> Vec<String> {
        let mut names: Vec<String> = (1..rows).map(|row| format!("snapshot-{row}")).collect();
        names.push("base".to_owned());
        names
    }

    /// Checks that elements are closed in order and have one root, and returns their names.
    fn elements(text: &str) -> Vec<String> {
        let (mut open, mut all) = (Vec::new(), Vec::new());
        for tag in text.split('<').skip(1) {
            let (tag, after) = tag.split_once('>').expect("a tag is closed");
            assert!(!after.contains('>'), "{after}");
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop().as_deref(), Some(name));
                continue;
            }
            assert!(tag.matches('"').count() % 2 == 0, "{tag}");
            assert!(all.is_empty() || !open.is_empty(), "a second root: {tag}");
            let name = tag.split([' ', '/']).next().unwrap().to_owned();
            all.push(name.clone());
            if !tag.ends_with('/') {
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
        all
    }

    #[test]
    fn every_layer_has_a_row_with_its_name_and_sums() {
        let mut picture = Picture::new(1 << 40, PLOT_COLUMNS, 3);
        add(&mut picture, 0, 1 << 30, 4096, PieceKind::Data);
        add(&mut picture, 2, 1 << 39, 5 << 30, PieceKind::Zero);
        let text = draw("vm.img", &picture, &names(3));
        assert_eq!(elements(&text)[0], "svg");
        for part in ["snapshot-1: 4 KiB data", "snapshot-2: nothing", "base: 5 GiB zero", "1 TiB"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(text.contains(r#"class="o" d="M0 40"#), "{text}");
    }

    #[test]
    fn names_are_escaped() {
        let mut picture = Picture::new(1 << 20, PLOT_COLUMNS, 2);
        add(&mut picture, 0, 0, 4096, PieceKind::Data);
        let evil = "</text><script>&\"'\n\u{1b}\u{FFFF}".to_owned();
        let text = draw(&evil, &picture, &[evil.clone(), "base".to_owned()]);
        let elements = elements(&text);
        assert!(!elements.contains(&"script".to_owned()));
        assert!(
            text.contains("&lt;/text&gt;&lt;script&gt;&amp;&quot;'\\n\\u{1b}\u{FFFD}"),
            "{text}"
        );
        assert!(text.chars().all(|c| c == '\n' || !c.is_control()));
        let long = draw(&"é".repeat(255), &picture, &names(2));
        assert!(long.contains(&format!(">{}… <tspan", "é".repeat(29))), "{long}");
    }

    #[test]
    fn disks_without_columns_or_with_few_can_be_drawn() {
        for size in [0, 1, 3, 512, 999, 1000, 1001, u64::from(u32::MAX), i64::MAX.unsigned_abs()] {
            let mut picture = Picture::new(size, PLOT_COLUMNS, 2);
            add(&mut picture, 0, 0, size, PieceKind::Data);
            elements(&draw("d", &picture, &names(2)));
        }
    }

    #[test]
    fn isolated_block_is_drawn_wider() {
        let mut picture = Picture::new(16 << 40, PLOT_COLUMNS, 2);
        add(&mut picture, 1, 0, 16 << 40, PieceKind::Hole);
        add(&mut picture, 0, 8 << 40, 4096, PieceKind::Data);
        let text = draw("d", &picture, &names(2));
        assert!(text.contains(r#"<path class="o" d="M499 64H502v-8H499z"/>"#), "{text}");
    }

    #[test]
    fn largest_possible_picture_is_below_1_mib() {
        // All columns of all rows differ from their neighbours in every kind.
        let size = 1 << 40;
        let mut picture = Picture::new(size, PLOT_COLUMNS, 65);
        for column in 0..PLOT_COLUMNS {
            let range = picture.column(column);
            let piece = (range.end - range.start) / 65 / 3;
            for row in 0..65 {
                let (mut at, part) = (range.start + row as u64 * piece * 3, row + column);
                for (index, kind) in KINDS.into_iter().enumerate() {
                    let len = [4096, piece, piece / 2][(part + index) % 3];
                    if (part * 7 + index) % 3 != 1 {
                        add(&mut picture, row, at, len, kind);
                    }
                    at += piece;
                }
            }
        }
        let text = draw("d", &picture, &names(65));
        elements(&text);
        assert!((200_000..1 << 20).contains(&text.len()), "{}", text.len());
    }
}
