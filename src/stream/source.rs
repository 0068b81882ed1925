//! The sources of an input stream.
//!
//! One thread reads, from the beginning to the end. It waits in poll(2) together with a [`Stop`],
//! so it can always be ended, whatever the other side does.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;

use rustix::event::PollFlags;
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::command::{PipeEnd, Pipeline};
use super::context::{StdioMode, StreamContext};
use super::error::StreamOpenError;
use super::fifo::{self, file_type_name};
use super::input::Source;
use super::monitor::Monitor;
use super::stdio::{self, Direction, FdMode};
use crate::base::self_reference::check_self_reference;
use crate::config::{Programs, SourceSpec, StreamSpec};
use crate::confined::PathHandle;
use crate::host::os_error;
use crate::program::stop::Stop;

/// An open source. Dropping it kills its commands.
#[derive(Debug)]
pub struct HostSource {
    fd: OwnedFd,
    mode: FdMode,
    monitor: Monitor,
    stop: Stop,
}

impl HostSource {
    /// Opens `source` for the stream `spec`. Commands are started; the call waits for no writer.
    ///
    /// # Errors
    /// One line for the user. Nothing has been created then, and nothing runs.
    pub fn open(
        spec: &StreamSpec,
        source: &SourceSpec,
        context: &StreamContext<'_>,
        stop: Stop,
    ) -> Result<Self, StreamOpenError> {
        let (fd, mode, monitor) = match source {
            SourceSpec::Fifo(path) => open_fifo(path, context)?,
            SourceSpec::File(path) => open_file(path, context)?,
            SourceSpec::Command(programs) => open_command(spec, programs)?,
            SourceSpec::Stdin => open_stdin(io::stdin().as_fd(), context)?,
        };
        Ok(Self { fd, mode, monitor, stop })
    }

    /// Returns a handle for other threads; its `accepted` counts the bytes read here.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// Waits until a read will not block: there are bytes, or the input has ended.
    fn wait_readable(&self) -> io::Result<()> {
        if self.mode == FdMode::Plain {
            let stopped = self.stop.is_stopped();
            return if stopped { Err(os_error(libc::ECANCELED)) } else { Ok(()) };
        }
        self.stop.wait_for(self.fd.as_fd(), PollFlags::IN, None).map(|_| ())
    }

    fn try_read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        match self.mode {
            FdMode::Socket => {
                let (len, _) = rustix::net::recv(&self.fd, buf, RecvFlags::DONTWAIT)?;
                Ok(len)
            }
            FdMode::NonBlocking | FdMode::SharedBlocking | FdMode::Plain => {
                rustix::io::read(&self.fd, buf)
            }
        }
    }
}

impl Source for HostSource {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            // Poll first: a named pipe that no writer has opened yet reads as if it were at its
            // end, but poll(2) reports a hangup only after a writer has opened it (fs/pipe.c).
            self.wait_readable()?;
            match self.try_read(buf) {
                Ok(len) => {
                    self.monitor.counters().accepted.fetch_add(len as u64, Ordering::Release);
                    return Ok(len);
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn finish(self: Box<Self>) -> Result<(), String> {
        match self.monitor.pipeline() {
            Some(pipeline) => pipeline.wait_unless_stopped(&self.stop),
            None => Ok(()),
        }
    }

    fn close(self: Box<Self>) {
        drop(self);
    }
}

impl Drop for HostSource {
    fn drop(&mut self) {
        self.monitor.kill();
    }
}

type OpenedSource = (OwnedFd, FdMode, Monitor);

fn open_fifo(path: &Path, context: &StreamContext<'_>) -> Result<OpenedSource, StreamOpenError> {
    check_self_reference(path, context.mountpoint, context.mount_dev)?;
    fifo::create_missing(path)?;
    let fd = fifo::open(path, OFlags::RDONLY)
        .map_err(|error| StreamOpenError::host("read", path, &error))?;
    fifo::enlarge(&fd);
    let label = format!("fifo:{}", path.display());
    Ok((fd, FdMode::NonBlocking, Monitor::new("fifo", &label, None)))
}

fn open_file(path: &Path, context: &StreamContext<'_>) -> Result<OpenedSource, StreamOpenError> {
    check_self_reference(path, context.mountpoint, context.mount_dev)?;
    let failed = |error| StreamOpenError::host("read", path, &error);
    let located = PathHandle::at(path).map_err(failed)?;
    let found = located.metadata();
    let kind = found.file_type();
    let mode = if kind.is_file() || kind.is_block_device() {
        FdMode::Plain
    } else if kind.is_char_device() {
        FdMode::NonBlocking
    } else {
        let remedy = if kind.is_fifo() { "use from=fifo:" } else { "name a file" };
        let what = file_type_name(FileType::from_raw_mode(found.mode()));
        return Err(StreamOpenError::wrong_kind(path, what, remedy));
    };
    let name = if kind.is_file() { "file" } else { "device" };
    let label = format!("file:{}", path.display());
    let fd = located.open(OFlags::RDONLY).and_then(|file| Ok(crate::host::set_nonblocking(file)?));
    Ok((fd.map_err(failed)?, mode, Monitor::new(name, &label, None)))
}

fn open_command(spec: &StreamSpec, programs: &Programs) -> Result<OpenedSource, StreamOpenError> {
    let (pipeline, fd) = Pipeline::spawn(programs, &spec.dir, PipeEnd::Output, Stdio::null())
        .map_err(StreamOpenError::Command)?;
    let label = format!("cmd:{programs}");
    Ok((fd, FdMode::NonBlocking, Monitor::new("cmd", &label, Some(pipeline))))
}

fn open_stdin(
    stdin: std::os::fd::BorrowedFd<'_>,
    context: &StreamContext<'_>,
) -> Result<OpenedSource, StreamOpenError> {
    if context.stdio == StdioMode::Unavailable {
        return Err(StreamOpenError::NoStdio("from=stdin"));
    }
    let found = rustix::fs::fstat(stdin);
    let found = found.map_err(|error| StreamOpenError::stdio("from=stdin", &error.into()))?;
    if context.mount_dev == Some(found.st_dev) {
        let why = "it lies in the mount that would need it".to_owned();
        return Err(StreamOpenError::Stdio { what: "from=stdin", why });
    }
    if stdio::is_terminal(stdin) {
        return Err(StreamOpenError::Terminal("from=stdin"));
    }
    let taken = stdio::acquire(stdin, Direction::Reading);
    let (fd, mode) = taken.map_err(|error| StreamOpenError::stdio("from=stdin", &error))?;
    Ok((fd, mode, Monitor::new("stdin", "stdin", None)))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::thread;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::stream::sink::tests::{context, programs, spec};

    fn open(
        dir: &TempDir,
        source: &SourceSpec,
    ) -> Result<(Box<HostSource>, Stop), StreamOpenError> {
        let stop = Stop::new().unwrap();
        HostSource::open(&spec(dir.path(), 1 << 20), source, &context(), stop.clone())
            .map(|source| (Box::new(source), stop))
    }

    fn all(source: &mut HostSource) -> io::Result<Vec<u8>> {
        let (mut bytes, mut buf) = (Vec::new(), [0; 1000]);
        loop {
            match source.read(&mut buf)? {
                0 => return Ok(bytes),
                len => bytes.extend(&buf[..len]),
            }
        }
    }

    #[test]
    fn a_named_pipe_is_read_from_its_first_writer_to_its_end() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        let (mut source, _stop) = open(&dir, &SourceSpec::Fifo(path.clone())).unwrap();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let mut file = File::options().write(true).open(path).unwrap();
            file.write_all(b"first").unwrap();
            thread::sleep(Duration::from_millis(50));
            file.write_all(b", second").unwrap();
        });
        assert_eq!(all(&mut source).unwrap(), b"first, second");
        assert_eq!(source.monitor().accepted(), 13);
        source.finish().unwrap();
        writer.join().unwrap();
    }

    #[test]
    fn a_waiting_source_can_be_stopped() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        for spec in [SourceSpec::Fifo(path), SourceSpec::Command(programs(&[&["sleep", "1000"]]))] {
            let (mut source, stop) = open(&dir, &spec).unwrap();
            let waiting = thread::spawn(move || (source.read(&mut [0; 10]), source));
            thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished(), "{spec:?}");
            stop.stop();
            let (read, source) = waiting.join().unwrap();
            assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
            source.close();
        }
    }

    #[test]
    fn the_output_of_a_command_is_read_and_its_status_checked() {
        let dir = TempDir::new().unwrap();
        let good = SourceSpec::Command(programs(&[&["printf", "abcabc"], &["tr", "a", "x"]]));
        let (mut source, _stop) = open(&dir, &good).unwrap();
        assert_eq!(all(&mut source).unwrap(), b"xbcxbc");
        source.finish().unwrap();
        let bad = SourceSpec::Command(programs(&[
            &["sh", "-c", "printf abc; echo 'no such host' >&2; exit 3"],
            &["cat"],
        ]));
        let (mut source, _stop) = open(&dir, &bad).unwrap();
        let monitor = source.monitor();
        assert_eq!(all(&mut source).unwrap(), b"abc");
        let said = "'sh' exited with status 3: no such host";
        assert_eq!(source.finish().unwrap_err(), said);
        assert_eq!((monitor.kind(), monitor.failure().as_deref()), ("cmd", Some(said)));
    }

    #[test]
    fn from_file_reads_a_file_and_refuses_other_types() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        fs::write(&path, vec![7; 5000]).unwrap();
        let (mut source, stop) = open(&dir, &SourceSpec::File(path.clone())).unwrap();
        assert_eq!(source.read(&mut [0; 1000]).unwrap(), 1000);
        assert_eq!(all(&mut source).unwrap(), vec![7; 4000]);
        stop.stop();
        assert!(source.read(&mut [0; 10]).is_err());
        let refused = |source| open(&dir, &source).unwrap_err().to_string();
        let name = path.display();
        assert!(
            refused(SourceSpec::File(dir.path().into())).ends_with("is a directory: name a file")
        );
        let absent = dir.path().join("absent");
        let line = format!("cannot read '{}': No such file or directory", absent.display());
        assert_eq!(refused(SourceSpec::File(absent)), line);
        let line =
            format!("'{name}' is a regular file: fifo: needs a named pipe, or nothing there");
        assert_eq!(refused(SourceSpec::Fifo(path.clone())), line);
        assert!(refused(SourceSpec::Stdin).starts_with("from=stdin needs -f or run"));
    }

    #[test]
    fn standard_input_is_read_to_its_end_for_every_type_of_descriptor() {
        let context = StreamContext { stdio: StdioMode::Available, ..context() };
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        // An unnamed pipe, a named one (whose writer has already left), and a socket.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        fifo::create_missing(&path).unwrap();
        let named = fifo::open(&path, OFlags::RDONLY).unwrap();
        let named_writer = File::options().write(true).open(&path).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let inputs = [(reader, writer), (named, named_writer.into()), (ours.into(), theirs.into())];
        for (stdin, writer) in inputs {
            rustix::io::write(&writer, b"all of it").unwrap();
            drop(writer);
            let (fd, mode, monitor) = open_stdin(stdin.as_fd(), &context).unwrap();
            let stop = Stop::new().unwrap();
            let mut source = HostSource { fd, mode, monitor, stop };
            assert_eq!(all(&mut source).unwrap(), b"all of it", "{mode:?}");
        }
    }
}
