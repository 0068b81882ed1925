//! The errors in the user's configuration; each displays as one line.

use std::ffi::OsStr;

/// The reason why a spec, a size, an option or a configuration was refused. Displays as one line.
///
/// All strings in these errors are safe to print: control characters are escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// An error within a part of the input: a line, a disk, a key.
    #[error("{place}: {why}")]
    Within {
        /// The part.
        place: String,
        /// The error.
        why: Box<SpecError>,
    },
    /// A malformed size, or a size that no disk can have.
    #[error("'{given}' is not a size: {why}")]
    Size {
        /// The user's text.
        given: String,
        /// The problem, and what to write instead.
        why: String,
    },
    /// A malformed or empty range.
    #[error("'{given}' is not a range: {why}")]
    Range {
        /// The user's text.
        given: String,
        /// The problem, and what to write instead.
        why: String,
    },
    /// An unknown key, format, mode or other word.
    #[error("unknown {what} '{given}'; {hint}")]
    Unknown {
        /// The kind of word that was expected.
        what: &'static str,
        /// The user's text.
        given: String,
        /// The nearest match, or all known words.
        hint: String,
    },
    /// An unknown mount option.
    #[error("unknown mount option \"{given}\"; {hint}")]
    UnknownOption {
        /// The user's text.
        given: String,
        /// The nearest match, or the probable mistake.
        hint: String,
    },
    /// A value that the key or option does not accept.
    #[error("'{given}' is not {wanted}")]
    Value {
        /// The user's text.
        given: String,
        /// A description of valid values.
        wanted: String,
    },
    /// A known key or option that cannot be used here.
    #[error("'{key}' {why}")]
    Key {
        /// The key.
        key: String,
        /// The reason, and what to do.
        why: String,
    },
    /// A name that no file in the mount can have.
    #[error("'{name}' cannot be a disk's name: {why}")]
    Name {
        /// The name.
        name: String,
        /// The reason, and what to do.
        why: &'static str,
    },
    /// A source that cannot be used.
    #[error("'{given}' {why}")]
    Source {
        /// The user's text.
        given: String,
        /// The reason, and what to do.
        why: &'static str,
    },
    /// A path with commas that were taken for the start of keys.
    #[error("'{path}' exists: write {spec}")]
    Comma {
        /// The path that exists.
        path: String,
        /// The spec of a disk with that path.
        spec: String,
    },
    /// Two disks with the same name in the mount.
    #[error(
        "two disks are called '{name}' ({first} and {second}): give one another name, NAME=SOURCE"
    )]
    SameName {
        /// The name.
        name: String,
        /// Source of the first disk.
        first: String,
        /// Source of the second disk.
        second: String,
    },
    /// A required part that is missing or empty.
    #[error("{0}")]
    Missing(&'static str),
    /// A command line that cannot be run.
    #[error("{0}")]
    Command(String),
    /// Malformed TOML.
    #[error("not TOML: {0}")]
    Toml(String),
}

impl SpecError {
    /// Wraps the error with the place where it occurred.
    pub(super) fn within(self, place: impl Into<String>) -> Self {
        Self::Within { place: place.into(), why: Box::new(self) }
    }

    pub(super) fn value(given: impl AsRef<OsStr>, wanted: impl Into<String>) -> Self {
        Self::Value { given: escaped(given), wanted: wanted.into() }
    }

    pub(super) fn key(key: impl AsRef<OsStr>, why: impl Into<String>) -> Self {
        Self::Key { key: escaped(key), why: why.into() }
    }
}

/// Escapes the user's text for one line of a message: no line breaks, no control characters.
pub(super) fn escaped(text: impl AsRef<OsStr>) -> String {
    let mut line = String::new();
    for c in text.as_ref().to_string_lossy().chars() {
        // U+2028 and U+2029 break lines too, though they are no control characters.
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// Returns the one of `names` that `given` probably stands for, if any is close.
pub(super) fn nearest<'a>(
    given: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // One letter in three may be wrong; any two-letter word would be close to any other. A word
    // longer than all known ones is not measured, since that takes quadratic time.
    let allowed = match given.chars().count() {
        0..=2 | 33.. => return None,
        count => (count / 3).min(3),
    };
    let given = given.to_ascii_lowercase();
    names
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(&given, name), name))
        .filter(|(distance, name)| *distance <= allowed && *distance < name.len())
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name)
}

/// Returns the remedy for an unknown word: the nearest match, or all known words.
pub(super) fn hint(given: &str, names: &[&str]) -> String {
    match nearest(given, names.iter().copied()) {
        Some(name) => format!("did you mean '{name}'?"),
        None => format!("known are {}", names.join(", ")),
    }
}

/// Returns the value that `given` stands for.
pub(super) fn parse_choice<T: Copy>(
    what: &'static str,
    given: &str,
    names: &[(&str, T)],
) -> Result<T, SpecError> {
    if let Some((_, value)) = names.iter().find(|(name, _)| *name == given) {
        return Ok(*value);
    }
    let names: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
    Err(SpecError::Unknown { what, given: escaped(given), hint: hint(given, &names) })
}

/// Parses a plain decimal number: only digits, while the standard library also accepts `+`.
pub(super) fn parse_decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_finds_a_misspelling_and_no_other_word() {
        let names = ["mode", "overlay", "uid", "to"];
        assert_eq!(nearest("mdoe", names), Some("mode"));
        assert_eq!(nearest("OVERLAY", names), Some("overlay"));
        assert_eq!(nearest("uiid", names), Some("uid"));
        assert_eq!(nearest("colour", names), None);
        assert_eq!(nearest("xy", names), None);
        assert_eq!(nearest("", names), None);
        assert_eq!(nearest(&"m".repeat(1 << 20), names), None);
    }

    #[test]
    fn escaped_text_has_no_line_breaks() {
        assert_eq!(escaped("a\nb\u{1b}c\u{2028}'ü'"), "a\\nb\\u{1b}c\\u{2028}'ü'");
    }

    #[test]
    fn decimal_number_is_digits_only() {
        assert_eq!(parse_decimal("042"), Some(42));
        for text in ["", "+1", "-1", "1 ", "0x1", "18446744073709551616", "١"] {
            assert_eq!(parse_decimal(text), None, "{text:?}");
        }
    }
}
