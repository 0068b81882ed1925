//! Escaping of text from outside, so that it is safe for a terminal or a log.
//!
//! Names, paths and messages may come from anybody: a hostile overlay, another user's mount, a
//! peer. Printed unchanged, control characters move the cursor, change the window or forge lines,
//! and characters that change the writing direction make a line look like another one. So all
//! printed or logged text is escaped here at the last moment, where it is written. Safe text stays
//! unchanged, so escaping twice does no harm.

use std::borrow::Cow;
use std::fmt::Write as _;

/// Returns whether `c` affects a terminal, or how the text around it is displayed.
fn is_hostile(c: char) -> bool {
    c.is_control()
        || matches!(c,
            // Marks, embeddings, overrides and isolates of the writing direction.
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
            // Line and paragraph separators, and invisible characters.
            | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{e0000}'..='\u{e007f}')
}

/// Escapes `text` to one line: unsafe characters become Rust escapes.
#[must_use]
pub(crate) fn line(text: &str) -> Cow<'_, str> {
    escape(text, is_hostile, |c, to| to.extend(c.escape_default()))
}

/// Escapes `text` like [`line()`], but keeps line feeds.
#[must_use]
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    let is_hostile = |c| c != '\n' && is_hostile(c);
    escape(text, is_hostile, |c, to| to.extend(c.escape_default()))
}

/// Escapes JSON without changing its meaning: unsafe characters occur only in strings, where `\u`
/// works.
#[must_use]
pub(crate) fn json(text: &str) -> Cow<'_, str> {
    let is_hostile = |c| !matches!(c, '\n' | '\r' | '\t') && is_hostile(c);
    escape(text, is_hostile, |c, to| {
        for unit in c.encode_utf16(&mut [0; 2]) {
            let _ = write!(to, "\\u{unit:04x}");
        }
    })
}

fn escape(
    text: &str,
    is_hostile: impl Fn(char) -> bool,
    show: impl Fn(char, &mut String),
) -> Cow<'_, str> {
    if !text.chars().any(&is_hostile) {
        return Cow::Borrowed(text);
    }
    let mut shown = String::with_capacity(text.len() + 16);
    for c in text.chars() {
        match is_hostile(c) {
            true => show(c, &mut shown),
            false => shown.push(c),
        }
    }
    Cow::Owned(shown)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn safe_text_is_unchanged() {
        for text in ["/srv/vm.img", "Gerät é 日本 \\u{1b}", "👩\u{200d}🚀"] {
            assert!(matches!(line(text), Cow::Borrowed(same) if same == text));
        }
        assert_eq!(lines("a\nb\n"), "a\nb\n");
    }

    #[test]
    fn control_and_direction_characters_are_escaped() {
        assert_eq!(line("a\x1b[2Jb\n\t"), "a\\u{1b}[2Jb\\n\\t");
        assert_eq!(line("gpj\u{202e}.exe\u{9b}31m"), "gpj\\u{202e}.exe\\u{9b}31m");
        assert_eq!(lines("a\r\nb\u{2066}"), "a\\r\nb\\u{2066}");
        assert_eq!(line("a\u{2028}b\u{e0041}"), "a\\u{2028}b\\u{e0041}");
    }

    proptest! {
        #[test]
        fn escaping_leaves_nothing_hostile_and_is_idempotent(text: String) {
            let once = line(&text).into_owned();
            prop_assert!(!once.contains(is_hostile));
            prop_assert_eq!(line(&once), once.as_str());
        }

        #[test]
        fn escaped_json_has_the_same_meaning(text in "[\\x00-\\u{2100}\\u{e0000}-\\u{e0080}\"]*") {
            let value = serde_json::Value::from(text);
            let whole = value.to_string();
            let shown = json(&whole);
            prop_assert!(!shown.contains(is_hostile));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&shown).unwrap(), value);
        }
    }
}
