//! Opening each kind of sink.
//!
//! Everything is checked before anything is created, so that a refused stream leaves nothing behind.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, fchmod};
use rustix::io::Errno;

use super::seekable::SeekableWriter;
use super::wire::WireWriter;
use super::{HostSink, Monitor, SinkBackend, StreamOpenError};
use crate::base::lock::{self, OutputLock};
use crate::base::self_reference::check_self_reference;
use crate::config::{Overwrite, Programs, SinkSpec, StreamFrames, StreamSpec};
use crate::confined::PathHandle;
use crate::host;
use crate::part_file::{PartFile, PartFileError};
use crate::process::new_file_mode;
use crate::program::stop::Stop;
use crate::stream::command::{PipeEnd, Pipeline};
use crate::stream::context::{StdioMode, StreamContext};
use crate::stream::fifo::{self, file_type_name};
use crate::stream::stdio::{self, Direction, FdMode};
use crate::trusted_path;

/// The parts of a [`HostSink`] that depend on its kind.
struct OpenedSink {
    backend: SinkBackend,
    /// The file, and whether it may replace another.
    part: Option<(PartFile, Overwrite)>,
    monitor: Monitor,
}

impl OpenedSink {
    fn new(kind: &'static str, label: &str, out: SinkBackend) -> Self {
        Self { backend: out, part: None, monitor: Monitor::new(kind, label, None) }
    }
}

impl HostSink {
    /// Opens `target` for the stream `spec`. Commands are started; nothing is sent yet, and no
    /// reader is waited for.
    ///
    /// # Errors
    /// One line for the user. Nothing has been created then, and nothing runs.
    pub fn open(
        spec: &StreamSpec,
        target: &SinkSpec,
        context: &StreamContext<'_>,
        stop: Stop,
    ) -> Result<Self, StreamOpenError> {
        let opened = match target {
            SinkSpec::Fifo(path) => open_fifo(path, context)?,
            SinkSpec::File { path, overwrite } => {
                open_file(spec, path, *overwrite, context, &stop)?
            }
            SinkSpec::Command(programs) => open_command(spec, programs, context, &stop)?,
            SinkSpec::Stdout => open_stdout(io::stdout().as_fd(), context, &stop)?,
            SinkSpec::Measure => OpenedSink::new("measure", "measure", SinkBackend::Discard),
        };
        let OpenedSink { backend: out, part, monitor } = opened;
        Ok(Self {
            backend: Some(out),
            part,
            frames: spec.frames,
            size: spec.size,
            is_started: false,
            sticky_errno: None,
            is_finished: false,
            monitor,
            stop,
            watcher: None,
        })
    }
}

fn refuse_inside_mount(path: &Path, context: &StreamContext<'_>) -> Result<(), StreamOpenError> {
    Ok(check_self_reference(path, context.mountpoint, context.mount_dev)?)
}

fn open_fifo(path: &Path, context: &StreamContext<'_>) -> Result<OpenedSink, StreamOpenError> {
    refuse_inside_mount(path, context)?;
    fifo::create_missing(path)?;
    let label = format!("fifo:{}", path.display());
    Ok(OpenedSink::new("fifo", &label, SinkBackend::Fifo(path.to_owned())))
}

fn open_file(
    spec: &StreamSpec,
    path: &Path,
    overwrite: Overwrite,
    context: &StreamContext<'_>,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    refuse_inside_mount(path, context)?;
    let label = format!("file:{}", path.display());
    // The handle that is checked is also opened. Checking opens nothing: opening a device may already
    // have an effect.
    let located = match trusted_path::locate(path) {
        Ok(located) => located,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if path.is_symlink() {
                return Err(StreamOpenError::wrong_kind(path, "a link to nothing", "remove it"));
            }
            return open_part(spec, path, overwrite, None, &label, stop);
        }
        Err(error) => return Err(StreamOpenError::host("write", path, &error)),
    };
    let found = located.metadata();
    let kind = found.file_type();
    if kind.is_block_device() {
        open_device(spec, &located, path, &label, stop)
    } else if kind.is_char_device() {
        open_character_device(&located, path, &label, stop)
    } else if !kind.is_file() {
        let remedy = if kind.is_fifo() { "use to=fifo:" } else { "name a file" };
        Err(StreamOpenError::wrong_kind(
            path,
            file_type_name(FileType::from_raw_mode(found.mode())),
            remedy,
        ))
    } else if overwrite == Overwrite::No {
        Err(StreamOpenError::Exists(path.to_owned()))
    } else {
        lock::check_unused(&located, path)?;
        // The target of a link is replaced, not the link.
        let real =
            located.real_path().map_err(|error| StreamOpenError::host("write", path, &error))?;
        // No set-user-ID or the like for new contents.
        let mode = Mode::from_raw_mode(found.mode() & 0o777);
        open_part(spec, &real, overwrite, Some(mode), &label, stop)
    }
}

fn open_part(
    spec: &StreamSpec,
    path: &Path,
    overwrite: Overwrite,
    mode: Option<Mode>,
    label: &str,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    let part = PartFile::find(path).and_then(|old| {
        let perm = mode.map_or(0o666, |mode| mode.bits());
        PartFile::create(path, old, perm)
    });
    let part = part.map_err(part_error)?;
    // A file that replaces another gets its mode, whatever the umask. A new one gets the mode of the
    // caller's umask, which is not the one of this process.
    let file = part.file().try_clone().and_then(|file| match mode.or_else(new_file_mode) {
        Some(mode) => Ok(fchmod(&file, mode).map(|()| file)?),
        None => Ok(file),
    });
    let file = file.map_err(|error| StreamOpenError::host("write", part.path(), &error))?;
    let out = match spec.frames {
        StreamFrames::Raw => SinkBackend::Seekable(SeekableWriter::to_file(file, stop.clone())),
        StreamFrames::Rbd => {
            SinkBackend::Wire(WireWriter::new(file.into(), FdMode::Plain, stop.clone()))
        }
    };
    Ok(OpenedSink { part: Some((part, overwrite)), ..OpenedSink::new("file", label, out) })
}

fn part_error(error: PartFileError) -> StreamOpenError {
    match error {
        PartFileError::Busy(path) => StreamOpenError::Busy(path),
        PartFileError::NotAFile { path, kind } => StreamOpenError::wrong_kind(
            &path,
            file_type_name(kind),
            "remove it; the stream is written there",
        ),
        PartFileError::Foreign { path, .. } => StreamOpenError::wrong_kind(
            &path,
            "a file of another user",
            "remove it; the stream is written there",
        ),
        PartFileError::Host { verb, path, error } => StreamOpenError::host(verb, &path, &error),
    }
}

fn open_device(
    spec: &StreamSpec,
    located: &PathHandle,
    path: &Path,
    label: &str,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    if spec.frames != StreamFrames::Raw {
        return Err(StreamOpenError::wrong_kind(
            path,
            "a block device",
            "records need a file or a command",
        ));
    }
    // O_EXCL: refused while the device is mounted, or opened exclusively by another process.
    // O_RDWR: the lock against disks that read the device is a shared one, which needs it.
    let opened = located.open(OFlags::RDWR | OFlags::EXCL);
    let file = Arc::new(opened.map_err(|error| StreamOpenError::host("write", path, &error))?);
    let lock = OutputLock::take(&file, path)?;
    let size = host::file_size(&file);
    let size = size.map_err(|error| StreamOpenError::host("measure", path, &error))?;
    if size < spec.size {
        return Err(StreamOpenError::TooSmall { path: path.to_owned(), size, needed: spec.size });
    }
    let out = SeekableWriter::to_device(file, lock, stop.clone());
    Ok(OpenedSink::new("device", label, SinkBackend::Seekable(out)))
}

fn open_character_device(
    located: &PathHandle,
    path: &Path,
    label: &str,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    let opened = located.open(OFlags::WRONLY);
    let file = opened.map_err(|error| StreamOpenError::host("write", path, &error))?;
    // Only poll(2) waits, and that can be stopped.
    let fd = crate::host::set_nonblocking(file)
        .map_err(|error| StreamOpenError::host("write", path, &error.into()))?;
    if stdio::is_terminal(&fd) {
        return Err(StreamOpenError::wrong_kind(path, "a terminal", "name a file"));
    }
    Ok(OpenedSink::new(
        "device",
        label,
        SinkBackend::Wire(WireWriter::new(fd, FdMode::NonBlocking, stop.clone())),
    ))
}

fn open_command(
    spec: &StreamSpec,
    programs: &Programs,
    context: &StreamContext<'_>,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    let stdout = match context.stdio {
        StdioMode::Available => Stdio::inherit(),
        StdioMode::Unavailable => Stdio::null(),
    };
    let (pipeline, fd) = Pipeline::spawn(programs, &spec.dir, PipeEnd::Input, stdout)
        .map_err(StreamOpenError::Command)?;
    let label = format!("cmd:{programs}");
    let out = SinkBackend::Wire(WireWriter::new(fd, FdMode::NonBlocking, stop.clone()));
    Ok(OpenedSink {
        backend: out,
        part: None,
        monitor: Monitor::new("cmd", &label, Some(pipeline)),
    })
}

/// Opens `stdout`, a parameter for the tests, as a wire.
pub(super) fn open_as_stdout(
    stdout: std::os::fd::BorrowedFd<'_>,
    stop: &Stop,
) -> Result<WireWriter, StreamOpenError> {
    if stdio::is_terminal(stdout) {
        return Err(StreamOpenError::Terminal("to=stdout"));
    }
    let taken = stdio::acquire(stdout, Direction::Writing);
    let (fd, mode) = taken.map_err(|error| match error.raw_os_error() {
        // Opening a pipe without a reader.
        Some(libc::ENXIO) => StreamOpenError::stdio("to=stdout", &Errno::PIPE.into()),
        _ => StreamOpenError::stdio("to=stdout", &error),
    })?;
    Ok(WireWriter::new(fd, mode, stop.clone()))
}

fn open_stdout(
    stdout: std::os::fd::BorrowedFd<'_>,
    context: &StreamContext<'_>,
    stop: &Stop,
) -> Result<OpenedSink, StreamOpenError> {
    if context.stdio == StdioMode::Unavailable {
        return Err(StreamOpenError::NoStdio("to=stdout"));
    }
    // A redirection has no path to check. Before the mount exists, no file can lie in it.
    let found = rustix::fs::fstat(stdout);
    let found = found.map_err(|error| StreamOpenError::stdio("to=stdout", &error.into()))?;
    if context.mount_dev == Some(found.st_dev) {
        let why = "it lies in the mount that would need it".to_owned();
        return Err(StreamOpenError::Stdio { what: "to=stdout", why });
    }
    let wire = open_as_stdout(stdout, stop)?;
    Ok(OpenedSink::new("stdout", "stdout", SinkBackend::Wire(wire)))
}
