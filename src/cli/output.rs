//! All that a command prints, but for images and their like. What others have written may be part
//! of any line, so everything goes through [`printable`] here and nowhere else has to.

use std::io::{self, Write};

use anyhow::Context as _;
use serde_json::Value;

use crate::printable;

/// Prints a line to stdout. A closed stdout is no reason to stop half way: what is being done
/// matters more than who reads about it.
pub(super) fn print_line(line: &str) {
    let _ = writeln!(io::stdout(), "{}", printable::line(line));
}

/// Prints a line beside the answer, to stderr.
pub(super) fn warn(line: &str) {
    let _ = writeln!(io::stderr(), "cowslip: {}", printable::line(line));
}

/// Prints the lines of `text` to stdout, for commands whose answer they are.
///
/// # Errors
/// A line: a report that was cut short must not look whole.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    write_stdout(&printable::lines(text))
}

/// Prints a document to stdout, in one line.
///
/// # Errors
/// As [`print`].
pub(super) fn print_json(value: &Value) -> anyhow::Result<()> {
    write_stdout(&printable::json(&format!("{value}\n")))
}

fn write_stdout(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.context("cannot print")
}

/// Prints why a command failed. Not `eprintln!`, which panics when nobody listens any more.
pub fn print_error(error: &anyhow::Error) {
    warn(&format!("{error:#}"));
}
