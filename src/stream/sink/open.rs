//! How each kind of sink is opened.
//!
//! What is there is looked at first, and what is made is made last, so that a refused stream
//! leaves nothing behind.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;

use rustix::fs::{FileType, Mode, OFlags, SeekFrom, fchmod};
use rustix::io::Errno;

use super::seekable::Seekable;
use super::wire::Wire;
use super::{Inherit, Monitor, Out, Place, Sink, SinkError};
use crate::base::place::refuse_inside;
use crate::base::raw::HostKind;
use crate::confined::Located;
use crate::part::{Part, PartError};
use crate::process::mode_of_new_file;
use crate::spec::{Frames, Overwrite, Programs, StreamSpec, Target};
use crate::stream::command::{End, Pipeline};
use crate::stream::fifo::{self, word_for};
use crate::stream::inherited::{self, Direction, Manner};
use crate::stream::stop::Stop;

/// What a sink is made of.
struct Opened {
    out: Out,
    /// The file, and whether it may replace another.
    part: Option<(Part, Overwrite)>,
    monitor: Monitor,
}

impl Opened {
    fn new(kind: &'static str, label: &str, out: Out) -> Self {
        Self { out, part: None, monitor: Monitor::new(kind, label, None) }
    }
}

impl Sink {
    /// Opens `target` for the stream `spec`. Commands are started; nothing is sent yet, and no
    /// reader is waited for.
    ///
    /// # Errors
    /// One line. Nothing was made then, and nothing runs.
    pub fn open(
        spec: &StreamSpec,
        target: &Target,
        place: &Place<'_>,
        stop: Stop,
    ) -> Result<Self, SinkError> {
        let opened = match target {
            Target::Fifo(path) => open_fifo(path, place)?,
            Target::File { path, overwrite } => open_file(spec, path, *overwrite, place, &stop)?,
            Target::Command(programs) => open_command(spec, programs, place, &stop)?,
            Target::Stdout => open_stdout(io::stdout().as_fd(), place, &stop)?,
            Target::Measure => Opened::new("measure", "measure", Out::Nothing),
        };
        let Opened { out, part, monitor } = opened;
        Ok(Self {
            out: Some(out),
            part,
            frames: spec.frames,
            size: spec.size,
            is_started: false,
            broken: None,
            is_finished: false,
            monitor,
            stop,
            watcher: None,
        })
    }
}

fn refuse(path: &Path, place: &Place<'_>) -> Result<(), SinkError> {
    Ok(refuse_inside(path, place.mountpoint, place.mount_dev)?)
}

fn open_fifo(path: &Path, place: &Place<'_>) -> Result<Opened, SinkError> {
    refuse(path, place)?;
    fifo::ensure(path)?;
    let label = format!("fifo:{}", path.display());
    Ok(Opened::new("fifo", &label, Out::Fifo(path.to_owned())))
}

fn open_file(
    spec: &StreamSpec,
    path: &Path,
    overwrite: Overwrite,
    place: &Place<'_>,
    stop: &Stop,
) -> Result<Opened, SinkError> {
    refuse(path, place)?;
    let label = format!("file:{}", path.display());
    // What is looked at is what is opened: a device that is opened does something already.
    let located = match Located::at(path) {
        Ok(located) => located,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            if path.is_symlink() {
                return Err(SinkError::wrong(path, "a link to nothing", "remove it"));
            }
            return open_part(spec, path, overwrite, None, &label, stop);
        }
        Err(error) => return Err(SinkError::host("write", path, &error)),
    };
    let found = located.metadata();
    let kind = found.file_type();
    if kind.is_block_device() {
        open_device(spec, &located, path, &label, stop)
    } else if kind.is_char_device() {
        open_character_device(&located, path, &label, stop)
    } else if !kind.is_file() {
        let remedy = if kind.is_fifo() { "use to=fifo:" } else { "name a file" };
        Err(SinkError::wrong(path, word_for(FileType::from_raw_mode(found.mode())), remedy))
    } else if overwrite == Overwrite::No {
        Err(SinkError::Exists(path.to_owned()))
    } else {
        // What a link leads to is replaced, not the link.
        let real = located.real_path().map_err(|error| SinkError::host("write", path, &error))?;
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
) -> Result<Opened, SinkError> {
    let part = Part::find(path).and_then(|old| {
        let perm = mode.map_or(0o666, |mode| mode.bits());
        Part::create(path, old, perm)
    });
    let part = part.map_err(part_error)?;
    // The successor of a file is readable for nobody else, whatever the umask; a new one is as the
    // caller's umask has it, which is not this process's.
    let file = part.file().try_clone().and_then(|file| match mode.or_else(mode_of_new_file) {
        Some(mode) => Ok(fchmod(&file, mode).map(|()| file)?),
        None => Ok(file),
    });
    let file = file.map_err(|error| SinkError::host("write", part.path(), &error))?;
    let out = match spec.frames {
        Frames::Raw => Out::Seekable(Seekable::new(file, HostKind::File, stop.clone())),
        Frames::Rbd => Out::Wire(Wire::new(file.into(), Manner::Plain, stop.clone())),
    };
    Ok(Opened { part: Some((part, overwrite)), ..Opened::new("file", label, out) })
}

fn part_error(error: PartError) -> SinkError {
    match error {
        PartError::Busy(path) => SinkError::Busy(path),
        PartError::NoFile { path, kind } => {
            SinkError::wrong(&path, word_for(kind), "remove it; the stream is written there")
        }
        PartError::Host { verb, path, error } => SinkError::host(verb, &path, &error),
    }
}

fn open_device(
    spec: &StreamSpec,
    located: &Located,
    path: &Path,
    label: &str,
    stop: &Stop,
) -> Result<Opened, SinkError> {
    if spec.frames != Frames::Raw {
        return Err(SinkError::wrong(path, "a block device", "records need a file or a command"));
    }
    // EXCL: refused while it is mounted, or used by anybody who says so.
    let opened = located.open(OFlags::WRONLY | OFlags::EXCL);
    let file = opened.map_err(|error| SinkError::host("write", path, &error))?;
    let size = rustix::fs::seek(&file, SeekFrom::End(0));
    let size = size.map_err(|error| SinkError::host("measure", path, &error.into()))?;
    if size < spec.size {
        return Err(SinkError::Small { path: path.to_owned(), size, needed: spec.size });
    }
    let out = Seekable::new(file, HostKind::BlockDevice, stop.clone());
    Ok(Opened::new("device", label, Out::Seekable(out)))
}

fn open_character_device(
    located: &Located,
    path: &Path,
    label: &str,
    stop: &Stop,
) -> Result<Opened, SinkError> {
    let opened = located.open(OFlags::WRONLY);
    let file = opened.map_err(|error| SinkError::host("write", path, &error))?;
    // Nothing waits but poll(2), which can be stopped.
    let fd =
        fifo::unwaiting(file).map_err(|error| SinkError::host("write", path, &error.into()))?;
    if inherited::is_terminal(&fd) {
        return Err(SinkError::wrong(path, "a terminal", "name a file"));
    }
    Ok(Opened::new("device", label, Out::Wire(Wire::new(fd, Manner::Poll, stop.clone()))))
}

fn open_command(
    spec: &StreamSpec,
    programs: &Programs,
    place: &Place<'_>,
    stop: &Stop,
) -> Result<Opened, SinkError> {
    let stdout = match place.stdio {
        Inherit::Stdout => Stdio::inherit(),
        Inherit::Nothing => Stdio::null(),
    };
    let (pipeline, fd) =
        Pipeline::spawn(programs, &spec.dir, End::Input, stdout).map_err(SinkError::Command)?;
    let label = format!("cmd:{programs}");
    let out = Out::Wire(Wire::new(fd, Manner::Poll, stop.clone()));
    Ok(Opened { out, part: None, monitor: Monitor::new("cmd", &label, Some(pipeline)) })
}

/// `stdout` is a parameter for the tests.
pub(super) fn open_as_stdout(
    stdout: std::os::fd::BorrowedFd<'_>,
    stop: &Stop,
) -> Result<Wire, SinkError> {
    if inherited::is_terminal(stdout) {
        return Err(SinkError::Terminal("to=stdout"));
    }
    let taken = inherited::take(stdout, Direction::Writing);
    let (fd, manner) = taken.map_err(|error| match error.raw_os_error() {
        // Opening a pipe without a reader.
        Some(libc::ENXIO) => SinkError::stdio("to=stdout", &Errno::PIPE.into()),
        _ => SinkError::stdio("to=stdout", &error),
    })?;
    Ok(Wire::new(fd, manner, stop.clone()))
}

fn open_stdout(
    stdout: std::os::fd::BorrowedFd<'_>,
    place: &Place<'_>,
    stop: &Stop,
) -> Result<Opened, SinkError> {
    if place.stdio == Inherit::Nothing {
        return Err(SinkError::Background("to=stdout"));
    }
    // A redirection has no path to look at; before the mount it cannot lie in it.
    let found = rustix::fs::fstat(stdout);
    let found = found.map_err(|error| SinkError::stdio("to=stdout", &error.into()))?;
    if place.mount_dev == Some(found.st_dev) {
        let why = "it lies in the mount that would need it".to_owned();
        return Err(SinkError::Stdio { what: "to=stdout", why });
    }
    let wire = open_as_stdout(stdout, stop)?;
    Ok(Opened::new("stdout", "stdout", Out::Wire(wire)))
}
