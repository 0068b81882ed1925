//! One open `ctl` file: who asks, waits, and is told how far it has come.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use serde_json::json;

use super::spot::Spot;
use super::{Control, lines};
use crate::host::errno;

/// A client is told at least this often that its request is still being worked on.
const PROGRESS: Duration = Duration::from_secs(1);

/// The longest request: a disk with all its keys, and paths, need a few kilobytes.
const LONGEST_REQUEST: usize = 64 << 10;
/// Answers that may lie unread when another request comes. Each may be as long as it is.
const MOST_UNREAD: usize = 64 << 10;
/// Requests that are worked on at a time in a mount, each by a thread: a `finish` waits as long as
/// its sink takes, a `commit` copies as long as there is something, and what else is asked does
/// not wait behind them.
const MOST_RUNNING: usize = 64;
/// Threads for requests: as many as there may be, and one more each who waits for the answer.
pub const THREADS: usize = 2 * MOST_RUNNING;

/// How far something has come, in bytes, and of how many.
pub(super) type Progress = Box<dyn Fn() -> Option<(u64, u64)> + Send>;

/// One open `ctl` file: requests in, lines out.
#[derive(Default)]
pub struct Session {
    state: Mutex<SessionState>,
    more: Condvar,
}

#[derive(Default)]
struct SessionState {
    out: Vec<u8>,
    busy: bool,
    /// Somebody waits for what comes.
    is_awaited: bool,
    /// What is told meanwhile.
    progress: Option<Progress>,
}

impl Session {
    /// Takes a request for `spot` and has `run` do it.
    ///
    /// # Errors
    /// `EBUSY` while another one is worked on; `ENOBUFS` while there are answers that nobody has
    /// read; `EMSGSIZE` for a request longer than any; `EAGAIN` while as many as there may be are
    /// worked on.
    pub fn request(
        self: &Arc<Self>,
        control: &Arc<Control>,
        spot: Spot,
        request: &[u8],
        run: impl FnOnce(crate::pool::Job),
    ) -> io::Result<()> {
        if request.len() > LONGEST_REQUEST {
            return Err(errno(libc::EMSGSIZE));
        }
        let mut state = self.state.lock();
        if state.busy {
            return Err(errno(libc::EBUSY));
        }
        if state.out.len() >= MOST_UNREAD {
            return Err(errno(libc::ENOBUFS));
        }
        let turn = Turn::take(control).ok_or_else(|| errno(libc::EAGAIN))?;
        state.busy = true;
        drop(state);
        let progress = control.progress_of(spot);
        self.state.lock().progress = progress;
        let (session, control, request) = (Arc::clone(self), Arc::clone(control), request.to_vec());
        run(Box::new(move || {
            let there = Arc::clone(&session);
            // The handle, this job and the question itself: without the first nobody waits.
            let is_gone = move || Arc::strong_count(&there) < 3;
            let answer = match spot {
                Spot::DiskCtl(slot) => control.answer_disk(slot, &request, &is_gone),
                _ => control.answer_mount(&request),
            };
            drop(turn);
            let mut state = session.state.lock();
            state.out.extend(lines(&answer));
            state.busy = false;
            state.progress = None;
            session.more.notify_all();
        }));
        Ok(())
    }

    /// The next bytes of the answer: waits for them, but no longer than a second; then a
    /// progress line. Nothing when no request is being worked on.
    ///
    /// # Errors
    /// `EBUSY` while somebody else waits here for the answer.
    pub fn read(&self, len: usize) -> io::Result<Vec<u8>> {
        let mut state = self.state.lock();
        if state.out.is_empty() && state.busy {
            if std::mem::replace(&mut state.is_awaited, true) {
                return Err(errno(libc::EBUSY));
            }
            let waiting = |state: &mut SessionState| state.out.is_empty() && state.busy;
            self.more.wait_while_for(&mut state, waiting, PROGRESS);
            state.is_awaited = false;
            if state.out.is_empty() && state.busy {
                let far = state.progress.as_ref().and_then(|progress| progress());
                state.out = lines(&match far {
                    Some((done, total)) => json!({ "progress": { "done": done, "total": total } }),
                    None => json!({ "progress": {} }),
                });
            }
        }
        let len = len.min(state.out.len());
        let rest = state.out.split_off(len);
        Ok(std::mem::replace(&mut state.out, rest))
    }
}

/// One of the requests that may be worked on at a time.
struct Turn(Arc<Control>);

impl Turn {
    fn take(control: &Arc<Control>) -> Option<Self> {
        let more = |running| (running < MOST_RUNNING).then_some(running + 1);
        control.running.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        Some(Self(Arc::clone(control)))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::SeqCst);
    }
}
