//! Talking to a mount through the files in its `.cowslip` directory.
//!
//! Any call into a mount may hang with it, and such a call cannot be interrupted. So each is made
//! on a thread of its own, which hands on what it reads piece by piece, and whoever waits for the
//! next piece waits [`ANSWER_TIMEOUT`] at most. A daemon at work shows a sign of life every second.
//!
//! Any program can be a mount of this type, and what it answers has effects: requests are written
//! to its files, and what it names is opened. So only mounts of root and of the user who asks are
//! asked anything, and nothing that they show leads out of them: every name on the way is opened
//! for itself, is no link, and lies in the mount's own file system.

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
use crate::mount::kernel::{self, MountEntry, MountHandle};

/// How long a mount may stay silent before it counts as hanging.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a whole document may take: a mount that sends a byte now and then is silent, too.
const DOCUMENT_TIMEOUT: Duration = Duration::from_secs(60);

/// How often is looked whether the user has had enough.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Disks that are looked for in a mount that does not tell all of itself.
const MAX_DISKS: usize = 10_000;

/// What is read at a time: the kernel's own limit for one direct read is a multiple of it.
const READ_CHUNK: usize = 128 << 10;

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
    /// It is somebody else's, and not to be believed.
    #[error(
        "the mount at '{}' is another user's (uid {uid}), who can have it answer anything: \
         do it as that user", .path.display()
    )]
    Foreign {
        /// The mount.
        path: PathBuf,
        /// Whose it is.
        uid: u32,
    },
    /// The user interrupted it; the daemon has been told by that.
    #[error("interrupted")]
    Interrupted,
    /// It works on as many requests as it may.
    #[error("the mount at '{}' works on as many requests as it may: try again later", .0.display())]
    Full(PathBuf),
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
    Partition {
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
pub(super) struct Endpoint {
    /// Where it is mounted, as mountinfo has it.
    pub(super) mountpoint: PathBuf,
    /// The disk; `None`: the mount as a whole.
    pub(super) disk: Option<String>,
    /// The mount, where it is held, and what leads to it then.
    handle: Option<(MountEntry, PathBuf)>,
    /// What it was called by who named it.
    path: PathBuf,
    /// The inode number of the disk's file.
    inode: OnceCell<u64>,
}

impl Endpoint {
    /// The mount at `mountpoint`.
    pub(super) fn mount(mountpoint: &Path) -> Self {
        Self::new(mountpoint, None, mountpoint)
    }

    /// The mount `held`, for as long as that is held.
    pub(super) fn of_handle(held: &MountHandle) -> Self {
        let door = Some((held.entry().clone(), held.access_path()));
        Self { handle: door, ..Self::mount(held.mountpoint()) }
    }

    fn new(mountpoint: &Path, disk: Option<String>, path: &Path) -> Self {
        let (mountpoint, path) = (mountpoint.to_owned(), path.to_owned());
        Self { mountpoint, disk, handle: None, path, inode: OnceCell::new() }
    }

    /// The disk `name` of the mount.
    fn named_disk(mountpoint: &Path, name: &str) -> Self {
        Self::new(mountpoint, Some(name.to_owned()), &mountpoint.join(name))
    }

    /// What `path` is: a mountpoint or a file in a mount. Asks no mount.
    ///
    /// # Errors
    /// A line when it is in no cowslip mount, or below a disk.
    pub(super) fn of(path: &Path) -> anyhow::Result<Self> {
        let Some(found) = kernel::enclosing_mount(path) else {
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

    /// As [`at`](Self::at), for a mounted file.
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

    /// What leads into the mount.
    fn confined(&self) -> io::Result<ConfinedMount> {
        match &self.handle {
            Some((entry, path)) => ConfinedMount::from_entry(entry, path.clone()),
            None => ConfinedMount::at(&self.mountpoint),
        }
    }

    /// The names that lead to its directory of control files.
    fn control_path(&self) -> Vec<String> {
        let names = [Some(".cowslip"), self.disk.as_deref()];
        names.into_iter().flatten().map(str::to_owned).collect()
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

    /// What is to be said when it is no disk but a partition of one.
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

    /// Starts to read its control file `file`.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn open(&self, file: &'static str) -> Result<MountReader<'_>, AskError> {
        Ok(MountReader::start(self, file, None, self.inode()?))
    }

    /// Reads all of its control file `file`.
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

    /// Its status: the whole mount's document, or that of the disk.
    ///
    /// # Errors
    /// [`AskError`].
    pub(super) fn status(&self) -> Result<Value, AskError> {
        let feed = self.open("status")?.with_deadline(DOCUMENT_TIMEOUT);
        answer::read_document(feed).map_err(|error| self.ask_error(error))
    }

    /// The statuses of those disks of the mount that one may look at, and how many there are.
    ///
    /// # Errors
    /// [`AskError`], when not even their names can be had.
    pub(super) fn visible_disks(&self) -> Result<(Vec<Value>, usize), AskError> {
        let names = self.disk_names().map_err(|error| self.ask_error(error))?;
        let status = |name: &String| Self::named_disk(&self.mountpoint, name).status().ok();
        Ok((names.iter().filter_map(status).collect(), names.len()))
    }

    /// The names of the disks of the mount.
    fn disk_names(&self) -> io::Result<Vec<String>> {
        let door = self.confined()?;
        with_timeout(move || door.list_dirs(".cowslip"))
    }

    /// Opens the file `name` of the directory `dir` in the disk's own one, as the mount has named it.
    ///
    /// # Errors
    /// The mount's errno; `InvalidInput` for what is no plain name or leads elsewhere; `ESTALE` when
    /// the disk's name leads to another by now.
    pub(super) fn open_named(&self, dir: &str, name: &str) -> io::Result<File> {
        let door = self.confined()?;
        let control = door.open_control_dir(&self.control_path(), self.inode.get().copied())?;
        door.open_in(&control, &[dir, name], OFlags::RDONLY)
    }

    /// Sends `request` and waits for the answer; `progress` gets what comes before it.
    ///
    /// # Errors
    /// [`AskError`]; what the mount said is [`AskError::Refused`].
    pub(super) fn ask(
        &self,
        request: &Value,
        progress: impl FnMut(&Value),
    ) -> Result<Value, AskError> {
        self.ask_until(&Arc::default(), request, progress)
    }

    /// As [`ask`](Self::ask), until `stop` is set: then nobody waits for the answer any more, which
    /// the daemon sees within a second.
    ///
    /// # Errors
    /// As there; [`AskError::Interrupted`].
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

/// Why a mount is not asked, or no more. Carried by an [`io::Error`].
#[derive(Debug, thiserror::Error)]
enum AskAbort {
    #[error("it is another user's")]
    Foreign(u32),
    #[error("interrupted")]
    Interrupted,
}

/// How a directory is opened to open what is in it.
const OPEN_DIR_FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The way into a mount: where it is, and which one it was found to be.
#[derive(Clone, Debug)]
struct ConfinedMount {
    mountpoint: PathBuf,
    /// `st_dev` of all its files.
    dev: u64,
}

impl ConfinedMount {
    /// The mount at `mountpoint`, if it is to be believed. Makes no call into it.
    fn at(mountpoint: &Path) -> io::Result<Self> {
        let Some(entry) = kernel::entry_at(mountpoint).filter(MountEntry::is_cowslip) else {
            return Err(io::Error::other("it is no cowslip mount any more"));
        };
        Self::from_entry(&entry, entry.mountpoint.clone())
    }

    /// The mount of `entry`, which `path` leads to.
    fn from_entry(entry: &MountEntry, path: PathBuf) -> io::Result<Self> {
        if !entry.is_trusted() {
            return Err(io::Error::other(AskAbort::Foreign(entry.owner.unwrap_or(u32::MAX))));
        }
        let (major, minor) = entry.dev;
        Ok(Self { mountpoint: path, dev: rustix::fs::makedev(major, minor) })
    }

    /// Opens what the names `control_path` lead to from `from` on, a file or a directory; what is not right in
    /// the mount is refused.
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
            // A pipe is not waited for.
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

    /// The root of the mount.
    fn open_root(&self) -> io::Result<File> {
        let root = File::from(rustix::fs::open(&self.mountpoint, OPEN_DIR_FLAGS, Mode::empty())?);
        self.check_device(&root)?;
        Ok(root)
    }

    /// Opens a directory of control files, which from then on is that of one disk; `ESTALE` when
    /// that is not the one of `inode`.
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

    /// Opens the regular file that `control_path` leads to from `dir` on.
    fn open_in(&self, dir: &File, way: &[&str], flags: OFlags) -> io::Result<File> {
        let file = self.walk(dir.try_clone()?, way, flags)?;
        if !file.metadata()?.is_file() {
            return Err(not_confined("something that is no file"));
        }
        Ok(file)
    }

    /// The directories in the directory `name`.
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

/// The bytes of a file in a mount, as they come. A read that waits [`ANSWER_TIMEOUT`] fails as
/// `TimedOut`; the thread behind it ends with the mount or with this process.
pub(super) struct MountReader<'a> {
    endpoint: &'a Endpoint,
    chunks: Receiver<io::Result<Vec<u8>>>,
    /// What was received and not yet taken.
    rest: io::Cursor<Vec<u8>>,
    /// When all of it has to be there.
    deadline: Option<Instant>,
    /// Nobody wants it any more.
    stop: Arc<AtomicBool>,
}

impl<'a> MountReader<'a> {
    fn start(
        place: &'a Endpoint,
        file: &'static str,
        request: Option<String>,
        inode: Option<u64>,
    ) -> Self {
        // A few pieces ahead: the reader of a long map need not wait for each.
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

    /// As it is, but all of it must come in `time`.
    fn with_deadline(mut self, time: Duration) -> Self {
        self.deadline = Some(Instant::now() + time);
        self
    }

    /// What an error from reading means, for the user.
    pub(super) fn ask_error(&self, error: io::Error) -> AskError {
        self.endpoint.ask_error(error)
    }

    /// The next piece; `None` at the end.
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

/// Does `work`, which may hang with a mount, on a thread of its own; `TimedOut` when it takes longer
/// than [`ANSWER_TIMEOUT`].
fn with_timeout<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let (to, done) = sync_channel(1);
    thread::Builder::new().name("ask".into()).spawn(move || {
        // Nobody waits any more when it took too long.
        let _ = to.send(work());
    })?;
    done.recv_timeout(ANSWER_TIMEOUT).unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// Writes `request` to the control file, if there is one, and reads that to its end. It is closed
/// before the channel: when the reader sees the end, the mount is not held any more.
fn send_and_read(
    door: &ConfinedMount,
    way: &[String],
    file: &str,
    request: Option<&str>,
    inode: Option<u64>,
    to: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    // With a request goes what disk it means, and the daemon compares.
    let dir = door.open_control_dir(way, inode.filter(|_| request.is_none()))?;
    let flags = if request.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let mut file = door.open_in(&dir, &[file], flags)?;
    // It would make the mount busy.
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

    /// A directory that looks like a mount.
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
    fn a_long_file_arrives_whole() {
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
    fn nothing_in_a_mount_leads_out_of_it() {
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
    fn what_does_not_answer_is_said_in_one_line() {
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
    fn what_is_no_mount_is_not_asked() {
        let dir = tempfile::tempdir().unwrap();
        let line = Endpoint::mount(dir.path()).status().unwrap_err().to_string();
        assert!(line.contains("no cowslip mount any more"), "{line}");
    }

    #[test]
    fn a_path_outside_every_mount_is_refused() {
        let line = Endpoint::of(Path::new("/proc")).unwrap_err().to_string();
        assert!(line.starts_with("'/proc' is not in a cowslip mount"), "{line}");
    }
}
