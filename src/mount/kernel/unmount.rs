//! The end of a mount.

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::fusermount::{error_line, spawn_fusermount};

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmountMode {
    /// Only when nobody uses it, else `EBUSY`.
    Plain,
    /// The name goes at once, the mount when its last user has left.
    Lazy,
}

/// Unmounts the topmost mount that is called `name` in `directory`.
///
/// # Errors
/// As [`Held::unmount`](super::MountHandle::unmount).
pub(super) fn unmount_in(directory: &Path, name: &OsStr, how: UnmountMode) -> io::Result<()> {
    let flags = match how {
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
        helper.arg(match how {
            UnmountMode::Plain => "-u",
            UnmountMode::Lazy => "-uz",
        });
        // It takes no directory: it looks the name up where it is started.
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

/// The errno behind what `fusermount3 -u` says.
fn unmount_error(said: String) -> io::Error {
    let errno = match () {
        () if said.contains("busy") => Errno::BUSY,
        // "entry for M not found in /etc/mtab": it was there a moment ago, so it is another's.
        () if said.contains("not found in") => Errno::PERM,
        () if said.contains("not permitted") => Errno::PERM,
        () if said.contains("Invalid argument") => Errno::INVAL,
        () => return io::Error::other(said),
    };
    errno.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_helper_says_becomes_an_errno() {
        let errno = |said: &str| unmount_error(said.into()).raw_os_error();
        let busy = "fusermount3: failed to unmount /m: Device or resource busy";
        assert_eq!(errno(busy), Some(libc::EBUSY));
        assert_eq!(errno("fusermount3: entry for /m not found in /etc/mtab"), Some(libc::EPERM));
        assert_eq!(errno("fusermount3: something new"), None);
    }
}
