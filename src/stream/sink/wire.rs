//! A sequential sink: a pipe, a socket, or a file written from beginning to end.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFlags, Timespec};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustix::pipe::{IoSliceRaw, SpliceFlags, vmsplice};

use super::vectored::{
    MAX_IOVECS, MAX_WRITE, ZERO_IOVECS, ZERO_PIECE, fitting_count, write_parts, write_some_zeros,
};
use crate::host::os_error;
use crate::program::stop::Stop;
use crate::stream::fifo;
use crate::stream::stdio::{FdMode, PIPE_BUF};

/// The interval at which `open_fifo` checks for a reader: an open(2) that blocks until there is one
/// could not be stopped.
const POLL_INTERVAL: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// A writer to a sequential target.
#[derive(Debug)]
pub(super) struct WireWriter {
    fd: Arc<OwnedFd>,
    mode: FdMode,
    stop: Stop,
}

impl WireWriter {
    pub(super) fn new(fd: OwnedFd, mode: FdMode, stop: Stop) -> Self {
        Self { fd: Arc::new(fd), mode, stop }
    }

    /// Returns the descriptor if it reports the loss of its readers, as pipes and sockets do. The
    /// other side sees the end only when this copy is closed as well.
    pub(super) fn hangup_fd(&self) -> Option<Arc<OwnedFd>> {
        let found = rustix::fs::fstat(&self.fd).ok()?;
        let kind = FileType::from_raw_mode(found.st_mode);
        matches!(kind, FileType::Fifo | FileType::Socket).then(|| Arc::clone(&self.fd))
    }

    /// Opens the named pipe `path`, once it has a reader.
    pub(super) fn open_fifo(path: &Path, stop: Stop) -> io::Result<Self> {
        loop {
            match fifo::open(path, OFlags::WRONLY) {
                Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
                    stop.sleep(POLL_INTERVAL)?;
                }
                Err(error) => return Err(error),
                Ok(fd) => {
                    fifo::enlarge(&fd);
                    return Ok(Self::new(fd, FdMode::NonBlocking, stop));
                }
            }
        }
    }

    /// Writes all of `parts`; calls `passed` with the length of each piece once it has been
    /// written.
    pub(super) fn write_all(
        &self,
        parts: &[IoSlice<'_>],
        mut passed: impl FnMut(u64),
    ) -> io::Result<()> {
        write_parts(parts, |left| {
            let len = self.write_some(left)?;
            passed(len as u64);
            Ok(len)
        })
    }

    /// Writes `len` zeros, as [`Self::write_all`] does.
    pub(super) fn write_zeros(&self, len: u64, mut passed: impl FnMut(u64)) -> io::Result<()> {
        let mut left = len;
        while left > 0 {
            if let Some(lent) = self.splice_zeros(left)? {
                passed(lent);
                left -= lent;
                continue;
            }
            let written = write_some_zeros(left, |pieces| self.write_some(pieces))?;
            passed(written);
            left -= written;
        }
        Ok(())
    }

    /// Puts pages of zeros into a pipe without copying them; returns `None` if the target is not a
    /// pipe, or for the last few bytes.
    fn splice_zeros(&self, left: u64) -> io::Result<Option<u64>> {
        if self.mode != FdMode::NonBlocking || left < ZERO_PIECE.len() as u64 {
            return Ok(None);
        }
        let count = usize::try_from(left / ZERO_PIECE.len() as u64).unwrap_or(ZERO_IOVECS);
        let pieces = [(); ZERO_IOVECS].map(|()| IoSliceRaw::from_slice(&ZERO_PIECE));
        loop {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            // SAFETY: the pipe refers to these pages until they are read. They belong to an
            // immutable static that lives as long as the process.
            let lent = unsafe {
                vmsplice(&self.fd, &pieces[..count.min(ZERO_IOVECS)], SpliceFlags::NONBLOCK)
            };
            match lent {
                // The target is not a pipe.
                Ok(0) | Err(Errno::BADF | Errno::INVAL) => return Ok(None),
                Ok(len) => return Ok(Some(len as u64)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_writable()?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes a prefix of `parts`, the first of which must not be empty; waits while nothing can be
    /// written.
    fn write_some(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        loop {
            if self.stop.is_stopped() {
                return Err(os_error(libc::ECANCELED));
            }
            if self.mode == FdMode::SharedBlocking {
                self.wait_writable()?;
            }
            match self.try_write(parts) {
                Ok(0) => return Err(os_error(libc::EIO)),
                Ok(len) => return Ok(len),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_writable()?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn wait_writable(&self) -> io::Result<()> {
        // Errors end the wait, too; the write reports which.
        self.stop.wait_for(self.fd.as_fd(), PollFlags::OUT, None).map(|_| ())
    }

    fn try_write(&self, parts: &[IoSlice<'_>]) -> Result<usize, Errno> {
        let some = &parts[..parts.len().min(MAX_IOVECS)];
        match self.mode {
            FdMode::NonBlocking => rustix::io::writev(&self.fd, some),
            FdMode::Socket => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                sendmsg(&self.fd, some, &mut SendAncillaryBuffer::default(), flags)
            }
            FdMode::SharedBlocking => {
                let first = &parts[0];
                rustix::io::write(&self.fd, &first[..first.len().min(PIPE_BUF)])
            }
            FdMode::Plain => match fitting_count(some) {
                0 => rustix::io::write(&self.fd, &parts[0][..MAX_WRITE]),
                count => rustix::io::writev(&self.fd, &some[..count]),
            },
        }
    }
}
