//! The contents of a disk, summed up by column and layer.
//!
//! ```text
//!   column      0        1        2
//!          |--------|--------|--------|      equal ranges of the disk (or one byte less)
//!   row 0  | 4 KiB  |        |  all   |      bytes that the top layer provides
//!   row 1  | rest   |  all   |        |      bytes that the layer below provides
//! ```
//!
//! Every byte of a piece is counted in exactly one cell, so the cells of a row add up to the
//! row's sum, whatever is lost in drawing them. Pieces are not kept: a picture of a million pieces
//! takes no more memory than one of ten.
//!
//! Pure: no files, no I/O.

use std::ops::Range;

use super::pieces::{MapPiece, PieceKind};
use crate::config::format_size;

/// Bytes of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KindSums {
    /// Bytes of data.
    pub(super) data: u64,
    /// Bytes that read as zero and have space on the host.
    pub(super) zero: u64,
    /// Bytes that read as zero and have no space on the host.
    pub(super) hole: u64,
}

impl KindSums {
    /// Adds `len` bytes of `kind`.
    pub(super) fn add(&mut self, kind: PieceKind, len: u64) {
        let sum = match kind {
            PieceKind::Data => &mut self.data,
            PieceKind::Zero => &mut self.zero,
            PieceKind::Hole => &mut self.hole,
        };
        *sum = sum.saturating_add(len);
    }

    /// Returns the bytes of all kinds.
    pub(super) fn total(self) -> u64 {
        self.data.saturating_add(self.zero).saturating_add(self.hole)
    }

    /// Formats the kinds that are present: `16.1 MiB data, 4 KiB zero`.
    pub(super) fn show(self) -> String {
        let kinds = [("data", self.data), ("zero", self.zero), ("hole", self.hole)];
        let present = kinds.iter().filter(|(_, len)| *len > 0);
        let present: Vec<_> =
            present.map(|(kind, len)| format!("{} {kind}", format_size(*len))).collect();
        if present.is_empty() { "nothing".to_owned() } else { present.join(", ") }
    }
}

/// Bytes of each kind in the disk, which all layers make up together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskSums {
    /// Data that the lowest row provides.
    pub(super) base: u64,
    /// Data that the rows above it provide.
    pub(super) overlay: u64,
    /// [`KindSums::zero`] of all rows.
    pub(super) zero: u64,
    /// [`KindSums::hole`] of all rows.
    pub(super) hole: u64,
}

/// The bytes of a layer in every column.
#[derive(Clone, Debug, Default)]
struct PictureRow {
    sums: KindSums,
    /// By column; empty while the layer provides nothing.
    cells: Vec<KindSums>,
}

/// A picture of a disk: one row per layer, the top first and the base last.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    size: u64,
    columns: usize,
    rows: Vec<PictureRow>,
}

impl Picture {
    /// Creates an empty picture of a disk of `size` bytes. The picture has `columns` columns, or fewer
    /// if there are fewer bytes, and `rows` rows, at least one.
    pub(super) fn new(size: u64, columns: usize, rows: usize) -> Self {
        let columns = usize::try_from(size).unwrap_or(usize::MAX).min(columns);
        Self { size, columns, rows: vec![PictureRow::default(); rows.max(1)] }
    }

    /// Adds a piece that `row` provides. Bytes past the end of the disk are left out: the disk may
    /// have grown since its size was asked for.
    pub(super) fn add(&mut self, row: usize, piece: &MapPiece) {
        let end = piece.start.saturating_add(piece.length).min(self.size);
        let (range, last) = (piece.start..end, self.rows.len() - 1);
        if range.is_empty() {
            return;
        }
        let columns = self.column_of(range.start)..=self.column_of(range.end - 1);
        let spans: Vec<_> = match columns.start() == columns.end() {
            // Most pieces of a large map: divide no more than necessary.
            true => vec![(*columns.start(), range.end - range.start)],
            false => {
                columns.map(|column| (column, overlap(&self.column(column), &range))).collect()
            }
        };
        let row = &mut self.rows[row.min(last)];
        row.cells.resize(self.columns, KindSums::default());
        for (column, len) in spans {
            row.cells[column].add(piece.kind, len);
        }
        row.sums.add(piece.kind, range.end - range.start);
    }

    /// Returns the column of the byte at `offset`.
    fn column_of(&self, offset: u64) -> usize {
        // The last i with floor(i * size / columns) <= offset.
        let scaled = (u128::from(offset) + 1) * (self.columns as u128) - 1;
        usize::try_from(scaled / u128::from(self.size)).unwrap_or(usize::MAX)
    }

    /// Returns the range of a column, which is never empty.
    pub(super) fn column(&self, column: usize) -> Range<u64> {
        let edge = |index: usize| {
            let scaled = index as u128 * u128::from(self.size) / (self.columns as u128);
            u64::try_from(scaled).unwrap_or(self.size)
        };
        edge(column)..edge(column + 1)
    }

    /// Returns the size of the disk in bytes.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of columns.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Returns the number of rows.
    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Returns the bytes that a row provides.
    pub(super) fn sums(&self, row: usize) -> KindSums {
        self.rows[row].sums
    }

    /// Returns the bytes that a row provides in a column.
    pub(super) fn cell(&self, row: usize, column: usize) -> KindSums {
        self.rows[row].cells.get(column).copied().unwrap_or_default()
    }

    /// Returns the bytes of the whole disk.
    pub(super) fn disk_sums(&self) -> DiskSums {
        self.fold_rows(|row| row.sums)
    }

    /// Returns the bytes of the disk in a column.
    pub(super) fn disk_cell(&self, column: usize) -> DiskSums {
        self.fold_rows(|row| row.cells.get(column).copied().unwrap_or_default())
    }

    fn fold_rows(&self, of: impl Fn(&PictureRow) -> KindSums) -> DiskSums {
        let mut disk = DiskSums::default();
        for (index, row) in self.rows.iter().enumerate() {
            let sums = of(row);
            match index + 1 == self.rows.len() {
                true => disk.base += sums.data,
                false => disk.overlay += sums.data,
            }
            disk.zero += sums.zero;
            disk.hole += sums.hole;
        }
        disk
    }
}

/// Returns the length of the intersection of two ranges.
fn overlap(a: &Range<u64>, b: &Range<u64>) -> u64 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Stacks the parts of a cell of `whole` bytes, the first at the bottom, and returns the upper edge of
/// each, in a cell that is `height` steps high.
///
/// A part that is not empty is at least `mark` steps high, so that a block of 4 KiB shows on a disk of
/// 16 TiB. The rest of the height is divided in proportion. Only a full cell is filled to the top.
pub(super) fn stack_heights<const PARTS: usize>(
    parts: [u64; PARTS],
    whole: u64,
    height: u32,
    mark: u32,
) -> [u32; PARTS] {
    let present = parts.iter().filter(|part| **part > 0).count() as u128;
    // One more than the number of parts: a cell that is not full must not look full.
    let mark = u128::from(mark).min(u128::from(height) / (PARTS as u128 + 1));
    let shared = u128::from(height) - present * mark;
    let (mut bytes, mut marks) = (0, 0);
    parts.map(|part| {
        bytes += u128::from(part);
        marks += if part > 0 { mark } else { 0 };
        let edge = marks + shared * bytes / u128::from(whole.max(1));
        u32::try_from(edge).unwrap_or(height).min(height)
    })
}

/// Returns the offsets of the ticks on an axis over `size` bytes: from 0 in equal steps, each a power
/// of two, at most `most` of them.
pub(super) fn ticks(size: u64, most: u64) -> Vec<u64> {
    let mut step = 1_u64;
    while size / step > most.max(1) && step < 1 << 62 {
        step *= 2;
    }
    (0..=size / step).map(|index| index * step).collect()
}

/// Formats the label of a tick. Unlike [`format_size`], this is exact: 1.25 TiB is not rounded to a
/// tenth.
pub(super) fn tick_label(offset: u64) -> String {
    if offset < 1024 {
        return offset.to_string();
    }
    let power = offset.ilog2() / 10;
    let unit = 1_u128 << (10 * power);
    let thousandths = u128::from(offset) * 1000 / unit;
    let fraction = format!("{:03}", thousandths % 1000);
    let fraction = fraction.trim_end_matches('0');
    let dot = if fraction.is_empty() { "" } else { "." };
    let letter = "KMGTPE".chars().nth(power as usize - 1).unwrap_or('?');
    format!("{}{dot}{fraction} {letter}iB", thousandths / 1000)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn piece(range: Range<u64>, kind: PieceKind) -> MapPiece {
        MapPiece { start: range.start, length: range.end - range.start, depth: 0, kind }
    }

    const KINDS: [PieceKind; 3] = [PieceKind::Data, PieceKind::Zero, PieceKind::Hole];

    proptest! {
        #[test]
        fn every_byte_is_counted_in_the_column_it_lies_in(
            size in 1_u64..3000,
            columns in 1_usize..100,
            rows in 1_usize..5,
            cuts in prop::collection::vec((1_u64..400, 0_usize..5, 0_usize..3), 1..40),
        ) {
            let mut picture = Picture::new(size, columns, rows);
            let mut bytes = Vec::new();
            let mut at = 0;
            for (len, row, kind) in cuts {
                picture.add(row, &piece(at..at + len, KINDS[kind]));
                bytes.extend((at..(at + len).min(size)).map(|_| (row.min(rows - 1), KINDS[kind])));
                at += len;
            }
            let mut next = 0;
            for column in 0..picture.columns() {
                let range = picture.column(column);
                prop_assert!(range.start == next && !range.is_empty());
                next = range.end;
                for row in 0..rows {
                    let mut expected = KindSums::default();
                    for at in range.clone() {
                        prop_assert_eq!(picture.column_of(at), column);
                        if let Some((owner, kind)) = bytes.get(usize::try_from(at).unwrap())
                            && *owner == row
                        {
                            expected.add(*kind, 1);
                        }
                    }
                    prop_assert_eq!(picture.cell(row, column), expected);
                }
            }
            prop_assert_eq!(next, size);
            let total: u64 = (0..rows).map(|row| picture.sums(row).total()).sum();
            prop_assert_eq!(total, bytes.len() as u64);
        }

        #[test]
        fn sums_are_exact_on_disks_of_any_size(
            size in 1_u64..=i64::MAX.unsigned_abs(),
            columns in 1_usize..2000,
            cuts in prop::collection::vec(any::<u64>(), 0..30),
        ) {
            let mut cuts: Vec<u64> = cuts.iter().map(|cut| cut % size).chain([0, size]).collect();
            cuts.sort_unstable();
            let mut picture = Picture::new(size, columns, 3);
            for (index, pair) in cuts.windows(2).enumerate() {
                picture.add(index % 3, &piece(pair[0]..pair[1], KINDS[index % 2]));
            }
            let whole = picture.disk_sums();
            prop_assert_eq!(whole.base + whole.overlay + whole.zero + whole.hole, size);
            for column in 0..picture.columns() {
                let cell = picture.disk_cell(column);
                let range = picture.column(column);
                let sum = cell.base + cell.overlay + cell.zero + cell.hole;
                prop_assert_eq!(sum, range.end - range.start);
            }
            for row in 0..3 {
                let cells = (0..picture.columns()).map(|column| picture.cell(row, column).total());
                prop_assert_eq!(cells.sum::<u64>(), picture.sums(row).total());
            }
        }

        #[test]
        fn every_part_shows_and_only_a_full_cell_is_filled(
            parts in prop::array::uniform4(prop_oneof![Just(0), 1_u64..10, any::<u32>().prop_map(u64::from)]),
            missing in prop_oneof![Just(0), any::<u32>().prop_map(u64::from)],
            height in 8_u32..80,
            mark in 1_u32..3,
        ) {
            let whole = parts.iter().sum::<u64>() + missing;
            let edges = stack_heights(parts, whole, height, mark);
            let mut below = 0;
            for (part, edge) in parts.iter().zip(edges) {
                match part {
                    0 => prop_assert_eq!(edge, below),
                    _ => prop_assert!(edge >= below + mark.min(height / 5)),
                }
                below = edge;
            }
            prop_assert_eq!(below == height, whole > 0 && missing == 0);
        }

        #[test]
        fn ticks_are_few_and_round(size in 1_u64..=i64::MAX.unsigned_abs(), most in 2_u64..20) {
            let ticks = ticks(size, most);
            prop_assert!(ticks.len() as u64 <= most + 1);
            prop_assert!(ticks.last().is_some_and(|last| *last <= size));
            if let [_, step, ..] = ticks[..] {
                prop_assert!(step.is_power_of_two());
                prop_assert!(step == 1 || size / (step / 2) > most);
            }
        }
    }

    #[test]
    fn single_block_on_16_tib_shows() {
        let mut picture = Picture::new(16 << 40, 1000, 2);
        picture.add(1, &piece(0..16 << 40, PieceKind::Hole));
        picture.add(0, &piece((8 << 40)..(8 << 40) + 4096, PieceKind::Data));
        let cells: Vec<usize> = (0..1000).filter(|at| picture.cell(0, *at).data > 0).collect();
        assert_eq!(cells, [500]);
        let cell = picture.disk_cell(500);
        let column = picture.column(500);
        let edges = stack_heights([cell.base, cell.overlay], column.end - column.start, 64, 8);
        assert_eq!(edges, [0, 8]);
    }

    #[test]
    fn disk_smaller_than_the_picture_has_a_column_per_byte() {
        let mut picture = Picture::new(3, 1000, 1);
        picture.add(0, &piece(0..u64::MAX, PieceKind::Data));
        assert_eq!((picture.columns(), picture.column(2)), (3, 2..3));
        assert_eq!(picture.sums(0).show(), "3 bytes data");
        let mut none = Picture::new(0, 1000, 1);
        none.add(0, &piece(0..5, PieceKind::Data));
        assert_eq!((none.columns(), none.sums(0).show().as_str()), (0, "nothing"));
    }

    #[test]
    fn labels_are_exact() {
        let labels = ticks(3 << 39, 8).into_iter().map(tick_label).collect::<Vec<_>>();
        let expected = ["0", "256 GiB", "512 GiB", "768 GiB", "1 TiB", "1.25 TiB", "1.5 TiB"];
        assert_eq!(labels, expected);
        assert_eq!(tick_label((9 << 20) / 8), "1.125 MiB");
        assert_eq!(tick_label(768), "768");
        assert_eq!(ticks(16 << 40, 8).len(), 9);
        assert_eq!(ticks(0, 8), [0]);
    }
}
