//! Byte locks on a base, which decide who may read and write it at the same time.
//!
//! Two protocols are followed. Both use open-file-description locks, which belong to our open file
//! and end with it, whichever process forks or closes a descriptor.
//!
//! cowslip's own: two bytes far past any data. A reader of a base holds the first; a writer
//! (`mode=rw`, commit, a stream or `recv` to a block device) holds the second as well. Readers share
//! the base; a writer is alone. A third byte is held by daemons on the file that they log to, which is
//! no base.
//!
//! qemu's (`block/file-posix.c`, `raw_apply_lock_bytes` and `raw_check_lock_bytes`): for each
//! permission bit, byte `100 + bit` says "I use this", byte `200 + bit` says "nobody else may".
//!
//! ```text
//!                     read   write  (unchanged)  resize
//!   "I use"           100    101    102          103
//!   "nobody may"      200    201    202          203
//! ```
//!
//! In both, all locks are shared ones, set first and tested afterwards: of two processes that come at
//! the same moment both may be refused, but never are both let in. (flock would lose its shared lock
//! when an upgrade fails.)

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::OFlags;

use super::BaseAccess;
use crate::config::Locking;
use crate::confined::PathHandle;

/// The reason why a base cannot be locked; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// qemu or one of its tools uses the file in a way that excludes ours.
    #[error(
        "'{}' is in use by a running VM or qemu tool (qemu's image lock): stop it, or add ,lock=off",
        .0.display()
    )]
    UsedByQemu(PathBuf),
    /// qemu or one of its tools uses the device that is to be overwritten.
    #[error(
        "'{}' is in use by a running VM or qemu tool (qemu's image lock): stop it first",
        .0.display()
    )]
    OutputUsedByQemu(PathBuf),
    /// A disk, a stream or a `recv` of ours writes to the file.
    #[error(
        "'{}' is being written by another cowslip mount or recv: end that one first",
        .0.display()
    )]
    HasWriter(PathBuf),
    /// Other disks of ours read from the file that is to be written.
    #[error(
        "'{}' cannot be written while another cowslip disk uses it as its base: unmount or remove that one first",
        .0.display()
    )]
    HasReaders(PathBuf),
    /// A daemon logs to the file.
    #[error("'{}' is the log of a cowslip mount: name another file", .0.display())]
    IsLog(PathBuf),
    /// The file is a disk's image, and its name was to be given to another file.
    #[error("'{}' is in use as the image of a disk: name another file", .0.display())]
    InUse(PathBuf),
    /// The host returned an error.
    #[error("cannot lock '{}': {error}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's error.
        error: io::Error,
    },
}

/// The letters `cowslip` as a number, 6.2 EiB: past the end of any real image, and no place another
/// program would choose. (A byte lock keeps nobody from reading or writing that byte.)
const OWN_LOCK_BASE: i64 = 0x636f_7773_6c69_7000;
/// The byte that every user of the file holds.
const USER_BYTE: i64 = OWN_LOCK_BASE;
/// The byte that the writer of the file holds.
const WRITER_BYTE: i64 = OWN_LOCK_BASE + 1;
/// The byte that every daemon holds that logs to the file.
const LOG_BYTE: i64 = OWN_LOCK_BASE + 2;

/// qemu's permission bits, as byte offsets from [`QEMU_PERM_BASE`] and [`QEMU_SHARED_BASE`].
const PERM_READ: i64 = 0;
const PERM_WRITE: i64 = 1;
const PERM_RESIZE: i64 = 3;
/// `RAW_LOCK_PERM_BASE`.
const QEMU_PERM_BASE: i64 = 100;
/// `RAW_LOCK_SHARED_BASE`.
const QEMU_SHARED_BASE: i64 = 200;

/// Locks `file` for `access`, until [`release`] or the end of this open file. A file locked for
/// reading can be locked for writing afterwards, as commit does; [`downgrade`] undoes that.
///
/// On an error some locks may be held: downgrade or release. A host file system that has no locks
/// is logged and let through.
///
/// # Errors
/// [`LockError`]: somebody holds the file, or the host's error.
pub fn lock(
    file: &File,
    path: &Path,
    access: BaseAccess,
    locking: Locking,
) -> Result<(), LockError> {
    match try_lock(file, path, access, locking) {
        Err(LockError::Io { error, .. }) if is_unsupported(&error) => {
            log::warn!(
                "'{}': its file system has no locks ({error}): nothing keeps others from writing it",
                path.display()
            );
            Ok(())
        }
        answer => answer,
    }
}

/// The lock of the only writer of a device, until it is dropped.
#[derive(Debug)]
pub struct OutputLock(Arc<File>);

impl OutputLock {
    /// Locks `device`, which is about to be overwritten, as [`lock`] does for [`BaseAccess::Write`]:
    /// no disk has it as its base meanwhile. `device` must be open for reading, too.
    ///
    /// # Errors
    /// [`LockError`]: somebody uses the device, or the host's error.
    pub fn take(device: &Arc<File>, path: &Path) -> Result<Self, LockError> {
        // Made first: what an attempt that fails has locked is released, too.
        let this = Self(Arc::clone(device));
        match lock(device, path, BaseAccess::Write, Locking::Qemu) {
            Err(LockError::UsedByQemu(path)) => Err(LockError::OutputUsedByQemu(path)),
            taken => taken.map(|()| this),
        }
    }
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        release(&self.0);
    }
}

/// Releases the locks that [`BaseAccess::Write`] holds and [`BaseAccess::Read`] does not.
pub fn downgrade(file: &File) {
    for byte in [QEMU_PERM_BASE + PERM_WRITE, QEMU_PERM_BASE + PERM_RESIZE, WRITER_BYTE] {
        unlock(file, byte, 1);
    }
}

/// Releases all locks. Closing alone is not enough at once: a child that was forked a moment
/// ago shares the open file until it executes its program.
pub fn release(file: &File) {
    unlock(file, QEMU_PERM_BASE, QEMU_SHARED_BASE + PERM_RESIZE + 1 - QEMU_PERM_BASE);
    unlock(file, USER_BYTE, 1);
    unlock(file, WRITER_BYTE, 1);
}

/// Unlocks `len` bytes from `start` on; can fail only where locking did.
fn unlock(file: &File, start: i64, len: i64) {
    let mut request = byte_lock(libc::F_UNLCK, start);
    request.l_len = len;
    if let Err(error) = ofd_lock(file, libc::F_OFD_SETLK, &mut request) {
        log::debug!("unlocking bytes {start}+{len} of a base: {error}");
    }
}

fn try_lock(
    file: &File,
    path: &Path,
    access: BaseAccess,
    locking: Locking,
) -> Result<(), LockError> {
    let host_error = |error| LockError::Io { path: path.to_owned(), error };
    // Ours before qemu's: a writer of ours holds qemu's bytes too, and should be named as ours.
    if !try_lock_shared(file, own_lock_bytes(access)).map_err(host_error)? {
        return Err(LockError::HasWriter(path.to_owned()));
    }
    if is_held(file, WRITER_BYTE).map_err(host_error)? {
        return Err(LockError::HasWriter(path.to_owned()));
    }
    if is_held(file, LOG_BYTE).map_err(host_error)? {
        return Err(LockError::IsLog(path.to_owned()));
    }
    if access == BaseAccess::Write && is_held(file, USER_BYTE).map_err(host_error)? {
        return Err(LockError::HasReaders(path.to_owned()));
    }
    if locking == Locking::Off {
        return Ok(());
    }
    let used = qemu_perms(access);
    // A change by another process would make the bytes that we have returned wrong.
    let forbidden = [PERM_WRITE, PERM_RESIZE];
    let hold = used.iter().map(|bit| QEMU_PERM_BASE + bit);
    let hold = hold.chain(forbidden.iter().map(|bit| QEMU_SHARED_BASE + bit));
    if !try_lock_shared(file, hold).map_err(host_error)? {
        return Err(LockError::UsedByQemu(path.to_owned()));
    }
    let test = used.iter().map(|bit| QEMU_SHARED_BASE + bit);
    for byte in test.chain(forbidden.iter().map(|bit| QEMU_PERM_BASE + bit)) {
        if is_held(file, byte).map_err(host_error)? {
            return Err(LockError::UsedByQemu(path.to_owned()));
        }
    }
    Ok(())
}

/// Refuses a file, about to be replaced under its name, that a disk of cowslip's, a virtual machine or
/// a qemu tool uses as its image, or that a daemon logs to. A file that this user may not read is let
/// through, and so is one on a file system without locks.
///
/// # Errors
/// [`LockError::InUse`], [`LockError::IsLog`].
pub fn check_unused(located: &PathHandle, path: &Path) -> Result<(), LockError> {
    if !located.metadata().is_file() {
        return Ok(());
    }
    let Ok(file) = located.open(OFlags::RDONLY) else { return Ok(()) };
    check_no_image(&file, path)?;
    match is_held(&file, LOG_BYTE).unwrap_or(false) {
        true => Err(LockError::IsLog(path.to_owned())),
        false => Ok(()),
    }
}

/// Locks `file`, to which this process is about to log, until the end of this open file: nobody takes
/// it as the image of a disk. Several may log to one file. On a file system without locks nothing is
/// locked, nor where this user may only write.
///
/// # Errors
/// [`LockError::InUse`] when it is the image of a disk.
pub fn lock_log(file: &File, path: &Path) -> Result<(), LockError> {
    // As for images, set first and tested afterwards.
    let _ = try_lock_shared(file, std::iter::once(LOG_BYTE));
    check_no_image(file, path)
}

fn check_no_image(file: &File, path: &Path) -> Result<(), LockError> {
    let own = [USER_BYTE, WRITER_BYTE].into_iter();
    let mut bytes = own.chain((PERM_READ..=PERM_RESIZE).map(|bit| QEMU_PERM_BASE + bit));
    match bytes.any(|byte| is_held(file, byte).unwrap_or(false)) {
        true => Err(LockError::InUse(path.to_owned())),
        false => Ok(()),
    }
}

fn own_lock_bytes(access: BaseAccess) -> impl Iterator<Item = i64> {
    let bytes: &[i64] = match access {
        BaseAccess::Read => &[USER_BYTE],
        BaseAccess::Write => &[USER_BYTE, WRITER_BYTE],
    };
    bytes.iter().copied()
}

fn qemu_perms(access: BaseAccess) -> &'static [i64] {
    match access {
        BaseAccess::Read => &[PERM_READ],
        BaseAccess::Write => &[PERM_READ, PERM_WRITE, PERM_RESIZE],
    }
}

/// Takes a shared lock on each of `bytes`; `false` when another holds one of them exclusively.
fn try_lock_shared(file: &File, bytes: impl Iterator<Item = i64>) -> io::Result<bool> {
    for byte in bytes {
        let mut request = byte_lock(libc::F_RDLCK, byte);
        match ofd_lock(file, libc::F_OFD_SETLK, &mut request) {
            Ok(()) => {}
            Err(e) if matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => {
                return Ok(false);
            }
            Err(e) => return Err(e),
        }
    }
    Ok(true)
}

/// Whether anybody but this open file holds a lock on `byte`.
fn is_held(file: &File, byte: i64) -> io::Result<bool> {
    let mut request = byte_lock(libc::F_WRLCK, byte);
    ofd_lock(file, libc::F_OFD_GETLK, &mut request)?;
    Ok(i32::from(request.l_type) != libc::F_UNLCK)
}

fn byte_lock(kind: libc::c_int, byte: i64) -> libc::flock {
    // SAFETY: flock is plain integers; all zero is a valid value, and the kernel wants l_pid 0.
    let mut request: libc::flock = unsafe { std::mem::zeroed() };
    #[allow(clippy::cast_possible_truncation)] // The kinds and SEEK_SET are below 3.
    {
        request.l_type = kind as libc::c_short;
        request.l_whence = libc::SEEK_SET as libc::c_short;
    }
    request.l_start = byte;
    request.l_len = 1;
    request
}

fn ofd_lock(file: &File, command: libc::c_int, request: &mut libc::flock) -> io::Result<()> {
    loop {
        // SAFETY: the descriptor is open, and `request` is a valid flock for the call's length.
        if unsafe { libc::fcntl(file.as_raw_fd(), command, request as *mut libc::flock) } == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOLCK | libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS)
    )
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Child, Command, Stdio};

    use super::*;

    fn image() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.img");
        File::create(&path).unwrap().set_len(1 << 20).unwrap();
        (dir, path)
    }

    fn open(path: &Path, access: BaseAccess) -> File {
        let write = access == BaseAccess::Write;
        File::options().read(true).write(write).open(path).unwrap()
    }

    /// A locked file that gives its locks back, whoever forks meanwhile.
    #[derive(Debug)]
    struct Locked(File);

    impl Drop for Locked {
        fn drop(&mut self) {
            release(&self.0);
        }
    }

    fn take(path: &Path, access: BaseAccess, locking: Locking) -> Result<Locked, LockError> {
        let file = Locked(open(path, access));
        lock(&file.0, path, access, locking).map(|()| file)
    }

    /// A qemu-io that has the image open until it is dropped.
    struct QemuIo(Child);

    impl QemuIo {
        fn start(path: &Path, flags: &[&str]) -> Self {
            // Line by line, or its first line comes when it ends.
            let mut child = Command::new("stdbuf")
                .args(["-oL", "qemu-io"])
                .args(flags)
                .args(["-f", "raw", "-c", "read 0 512", "-c", "sleep 60000"])
                .arg(path)
                .stdout(Stdio::piped())
                .stderr(Stdio::inherit())
                .spawn()
                .expect("qemu-io (qemu-utils) is needed for this test");
            // Its answer to the read says that the locks are held.
            let mut line = String::new();
            let mut out = BufReader::new(child.stdout.take().unwrap());
            out.read_line(&mut line).unwrap();
            assert!(line.starts_with("read 512"), "{line}");
            child.stdout = Some(out.into_inner());
            Self(child)
        }
    }

    impl Drop for QemuIo {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    fn qemu_io(path: &Path, flags: &[&str], command: &str) -> (bool, String) {
        let mut child = Command::new("qemu-io")
            .args(flags)
            .args(["-f", "raw", "-c", command])
            .arg(path)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = String::new();
        child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        (child.wait().unwrap().success(), said)
    }

    #[test]
    fn users_share_and_a_writer_is_alone() {
        let (_dir, path) = image();
        let one = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        let two = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        let refused = take(&path, BaseAccess::Write, Locking::Qemu).unwrap_err();
        assert!(matches!(refused, LockError::HasReaders(_)), "{refused}");
        drop((one, two));

        let writer = take(&path, BaseAccess::Write, Locking::Qemu).unwrap();
        for access in [BaseAccess::Read, BaseAccess::Write] {
            let refused = take(&path, access, Locking::Qemu).unwrap_err();
            assert!(matches!(refused, LockError::HasWriter(_)), "{refused}");
        }
        drop(writer);
        take(&path, BaseAccess::Write, Locking::Qemu).unwrap();
    }

    #[test]
    fn a_reader_becomes_the_writer_only_when_it_is_alone() {
        let (_dir, path) = image();
        let one = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        let two = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        let upgrade = || lock(&one.0, &path, BaseAccess::Write, Locking::Qemu);
        assert!(matches!(upgrade(), Err(LockError::HasReaders(_))));
        downgrade(&one.0);
        drop(two);
        upgrade().unwrap();
        take(&path, BaseAccess::Read, Locking::Qemu).unwrap_err();
        downgrade(&one.0);
        take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
    }

    #[test]
    fn an_output_is_alone_and_ends_with_its_lock() {
        let (_dir, path) = image();
        let file = Arc::new(open(&path, BaseAccess::Write));
        let reader = take(&path, BaseAccess::Read, Locking::Off).unwrap();
        let refused = OutputLock::take(&file, &path).unwrap_err();
        assert!(matches!(refused, LockError::HasReaders(_)), "{refused}");
        drop(reader);
        // The attempt has left nothing.
        drop(take(&path, BaseAccess::Write, Locking::Qemu).unwrap());
        let output = OutputLock::take(&file, &path).unwrap();
        for access in [BaseAccess::Read, BaseAccess::Write] {
            let refused = take(&path, access, Locking::Off).unwrap_err();
            assert!(matches!(refused, LockError::HasWriter(_)), "{refused}");
        }
        // Although the file stays open.
        drop(output);
        drop(take(&path, BaseAccess::Write, Locking::Qemu).unwrap());
        let _qemu = QemuIo::start(&path, &[]);
        let refused = OutputLock::take(&file, &path).unwrap_err().to_string();
        assert!(refused.ends_with("(qemu's image lock): stop it first"), "{refused}");
    }

    #[test]
    fn lock_off_still_keeps_our_own_mounts_apart() {
        let (_dir, path) = image();
        let _writer = take(&path, BaseAccess::Write, Locking::Off).unwrap();
        let refused = take(&path, BaseAccess::Read, Locking::Off).unwrap_err();
        assert_eq!(
            refused.to_string(),
            format!(
                "'{}' is being written by another cowslip mount or recv: end that one first",
                path.display()
            )
        );
    }

    #[test]
    fn a_refused_writer_leaves_no_lock_behind() {
        let (_dir, path) = image();
        let reader = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        take(&path, BaseAccess::Write, Locking::Qemu).unwrap_err();
        take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        drop(reader);
    }

    #[test]
    fn a_running_qemu_that_writes_is_noticed_unless_lock_off() {
        let (_dir, path) = image();
        let _qemu = QemuIo::start(&path, &[]);
        for access in [BaseAccess::Read, BaseAccess::Write] {
            let refused = take(&path, access, Locking::Qemu).unwrap_err();
            assert_eq!(
                refused.to_string(),
                format!(
                    "'{}' is in use by a running VM or qemu tool (qemu's image lock): stop it, or add ,lock=off",
                    path.display()
                )
            );
        }
        take(&path, BaseAccess::Read, Locking::Off).unwrap();
    }

    #[test]
    fn a_running_qemu_that_reads_shares_with_readers() {
        let (_dir, path) = image();
        let _qemu = QemuIo::start(&path, &["-r"]);
        take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
    }

    #[test]
    fn qemu_may_read_but_not_write_while_we_read() {
        let (_dir, path) = image();
        let _ours = take(&path, BaseAccess::Read, Locking::Qemu).unwrap();
        let (ok, said) = qemu_io(&path, &[], "write 0 512");
        assert!(!ok && said.contains("\"write\" lock"), "{said}");
        let (ok, said) = qemu_io(&path, &["-r"], "read 0 512");
        assert!(ok, "{said}");
    }

    #[test]
    fn qemu_may_not_write_while_we_write() {
        let (_dir, path) = image();
        let _ours = take(&path, BaseAccess::Write, Locking::Qemu).unwrap();
        let (ok, said) = qemu_io(&path, &[], "write 0 512");
        assert!(!ok && said.contains("\"write\" lock"), "{said}");
    }
}
