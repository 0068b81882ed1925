//! The rule for every name that becomes an entry of a directory, in the mount, in a store or among
//! snapshots, whatever its source.
//!
//! A name that broke the rule could lead out of its directory on the host, and in the mount the
//! kernel would refuse the whole listing that holds it.

use std::io;

use crate::host::os_error;

/// The longest name in bytes, as in other file systems (`NAME_MAX`).
pub(crate) const MAX_NAME_LEN: usize = 255;

/// The name of a mount's control directory.
pub(crate) const CONTROL_DIR: &str = ".cowslip";

/// The files of [`CONTROL_DIR`], which also has a directory for each disk: a disk of such a name could
/// not be reached there.
pub(crate) const CONTROL_FILES: [&str; 3] = ["status", "log", "ctl"];

/// The reason why a name is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// An empty name.
    #[error("it is empty")]
    Empty,
    /// `.` or `..`.
    #[error("it is a directory's")]
    Directory,
    /// The name of [`CONTROL_DIR`] or of one of its files.
    #[error("it is one of cowslip's own ({CONTROL_DIR}, status, log, ctl)")]
    Reserved,
    /// A name with a `/`.
    #[error("it holds a /")]
    Slash,
    /// A name with a control character, which a terminal may obey.
    #[error("it holds a control character")]
    ControlCharacter,
    /// A name longer than [`MAX_NAME_LEN`].
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

/// Refuses a name that no file may have.
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

/// Refuses a name that no disk may have.
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
    fn a_name_is_a_single_path_component() {
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
