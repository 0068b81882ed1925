//! A client for the control files in a mount's `.cowslip` directory.
//!
//! Any call into a mount may hang with the mount, and such a call cannot be interrupted. So every
//! call is made on a thread of its own, which passes on the data piece by piece. The reader waits
//! at most [`ANSWER_TIMEOUT`] for the next piece; a daemon at work sends a sign of life every
//! second.
//!
//! Any program can serve a mount of this type, and its answers have effects: requests are written
//! to its files, and the files it names are opened. So only mounts of root and of the calling user
//! are asked, and no path leads out of a mount: every component is opened separately, must not be a
//! link, and must lie in the mount's own file system.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;
use serde_json::Value;

use super::answer::{self, AnswerError, RefusalKind};
use crate::disk::split_name;
use crate::host::mountinfo::{self, MountEntry};
use crate::mount::kernel::MountHandle;

/// Time limit for the next piece of an answer, after which a mount counts as hanging.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Time limit for a whole document: a mount that sends a byte now and then counts as hanging too.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// Interval at which a waiting reader checks whether the user interrupted the command.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Maximum number of disks listed in a mount that does not show its whole status.
const MAX_DISKS: usize = 10_000;

/// Size of one read in bytes: the kernel's own limit for one direct read is a multiple of it.
const READ_CHUNK: usize = 128 << 10;

/// The reason why a mount did not answer; each displays as one line.
#[derive(Debug, thiserror::Error)]
pub(super) enum AskError {
    /// The mount did not answer in time.
    #[error("the mount at '{path}' does not answer: cowslip umount -l '{path}' ends it",
        path = .0.display())]
    Silent(PathBuf),
    /// The mount's daemon has exited.
    #[error("the mount at '{path}' is dead: cowslip umount '{path}' clears it",
        path = .0.display())]
    Dead(PathBuf),
    /// Only the owner of the mount may ask.
    #[error("the mount at '{}' does not let you ask: do it as the user who mounted it",
        .0.display())]
    Denied(PathBuf),
    /// The mount belongs to another user, and its answers cannot be trusted.
    #[error(
        "the mount at '{}' is another user's (uid {uid}), who can have it answer anything: \
         do it as that user", .path.display()
    )]
    Foreign {
        /// The mountpoint.
        path: PathBuf,
        /// User ID of the owner.
        uid: u32,
    },
    /// The user interrupted the request, which also tells the daemon.
    #[error("interrupted")]
    Interrupted,
    /// The mount already runs the maximum number of requests.
    #[error("the mount at '{}' works on as many requests as it may: try again later", .0.display())]
    Full(PathBuf),
    /// The mount accepts no requests (`-o ro`).
    #[error("the mount at '{}' is read-only: nothing in it has changed or can be",
        .0.display())]
    ReadOnly(PathBuf),
    /// The mount has no such disk.
    #[error("there is no disk '{disk}' in the mount at '{}': cowslip status lists them",
        mountpoint.display())]
    NoDisk {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The requested name.
        disk: String,
    },
    /// The file is a partition of a disk.
    #[error("'{part}' is partition {number} of the disk '{disk}' and no disk: name '{}'",
        mountpoint.join(disk).display())]
    Partition {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// Name of the partition file.
        part: String,
        /// Name of the disk.
        disk: String,
        /// Number of the partition.
        number: u32,
    },
    /// The disk's name now belongs to another disk.
    #[error("'{}' was renamed, removed or replaced meanwhile: nothing is done: ask again",
        .0.display())]
    Changed(PathBuf),
    /// Any other error.
    #[error("cannot ask the mount at '{}': {error}", mountpoint.display())]
    Host {
        /// The mountpoint.
        mountpoint: PathBuf,
        /// The host's error.
        error: io::Error,
    },
    /// The disk is in use.
    #[error("{0}")]
    Busy(String),
    /// The mount refused the request, or failed to do it.
    #[error("{0}")]
    Refused(String),
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
    /// The mount entry and a path to the mount, if the mount is held open.
    handle: Option<(MountEntry, PathBuf)>,
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

    /// Creates the endpoint of the mount `held`, valid while the handle is held.
    pub(super) fn of_handle(held: &MountHandle) -> Self {
        let door = Some((held.entry().clone(), held.access_path()));
        Self { handle: door, ..Self::mount(held.mountpoint()) }
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
        let place = Self::of(path)?;
        if place.disk.is_none() {
            anyhow::bail!(
                "'{path}' is a mountpoint: name a disk in it, '{path}/NAME'",
                path = path.display()
            );
        }
        Ok(place)
    }

    /// Returns the way into the mount, if the mount can be trusted.
    fn confined(&self) -> io::Result<ConfinedMount> {
        match &self.handle {
            Some((entry, path)) => ConfinedMount::from_entry(entry, path.clone()),
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
        let looked = self
            .confined()
            .and_then(|_| with_timeout(move || rustix::fs::stat(&path).map_err(io::Error::from)));
        let inode = looked.map_err(|error| self.ask_error(error))?.st_ino;
        Ok(Some(*self.inode.get_or_init(|| inode)))
    }

    fn ask_error(&self, error: io::Error) -> AskError {
        let mountpoint = self.mountpoint.clone();
        let errno = Errno::from_io_error(&error);
        let known = error.get_ref().and_then(|inner| inner.downcast_ref::<AskAbort>());
        match known {
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
        let status = whole.status().ok()?;
        let is_shown = |one: &Value| one["number"] == number;
        status["partitions"].as_array()?.iter().any(is_shown).then(|| AskError::Partition {
            mountpoint: whole.mountpoint,
            part: part.to_owned(),
            disk: disk.to_owned(),
            number,
        })
    }

    /// Starts to read the control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn open(&self, file: &'static str) -> Result<MountReader<'_>, AskError> {
        Ok(MountReader::start(self, file, None, self.inode()?))
    }

    /// Reads the whole control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn read(&self, file: &'static str) -> Result<Vec<u8>, AskError> {
        let mut feed = self.open(file)?.with_deadline(DOCUMENT_TIMEOUT);
        let mut bytes = Vec::new();
        let read = (&mut feed).take(answer::MAX_ANSWER_LEN + 1).read_to_end(&mut bytes);
        read.map_err(|error| self.ask_error(error))?;
        match bytes.len() as u64 > answer::MAX_ANSWER_LEN {
            true => Err(self.ask_error(answer::too_long_error())),
            false => Ok(bytes),
        }
    }

    /// Reads the status document of the mount or the disk.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn status(&self) -> Result<Value, AskError> {
        let feed = self.open("status")?.with_deadline(DOCUMENT_TIMEOUT);
        answer::read_document(feed).map_err(|error| self.ask_error(error))
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
        let door = self.confined()?;
        with_timeout(move || door.list_dirs(".cowslip"))
    }

    /// Opens the file `name`, as named by the mount, in the directory `dir` of the disk's control
    /// files.
    ///
    /// # Errors
    /// The mount's errno; `InvalidInput` for a name that is no plain one or leads elsewhere;
    /// `ESTALE` when the disk's name now belongs to another disk.
    pub(super) fn open_named(&self, dir: &str, name: &str) -> io::Result<File> {
        let door = self.confined()?;
        let control = door.open_control_dir(&self.control_path(), self.inode.get().copied())?;
        door.open_in(&control, &[dir, name], OFlags::RDONLY)
    }

    /// Sends `request` and waits for the answer; `progress` receives the progress reports before
    /// it.
    ///
    /// # Errors
    /// [`AskError`]; a refusal by the mount is [`AskError::Refused`].
    pub(super) fn ask(
        &self,
        request: &Value,
        progress: impl FnMut(&Value),
    ) -> Result<Value, AskError> {
        self.ask_until(&Arc::default(), request, progress)
    }

    /// Sends `request` like [`ask`](Self::ask), but stops waiting when `stop` is set, which the
    /// daemon notices within a second.
    ///
    /// # Errors
    /// The errors of [`ask`](Self::ask), and [`AskError::Interrupted`].
    pub(super) fn ask_until(
        &self,
        stop: &Arc<AtomicBool>,
        request: &Value,
        progress: impl FnMut(&Value),
    ) -> Result<Value, AskError> {
        let inode = self.inode()?;
        let mut request = request.clone();
        if let Some(inode) = inode {
            request["inode"] = inode.into();
        }
        let mut feed = MountReader::start(self, "ctl", Some(request.to_string()), inode);
        feed.stop = Arc::clone(stop);
        // Read to the end: an open control file would keep the mount busy.
        answer::read_answer(BufReader::new(feed), progress).map_err(|unanswered| match unanswered {
            AnswerError::Refused { line, kind: RefusalKind::Busy } => AskError::Busy(line),
            AnswerError::Refused { kind: RefusalKind::Stale, .. } if self.disk.is_some() => {
                self.ask_error(Errno::STALE.into())
            }
            AnswerError::Refused { line, .. } => AskError::Refused(line),
            AnswerError::Broken(error) => self.ask_error(error),
        })
    }
}

/// The reason why a mount is not asked, or no longer. Carried by an [`io::Error`].
#[derive(Debug, thiserror::Error)]
enum AskAbort {
    #[error("it is another user's")]
    Foreign(u32),
    #[error("interrupted")]
    Interrupted,
}

/// Flags for opening a directory on the way to a file.
const OPEN_DIR_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The way into a mount: a path, and the file system it must lead to.
#[derive(Clone, Debug)]
struct ConfinedMount {
    mountpoint: PathBuf,
    /// `st_dev` of all files of the mount.
    dev: u64,
}

impl ConfinedMount {
    /// Returns the mount at `mountpoint`, if it can be trusted. Makes no call into the mount.
    fn at(mountpoint: &Path) -> io::Result<Self> {
        let Some(entry) = mountinfo::entry_at(mountpoint).filter(MountEntry::is_cowslip) else {
            return Err(io::Error::other("it is no cowslip mount any more"));
        };
        Self::from_entry(&entry, entry.mountpoint.clone())
    }

    /// Returns the mount of `entry`, reached by `path`, if it can be trusted.
    fn from_entry(entry: &MountEntry, path: PathBuf) -> io::Result<Self> {
        if !entry.is_trusted() {
            return Err(io::Error::other(AskAbort::Foreign(entry.owner.unwrap_or(u32::MAX))));
        }
        let (major, minor) = entry.dev;
        Ok(Self { mountpoint: path, dev: rustix::fs::makedev(major, minor) })
    }

    /// Opens the file or directory reached from `from` by the names `way`. Refuses links, special
    /// names and anything outside the mount.
    fn walk(&self, from: File, way: &[&str], flags: OFlags) -> io::Result<File> {
        let mut at = from;
        for (index, name) in way.iter().enumerate() {
            let mut parts = Path::new(name).components();
            let is_plain = matches!(parts.next(), Some(Component::Normal(part)) if part == *name);
            if !is_plain || parts.next().is_some() {
                return Err(not_confined("a name that is no plain one"));
            }
            let flags =
                if index + 1 == way.len() { flags | OFlags::CLOEXEC } else { OPEN_DIR_FLAGS };
            // Open without blocking, so that a named pipe cannot hang the client.
            let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY;
            let opened = rustix::io::retry_on_intr(|| {
                rustix::fs::openat(at.as_fd(), *name, flags, Mode::empty())
            });
            at = match opened {
                Err(Errno::LOOP) => return Err(not_confined("a link")),
                opened => File::from(opened?),
            };
            self.check_device(&at)?;
        }
        Ok(at)
    }

    /// Opens the root directory of the mount.
    fn open_root(&self) -> io::Result<File> {
        let root = File::from(rustix::fs::open(&self.mountpoint, OPEN_DIR_FLAGS, Mode::empty())?);
        self.check_device(&root)?;
        Ok(root)
    }

    /// Opens a directory of control files, which stays that of one disk from then on. Fails with
    /// `ESTALE` when that disk does not have the inode number `inode`.
    fn open_control_dir(&self, way: &[String], inode: Option<u64>) -> io::Result<File> {
        let way: Vec<&str> = way.iter().map(String::as_str).collect();
        let dir = self.walk(self.open_root()?, &way, OPEN_DIR_FLAGS)?;
        if let Some(inode) = inode {
            let status = answer::read_document(self.open_in(&dir, &["status"], OFlags::RDONLY)?)?;
            if status["inode"] != inode {
                return Err(Errno::STALE.into());
            }
        }
        Ok(dir)
    }

    /// Opens the regular file reached from `dir` by the names `way`.
    fn open_in(&self, dir: &File, way: &[&str], flags: OFlags) -> io::Result<File> {
        let file = self.walk(dir.try_clone()?, way, flags)?;
        if !file.metadata()?.is_file() {
            return Err(not_confined("something that is no file"));
        }
        Ok(file)
    }

    /// Lists the subdirectories of the directory `name`.
    fn list_dirs(&self, name: &str) -> io::Result<Vec<String>> {
        let dir = self.walk(self.open_root()?, &[name], OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(&dir)?.take(MAX_DISKS) {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy();
            if entry.file_type() == rustix::fs::FileType::Directory && !name.starts_with('.') {
                names.push(name.into_owned());
            }
        }
        Ok(names)
    }

    fn check_device(&self, file: &File) -> io::Result<()> {
        match file.metadata()?.dev() == self.dev {
            true => Ok(()),
            false => Err(not_confined("what lies outside of it")),
        }
    }
}

fn not_confined(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, format!("it shows {what} where its file should be"))
}

/// A reader of a file in a mount, as the data arrives. A read that waits [`ANSWER_TIMEOUT`] fails
/// as `TimedOut`; the thread behind it ends with the mount or with this process.
pub(super) struct MountReader<'a> {
    endpoint: &'a Endpoint,
    chunks: Receiver<io::Result<Vec<u8>>>,
    /// Data received but not yet read.
    rest: io::Cursor<Vec<u8>>,
    /// Time by which the whole file must have arrived.
    deadline: Option<Instant>,
    /// Set when the data is no longer wanted.
    stop: Arc<AtomicBool>,
}

impl<'a> MountReader<'a> {
    fn start(
        place: &'a Endpoint,
        file: &'static str,
        request: Option<String>,
        inode: Option<u64>,
    ) -> Self {
        // Queue a few pieces ahead, so that reading a long map does not wait for each piece.
        let (to, pieces) = sync_channel(4);
        let failed = to.clone();
        let fetcher = thread::Builder::new().name("ask".into());
        let started = place.confined().and_then(|door| {
            let way = place.control_path();
            fetcher.spawn(move || {
                if let Err(error) = send_and_read(&door, &way, file, request.as_deref(), inode, &to)
                {
                    let _ = to.send(Err(error));
                }
            })
        });
        if let Err(error) = started {
            let _ = failed.send(Err(error));
        }
        Self {
            endpoint: place,
            chunks: pieces,
            rest: io::Cursor::default(),
            deadline: None,
            stop: Arc::default(),
        }
    }

    /// Sets the time limit for the whole file.
    fn with_deadline(mut self, time: Duration) -> Self {
        self.deadline = Some(Instant::now() + time);
        self
    }

    /// Converts an error of a read into an error for the user.
    pub(super) fn ask_error(&self, error: io::Error) -> AskError {
        self.endpoint.ask_error(error)
    }

    /// Returns the next piece; `None` at the end.
    fn next_chunk(&self) -> io::Result<Option<Vec<u8>>> {
        let silent = Instant::now() + ANSWER_TIMEOUT;
        let until = self.deadline.map_or(silent, |until| until.min(silent));
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return Err(io::Error::other(AskAbort::Interrupted));
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left.min(STOP_POLL_INTERVAL)) {
                Ok(piece) => return piece.map(Some),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

/// Runs `work`, which may hang with a mount, on a thread of its own. Fails with `TimedOut` after
/// [`ANSWER_TIMEOUT`].
fn with_timeout<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (to, done) = sync_channel(1);
    thread::Builder::new().name("ask".into()).spawn(move || {
        // The receiver is dropped after a timeout.
        let _ = to.send(work());
    })?;
    done.recv_timeout(ANSWER_TIMEOUT).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Writes `request`, if there is one, to the control file, and reads that file to its end. The file
/// is closed before the channel, so the mount is not held when the reader sees the end.
fn send_and_read(
    door: &ConfinedMount,
    way: &[String],
    file: &str,
    request: Option<&str>,
    inode: Option<u64>,
    to: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    // A request carries the inode number itself, and the daemon compares it.
    let dir = door.open_control_dir(way, inode.filter(|_| request.is_none()))?;
    let flags = if request.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let mut file = door.open_in(&dir, &[file], flags)?;
    // An open directory would keep the mount busy.
    drop(dir);
    if let Some(request) = request {
        file.write_all(request.as_bytes())?;
    }
    let mut piece = vec![0; READ_CHUNK];
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

impl Read for MountReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.rest.read(buf)?;
            if len > 0 || buf.is_empty() {
                return Ok(len);
            }
            let Some(piece) = self.next_chunk()? else {
                return Ok(0);
            };
            self.rest = io::Cursor::new(piece);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Creates a directory that looks like a mount.
    fn mount() -> (tempfile::TempDir, ConfinedMount) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(".cowslip/d/snapshots")).unwrap();
        let dev = std::fs::metadata(dir.path()).unwrap().dev();
        let door = ConfinedMount { mountpoint: dir.path().to_owned(), dev };
        (dir, door)
    }

    fn open(door: &ConfinedMount, names: &[&str]) -> io::Result<File> {
        door.open_in(&door.open_root()?, names, OFlags::RDONLY)
    }

    #[test]
    fn long_file_arrives_complete() {
        let (dir, door) = mount();
        let bytes: Vec<u8> = (0..1_000_003u32).map(|i| i.to_le_bytes()[0]).collect();
        std::fs::write(dir.path().join(".cowslip/log"), &bytes).unwrap();
        let (to, pieces) = sync_channel(100);
        send_and_read(&door, &[".cowslip".to_owned()], "log", None, None, &to).unwrap();
        drop(to);
        let all: Vec<u8> = pieces.iter().flat_map(Result::unwrap).collect();
        assert!(all == bytes);
    }

    #[test]
    fn walk_never_leaves_the_mount() {
        use std::os::unix::fs::symlink;
        let (dir, door) = mount();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("secret"), b"secret").unwrap();
        std::fs::write(at(".cowslip/d/status"), b"{}").unwrap();
        symlink(at("secret"), at(".cowslip/status")).unwrap();
        symlink("/dev", at(".cowslip/e")).unwrap();
        symlink("d", at(".cowslip/f")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, at(".cowslip/log"), Mode::RUSR).unwrap();
        assert!(open(&door, &[".cowslip", "d", "status"]).is_ok());
        let refused = |names: &[&str]| open(&door, names).unwrap_err();
        let dir = [".cowslip", "d", "snapshots"];
        for name in ["/etc/passwd", "../status", "..", ".", "", "a/../b", "/"] {
            let error = refused(&[&dir[..], &[name]].concat());
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{name}: {error}");
        }
        for names in [&[".cowslip", "status"][..], &[".cowslip", "log"], &[".cowslip", "d"]] {
            assert_eq!(refused(names).kind(), io::ErrorKind::InvalidInput, "{names:?}");
        }
        for names in [[".cowslip", "e", "null"], [".cowslip", "f", "status"]] {
            assert!(refused(&names).raw_os_error() == Some(libc::ENOTDIR), "{names:?}");
        }
        let elsewhere = ConfinedMount { dev: door.dev + 1, ..door.clone() };
        assert!(open(&elsewhere, &[".cowslip", "d", "status"]).is_err());
    }

    #[test]
    fn ask_error_is_one_line() {
        let place = Endpoint::named_disk(Path::new("/m"), "vm.img");
        let line = |error: io::Error| place.ask_error(error).to_string();
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
        let line = Endpoint::mount(dir.path()).status().unwrap_err().to_string();
        assert!(line.contains("no cowslip mount any more"), "{line}");
    }

    #[test]
    fn path_outside_every_mount_is_refused() {
        let line = Endpoint::of(Path::new("/proc")).unwrap_err().to_string();
        assert!(line.starts_with("'/proc' is not in a cowslip mount"), "{line}");
    }
}
