//! What can be wrong with what the user wrote, each kind with its one line.

use std::ffi::OsStr;

/// Why a spec, a size, an option or a configuration was refused. Shown as one line.
///
/// The strings in it are ready to be shown: control characters are escaped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Something is wrong in a part of what was given: a line, a disk, a key.
    #[error("{place}: {why}")]
    Within {
        /// The part.
        place: String,
        /// What is wrong there.
        why: Box<SpecError>,
    },
    /// Not a size, or one that no disk can have.
    #[error("'{given}' is not a size: {why}")]
    Size {
        /// What was written.
        given: String,
        /// What is wrong and what to write.
        why: String,
    },
    /// Not a range, or one that holds nothing.
    #[error("'{given}' is not a range: {why}")]
    Range {
        /// What was written.
        given: String,
        /// What is wrong and what to write.
        why: String,
    },
    /// A key, a format, a mode that does not exist.
    #[error("unknown {what} '{given}'; {hint}")]
    Unknown {
        /// What it should have been one of.
        what: &'static str,
        /// What was written.
        given: String,
        /// The nearest match, or all there are.
        hint: String,
    },
    /// A mount option that does not exist.
    #[error("unknown mount option \"{given}\"; {hint}")]
    UnknownOption {
        /// What was written.
        given: String,
        /// The nearest match, or what has probably gone wrong.
        hint: String,
    },
    /// A value that its key or option cannot have.
    #[error("'{given}' is not {wanted}")]
    Value {
        /// What was written.
        given: String,
        /// What can stand there.
        wanted: String,
    },
    /// A key or an option that is known but cannot be used here.
    #[error("'{key}' {why}")]
    Key {
        /// The key.
        key: String,
        /// Why not, and what to do.
        why: String,
    },
    /// A name that a file in the mount cannot have.
    #[error("'{name}' cannot be a disk's name: {why}")]
    Name {
        /// The name.
        name: String,
        /// Why not, and what to do.
        why: &'static str,
    },
    /// A source that cannot be used.
    #[error("'{given}' {why}")]
    Source {
        /// What was written.
        given: String,
        /// Why not, and what to do.
        why: &'static str,
    },
    /// A path whose commas were read as the start of keys.
    #[error("'{path}' exists: write {spec}")]
    Comma {
        /// The path that exists.
        path: String,
        /// The spec that means it.
        spec: String,
    },
    /// Two disks that would be the same file in the mount.
    #[error(
        "two disks are called '{name}' ({first} and {second}): give one another name, NAME=SOURCE"
    )]
    SameName {
        /// The name.
        name: String,
        /// The source of the first.
        first: String,
        /// The source of the second.
        second: String,
    },
    /// Something that must be there and is not, or an empty place.
    #[error("{0}")]
    Missing(&'static str),
    /// A command line that cannot be run.
    #[error("{0}")]
    Command(String),
    /// Not TOML.
    #[error("not TOML: {0}")]
    Toml(String),
}

impl SpecError {
    /// The same error, with the place it happened in before it.
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

/// What the user wrote, fit for one line of a message: no line breaks, no control characters.
pub(super) fn escaped(text: impl AsRef<OsStr>) -> String {
    let mut line = String::new();
    for c in text.as_ref().to_string_lossy().chars() {
        // The separators U+2028 and U+2029 break lines too, and are not control characters.
        if c.is_control() || matches!(c, '\u{2028}' | '\u{2029}') {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// Which of `names` was probably meant by `given`, if any is close.
pub(super) fn nearest<'a>(
    given: &str,
    names: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    // Every third letter may be wrong; in a word of two letters any other word would be near.
    // A word longer than any of ours need not be measured, which is quadratic.
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

/// The remedy for an unknown word: the nearest match, or else everything there is.
pub(super) fn hint(given: &str, names: &[&str]) -> String {
    match nearest(given, names.iter().copied()) {
        Some(name) => format!("did you mean '{name}'?"),
        None => format!("known are {}", names.join(", ")),
    }
}

/// The value that `given` stands for.
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

/// A plain decimal number: digits and nothing else, where the standard library takes a `+`.
pub(super) fn parse_decimal(text: &str) -> Option<u64> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_swapped_letter_is_near_and_another_word_is_not() {
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
    fn what_is_shown_stays_on_its_line() {
        assert_eq!(escaped("a\nb\u{1b}c\u{2028}'ü'"), "a\\nb\\u{1b}c\\u{2028}'ü'");
    }

    #[test]
    fn a_decimal_is_digits_only() {
        assert_eq!(parse_decimal("042"), Some(42));
        for text in ["", "+1", "-1", "1 ", "0x1", "18446744073709551616", "١"] {
            assert_eq!(parse_decimal(text), None, "{text:?}");
        }
    }
}
