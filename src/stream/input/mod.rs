//! An input stream: a disk whose bytes arrive once, in order, from a source.
//!
//! One thread per stream reads the source. A read of bytes that have arrived is answered at once.
//! Any other read is parked, and that thread answers it when its last byte has arrived, so no other
//! thread waits. If the source ends or fails early, every read that needs more than it delivered is
//! answered with `EIO`, never with zeros.
//!
//! Without a spool the source is read on demand, and a little ahead:
//!
//! ```text
//!         low               served         demanded             goal
//!          v                  v                v                  v
//!   dropped|-- read-window ---|-- parked reads-|-- read-ahead ----|      size
//!          |--------- kept ---------->|arrived
//! ```
//!
//! With a spool the source is read as fast as it delivers, into a file (`spool.rs`), and nothing is
//! dropped.
//!
//! Locks: `core` guards the counters and the bytes in memory. It is not held during I/O on the
//! source or the spool, nor during a reply.

mod read_buffer;
mod reader;
mod spool;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};

use self::read_buffer::CHUNK_SIZE;
use self::spool::SpoolFile;
use self::state::{InputCore, InputPhase, PendingRead};
use crate::config::Spool;
use crate::extents::{Extent, ExtentKind};
use crate::host::{os_error, process_of_thread};
use crate::program::stop::Stop;
use crate::stream::parked::ParkPermit;

/// Bytes held besides the read-window and the needs of parked reads: 4 MiB, enough for the source
/// to continue while a few requests of 1 MiB are copied out.
pub const MAX_HELD: u64 = 4 << 20;
/// The longest wait of `close` for the exit status of a source that was read to its end.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The source of an input stream.
pub trait Source: Send + 'static {
    /// Reads the next bytes, waiting for them; returns 0 at the end.
    ///
    /// # Errors
    /// `ECANCELED` once stopped; otherwise the source's errno.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;

    /// Waits, after the end was read, until the source has ended, or until stopped.
    ///
    /// # Errors
    /// One line that says why the source has failed.
    fn finish(self: Box<Self>) -> Result<(), String>;

    /// Abandons the source before its end. If no stream could be started, the source is dropped
    /// instead.
    fn close(self: Box<Self>);
}

/// A callback that receives the bytes of a read; called exactly once.
pub type ReadReply = Box<dyn FnOnce(io::Result<Vec<u8>>) + Send>;

/// An input stream. Its thread keeps it alive until [`close`](Self::close).
pub struct Input {
    name: String,
    size: u64,
    read_window: u64,
    spool: Option<SpoolFile>,
    stop: Stop,
    /// An eventfd that is readable when the idle thread has something to do.
    wake_fd: OwnedFd,
    core: Mutex<InputCore>,
    /// Notified when the thread has the final outcome.
    ended: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// The state of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputState {
    /// The source may deliver more.
    Open,
    /// The source has delivered the whole disk and ended without error.
    Finished,
    /// The source has failed.
    Failed,
}

impl InputState {
    /// Returns the name of the state.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Finished => "finished",
            Self::Failed => "failed",
        }
    }
}

/// The status of an input stream.
#[derive(Clone, Debug)]
pub struct InputStatus {
    /// The state of the source.
    pub state: InputState,
    /// The number of bytes that have arrived.
    pub arrived: u64,
    /// The highest end of an answered read, in bytes.
    pub highest: u64,
    /// Why the source has failed, in one line.
    pub error: Option<String>,
    /// The size of the read-window in bytes; with a spool everything can be read again.
    pub window: u64,
    /// The memory held, in bytes.
    pub used: u64,
    /// The space that the spool takes on the host, in bytes.
    pub spooled: u64,
    /// The read-window that the reads so far would have needed, in bytes.
    pub needed: u64,
}

impl Input {
    /// Starts the stream `name` of `size` bytes, and its thread. `read_window` is in bytes.
    ///
    /// # Errors
    /// One line if the spool cannot be created; the errno of eventfd(2) or of creating a thread.
    pub fn start(
        name: &str,
        size: u64,
        read_window: u64,
        spool: Spool,
        source: Box<dyn Source>,
        stop: Stop,
    ) -> io::Result<Arc<Self>> {
        let spool = match spool {
            Spool::On => Some(SpoolFile::create()?),
            Spool::Off => None,
        };
        Self::start_with(name, size, read_window, spool, source, stop)
    }

    fn start_with(
        name: &str,
        size: u64,
        read_window: u64,
        spool: Option<SpoolFile>,
        source: Box<dyn Source>,
        stop: Stop,
    ) -> io::Result<Arc<Self>> {
        let window = spool.is_none().then_some(read_window);
        let input = Arc::new(Self {
            name: name.to_owned(),
            size,
            read_window,
            spool,
            stop,
            wake_fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            core: Mutex::new(InputCore::new(window)),
            ended: Condvar::new(),
            thread: Mutex::new(None),
        });
        let of_thread = Arc::clone(&input);
        let thread = thread::Builder::new()
            .name("cowslip-input".to_owned())
            .spawn(move || of_thread.run(source))?;
        *input.thread.lock() = Some(thread);
        Ok(input)
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `len` bytes at `offset`, fewer only at the end of the disk. `reply` is called exactly
    /// once, by this call or by the stream's thread, with no lock held. `client` is the thread that
    /// waits for the reply (0: unknown).
    ///
    /// # Errors
    /// The reply is `EIO` if not all of the bytes will arrive or can still be read, if the read
    /// begins too far ahead, or once stopped; the host's errno if the spool cannot be read; `EINTR`
    /// after [`release_killed`](Self::release_killed); `EBUSY` if too many reads wait already.
    pub fn read(self: &Arc<Self>, offset: u64, len: usize, client: u32, reply: ReadReply) {
        let range = offset..offset.saturating_add(len as u64).min(self.size);
        if range.is_empty() {
            return reply(Ok(Vec::new()));
        }
        let mut core = self.core.lock();
        if let Some(refusal) = core.refusal(&range) {
            drop(core);
            if let Some(line) = refusal.log_line {
                log::warn!("{}: {line}", self.name);
            }
            return reply(Err(os_error(libc::EIO)));
        }
        let mut read = PendingRead { range, client, reply, permit: None };
        let mut ready = None;
        if read.range.end <= core.arrived {
            ready = Some(core.complete(read));
            core.trim();
        } else {
            let Some(permit) = ParkPermit::acquire(core.pending.len()) else {
                drop(core);
                log::debug!("{}: too many reads wait for it", self.name);
                return (read.reply)(Err(os_error(libc::EBUSY)));
            };
            read.permit = Some(permit);
            // Resolved now, while the calling thread still exists.
            read.client = if client == 0 { 0 } else { process_of_thread(client) };
            core.pending.push(read);
        }
        self.wake(&mut core);
        drop(core);
        ready.into_iter().for_each(|ready| self.send_reply(ready));
    }

    /// Answers the parked reads of clients that are being killed with `EINTR`. Called every second.
    pub fn release_killed(&self, is_killed: impl Fn(u32) -> bool) {
        let clients: Vec<u32> = self.core.lock().pending.iter().map(|read| read.client).collect();
        // Called without the lock: it reads from /proc.
        let killed: Vec<u32> =
            clients.into_iter().filter(|client| *client != 0 && is_killed(*client)).collect();
        if killed.is_empty() {
            return;
        }
        let mut core = self.core.lock();
        let released = core.take_pending(|read| killed.contains(&read.client));
        drop(core);
        released.into_iter().for_each(|read| (read.reply)(Err(os_error(libc::EINTR))));
    }

    /// Describes a prefix of `range`: a hole only where zeros have arrived in a spool, and past the
    /// end of the disk.
    #[must_use]
    pub fn extent_at(&self, range: Range<u64>) -> Extent {
        if range.start >= self.size {
            return Extent::new(range, ExtentKind::Hole);
        }
        let range = range.start..range.end.min(self.size);
        let arrived = self.core.lock().arrived;
        match &self.spool {
            Some(spool) if !range.is_empty() && range.start < arrived => {
                spool.extent_at(range.start..range.end.min(arrived))
            }
            _ => Extent::new(range, ExtentKind::Data),
        }
    }

    /// Returns the current status.
    #[must_use]
    pub fn status(&self) -> InputStatus {
        let used = self.memory_used();
        let spooled = self.spool.as_ref().map_or(0, SpoolFile::used);
        let core = self.core.lock();
        InputStatus {
            state: core.outcome,
            arrived: core.arrived,
            highest: core.served,
            error: core.error.clone(),
            window: self.read_window,
            used,
            spooled,
            needed: core.needed,
        }
    }

    /// Returns the memory in use, in bytes: at most the read-window, [`MAX_HELD`] and the size of
    /// one parked read.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        self.core.lock().buffer.memory_used() + CHUNK_SIZE as u64
    }

    /// Stops the stream and waits for its thread. A source that was read to its end gets one second
    /// to report its outcome.
    ///
    /// # Errors
    /// One line if the source has failed; abandoning a source before its end is not a failure.
    pub fn close(&self) -> Result<(), String> {
        let mut core = self.core.lock();
        if self.is_ending(&core) && !self.stop.is_stopped() {
            let waits = |core: &mut InputCore| core.phase != InputPhase::Ended;
            self.ended.wait_while_for(&mut core, waits, CLOSE_TIMEOUT);
        }
        drop(core);
        self.stop.stop();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            return Err("the thread that reads the source has panicked".to_owned());
        }
        self.core.lock().error.clone().map_or(Ok(()), Err)
    }

    /// Returns whether only the outcome of the source is still missing.
    fn is_ending(&self, core: &InputCore) -> bool {
        core.phase == InputPhase::Ending
            || (core.phase == InputPhase::Flowing && self.is_all_read(core))
    }

    /// Returns whether all bytes of the disk have arrived, and no more reads can need the source.
    fn is_all_read(&self, core: &InputCore) -> bool {
        core.arrived == self.size && (self.spool.is_some() || core.demanded() == self.size)
    }
}
