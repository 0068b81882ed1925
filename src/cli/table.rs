//! Tables for people: columns as wide as their contents, separated by two spaces.

use std::fmt;

use crate::printable;

/// Alignment of the cells in a column.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Align {
    /// For words.
    Left,
    /// For numbers.
    Right,
}

/// Rows of cells under a line of headings. Displays with a line feed after every line, and without
/// trailing spaces.
#[derive(Clone, Debug)]
pub(super) struct Table<const COLUMNS: usize> {
    align: [Align; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
    indent: &'static str,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// Creates an empty table; each column has a heading and an alignment.
    pub(super) fn new(columns: [(&str, Align); COLUMNS]) -> Self {
        Self {
            align: columns.map(|(_, align)| align),
            rows: vec![columns.map(|(heading, _)| heading.to_owned())],
            indent: "",
        }
    }

    /// Indents every line of the table by `indent`.
    pub(super) fn indented(mut self, indent: &'static str) -> Self {
        self.indent = indent;
        self
    }

    /// Adds a row. Control characters are escaped, since a name may contain any.
    pub(super) fn add_row(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells.map(|cell| printable::line(&cell).into_owned()));
    }
}

impl<const COLUMNS: usize> fmt::Display for Table<COLUMNS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| {
            let widths = self.rows.iter().map(|row| row[column].chars().count());
            widths.max().unwrap_or(0)
        };
        let widths: [usize; COLUMNS] = std::array::from_fn(width);
        for row in &self.rows {
            let mut line = self.indent.to_owned();
            for (column, cell) in row.iter().enumerate() {
                let gap = if column == 0 { "" } else { "  " };
                let width = widths[column];
                line += &match self.align[column] {
                    Align::Left => format!("{gap}{cell:<width$}"),
                    Align::Right => format!("{gap}{cell:>width$}"),
                };
            }
            writeln!(f, "{}", line.trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_contents() {
        let mut table =
            Table::new([("DISK", Align::Left), ("SIZE", Align::Right), ("BASE", Align::Left)]);
        table.add_row(["debian.img".into(), "20 GiB".into(), "/srv/d.img".into()]);
        table.add_row(["ä.img".into(), "512 bytes".into(), String::new()]);
        assert_eq!(
            table.to_string(),
            "DISK             SIZE  BASE\n\
             debian.img     20 GiB  /srv/d.img\n\
             ä.img       512 bytes\n"
        );
        assert!(table.indented("  ").to_string().starts_with("  DISK"));
    }

    #[test]
    fn control_characters_in_a_cell_are_escaped() {
        let mut table = Table::new([("NAME", Align::Left)]);
        table.add_row(["a\x1b[2Jb\n".into()]);
        assert_eq!(table.to_string(), "NAME\na\\u{1b}[2Jb\\n\n");
    }
}
