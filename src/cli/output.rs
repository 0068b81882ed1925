//! The output of all commands, except images and the like. Any line may contain text from others,
//! so everything printed is escaped here by [`printable`], and nowhere else.

use std::io::{self, Write};

use anyhow::Context as _;
use serde_json::Value;

use crate::printable;

/// Prints a line to stdout. A closed stdout is ignored: the operation in progress matters more than
/// its output.
pub(super) fn print_line(line: &str) {
    let _ = writeln!(io::stdout(), "{}", printable::line(line));
}

/// Prints a line to stderr, separate from the command's answer.
pub(super) fn warn(line: &str) {
    let _ = writeln!(io::stderr(), "cowslip: {}", printable::line(line));
}

/// Prints the lines of `text` to stdout, for commands whose answer is the text.
///
/// # Errors
/// A line for the user: a truncated report must not look complete.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    write_stdout(&printable::lines(text))
}

/// Prints a document to stdout, in one line.
///
/// # Errors
/// The same as [`print`](fn@super::print).
pub(super) fn print_json(value: &Value) -> anyhow::Result<()> {
    write_stdout(&printable::json(&format!("{value}\n")))
}

fn write_stdout(text: &str) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    let printed = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    printed.context("cannot print")
}

/// Prints why a command failed. Avoids `eprintln!`, which panics when stderr is closed.
pub fn print_error(error: &anyhow::Error) {
    warn(&format!("{error:#}"));
}
