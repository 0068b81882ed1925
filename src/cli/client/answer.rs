//! Bounded readers for a mount's answers: a mount is another program, and a hostile one may send
//! any data without end.

use std::io::{self, BufRead, Read};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::control::api::Progress;

/// Maximum length of an answer in bytes: the status of a hundred thousand disks.
const MAX_ANSWER_LEN: u64 = 64 << 20;

/// Classification of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) enum RefusalKind {
    /// The disk is in use: worth trying again.
    Busy,
    /// The name now belongs to another disk.
    Stale,
    /// Any other refusal or failure.
    Other,
}

/// The reason why there is no answer.
#[derive(Debug)]
pub(in crate::cli) enum AnswerError {
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

/// One line of an answer. Any value of a key is taken, also `null`: what it means is decided later.
#[derive(Default, Deserialize)]
#[serde(default)]
struct AnswerLine {
    #[serde(deserialize_with = "present")]
    progress: Option<Value>,
    #[serde(deserialize_with = "present")]
    error: Option<Value>,
    busy: Value,
    stale: Value,
    #[serde(deserialize_with = "present")]
    ok: Option<Value>,
}

/// Deserializes the value of a key that is there.
fn present<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl AnswerLine {
    /// Returns the answer that the line is; `None` for any other line.
    fn into_answer(self) -> Option<Result<Value, AnswerError>> {
        let Some(error) = self.error else {
            return self.ok.map(Ok);
        };
        let line = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
        let kind = match () {
            () if self.busy == true => RefusalKind::Busy,
            () if self.stale == true => RefusalKind::Stale,
            () => RefusalKind::Other,
        };
        Some(Err(AnswerError::Refused { line, kind }))
    }
}

/// Reads an answer from `from`: lines of JSON, of which the last with `ok` or `error` counts.
/// `on_progress` receives the progress reports. The input is read to its end.
///
/// # Errors
/// [`AnswerError`]; a line longer than 64 MiB is malformed.
pub(in crate::cli) fn read_answer<T: DeserializeOwned>(
    mut from: impl BufRead,
    mut on_progress: impl FnMut(Progress),
) -> Result<T, AnswerError> {
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
        let Ok(mut line) = serde_json::from_slice::<AnswerLine>(&line) else {
            continue;
        };
        match line.progress.take() {
            Some(progress) => on_progress(Progress::deserialize(progress).unwrap_or_default()),
            None => answer = line.into_answer().or(answer),
        }
    }
    let nothing = || AnswerError::Broken(io::Error::other("it ended without an answer"));
    let answer = answer.ok_or_else(nothing)??;
    T::deserialize(answer).map_err(|error| {
        AnswerError::Broken(io::Error::other(format!("its answer is not understood: {error}")))
    })
}

/// Reads all of `from` as one JSON document.
///
/// # Errors
/// The error of a read; a line for the user when the document is longer than 64 MiB or has another
/// form.
pub(in crate::cli) fn read_document<T: DeserializeOwned>(from: impl Read) -> io::Result<T> {
    serde_json::from_slice(&read_limited(from)?)
        .map_err(|error| io::Error::other(format!("its status is not understood: {error}")))
}

/// Reads all of `from`.
///
/// # Errors
/// The error of a read; a line for the user when there are more than 64 MiB.
pub(in crate::cli) fn read_limited(from: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    from.take(MAX_ANSWER_LEN + 1).read_to_end(&mut bytes)?;
    match bytes.len() as u64 > MAX_ANSWER_LEN {
        true => Err(too_long_error()),
        false => Ok(bytes),
    }
}

fn too_long_error() -> io::Error {
    io::Error::other("it answers without end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::api::Line;

    fn read(text: &str) -> Result<Option<String>, AnswerError> {
        read_answer::<Line>(text.as_bytes(), |_| {}).map(|answer| answer.line)
    }

    #[test]
    fn last_answer_counts_and_other_lines_are_skipped() {
        let line = |text: &str| read(text).unwrap().unwrap();
        assert_eq!(line("{\"ok\":{\"line\":\"done\",\"later\":1}}\n"), "done");
        assert_eq!(line("?\n[]\n{\"ok\":{\"line\":\"a\"}}\n7\n{\"ok\":{\"line\":\"b\"}}\n{}"), "b");
        assert_eq!(read("{\"ok\":{}}").unwrap(), None);
        assert!(matches!(
            read("{\"ok\":{}}\n{\"error\":\"no\"}"),
            Err(AnswerError::Refused { .. })
        ));
        for text in ["", "{\"progress\":{}}\n", "{\"ok\":5}\n", "{\"ok\":null}\n"] {
            assert!(matches!(read(text), Err(AnswerError::Broken(_))), "{text}");
        }
    }

    #[test]
    fn refusals_are_classified() {
        let refusal = |keys: &str| match read(&format!("{{\"error\":{keys}}}")).unwrap_err() {
            AnswerError::Refused { line, kind } => (line, kind),
            AnswerError::Broken(error) => panic!("{error}"),
        };
        let no = || "no".to_owned();
        assert_eq!(refusal("\"no\""), (no(), RefusalKind::Other));
        assert_eq!(refusal("\"no\",\"busy\":true"), (no(), RefusalKind::Busy));
        assert_eq!(refusal("\"no\",\"busy\":false"), (no(), RefusalKind::Other));
        assert_eq!(refusal("\"no\",\"stale\":true"), (no(), RefusalKind::Stale));
        assert_eq!(refusal("[1],\"busy\":1"), ("[1]".to_owned(), RefusalKind::Other));
    }

    #[test]
    fn progress_is_reported_whatever_its_form() {
        let mut reports = Vec::new();
        let text = "{\"progress\":{\"done\":1,\"total\":2}}\n{\"progress\":null}\n{\"progress\":[]}\n\
                    {\"progress\":{\"done\":-1}}\n{\"ok\":{}}\n";
        read_answer::<Line>(text.as_bytes(), |progress| reports.push(progress)).unwrap();
        let none = Progress::default();
        assert_eq!(reports, [Progress::new(1, 2), none, none, none]);
    }
}
