//! Reads of a mount's files, each wait of which is bounded.
//!
//! Any call into a mount may hang with the mount, and such a call cannot be interrupted. So every
//! call is made on a thread of its own, which passes on the data chunk by chunk. The reader waits
//! at most [`ANSWER_TIMEOUT`] for the next chunk; a daemon at work sends a sign of life every
//! second.

use std::io::{self, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::confined_mount::ConfinedMount;
use super::error::AskAbort;

/// Time limit for the next chunk of an answer, after which a mount counts as hanging.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// Interval at which a waiting reader checks whether the user interrupted the command.
const STOP_POLL_INTERVAL: Duration = Duration::from_millis(200);

/// Size of one read in bytes: the kernel's own limit for one direct read is a multiple of it.
const READ_CHUNK: usize = 128 << 10;

/// A reader of a file in a mount, as the data arrives. A read that waits [`ANSWER_TIMEOUT`] fails
/// as `TimedOut`; the thread behind it ends with the mount or with this process.
pub(in crate::cli) struct MountReader {
    chunks: Receiver<io::Result<Vec<u8>>>,
    /// Data received but not yet read.
    rest: io::Cursor<Vec<u8>>,
    /// Time by which the whole file must have arrived.
    deadline: Option<Instant>,
    /// Set when the data is no longer wanted.
    stop: Arc<AtomicBool>,
}

impl MountReader {
    /// Starts to read the file `file` of the control directory reached by `dir`, after writing
    /// `request` to the file, if there is one. The directory must be that of the disk `inode`.
    ///
    /// An error, also that of `mount`, is that of the first read.
    pub(super) fn start(
        mount: io::Result<ConfinedMount>,
        dir: Vec<String>,
        file: &'static str,
        request: Option<String>,
        inode: Option<u64>,
    ) -> Self {
        // Queue a few chunks ahead, so that reading a long map does not wait for each one.
        let (to, chunks) = sync_channel(4);
        let failed = to.clone();
        let started = mount.and_then(|mount| {
            thread::Builder::new().name("ask".into()).spawn(move || {
                let request = request.as_deref();
                if let Err(error) = send_and_read(&mount, &dir, file, request, inode, &to) {
                    let _ = to.send(Err(error));
                }
            })
        });
        if let Err(error) = started {
            let _ = failed.send(Err(error));
        }
        Self { chunks, rest: io::Cursor::default(), deadline: None, stop: Arc::default() }
    }

    /// Sets the time limit for the whole file.
    pub(super) fn with_deadline(mut self, time: Duration) -> Self {
        self.deadline = Some(Instant::now() + time);
        self
    }

    /// Fails reads with [`AskAbort::Interrupted`] once `stop` is set.
    pub(super) fn with_stop(mut self, stop: &Arc<AtomicBool>) -> Self {
        self.stop = Arc::clone(stop);
        self
    }

    /// Returns the next chunk; `None` at the end.
    fn next_chunk(&self) -> io::Result<Option<Vec<u8>>> {
        let answer_deadline = Instant::now() + ANSWER_TIMEOUT;
        let until = self.deadline.map_or(answer_deadline, |until| until.min(answer_deadline));
        loop {
            if self.stop.load(Ordering::SeqCst) {
                return Err(io::Error::other(AskAbort::Interrupted));
            }
            let left = until.saturating_duration_since(Instant::now());
            match self.chunks.recv_timeout(left.min(STOP_POLL_INTERVAL)) {
                Ok(chunk) => return chunk.map(Some),
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
pub(super) fn with_timeout<T: Send + 'static>(
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
    mount: &ConfinedMount,
    dir: &[String],
    file: &str,
    request: Option<&str>,
    inode: Option<u64>,
    to: &SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    // A request carries the inode number itself, and the daemon compares it.
    let dir = mount.open_control_dir(dir, inode.filter(|_| request.is_none()))?;
    let flags = if request.is_some() { OFlags::RDWR } else { OFlags::RDONLY };
    let mut file = mount.open_in(&dir, &[file], flags)?;
    // An open directory would keep the mount busy.
    drop(dir);
    if let Some(request) = request {
        file.write_all(request.as_bytes())?;
    }
    let mut chunk = vec![0; READ_CHUNK];
    loop {
        let len = match file.read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            len => len?,
        };
        if len == 0 || to.send(Ok(chunk[..len].to_vec())).is_err() {
            return Ok(());
        }
    }
}

impl Read for MountReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            let len = self.rest.read(buf)?;
            if len > 0 || buf.is_empty() {
                return Ok(len);
            }
            let Some(chunk) = self.next_chunk()? else {
                return Ok(0);
            };
            self.rest = io::Cursor::new(chunk);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::confined_mount::tests::mount;
    use super::*;

    #[test]
    fn long_file_arrives_complete() {
        let (dir, confined) = mount();
        let bytes: Vec<u8> = (0..1_000_003u32).map(|i| i.to_le_bytes()[0]).collect();
        std::fs::write(dir.path().join(".cowslip/log"), &bytes).unwrap();
        let (to, chunks) = sync_channel(100);
        send_and_read(&confined, &[".cowslip".to_owned()], "log", None, None, &to).unwrap();
        drop(to);
        let all: Vec<u8> = chunks.iter().flat_map(Result::unwrap).collect();
        assert!(all == bytes);
    }
}
