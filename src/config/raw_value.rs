//! Values as the user wrote them, on the command line or in TOML.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::SpecError;

/// A value as written, before its key determines the type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RawValue {
    /// No value: `KEY` alone, which means `KEY=on`.
    Bare,
    /// Text; the type of every value on the command line.
    Text(OsString),
    /// A TOML integer, and the radix it was written in.
    Integer(i64, u32),
    /// A TOML boolean.
    Bool(bool),
    /// A TOML array of strings: a command.
    Array(Vec<OsString>),
    /// A TOML value that no key accepts; its description for messages.
    Other(&'static str),
}

/// Returns `text` as an absolute path, provided `dir` is absolute. Components `.` and doubled
/// slashes are dropped; `..` stays, since the file system is not consulted.
pub(super) fn absolute(text: &OsStr, dir: &Path) -> Result<PathBuf, SpecError> {
    if text.is_empty() {
        return Err(SpecError::Missing("a path is missing"));
    }
    if text.as_bytes().contains(&0) {
        return Err(SpecError::value(text, "a path: no file has a NUL byte in its name"));
    }
    Ok(dir.join(text).components().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn path_becomes_absolute_without_a_lookup() {
        let path = |text: &str| absolute(OsStr::new(text), Path::new("/home/me")).unwrap();
        assert_eq!(path("./a//b/"), Path::new("/home/me/a/b"));
        assert_eq!(path("../a"), Path::new("/home/me/../a"));
        assert_eq!(path("/a"), Path::new("/a"));
        assert!(absolute(OsStr::new("a\0b"), Path::new("/")).is_err());
    }
}
