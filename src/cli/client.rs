//! Talking to a mount through the files in its `.cowslip` directory.
//!
//! Any call into a mount may hang with it, and such a call cannot be interrupted. So each is made
//! on a thread of its own, which hands on what it reads piece by piece, and whoever waits for the
//! next piece waits [`PATIENCE`] at most. A daemon at work shows a sign of life every second.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use rustix::fs::{Mode, OFlags, openat};
use rustix::io::Errno;
use serde_json::Value;

use super::table::printable;
use crate::disk::split_name;
use crate::mount::kernel;

/// How long a mount may stay silent before it counts as hanging.
const PATIENCE: Duration = Duration::from_secs(10);

/// What is read at a time: the kernel's own limit for one direct read is a multiple of it.
const PIECE: usize = 128 << 10;

/// Why a mount did not answer. One line each.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// Not in time.
    #[error("the mount at '{path}' does not answer: cowslip umount -l '{path}' ends it",
        path = .0.display())]
    Silent(PathBuf),
    /// Its daemon is gone.
    #[error("the mount at '{path}' is dead: cowslip umount '{path}' clears it",
        path = .0.display())]
    Dead(PathBuf),
    /// It lets only its owner ask.
    #[error("the mount at '{}' does not let you ask: do it as the user who mounted it",
        .0.display())]
    Denied(PathBuf),
    /// It takes no requests (`-o ro`).
    #[error("the mount at '{}' is read-only: nothing in it has changed or can be",
        .0.display())]
    ReadOnly(PathBuf),
    /// There is no such disk.
    #[error("there is no disk '{disk}' in the mount at '{}': cowslip status lists them",
        mountpoint.display())]
    NoDisk {
        /// The mount.
        mountpoint: PathBuf,
        /// The name that was asked for.
        disk: String,
    },
    /// It is a part of a disk.
    #[error("'{part}' is partition {number} of the disk '{disk}' and no disk: name '{}'",
        mountpoint.join(disk).display())]
    Part {
        /// The mount.
        mountpoint: PathBuf,
        /// What was named.
        part: String,
        /// The disk.
        disk: String,
        /// Which of its partitions.
        number: u32,
    },
    /// Its name leads to another disk by now.
    #[error("'{}' was renamed, removed or replaced meanwhile: nothing is done: ask again",
        .0.display())]
    Changed(PathBuf),
    /// Something else.
    #[error("cannot ask the mount at '{}': {error}", mountpoint.display())]
    Host {
        /// The mount.
        mountpoint: PathBuf,
        /// What the host said.
        error: io::Error,
    },
    /// Somebody else has the disk.
    #[error("{0}")]
    Busy(String),
    /// It answered that it will not, or could not.
    #[error("{0}")]
    Refused(String),
}

/// One place that can be asked: a mount, or a disk in it.
///
/// A disk is the one whose file has that name when it is first asked, whatever is called so later:
/// what reaches another is refused as [`AskError::Changed`].
#[derive(Clone, Debug)]
pub(super) struct Place {
    /// Where it is mounted, as mountinfo has it.
    pub(super) mountpoint: PathBuf,
    /// The disk; `None`: the mount as a whole.
    pub(super) disk: Option<String>,
    /// What it was called by who named it.
    path: PathBuf,
    /// The inode number of the disk's file.
    inode: OnceCell<u64>,
}

impl Place {
    /// The mount at `mountpoint`.
    pub(super) fn mount(mountpoint: &Path) -> Self {
        Self::new(mountpoint, None, mountpoint)
    }

    fn new(mountpoint: &Path, disk: Option<String>, path: &Path) -> Self {
        let (mountpoint, path) = (mountpoint.to_owned(), path.to_owned());
        Self { mountpoint, disk, path, inode: OnceCell::new() }
    }

    /// What `path` is: a mountpoint or a file in a mount. Asks no mount.
    ///
    /// # Errors
    /// A line when it is in no cowslip mount, or below a disk.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        let Some(found) = kernel::enclosing(path) else {
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

    /// As [`of`](Self::of), for a mounted file.
    ///
    /// # Errors
    /// A line, also when it is a mountpoint.
    pub(super) fn of_disk(path: &Path) -> anyhow::Result<Self> {
        let place = Self::of(path)?;
        if place.disk.is_none() {
            anyhow::bail!(
                "'{path}' is a mountpoint: name a disk in it, '{path}/NAME'",
                path = path.display()
            );
        }
        Ok(place)
    }

    /// Its directory of control files.
    fn control(&self) -> PathBuf {
        let mut path = self.mountpoint.join(".cowslip");
        path.extend(&self.disk);
        path
    }

    /// The inode number of the disk's file, which says what disk it is; `None` of a mount.
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
        // Not in the mountpoint: a file that is bound elsewhere may have another name by now.
        let path = self.path.clone();
        let looked = patiently(move || rustix::fs::stat(&path).map_err(io::Error::from));
        let inode = looked.map_err(|error| self.error(error))?.st_ino;
        Ok(Some(*self.inode.get_or_init(|| inode)))
    }

    fn error(&self, error: io::Error) -> AskError {
        let mountpoint = self.mountpoint.clone();
        let errno = Errno::from_io_error(&error);
        match (errno, &self.disk) {
            _ if error.kind() == io::ErrorKind::TimedOut => AskError::Silent(mountpoint),
            (Some(Errno::NOTCONN | Errno::CONNABORTED), _) => AskError::Dead(mountpoint),
            (Some(Errno::ACCESS | Errno::PERM), _) => AskError::Denied(mountpoint),
            (Some(Errno::ROFS), _) => AskError::ReadOnly(mountpoint),
            (Some(Errno::STALE), Some(_)) => AskError::Changed(self.path.clone()),
            (Some(Errno::NOENT | Errno::NOTDIR), Some(disk)) => {
                self.part().unwrap_or(AskError::NoDisk { mountpoint, disk: printable(disk) })
            }
            _ => AskError::Host { mountpoint, error },
        }
    }

    /// What is to be said when it is no disk but a partition of one.
    pub(super) fn part(&self) -> Option<AskError> {
        let part = self.disk.as_deref()?;
        let (disk, number) = split_name(part)?;
        let path = self.mountpoint.join(disk);
        let whole = Self::new(&self.mountpoint, Some(disk.to_owned()), &path);
        let status = whole.status().ok()?;
        let is_shown = |one: &Value| one["number"] == number;
        status["partitions"].as_array()?.iter().any(is_shown).then(|| AskError::Part {
            mountpoint: whole.mountpoint,
            part: printable(part),
            disk: printable(disk),
            number,
        })
    }

    /// Starts to read its control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn open(&self, file: &'static str) -> Result<Feed<'_>, AskError> {
        Ok(Feed::start(self, file, None, self.inode()?))
    }

    /// Reads all of its control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn read(&self, file: &'static str) -> Result<Vec<u8>, AskError> {
        let mut bytes = Vec::new();
        let mut feed = self.open(file)?;
        feed.read_to_end(&mut bytes).map_err(|error| self.error(error))?;
        Ok(bytes)
    }

    /// Opens the file `name` among the disk's snapshots.
    ///
    /// # Errors
    /// The host's; `ESTALE` when the disk's name leads to another by now.
    pub(super) fn open_snapshot(&self, name: &str) -> io::Result<File> {
        let dir = open_control(&self.control(), self.inode.get().copied())?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let snapshots = openat(&dir, "snapshots", OFlags::PATH | flags, Mode::empty())?;
        Ok(openat(&snapshots, name, flags, Mode::empty())?.into())
    }

    /// Its status: the whole mount's document, or that of the disk.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn status(&self) -> Result<Value, AskError> {
        let bytes = self.read("status")?;
        serde_json::from_slice(&bytes).map_err(|error| self.error(error.into()))
    }

    /// Sends `request` and waits for the answer; `progress` gets what comes before it.
    ///
    /// # Errors
    /// [`AskError`]; what the mount said is [`AskError::Refused`].
    pub(super) fn ask(
        &self,
        request: &Value,
        mut progress: impl FnMut(&Value),
    ) -> Result<Value, AskError> {
        let inode = self.inode()?;
        let mut request = request.clone();
        if let Some(inode) = inode {
            request["inode"] = inode.into();
        }
        let feed = Feed::start(self, "ctl", Some(request.to_string()), inode);
        let mut answer = None;
        // Read to the end: an open control file would keep the mount busy.
        for line in BufReader::new(feed).lines() {
            let line = match line {
                Err(_) if answer.is_some() => break,
                line => line.map_err(|error| self.error(error))?,
            };
            let Ok(mut said) = serde_json::from_str::<Value>(&line) else {
                continue;
            };
            if let Some(now) = said.get("progress") {
                progress(now);
            } else if let Some(error) = said.get("error") {
                let text = error.as_str().map_or_else(|| error.to_string(), str::to_owned);
                let text = printable(&text);
                let is = |key: &str| said[key].as_bool() == Some(true);
                answer = Some(Err(match &self.disk {
                    _ if is("busy") => AskError::Busy(text),
                    Some(_) if is("stale") => self.error(Errno::STALE.into()),
                    _ => AskError::Refused(text),
                }));
            } else if let Some(ok) = said.get_mut("ok") {
                answer = Some(Ok(ok.take()));
            }
        }
        answer.unwrap_or_else(|| {
            let error = io::Error::other("it ended without an answer");
            Err(self.error(error))
        })
    }
}

/// The bytes of a file in a mount, as they come. A read that waits [`PATIENCE`] fails as
/// `TimedOut`; the thread behind it ends with the mount or with this process.
pub(super) struct Feed<'a> {
    place: &'a Place,
    pieces: Receiver<io::Result<Vec<u8>>>,
    /// What was received and not yet taken.
    rest: io::Cursor<Vec<u8>>,
}

impl<'a> Feed<'a> {
    fn start(
        place: &'a Place,
        file: &'static str,
        request: Option<String>,
        inode: Option<u64>,
    ) -> Self {
        let dir = place.control();
        // A few pieces ahead: the reader of a long map need not wait for each.
        let (to, pieces) = sync_channel(4);
        let fetcher = thread::Builder::new().name("ask".into());
        let failed = to.clone();
        let started = fetcher.spawn(move || {
            if let Err(error) = fetch(&dir, file, request.as_deref(), inode, &to) {
                let _ = to.send(Err(error));
            }
        });
        if let Err(error) = started {
            let _ = failed.send(Err(error));
        }
        Self { place, pieces, rest: io::Cursor::default() }
    }

    /// What an error from reading means, for the user.
    pub(super) fn explain(&self, error: io::Error) -> AskError {
        self.place.error(error)
    }
}

/// Does `work`, which may hang with a mount, on a thread of its own; `TimedOut` when it takes longer
/// than [`PATIENCE`].
fn patiently<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (to, done) = sync_channel(1);
    thread::Builder::new().name("ask".into()).spawn(move || {
        // Nobody waits any more when it took too long.
        let _ = to.send(work());
    })?;
    done.recv_timeout(PATIENCE).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Opens a directory of control files, which from then on is that of one disk; `ESTALE` when that
/// is not the one of `inode`.
fn open_control(dir: &Path, inode: Option<u64>) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    if let Some(inode) = inode {
        let status = openat(&dir, "status", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let status: Value = serde_json::from_reader(File::from(status))?;
        if status["inode"] != inode {
            return Err(Errno::STALE.into());
        }
    }
    Ok(dir)
}

/// Writes `request` to the control file, if there is one, and reads that to its end. It is closed
/// before the channel: when the reader sees the end, the mount is not held any more.
fn fetch(
    dir: &Path,
    file: &str,
    request: Option<&str>,
    inode: Option<u64>,
    to: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    // With a request goes what disk it means, and the daemon compares.
    let dir = open_control(dir, inode.filter(|_| request.is_none()))?;
    let access = if request.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let mut file = File::from(openat(&dir, file, access | OFlags::CLOEXEC, Mode::empty())?);
    if let Some(request) = request {
        file.write_all(request.as_bytes())?;
    }
    let mut piece = vec![0; PIECE];
    loop {
        let len = match file.read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            len => len?,
        };
        if len == 0 || to.send(Ok(piece[..len].to_vec())).is_err() {
            return Ok(());
        }
    }
}

impl Read for Feed<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.rest.read(buf)?;
            if len > 0 || buf.is_empty() {
                return Ok(len);
            }
            self.rest = match self.pieces.recv_timeout(PATIENCE) {
                Ok(piece) => io::Cursor::new(piece?),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                Err(RecvTimeoutError::Timeout) => return Err(io::ErrorKind::TimedOut.into()),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that looks like a mount.
    fn mount() -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join(".cowslip")).unwrap();
        let place = Place::mount(dir.path());
        (dir, place)
    }

    #[test]
    fn a_long_file_arrives_whole() {
        let (dir, place) = mount();
        let bytes: Vec<u8> = (0..1_000_003u32).map(|i| i.to_le_bytes()[0]).collect();
        std::fs::write(dir.path().join(".cowslip/log"), &bytes).unwrap();
        assert!(place.read("log").unwrap() == bytes);
    }

    #[test]
    fn what_does_not_answer_is_said_in_one_line() {
        let (dir, _) = mount();
        let file = dir.path().join("vm.img");
        let place = Place::new(dir.path(), Some("vm.img".into()), &file);
        let line = |error: io::Error| place.error(error).to_string();
        let at = dir.path().display();
        assert_eq!(
            place.read("map").unwrap_err().to_string(),
            format!("there is no disk 'vm.img' in the mount at '{at}': cowslip status lists them")
        );
        let silent = line(io::ErrorKind::TimedOut.into());
        assert!(silent.contains("does not answer"), "{silent}");
        let dead = line(Errno::NOTCONN.into());
        assert!(dead.contains("is dead: cowslip umount '"), "{dead}");
    }

    #[test]
    fn a_path_outside_every_mount_is_refused() {
        let line = Place::of(Path::new("/proc")).unwrap_err().to_string();
        assert!(line.starts_with("'/proc' is not in a cowslip mount"), "{line}");
    }
}
