//! What a mount answers, read with bounds: a mount is another program, and a hostile one may say
//! anything for as long as it likes.

use std::io::{self, BufRead, Read};

use serde_json::Value;

use super::map;
use super::status;

/// The longest answer: the status of a hundred thousand disks.
pub(super) const MAX_ANSWER_LEN: u64 = 64 << 20;

/// What is to be made of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RefusalKind {
    /// Somebody else has the disk: worth asking again.
    Busy,
    /// The disk is another one by now.
    Stale,
    /// It will not, or could not.
    Other,
}

/// What came instead of an answer.
#[derive(Debug)]
pub enum AnswerError {
    /// The mount says why not.
    Refused {
        /// In words.
        line: String,
        /// And what is to be made of it.
        kind: RefusalKind,
    },
    /// It could not be read, or is no answer.
    Broken(io::Error),
}

/// The answer in `from`: lines of JSON, of which the last with `ok` or `error` counts. `progress`
/// gets what is told of how far it is. All of it is read, to the end.
///
/// # Errors
/// [`AnswerError`]; a line longer than 64 MiB is one thing that is no answer.
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
            // What comes after the answer is of no interest.
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

/// All of `from`, which is one document.
///
/// # Errors
/// What reading says; a line when it is longer than 64 MiB or no JSON.
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

/// What the commands make of texts as a mount's `answer` to a request, its `status` and a disk's
/// `map`: for the fuzz target. Tells how much there was to show.
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
