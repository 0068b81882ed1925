//! The host kernel's side of a mount: making it, asking whether it lives, ending it.
//!
//! cowslip mounts itself instead of leaving that to its FUSE crate, for three reasons: the type
//! must read `fuse.cowslip` for root and users alike (it is how a mount is found again), the
//! errno of an unmount must survive, and nothing may be unmounted that is not known to be ours.
//! What comes out of [`mount`] is the connection to the kernel, an open `/dev/fuse`; the mount
//! lives for as long as somebody holds it, and is *dead* (every call answers `ENOTCONN`) once
//! nobody does.
//!
//! A question about a mount never waits for it. Where a path lies is `mountinfo`'s to say, and
//! its answers are re-exported here; the one call that must ask the mount itself,
//! [`condition`], has a bound.

use std::ffi::CString;
use std::fs;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

pub use super::mountinfo::{
    Enclosed, FSTYPE, MountEntry, cowslip_mounts, enclosing, entry_at, mounts, resolve,
};
pub(super) use super::mountinfo::{known_mounts, parse_mountinfo};

/// What a mount has unless it is told otherwise: `nosuid,nodev`.
pub const DEFAULT_FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);

const DEVICE: &str = "/dev/fuse";

/// The `-o` words that are mount flags: the one that sets it, the one that clears it, the flag.
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

/// `flags` after the `-o` option `word`; `None` when that is not a mount flag.
pub fn with_option(flags: MountFlags, word: &str) -> Option<MountFlags> {
    FLAG_WORDS.iter().find_map(|&(set, clear, flag)| match word {
        _ if word == set => Some(flags | flag),
        _ if word == clear => Some(flags - flag),
        _ => None,
    })
}

/// Why a mount could not be made. Every message is one line with its remedy.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// There is no `/dev/fuse`, or a container does not let us have it.
    #[error("no /dev/fuse: in a container add --device /dev/fuse --cap-add SYS_ADMIN")]
    NoDevice,
    /// `/dev/fuse` is there and does not open.
    #[error("cannot open /dev/fuse: {error}: load the module with modprobe fuse")]
    Device {
        /// What open(2) said.
        error: io::Error,
    },
    /// `/dev/fuse` is root's alone, and the helper opens it as the user.
    #[error("users may not open /dev/fuse: chmod 666 /dev/fuse as root, or mount as root")]
    DeviceIsRoots,
    /// A user without the set-uid helper.
    #[error("not root and no fusermount3: install the package fuse3")]
    NoHelper,
    /// `allow_other` asked for by a user whom the host does not let.
    #[error(
        "allow_other is not permitted: \
         add the line user_allow_other to /etc/fuse.conf, or mount as root"
    )]
    AllowOther,
    /// `mount(2)` is `EPERM` for a root that lacks the capability.
    #[error("mounting on '{}' is not permitted: in a container add --cap-add SYS_ADMIN",
        .mountpoint.display())]
    NotPermitted {
        /// Where it should have gone.
        mountpoint: PathBuf,
    },
    /// The kernel, or fusermount3, refused for another reason.
    #[error("cannot mount on '{}': {reason}", .mountpoint.display())]
    Refused {
        /// Where it should have gone.
        mountpoint: PathBuf,
        /// What the kernel or the helper said, in one line.
        reason: String,
    },
    /// The mountpoint is not there.
    #[error("mountpoint '{}' does not exist: create it with mkdir", .0.display())]
    Missing(PathBuf),
    /// The mountpoint is something else.
    #[error("mountpoint '{}' is not a directory: name an empty directory", .0.display())]
    NotADirectory(PathBuf),
    /// What is in the mountpoint would be hidden.
    #[error("mountpoint '{}' is not empty: name an empty directory, or add -o nonempty",
        .0.display())]
    NotEmpty(PathBuf),
    /// A live cowslip is mounted there.
    #[error("'{}' is already a cowslip mount: name another, or cowslip umount it first",
        .0.display())]
    Already(PathBuf),
    /// A dead mount that is not ours to clear.
    #[error("'{path}' is a dead {fstype} mount: unmount it with umount -l '{path}'",
        path = .mountpoint.display())]
    ForeignDead {
        /// Where it is.
        mountpoint: PathBuf,
        /// Whose it is, as mountinfo names it.
        fstype: String,
    },
    /// A dead cowslip mount that does not go away.
    #[error("cannot clear the dead cowslip mount on '{path}': {error}: run umount -l '{path}' \
         as root", path = .mountpoint.display())]
    Clear {
        /// Where it is.
        mountpoint: PathBuf,
        /// What the kernel said.
        error: io::Error,
    },
    /// The mountpoint cannot be looked at.
    #[error("cannot look at mountpoint '{}': {error}", .mountpoint.display())]
    Look {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// What the host said.
        error: io::Error,
    },
}

/// Who may use a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Only the user who mounted it: not even root.
    Owner,
    /// Everybody (`allow_other`), as far as the modes of the files go.
    Everybody,
}

/// What to mount, and where.
#[derive(Clone, Copy, Debug)]
pub struct MountRequest<'a> {
    /// The directory, as [`Prepared::mountpoint`] gives it.
    pub mountpoint: &'a Path,
    /// The first field of mtab, verbatim; an empty one reads `cowslip`.
    pub source: &'a str,
    /// Who may use it.
    pub access: Access,
    /// The mount's flags; start from [`DEFAULT_FLAGS`].
    pub flags: MountFlags,
}

impl MountRequest<'_> {
    fn source(&self) -> &str {
        if self.source.is_empty() { "cowslip" } else { self.source }
    }

    fn refused(&self, reason: String) -> MountError {
        let mountpoint = self.mountpoint.to_owned();
        MountError::Refused { mountpoint, reason }
    }
}

/// Mounts, and gives the connection that requests are read from. Dropping it kills the mount.
///
/// Root calls mount(2); everybody else, and a root without the capability, asks fusermount3.
/// The mount is not answering yet: no call into it may be made before somebody serves the
/// connection. [`entry_at`] may be asked at once.
///
/// # Errors
/// Everything [`MountError`] lists from `NoDevice` to `Refused`; nothing is mounted then.
pub fn mount(req: &MountRequest<'_>) -> Result<OwnedFd, MountError> {
    if !Path::new(DEVICE).exists() {
        return Err(MountError::NoDevice);
    }
    if !rustix::process::geteuid().is_root() {
        return mount_by_helper(req);
    }
    match mount_by_kernel(req) {
        Err(MountError::NotPermitted { mountpoint }) => {
            log::debug!("mount(2) is not permitted, trying fusermount3");
            mount_by_helper(req).map_err(|_| MountError::NotPermitted { mountpoint })
        }
        done => done,
    }
}

fn mount_by_kernel(req: &MountRequest<'_>) -> Result<OwnedFd, MountError> {
    let device = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(
        |error| match error {
            // A container's device rules answer EPERM for a node that is there.
            Errno::NOENT | Errno::PERM | Errno::ACCESS => MountError::NoDevice,
            _ => MountError::Device { error: error.into() },
        },
    )?;
    let data = format!(
        "fd={},rootmode=40000,user_id={},group_id={},default_permissions{}",
        device.as_raw_fd(),
        rustix::process::getuid().as_raw(),
        rustix::process::getgid().as_raw(),
        match req.access {
            Access::Owner => "",
            Access::Everybody => ",allow_other",
        }
    );
    let data = CString::new(data).map_err(|error| req.refused(error.to_string()))?;
    match rustix::mount::mount(req.source(), req.mountpoint, FSTYPE, req.flags, &*data) {
        Ok(()) => Ok(device),
        Err(Errno::PERM) => Err(MountError::NotPermitted { mountpoint: req.mountpoint.to_owned() }),
        Err(Errno::NODEV) => Err(MountError::Device { error: Errno::NODEV.into() }),
        Err(error) => Err(req.refused(io::Error::from(error).to_string())),
    }
}

/// The `-o` list for fusermount3.
fn helper_options(req: &MountRequest<'_>) -> String {
    let subtype = FSTYPE.trim_start_matches("fuse.");
    let mut list = format!("fsname={},subtype={subtype},default_permissions", escape(req.source()));
    if req.access == Access::Everybody {
        list.push_str(",allow_other");
    }
    for (word, _, flag) in FLAG_WORDS {
        if req.flags.contains(flag) {
            list.push(',');
            list.push_str(word);
        }
    }
    list
}

/// Escapes a value for fusermount3's `-o`, as libfuse does: a backslash before `,` and `\`.
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, ',' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Mounts through fusermount3, which sends the connection back over a socket.
fn mount_by_helper(req: &MountRequest<'_>) -> Result<OwnedFd, MountError> {
    let broken = |error: Errno| req.refused(io::Error::from(error).to_string());
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(broken)?;
    // Not as its stdin: newer helpers take no descriptor below 3 for this.
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(broken)?;
    let helper = spawn_helper(|helper| {
        helper.env("_FUSE_COMMFD", theirs.as_raw_fd().to_string());
        helper.arg("-o").arg(helper_options(req)).arg("--").arg(req.mountpoint);
    })
    .map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::NoHelper,
        _ => req.refused(format!("fusermount3: {error}")),
    })?;
    let output = helper.wait_with_output().map_err(|error| req.refused(error.to_string()))?;
    // Only now, and without waiting: the socket keeps what was sent, while its end might never
    // come if another thread has forked in between and its child holds `theirs`.
    let received = receive_fd(ours.as_fd());
    let said = one_line(&output);
    match received {
        Ok(Some(device)) if output.status.success() => {
            if !said.is_empty() {
                log::warn!("{said}");
            }
            Ok(device)
        }
        _ if said.contains("allow_other") => Err(MountError::AllowOther),
        _ if said.contains("/dev/fuse: Permission denied") => Err(MountError::DeviceIsRoots),
        _ if said.contains("device not found") => Err(MountError::NoDevice),
        Err(error) if output.status.success() => Err(broken(error)),
        _ => Err(req.refused(said)),
    }
}

fn spawn_helper(prepare: impl Fn(&mut Command)) -> io::Result<Child> {
    let spawn = |program: &str| {
        let mut helper = Command::new(program);
        // Its words are matched, so they must be the untranslated ones.
        helper.env("LC_ALL", "C");
        helper.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        prepare(&mut helper);
        helper.spawn()
    };
    match spawn("fusermount3") {
        // A service's PATH may be short.
        Err(error) if error.kind() == io::ErrorKind::NotFound => spawn("/usr/bin/fusermount3"),
        spawned => spawned,
    }
}

/// What the helper said, or how it ended when it failed in silence.
fn one_line(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    match lines.is_empty() && !output.status.success() {
        true => format!("fusermount3: {}", output.status),
        false => lines.join("; "),
    }
}

/// Takes one descriptor that was sent to `socket`, if there is one. Does not wait.
fn receive_fd(socket: std::os::fd::BorrowedFd<'_>) -> Result<Option<OwnedFd>, Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    rustix::io::retry_on_intr(|| {
        let mut data = [IoSliceMut::new(&mut byte)];
        rustix::net::recvmsg(
            socket,
            &mut data,
            &mut control,
            RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
        )
    })?;
    Ok(control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
        _ => None,
    }))
}

/// How to unmount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmount {
    /// Only when nobody uses it, else `EBUSY`.
    Plain,
    /// The name goes at once, the mount when its last user has left.
    Lazy,
}

/// Unmounts the topmost mount at `mountpoint`, which must be spelt as [`MountEntry`] has it.
///
/// # Errors
/// `EBUSY` while somebody uses it; `EINVAL` when nothing is mounted there; `EPERM` for a mount of
/// another user; what fusermount3 said when that is none of these.
pub fn unmount(mountpoint: &Path, how: Unmount) -> io::Result<()> {
    let flags = match how {
        Unmount::Plain => UnmountFlags::NOFOLLOW,
        Unmount::Lazy => UnmountFlags::NOFOLLOW | UnmountFlags::DETACH,
    };
    if rustix::process::geteuid().is_root() {
        match rustix::mount::unmount(mountpoint, flags) {
            Err(Errno::PERM) => {} // a container's root may have mounted by the helper
            done => return Ok(done?),
        }
    }
    if !mounts()?.iter().any(|entry| entry.mountpoint == mountpoint) {
        return Err(Errno::INVAL.into());
    }
    let helper = spawn_helper(|helper| {
        helper.arg(match how {
            Unmount::Plain => "-u",
            Unmount::Lazy => "-uz",
        });
        helper.arg("--").arg(mountpoint);
    });
    let output = match helper {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Errno::PERM.into()),
        helper => helper?.wait_with_output()?,
    };
    match output.status.success() {
        true => Ok(()),
        false => Err(unmount_error(one_line(&output))),
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

/// The state of a mount, of whatever type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Nothing is mounted at exactly this path.
    NotMounted,
    /// It answers; or it does not let us ask (root, too, at a user's mount without `allow_other`),
    /// or does not answer in time: not known to be dead.
    Alive,
    /// Its daemon is gone: `ENOTCONN`.
    Dead,
}

/// How long a mount may take to show that it lives. A dead one answers at once.
const PROBE: Duration = Duration::from_secs(2);

/// The state of the mount at `mountpoint`. Waits 2 seconds at most.
pub fn condition(mountpoint: &Path) -> Condition {
    match entry_at(mountpoint) {
        None => Condition::NotMounted,
        Some(entry) => probe(entry.mountpoint),
    }
}

fn probe(mountpoint: PathBuf) -> Condition {
    let (answer, answered) = mpsc::channel();
    // A thread of its own, since nothing else bounds a stat. One that hangs ends with the mount
    // or with this process.
    let asking = thread::Builder::new().name("probe".into()).spawn(move || {
        // FORCE_SYNC: cached attributes outlive the daemon.
        let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::NO_AUTOMOUNT;
        let asked = rustix::fs::statx(CWD, &mountpoint, flags, StatxFlags::BASIC_STATS);
        let _ = answer.send(asked.err());
    });
    let Ok(asking) = asking else {
        return Condition::Alive;
    };
    let Ok(error) = answered.recv_timeout(PROBE) else {
        return Condition::Alive;
    };
    // Joined, so that a later fork finds a process without threads. It only sends, so no panic.
    let _ = asking.join();
    match error {
        // ECONNABORTED: the connection was aborted through /sys/fs/fuse.
        Some(Errno::NOTCONN | Errno::CONNABORTED) => Condition::Dead,
        _ => Condition::Alive,
    }
}

/// Whether a mountpoint may hold files, which the mount will hide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contents {
    /// It must be empty.
    None,
    /// `-o nonempty`.
    Any,
}

/// A mountpoint that is ready to be mounted on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prepared {
    /// Absolute and without symlinks: what [`MountEntry::mountpoint`] will be.
    pub mountpoint: PathBuf,
    /// How many dead cowslip mounts were cleared away, one above the other.
    pub cleared: usize,
}

/// Sees to it that `path` can be mounted on, and clears dead cowslip mounts off it.
///
/// # Errors
/// Everything [`MountError`] lists from `Missing` on.
pub fn prepare_mountpoint(path: &Path, contents: Contents) -> Result<Prepared, MountError> {
    let look = |error| MountError::Look { mountpoint: path.to_owned(), error };
    let mountpoint = resolve(path).map_err(look)?;
    let cleared = clear_dead(&mountpoint)?;
    let metadata = fs::metadata(&mountpoint).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => MountError::Missing(path.to_owned()),
        io::ErrorKind::NotADirectory => MountError::NotADirectory(path.to_owned()),
        _ => look(error),
    })?;
    if !metadata.is_dir() {
        return Err(MountError::NotADirectory(path.to_owned()));
    }
    if contents == Contents::None && fs::read_dir(&mountpoint).map_err(look)?.next().is_some() {
        return Err(MountError::NotEmpty(path.to_owned()));
    }
    Ok(Prepared { mountpoint, cleared })
}

/// Unmounts the dead cowslip mounts at `mountpoint`, and gives their number.
fn clear_dead(mountpoint: &Path) -> Result<usize, MountError> {
    let mut cleared = 0;
    while let Some(entry) = entry_at(mountpoint) {
        match (probe(mountpoint.to_owned()), entry.is_cowslip()) {
            (Condition::Dead, true) => {
                unmount(mountpoint, Unmount::Lazy).map_err(|error| MountError::Clear {
                    mountpoint: mountpoint.to_owned(),
                    error,
                })?;
                cleared += 1;
            }
            (Condition::Dead, false) => {
                let (mountpoint, fstype) = (mountpoint.to_owned(), entry.fstype);
                return Err(MountError::ForeignDead { mountpoint, fstype });
            }
            (_, true) => return Err(MountError::Already(mountpoint.to_owned())),
            (_, false) => break,
        }
    }
    Ok(cleared)
}

/// Raises the kernel's read-ahead of the mount with device number `dev` to `kib` KiB, and says
/// whether it is that much now. Call it once the mount answers: the handshake lowers it. Only
/// root may, so a "no" is no error.
pub fn raise_read_ahead(dev: (u32, u32), kib: u32) -> bool {
    let path = format!("/sys/class/bdi/{}:{}/read_ahead_kb", dev.0, dev.1);
    let is_enough =
        || fs::read_to_string(&path).ok()?.trim().parse().ok().map(|now: u32| now >= kib);
    is_enough() == Some(true) || fs::write(&path, kib.to_string()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request<'a>(mountpoint: &'a Path, source: &'a str) -> MountRequest<'a> {
        MountRequest { mountpoint, source, access: Access::Owner, flags: DEFAULT_FLAGS }
    }

    /// A directory that is a clean mountpoint again when the test ends, however it ends.
    struct Mountpoint {
        path: PathBuf,
        /// Removed after `drop` below has unmounted.
        _dir: tempfile::TempDir,
    }

    impl Mountpoint {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().canonicalize().unwrap();
            Self { path, _dir: dir }
        }
    }

    impl Drop for Mountpoint {
        fn drop(&mut self) {
            while entry_at(&self.path).is_some() && unmount(&self.path, Unmount::Lazy).is_ok() {}
        }
    }

    #[test]
    fn commas_and_backslashes_are_escaped_for_the_helper() {
        let request = request(Path::new("/m"), r"/srv/a,b\c.img");
        assert_eq!(
            helper_options(&request),
            r"fsname=/srv/a\,b\\c.img,subtype=cowslip,default_permissions,nosuid,nodev"
        );
    }

    #[test]
    fn option_words_set_and_clear_flags() {
        let flags = with_option(DEFAULT_FLAGS, "ro").unwrap();
        assert!(flags.contains(MountFlags::RDONLY | MountFlags::NODEV));
        assert_eq!(with_option(flags, "rw"), Some(DEFAULT_FLAGS));
        assert_eq!(with_option(flags, "out.zst"), None);
    }

    #[test]
    fn what_the_helper_says_becomes_an_errno() {
        let errno = |said: &str| unmount_error(said.into()).raw_os_error();
        let busy = "fusermount3: failed to unmount /m: Device or resource busy";
        assert_eq!(errno(busy), Some(libc::EBUSY));
        assert_eq!(errno("fusermount3: entry for /m not found in /etc/mtab"), Some(libc::EPERM));
        assert_eq!(errno("fusermount3: something new"), None);
    }

    #[test]
    fn a_mountpoint_must_be_an_empty_directory() {
        let dir = tempfile::tempdir().unwrap();
        let said = |path: &Path, contents| match prepare_mountpoint(path, contents) {
            Ok(prepared) => format!("{}", prepared.cleared),
            Err(error) => error.to_string().replace(dir.path().to_str().unwrap(), "DIR"),
        };
        assert_eq!(
            said(&dir.path().join("m"), Contents::None),
            "mountpoint 'DIR/m' does not exist: create it with mkdir"
        );
        assert_eq!(said(dir.path(), Contents::None), "0");
        let file = dir.path().join("f");
        fs::write(&file, "x").unwrap();
        assert!(said(&file, Contents::Any).contains("'DIR/f' is not a directory"));
        assert!(said(&file.join("m"), Contents::Any).contains("'DIR/f/m' is not a directory"));
        assert!(said(dir.path(), Contents::None).contains("add -o nonempty"));
        assert_eq!(said(dir.path(), Contents::Any), "0");
    }

    #[test]
    fn a_mount_shows_its_type_and_source_and_dies_with_its_connection() {
        let at = Mountpoint::new();
        let source = r"/srv/a,b\c d.img";
        assert_eq!(condition(&at.path), Condition::NotMounted);
        let connection = mount(&request(&at.path, source)).unwrap();
        let entry = entry_at(&at.path).unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.to_str()), (FSTYPE, Some(source)));
        assert!(cowslip_mounts().contains(&entry));
        let inside = enclosing(&at.path.join("vm1.img")).unwrap();
        assert_eq!((inside.mount.dev, inside.inner), (entry.dev, "vm1.img".into()));
        drop(connection);
        assert_eq!(condition(&at.path), Condition::Dead);
        unmount(&at.path, Unmount::Plain).unwrap();
        assert_eq!(condition(&at.path), Condition::NotMounted);
        assert_eq!(
            unmount(&at.path, Unmount::Plain).unwrap_err().raw_os_error(),
            Some(libc::EINVAL)
        );
    }

    #[test]
    fn the_helper_mounts_the_same() {
        let at = Mountpoint::new();
        let source = r"/srv/a,b\c d.img";
        let connection = mount_by_helper(&request(&at.path, source)).unwrap();
        let entry = entry_at(&at.path).unwrap();
        assert_eq!((entry.fstype.as_str(), entry.source.to_str()), (FSTYPE, Some(source)));
        assert!(rustix::io::fcntl_getfd(&connection).unwrap().contains(FdFlags::CLOEXEC));
    }

    #[test]
    fn what_the_helper_refuses_is_one_line() {
        let request = request(Path::new("/nowhere/at/all"), "s");
        let error = mount_by_helper(&request).unwrap_err().to_string();
        assert!(error.starts_with("cannot mount on '/nowhere/at/all': fusermount3: "), "{error}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn dead_mounts_are_cleared_however_many_lie_there() {
        let at = Mountpoint::new();
        // The helper looks into what lies there, as root, so a user's mounts never lie in a stack.
        let stacked = match rustix::process::geteuid().is_root() {
            true => 3,
            false => 1,
        };
        let connections: Vec<_> =
            (0..stacked).map(|_| mount(&request(&at.path, "s")).unwrap()).collect();
        drop(connections);
        let prepared = prepare_mountpoint(&at.path, Contents::None).unwrap();
        assert_eq!(prepared, Prepared { mountpoint: at.path.clone(), cleared: stacked });
        assert_eq!(entry_at(&at.path), None);
    }

    #[test]
    fn a_mount_that_does_not_answer_counts_as_alive() {
        let at = Mountpoint::new();
        let _connection = mount(&request(&at.path, "s")).unwrap();
        // Refused as one that lives: it is not cleared away.
        let error = prepare_mountpoint(&at.path, Contents::None).unwrap_err();
        assert!(matches!(error, MountError::Already(_)), "{error}");
    }
}
