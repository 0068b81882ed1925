//! A client for the control files in a mount's `.cowslip` directory.
//!
//! ```text
//!   a command ---> Endpoint          which mount or disk; requests and documents as types
//!                     |
//!                     v
//!                  answer            lines of JSON, none without end
//!                     |
//!                     v
//!                  MountReader       a thread and a time limit
//!                     |
//!                     v
//!                  ConfinedMount     no link, nothing outside the mount, nobody else's mount
//! ```

mod answer;
mod confined_mount;
mod error;
mod reader;

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::answer::{AnswerError, RefusalKind};
pub(super) use self::answer::{read_answer, read_document};
use self::confined_mount::ConfinedMount;
use self::error::AskAbort;
pub(super) use self::error::AskError;
use self::reader::{MountReader, with_timeout};
use crate::confined::MountIds;
use crate::control::api::{DiskStatus, Progress, encode_request};
use crate::disk::split_name;
use crate::host::mountinfo::{self, MountEntry};
use crate::mount::kernel::{self, MountHandle};

/// Time limit for a whole document: a mount that sends a byte now and then counts as hanging too.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Checks that a call on `path` returns: one into a mount whose daemon does not answer would hang, and
/// could not be interrupted. Every other error is left to whoever opens `path`.
///
/// # Errors
/// [`AskError::Silent`].
pub(super) fn check_answers(path: &Path) -> Result<(), AskError> {
    kernel::check_answers(path).map_err(|silent| AskError::Silent(silent.0))
}

/// A mount or a disk in a mount, to which requests are sent.
///
/// A disk is the one that has the name when it is first asked, even if another disk takes the name
/// later: a request that reaches another disk is refused as [`AskError::Changed`].
#[derive(Clone, Debug)]
pub(super) struct Endpoint {
    /// The mountpoint, as in mountinfo.
    pub(super) mountpoint: PathBuf,
    /// Name of the disk; `None` for the mount as a whole.
    pub(super) disk: Option<String>,
    /// The mount entry, the ids of the mount and a path to it, if the mount is held open.
    handle: Option<(MountEntry, MountIds, PathBuf)>,
    /// The path as the caller gave it.
    path: PathBuf,
    /// The inode number of the disk's file, once known.
    inode: OnceCell<u64>,
}

impl Endpoint {
    /// Creates the endpoint of the mount at `mountpoint`.
    pub(super) fn mount(mountpoint: &Path) -> Self {
        Self::new(mountpoint, None, mountpoint)
    }

    /// Creates the endpoint of a mount, valid while `handle` is held.
    pub(super) fn of_handle(handle: &MountHandle) -> Self {
        let access = Some((handle.entry().clone(), handle.ids(), handle.access_path()));
        Self { handle: access, ..Self::mount(handle.mountpoint()) }
    }

    fn new(mountpoint: &Path, disk: Option<String>, path: &Path) -> Self {
        let (mountpoint, path) = (mountpoint.to_owned(), path.to_owned());
        Self { mountpoint, disk, handle: None, path, inode: OnceCell::new() }
    }

    /// Creates the endpoint of the disk `name` in the mount.
    fn named_disk(mountpoint: &Path, name: &str) -> Self {
        Self::new(mountpoint, Some(name.to_owned()), &mountpoint.join(name))
    }

    /// Creates the endpoint for `path`, a mountpoint or a file in a mount, without a call into the
    /// mount.
    ///
    /// # Errors
    /// A line for the user when `path` is in no cowslip mount, or below a disk.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        let Some(found) = mountinfo::enclosing_mount(path) else {
            anyhow::bail!(
                "'{}' is not in a cowslip mount: cowslip status lists them",
                path.display()
            );
        };
        let mountpoint = found.mount.mountpoint;
        let mut names = found.inner.iter();
        match (names.next(), names.next()) {
            (None, _) => Ok(Self::mount(&mountpoint)),
            (Some(name), None) => {
                Ok(Self::new(&mountpoint, Some(name.to_string_lossy().into_owned()), path))
            }
            (Some(_), Some(_)) => anyhow::bail!(
                "'{}' is no disk of the mount at '{}': name a file right in it",
                path.display(),
                mountpoint.display()
            ),
        }
    }

    /// Creates the endpoint for a mounted file, like [`of`](Self::of).
    ///
    /// # Errors
    /// A line for the user, also when `path` is a mountpoint.
    pub(super) fn of_disk(path: &Path) -> anyhow::Result<Self> {
        let endpoint = Self::of(path)?;
        if endpoint.disk.is_none() {
            anyhow::bail!(
                "'{path}' is a mountpoint: name a disk in it, '{path}/NAME'",
                path = path.display()
            );
        }
        Ok(endpoint)
    }

    /// Returns the way into the mount, if the mount can be trusted.
    fn confined(&self) -> io::Result<ConfinedMount> {
        match &self.handle {
            Some((entry, ids, path)) => ConfinedMount::of_handle(entry, *ids, path.clone()),
            None => ConfinedMount::at(&self.mountpoint),
        }
    }

    /// Returns the path components of the directory of control files.
    fn control_path(&self) -> Vec<String> {
        let names = [Some(".cowslip"), self.disk.as_deref()];
        names.into_iter().flatten().map(str::to_owned).collect()
    }

    /// Returns the inode number of the disk's file, which identifies the disk; `None` for a mount.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn inode(&self) -> Result<Option<u64>, AskError> {
        if self.disk.is_none() {
            return Ok(None);
        }
        if let Some(inode) = self.inode.get() {
            return Ok(Some(*inode));
        }
        // Use the caller's path: a bind-mounted file may have another name in the mount by now.
        let path = self.path.clone();
        let find = move || mountinfo::open_resolved(&mountinfo::resolve(&path)?)?.metadata();
        let found = self.confined().and_then(|_| with_timeout(find));
        let inode = found.map_err(|error| self.ask_error(error))?.ino();
        Ok(Some(*self.inode.get_or_init(|| inode)))
    }

    /// Converts an error of a call into the mount into an error for the user.
    pub(super) fn ask_error(&self, error: io::Error) -> AskError {
        let mountpoint = self.mountpoint.clone();
        let errno = Errno::from_io_error(&error);
        let abort = error.get_ref().and_then(|inner| inner.downcast_ref::<AskAbort>());
        match abort {
            Some(AskAbort::Foreign(uid)) => {
                return AskError::Foreign { path: mountpoint, uid: *uid };
            }
            Some(AskAbort::Interrupted) => return AskError::Interrupted,
            None => {}
        }
        match (errno, &self.disk) {
            _ if error.kind() == io::ErrorKind::TimedOut => AskError::Silent(mountpoint),
            (Some(Errno::NOTCONN | Errno::CONNABORTED), _) => AskError::Dead(mountpoint),
            (Some(Errno::ACCESS | Errno::PERM), _) => AskError::Denied(mountpoint),
            (Some(Errno::ROFS), _) => AskError::ReadOnly(mountpoint),
            (Some(Errno::STALE), Some(_)) => AskError::Changed(self.path.clone()),
            (Some(Errno::AGAIN), _) => AskError::Full(mountpoint),
            (Some(Errno::NOENT | Errno::NOTDIR), Some(disk)) => self
                .partition_error()
                .unwrap_or(AskError::NoDisk { mountpoint, disk: disk.clone() }),
            _ => AskError::Host { mountpoint, error },
        }
    }

    /// Returns the error to report if the name belongs to a partition of a disk.
    pub(super) fn partition_error(&self) -> Option<AskError> {
        let part = self.disk.as_deref()?;
        let (disk, number) = split_name(part)?;
        let whole = Self::named_disk(&self.mountpoint, disk);
        let partitions = whole.disk_status().ok()?.partitions;
        partitions.iter().any(|partition| partition.number == number).then(|| AskError::Partition {
            mountpoint: whole.mountpoint,
            part: part.to_owned(),
            disk: disk.to_owned(),
            number,
        })
    }

    /// Starts to read the control file `file`. Convert an error of a read with
    /// [`ask_error`](Self::ask_error).
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn open(&self, file: &'static str) -> Result<MountReader, AskError> {
        let inode = self.inode()?;
        Ok(MountReader::start(self.confined(), self.control_path(), file, None, inode))
    }

    /// Reads the whole control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn read(&self, file: &'static str) -> Result<Vec<u8>, AskError> {
        let reader = self.open(file)?.with_deadline(DOCUMENT_TIMEOUT);
        answer::read_limited(reader).map_err(|error| self.ask_error(error))
    }

    /// Reads the status document of the mount or the disk as one of the types of
    /// [`api`](crate::control::api), or as JSON with all its keys.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn status<T: DeserializeOwned>(&self) -> Result<T, AskError> {
        self.status_within(DOCUMENT_TIMEOUT)
    }

    /// Reads the status document like [`status`](Self::status), within `time`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn status_within<T: DeserializeOwned>(&self, time: Duration) -> Result<T, AskError> {
        let reader = self.open("status")?.with_deadline(time.min(DOCUMENT_TIMEOUT));
        answer::read_document(reader).map_err(|error| self.ask_error(error))
    }

    /// Reads the status of the disk.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn disk_status(&self) -> Result<DiskStatus, AskError> {
        self.status()
    }

    /// Returns the statuses of those disks in the mount that the caller may inspect, and the number
    /// of all disks.
    ///
    /// # Errors
    /// [`AskError`] when not even the names of the disks can be listed.
    pub(super) fn visible_disks(&self) -> Result<(Vec<Value>, usize), AskError> {
        let names = self.disk_names().map_err(|error| self.ask_error(error))?;
        let status = |name: &String| Self::named_disk(&self.mountpoint, name).status().ok();
        Ok((names.iter().filter_map(status).collect(), names.len()))
    }

    /// Returns the names of the disks in the mount.
    fn disk_names(&self) -> io::Result<Vec<String>> {
        let mount = self.confined()?;
        with_timeout(move || mount.list_dirs(".cowslip"))
    }

    /// Opens the file `name`, as named by the mount, in the directory `dir` of the disk's control
    /// files.
    ///
    /// # Errors
    /// The mount's errno; `InvalidInput` for a name that is no plain one or leads elsewhere;
    /// `ESTALE` when the disk's name now belongs to another disk.
    pub(super) fn open_named(&self, dir: &str, name: &str) -> io::Result<File> {
        let mount = self.confined()?;
        let control = mount.open_control_dir(&self.control_path(), self.inode.get().copied())?;
        mount.open_in(&control, &[dir, name], OFlags::RDONLY)
    }

    /// Sends `request` and waits for the answer; `on_progress` receives the progress reports before
    /// it.
    ///
    /// # Errors
    /// [`AskError`]; a refusal by the mount is [`AskError::Refused`] or [`AskError::Busy`].
    pub(super) fn ask<T: DeserializeOwned>(
        &self,
        request: &impl Serialize,
        on_progress: impl FnMut(Progress),
    ) -> Result<T, AskError> {
        self.ask_until(&Arc::default(), request, on_progress)
    }

    /// Sends `request` like [`ask`](Self::ask), but stops waiting when `stop` is set, which the
    /// daemon notices within a second.
    ///
    /// # Errors
    /// The errors of [`ask`](Self::ask), and [`AskError::Interrupted`].
    pub(super) fn ask_until<T: DeserializeOwned>(
        &self,
        stop: &Arc<AtomicBool>,
        request: &impl Serialize,
        on_progress: impl FnMut(Progress),
    ) -> Result<T, AskError> {
        let inode = self.inode()?;
        let request = encode_request(request, inode);
        let request = request.map_err(|error| self.ask_error(error.into()))?;
        let (mount, dir) = (self.confined(), self.control_path());
        let reader = MountReader::start(mount, dir, "ctl", Some(request), inode).with_stop(stop);
        // Read to the end: an open control file would keep the mount busy.
        let answer = answer::read_answer(BufReader::new(reader), on_progress);
        answer.map_err(|error| match error {
            AnswerError::Refused { line, kind: RefusalKind::Busy } => AskError::Busy(line),
            AnswerError::Refused { kind: RefusalKind::Stale, .. } if self.disk.is_some() => {
                self.ask_error(Errno::STALE.into())
            }
            AnswerError::Refused { line, .. } => AskError::Refused(line),
            AnswerError::Broken(error) => self.ask_error(error),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ask_error_is_one_line() {
        let endpoint = Endpoint::named_disk(Path::new("/m"), "vm.img");
        let line = |error: io::Error| endpoint.ask_error(error).to_string();
        let none = line(Errno::NOENT.into());
        assert_eq!(
            none,
            "there is no disk 'vm.img' in the mount at '/m': cowslip status lists them"
        );
        let silent = line(io::ErrorKind::TimedOut.into());
        assert!(silent.contains("does not answer"), "{silent}");
        let dead = line(Errno::NOTCONN.into());
        assert!(dead.contains("is dead: cowslip umount '"), "{dead}");
        let foreign = line(io::Error::other(AskAbort::Foreign(7)));
        assert!(foreign.contains("another user's (uid 7)"), "{foreign}");
    }

    #[test]
    fn directory_that_is_no_mount_is_not_asked() {
        let dir = tempfile::tempdir().unwrap();
        let line = Endpoint::mount(dir.path()).status::<Value>().unwrap_err().to_string();
        assert!(line.contains("no cowslip mount any more"), "{line}");
    }

    #[test]
    fn path_outside_every_mount_is_refused() {
        let line = Endpoint::of(Path::new("/proc")).unwrap_err().to_string();
        assert!(line.starts_with("'/proc' is not in a cowslip mount"), "{line}");
    }
}
