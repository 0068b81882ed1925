//! Where an input stream comes from.
//!
//! One thread reads, from the beginning to the end. It waits in poll(2) beside a [`Stop`], so it
//! can always be ended, whatever the other side does.

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
use rustix::pipe::fcntl_setpipe_size;

use super::command::{End, PIPE_SIZE, Pipeline};
use super::error::SinkError;
use super::fifo::{self, word_for};
use super::inherited::{self, Direction, Manner};
use super::monitor::Monitor;
use super::sink::{Inherit, Place};
use super::stop::Stop;
use crate::base::place::refuse_inside;
use crate::confined::Located;
use crate::host::errno;
use crate::spec::{Programs, StreamSpec, Supply};

/// An open source; dropped, its commands are killed.
#[derive(Debug)]
pub struct Source {
    fd: OwnedFd,
    manner: Manner,
    monitor: Monitor,
    stop: Stop,
}

impl Source {
    /// Opens `supply` for the stream `spec`. Commands are started; no writer is waited for.
    ///
    /// # Errors
    /// One line. Nothing was made then, and nothing runs.
    pub fn open(
        spec: &StreamSpec,
        supply: &Supply,
        place: &Place<'_>,
        stop: Stop,
    ) -> Result<Self, SinkError> {
        let (fd, manner, monitor) = match supply {
            Supply::Fifo(path) => open_fifo(path, place)?,
            Supply::File(path) => open_file(path, place)?,
            Supply::Command(programs) => open_command(spec, programs)?,
            Supply::Stdin => open_stdin(io::stdin().as_fd(), place)?,
        };
        Ok(Self { fd, manner, monitor, stop })
    }

    /// A handle for everybody else; what it has `accepted` is what was read here.
    #[must_use]
    pub fn monitor(&self) -> Monitor {
        self.monitor.clone()
    }

    /// Reads into `buf` what has come, at least a byte, waiting for that; 0 at the end (and for
    /// an empty `buf`).
    ///
    /// # Errors
    /// `ECANCELED` once stopped; the host's errno, for which [`Monitor::explain`] has words.
    pub fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if buf.is_empty() {
            return Ok(0);
        }
        loop {
            // First: a named pipe that no writer has opened yet reads as if it were at its end,
            // but poll(2) tells of a hangup only after one has (fs/pipe.c).
            self.wait()?;
            match self.try_read(buf) {
                Ok(len) => {
                    self.monitor.counts().accepted.fetch_add(len as u64, Ordering::Release);
                    return Ok(len);
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// It was read to the end: waits for the commands' statuses.
    ///
    /// # Errors
    /// One line about a command that failed: what it delivered is not whole then.
    pub fn end(self) -> Result<(), String> {
        match self.monitor.pipeline() {
            Some(pipeline) => pipeline.wait_or(&self.stop),
            None => Ok(()),
        }
    }

    /// It is not needed any more: kills the commands.
    pub fn close(self) {
        drop(self);
    }

    /// Waits until something can be read, or nothing ever will.
    fn wait(&self) -> io::Result<()> {
        if self.manner == Manner::Plain {
            let stopped = self.stop.is_stopped();
            return if stopped { Err(errno(libc::ECANCELED)) } else { Ok(()) };
        }
        self.stop.wait_for(self.fd.as_fd(), PollFlags::IN, None).map(|_| ())
    }

    fn try_read(&self, buf: &mut [u8]) -> Result<usize, Errno> {
        match self.manner {
            Manner::Socket => {
                let (len, _) = rustix::net::recv(&self.fd, buf, RecvFlags::DONTWAIT)?;
                Ok(len)
            }
            Manner::Poll | Manner::Careful | Manner::Plain => rustix::io::read(&self.fd, buf),
        }
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        self.monitor.kill();
    }
}

type Opened = (OwnedFd, Manner, Monitor);

fn open_fifo(path: &Path, place: &Place<'_>) -> Result<Opened, SinkError> {
    refuse_inside(path, place.mountpoint, place.mount_dev)?;
    fifo::ensure(path)?;
    let fd =
        fifo::open(path, OFlags::RDONLY).map_err(|error| SinkError::host("read", path, &error))?;
    // The user's limit on pipes may be used up; a small one is only slower.
    let _: Result<usize, Errno> = fcntl_setpipe_size(&fd, PIPE_SIZE);
    let label = format!("fifo:{}", path.display());
    Ok((fd, Manner::Poll, Monitor::new("fifo", &label, None)))
}

fn open_file(path: &Path, place: &Place<'_>) -> Result<Opened, SinkError> {
    refuse_inside(path, place.mountpoint, place.mount_dev)?;
    let failed = |error| SinkError::host("read", path, &error);
    let located = Located::at(path).map_err(failed)?;
    let found = located.metadata();
    let kind = found.file_type();
    let manner = if kind.is_file() || kind.is_block_device() {
        Manner::Plain
    } else if kind.is_char_device() {
        Manner::Poll
    } else {
        let remedy = if kind.is_fifo() { "use from=fifo:" } else { "name a file" };
        let what = word_for(FileType::from_raw_mode(found.mode()));
        return Err(SinkError::wrong(path, what, remedy));
    };
    let name = if kind.is_file() { "file" } else { "device" };
    let label = format!("file:{}", path.display());
    let fd = located.open(OFlags::RDONLY).and_then(|file| Ok(fifo::unwaiting(file)?));
    Ok((fd.map_err(failed)?, manner, Monitor::new(name, &label, None)))
}

fn open_command(spec: &StreamSpec, programs: &Programs) -> Result<Opened, SinkError> {
    let (pipeline, fd) = Pipeline::spawn(programs, &spec.dir, End::Output, Stdio::null())
        .map_err(SinkError::Command)?;
    let label = format!("cmd:{programs}");
    Ok((fd, Manner::Poll, Monitor::new("cmd", &label, Some(pipeline))))
}

fn open_stdin(stdin: std::os::fd::BorrowedFd<'_>, place: &Place<'_>) -> Result<Opened, SinkError> {
    if place.stdio == Inherit::Nothing {
        return Err(SinkError::Background("from=stdin"));
    }
    let found = rustix::fs::fstat(stdin);
    let found = found.map_err(|error| SinkError::stdio("from=stdin", &error.into()))?;
    if place.mount_dev == Some(found.st_dev) {
        let why = "it lies in the mount that would need it".to_owned();
        return Err(SinkError::Stdio { what: "from=stdin", why });
    }
    if inherited::is_terminal(stdin) {
        return Err(SinkError::Terminal("from=stdin"));
    }
    let taken = inherited::take(stdin, Direction::Reading);
    let (fd, manner) = taken.map_err(|error| SinkError::stdio("from=stdin", &error))?;
    Ok((fd, manner, Monitor::new("stdin", "stdin", None)))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::io::Write;
    use std::thread;
    use std::time::Duration;

    use tempfile::TempDir;

    use super::*;
    use crate::stream::sink::tests::{place, programs, spec};

    fn open(dir: &TempDir, supply: &Supply) -> Result<(Source, Stop), SinkError> {
        let stop = Stop::new().unwrap();
        Source::open(&spec(dir.path(), 1 << 20), supply, &place(), stop.clone())
            .map(|source| (source, stop))
    }

    fn all(source: &mut Source) -> io::Result<Vec<u8>> {
        let (mut bytes, mut buf) = (Vec::new(), [0; 1000]);
        loop {
            match source.read(&mut buf)? {
                0 => return Ok(bytes),
                len => bytes.extend(&buf[..len]),
            }
        }
    }

    #[test]
    fn a_named_pipe_is_waited_for_and_read_to_its_end() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        let (mut source, _stop) = open(&dir, &Supply::Fifo(path.clone())).unwrap();
        let writer = thread::spawn(move || {
            thread::sleep(Duration::from_millis(100));
            let mut file = File::options().write(true).open(path).unwrap();
            file.write_all(b"first").unwrap();
            thread::sleep(Duration::from_millis(50));
            file.write_all(b", second").unwrap();
        });
        assert_eq!(all(&mut source).unwrap(), b"first, second");
        assert_eq!(source.monitor().accepted(), 13);
        source.end().unwrap();
        writer.join().unwrap();
    }

    #[test]
    fn a_source_that_waits_is_stopped() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        for supply in [Supply::Fifo(path), Supply::Command(programs(&[&["sleep", "1000"]]))] {
            let (mut source, stop) = open(&dir, &supply).unwrap();
            let waiting = thread::spawn(move || (source.read(&mut [0; 10]), source));
            thread::sleep(Duration::from_millis(30));
            assert!(!waiting.is_finished(), "{supply:?}");
            stop.stop();
            let (read, source) = waiting.join().unwrap();
            assert_eq!(read.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
            source.close();
        }
    }

    #[test]
    fn a_command_delivers_and_its_status_counts() {
        let dir = TempDir::new().unwrap();
        let good = Supply::Command(programs(&[&["printf", "abcabc"], &["tr", "a", "x"]]));
        let (mut source, _stop) = open(&dir, &good).unwrap();
        assert_eq!(all(&mut source).unwrap(), b"xbcxbc");
        source.end().unwrap();
        let bad = Supply::Command(programs(&[
            &["sh", "-c", "printf abc; echo 'no such host' >&2; exit 3"],
            &["cat"],
        ]));
        let (mut source, _stop) = open(&dir, &bad).unwrap();
        let monitor = source.monitor();
        assert_eq!(all(&mut source).unwrap(), b"abc");
        let said = "'sh' exited with status 3: no such host";
        assert_eq!(source.end().unwrap_err(), said);
        assert_eq!((monitor.kind(), monitor.failure().as_deref()), ("cmd", Some(said)));
    }

    #[test]
    fn a_file_is_read_and_everything_else_is_refused() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        fs::write(&path, vec![7; 5000]).unwrap();
        let (mut source, stop) = open(&dir, &Supply::File(path.clone())).unwrap();
        assert_eq!(source.read(&mut [0; 1000]).unwrap(), 1000);
        assert_eq!(all(&mut source).unwrap(), vec![7; 4000]);
        stop.stop();
        assert!(source.read(&mut [0; 10]).is_err());
        let refused = |supply| open(&dir, &supply).unwrap_err().to_string();
        let name = path.display();
        assert!(refused(Supply::File(dir.path().into())).ends_with("is a directory: name a file"));
        let absent = dir.path().join("absent");
        let line = format!("cannot read '{}': No such file or directory", absent.display());
        assert_eq!(refused(Supply::File(absent)), line);
        let line =
            format!("'{name}' is a regular file: fifo: needs a named pipe, or nothing there");
        assert_eq!(refused(Supply::Fifo(path.clone())), line);
        assert!(refused(Supply::Stdin).starts_with("from=stdin needs -f or run"));
    }

    #[test]
    fn standard_input_is_read_to_its_end_whatever_it_is() {
        let place = Place { stdio: Inherit::Stdout, ..place() };
        let dir = TempDir::new().unwrap();
        let path = dir.path().join("in");
        // A pipe without a name, one with (whose writer has gone already), and a socket.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        fifo::ensure(&path).unwrap();
        let named = fifo::open(&path, OFlags::RDONLY).unwrap();
        let named_writer = File::options().write(true).open(&path).unwrap();
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let inputs = [(reader, writer), (named, named_writer.into()), (ours.into(), theirs.into())];
        for (stdin, writer) in inputs {
            rustix::io::write(&writer, b"all of it").unwrap();
            drop(writer);
            let (fd, manner, monitor) = open_stdin(stdin.as_fd(), &place).unwrap();
            let stop = Stop::new().unwrap();
            let mut source = Source { fd, manner, monitor, stop };
            assert_eq!(all(&mut source).unwrap(), b"all of it", "{manner:?}");
        }
    }
}
