//! The host kernel's side of a mount: mounting, checking whether the mount is alive, unmounting.
//!
//! cowslip calls mount(2) itself instead of leaving that to its FUSE crate, for three reasons: the
//! type must read `fuse.cowslip` for root and users alike (mounts are found again by it), the errno
//! of an unmount must be preserved, and nothing may be unmounted that is not known to be ours.
//! [`mount`] returns the connection to the kernel, an open `/dev/fuse`. The mount is alive as long
//! as a process has that open, and *dead* (every call returns `ENOTCONN`) afterwards.
//!
//! No function here waits for a mount to answer. Which mount a path lies in is answered by
//! [`host::mountinfo`](crate::host::mountinfo); the one call that must ask the mount itself,
//! [`mount_health`], has a bound.

mod error;
mod fusermount;
mod health;
mod mount_handle;
mod prepare;
mod unmount;

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountFlags;

pub(crate) use self::error::MountError;
use self::fusermount::mount_by_fusermount;
pub(crate) use self::health::{MountHealth, check_answers, mount_health};
pub(crate) use self::mount_handle::MountHandle;
pub(crate) use self::prepare::{AllowedContents, prepare_mountpoint};
pub(crate) use self::unmount::UnmountMode;
use crate::host::mountinfo::FSTYPE;

/// The flags of a mount without options: `nosuid,nodev`.
pub(crate) const DEFAULT_FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const FUSE_DEVICE: &str = "/dev/fuse";

/// Largest read in one request, in bytes. The kernel splits a longer one: several workers copy at
/// once, and the first part arrives while the others are still being read.
const MAX_READ: u32 = 256 << 10;

/// The `-o` options that are mount flags: the word that sets the flag, the word that clears it, the
/// flag.
const FLAG_WORDS: [(&str, &str, MountFlags); 8] = [
    ("ro", "rw", MountFlags::RDONLY),
    ("nosuid", "suid", MountFlags::NOSUID),
    ("nodev", "dev", MountFlags::NODEV),
    ("noexec", "exec", MountFlags::NOEXEC),
    ("sync", "async", MountFlags::SYNCHRONOUS),
    ("dirsync", "nodirsync", MountFlags::DIRSYNC),
    ("noatime", "atime", MountFlags::NOATIME),
    ("nodiratime", "diratime", MountFlags::NODIRATIME),
];

/// Applies the `-o` option `word` to `flags`; `None` if it is no mount flag.
pub(crate) fn with_option(flags: MountFlags, word: &str) -> Option<MountFlags> {
    FLAG_WORDS.iter().find_map(|&(set, clear, flag)| match word {
        _ if word == set => Some(flags | flag),
        _ if word == clear => Some(flags - flag),
        _ => None,
    })
}

/// Who may use a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MountAccess {
    /// Only the user who mounted it: not even root.
    Owner,
    /// Everybody (`allow_other`), as far as the modes of the files go.
    Everybody,
}

/// The parameters of mount(2).
#[derive(Clone, Copy, Debug)]
pub(crate) struct MountParams<'a> {
    /// The path of the directory, from [`PreparedMountpoint::mountpoint`](prepare::PreparedMountpoint::mountpoint).
    pub mountpoint: &'a Path,
    /// The open directory to mount on, whatever the path leads to by now.
    pub directory: BorrowedFd<'a>,
    /// The source that mountinfo shows, verbatim; `cowslip` if empty.
    pub source: &'a str,
    /// Who may use the mount.
    pub access: MountAccess,
    /// The mount's flags; start from [`DEFAULT_FLAGS`].
    pub flags: MountFlags,
}

impl MountParams<'_> {
    fn source(&self) -> &str {
        if self.source.is_empty() { "cowslip" } else { self.source }
    }

    fn refused(&self, reason: String) -> MountError {
        let mountpoint = self.mountpoint.to_owned();
        MountError::Refused { mountpoint, reason }
    }
}

/// Mounts, and returns the connection from which requests are read. Closing it kills the mount.
///
/// Root calls mount(2); other users, and a root without the capability, run fusermount3. The mount
/// does not answer yet: no path in it may be accessed before the connection is served. [`entry_at`](crate::host::mountinfo::entry_at) may be called at once.
///
/// # Errors
/// Everything [`MountError`] lists from `NoDevice` to `Refused`; nothing is mounted then.
pub(crate) fn mount(req: &MountParams<'_>) -> Result<OwnedFd, MountError> {
    if !Path::new(FUSE_DEVICE).exists() {
        return Err(MountError::NoDevice);
    }
    if !rustix::process::geteuid().is_root() {
        return mount_by_fusermount(req);
    }
    match mount_by_syscall(req) {
        Err(MountError::NotPermitted { mountpoint }) => {
            log::debug!("mount(2) is not permitted, trying fusermount3");
            mount_by_fusermount(req).map_err(|_| MountError::NotPermitted { mountpoint })
        }
        done => done,
    }
}

fn mount_by_syscall(req: &MountParams<'_>) -> Result<OwnedFd, MountError> {
    let device = rustix::fs::open(FUSE_DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| match error {
            // A container's device rules return EPERM for a node that exists.
            Errno::NOENT | Errno::PERM | Errno::ACCESS => MountError::NoDevice,
            _ => MountError::Device { error: error.into() },
        })?;
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions,max_read={MAX_READ}{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        match req.access {
            MountAccess::Owner => "",
            MountAccess::Everybody => ",allow_other",
        }
    );
    let data = CString::new(data).map_err(|error| req.refused(error.to_string()))?;
    let at = format!("/proc/self/fd/{}", req.directory.as_raw_fd());
    match rustix::mount::mount(req.source(), at, FSTYPE, req.flags, &*data) {
        Ok(()) => Ok(device),
        Err(Errno::PERM) => Err(MountError::NotPermitted { mountpoint: req.mountpoint.to_owned() }),
        Err(Errno::NODEV) => Err(MountError::Device { error: Errno::NODEV.into() }),
        Err(error) => Err(req.refused(io::Error::from(error).to_string())),
    }
}

/// Raises the kernel's read-ahead of the mount with device number `dev` to `kib` KiB, and returns
/// whether it is at least that now. To be called once the mount answers: the handshake lowers the
/// value. Only root may raise it, so `false` is no error.
pub(crate) fn raise_read_ahead(dev: (u32, u32), kib: u32) -> bool {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", dev.0, dev.1);
    let is_enough =
        || fs::read_to_string(&path).ok()?.trim().parse().ok().map(|now: u32| now >= kib);
    is_enough() == Some(true) || fs::write(&path, kib.to_string()).is_ok()
}

/// Requests and mountpoints for tests.
#[cfg(test)]
mod testing {
    use super::*;
    use crate::host::mountinfo::entry_at;
    use std::os::fd::AsFd;
    use std::path::PathBuf;

    pub(super) fn request<'a>(at: &'a TestMountpoint, source: &'a str) -> MountParams<'a> {
        let (access, flags) = (MountAccess::Owner, DEFAULT_FLAGS);
        MountParams { mountpoint: &at.path, directory: at.fd.as_fd(), source, access, flags }
    }

    /// Unmounts the topmost mount at `path`.
    pub(super) fn unmount(path: &Path, mode: UnmountMode) -> io::Result<()> {
        MountHandle::at(path)?.ok_or(Errno::INVAL)?.unmount(mode)
    }

    /// A directory that is unmounted when the test ends, however it ends.
    pub(super) struct TestMountpoint {
        pub(super) path: PathBuf,
        /// The directory itself, below any mount.
        pub(super) fd: OwnedFd,
        /// Removed after `drop` below has unmounted.
        _dir: tempfile::TempDir,
    }

    impl TestMountpoint {
        pub(super) fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap();
            let fd = fs::File::open(&path).unwrap().into();
            Self { path, fd, _dir: dir }
        }
    }

    impl Drop for TestMountpoint {
        fn drop(&mut self) {
            while entry_at(&self.path).is_some() && unmount(&self.path, UnmountMode::Lazy).is_ok() {
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{TestMountpoint, request, unmount};
    use super::*;
    use crate::host::mountinfo::{cowslip_mounts, enclosing_mount, entry_at};
    use std::os::fd::AsFd;

    #[test]
    fn option_words_set_and_clear_flags() {
        let flags = with_option(DEFAULT_FLAGS, "ro").unwrap();
        assert!(flags.contains(MountFlags::RDONLY | MountFlags::NODEV));
        assert_eq!(with_option(flags, "rw"), Some(DEFAULT_FLAGS));
        assert_eq!(with_option(flags, "out.zst"), None);
    }

    #[test]
    fn a_mount_shows_its_type_and_source_and_dies_with_its_connection() {
        let at = TestMountpoint::new();
        let source = r"/srv/a,b\c d.img";
        assert_eq!(mount_health(&at.path), MountHealth::NotMounted);
        let connection = mount(&request(&at, source)).unwrap();
        let entry = entry_at(&at.path).unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.to_str()), (FSTYPE, Some(source)));
        assert!(cowslip_mounts().contains(&entry));
        let inside = enclosing_mount(&at.path.join("vm1.img")).unwrap();
        assert_eq!((inside.mount.dev, inside.inner), (entry.dev, "vm1.img".into()));
        drop(connection);
        assert_eq!(mount_health(&at.path), MountHealth::Dead);
        unmount(&at.path, UnmountMode::Plain).unwrap();
        assert_eq!(mount_health(&at.path), MountHealth::NotMounted);
        assert_eq!(
            unmount(&at.path, UnmountMode::Plain).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }

    #[test]
    fn a_mount_goes_on_the_directory_that_was_looked_at_and_not_on_its_path() {
        let at = TestMountpoint::new();
        let (named, away) = (at.path.join("m"), at.path.join("away"));
        fs::create_dir(&named).unwrap();
        let prepared = prepare_mountpoint(&named, AllowedContents::None).unwrap();
        fs::rename(&named, &away).unwrap();
        fs::create_dir(&named).unwrap();
        let mut request = request(&at, "s");
        (request.mountpoint, request.directory) = (&named, prepared.directory.as_fd());
        let _connection = mount_by_syscall(&request).unwrap();
        assert!(entry_at(&named).is_none() && entry_at(&away).is_some());
        unmount(&away, UnmountMode::Plain).unwrap();
    }

    #[test]
    fn a_mount_that_is_held_is_unmounted_wherever_its_directory_is_and_nothing_else() {
        let at = TestMountpoint::new();
        let (dir, away) = (at.path.join("dir"), at.path.join("away"));
        fs::create_dir_all(dir.join("m")).unwrap();
        let on = |path: &Path| {
            let fd = fs::File::open(path).unwrap();
            let mut request = request(&at, "s");
            (request.mountpoint, request.directory) = (path, fd.as_fd());
            mount_by_syscall(&request).unwrap()
        };
        let _ours = on(&dir.join("m"));
        let held = MountHandle::at(&dir.join("m")).unwrap().unwrap();
        assert!(held.is_mounted());
        fs::rename(&dir, &away).unwrap();
        fs::create_dir_all(dir.join("m")).unwrap();
        let _others = on(&dir.join("m"));
        held.unmount(UnmountMode::Lazy).unwrap();
        assert!(entry_at(&away.join("m")).is_none() && entry_at(&dir.join("m")).is_some());
        assert!(!held.is_mounted());
        // A new mount at the same path is another mount.
        let _again = on(&away.join("m"));
        assert_eq!(held.unmount(UnmountMode::Lazy).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        for path in [away.join("m"), dir.join("m")] {
            unmount(&path, UnmountMode::Lazy).unwrap();
        }
    }
}
