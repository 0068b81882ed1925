//! Requests to a disk whose answer is one line, which is printed.

use super::client::Endpoint;
use super::in_use::name_openers;
use super::long_request::{self, LongRequest};
use super::progress::{ProgressDisplay, Verbosity};
use super::{EXIT_OK, print_line};
use crate::control::api::{DiskRequest, Line};

/// Sends a request, shows progress, and prints the answer.
///
/// # Errors
/// [`AskError`](super::client::AskError); for a disk in use, a line that names its users.
pub(super) fn ask_and_print(disk: &Endpoint, request: &DiskRequest) -> anyhow::Result<u8> {
    let mut display = ProgressDisplay::new(Verbosity::default());
    let answer = disk.ask(request, |progress| display.show(progress));
    display.end();
    print_result(disk, answer.map_err(Into::into), "close it there, or use --force")
}

/// Sends a request like [`ask_and_print`], for an operation that takes long.
///
/// # Errors
/// The errors of [`ask_and_print`] and of [`long_request::ask`].
pub(super) fn ask_long(
    disk: &Endpoint,
    request: &DiskRequest,
    operation: LongRequest,
    verbosity: Verbosity,
) -> anyhow::Result<u8> {
    let remedy = match operation {
        LongRequest::Finish => "close it there, then finish again",
        _ => "close it there, or use --force",
    };
    print_result(disk, long_request::ask(disk, request, operation, verbosity), remedy)
}

fn print_result(disk: &Endpoint, answer: anyhow::Result<Line>, remedy: &str) -> anyhow::Result<u8> {
    let answer = answer.map_err(|error| name_openers(disk, error, remedy))?;
    if let Some(line) = answer.line {
        print_line(&line);
    }
    Ok(EXIT_OK)
}
