//! What a file in a mount may be called: the rule for every name that becomes an entry of a
//! directory, in the mount, in a store or among snapshots, whoever gave it.
//!
//! A name that broke it would lead out of its directory on the host, and in the mount the kernel
//! refuses the whole listing that holds it.

use std::io;

use crate::host::os_error;

/// The longest name in bytes, as in other file systems (`NAME_MAX`).
pub(crate) const MAX_NAME_LEN: usize = 255;

/// The name that belongs to the mount itself.
pub(crate) const CONTROL_DIR: &str = ".cowslip";

/// Its files besides the directories of the disks: a disk of such a name could not be reached there.
pub(crate) const CONTROL_FILES: [&str; 3] = ["status", "log", "ctl"];

/// What is wrong with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// There is none.
    #[error("it is empty")]
    Empty,
    /// `.` or `..`.
    #[error("it is a directory's")]
    Directory,
    /// It belongs to the mount itself, or to a file of [`CONTROL_DIR`].
    #[error("it is one of cowslip's own ({CONTROL_DIR}, status, log, ctl)")]
    Reserved,
    /// It holds a `/`.
    #[error("it holds a /")]
    Slash,
    /// It holds a control character, which a terminal may obey.
    #[error("it holds a control character")]
    ControlCharacter,
    /// It is longer than [`MAX_NAME_LEN`].
    #[error("it is longer than 255 bytes")]
    TooLong,
}

impl From<NameError> for io::Error {
    fn from(error: NameError) -> Self {
        os_error(match error {
            NameError::TooLong => libc::ENAMETOOLONG,
            _ => libc::EINVAL,
        })
    }
}

/// Refuses what no file may be called.
///
/// # Errors
/// [`NameError`].
pub(crate) fn check(name: &str) -> Result<(), NameError> {
    match name {
        "" => Err(NameError::Empty),
        "." | ".." => Err(NameError::Directory),
        _ if name.contains('/') => Err(NameError::Slash),
        _ if name.chars().any(char::is_control) => Err(NameError::ControlCharacter),
        _ if name.len() > MAX_NAME_LEN => Err(NameError::TooLong),
        _ => Ok(()),
    }
}

/// Refuses what no disk may be called.
///
/// # Errors
/// [`NameError`].
pub(crate) fn check_disk(name: &str) -> Result<(), NameError> {
    check(name)?;
    match name == CONTROL_DIR || CONTROL_FILES.contains(&name) {
        true => Err(NameError::Reserved),
        false => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_plain_word_of_a_directory() {
        let long = "x".repeat(256);
        for bad in
            ["", ".", "..", "/", "/etc/x", "../x", "a/b", "a/", "a\nb", "a\0", "\u{9b}", &long]
        {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "...", ".hidden", "a b", "ö", "-", &long[1..]] {
            assert_eq!(check(good), Ok(()), "{good:?}");
        }
        for own in [".cowslip", "status", "log", "ctl"] {
            assert_eq!((check(own), check_disk(own)), (Ok(()), Err(NameError::Reserved)));
        }
        assert_eq!(check_disk("logs"), Ok(()));
        assert_eq!(io::Error::from(NameError::TooLong).raw_os_error(), Some(libc::ENAMETOOLONG));
    }
}
