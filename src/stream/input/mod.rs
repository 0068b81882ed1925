//! An input stream: a disk whose bytes arrive once, in order, from a source.
//!
//! One thread per stream reads the source. A read of what has arrived is answered at once; any
//! other is parked, and answered by that thread when its last byte is there, so that nobody else
//! waits. A source that ends or fails answers `EIO` to whatever needs more than it delivered:
//! never zeros.
//!
//! Without a spool the source is read when it is asked for, and a little ahead:
//!
//! ```text
//!         low               served         demanded             goal
//!          v                  v                v                  v
//!   dropped|-- read-window ---|-- parked reads-|-- read-ahead ----|      size
//!          |--------- kept ---------->|arrived
//! ```
//!
//! With a spool it is read as fast as it comes, into a file (`spool.rs`), and nothing is
//! dropped.
//!
//! Locks: `state` guards the numbers and the bytes in memory. It is never held while the source
//! or the spool is read or written, and no reply is given under it.

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
use super::stop::Stop;
use crate::config::Spool;
use crate::extents::{Extent, ExtentKind};
use crate::host::{os_error, process_of_thread};

/// What is held besides the read-window and what parked reads need: 4 MiB, enough for the source
/// to go on while a few requests of 1 MiB are copied out.
pub const READ_AHEAD: u64 = 4 << 20;
/// How long `close` waits to hear whether a source that was read to its end has ended well.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// Where the bytes come from.
pub trait Source: Send + 'static {
    /// Reads the next bytes, waits for them; 0 at the end.
    ///
    /// # Errors
    /// `ECANCELED` once stopped; else the source's errno.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize>;

    /// Called after the end: waits until the source is gone, or until stopped.
    ///
    /// # Errors
    /// One line that says why the source has failed.
    fn finish(self: Box<Self>) -> Result<(), String>;

    /// The source is given up before its end. Where no stream could be started it is only dropped.
    fn close(self: Box<Self>);
}

/// Called once with the bytes of a read.
pub type ReadReply = Box<dyn FnOnce(io::Result<Vec<u8>>) + Send>;

/// An input stream. Its thread keeps it alive until [`close`](Self::close).
pub struct Input {
    name: String,
    size: u64,
    read_window: u64,
    spool: Option<SpoolFile>,
    stop: Stop,
    /// Readable when the idle thread has something to do.
    wake_fd: OwnedFd,
    state: Mutex<InputCore>,
    /// Notified when the thread has nothing more to find out.
    ended: Condvar,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What became of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InputState {
    /// It may deliver more.
    Open,
    /// It has delivered the whole disk and ended well.
    Finished,
    /// It has not.
    Failed,
}

impl InputState {
    /// The word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Finished => "finished",
            Self::Failed => "failed",
        }
    }
}

/// How an input stream stands.
#[derive(Clone, Debug)]
pub struct InputStatus {
    /// What became of the source.
    pub state: InputState,
    /// How many bytes have arrived.
    pub arrived: u64,
    /// The highest end of a read that was answered, in bytes.
    pub highest: u64,
    /// Why the source has failed: one line.
    pub error: Option<String>,
    /// How far back can be read, in bytes; with a spool everything can.
    pub window: u64,
    /// How much memory is held, in bytes.
    pub used: u64,
    /// How much space the spool takes on the host, in bytes.
    pub spooled: u64,
    /// The read-window that the reads so far need, in bytes.
    pub needed: u64,
}

impl Input {
    /// Starts the stream `name` of `size` bytes, and its thread. `read_window` is in bytes.
    ///
    /// # Errors
    /// One line when the spool cannot be made; the errno of eventfd(2) or of making a thread.
    pub fn start(
        name: &str,
        size: u64,
        read_window: u64,
        spool: Spool,
        supplier: Box<dyn Source>,
        stop: Stop,
    ) -> io::Result<Arc<Self>> {
        let spool = match spool {
            Spool::On => Some(SpoolFile::create()?),
            Spool::Off => None,
        };
        Self::start_with(name, size, read_window, spool, supplier, stop)
    }

    fn start_with(
        name: &str,
        size: u64,
        read_window: u64,
        spool: Option<SpoolFile>,
        supplier: Box<dyn Source>,
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
            state: Mutex::new(InputCore::new(window)),
            ended: Condvar::new(),
            thread: Mutex::new(None),
        });
        let of_thread = Arc::clone(&input);
        let thread = thread::Builder::new()
            .name("cowslip-input".to_owned())
            .spawn(move || of_thread.run(supplier))?;
        *input.thread.lock() = Some(thread);
        Ok(input)
    }

    /// The size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Reads `len` bytes at `offset`, fewer only at the disk's end. `reply` is called exactly
    /// once, here or by the stream's thread, with no lock held. `client` is the thread that waits
    /// for it (0: unknown).
    ///
    /// # Errors
    /// The reply is `EIO` when not all of the bytes will arrive or can still be read, when the
    /// read begins too far ahead, or once stopped; the host's errno when the spool cannot be
    /// read; `EINTR` after [`release_killed`](Self::release_killed).
    pub fn read(self: &Arc<Self>, offset: u64, len: usize, client: u32, reply: ReadReply) {
        let range = offset..offset.saturating_add(len as u64).min(self.size);
        if range.is_empty() {
            return reply(Ok(Vec::new()));
        }
        let mut state = self.state.lock();
        if let Some(line) = state.refusal(&range) {
            drop(state);
            if let Some(line) = line {
                log::warn!("{}: {line}", self.name);
            }
            return reply(Err(os_error(libc::EIO)));
        }
        let mut read = PendingRead { range, client, reply };
        let mut ready = None;
        if read.range.end <= state.arrived {
            ready = Some(state.complete(read));
            state.trim();
        } else {
            // Now, while the thread that asks is there.
            read.client = if client == 0 { 0 } else { process_of_thread(client) };
            state.pending.push(read);
        }
        self.wake(&mut state);
        drop(state);
        ready.into_iter().for_each(|ready| self.send_reply(ready));
    }

    /// Answers `EINTR` to the parked reads of clients that are being killed. Called every second.
    pub fn release_killed(&self, is_killed: impl Fn(u32) -> bool) {
        let clients: Vec<u32> = self.state.lock().pending.iter().map(|read| read.client).collect();
        // Asked without the lock: it looks into /proc.
        let killed: Vec<u32> =
            clients.into_iter().filter(|client| *client != 0 && is_killed(*client)).collect();
        if killed.is_empty() {
            return;
        }
        let mut state = self.state.lock();
        let released = state.take_pending(|read| killed.contains(&read.client));
        drop(state);
        released.into_iter().for_each(|read| (read.reply)(Err(os_error(libc::EINTR))));
    }

    /// What a prefix of `range` is: a hole only where zeros have arrived in a spool, and past the
    /// disk's end.
    #[must_use]
    pub fn extent_at(&self, range: Range<u64>) -> Extent {
        if range.start >= self.size {
            return Extent::new(range, ExtentKind::Hole);
        }
        let range = range.start..range.end.min(self.size);
        let arrived = self.state.lock().arrived;
        match &self.spool {
            Some(spool) if !range.is_empty() && range.start < arrived => {
                spool.extent_at(range.start..range.end.min(arrived))
            }
            _ => Extent::new(range, ExtentKind::Data),
        }
    }

    /// How it stands now.
    #[must_use]
    pub fn status(&self) -> InputStatus {
        let used = self.memory_used();
        let spooled = self.spool.as_ref().map_or(0, SpoolFile::used);
        let state = self.state.lock();
        InputStatus {
            state: state.outcome,
            arrived: state.arrived,
            highest: state.served,
            error: state.error.clone(),
            window: self.read_window,
            used,
            spooled,
            needed: state.needed,
        }
    }

    /// How much memory the stream takes, in bytes: at most the read-window, [`READ_AHEAD`] and
    /// what one parked read asks for.
    #[must_use]
    pub fn memory_used(&self) -> u64 {
        self.state.lock().buffer.memory_used() + CHUNK_SIZE as u64
    }

    /// Stops the stream and waits for its thread. A source that was read to its end is given a
    /// second to tell how it ended.
    ///
    /// # Errors
    /// One line when the source has failed; one that was not read to its end has not.
    pub fn close(&self) -> Result<(), String> {
        let mut state = self.state.lock();
        if self.is_ending(&state) && !self.stop.is_stopped() {
            let waits = |state: &mut InputCore| state.phase != InputPhase::Ended;
            self.ended.wait_while_for(&mut state, waits, CLOSE_TIMEOUT);
        }
        drop(state);
        self.stop.stop();
        let thread = self.thread.lock().take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            return Err("the thread that reads the source has panicked".to_owned());
        }
        self.state.lock().error.clone().map_or(Ok(()), Err)
    }

    /// Whether only the source's verdict is still to come.
    fn is_ending(&self, state: &InputCore) -> bool {
        state.phase == InputPhase::Ending
            || (state.phase == InputPhase::Flowing && self.is_all_read(state))
    }

    /// Whether all has arrived that there is, and nobody has more to ask for.
    fn is_all_read(&self, state: &InputCore) -> bool {
        state.arrived == self.size && (self.spool.is_some() || state.demanded() == self.size)
    }
}
