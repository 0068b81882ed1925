//! An output stream at work: writes come in, one thread sends what leaves.
//!
//! ```text
//!   write ──> window: fits? ──> store ──> frontier advances ──┐ (under one lock, for as long as
//!     │          │ no room while the sink is behind           │  it takes to copy)
//!     │          └──> queue: the reply is parked              v
//!     └──< reply                 ^                        sender ──> sink   (no lock held)
//!                                └── carried out as room comes back ──┘
//! ```
//!
//! What is held is bounded by window, spill and [`BACKLOG`]; a write that would make it more
//! waits in the queue, and no thread waits with it. Whether a write is accepted depends on the
//! order of writes alone, never on how fast the sink is.
//!
//! A failure is for ever: every later write, sync and close is `EIO`.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::queue::{Queue, Reply};
use super::runs::Written;
use super::stop::Stop;
use super::store::{PAGE, PAGE_LEN, Page, Part, Store};
use super::window::{Leaving, Window};
use crate::extents::Extent;
use crate::host::errno;
use crate::spec::{FinishWhen, Pad, StreamSpec, format_size};

/// What may be on its way to the sink beside what window and spill hold: 4 MiB keep both ends
/// busy.
const BACKLOG: u64 = 4 << 20;
/// Data given to the sink at a time: the largest pipe of an unprivileged user.
const BATCH: u64 = 1 << 20;
/// How long `finish` waits for writers to go: RELEASE comes after close(2) has returned.
const WRITERS: Duration = Duration::from_secs(5);
/// How often it looks.
const LOOK: Duration = Duration::from_millis(20);
/// How long an aborted sink may take to let go.
const ABORTING: Duration = Duration::from_secs(5);

static NO_DATA: Page = [0; PAGE_LEN];

/// Where the bytes go. One thread calls, in the order of the disk; a call takes as long as it
/// takes and is `ECANCELED` once the stream is stopped.
pub trait Outlet: Send {
    /// Gets ready, and waits for a reader.
    ///
    /// # Errors
    /// `ECANCELED`; the host's errno.
    fn prepare(&mut self) -> io::Result<()>;

    /// Sends `parts`, the disk's bytes from `offset` on.
    ///
    /// # Errors
    /// `ECANCELED`; the host's errno, `EPIPE` when nobody reads.
    fn data(&mut self, offset: u64, parts: &[IoSlice<'_>]) -> io::Result<()>;

    /// Sends what was written as zeros.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn zeros(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Sends what was never written.
    ///
    /// # Errors
    /// As [`data`](Self::data).
    fn hole(&mut self, range: Range<u64>) -> io::Result<()>;

    /// Whether it takes bytes for an offset that was sent before.
    fn rewrites(&self) -> bool;

    /// An error of the calls above, for the user.
    fn explain(&self, error: &io::Error) -> String;

    /// The stream is whole, and `end` bytes long.
    ///
    /// # Errors
    /// A line: it was not all accepted, or a program failed.
    fn finish(self: Box<Self>, end: u64) -> Result<(), String>;

    /// The stream never gets whole.
    fn abort(self: Box<Self>);
}

/// Looks at a sink from other threads.
pub trait Watch: Send + Sync {
    /// `file`, `cmd` and the like.
    fn kind(&self) -> &'static str;
    /// As the user wrote it.
    fn describe(&self) -> String;
    /// The disk's bytes before this offset were accepted.
    fn accepted(&self) -> u64;
    /// Why it cannot work any more, if that is known already.
    fn failure(&self) -> Option<String>;
    /// Ends its programs at once.
    fn kill(&self);
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It takes writes.
    Open,
    /// It is complete, and what is left is being sent.
    Finishing,
    /// All of it was accepted.
    Finished,
    /// It was never complete: a write came too late, or the sink failed.
    Failed,
    /// It was given up.
    Aborted,
}

impl State {
    /// The word for it.
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

/// How long a sink is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// As long as it takes.
    Endless,
    /// So long.
    Total(Duration),
    /// Until it has taken nothing for so long.
    Stalled(Duration),
}

impl Patience {
    /// As a request has it: so many milliseconds, or as long as it takes.
    #[must_use]
    pub fn of_request(milliseconds: Option<u64>) -> Self {
        milliseconds.map_or(Self::Endless, |time| Self::Total(Duration::from_millis(time)))
    }

    fn wait(self) -> Option<Duration> {
        match self {
            Self::Endless => None,
            Self::Total(time) | Self::Stalled(time) => Some(time),
        }
    }
}

/// Why a stream is not finished.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FinishError {
    /// Somebody may still write.
    #[error("is open for writing")]
    Busy,
    /// The time is over and the sink still works on it.
    #[error("{0}")]
    StillFinishing(String),
    /// It will never be.
    #[error("{0}")]
    Failed(String),
}

/// What a stream says of itself.
#[derive(Clone, Debug)]
pub struct Status {
    /// How far it is.
    pub state: State,
    /// Why it failed.
    pub error: Option<String>,
    /// The first byte that has not left.
    pub frontier: u64,
    /// The end of the highest write.
    pub highest: u64,
    /// The sink has accepted everything before this byte.
    pub accepted: u64,
    /// The window's size, and the data in it.
    pub window: (u64, u64),
    /// The spill's size (`None`: no limit), and the data in it.
    pub spill: (Option<u64>, u64),
    /// The window that is needed without spill, and the spill with this window.
    pub needed: (u64, u64),
    /// What kind of sink it has.
    pub kind: &'static str,
    /// The sink, as the user wrote it.
    pub sink: String,
}

enum Late {
    Data(Vec<u8>),
    Zeros(u64),
    Hole(u64),
}

/// What the sender does next.
enum Step {
    Run(Leaving, Vec<Part>),
    Late(u64, Late),
    Finish(u64),
    Abort,
    /// The store cannot give back what it holds.
    Broken(io::Error),
}

/// How a write went.
enum Attempt {
    Done(io::Result<()>),
    /// There is no room until the sink has taken more.
    NoRoom,
}

struct Core {
    window: Window,
    store: Store,
    queue: Queue,
    /// Later records for what was sent already.
    late: VecDeque<(u64, Late)>,
    late_bytes: u64,
    state: State,
    error: Option<String>,
    /// Everything before it was dropped from the store.
    dropped: u64,
    /// The sender has ended.
    ended: bool,
}

/// An output stream.
pub struct Output {
    name: String,
    size: u64,
    read_window: u64,
    spill: Option<u64>,
    window: u64,
    pad: Pad,
    finish: FinishWhen,
    rewrites: bool,
    core: Mutex<Core>,
    /// There is something to do for the sender.
    work: Condvar,
    /// The state has changed, or the sender has ended.
    changed: Condvar,
    watch: Box<dyn Watch>,
    stop: Stop,
    sender: Mutex<Option<JoinHandle<()>>>,
}

impl Output {
    /// Starts the stream `name` into `outlet`. What does not fit into memory goes to a file in
    /// `dir`. `stop` is what the outlet listens to.
    ///
    /// # Errors
    /// The errno of making a thread.
    pub fn start(
        name: &str,
        spec: &StreamSpec,
        outlet: Box<dyn Outlet>,
        watch: Box<dyn Watch>,
        stop: Stop,
        dir: PathBuf,
    ) -> io::Result<Arc<Self>> {
        let measures = watch.kind() == "measure";
        let spill = if measures { spec.spill } else { Some(spec.spill.unwrap_or(0)) };
        let kept = spec.window.min(spec.size).saturating_add(spec.read_window.min(spec.size));
        let memory = if measures { BACKLOG } else { kept.saturating_add(BACKLOG) };
        let core = Core {
            window: Window::new(spec.size, spec.window, spill.unwrap_or(u64::MAX)),
            store: Store::new(memory, dir.clone(), spec.compress),
            queue: Queue::new(dir),
            late: VecDeque::new(),
            late_bytes: 0,
            state: State::Open,
            error: None,
            dropped: 0,
            ended: false,
        };
        let output = Arc::new(Self {
            name: name.to_owned(),
            size: spec.size,
            read_window: spec.read_window,
            spill,
            window: spec.window,
            pad: spec.pad,
            finish: spec.finish,
            rewrites: outlet.rewrites(),
            core: Mutex::new(core),
            work: Condvar::new(),
            changed: Condvar::new(),
            watch,
            stop,
            sender: Mutex::new(None),
        });
        let ours = Arc::clone(&output);
        let sender = thread::Builder::new().name("cowslip-send".to_owned());
        *output.sender.lock() = Some(sender.spawn(move || ours.send(outlet))?);
        Ok(output)
    }

    /// The size of the disk in bytes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that were written.
    #[must_use]
    pub fn written(&self) -> u64 {
        self.core.lock().window.written()
    }

    /// When it is complete.
    #[must_use]
    pub fn finish_when(&self) -> FinishWhen {
        self.finish
    }

    /// Describes a prefix of `range`, which lies inside the disk.
    #[must_use]
    pub fn describe(&self, range: Range<u64>) -> Extent {
        self.core.lock().window.extent_at(range)
    }

    /// Reads what was written, zeros where nothing was. Moves nothing.
    ///
    /// # Errors
    /// `EIO` before the frontier and the read-window; the host's errno from the spill.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut core = self.core.lock();
        if offset < core.window.frontier().saturating_sub(self.read_window) {
            return Err(errno(libc::EIO));
        }
        let end = offset + buf.len() as u64;
        let mut at = offset;
        while at < end {
            let (stop, written) = core.window.runs().at(at);
            let stop = stop.min(end);
            let part = &mut buf[index(at - offset)..index(stop - offset)];
            match written {
                Some(Written::Data) => core.store.read(at, part)?,
                Some(Written::Zeros) | None => part.fill(0),
            }
            at = stop;
        }
        Ok(())
    }

    /// Writes `buf` at `offset`, inside the disk. `reply` is called once: at once, or when the
    /// sink has made room. `client` is the thread that waits for it, 0 when it is not known.
    ///
    /// The reply's errors: `EIO` once the stream is not open any more, and for a change of what
    /// has left, which fails the stream; `EINTR` when the client is killed while it waits.
    pub fn write(&self, offset: u64, buf: &[u8], client: u32, reply: Reply) {
        let mut core = self.core.lock();
        // In order: what came before waits, too.
        let attempt = match core.queue.is_empty() {
            true => self.attempt(&mut core, offset, buf),
            false if core.state == State::Open => Attempt::NoRoom,
            false => Attempt::Done(Err(errno(libc::EIO))),
        };
        match attempt {
            Attempt::NoRoom => core.queue.push(offset, buf, client, reply),
            Attempt::Done(result) => {
                let refused = self.refused(&mut core);
                drop(core);
                self.work.notify_one();
                reply(result);
                answer_all(refused, libc::EIO);
            }
        }
    }

    /// The writes that wait for a stream that is not open any more.
    fn refused(&self, core: &mut Core) -> Vec<Reply> {
        if core.state == State::Open { Vec::new() } else { core.queue.take_all() }
    }

    fn attempt(&self, core: &mut Core, offset: u64, buf: &[u8]) -> Attempt {
        if core.state != State::Open {
            return Attempt::Done(Err(errno(libc::EIO)));
        }
        let waits = core.window.sent() < core.window.frontier() || !core.late.is_empty();
        let limit = self.window.saturating_add(self.spill.unwrap_or(u64::MAX / 4));
        let held = core.window.held() + core.late_bytes + buf.len() as u64;
        if waits && held > limit.saturating_add(BACKLOG) {
            return Attempt::NoRoom;
        }
        if let Some(at) = core.window.first_change(offset, buf) {
            core.window.note_change(at);
            if !self.rewrites && at < core.window.frontier() && !self.is_same(core, offset, buf) {
                self.fail_late(core, at);
                return Attempt::Done(Err(errno(libc::EIO)));
            }
        }
        match self.apply(core, offset, buf) {
            Ok(()) => Attempt::Done(Ok(())),
            Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                self.make_room(core, buf.len() as u64)
            }
            Err(error) => Attempt::Done(Err(error)),
        }
    }

    /// Whether what `buf` has for before the frontier is there already, as far as that can still
    /// be read.
    fn is_same(&self, core: &mut Core, offset: u64, buf: &[u8]) -> bool {
        let frontier = core.window.frontier();
        let end = frontier.min(offset + buf.len() as u64);
        if offset < frontier.saturating_sub(self.read_window) {
            return false;
        }
        let mut at = offset;
        while at < end {
            let (stop, written) = core.window.runs().at(at);
            let stop = stop.min(end);
            let part = &buf[index(at - offset)..index(stop - offset)];
            let mut there = vec![0; part.len()];
            if written == Some(Written::Data) && core.store.read(at, &mut there).is_err() {
                return false;
            }
            if there != part {
                return false;
            }
            at = stop;
        }
        true
    }

    /// Stores the write and lets leave what must.
    fn apply(&self, core: &mut Core, offset: u64, buf: &[u8]) -> io::Result<()> {
        // Before the frontier nothing changes, unless the frames can say so.
        let fixed = if self.rewrites { core.window.taken() } else { core.window.frontier() };
        let end = offset + buf.len() as u64;
        let start = offset.max(fixed).min(end);
        let (head, body) = buf.split_at(index(start - offset));
        store_pieces(core, start, body)?;
        if self.rewrites {
            for_pieces(offset, head, |at, piece, written| {
                let late = match written {
                    Written::Data => {
                        core.late_bytes += piece.len() as u64;
                        Late::Data(piece.to_vec())
                    }
                    Written::Zeros => Late::Zeros(piece.len() as u64),
                };
                core.late.push_back((at, late));
            });
            // Only what can still be read back is kept beside.
            let kept = core.dropped.clamp(offset, start);
            let (gone, kept_bytes) = head.split_at(index(kept - offset));
            store_pieces(core, kept, kept_bytes)?;
            for_pieces(offset, gone, |at, piece, written| {
                core.window.set(at..at + piece.len() as u64, Some(written));
            });
        }
        core.window.advance();
        Ok(())
    }

    /// The host has no room for what the spill allows: from now on it allows less, and what must
    /// leave for that leaves.
    fn make_room(&self, core: &mut Core, len: u64) -> Attempt {
        let budget = core.window.beyond().saturating_sub(len.max(PAGE));
        let moved = core.window.advance_to_hold(budget);
        if moved || core.window.sent() < core.window.frontier() {
            self.work.notify_one();
            return Attempt::NoRoom;
        }
        Attempt::Done(Err(errno(libc::ENOSPC)))
    }

    fn fail_late(&self, core: &mut Core, at: u64) {
        let (window, spill) = core.window.needed();
        let frontier = core.window.frontier();
        let why = format!(
            "a write at {at} came after the frontier {frontier}: so far it needs window={} or spill={}",
            plain_size(window),
            plain_size(spill)
        );
        self.fail(core, why);
    }

    fn fail(&self, core: &mut Core, why: String) {
        if matches!(core.state, State::Open | State::Finishing) {
            log::error!("{}: the stream failed: {why}", self.name);
            core.state = State::Failed;
            core.error = Some(why);
            self.stop.stop();
            self.work.notify_all();
            self.changed.notify_all();
        }
    }

    /// Makes `range` a hole, or zeros: both cost nothing and are nothing to send.
    ///
    /// # Errors
    /// `EOPNOTSUPP` when other bytes than zeros have left; `EIO` once it is not open any more.
    pub fn discard(&self, range: Range<u64>) -> io::Result<()> {
        let mut core = self.core.lock();
        if core.state != State::Open {
            return Err(errno(libc::EIO));
        }
        let frontier = core.window.frontier();
        let changed = core.window.runs().data_within(range.clone()).next();
        if let Some(first) = changed {
            core.window.note_change(first.start);
            if !self.rewrites && first.start < frontier {
                return Err(errno(libc::EOPNOTSUPP));
            }
        }
        let fixed = if self.rewrites { core.window.taken() } else { frontier };
        if self.rewrites {
            let head = range.start..range.end.min(fixed);
            let parts: Vec<_> = core.window.runs().data_within(head).collect();
            for part in parts {
                core.late.push_back((part.start, Late::Hole(part.end - part.start)));
                core.window.set(part, None);
            }
        }
        let rest = range.start.max(fixed)..range.end;
        if !rest.is_empty() {
            core.window.set(rest.clone(), None);
            core.store.drop_within(rest);
        }
        drop(core);
        self.work.notify_one();
        Ok(())
    }

    /// Cuts off what is held past `from`; the size stays (truncation).
    ///
    /// # Errors
    /// `EIO` when other bytes than zeros past it have left, and once it is not open any more.
    pub fn truncate(&self, from: u64) -> io::Result<()> {
        let mut core = self.core.lock();
        if core.state != State::Open {
            return Err(errno(libc::EIO));
        }
        let from = from.min(self.size);
        if !core.window.truncate(from) {
            return Err(errno(libc::EIO));
        }
        let start = from.max(core.window.frontier());
        core.store.drop_within(start..self.size);
        Ok(())
    }

    /// The sticky state: nothing is drained.
    ///
    /// # Errors
    /// `EIO` when the stream failed or was given up.
    pub fn sync(&self) -> io::Result<()> {
        match self.core.lock().state {
            State::Open | State::Finishing | State::Finished => Ok(()),
            State::Failed | State::Aborted => Err(errno(libc::EIO)),
        }
    }

    /// What it says of itself.
    #[must_use]
    pub fn status(&self) -> Status {
        let core = self.core.lock();
        let window = &core.window;
        Status {
            state: core.state,
            error: core.error.clone(),
            frontier: window.frontier(),
            highest: window.highest(),
            accepted: self.watch.accepted(),
            window: (self.window, window.used()),
            spill: (self.spill, window.beyond()),
            needed: window.needed(),
            kind: self.watch.kind(),
            sink: self.watch.describe(),
        }
    }

    /// Where the stream will end, in bytes.
    fn end_of(&self, core: &Core) -> u64 {
        match self.pad {
            Pad::Size => self.size,
            Pad::Highest => core.window.highest().max(core.window.frontier()),
        }
    }

    /// Bytes accepted, and how many there will be.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let core = self.core.lock();
        (self.watch.accepted(), self.end_of(&core))
    }

    /// Completes the stream: waits for writers to go, sends what is held, and waits for the sink.
    /// Called again it waits on, or repeats the result. What it says is for the user.
    ///
    /// # Errors
    /// [`FinishError`]; when `patience` is over the sink goes on, and may be asked for again.
    pub fn finish(
        &self,
        has_writers: &dyn Fn() -> bool,
        patience: Patience,
    ) -> Result<String, FinishError> {
        let mut until = patience.wait().map(|time| Instant::now() + time);
        let grace = Instant::now() + patience.wait().map_or(WRITERS, |time| time.min(WRITERS));
        loop {
            let mut core = self.core.lock();
            if core.state != State::Open {
                break;
            }
            if !has_writers() {
                self.begin_finish(&mut core);
                break;
            }
            drop(core);
            if Instant::now() >= grace {
                return Err(FinishError::Busy);
            }
            thread::sleep(LOOK);
        }
        let mut core = self.core.lock();
        let mut before = self.watch.accepted();
        while core.state == State::Finishing {
            let Some(end) = until else {
                self.changed.wait(&mut core);
                continue;
            };
            if !self.changed.wait_until(&mut core, end).timed_out()
                || core.state != State::Finishing
            {
                continue;
            }
            let now = self.watch.accepted();
            match patience {
                Patience::Stalled(time) if now > before => {
                    before = now;
                    until = Some(Instant::now() + time);
                }
                _ => return Err(FinishError::StillFinishing(self.how_far(&core))),
            }
        }
        self.result(&core)
    }

    /// The stream gets whole, in its own time.
    pub fn finish_later(&self) {
        let mut core = self.core.lock();
        if core.state == State::Open {
            self.begin_finish(&mut core);
        }
    }

    fn begin_finish(&self, core: &mut MutexGuard<'_, Core>) {
        core.state = State::Finishing;
        let end = self.end_of(core);
        core.window.finish(end);
        self.work.notify_all();
        let refused = core.queue.take_all();
        MutexGuard::unlocked(core, || answer_all(refused, libc::EIO));
    }

    fn how_far(&self, core: &Core) -> String {
        let (done, total) = (self.watch.accepted(), self.end_of(core));
        format!(
            "{} of {} are sent, and the sink still works: cowslip finish again waits on, cowslip abort gives up",
            format_size(done),
            format_size(total)
        )
    }

    fn result(&self, core: &Core) -> Result<String, FinishError> {
        let sink = self.watch.describe();
        let (window, spill) = core.window.needed();
        match (core.state, &core.error) {
            (State::Finished, _) if self.watch.kind() == "measure" => Ok(format!(
                "{}: needs window={} (without spill), or spill={} (with window={})",
                self.name,
                plain_size(window),
                plain_size(spill),
                plain_size(self.window),
            )),
            (State::Finished, _) => {
                let end = format_size(self.end_of(core));
                Ok(format!("{}: finished, {end} in {sink}", self.name))
            }
            (_, Some(error)) => Err(FinishError::Failed(error.clone())),
            (state, None) => Err(FinishError::Failed(format!("the stream is {}", state.name()))),
        }
    }

    /// Gives the stream up: its programs are killed before their input ends.
    ///
    /// # Errors
    /// A line when it is finished already, or when its sink does not let go.
    pub fn abort(&self, why: &str) -> Result<(), String> {
        let mut core = self.core.lock();
        match core.state {
            State::Finished => return Err("it is finished already".to_owned()),
            State::Open | State::Finishing => {
                log::warn!("{}: the stream is given up: {why}", self.name);
                core.state = State::Aborted;
                core.error = Some(why.to_owned());
            }
            State::Failed | State::Aborted => {}
        }
        let refused = core.queue.take_all();
        self.stop.stop();
        self.work.notify_all();
        self.changed.notify_all();
        MutexGuard::unlocked(&mut core, || {
            answer_all(refused, libc::EIO);
            self.watch.kill();
        });
        let working = |core: &mut Core| !core.ended;
        if self.changed.wait_while_for(&mut core, working, ABORTING).timed_out() {
            return Err("its sink does not let go".to_owned());
        }
        Ok(())
    }

    /// The end of the mount: a stream that is not complete is finished, if it is one that ends
    /// with the mount, or given up.
    ///
    /// # Errors
    /// A line when it is not whole, and nobody had given it up.
    pub fn close(
        &self,
        has_writers: &dyn Fn() -> bool,
        patience: Patience,
    ) -> Result<Option<String>, String> {
        let state = self.core.lock().state;
        let result = match (state, self.finish) {
            (State::Open, FinishWhen::Umount) | (State::Finishing | State::Finished, _) => {
                match self.finish(has_writers, patience) {
                    Ok(line) => Ok((state != State::Finished).then_some(line)),
                    Err(error) => {
                        let error = error.to_string();
                        // What has failed stays so; what still works does not any more.
                        let _ = self.abort(&format!("unmounted: {error}"));
                        Err(error)
                    }
                }
            }
            (State::Open, _) => self.give_up(),
            (State::Failed, _) => {
                let error = self.core.lock().error.clone().unwrap_or_default();
                Err(format!("the stream failed: {error}"))
            }
            (State::Aborted, _) => Ok(None),
        };
        if self.core.lock().ended
            && let Some(sender) = self.sender.lock().take()
        {
            // It has ended; a panic in it ends the process.
            let _ = sender.join();
        }
        result
    }

    fn give_up(&self) -> Result<Option<String>, String> {
        let was_written = self.core.lock().window.highest() > 0;
        self.abort("unmounted before it was finished")?;
        let line =
            "the stream was not finished, and is given up: cowslip finish comes before umount";
        if was_written { Err(line.to_owned()) } else { Ok(Some(format!("{}: {line}", self.name))) }
    }

    /// Every second: releases writers that are being killed, and looks after the sink.
    pub fn tick(&self, is_killed: impl Fn(u32) -> bool) {
        let killed = self.core.lock().queue.take_killed(is_killed);
        answer_all(killed, libc::EINTR);
        let is_open = self.core.lock().state == State::Open;
        if is_open && let Some(why) = self.watch.failure() {
            let mut core = self.core.lock();
            self.fail(&mut core, why);
            let refused = self.refused(&mut core);
            drop(core);
            answer_all(refused, libc::EIO);
        }
    }

    /// The sender's thread.
    fn send(&self, mut outlet: Box<dyn Outlet>) {
        if let Err(error) = outlet.prepare() {
            self.sink_failed(&*outlet, &error);
        }
        loop {
            let sent = match self.next() {
                Step::Run(Leaving { range, written }, parts) => {
                    let sent = match written {
                        Some(Written::Data) => {
                            let parts: Vec<_> =
                                parts.iter().map(|part| IoSlice::new(part.bytes())).collect();
                            outlet.data(range.start, &parts)
                        }
                        Some(Written::Zeros) => outlet.zeros(range.clone()),
                        None => outlet.hole(range.clone()),
                    };
                    drop(parts);
                    sent.map(|()| self.accepted(Some(range.end), 0))
                }
                Step::Late(offset, late) => {
                    let (sent, len) = match &late {
                        Late::Data(bytes) => {
                            (outlet.data(offset, &[IoSlice::new(bytes)]), bytes.len() as u64)
                        }
                        Late::Zeros(len) => (outlet.zeros(offset..offset + len), 0),
                        Late::Hole(len) => (outlet.hole(offset..offset + len), 0),
                    };
                    sent.map(|()| self.accepted(None, len))
                }
                Step::Broken(error) => {
                    let mut core = self.core.lock();
                    self.fail(&mut core, format!("its spill cannot be read: {error}"));
                    Ok(())
                }
                Step::Finish(end) => {
                    let result = outlet.finish(end);
                    return self.ended(Some(result));
                }
                Step::Abort => {
                    outlet.abort();
                    return self.ended(None);
                }
            };
            if let Err(error) = sent {
                self.sink_failed(&*outlet, &error);
            }
        }
    }

    fn sink_failed(&self, outlet: &dyn Outlet, error: &io::Error) {
        let why = outlet.explain(error);
        let mut core = self.core.lock();
        self.fail(&mut core, why);
        let refused = self.refused(&mut core);
        drop(core);
        answer_all(refused, libc::EIO);
    }

    /// Waits for something to do.
    fn next(&self) -> Step {
        let mut core = self.core.lock();
        loop {
            match core.state {
                State::Failed | State::Aborted => return Step::Abort,
                State::Open | State::Finishing | State::Finished => {}
            }
            if let Some((offset, late)) = core.late.pop_front() {
                return Step::Late(offset, late);
            }
            if let Some(leaving) = core.window.take(BATCH) {
                if leaving.written != Some(Written::Data) {
                    return Step::Run(leaving, Vec::new());
                }
                return match core.store.parts(leaving.range.clone()) {
                    Ok(parts) => Step::Run(leaving, parts),
                    Err(error) => Step::Broken(error),
                };
            }
            if core.state == State::Finishing {
                return Step::Finish(self.end_of(&core));
            }
            self.work.wait(&mut core);
        }
    }

    /// The sink has taken what came before `to`, and `late` bytes of later records: there may be
    /// room for those who wait.
    fn accepted(&self, to: Option<u64>, late: u64) {
        let mut core = self.core.lock();
        core.late_bytes -= late;
        if let Some(to) = to {
            core.window.accepted(to);
        }
        let keep = core.window.sent().min(core.window.frontier().saturating_sub(self.read_window));
        if keep > core.dropped {
            let from = core.dropped;
            core.store.drop_before(from, keep);
            core.dropped = keep;
        }
        let mut done = Vec::new();
        while let Some((offset, bytes)) = self.first_that_may_fit(&core) {
            let attempt = match &bytes {
                Ok(bytes) => self.attempt(&mut core, offset, bytes),
                Err(_) => Attempt::Done(Err(errno(libc::EIO))),
            };
            match attempt {
                Attempt::NoRoom => break,
                Attempt::Done(result) => {
                    done.extend(core.queue.pop().map(|waiting| (waiting.reply, result)));
                }
            }
        }
        let refused = self.refused(&mut core);
        drop(core);
        for (reply, result) in done {
            reply(result);
        }
        answer_all(refused, libc::EIO);
    }

    /// The oldest write that waits, unless it is plain that there is no room for it.
    fn first_that_may_fit(&self, core: &Core) -> Option<(u64, io::Result<Vec<u8>>)> {
        let len = core.queue.first_len()? as u64;
        let limit = self.window.saturating_add(self.spill.unwrap_or(u64::MAX / 4));
        let held = core.window.held() + core.late_bytes + len;
        let waits = core.window.sent() < core.window.frontier() || !core.late.is_empty();
        if waits && held > limit.saturating_add(BACKLOG) {
            return None;
        }
        core.queue.first()
    }

    fn ended(&self, result: Option<Result<(), String>>) {
        let mut core = self.core.lock();
        core.ended = true;
        match result {
            Some(Ok(())) if core.state == State::Finishing => core.state = State::Finished,
            Some(Err(why)) => self.fail(&mut core, why),
            Some(Ok(())) | None => {}
        }
        let refused = self.refused(&mut core);
        self.changed.notify_all();
        drop(core);
        answer_all(refused, libc::EIO);
    }
}

fn answer_all(replies: Vec<Reply>, code: i32) {
    for reply in replies {
        reply(Err(errno(code)));
    }
}

fn index(distance: u64) -> usize {
    usize::try_from(distance).unwrap_or(usize::MAX)
}

/// A size that can be written into a spec: whole KiB, rounded up.
fn plain_size(bytes: u64) -> String {
    if bytes.is_multiple_of(1 << 20) && bytes > 0 {
        format!("{}M", bytes >> 20)
    } else {
        format!("{}K", bytes.div_ceil(1 << 10))
    }
}

/// Whether a piece of a page holds nothing but zeros.
fn is_zero(piece: &[u8]) -> bool {
    // A comparison of memory, many times faster than a loop over bytes.
    piece == &NO_DATA[..piece.len()]
}

/// Cuts `buf`, written at `offset`, into runs of data and of zeros, at page borders.
fn for_pieces(offset: u64, buf: &[u8], mut each: impl FnMut(u64, &[u8], Written)) {
    let mut open: Option<(usize, Written)> = None;
    let mut at = 0;
    while at < buf.len() {
        let skip = index((offset + at as u64) % PAGE);
        let end = (at + PAGE_LEN - skip).min(buf.len());
        let written = if is_zero(&buf[at..end]) { Written::Zeros } else { Written::Data };
        match open {
            Some((_, kind)) if kind == written => {}
            Some((start, kind)) => {
                each(offset + start as u64, &buf[start..at], kind);
                open = Some((at, written));
            }
            None => open = Some((at, written)),
        }
        at = end;
    }
    if let Some((start, kind)) = open {
        each(offset + start as u64, &buf[start..], kind);
    }
}

/// Stores the data first, then tells the window.
fn store_pieces(core: &mut Core, offset: u64, buf: &[u8]) -> io::Result<()> {
    let mut stored = Ok(());
    let store = &mut core.store;
    for_pieces(offset, buf, |at, piece, written| {
        if written == Written::Data && stored.is_ok() {
            stored = store.write(at, piece);
        }
    });
    stored?;
    for_pieces(offset, buf, |at, piece, written| {
        core.window.set(at..at + piece.len() as u64, Some(written));
    });
    Ok(())
}

#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod tests;
