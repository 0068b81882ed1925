//! What a disk looks like, in as many columns as there is room for.
//!
//! ```text
//!   column      0        1        2
//!          |--------|--------|--------|      of `size` bytes, each as many as the next, or one less
//!   row 0  | 4 KiB  |        |  all   |      what the top layer provides there
//!   row 1  | rest   |  all   |        |      ... the layer below it
//! ```
//!
//! Every byte of a piece is counted in exactly one cell, so the cells of a row add up to the
//! row's sum whatever is lost in drawing them. Extents are not kept: a picture of a million costs
//! no more than one of ten.
//!
//! Pure: no files, no I/O.

use std::ops::Range;

use super::pieces::{MapPiece, PieceKind};
use crate::config::format_size;

/// Bytes of each kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct KindSums {
    /// Bytes that hold something.
    pub(super) data: u64,
    /// Bytes that read as zero and have space.
    pub(super) zero: u64,
    /// Bytes that read as zero and have none.
    pub(super) hole: u64,
}

impl KindSums {
    /// Counts `len` bytes of `kind`.
    pub(super) fn add(&mut self, kind: PieceKind, len: u64) {
        let sum = match kind {
            PieceKind::Data => &mut self.data,
            PieceKind::Zero => &mut self.zero,
            PieceKind::Hole => &mut self.hole,
        };
        *sum = sum.saturating_add(len);
    }

    /// Bytes of any kind.
    pub(super) fn total(self) -> u64 {
        self.data.saturating_add(self.zero).saturating_add(self.hole)
    }

    /// `16.1 MiB data, 4 KiB zero`: what there is any of.
    pub(super) fn show(self) -> String {
        let kinds = [("data", self.data), ("zero", self.zero), ("hole", self.hole)];
        let there = kinds.iter().filter(|(_, len)| *len > 0);
        let there: Vec<_> =
            there.map(|(kind, len)| format!("{} {kind}", format_size(*len))).collect();
        if there.is_empty() { "nothing".to_owned() } else { there.join(", ") }
    }
}

/// What all layers together show.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct DiskSums {
    /// Data that the lowest row provides.
    pub(super) base: u64,
    /// Data that the rows above it provide.
    pub(super) overlay: u64,
    /// As [`KindSums::zero`], of all rows.
    pub(super) zero: u64,
    /// As [`KindSums::hole`], of all rows.
    pub(super) hole: u64,
}

/// A layer's bytes in every column.
#[derive(Clone, Debug, Default)]
struct PictureRow {
    sums: KindSums,
    /// Empty as long as there is nothing in it.
    cells: Vec<KindSums>,
}

/// The picture: a row a layer, the top one first and the base last.
#[derive(Clone, Debug)]
pub(super) struct Picture {
    size: u64,
    columns: usize,
    rows: Vec<PictureRow>,
}

impl Picture {
    /// An empty picture of a disk of `size` bytes. It has `columns` columns, fewer when there are
    /// fewer bytes, and `rows` rows, one at least.
    pub(super) fn new(size: u64, columns: usize, rows: usize) -> Self {
        let columns = usize::try_from(size).unwrap_or(usize::MAX).min(columns);
        Self { size, columns, rows: vec![PictureRow::default(); rows.max(1)] }
    }

    /// Adds a piece that `row` provides. What lies beyond the disk is left out: it may have
    /// grown since its size was asked for.
    pub(super) fn add(&mut self, row: usize, piece: &MapPiece) {
        let end = piece.start.saturating_add(piece.length).min(self.size);
        let (range, last) = (piece.start..end, self.rows.len() - 1);
        if range.is_empty() {
            return;
        }
        let columns = self.column_of(range.start)..=self.column_of(range.end - 1);
        let spans: Vec<_> = match columns.start() == columns.end() {
            // Most pieces of a large map: no division more than needed.
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

    /// The column in which the byte at `offset` lies.
    fn column_of(&self, offset: u64) -> usize {
        // The last i with floor(i * size / columns) <= offset.
        let scaled = (u128::from(offset) + 1) * (self.columns as u128) - 1;
        usize::try_from(scaled / u128::from(self.size)).unwrap_or(usize::MAX)
    }

    /// The bytes of a column; never none.
    pub(super) fn column(&self, column: usize) -> Range<u64> {
        let edge = |index: usize| {
            let scaled = index as u128 * u128::from(self.size) / (self.columns as u128);
            u64::try_from(scaled).unwrap_or(self.size)
        };
        edge(column)..edge(column + 1)
    }

    /// The bytes of a whole disk.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    /// How many columns it has.
    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// How many rows it has.
    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// What a row provides.
    pub(super) fn sums(&self, row: usize) -> KindSums {
        self.rows[row].sums
    }

    /// What a row provides in a column.
    pub(super) fn cell(&self, row: usize, column: usize) -> KindSums {
        self.rows[row].cells.get(column).copied().unwrap_or_default()
    }

    /// What all rows together show.
    pub(super) fn disk_sums(&self) -> DiskSums {
        self.fold_rows(|row| row.sums)
    }

    /// What all rows together show in a column.
    pub(super) fn disk_cell(&self, column: usize) -> DiskSums {
        self.fold_rows(|row| row.cells.get(column).copied().unwrap_or_default())
    }

    fn fold_rows(&self, of: impl Fn(&PictureRow) -> KindSums) -> DiskSums {
        let mut whole = DiskSums::default();
        for (index, row) in self.rows.iter().enumerate() {
            let sums = of(row);
            match index + 1 == self.rows.len() {
                true => whole.base += sums.data,
                false => whole.overlay += sums.data,
            }
            whole.zero += sums.zero;
            whole.hole += sums.hole;
        }
        whole
    }
}

/// How many bytes two ranges share.
fn overlap(a: &Range<u64>, b: &Range<u64>) -> u64 {
    a.end.min(b.end).saturating_sub(a.start.max(b.start))
}

/// Stacks the parts of a cell of `disk_sums` bytes, the first at the bottom, and gives the upper edge
/// of each in steps of a cell that is `height` steps high.
///
/// A part that is there at all is `mark` steps high at least, so that a block of 4 KiB shows on a
/// disk of 16 TiB; what is left of the height is shared out exactly. Only a cell that is full is
/// filled to the top.
pub(super) fn stack_heights<const PARTS: usize>(
    parts: [u64; PARTS],
    whole: u64,
    height: u32,
    mark: u32,
) -> [u32; PARTS] {
    let present = parts.iter().filter(|part| **part > 0).count() as u128;
    // One part more than there are: a cell that is not full has room left to show it.
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

/// Where an axis over `size` bytes has its marks: from 0 in equal steps of a power of two, with
/// `most` steps at the most.
pub(super) fn ticks(size: u64, most: u64) -> Vec<u64> {
    let mut step = 1_u64;
    while size / step > most.max(1) && step < 1 << 62 {
        step *= 2;
    }
    (0..=size / step).map(|index| index * step).collect()
}

/// A mark's label. Unlike [`format_size`] exact: 1.25 TiB is not rounded to a tenth.
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
        fn what_is_there_shows_and_only_what_is_full_is_filled(
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
    fn one_block_on_16_tib_is_not_lost() {
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
    fn a_disk_smaller_than_the_picture_has_a_column_a_byte() {
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
