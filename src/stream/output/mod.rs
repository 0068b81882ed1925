//! An output stream: clients write to it, and one thread sends the data to a sink.
//!
//! ```text
//!   write ──> window: fits? ──> store ──> frontier advances ──┐ (under one lock, for as long as
//!     │          │ no room while the sink is behind           │  it takes to copy)
//!     │          └──> queue: the reply is parked              v
//!     └──< reply                 ^                        sender ──> sink   (no lock held)
//!                                └── carried out when there is room ──┘
//! ```
//!
//! The data held is bounded by window, spill and a backlog of 2 MiB. A write that would exceed the
//! bound waits in the queue, and no thread waits with it. Whether a write is accepted depends on
//! the order of the writes alone, never on the speed of the sink.
//!
//! `writes` implements the writes and discards, `sender` the thread, and `finish` the end of a
//! stream.
//!
//! A failure is permanent: every later write, sync and close is `EIO`. A write that is refused
//! leaves a debt (`refused`): without it the image is not whole.

mod finish;
mod refused;
mod sender;
mod sink_trait;
mod writes;

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use parking_lot::{Condvar, Mutex, MutexGuard};

pub use self::finish::{DrainTimeout, FinishError};
use self::refused::RefusedWrites;
pub use self::sink_trait::{Sink, SinkCallback, SinkEvent};
use super::monitor::Monitor;
use super::needed::NeededSizes;
use super::page_store::PageStore;
use super::queue::{QueuedWrite, WriteQueue, WriteReply};
use super::runs::Written;
use super::window::Window;
use crate::config::{FinishWhen, Pad, StreamSpec};
use crate::extents::Extent;
use crate::host::os_error;
use crate::layer::Wait;
use crate::program::stop::Stop;

/// Bytes that may be on their way to the sink beyond those in window and spill: 2 MiB, enough to
/// keep both ends busy.
const BACKLOG_LIMIT: u64 = 2 << 20;

/// The state of an output stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputState {
    /// Accepts writes.
    Open,
    /// Complete; the remaining data is being sent.
    Finishing,
    /// The sink has accepted everything.
    Finished,
    /// Failed before it was complete: a write came too late, or the sink failed.
    Failed,
    /// Aborted on request.
    Aborted,
}

impl OutputState {
    /// Returns the name of the state.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Finishing => "finishing",
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
        }
    }
}

/// The status of an output stream; offsets and sizes in bytes.
#[derive(Clone, Debug)]
pub struct OutputStatus {
    /// The current state.
    pub state: OutputState,
    /// The reason of a failure.
    pub error: Option<String>,
    /// The frontier: the offset of the first byte that can still be changed.
    pub frontier: u64,
    /// The end of the highest write.
    pub highest: u64,
    /// The offset before which the sink has accepted everything.
    pub accepted: u64,
    /// The window.
    pub window: BufferUse,
    /// The spill.
    pub spill: BufferUse,
    /// The sizes that the stream has needed so far.
    pub needed: NeededSizes,
    /// The kind of the sink.
    pub kind: &'static str,
    /// The sink as the user wrote it.
    pub sink: String,
}

/// The use of a window or a spill.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BufferUse {
    /// The size in bytes; `None` without a limit.
    pub size: Option<u64>,
    /// The bytes of data held.
    pub used: u64,
}

/// Bytes of memory charged for a rewrite besides its data, since many rewrites of zeros use memory,
/// too.
const REWRITE_OVERHEAD: u64 = 64;

enum Rewrite {
    Data(Vec<u8>),
    Zeros(u64),
    Hole(u64),
}

impl Rewrite {
    /// Returns the approximate bytes of memory used.
    fn cost(&self) -> u64 {
        match self {
            Self::Data(bytes) => REWRITE_OVERHEAD + bytes.len() as u64,
            Self::Zeros(_) | Self::Hole(_) => REWRITE_OVERHEAD,
        }
    }
}

struct OutputCore {
    window: Window,
    pages: PageStore,
    queue: WriteQueue,
    refused: RefusedWrites,
    /// Rewrites of ranges already sent, for frames that carry offsets.
    rewrites: VecDeque<(u64, Rewrite)>,
    rewrite_bytes: u64,
    state: OutputState,
    error: Option<String>,
    /// The offset before which everything has been dropped from the store.
    dropped_end: u64,
    /// Whether the sender has ended.
    sender_ended: bool,
    /// The reason why the sink accepts nothing more.
    sink_gone: Option<String>,
}

impl OutputCore {
    fn push_rewrite(&mut self, offset: u64, rewrite: Rewrite) {
        self.rewrite_bytes += rewrite.cost();
        self.rewrites.push_back((offset, rewrite));
    }
}

/// An output stream.
pub struct Output {
    name: String,
    size: u64,
    read_window: u64,
    spill: Option<u64>,
    window_size: u64,
    pad: Pad,
    finish: FinishWhen,
    can_rewrite: bool,
    core: Mutex<OutputCore>,
    /// The bytes written, counted by the window. Beside the lock, because spill I/O happens under
    /// it, and a stat must not wait for a host that hangs.
    written: Arc<AtomicU64>,
    /// Whether the stream has failed or was aborted, which no stream recovers from. Beside the lock
    /// like `written`, for flush and fsync.
    has_failed: AtomicBool,
    /// Notified when the sender has work to do.
    work: Condvar,
    /// Notified when the state has changed or the sender has ended.
    changed: Condvar,
    monitor: Monitor,
    stop: Stop,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Output {
    /// Starts the stream `name` into `sink`. Data that does not fit into memory goes to
    /// a file in `dir`. `stop` must be the signal that `sink` observes, and `monitor` the handle of `sink`.
    ///
    /// # Errors
    /// The errno of creating a thread.
    pub fn start(
        name: &str,
        spec: &StreamSpec,
        sink: Box<dyn Sink>,
        monitor: Monitor,
        stop: Stop,
        dir: PathBuf,
    ) -> io::Result<Arc<Self>> {
        let measures = monitor.kind() == "measure";
        let spill = if measures { spec.spill } else { Some(spec.spill.unwrap_or(0)) };
        let kept = spec.window.min(spec.size).saturating_add(spec.read_window.min(spec.size));
        let memory = if measures { BACKLOG_LIMIT } else { kept.saturating_add(BACKLOG_LIMIT) };
        let mut window = Window::new(spec.size, spec.window, spill.unwrap_or(u64::MAX));
        window.set_read_window(spec.read_window);
        let core = OutputCore {
            window,
            pages: PageStore::new(memory, dir.clone(), spec.compress),
            queue: WriteQueue::new(dir),
            refused: RefusedWrites::default(),
            rewrites: VecDeque::new(),
            rewrite_bytes: 0,
            state: OutputState::Open,
            error: None,
            dropped_end: 0,
            sender_ended: false,
            sink_gone: None,
        };
        let output = Arc::new(Self {
            name: name.to_owned(),
            size: spec.size,
            read_window: spec.read_window,
            spill,
            window_size: spec.window,
            pad: spec.pad,
            finish: spec.finish,
            can_rewrite: sink.can_rewrite(),
            written: Arc::clone(core.window.written()),
            core: Mutex::new(core),
            has_failed: AtomicBool::new(false),
            work: Condvar::new(),
            changed: Condvar::new(),
            monitor,
            stop,
            sender: Mutex::new(None),
        });
        let ours = Arc::clone(&output);
        let sender = thread::Builder::new().name("cowslip-send".to_owned());
        *output.sender.lock() = Some(sender.spawn(move || ours.run_sender(sink))?);
        Ok(output)
    }

    /// Returns the size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Returns the number of bytes written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.written.load(Ordering::Relaxed)
    }

    /// Returns the event that completes the stream.
    #[must_use]
    pub fn finish_when(&self) -> FinishWhen {
        self.finish
    }

    /// Describes a prefix of `range`, which must be inside the disk.
    ///
    /// # Errors
    /// `EAGAIN` under [`Wait::No`] while others work with the stream.
    pub fn extent_at(&self, range: Range<u64>, wait: Wait) -> io::Result<Extent> {
        Ok(self.lock_core(wait)?.window.extent_at(range))
    }

    /// Reads written data, and zeros where nothing was written. Reading never moves the frontier.
    ///
    /// # Errors
    /// `EIO` before the frontier and the read-window; `EAGAIN` under [`Wait::No`] while others work
    /// with the stream; the host's errno from the spill.
    pub fn read(&self, buf: &mut [u8], offset: u64, wait: Wait) -> io::Result<()> {
        let mut core = self.lock_core(wait)?;
        if offset < core.window.frontier().saturating_sub(self.read_window) {
            return Err(os_error(libc::EIO));
        }
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (stop, written) = core.window.runs().at(at);
            let stop = stop.min(end);
            let part = &mut buf[index(at - offset)..index(stop - offset)];
            match written {
                Some(Written::Data) => core.pages.read(at, part)?,
                Some(Written::Zeros) | None => part.fill(0),
            }
            at = stop;
        }
        Ok(())
    }

    fn lock_core(&self, wait: Wait) -> io::Result<MutexGuard<'_, OutputCore>> {
        match wait {
            Wait::Yes => Ok(self.core.lock()),
            Wait::No => self.core.try_lock().ok_or_else(|| os_error(libc::EAGAIN)),
        }
    }

    /// Returns whether the stream still works. Nothing is sent: only `finish` completes a stream.
    ///
    /// # Errors
    /// `EIO` if the stream has failed or was aborted.
    pub fn sync(&self) -> io::Result<()> {
        if self.has_failed.load(Ordering::Acquire) { Err(os_error(libc::EIO)) } else { Ok(()) }
    }

    /// Returns the status of the stream.
    #[must_use]
    pub fn status(&self) -> OutputStatus {
        let core = self.core.lock();
        let window = &core.window;
        OutputStatus {
            state: core.state,
            error: core.error.clone(),
            frontier: window.frontier(),
            highest: window.highest(),
            accepted: self.monitor.accepted(),
            window: BufferUse { size: Some(self.window_size), used: window.used() },
            spill: BufferUse { size: self.spill, used: window.beyond() },
            needed: window.needed(),
            kind: self.monitor.kind(),
            sink: self.monitor.describe(),
        }
    }

    /// Releases writers that are being killed and checks the sink. Called every second.
    pub fn tick(&self, is_killed: impl Fn(u32) -> bool) {
        // A write may hold the lock while the host of the spill file hangs, and the caller of `tick`
        // waits for nobody.
        let Some(mut core) = self.core.try_lock() else { return };
        let killed = core.queue.take_killed(is_killed);
        if !killed.is_empty() && self.finish == FinishWhen::Close {
            // The writer's last close follows, and would look like the end of a complete image.
            self.fail(&mut core, "a writer was killed before its last write".to_owned());
        }
        drop(core);
        reply_all(killed, libc::EINTR);
        if let Some(why) = self.monitor.failure() {
            self.on_sink_event(SinkEvent::Failed(why));
        }
    }

    /// Handles an event that the sink reports by itself.
    pub(super) fn on_sink_event(&self, event: SinkEvent) {
        let mut core = self.core.lock();
        if core.state != OutputState::Open {
            // The sender, or a waiter for the end, notices the event as well.
            return;
        }
        match event {
            SinkEvent::Failed(why) => self.fail(&mut core, why),
            // Only the sender knows whether there is more to send: it may be sending the last data.
            SinkEvent::Gone(why) => core.sink_gone = Some(why),
        }
        let refused = self.take_refused(&mut core);
        drop(core);
        self.work.notify_all();
        reply_all(refused, libc::EIO);
    }
}

fn reply_all(writes: Vec<QueuedWrite>, code: i32) {
    for write in writes {
        (write.reply)(Err(os_error(code)));
    }
}

fn index(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

/// Formats a size for use in a config: whole KiB, rounded up.
fn spec_size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) && bytes > 0 {
        format!("{}M", bytes >> 20)
    } else {
        format!("{}K", bytes.div_ceil(1 << 10))
    }
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
