//! Unmounting, by umount2(2) or fusermount3.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::fusermount::{error_line, spawn_fusermount};

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnmountMode {
    /// Only if the mount is not in use, else `EBUSY`.
    Plain,
    /// The name disappears at once, the mount when its last user has left (`MNT_DETACH`).
    Lazy,
}

/// Unmounts the topmost mount that is called `name` in `directory`.
///
/// # Errors
/// The errors of [`MountHandle::unmount`](super::MountHandle::unmount).
pub(super) fn unmount_in(directory: &Path, name: &OsStr, mode: UnmountMode) -> io::Result<()> {
    let flags = match mode {
        UnmountMode::Plain => UnmountFlags::NOFOLLOW,
        UnmountMode::Lazy => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    if rustix::process::geteuid().is_root() {
        match rustix::mount::unmount(directory.join(name), flags) {
            Err(Errno::PERM) => {} // a container's root may have mounted by the helper
            done => return Ok(done?),
        }
    }
    let helper = spawn_fusermount(|helper| {
        helper.arg(match mode {
            UnmountMode::Plain => "-u",
            UnmountMode::Lazy => "-uz",
        });
        // The helper takes no directory: it looks the name up in its working directory.
        helper.arg("--").arg(name).current_dir(directory);
    });
    let output = match helper {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Errno::PERM.into()),
        helper => helper?.wait_with_output()?,
    };
    match output.status.success() {
        true => Ok(()),
        false => Err(unmount_error(error_line(&output))),
    }
}

/// Converts a message of `fusermount3 -u` to its errno; an unknown one is kept as it is.
fn unmount_error(message: String) -> io::Error {
    let errno = match () {
        () if message.contains("busy") => Errno::BUSY,
        // "entry for M not found in /etc/mtab": the mount existed a moment ago, so it is
        // another user's.
        () if message.contains("not found in") => Errno::PERM,
        () if message.contains("not permitted") => Errno::PERM,
        () if message.contains("Invalid argument") => Errno::INVAL,
        () => return io::Error::other(message),
    };
    errno.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_the_helper_becomes_an_errno() {
        let errno = |message: &str| unmount_error(message.into()).raw_os_error();
        let busy = "fusermount3: failed to unmount /m: Device or resource busy";
        assert_eq!(errno(busy), Some(libc::EBUSY));
        assert_eq!(errno("fusermount3: entry for /m not found in /etc/mtab"), Some(libc::EPERM));
        assert_eq!(errno("fusermount3: something new"), None);
    }
}
