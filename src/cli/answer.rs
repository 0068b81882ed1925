//! Bounded readers for a mount's answers: a mount is another program, and a hostile one may send
//! any data without end.

use std::io::{self, BufRead, Read};

use serde_json::Value;

use super::map;
use super::status;

/// Maximum length of an answer in bytes: the status of a hundred thousand disks.
pub(super) const MAX_ANSWER_LEN: u64 = 64 << 20;

/// Classification of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// The disk is in use: worth trying again.
    Busy,
    /// The name now belongs to another disk.
    Stale,
    /// Any other refusal or failure.
    Other,
}

/// The reason why there is no answer.
#[derive(Debug)]
pub enum AnswerError {
    /// The mount refused.
    Refused {
        /// The mount's explanation.
        line: String,
        /// Classification of the refusal.
        kind: RefusalKind,
    },
    /// The answer could not be read, or is malformed.
    Broken(io::Error),
}

/// Reads an answer from `from`: lines of JSON, of which the last with `ok` or `error` counts.
/// `progress` receives the progress reports. The input is read to its end.
///
/// # Errors
/// [`AnswerError`]; a line longer than 64 MiB is malformed.
pub fn read_answer(
    from: impl BufRead,
    mut progress: impl FnMut(&Value),
) -> Result<Value, AnswerError> {
    let mut from = from;
    let mut answer = None;
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut from).take(MAX_ANSWER_LEN + 1).read_until(b'\n', &mut line);
        match read {
            // Data after the answer is not needed.
            Err(_) if answer.is_some() => break,
            Err(error) => return Err(AnswerError::Broken(error)),
            Ok(0) => break,
            Ok(len) if len as u64 > MAX_ANSWER_LEN => {
                return Err(AnswerError::Broken(too_long_error()));
            }
            Ok(_) => {}
        }
        let Ok(mut said) = serde_json::from_slice::<Value>(&line) else {
            continue;
        };
        if let Some(now) = said.get("progress") {
            progress(now);
        } else if let Some(error) = said.get("error") {
            let line = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
            let is = |key: &str| said[key].as_bool() == Some(true);
            let why = match () {
                () if is("busy") => RefusalKind::Busy,
                () if is("stale") => RefusalKind::Stale,
                () => RefusalKind::Other,
            };
            answer = Some(Err(AnswerError::Refused { line, kind: why }));
        } else if let Some(ok) = said.get_mut("ok") {
            answer = Some(Ok(ok.take()));
        }
    }
    let nothing = || Err(AnswerError::Broken(io::Error::other("it ended without an answer")));
    answer.unwrap_or_else(nothing)
}

/// Reads all of `from` as one JSON document.
///
/// # Errors
/// The error of a read; a line for the user when the document is longer than 64 MiB or no JSON.
pub fn read_document(from: impl Read) -> io::Result<Value> {
    let mut bytes = Vec::new();
    from.take(MAX_ANSWER_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_ANSWER_LEN {
        return Err(too_long_error());
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| io::Error::other(format!("its status is not understood: {error}")))
}

pub(super) fn too_long_error() -> io::Error {
    io::Error::other("it answers without end")
}

/// Renders a mount's `answer` to a request, its `status` and a disk's `map` like the commands, for
/// the fuzz target. Returns the length of the output.
#[doc(hidden)]
#[must_use]
pub fn render_for_fuzzing(answer: &[u8], status: &[u8], map: &[u8]) -> usize {
    let mut shown = 0;
    let mut gauge = super::progress::ProgressFormatter::default();
    if let Ok(answer) = read_answer(answer, |now| shown += gauge.text(now).len()) {
        shown += super::umount::string_list(&answer["lines"]).len();
        shown += super::snapshot::snapshot_table(&answer["snapshots"]).len();
    }
    if let Ok(status) = read_document(status) {
        shown += status::render_mount(&status).len();
        shown += map::draw_svg(map, &status);
        shown += status::render_mount(&status::first_mount(status)).len();
    }
    shown
}
