//! Preparation of a mountpoint: it exists, is empty, and has no dead mounts.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::error::MountError;
use super::health::MountHealth;
use super::mount_handle::MountHandle;
use super::unmount::UnmountMode;
use crate::host::mountinfo::resolve;

/// Whether a mountpoint may hold files, which the mount will hide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AllowedContents {
    /// None: the mountpoint must be empty.
    None,
    /// Any files (`-o nonempty`).
    Any,
}

/// A mountpoint that is ready to be mounted on.
#[derive(Debug)]
pub(crate) struct PreparedMountpoint {
    /// The path, absolute and without symlinks, as
    /// [`MountEntry::mountpoint`](crate::host::mountinfo::MountEntry::mountpoint) will have it.
    pub mountpoint: PathBuf,
    /// The open directory that was checked.
    pub directory: OwnedFd,
    /// Number of dead cowslip mounts that were unmounted, one above the other.
    pub cleared: usize,
}

/// Checks that `path` can be mounted on, and unmounts dead cowslip mounts there.
///
/// # Errors
/// The variants of [`MountError`] from `Missing` on.
pub(crate) fn prepare_mountpoint(
    path: &Path,
    contents: AllowedContents,
) -> Result<PreparedMountpoint, MountError> {
    let inspect = |error| MountError::Inspect { mountpoint: path.to_owned(), error };
    let mountpoint = resolve(path).map_err(inspect)?;
    let cleared = clear_dead_mounts(&mountpoint)?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = rustix::fs::open(&mountpoint, flags, Mode::empty());
    let directory = opened.map_err(|error| match error {
        Errno::NOENT => MountError::Missing(path.to_owned()),
        Errno::NOTDIR => MountError::NotADirectory(path.to_owned()),
        _ => inspect(error.into()),
    })?;
    let itself = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    if fs::read_link(&itself).map_err(inspect)? != mountpoint {
        // Renamed, or a link by now: the path leads elsewhere.
        return Err(inspect(Errno::STALE.into()));
    }
    if contents == AllowedContents::None && fs::read_dir(&itself).map_err(inspect)?.next().is_some()
    {
        return Err(MountError::NotEmpty(path.to_owned()));
    }
    Ok(PreparedMountpoint { mountpoint, directory, cleared })
}

/// Unmounts the dead cowslip mounts at `mountpoint`, and returns their number.
fn clear_dead_mounts(mountpoint: &Path) -> Result<usize, MountError> {
    let mut cleared = 0;
    let inspect = |error| MountError::Inspect { mountpoint: mountpoint.to_owned(), error };
    while let Some(held) = MountHandle::at(mountpoint).map_err(inspect)? {
        match (held.health(), held.entry().is_cowslip()) {
            (MountHealth::Dead, true) => {
                held.unmount(UnmountMode::Lazy).map_err(|error| MountError::ClearDead {
                    mountpoint: mountpoint.to_owned(),
                    error,
                })?;
                cleared += 1;
            }
            (MountHealth::Dead, false) => {
                let (mountpoint, fstype) = (mountpoint.to_owned(), held.entry().fstype.clone());
                return Err(MountError::ForeignDead { mountpoint, fstype });
            }
            (_, true) => return Err(MountError::AlreadyMounted(mountpoint.to_owned())),
            (_, false) => break,
        }
    }
    Ok(cleared)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::mountinfo::entry_at;
    use crate::mount::kernel::mount;
    use crate::mount::kernel::testing::{TestMountpoint, request};

    #[test]
    fn a_mountpoint_must_be_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let outcome = |path: &Path, contents| match prepare_mountpoint(path, contents) {
            Ok(prepared) => format!("{}", prepared.cleared),
            Err(error) => error.to_string().replace(dir.path().to_str().unwrap(), "DIR"),
        };
        assert_eq!(
            outcome(&dir.path().join("m"), AllowedContents::None),
            "mountpoint 'DIR/m' does not exist: create it with mkdir"
        );
        assert_eq!(outcome(dir.path(), AllowedContents::None), "0");
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        assert!(outcome(&file, AllowedContents::Any).contains("'DIR/f' is not a directory"));
        assert!(
            outcome(&file.join("m"), AllowedContents::Any).contains("'DIR/f/m' is not a directory")
        );
        assert!(outcome(dir.path(), AllowedContents::None).contains("add -o nonempty"));
        assert_eq!(outcome(dir.path(), AllowedContents::Any), "0");
    }

    #[test]
    fn dead_mounts_are_cleared_however_many_lie_there() {
        let at = TestMountpoint::new();
        // The helper looks into the mount below, as root, so a user's mounts are never stacked.
        let stacked = match rustix::process::geteuid().is_root() {
            true => 3,
            false => 1,
        };
        let connections: Vec<_> =
            (0..stacked).map(|_| mount(&request(&at, "s")).unwrap()).collect();
        drop(connections);
        let prepared = prepare_mountpoint(&at.path, AllowedContents::None).unwrap();
        assert_eq!((&prepared.mountpoint, prepared.cleared), (&at.path, stacked));
        assert_eq!(entry_at(&at.path), None);
    }

    #[test]
    fn a_mount_that_does_not_answer_counts_as_alive() {
        let at = TestMountpoint::new();
        let _connection = mount(&request(&at, "s")).unwrap();
        // Refused as alive, and not unmounted.
        let error = prepare_mountpoint(&at.path, AllowedContents::None).unwrap_err();
        assert!(matches!(error, MountError::AlreadyMounted(_)), "{error}");
    }
}
